/* chunk_io.h - what the engine needs of a memory that outlives it: append finished chunks, read
 * them back in batches. The server implements it over storage, tests in RAM.
 * Thread: every call comes from the engine's thread; done callbacks run on the implementer's.
 * Owns nothing. */
#ifndef ENGINE_CHUNK_IO_H
#define ENGINE_CHUNK_IO_H

#include <stddef.h>
#include <stdint.h>

#include "proto/status.h"

/* A chunk is named by the branch that wrote it and by its index in the sequence, so forks share
 * their parent's chunks under the parent's name. */
struct chunk_key {
    uint64_t branch;
    uint64_t index; /* chunk `index` holds the positions [index * S, (index + 1) * S) */
};

/* From chunk `first` on (until the next range begins), chunks belong to `branch`. The last range
 * of a session's lineage is its own branch: new chunks go there. */
struct chunk_range {
    uint64_t branch;
    uint64_t first;
};

struct chunk_read {
    struct chunk_key key;
    void *kv; /* out: engine_info.kv_bytes bytes */
};

struct chunk_io {
    void *context;
    /* How many appends will be accepted until it is asked again, whatever others write. */
    size_t (*append_room)(void *context);
    /* Append one finished chunk: `kv` (engine_info.kv_bytes) and `landmark`
     * (engine_info.landmark_bytes) are copied. Never waits for the disk. Once it is durable, or
     * has failed, the implementer lets the engine's thread call engine_chunk_durable(key).
     * STATUS_OK, STATUS_BUSY (more than append_room said), STATUS_CLOSED, STATUS_NO_MEMORY. */
    enum status (*append)(void *context, struct chunk_key key, const void *kv,
                          const void *landmark);
    /* Read `count` chunks' K/V in one batch, each into reads[i].kv; waits. STATUS_OK, STATUS_IO,
     * STATUS_CORRUPT (a chunk is missing or its checksum is wrong), STATUS_NO_MEMORY. Called by the
     * engine's thread or by its loader's, never while another call is under way. */
    enum status (*read)(void *context, const struct chunk_read *reads, size_t count);
    /* Read the landmarks of chunks [first, first + count) of `branch`, contiguous, into `out`
     * [count * landmark_bytes]; waits. The same codes. */
    enum status (*read_landmarks)(void *context, uint64_t branch, uint64_t first, uint64_t count,
                                  void *out);
};

#endif
