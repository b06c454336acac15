/* noise_io.c - see noise_io.h. */
#include "tests/lib/noise_io.h"

#include <stdlib.h>
#include <string.h>

#include "proto/base/assert.h"

#define SNAPSHOT_POSITION 16 /* in a snapshot's header: see session.c */

static size_t append_room(void *context)
{
    (void)context;
    return SIZE_MAX / 2;
}

static enum status append(void *context, struct chunk_key key, const void *kv, const void *landmark)
{
    const struct noise_io *io = context;
    (void)key;
    memcpy(io->written, kv, io->kv_bytes);
    memcpy(io->written + io->kv_bytes, landmark, io->landmark_bytes);
    return STATUS_OK;
}

static void fill(const struct noise_io *io, uint64_t index, void *out, size_t bytes)
{
    const size_t from = (size_t)(index * 977) % (io->count - bytes / 2);
    memcpy(out, io->noise + from, bytes);
}

static enum status read_chunks(void *context, const struct chunk_read *reads, size_t count)
{
    const struct noise_io *io = context;
    for (size_t i = 0; i < count; i++)
        fill(io, reads[i].key.index, reads[i].kv, io->kv_bytes);
    return STATUS_OK;
}

static enum status read_landmarks(void *context, uint64_t branch, uint64_t first, uint64_t count,
                                  void *out)
{
    const struct noise_io *io = context;
    (void)branch;
    for (uint64_t i = 0; i < count; i++)
        fill(io, first + i, (char *)out + i * io->landmark_bytes, io->landmark_bytes);
    return STATUS_OK;
}

void noise_io_init(struct noise_io *io)
{
    *io = (struct noise_io){.count = (size_t)1 << 20};
    io->noise = malloc(io->count * sizeof *io->noise);
    ASSERT(io->noise);
    uint64_t state = 1;
    for (size_t i = 0; i < io->count; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        io->noise[i] = (uint16_t)((state >> 48 & 0x8000) | 0x3e00 | (state >> 40 & 0x1ff));
    }
}

void noise_io_close(struct noise_io *io)
{
    free(io->noise);
    free(io->written);
}

struct chunk_io noise_io(struct noise_io *io)
{
    return (struct chunk_io){.context = io,
                             .append_room = append_room,
                             .append = append,
                             .read = read_chunks,
                             .read_landmarks = read_landmarks};
}

void noise_io_attach(struct noise_io *io, struct engine *engine)
{
    io->kv_bytes = engine_get_info(engine)->kv_bytes;
    io->landmark_bytes = engine_get_info(engine)->landmark_bytes;
    free(io->written);
    io->written = malloc(io->kv_bytes + io->landmark_bytes);
    ASSERT(io->written);
}

enum status noise_io_session(struct engine *engine, uint64_t branch, uint64_t position,
                             struct engine_session **out, struct error *err)
{
    const struct chunk_range range = {.branch = branch};
    struct engine_session *empty;
    enum status status = engine_session_create(engine, &range, 1, NULL, 0, &empty, err);
    if (status)
        return status;
    const size_t bytes = engine_session_snapshot_bytes(empty);
    char *snapshot = malloc(bytes);
    ASSERT(snapshot);
    engine_session_snapshot(empty, snapshot);
    engine_session_destroy(empty);
    memcpy(snapshot + SNAPSHOT_POSITION, &position, sizeof position);
    status = engine_session_create(engine, &range, 1, snapshot, bytes, out, err);
    free(snapshot);
    if (!status)
        ASSERT(engine_session_position(*out) == position);
    return status;
}
