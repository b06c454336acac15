/* model.c - the forward pass, once, over any backend: what runs when, and where pages come from.
 * The arithmetic is in ref/ and cpu/; the order of layers is model_config's. */
#include <stdlib.h>
#include <string.h>

#include "engine/engine_private.h"
#include "engine/sampler.h"
#include "proto/base/assert.h"

#define LOGIT_ROWS 32 /* rows whose logits are computed, and come to the host, together */
#define PIN_ROWS 1024 /* rows whose pages are pinned together, at most */
#define RECENT_PAGES 4096

struct model {
    uint32_t max_rows, max_chunks;
    uint64_t stamp; /* counts blocks of rows that pin pages */
    /* Memory of ops->alloc. */
    float *x, *q, *o, *last;
    float *chunks; /* [max_chunks, S, d]: of chunks that began in an earlier step */
    float *logits; /* [LOGIT_ROWS, V], or of all rows of a step in parts */
    /* Memory of ops->alloc_host, which a device copies to without a detour. */
    struct ops_picks picks; /* [max_rows, Hr, K] */
    float *host_logits;     /* [LOGIT_ROWS, V] */
    char *host_landmarks;   /* [max_chunks] */
    /* Host memory. */
    int32_t *tokens;
    const void **pages;        /* [max_rows, Hr, K] */
    struct memory_page **held; /* pinned by this block; by all of the pass, the first `kept` */
    size_t kept;               /* pages of all rows, for the group's next HSA layers; 0: none are */
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
        int32_t largest[OPS_STEP_ROWS];
    } step;
};

/* A forward pass under way. */
struct pass {
    struct engine *engine;
    struct model *m;
    struct model_item *items;
    uint32_t count;
    struct ops_rows rows;
};

static uint32_t picks_per_row(const struct engine *engine)
{
    return engine->config.retrieval_heads * engine->config.topk;
}

enum status model_create(struct engine *engine, uint32_t max_rows, struct model **out)
{
    const struct model_config *c = &engine->config;
    const struct ops *ops = engine->ops;
    struct model *m = calloc(1, sizeof *m);
    if (!m)
        return STATUS_NO_MEMORY;
    const size_t d = c->hidden_size, picks = (size_t)max_rows * picks_per_row(engine);
    m->max_rows = max_rows;
    /* Each sequence may complete one chunk that it had begun, and those that its rows hold. */
    m->max_chunks = max_rows / c->chunk_tokens + LIMITS_RUNNING + 1;
    m->x = ops->alloc(engine->context, max_rows * d * sizeof(float));
    m->q = ops->alloc(engine->context, max_rows * d * sizeof(float));
    m->o = ops->alloc(engine->context, max_rows * d * sizeof(float));
    m->last = ops->alloc(engine->context, LOGIT_ROWS * d * sizeof(float));
    m->chunks = ops->alloc(engine->context, m->max_chunks * c->chunk_tokens * d * sizeof(float));
    const size_t logit_rows = ops->step_begin ? OPS_STEP_ROWS : LOGIT_ROWS;
    m->logits = ops->alloc(engine->context, logit_rows * c->vocab_size * sizeof(float));
    m->picks.chunks = ops->alloc_host(engine->context, picks * sizeof *m->picks.chunks);
    m->picks.weights = ops->alloc_host(engine->context, picks * sizeof *m->picks.weights);
    m->host_logits =
        ops->alloc_host(engine->context, (size_t)LOGIT_ROWS * c->vocab_size * sizeof(float));
    m->host_landmarks =
        ops->alloc_host(engine->context, m->max_chunks * engine->info.landmark_bytes);
    m->tokens = calloc(max_rows, sizeof *m->tokens);
    m->pages = calloc(picks, sizeof *m->pages);
    m->held = calloc(picks, sizeof *m->held);
    m->segments = calloc(max_rows, sizeof *m->segments);
    m->single = calloc(max_rows, sizeof *m->single);
    m->states = calloc(max_rows, sizeof *m->states);
    m->landmarks = calloc(max_rows, sizeof *m->landmarks);
    m->chunk_rows = calloc(m->max_chunks, sizeof *m->chunk_rows);
    m->chunk_kv = calloc(m->max_chunks, sizeof *m->chunk_kv);
    m->chunk_landmarks = calloc(m->max_chunks, sizeof *m->chunk_landmarks);
    m->chunk_items = calloc(m->max_chunks, sizeof *m->chunk_items);
    m->chunk_index = calloc(m->max_chunks, sizeof *m->chunk_index);
    if (!m->x || !m->q || !m->o || !m->last || !m->chunks || !m->logits || !m->host_logits ||
        !m->host_landmarks || !m->tokens || !m->picks.chunks || !m->picks.weights || !m->pages ||
        !m->held || !m->segments || !m->single || !m->states || !m->landmarks || !m->chunk_rows ||
        !m->chunk_kv || !m->chunk_landmarks || !m->chunk_items || !m->chunk_index) {
        model_destroy(engine, m);
        return STATUS_NO_MEMORY;
    }
    for (uint32_t i = 0; i < max_rows; i++)
        m->single[i] = (struct ops_segment){.row = i, .count = 1};
    *out = m;
    return STATUS_OK;
}

void model_destroy(struct engine *engine, struct model *m)
{
    if (!m)
        return;
    float *device[] = {m->x, m->q, m->o, m->last, m->chunks, m->logits};
    for (size_t i = 0; i < sizeof device / sizeof *device; i++)
        if (device[i])
            engine->ops->release(engine->context, device[i]);
    void *host[] = {m->picks.chunks, m->picks.weights, m->host_logits, m->host_landmarks};
    for (size_t i = 0; i < sizeof host / sizeof *host; i++)
        if (host[i])
            engine->ops->release_host(engine->context, host[i]);
    free(m->tokens);
    free(m->pages);
    free(m->held);
    free(m->segments);
    free(m->single);
    free(m->states);
    free(m->landmarks);
    free(m->chunk_rows);
    free(m->chunk_kv);
    free(m->chunk_landmarks);
    free(m->chunk_items);
    free(m->chunk_index);
    free(m);
}

static void item_failed(struct model_item *item, enum status status)
{
    if (!item->status)
        item->status = status;
}

/* ---- chunks ---- */

/* A chunk of `item` is whole in scratch slot `n`: gives it a page and a landmark. */
static void place_chunk(struct pass *p, struct model_item *item, uint32_t n)
{
    struct model *m = p->m;
    struct engine_session *s = item->session;
    const uint64_t index = s->chunk_count;
    const struct chunk_key key = {s->ranges[s->range_count - 1].branch, index};
    const enum status status = session_add_landmark(s, &m->chunk_landmarks[n]);
    struct memory_page *page = status ? NULL : memory_page_create(&p->engine->memory, key);
    if (!page) {
        /* Room was checked before the step; only the system's own memory can be short here. */
        item_failed(item, STATUS_NO_MEMORY);
        m->chunk_items[n] = NULL;
        return;
    }
    m->chunk_kv[n] = page->data;
    m->chunk_items[n] = item;
    m->chunk_index[n] = index;
}

/* Finds the rows of the chunks that this step completes; returns how many. */
static uint32_t gather_chunks(struct pass *p)
{
    struct model *m = p->m;
    const struct model_config *c = &p->engine->config;
    const size_t d = c->hidden_size, s = c->chunk_tokens;
    uint32_t n = 0;
    for (uint32_t i = 0; i < p->count; i++) {
        struct model_item *item = &p->items[i];
        size_t filled = (size_t)(item->session->position % s), row = item->segment.row;
        size_t left = item->segment.count;
        while (left) {
            const size_t take = left < s - filled ? left : s - filled;
            const bool whole = filled + take == s;
            float *slot = m->chunks + n * s * d, *to = whole ? slot : item->session->partial;
            const float *from = m->x + row * d;
            if (whole && filled)
                p->engine->ops->copy(p->engine->context, slot, item->session->partial,
                                     filled * d * sizeof(float));
            if (take < s) /* others are read where they lie */
                p->engine->ops->copy(p->engine->context, to + filled * d, from,
                                     take * d * sizeof(float));
            if (whole) {
                ASSERT(n < m->max_chunks);
                m->chunk_rows[n] = take < s ? slot : from;
                place_chunk(p, item, n);
                n += m->chunk_items[n] != NULL;
            }
            row += take;
            left -= take;
            filled = 0;
        }
    }
    return n;
}

/* Of a step in parts: each row is in the chunk under way already, and some of them are whole. */
static uint32_t whole_chunks(struct pass *p)
{
    struct model *m = p->m;
    uint32_t n = 0;
    for (uint32_t i = 0; i < p->count; i++) {
        struct engine_session *session = p->items[i].session;
        if ((session->position + 1) % p->engine->config.chunk_tokens)
            continue;
        m->chunk_rows[n] = session->partial;
        place_chunk(p, &p->items[i], n);
        n += m->chunk_items[n] != NULL;
    }
    return n;
}

/* Landmarks of the `n` collected chunks to the host, those that lie together in one copy. */
static void copy_landmarks(struct pass *p, uint32_t n)
{
    struct model *m = p->m;
    const size_t bytes = p->engine->info.landmark_bytes;
    for (uint32_t first = 0, end; first < n; first = end) {
        const char *from = m->chunk_landmarks[first];
        for (end = first + 1; end < n; end++)
            if (m->chunk_landmarks[end] != from + (end - first) * bytes)
                break;
        p->engine->ops->copy(p->engine->context, m->host_landmarks + first * bytes, from,
                             (end - first) * bytes);
    }
}

/* Encodes and keeps the `n` chunks that were collected. */
static void append_chunks(struct pass *p, const struct weights_layer *layer, uint32_t n)
{
    struct engine *engine = p->engine;
    struct model *m = p->m;
    if (!n)
        return;
    engine->ops->encode_chunks(engine->context, &layer->chunking, n, m->chunk_rows, m->chunk_kv,
                               m->chunk_landmarks);
    engine->counted.chunks_encoded += n;
    copy_landmarks(p, n);
    engine_must_work(engine);
    for (uint32_t i = 0; i < n; i++) {
        const struct engine_session *s = m->chunk_items[i]->session;
        const struct chunk_key key = {s->ranges[s->range_count - 1].branch, m->chunk_index[i]};
        const enum status status =
            engine->io.append(engine->io.context, key, m->chunk_kv[i],
                              m->host_landmarks + i * engine->info.landmark_bytes);
        if (status) { /* room was asked for before the step, so this is not a full queue */
            item_failed(m->chunk_items[i], status);
            memory_durable(&engine->memory, key, true);
        }
    }
}

/* ---- retrieval and HSA ---- */

static void name_landmarks(struct pass *p)
{
    for (uint32_t i = 0; i < p->count; i++)
        p->m->landmarks[i] = (struct ops_landmarks){.blocks = p->items[i].session->block_data,
                                                    .count = p->items[i].session->chunk_count};
}

/* The pages that were kept for the group's next HSA layers. */
static void let_pages_go(struct pass *p)
{
    struct model *m = p->m;
    while (m->kept)
        memory_page_unpin(&p->engine->memory, m->held[--m->kept]);
}

static void retrieve(struct pass *p, const struct weights_layer *layer)
{
    struct model *m = p->m;
    let_pages_go(p);
    name_landmarks(p);
    p->engine->ops->retrieve(p->engine->context, &layer->retrieval, &p->rows, m->landmarks, m->x,
                             &m->picks);
}

static bool grow_picks(struct engine *engine)
{
    const size_t capacity = engine->pick_capacity ? engine->pick_capacity * 2 : 256;
    struct engine_pick *picks = realloc(engine->picks, capacity * sizeof *picks);
    if (picks)
        engine->picks = picks;
    struct engine_noted_pick *noted = realloc(engine->noted, capacity * sizeof *noted);
    if (noted)
        engine->noted = noted;
    if (picks && noted)
        engine->pick_capacity = capacity;
    return picks && noted;
}

static enum status try_picks(struct pass *p, uint32_t group)
{
    struct engine *engine = p->engine;
    const struct model_config *c = &engine->config;
    for (uint32_t i = 0; i < p->count; i++) {
        struct model_item *item = &p->items[i];
        if (!item->step->want_picks)
            continue;
        const size_t row = item->segment.row + item->segment.count - 1;
        for (uint32_t j = 0; j < picks_per_row(engine); j++) {
            const size_t at = row * picks_per_row(engine) + j;
            if (!(p->m->picks.weights[at] > 0))
                continue;
            if (engine->pick_count == engine->pick_capacity && !grow_picks(engine))
                return STATUS_NO_MEMORY;
            engine->noted[engine->pick_count++] =
                (struct engine_noted_pick){.item = i,
                                           .pick = {.group = group,
                                                    .head = j / c->topk,
                                                    .chunk = p->m->picks.chunks[at],
                                                    .weight = p->m->picks.weights[at]}};
        }
    }
    return STATUS_OK;
}

/* Notes what the last row of each item read, for items that ask. */
static void note_picks(struct pass *p, uint32_t group)
{
    const enum status status = try_picks(p, group);
    for (uint32_t i = 0; status && i < p->count; i++)
        item_failed(&p->items[i], status);
}

/* A run of rows whose pages are pinned together. */
struct block {
    uint32_t first, count;
    size_t held;
};

/* The page of a chunk, pinned; NULL: no room. */
static struct memory_page *pin_chunk(struct pass *p, struct block *b, uint32_t item, uint64_t chunk)
{
    struct model *m = p->m;
    struct recent *recent = &m->recent[chunk % RECENT_PAGES];
    if (recent->stamp == m->stamp && recent->chunk == chunk && recent->item == item)
        return recent->page;
    const struct chunk_key key = {session_branch_of(p->items[item].session, chunk), chunk};
    bool added;
    struct memory_page *page = memory_page_pin(&p->engine->memory, key, m->stamp, &added);
    if (added)
        m->held[b->held++] = page;
    if (page)
        *recent = (struct recent){m->stamp, chunk, item, page};
    return page;
}

/* Pins the pages of as many more rows from `first` on as there is room for, and of no more than
 * PIN_ROWS: a device works on them while the next are pinned. */
static void pin_more(struct pass *p, struct block *b, uint32_t end, uint32_t item)
{
    struct model *m = p->m;
    const uint32_t per_row = picks_per_row(p->engine);
    b->count = 0;
    for (uint32_t row = b->first; row < end && b->count < PIN_ROWS; row++) {
        while (row >= p->items[item].segment.row + p->items[item].segment.count)
            item++;
        for (uint32_t j = 0; j < per_row; j++) {
            const size_t at = (size_t)row * per_row + j;
            m->pages[at] = NULL;
            if (!(m->picks.weights[at] > 0) || p->items[item].status)
                continue;
            const struct memory_page *page = pin_chunk(p, b, item, m->picks.chunks[at]);
            if (!page)
                return;
            m->pages[at] = page->data;
        }
        b->count++;
    }
}

/* The same when nothing is pinned: at least one row. */
static void pin_rows(struct pass *p, struct block *b, uint32_t end, uint32_t item)
{
    let_pages_go(p);
    p->m->stamp++;
    b->held = 0;
    pin_more(p, b, end, item);
    ASSERT(b->count); /* one row always fits: checked before the step */
}

static void unpin_rows(struct pass *p, struct block *b)
{
    while (b->held)
        memory_page_unpin(&p->engine->memory, p->m->held[--b->held]);
}

static void attend_block(struct pass *p, const struct block *b)
{
    struct model *m = p->m;
    const size_t from = b->first * picks_per_row(p->engine), d = p->engine->config.hidden_size;
    p->engine->ops->hsa_attend(p->engine->context, b->count, m->q + b->first * d,
                               m->picks.weights + from, m->pages + from, m->o + b->first * d);
}

/* Attends rows [first, end), which begin in `item`; where `whole`, a failed read is tried again
 * sequence by sequence, so that only the one whose chunks are damaged fails, and pages that could
 * all be pinned together are kept for the group's next layers. */
static void attend_rows(struct pass *p, uint32_t first, uint32_t end, uint32_t item, bool whole)
{
    struct model *m = p->m;
    struct memory *memory = &p->engine->memory;
    struct block b = {.first = first};
    bool keep = whole;
    m->stamp++;
    while (b.first < end) {
        while (b.first >= p->items[item].segment.row + p->items[item].segment.count)
            item++;
        size_t loaded = b.held;
        pin_more(p, &b, end, item);
        if (!b.count) { /* what earlier rows read makes room */
            unpin_rows(p, &b);
            pin_rows(p, &b, end, item);
            loaded = 0;
            keep = false;
        }
        const enum status status =
            memory_load(memory, &p->engine->io, m->held + loaded, b.held - loaded);
        if (!status) {
            attend_block(p, &b);
            b.first += b.count;
            continue;
        }
        unpin_rows(p, &b);
        keep = false;
        if (!whole)
            item_failed(&p->items[item], status); /* its rows read nothing from here on */
        for (uint32_t i = item; whole && i < p->count; i++) {
            const struct ops_segment *segment = &p->items[i].segment;
            const uint32_t from = segment->row > b.first ? segment->row : b.first;
            uint32_t to = segment->row + segment->count;
            to = to < b.first + b.count ? to : b.first + b.count;
            if (from < to)
                attend_rows(p, from, to, i, false);
        }
        m->stamp++; /* nothing is pinned now */
        b.first += whole ? b.count : 0;
    }
    if (keep)
        m->kept = b.held;
    else
        unpin_rows(p, &b);
}

static void hsa(struct pass *p, const struct weights_layer *layer)
{
    struct model *m = p->m;
    const struct ops *ops = p->engine->ops;
    ops->hsa_query(p->engine->context, &layer->hsa, &p->rows, m->x, m->q);
    const struct block all = {.count = p->rows.row_count};
    if (m->kept)
        attend_block(p, &all);
    else
        attend_rows(p, 0, p->rows.row_count, 0, true);
    ops->hsa_out(p->engine->context, &layer->hsa, &p->rows, m->o, m->x);
}

/* ---- logits ---- */

/* Log probabilities of the tokens that follow each row of an echoed prompt. */
static void score_targets(struct pass *p, struct model_item *item)
{
    struct engine *engine = p->engine;
    struct model *m = p->m;
    const struct engine_step_item *step = item->step;
    const size_t d = engine->config.hidden_size, v = engine->config.vocab_size;
    for (uint32_t at = 0; at < item->segment.count; at += LOGIT_ROWS) {
        const uint32_t left = item->segment.count - at, n = left < LOGIT_ROWS ? left : LOGIT_ROWS;
        const struct ops_rows rows = {.segments = m->single, .segment_count = n, .row_count = n};
        engine->ops->logits(engine->context, &engine->weights.final_norm, &engine->weights.head,
                            &rows, m->x + (item->segment.row + at) * d, m->logits);
        engine->ops->copy(engine->context, m->host_logits, m->logits, n * v * sizeof(float));
        for (uint32_t i = 0; i < n; i++) {
            if (step->targets[at + i] < 0)
                continue;
            struct sampler_top *tops =
                step->target_tops ? step->target_tops + (size_t)(at + i) * step->target_top_count
                                  : NULL;
            step->target_logprobs[at + i] =
                sampler_score(m->host_logits + i * v, (int32_t)v, step->targets[at + i], tops,
                              tops ? step->target_top_count : 0);
        }
    }
}

/* Logits of the last rows of `n` items: one copy to the host for all of them. Rows that follow each
 * other, as when every item decodes, are used where they lie. */
static void logits_of(struct pass *p, struct model_item *const *items, uint32_t n)
{
    struct engine *engine = p->engine;
    struct model *m = p->m;
    const size_t d = engine->config.hidden_size, v = engine->config.vocab_size;
    const size_t first = items[0]->segment.row + items[0]->segment.count - 1;
    bool adjacent = true;
    for (uint32_t i = 0; i < n; i++)
        adjacent &= items[i]->segment.row + items[i]->segment.count - 1 == first + i;
    for (uint32_t i = 0; i < n && !adjacent; i++) {
        const size_t row = items[i]->segment.row + items[i]->segment.count - 1;
        engine->ops->copy(engine->context, m->last + i * d, m->x + row * d, d * sizeof(float));
    }
    const struct ops_rows rows = {.segments = m->single, .segment_count = n, .row_count = n};
    engine->ops->logits(engine->context, &engine->weights.final_norm, &engine->weights.head, &rows,
                        adjacent ? m->x + first * d : m->last, m->logits);
    engine->ops->copy(engine->context, m->host_logits, m->logits, n * v * sizeof(float));
    for (uint32_t i = 0; i < n; i++) {
        memcpy(items[i]->session->logits, m->host_logits + i * v, v * sizeof(float));
        items[i]->session->has_logits = true;
        items[i]->session->away = false;
    }
}

/* Of each item that wants them, LOGIT_ROWS items at a time. */
static void last_logits(struct pass *p)
{
    struct model_item *wanting[LOGIT_ROWS];
    uint32_t n = 0;
    for (uint32_t i = 0; i < p->count; i++) {
        struct model_item *item = &p->items[i];
        item->session->has_logits = false;
        if (item->step->want_logits || item->step->sampler)
            wanting[n++] = item;
        if (n == LOGIT_ROWS || (n && i + 1 == p->count)) {
            logits_of(p, wanting, n);
            n = 0;
        }
    }
}

/* ---- the pass ---- */

static void run_layers(struct pass *p)
{
    struct engine *engine = p->engine;
    struct model *m = p->m;
    uint32_t mamba = 0, group = 0;
    for (uint32_t i = 0; i < engine->config.layer_count; i++) {
        const struct weights_layer *layer = &engine->weights.layers[i];
        switch (layer->kind) {
        case MODEL_LAYER_MAMBA:
            for (uint32_t j = 0; j < p->count; j++)
                m->states[j] = p->items[j].session->layers[mamba];
            engine->ops->mamba(engine->context, &layer->mamba, &p->rows, m->states, m->x);
            mamba++;
            break;
        case MODEL_LAYER_CHUNKING:
            append_chunks(p, layer, gather_chunks(p));
            break;
        case MODEL_LAYER_RETRIEVAL: {
            retrieve(p, layer);
            note_picks(p, group++);
            break;
        }
        case MODEL_LAYER_HSA:
            hsa(p, layer);
            break;
        }
    }
}

/* ---- a step in parts ----
 * Every sequence goes on by one token, and the backend repeats what it noted of an earlier step:
 * see ops_step. The order is that of run_layers, but that chunks are encoded once the first
 * retrieval is done, which could not see them: the token that ends a chunk does not read it. */

struct step {
    struct ops_step ops;
    enum ops_part how;
    uint32_t part;
    struct block pinned; /* pages of the part under way */
    bool held;           /* they are pinned */
};

static bool goes_in_parts(const struct pass *p)
{
    bool fits = p->engine->ops->step_begin && p->count <= OPS_STEP_ROWS;
    for (uint32_t i = 0; i < p->count && fits; i++)
        fits = p->items[i].segment.count == 1 && !p->items[i].step->targets;
    return fits;
}

static void begin_step(struct pass *p, struct step *s)
{
    struct model *m = p->m;
    const struct model_config *c = &p->engine->config;
    for (uint32_t i = 0; i < p->count; i++) {
        const struct engine_session *session = p->items[i].session;
        m->step.positions[i] = session->position;
        m->step.states[i] = session->state;
        m->step.kept[i] = session->partial + session->position % c->chunk_tokens * c->hidden_size;
        m->step.logits[i] = session->step_logits;
    }
    name_landmarks(p);
    s->ops = (struct ops_step){.count = p->count,
                               .tokens = m->tokens,
                               .positions = m->step.positions,
                               .states = m->step.states,
                               .kept = m->step.kept,
                               .logits = m->step.logits,
                               .landmarks = m->landmarks};
    p->engine->ops->step_begin(p->engine->context, &s->ops);
    s->how = p->engine->ops->part_begin(p->engine->context, 0, NULL, NULL);
}

static void let_go(struct pass *p, struct step *s)
{
    if (s->held)
        unpin_rows(p, &s->pinned);
    s->held = false;
}

/* The part behind a retrieval: with all its pages at once, or, where they do not fit or cannot be
 * read, plainly, where each HSA layer goes by as many rows as fit. */
static void begin_part(struct pass *p, struct step *s)
{
    struct engine *engine = p->engine;
    s->pinned = (struct block){.first = 0};
    s->how = OPS_PART_PLAIN;
    s->part++;
    pin_rows(p, &s->pinned, p->rows.row_count, 0);
    s->held = true;
    if (s->pinned.count == p->rows.row_count &&
        !memory_load(&engine->memory, &engine->io, p->m->held, s->pinned.held)) {
        s->how =
            engine->ops->part_begin(engine->context, s->part, p->m->picks.weights, p->m->pages);
    }
    if (s->how == OPS_PART_PLAIN)
        let_go(p, s);
}

static void end_part(struct pass *p, struct step *s, struct ops_picks *picks, int32_t *largest)
{
    if (s->how != OPS_PART_PLAIN)
        p->engine->ops->part_end(p->engine->context, picks, largest);
    let_go(p, s);
}

/* An HSA layer whose pages the part was given. */
static void noted_hsa(struct pass *p, const struct weights_layer *layer)
{
    struct model *m = p->m;
    const struct ops *ops = p->engine->ops;
    ops->hsa_query(p->engine->context, &layer->hsa, &p->rows, m->x, m->q);
    ops->hsa_attend(p->engine->context, p->rows.row_count, m->q, m->picks.weights, m->pages, m->o);
    ops->hsa_out(p->engine->context, &layer->hsa, &p->rows, m->o, m->x);
}

/* Logits that the step left on the device, for all items; what a sampler must look at comes to the
 * host in few copies. */
static void end_logits(struct pass *p)
{
    struct model *m = p->m;
    const size_t v = p->engine->config.vocab_size;
    for (uint32_t first = 0; first < p->count; first += LOGIT_ROWS) {
        const uint32_t left = p->count - first, n = left < LOGIT_ROWS ? left : LOGIT_ROWS;
        bool wanted = false;
        for (uint32_t i = first; i < first + n; i++) {
            struct engine_session *session = p->items[i].session;
            const struct engine_step_item *step = p->items[i].step;
            session->has_logits = step->want_logits || step->sampler;
            session->away = true;
            session->largest = m->step.largest[i];
            wanted |= step->sampler && !sampler_takes_largest(step->sampler);
        }
        if (wanted)
            p->engine->ops->copy(p->engine->context, m->host_logits, m->logits + first * v,
                                 n * v * sizeof(float));
        for (uint32_t i = first; i < first + n && wanted; i++) {
            const struct engine_step_item *step = p->items[i].step;
            if (!step->sampler || sampler_takes_largest(step->sampler))
                continue;
            memcpy(p->items[i].session->logits, m->host_logits + (i - first) * v,
                   v * sizeof(float));
            p->items[i].session->away = false;
        }
    }
}

static void step_logits(struct pass *p, struct step *s)
{
    struct engine *engine = p->engine;
    if (s->how == OPS_PART_PLAIN) {
        last_logits(p);
        return;
    }
    if (s->how == OPS_PART_RECORD)
        engine->ops->logits(engine->context, &engine->weights.final_norm, &engine->weights.head,
                            &p->rows, p->m->x, p->m->logits);
    end_part(p, s, NULL, p->m->step.largest);
    end_logits(p);
}

static void step_retrieve(struct pass *p, struct step *s, const struct weights_layer *layer,
                          const struct weights_layer *chunking)
{
    if (s->how != OPS_PART_REPLAY)
        retrieve(p, layer);
    end_part(p, s, &p->m->picks, NULL);
    if (s->part == 0)
        append_chunks(p, chunking, whole_chunks(p));
    name_landmarks(p); /* blocks may lie elsewhere now */
    note_picks(p, s->part);
    begin_part(p, s);
}

static void run_step(struct pass *p)
{
    struct engine *engine = p->engine;
    struct model *m = p->m;
    struct step s = {0};
    const struct weights_layer *chunking = NULL;
    uint32_t mamba = 0;
    begin_step(p, &s);
    if (s.how != OPS_PART_REPLAY)
        engine->ops->embed(engine->context, &engine->weights.embeddings, m->tokens, p->count, m->x);
    for (uint32_t i = 0; i < engine->config.layer_count; i++) {
        const struct weights_layer *layer = &engine->weights.layers[i];
        if (layer->kind == MODEL_LAYER_RETRIEVAL)
            step_retrieve(p, &s, layer, chunking);
        else if (layer->kind == MODEL_LAYER_CHUNKING)
            chunking = layer;
        mamba += layer->kind == MODEL_LAYER_MAMBA;
        if (s.how == OPS_PART_REPLAY)
            continue;
        if (layer->kind == MODEL_LAYER_MAMBA) {
            for (uint32_t j = 0; j < p->count; j++)
                m->states[j] = p->items[j].session->layers[mamba - 1];
            engine->ops->mamba(engine->context, &layer->mamba, &p->rows, m->states, m->x);
        } else if (layer->kind == MODEL_LAYER_CHUNKING) {
            engine->ops->keep_rows(engine->context, m->x);
        } else if (layer->kind == MODEL_LAYER_HSA) {
            s.how == OPS_PART_PLAIN ? hsa(p, layer) : noted_hsa(p, layer);
        }
    }
    step_logits(p, &s);
}

/* Picks were noted group by group; items want theirs in one piece. */
static void collect_picks(struct pass *p)
{
    struct engine *engine = p->engine;
    size_t at = 0;
    for (uint32_t i = 0; i < p->count; i++) {
        p->items[i].pick_first = at;
        for (size_t j = 0; j < engine->pick_count; j++)
            if (engine->noted[j].item == i)
                engine->picks[at++] = engine->noted[j].pick;
        p->items[i].pick_count = at - p->items[i].pick_first;
    }
}

void model_forward(struct engine *engine, struct model_item *items, uint32_t count)
{
    struct model *m = engine->model;
    struct pass p = {.engine = engine, .m = m, .items = items, .count = count};
    uint32_t row = 0;
    for (uint32_t i = 0; i < count; i++) {
        const struct engine_step_item *step = items[i].step;
        items[i].segment = (struct ops_segment){
            .row = row, .count = step->token_count, .position = items[i].session->position};
        m->segments[i] = items[i].segment;
        memcpy(m->tokens + row, step->tokens, step->token_count * sizeof *m->tokens);
        row += step->token_count;
    }
    ASSERT(row <= m->max_rows);
    p.rows = (struct ops_rows){.segments = m->segments, .segment_count = count, .row_count = row};
    if (goes_in_parts(&p)) {
        run_step(&p);
    } else {
        engine->ops->embed(engine->context, &engine->weights.embeddings, m->tokens, row, m->x);
        run_layers(&p);
        for (uint32_t i = 0; i < count; i++)
            if (items[i].step->targets)
                score_targets(&p, &items[i]);
        last_logits(&p);
    }
    for (uint32_t i = 0; i < count; i++) {
        items[i].session->position += items[i].segment.count;
        items[i].session->rounded &= !items[i].segment.count;
    }
    let_pages_go(&p);
    collect_picks(&p);
}
