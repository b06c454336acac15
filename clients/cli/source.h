/* source.h - the text of an append: a file, or a pipe that keeps what is not yet acknowledged, so
 * that both can be read again from the last commit.
 * Thread: one. Owns its file descriptor and what it keeps. */
#ifndef CLIENTS_CLI_SOURCE_H
#define CLIENTS_CLI_SOURCE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "proto/base/buf.h"
#include "proto/status.h"

struct source {
    int fd;
    bool seekable;
    bool ended;           /* the last byte was read */
    uint64_t total_bytes; /* of a file; 0 for a pipe */
    uint64_t offset;      /* of the next byte to give out */
    uint64_t furthest;    /* end of what was ever given out */
    struct buf kept;      /* of a pipe */
    uint64_t kept_from;   /* offset of its first byte */
};

/* `path` "-": standard input. STATUS_IO with the reason in `err` when it cannot be read. */
STATUS_CHECKED enum status source_open(struct source *source, const char *path, struct error *err);
void source_close(struct source *source);
/* Bytes read; 0 when the text ended, when a pipe has been silent for some seconds, or when as much
 * is kept as may be: what was given out so far can then be committed (see `ended`). -1: error. */
ssize_t source_read(struct source *source, char *out, size_t room);
/* Waits until a pipe has more bytes or has ended. False: it has ended. */
bool source_wait(struct source *source);
/* Goes on from `offset`, at most `furthest` (of a file: anywhere). False when those bytes are no
 * longer kept. */
bool source_seek(struct source *source, uint64_t offset);
/* Bytes before `offset` are committed and need not be kept. */
void source_release(struct source *source, uint64_t offset);

#endif
