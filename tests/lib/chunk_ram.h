/* chunk_ram.h - chunk_io in RAM: what the engine's tests use in place of storage.
 * Thread: the test's. Owns copies of every chunk appended. */
#ifndef TESTS_LIB_CHUNK_RAM_H
#define TESTS_LIB_CHUNK_RAM_H

#include "engine/engine.h"

struct chunk_ram_item {
    struct chunk_key key;
    void *kv, *landmark;
};

struct chunk_ram {
    size_t kv_bytes, landmark_bytes;
    struct chunk_ram_item *items;
    size_t count, capacity, acknowledged;
    size_t ordered;      /* items[i] is chunk i of the first branch for i below this */
    size_t room;         /* appends accepted before chunk_ram_acknowledge; SIZE_MAX: any number */
    size_t reads, calls; /* chunks read back, and in how many batches */
};

void chunk_ram_init(struct chunk_ram *ram);
void chunk_ram_close(struct chunk_ram *ram);
/* Forgets all but the first `count` chunks appended. */
void chunk_ram_cut(struct chunk_ram *ram, size_t count);
struct chunk_io chunk_ram_io(struct chunk_ram *ram);
/* Call once the engine is open. */
void chunk_ram_attach(struct chunk_ram *ram, struct engine *engine);
/* Tells the engine that what was appended so far is durable. */
void chunk_ram_acknowledge(struct chunk_ram *ram, struct engine *engine);

#endif
