/* memory.h - the resident part of sessions' pasts: K/V pages under a budget, landmark blocks.
 * Thread: the engine's. Owns the pages' memory; a landmark block belongs to the sessions that
 * refer to it. Private to engine/.
 *
 * A page's life: made (memory_page_create, pinned until its chunk is durable) or read back from
 * chunk_io (memory_page_pin, then memory_load), used while pinned, then kept until the budget
 * needs its place, least recently used first. */
#ifndef ENGINE_MEMORY_H
#define ENGINE_MEMORY_H

#include <stdbool.h>

#include "engine/chunk_io.h"
#include "engine/loader.h"
#include "engine/ops.h"
#include "proto/base/list.h"

/* A cache line: a slice of rows looks up thousands of them. */
struct memory_page {
    struct chunk_key key;
    void *data; /* kv_bytes, memory of ops->alloc_host */
    uint32_t pins;
    bool unacknowledged;      /* one of the pins waits for the disk */
    bool unread;              /* named by a top-k, its bytes not here yet */
    bool expected;            /* read before anybody asked for it */
    bool dead;                /* no longer in the table; freed with its last pin */
    uint64_t stamp;           /* of the block of rows that pinned it last */
    struct memory_page *next; /* in its hash chain, or in the free list */
    struct list lru;          /* while not pinned */
};

/* Pages that somebody pinned, each once. */
struct memory_pins {
    struct memory_page **pages; /* [count], the caller's; the first `unread` are still to be read */
    size_t count, unread;
};

/* A page more, pinned just now. */
static inline void memory_pins_add(struct memory_pins *pins, struct memory_page *page)
{
    pins->pages[pins->count++] = page;
    if (!page->unread)
        return;
    pins->pages[pins->count - 1] = pins->pages[pins->unread];
    pins->pages[pins->unread++] = page;
}

#define MEMORY_SLAB_BLOCKS 16 /* landmark blocks taken from the backend at a time */

/* OPS_LANDMARK_BLOCK landmarks, shared by the sessions that came from one another. Blocks come from
 * the backend a slab at a time: a device hands out memory slowly, and waits to take it back. */
struct memory_landmarks {
    uint32_t references; /* 0: free */
    void *data;          /* memory of ops->alloc; where blocks have twins, of ops->alloc_host */
    void *narrow;        /* the twin (see ops_landmarks), or NULL */
    struct memory_slab *slab;
};

struct memory {
    const struct ops *ops;
    struct ops_context *context;
    size_t kv_bytes, block_bytes;
    size_t narrow_bytes;                      /* of a block's twin; 0: there are none */
    size_t capacity, allocated, pinned, free; /* pages */
    struct memory_page **table;
    size_t table_mask;
    struct memory_page *free_pages;
    struct list lru; /* oldest first */
    void **slabs;
    size_t slab_count;
    struct list landmark_slabs; /* those with free blocks first */
    size_t landmark_bytes;      /* of the blocks in use */
    struct chunk_read *reads;   /* of one load; grows to what one needs */
    size_t read_capacity;
    struct loader *loader;              /* NULL: the backend has no use for one */
    struct memory_page *const *loading; /* what it reads, or NULL */
    size_t loading_count;
    uint64_t expected, expected_hits; /* pages read before they were asked for; and then were */
    uint64_t hits, misses, evictions, read_bytes, read_ns;
};

/* `capacity` pages at most, and any number of landmark blocks of `block_bytes`, each with a twin of
 * `narrow_bytes` unless that is 0; memory is taken as it is first needed. STATUS_NO_MEMORY. */
STATUS_CHECKED enum status memory_open(struct memory *memory, const struct ops *ops,
                                       struct ops_context *context, size_t kv_bytes,
                                       size_t capacity, size_t block_bytes, size_t narrow_bytes);
/* Every block has been dropped before. */
void memory_close(struct memory *memory);

/* Takes memory for more pages, within the capacity, where few are free: ahead of need and while a
 * device is busy, since pinned memory is slow to get. */
void memory_grow_ahead(struct memory *memory);
/* Pages that could be pinned now. */
size_t memory_room(const struct memory *memory);
/* A page for a chunk about to be encoded, pinned until memory_durable. NULL: no room. */
struct memory_page *memory_page_create(struct memory *memory, struct chunk_key key);
/* Pins the chunk's page, once for each `stamp`; sets `unread` when memory_load must fetch it.
 * `*added` says whether this call pinned it. NULL: no room. */
struct memory_page *memory_page_pin(struct memory *memory, struct chunk_key key, uint64_t stamp,
                                    bool *added);
/* The same for a page that will be asked for, perhaps: no hit and no miss. */
struct memory_page *memory_page_expect(struct memory *memory, struct chunk_key key, uint64_t stamp,
                                       bool *added);
/* memory_page_pin of `count` chunks of a branch, whose pages come to the cache ahead: where they
 * lie to `data`, and those that this call pinned to `pins`. False, and some are pinned: no room. */
bool memory_pin_chunks(struct memory *memory, uint64_t branch, const uint64_t *chunks, size_t count,
                       uint64_t stamp, const void **data, struct memory_pins *pins);
void memory_page_unpin(struct memory *memory, struct memory_page *page);
/* Begins to read what is unread among `pages` (borrowed, like io, until memory_load_end), beside
 * what the engine does; false: nothing is, or there is no loader. Until the end no call of the io
 * is made but by the other functions here. */
bool memory_load_begin(struct memory *memory, const struct chunk_io *io,
                       struct memory_page *const *pages, size_t count);
/* Waits for it; as memory_load. Nothing under way: STATUS_OK. */
enum status memory_load_end(struct memory *memory);
/* Reads what is unread among `pages`, in one batch, behind one that is under way. On failure the
 * unread ones leave the table (and still need their unpin). */
STATUS_CHECKED enum status memory_load(struct memory *memory, const struct chunk_io *io,
                                       struct memory_page *const *pages, size_t count);
/* The chunk is on disk, or never will be (then its page is dropped). */
void memory_durable(struct memory *memory, struct chunk_key key, bool failed);
/* Drops the page of that chunk, if there is one. It is not in use. */
void memory_forget(struct memory *memory, struct chunk_key key);

/* Takes a block, its content unspecified, with one reference. NULL: no memory. */
struct memory_landmarks *memory_landmarks_take(struct memory *memory);
/* One reference less; with the last one the block is free. */
void memory_landmarks_drop(struct memory *memory, struct memory_landmarks *block);

#endif
