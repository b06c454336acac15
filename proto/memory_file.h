/* memory_file.h - the file that a memory travels in: manifest, part headers, checksums.
 * Thread: any (pure functions). Owns nothing but the manifest's metadata.
 *
 * The file is a row of zstd frames, one a part; `zstd -d` unpacks it. Unpacked, a part is a header
 * of MEMORY_FILE_HEADER_BYTES and its payload. Parts come in this order:
 *   MANIFEST   JSON: format, model and its fingerprint, sizes
 *   CHUNKS, LANDMARKS, TOKENS   of consecutive chunks, over and over; then the tokens of the last,
 *              unfinished chunk; bit 30 of a token is a mark (from format 3 on)
 *   SNAPSHOT   the snapshot's bytes, in as many parts as it takes; none for an empty memory
 *   TURNS      the places of its past, newest first: MEMORY_FILE_TURN_BYTES each (from format 2 on)
 *   END        no payload
 * Every checksum is seeded with the manifest's, so parts of two files never pass for one. */
#ifndef PROTO_MEMORY_FILE_H
#define PROTO_MEMORY_FILE_H

#include <stddef.h>
#include <stdint.h>

#include "proto/base/buf.h"
#include "proto/limits.h"
#include "proto/status.h"

#define MEMORY_FILE_FORMAT 3
#define MEMORY_FILE_HEADER_BYTES 48
#define MEMORY_FILE_PART_BYTES                                         \
    ((size_t)1 << 20) /* of a payload, or one chunk where that is more \
                       */
#define MEMORY_FILE_MANIFEST_BYTES ((size_t)256 << 10)

enum memory_file_kind {
    MEMORY_FILE_MANIFEST = 1,
    MEMORY_FILE_CHUNKS,
    MEMORY_FILE_LANDMARKS,
    MEMORY_FILE_TOKENS,
    MEMORY_FILE_SNAPSHOT,
    MEMORY_FILE_END,
    MEMORY_FILE_TURNS
};

struct memory_file_manifest {
    uint32_t format, chunk_tokens;
    uint64_t fingerprint;
    char model[384]; /* a record's 127 bytes; those that are no UTF-8 come back as three */
    uint64_t kv_bytes, landmark_bytes; /* of one chunk */
    uint64_t token_count, text_bytes, snapshot_bytes, turn_count;
    int64_t created_at;
    char *metadata; /* JSON text; free with memory_file_manifest_close */
};
void memory_file_write_manifest(struct buf *out, const struct memory_file_manifest *manifest);
/* STATUS_UNSUPPORTED (a newer format), STATUS_CORRUPT, STATUS_NO_MEMORY. */
STATUS_CHECKED enum status memory_file_read_manifest(const char *json, size_t size,
                                                     struct memory_file_manifest *manifest,
                                                     struct error *err);
/* The most chunks in one part. */
uint64_t memory_file_batch(const struct memory_file_manifest *manifest);
void memory_file_manifest_close(struct memory_file_manifest *manifest);

/* A place of the memory's past. */
#define MEMORY_FILE_TURN_BYTES (24 + LIMITS_BOOKMARK_BYTES)
#define MEMORY_FILE_PART_TURNS (MEMORY_FILE_PART_BYTES / MEMORY_FILE_TURN_BYTES)
struct memory_file_turn {
    uint64_t position, text_bytes;
    int64_t created_at;
    char bookmark[LIMITS_BOOKMARK_BYTES]; /* "" for none */
};
void memory_file_write_turn(unsigned char out[MEMORY_FILE_TURN_BYTES],
                            const struct memory_file_turn *turn);
/* STATUS_CORRUPT when its bookmark is no text. */
STATUS_CHECKED enum status memory_file_read_turn(const unsigned char *bytes,
                                                 struct memory_file_turn *turn);

struct memory_file_part {
    enum memory_file_kind kind;
    uint64_t number; /* from 0, the manifest */
    uint64_t first;  /* chunk, token, byte of the snapshot, or turn from the newest */
    uint64_t count;  /* of those; 0 for MANIFEST and END */
    uint64_t bytes;  /* of the payload */
    uint64_t checksum;
};
/* Fills in part->checksum. `seed` is the manifest's checksum, 0 for the manifest itself. */
void memory_file_write_header(unsigned char out[MEMORY_FILE_HEADER_BYTES],
                              struct memory_file_part *part, const void *payload, uint64_t seed);
/* STATUS_CORRUPT when these bytes are no header. */
STATUS_CHECKED enum status memory_file_read_header(const unsigned char *bytes,
                                                   struct memory_file_part *part);
/* STATUS_CORRUPT when header or payload are not what was written. */
STATUS_CHECKED enum status memory_file_check_part(const struct memory_file_part *part,
                                                  const void *payload, uint64_t seed);
/* "part 17 (chunks 64 to 127)". */
void memory_file_name_part(const struct memory_file_part *part, char *out, size_t room);

#endif
