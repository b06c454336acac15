/* memory.c - see memory.h. */
#include "engine/memory.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/base/assert.h"

/* Pages taken from the system at a time: as many as there are, between these; pinned memory is slow
 * to get, the less so the more it is at once. */
#define SLAB_PAGES 64
#define SLAB_BYTES_MOST ((size_t)32 << 20)
#define CACHE_LINE 64
#define AHEAD 32 /* pages between a prefetch and what it is for */

_Static_assert(sizeof(struct memory_page) == CACHE_LINE, "a page's bookkeeping is a cache line");

struct memory_slab {
    struct list node;
    void *data, *narrow;
    uint32_t used;
    struct memory_landmarks blocks[MEMORY_SLAB_BLOCKS];
};

/* Neighbouring chunks of a branch are neighbours in the table: it is large, and what is looked up
 * together should lie on few of its pages. */
static struct memory_page **slot(const struct memory *memory, struct chunk_key key)
{
    const uint64_t branch = key.branch * 0x9e3779b97f4a7c15u >> 32;
    return &memory->table[(branch + key.index) & memory->table_mask];
}

static struct memory_page *find(const struct memory *memory, struct chunk_key key)
{
    struct memory_page *page = *slot(memory, key);
    while (page && (page->key.branch != key.branch || page->key.index != key.index))
        page = page->next;
    return page;
}

static void unlink_page(struct memory *memory, struct memory_page *page)
{
    struct memory_page **at = slot(memory, page->key);
    while (*at != page)
        at = &(*at)->next;
    *at = page->next;
}

static void free_page(struct memory *memory, struct memory_page *page)
{
    page->next = memory->free_pages;
    memory->free_pages = page;
    memory->free++;
}

enum status memory_open(struct memory *memory, const struct ops *ops, struct ops_context *context,
                        size_t kv_bytes, size_t capacity, size_t block_bytes, size_t narrow_bytes)
{
    *memory = (struct memory){.ops = ops,
                              .context = context,
                              .kv_bytes = kv_bytes,
                              .block_bytes = block_bytes,
                              .narrow_bytes = narrow_bytes,
                              .capacity = capacity};
    list_init(&memory->lru);
    list_init(&memory->landmark_slabs);
    size_t size = 64;
    while (size < capacity)
        size *= 2;
    memory->table = calloc(size, sizeof *memory->table);
    memory->table_mask = size - 1;
    if (!memory->table)
        return STATUS_NO_MEMORY;
    return ops->prefetch ? loader_create(&memory->loader) : STATUS_OK;
}

void memory_close(struct memory *memory)
{
    ASSERT(list_empty(&memory->landmark_slabs));
    for (size_t i = 0; i < memory->slab_count; i += 2) {
        memory->ops->release_host(memory->context, memory->slabs[i]);
        free(memory->slabs[i + 1]);
    }
    free(memory->slabs);
    free(memory->table);
    free(memory->reads);
    loader_destroy(memory->loader);
    *memory = (struct memory){0};
}

/* Pages of the next slab. */
static size_t slab_pages(const struct memory *memory)
{
    const size_t left = memory->capacity - memory->allocated;
    const size_t most = SLAB_BYTES_MOST / memory->kv_bytes;
    size_t count = memory->allocated < most ? memory->allocated : most;
    count = count > SLAB_PAGES ? count : SLAB_PAGES;
    return count < left ? count : left;
}

/* More pages from the system, within the capacity. A slab is page memory and page structs. */
static bool grow(struct memory *memory)
{
    const size_t count = slab_pages(memory);
    if (!count)
        return false;
    void **slabs = realloc(memory->slabs, (memory->slab_count + 2) * sizeof *slabs);
    if (!slabs)
        return false;
    memory->slabs = slabs;
    char *data = memory->ops->alloc_host(memory->context, count * memory->kv_bytes);
    struct memory_page *pages = aligned_alloc(CACHE_LINE, count * sizeof *pages);
    if (!data || !pages) {
        if (data)
            memory->ops->release_host(memory->context, data);
        free(pages);
        return false;
    }
    slabs[memory->slab_count++] = data;
    slabs[memory->slab_count++] = pages;
    for (size_t i = count; i--;) {
        pages[i] = (struct memory_page){.data = data + i * memory->kv_bytes};
        list_init(&pages[i].lru);
        free_page(memory, &pages[i]);
    }
    memory->allocated += count;
    return true;
}

static struct memory_page *take_page(struct memory *memory)
{
    struct memory_page *page = memory->free_pages;
    if (!page && grow(memory))
        page = memory->free_pages;
    if (page) {
        memory->free_pages = page->next;
        memory->free--;
    } else {
        if (list_empty(&memory->lru))
            return NULL;
        page = LIST_ENTRY(memory->lru.next, struct memory_page, lru);
        list_remove(&page->lru);
        unlink_page(memory, page);
        memory->evictions++;
    }
    return page;
}

/* Takes a page, enters it under `key` and pins it. */
static struct memory_page *enter(struct memory *memory, struct chunk_key key)
{
    struct memory_page *page = take_page(memory);
    if (!page)
        return NULL;
    *page = (struct memory_page){.key = key, .data = page->data, .pins = 1};
    list_init(&page->lru);
    struct memory_page **at = slot(memory, key);
    page->next = *at;
    *at = page;
    memory->pinned++;
    return page;
}

void memory_grow_ahead(struct memory *memory)
{
    if (memory->free < slab_pages(memory) / 2)
        (void)grow(memory);
}

size_t memory_room(const struct memory *memory)
{
    return memory->capacity - memory->pinned;
}

struct memory_page *memory_page_create(struct memory *memory, struct chunk_key key)
{
    ASSERT(!find(memory, key));
    struct memory_page *page = enter(memory, key);
    if (page)
        page->unacknowledged = true;
    return page;
}

static struct memory_page *pin(struct memory *memory, struct chunk_key key, uint64_t stamp,
                               bool *added)
{
    struct memory_page *page = find(memory, key);
    *added = false;
    if (page && page->stamp == stamp)
        return page;
    if (page) {
        if (!page->pins++) {
            list_remove(&page->lru);
            memory->pinned++;
        }
    } else {
        page = enter(memory, key);
        if (!page)
            return NULL;
        page->unread = true;
    }
    page->stamp = stamp;
    *added = true;
    return page;
}

struct memory_page *memory_page_pin(struct memory *memory, struct chunk_key key, uint64_t stamp,
                                    bool *added)
{
    struct memory_page *page = pin(memory, key, stamp, added);
    if (!page || !*added)
        return page;
    memory->hits += !page->unread;
    memory->misses += page->unread;
    memory->expected_hits += page->expected;
    page->expected = false;
    return page;
}

struct memory_page *memory_page_expect(struct memory *memory, struct chunk_key key, uint64_t stamp,
                                       bool *added)
{
    struct memory_page *page = pin(memory, key, stamp, added);
    if (page && *added && page->unread) {
        page->expected = true;
        memory->expected++;
    }
    return page;
}

bool memory_pin_chunks(struct memory *memory, uint64_t branch, const uint64_t *chunks, size_t count,
                       uint64_t stamp, const void **data, struct memory_pins *pins)
{
    for (size_t i = 0; i < count; i++) {
        if (i + 2 * AHEAD < count)
            __builtin_prefetch(slot(memory, (struct chunk_key){branch, chunks[i + 2 * AHEAD]}));
        if (i + AHEAD < count)
            __builtin_prefetch(*slot(memory, (struct chunk_key){branch, chunks[i + AHEAD]}));
        bool added;
        struct memory_page *page =
            memory_page_pin(memory, (struct chunk_key){branch, chunks[i]}, stamp, &added);
        if (!page)
            return false;
        if (added)
            memory_pins_add(pins, page);
        data[i] = page->data;
    }
    return true;
}

void memory_page_unpin(struct memory *memory, struct memory_page *page)
{
    ASSERT(page->pins);
    if (--page->pins)
        return;
    memory->pinned--;
    if (page->dead)
        free_page(memory, page);
    else
        list_push_back(&memory->lru, &page->lru);
}

/* Takes the page out of the table; with no pin left it is free. */
static void drop(struct memory *memory, struct memory_page *page)
{
    unlink_page(memory, page);
    page->dead = true;
    if (!page->pins) {
        list_remove(&page->lru);
        free_page(memory, page);
    }
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static bool reserve_reads(struct memory *memory, size_t count)
{
    if (count <= memory->read_capacity)
        return true;
    struct chunk_read *grown = realloc(memory->reads, count * sizeof *grown);
    if (!grown)
        return false;
    memory->reads = grown;
    memory->read_capacity = count;
    return true;
}

/* What is unread among `pages` into memory->reads; how many. `*status`: whether there was room. */
static size_t list_unread(struct memory *memory, struct memory_page *const *pages, size_t count,
                          enum status *status)
{
    size_t missing = 0, at = 0;
    for (size_t i = 0; i < count; i++)
        missing += pages[i]->unread;
    *status = reserve_reads(memory, missing) ? STATUS_OK : STATUS_NO_MEMORY;
    for (size_t i = 0; i < count && !*status; i++)
        if (pages[i]->unread)
            memory->reads[at++] = (struct chunk_read){.key = pages[i]->key, .kv = pages[i]->data};
    return missing;
}

/* The unread among `pages` were read, or could not be. */
static void end_reads(struct memory *memory, struct memory_page *const *pages, size_t count,
                      enum status status)
{
    for (size_t i = 0; i < count; i++) {
        if (!pages[i]->unread)
            continue;
        pages[i]->unread = false;
        if (memory->ops->host_wrote)
            memory->ops->host_wrote(memory->context, pages[i]->data);
        if (status)
            drop(memory, pages[i]);
    }
}

bool memory_load_begin(struct memory *memory, const struct chunk_io *io,
                       struct memory_page *const *pages, size_t count)
{
    enum status status;
    ASSERT(!memory->loading);
    const size_t missing = memory->loader ? list_unread(memory, pages, count, &status) : 0;
    if (!missing || status)
        return false;
    memory->loading = pages;
    memory->loading_count = count;
    memory->read_bytes += missing * memory->kv_bytes;
    loader_begin(memory->loader, io, memory->reads, missing);
    return true;
}

enum status memory_load_end(struct memory *memory)
{
    if (!memory->loading)
        return STATUS_OK;
    const uint64_t begin = now_ns(); /* what went on beside the reading is not counted */
    const enum status status = loader_end(memory->loader);
    memory->read_ns += now_ns() - begin;
    end_reads(memory, memory->loading, memory->loading_count, status);
    memory->loading = NULL;
    return status;
}

enum status memory_load(struct memory *memory, const struct chunk_io *io,
                        struct memory_page *const *pages, size_t count)
{
    enum status status = memory_load_end(memory);
    for (size_t i = 0; status && i < count; i++)
        if (pages[i]->dead)
            return status; /* it was among those that could not be read */
    const size_t missing = list_unread(memory, pages, count, &status);
    if (!missing)
        return STATUS_OK;
    if (!status) {
        const uint64_t begin = now_ns();
        status = io->read(io->context, memory->reads, missing);
        memory->read_ns += now_ns() - begin;
        memory->read_bytes += missing * memory->kv_bytes;
    }
    end_reads(memory, pages, count, status);
    return status;
}

void memory_durable(struct memory *memory, struct chunk_key key, bool failed)
{
    struct memory_page *page = find(memory, key);
    if (!page || !page->unacknowledged)
        return;
    page->unacknowledged = false;
    if (failed)
        drop(memory, page);
    memory_page_unpin(memory, page);
}

void memory_forget(struct memory *memory, struct chunk_key key)
{
    struct memory_page *page = find(memory, key);
    if (page && page->unacknowledged)
        memory_durable(memory, key, true);
    else if (page)
        drop(memory, page);
}

/* ---- landmark blocks ---- */

static void free_slab(struct memory *memory, struct memory_slab *slab)
{
    if (slab && slab->data && memory->narrow_bytes)
        memory->ops->release_host(memory->context, slab->data);
    else if (slab && slab->data)
        memory->ops->release(memory->context, slab->data);
    if (slab && slab->narrow)
        memory->ops->release(memory->context, slab->narrow);
    free(slab);
}

static struct memory_slab *make_slab(struct memory *memory)
{
    const size_t bytes = MEMORY_SLAB_BLOCKS * memory->block_bytes, narrow = memory->narrow_bytes;
    struct memory_slab *slab = calloc(1, sizeof *slab);
    if (slab)
        slab->data = narrow ? memory->ops->alloc_host(memory->context, bytes)
                            : memory->ops->alloc(memory->context, bytes);
    if (slab && slab->data && narrow)
        slab->narrow = memory->ops->alloc(memory->context, MEMORY_SLAB_BLOCKS * narrow);
    if (!slab || !slab->data || (narrow && !slab->narrow)) {
        free_slab(memory, slab);
        return NULL;
    }
    for (size_t i = 0; i < MEMORY_SLAB_BLOCKS; i++) {
        slab->blocks[i].data = (char *)slab->data + i * memory->block_bytes;
        slab->blocks[i].narrow = narrow ? (char *)slab->narrow + i * narrow : NULL;
        slab->blocks[i].slab = slab;
    }
    list_push_front(&memory->landmark_slabs, &slab->node);
    return slab;
}

struct memory_landmarks *memory_landmarks_take(struct memory *memory)
{
    struct memory_slab *slab = LIST_ENTRY(memory->landmark_slabs.next, struct memory_slab, node);
    if (list_empty(&memory->landmark_slabs) || slab->used == MEMORY_SLAB_BLOCKS)
        slab = make_slab(memory);
    if (!slab)
        return NULL;
    struct memory_landmarks *block = slab->blocks;
    while (block->references)
        block++;
    block->references = 1;
    memory->landmark_bytes += memory->block_bytes;
    if (++slab->used == MEMORY_SLAB_BLOCKS) {
        list_remove(&slab->node);
        list_push_back(&memory->landmark_slabs, &slab->node);
    }
    return block;
}

void memory_landmarks_drop(struct memory *memory, struct memory_landmarks *block)
{
    struct memory_slab *slab = block->slab;
    if (--block->references)
        return;
    memory->landmark_bytes -= memory->block_bytes;
    list_remove(&slab->node);
    if (--slab->used) {
        list_push_front(&memory->landmark_slabs, &slab->node);
        return;
    }
    free_slab(memory, slab);
}
