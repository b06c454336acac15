#include "clients/cli/source.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "clients/cli/http.h"
#include "proto/limits.h"

/* A server acknowledges every few blocks, so far less than this is ever waiting. */
#define KEPT_MAX (64 * LIMITS_MIB)
/* Under the server's patience with a silent body. */
#define SILENCE_MS (LIMITS_BODY_TIMEOUT_S * 1000 / 6)

enum status source_open(struct source *source, const char *path, struct error *err)
{
    struct stat stat;
    *source = (struct source){.fd = -1};
    buf_init(&source->kept);
    source->fd = strcmp(path, "-") == 0 ? dup(STDIN_FILENO) : open(path, O_RDONLY | O_CLOEXEC);
    if (source->fd < 0 || fstat(source->fd, &stat))
        return error_set(err, STATUS_IO, "cannot read %s: %s", path, strerror(errno));
    if (S_ISDIR(stat.st_mode))
        return error_set(err, STATUS_IO, "%s is a folder; name a text file", path);
    source->seekable = S_ISREG(stat.st_mode);
    if (source->seekable) {
        /* Standard input may be a file that something has read a part of. */
        off_t at = lseek(source->fd, 0, SEEK_CUR);
        source->offset = source->furthest = at > 0 ? (uint64_t)at : 0;
        source->total_bytes = (uint64_t)stat.st_size;
    }
    return STATUS_OK;
}

void source_close(struct source *source)
{
    if (source->fd >= 0)
        close(source->fd);
    buf_close(&source->kept);
}

ssize_t source_read(struct source *source, char *out, size_t room)
{
    uint64_t kept_end = source->kept_from + source->kept.size;
    ssize_t got;
    if (!source->seekable && source->offset < kept_end) {
        uint64_t left = kept_end - source->offset;
        got = (ssize_t)(left < room ? left : room);
        memcpy(out, source->kept.data + (source->offset - source->kept_from), (size_t)got);
    } else {
        struct pollfd ready = {.fd = source->fd, .events = POLLIN};
        if (!source->seekable &&
            (source->kept.size >= KEPT_MAX || poll(&ready, 1, SILENCE_MS) == 0))
            return 0;
        got = read(source->fd, out, room);
        if (got < 0)
            return -1;
        source->ended = got == 0;
        if (!source->seekable)
            buf_append(&source->kept, out, (size_t)got);
    }
    source->offset += (uint64_t)got;
    if (source->offset > source->furthest)
        source->furthest = source->offset;
    return got;
}

bool source_wait(struct source *source)
{
    if (source->offset < source->kept_from + source->kept.size)
        return true;
    if (source->ended || source->seekable)
        return !source->ended;
    struct pollfd ready = {.fd = source->fd, .events = POLLIN};
    while (poll(&ready, 1, -1) < 0 && errno == EINTR && !http_interrupted)
        ;
    return true;
}

bool source_seek(struct source *source, uint64_t offset)
{
    if (source->seekable) {
        if (lseek(source->fd, (off_t)offset, SEEK_SET) < 0)
            return false;
        source->ended = false;
        if (offset > source->furthest)
            source->furthest = offset;
    } else if (offset < source->kept_from || offset > source->furthest) {
        return false;
    }
    source->offset = offset;
    return true;
}

void source_release(struct source *source, uint64_t offset)
{
    if (source->seekable || offset <= source->kept_from)
        return;
    uint64_t drop = offset - source->kept_from;
    if (drop > source->kept.size)
        drop = source->kept.size;
    buf_consume(&source->kept, (size_t)drop);
    source->kept_from += drop;
}
