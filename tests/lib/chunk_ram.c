/* chunk_ram.c - see chunk_ram.h. */
#include "tests/lib/chunk_ram.h"

#include <stdlib.h>
#include <string.h>

#include "proto/base/assert.h"

void chunk_ram_init(struct chunk_ram *ram)
{
    *ram = (struct chunk_ram){.room = SIZE_MAX};
}

void chunk_ram_close(struct chunk_ram *ram)
{
    chunk_ram_cut(ram, 0);
    free(ram->items);
}

void chunk_ram_cut(struct chunk_ram *ram, size_t count)
{
    for (size_t i = count; i < ram->count; i++) {
        free(ram->items[i].kv);
        free(ram->items[i].landmark);
    }
    ram->count = count < ram->count ? count : ram->count;
    ram->acknowledged = count < ram->acknowledged ? count : ram->acknowledged;
    ram->ordered = count < ram->ordered ? count : ram->ordered;
}

static size_t append_room(void *context)
{
    const struct chunk_ram *ram = context;
    const size_t waiting = ram->count - ram->acknowledged;
    return ram->room > waiting ? ram->room - waiting : 0;
}

static bool holds(const struct chunk_ram *ram, size_t at, struct chunk_key key)
{
    return ram->items[at].key.branch == key.branch && ram->items[at].key.index == key.index;
}

/* The last of that name. */
static struct chunk_ram_item *find(struct chunk_ram *ram, struct chunk_key key)
{
    if (key.index < ram->ordered && holds(ram, key.index, key))
        return &ram->items[key.index];
    for (size_t i = ram->count; i--;)
        if (holds(ram, i, key))
            return &ram->items[i];
    return NULL;
}

static enum status append(void *context, struct chunk_key key, const void *kv, const void *landmark)
{
    struct chunk_ram *ram = context;
    ASSERT(append_room(ram));
    if (ram->count == ram->capacity) {
        ram->capacity = ram->capacity ? 2 * ram->capacity : 64;
        ram->items = realloc(ram->items, ram->capacity * sizeof *ram->items);
        ASSERT(ram->items);
    }
    const bool first_branch = !ram->count || ram->items[0].key.branch == key.branch;
    if (first_branch && key.index < ram->ordered)
        ram->ordered = key.index; /* told anew from there on */
    else if (first_branch && key.index == ram->count && ram->ordered == ram->count)
        ram->ordered++;
    struct chunk_ram_item *item = &ram->items[ram->count++];
    *item = (struct chunk_ram_item){key, malloc(ram->kv_bytes), malloc(ram->landmark_bytes)};
    ASSERT(item->kv && item->landmark);
    memcpy(item->kv, kv, ram->kv_bytes);
    memcpy(item->landmark, landmark, ram->landmark_bytes);
    return STATUS_OK;
}

static enum status read_chunks(void *context, const struct chunk_read *reads, size_t count)
{
    struct chunk_ram *ram = context;
    ram->calls++;
    for (size_t i = 0; i < count; i++) {
        const struct chunk_ram_item *item = find(ram, reads[i].key);
        if (!item)
            return STATUS_CORRUPT;
        memcpy(reads[i].kv, item->kv, ram->kv_bytes);
        ram->reads++;
    }
    return STATUS_OK;
}

static enum status read_landmarks(void *context, uint64_t branch, uint64_t first, uint64_t count,
                                  void *out)
{
    struct chunk_ram *ram = context;
    for (uint64_t i = 0; i < count; i++) {
        const struct chunk_ram_item *item = find(ram, (struct chunk_key){branch, first + i});
        if (!item)
            return STATUS_CORRUPT;
        memcpy((char *)out + i * ram->landmark_bytes, item->landmark, ram->landmark_bytes);
    }
    return STATUS_OK;
}

struct chunk_io chunk_ram_io(struct chunk_ram *ram)
{
    return (struct chunk_io){.context = ram,
                             .append_room = append_room,
                             .append = append,
                             .read = read_chunks,
                             .read_landmarks = read_landmarks};
}

void chunk_ram_attach(struct chunk_ram *ram, struct engine *engine)
{
    ram->kv_bytes = engine_get_info(engine)->kv_bytes;
    ram->landmark_bytes = engine_get_info(engine)->landmark_bytes;
}

void chunk_ram_acknowledge(struct chunk_ram *ram, struct engine *engine)
{
    while (ram->acknowledged < ram->count)
        engine_chunk_durable(engine, ram->items[ram->acknowledged++].key, STATUS_OK);
}
