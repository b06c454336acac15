/* noise_io.h - chunk_io of a past that nobody wrote: landmarks and pages of any chunk are random
 * bytes, always the same ones, and what is appended is copied and forgotten. For sessions of any length at
 * once, whose times are what a real one's are.
 * Thread: the caller's. Owns the noise. */
#ifndef TESTS_LIB_NOISE_IO_H
#define TESTS_LIB_NOISE_IO_H

#include "engine/engine.h"

struct noise_io {
    size_t kv_bytes, landmark_bytes;
    uint16_t *noise; /* bf16 between 1/8 and 2, either sign */
    size_t count;    /* a power of two */
    char *written;   /* the last chunk that was appended */
};

void noise_io_init(struct noise_io *io);
void noise_io_close(struct noise_io *io);
struct chunk_io noise_io(struct noise_io *io);
/* Call once the engine is open. */
void noise_io_attach(struct noise_io *io, struct engine *engine);
/* A session of `branch` at `position`, with landmarks of everything before it and no state.
 * STATUS_NO_MEMORY. */
STATUS_CHECKED enum status noise_io_session(struct engine *engine, uint64_t branch,
                                            uint64_t position, struct engine_session **out,
                                            struct error *err);

#endif
