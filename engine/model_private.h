/* model_private.h - what the forward pass in slices (model.c) and in steps (step.c) share.
 * Thread: the engine's. Owns the scratch memory of a pass. Private to those two. */
#ifndef ENGINE_MODEL_PRIVATE_H
#define ENGINE_MODEL_PRIVATE_H

#include "engine/engine_private.h"

#define LOGIT_ROWS 32 /* rows whose logits are computed, and come to the host, together */
#define PIN_ROWS 1024 /* rows whose pages are pinned together, at most */
#define RECENT_PAGES 4096

/* A run of rows whose pages are pinned together. */
struct block {
    uint32_t first, count;
    struct memory_pins pins;
};

struct model {
    uint32_t max_rows, max_chunks;
    uint64_t stamp; /* counts blocks of rows that pin pages */
    /* Memory of ops->alloc. */
    float *x, *q, *o, *last;
    float *waiting; /* [OPS_STEP_ROWS, d]: of sequences whose pages are on their way */
    float *chunks;  /* [max_chunks, S, d]: of chunks that began in an earlier step */
    float *logits;  /* [LOGIT_ROWS, V], or of all rows of a step in parts */
    /* Memory of ops->alloc_host, which a device copies to without a detour. */
    struct ops_picks picks; /* [max_rows, Hr, K] */
    float *host_logits;     /* [LOGIT_ROWS, V] */
    char *host_landmarks;   /* [max_chunks] */
    /* Host memory. */
    int32_t *tokens;
    const void **pages;            /* [max_rows, Hr, K] */
    uint64_t *marked;              /* [max_rows, Hr, K]: chunks of an item that were picked */
    struct memory_page **row_page; /* [OPS_STEP_ROWS, Hr, K]: of the first rows */
    /* Pinned pages, each list as long as one of a block can become: of the block under way, of
     * those that wait for theirs, and of what is expected. */
    struct memory_page **held, **waiting_held, **ahead_held;
    size_t kept; /* of `held`: pages of all rows, for the group's next HSA layers; 0: none are */
    enum { UNMARKED, MARKED, NAMED } picked; /* the picks of all rows: see ops.h, `picked` */
    struct ops_picks waiting_picks; /* [OPS_STEP_ROWS, Hr, K] */
    struct block ahead;
    const void **expected; /* [expected_capacity] pages for the backend to bring */
    size_t expected_capacity;
    struct recent {
        uint64_t stamp, chunk;
        uint32_t item;
        struct memory_page *page;
    } recent[RECENT_PAGES]; /* of this block, by chunk: neighbouring rows read the same */
    struct ops_segment *segments, *single;
    struct ops_mamba_state *states;
    struct ops_landmarks *landmarks;
    const float **chunk_rows;
    void **chunk_kv, **chunk_landmarks;
    struct model_item **chunk_items;
    uint64_t *chunk_index;
    struct { /* of a step in parts, [OPS_STEP_ROWS] each */
        uint64_t positions[OPS_STEP_ROWS];
        float *states[OPS_STEP_ROWS], *kept[OPS_STEP_ROWS], *logits[OPS_STEP_ROWS];
        int32_t largest[OPS_STEP_ROWS], drawn[OPS_STEP_ROWS];
        struct ops_draw draws[OPS_STEP_ROWS];
    } step;
};

/* A forward pass under way. */
struct pass {
    struct engine *engine;
    struct model *m;
    struct model_item *items;
    uint32_t first, count; /* these, of all that go forward */
    struct ops_rows rows;
};

uint32_t model_picks_per_row(const struct engine *engine);
/* The item's session is lost; the first reason stays. */
void model_item_failed(struct model_item *item, enum status status);

/* Gives the whole chunk of `item` in scratch slot `n` a page and a landmark. */
void model_place_chunk(struct pass *p, struct model_item *item, uint32_t n);
/* Encodes the `n` chunks that were collected, and waits for them. */
void model_encode_chunks(struct pass *p, const struct weights_layer *layer, uint32_t n);
/* Gives the `n` chunks that were encoded to whoever keeps them. */
void model_append_chunks(struct pass *p, uint32_t n);

void model_name_landmarks(struct pass *p);
/* The picks of all rows. */
void model_retrieve(struct pass *p, const struct weights_layer *layer);
/* Notes what the last row of each item read: for items that ask, and as what its next token will
 * read, probably. */
void model_note_picks(struct pass *p, uint32_t group);

/* The page of a chunk of an item, pinned, or expected only; NULL: no room. */
struct memory_page *model_pin_chunk(struct pass *p, struct block *b, uint32_t item, uint64_t chunk,
                                    bool expected);
/* Pins the pages of as many rows from `first` on as there is room for, at least one, and of no more
 * than PIN_ROWS, when no others of rows are pinned; m->pages says where they lie. */
void model_pin_rows(struct pass *p, struct block *b, uint32_t end, uint32_t item);
void model_unpin_rows(struct pass *p, struct block *b);
/* Reads those of the block's pages that are unread; as memory_load. */
STATUS_CHECKED enum status model_load_rows(struct pass *p, struct block *b);
/* An HSA layer, by as many rows as pages fit. */
void model_hsa(struct pass *p, const struct weights_layer *layer);
/* The logits of each item that wants them, in host memory. */
void model_last_logits(struct pass *p);

/* ---- step.c ---- */

/* Whether the pass is a step in parts: see ops_step. */
bool model_goes_in_parts(const struct pass *p);
void model_run_step(struct pass *p);

#endif
