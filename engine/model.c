/* model.c - the forward pass, once, over any backend: what runs when, and where pages come from.
 * The arithmetic is in ref/ and cpu/; the order of layers is model_config's. */
#include <stdlib.h>
#include <string.h>

#include "engine/model_private.h"
#include "engine/sampler.h"
#include "proto/base/assert.h"

uint32_t model_picks_per_row(const struct engine *engine)
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
    const size_t d = c->hidden_size, picks = (size_t)max_rows * model_picks_per_row(engine);
    m->max_rows = max_rows;
    /* Each sequence may complete one chunk that it had begun, and those that its rows hold; if more
     * sequences than expected do, some are told to wait. */
    m->max_chunks = max_rows / c->chunk_tokens + engine->info.running_max + 1;
    m->x = ops->alloc(engine->context, max_rows * d * sizeof(float));
    m->q = ops->alloc(engine->context, max_rows * d * sizeof(float));
    m->o = ops->alloc(engine->context, max_rows * d * sizeof(float));
    m->last = ops->alloc(engine->context, LOGIT_ROWS * d * sizeof(float));
    if (ops->step_begin)
        m->waiting = ops->alloc(engine->context, OPS_STEP_ROWS * d * sizeof(float));
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
    m->marked = calloc(picks, sizeof *m->marked);
    const size_t step_picks = (size_t)OPS_STEP_ROWS * model_picks_per_row(engine);
    const size_t most = picks > step_picks ? picks : step_picks;
    m->held = calloc(most, sizeof *m->held);
    m->waiting_held = calloc(most, sizeof *m->waiting_held);
    m->expected_capacity = step_picks;
    m->expected = calloc(step_picks, sizeof *m->expected);
    m->ahead_held = calloc(step_picks, sizeof *m->ahead_held);
    m->waiting_picks.chunks = calloc(step_picks, sizeof *m->waiting_picks.chunks);
    m->waiting_picks.weights = calloc(step_picks, sizeof *m->waiting_picks.weights);
    m->row_page = calloc(step_picks, sizeof *m->row_page);
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
        !m->marked || !m->held || !m->waiting_held || !m->ahead_held || !m->expected ||
        !m->waiting_picks.chunks || !m->waiting_picks.weights || (ops->step_begin && !m->waiting) ||
        !m->row_page || !m->segments || !m->single || !m->states || !m->landmarks ||
        !m->chunk_rows || !m->chunk_kv || !m->chunk_landmarks || !m->chunk_items ||
        !m->chunk_index) {
        model_destroy(engine, m);
        return STATUS_NO_MEMORY;
    }
    for (uint32_t i = 0; i < max_rows; i++)
        m->single[i] = (struct ops_segment){.row = i, .count = 1};
    *out = m;
    return STATUS_OK;
}

size_t model_chunk_room(const struct model *m)
{
    return m->max_chunks;
}

void model_destroy(struct engine *engine, struct model *m)
{
    if (!m)
        return;
    float *device[] = {m->x, m->q, m->o, m->last, m->waiting, m->chunks, m->logits};
    for (size_t i = 0; i < sizeof device / sizeof *device; i++)
        if (device[i])
            engine->ops->release(engine->context, device[i]);
    void *host[] = {m->picks.chunks, m->picks.weights, m->host_logits, m->host_landmarks};
    for (size_t i = 0; i < sizeof host / sizeof *host; i++)
        if (host[i])
            engine->ops->release_host(engine->context, host[i]);
    free(m->tokens);
    free(m->pages);
    free(m->marked);
    free(m->held);
    free(m->waiting_held);
    free(m->ahead_held);
    free(m->expected);
    free(m->waiting_picks.chunks);
    free(m->waiting_picks.weights);
    free(m->row_page);
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

void model_item_failed(struct model_item *item, enum status status)
{
    if (!item->status)
        item->status = status;
}

/* ---- chunks ---- */

/* A chunk of `item` is whole in scratch slot `n`: gives it a page and a landmark. */
void model_place_chunk(struct pass *p, struct model_item *item, uint32_t n)
{
    struct model *m = p->m;
    struct engine_session *s = item->session;
    const uint64_t index = s->chunk_count;
    const struct chunk_key key = {s->ranges[s->range_count - 1].branch, index};
    const enum status status = session_add_landmark(s, &m->chunk_landmarks[n]);
    struct memory_page *page = status ? NULL : memory_page_create(&p->engine->memory, key);
    if (!page) {
        /* Room was checked before the step; only the system's own memory can be short here. */
        model_item_failed(item, STATUS_NO_MEMORY);
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
                model_place_chunk(p, item, n);
                n += m->chunk_items[n] != NULL;
            }
            row += take;
            left -= take;
            filled = 0;
        }
    }
    return n;
}

/* Landmarks of the `n` collected chunks to the host, those of a block in one copy: what lies behind
 * a block can be another allocation of the device, and no copy may reach from one into the next. */
static void copy_landmarks(struct pass *p, uint32_t n)
{
    struct model *m = p->m;
    const size_t bytes = p->engine->info.landmark_bytes;
    for (uint32_t first = 0, end; first < n; first = end) {
        const char *from = m->chunk_landmarks[first];
        for (end = first + 1; end < n; end++)
            if (m->chunk_items[end] != m->chunk_items[first] ||
                m->chunk_index[end] % OPS_LANDMARK_BLOCK == 0)
                break;
        p->engine->ops->copy(p->engine->context, m->host_landmarks + first * bytes, from,
                             (end - first) * bytes);
    }
}

/* Encodes the `n` chunks that were collected. */
void model_encode_chunks(struct pass *p, const struct weights_layer *layer, uint32_t n)
{
    struct engine *engine = p->engine;
    struct model *m = p->m;
    if (!n)
        return;
    engine->ops->encode_chunks(engine->context, &layer->chunking, n, m->chunk_rows, m->chunk_kv,
                               m->chunk_landmarks);
    memory_grow_ahead(&engine->memory); /* a slice's lower layers are still under way */
    engine->counted.chunks_encoded += n;
    for (uint32_t first = 0, end; first < n; first = end) { /* chunks of an item are neighbours */
        for (end = first + 1; end < n && m->chunk_items[end] == m->chunk_items[first]; end++)
            ;
        session_landmarks_written(m->chunk_items[first]->session, m->chunk_index[first],
                                  end - first);
    }
    copy_landmarks(p, n);
    engine_must_work(engine);
}

/* Gives the `n` chunks that were encoded to whoever keeps them. */
void model_append_chunks(struct pass *p, uint32_t n)
{
    struct engine *engine = p->engine;
    struct model *m = p->m;
    for (uint32_t i = 0; i < n; i++) {
        const struct engine_session *s = m->chunk_items[i]->session;
        const struct chunk_key key = {s->ranges[s->range_count - 1].branch, m->chunk_index[i]};
        const enum status status =
            engine->io.append(engine->io.context, key, m->chunk_kv[i],
                              m->host_landmarks + i * engine->info.landmark_bytes);
        if (status) { /* room was asked for before the step, so this is not a full queue */
            model_item_failed(m->chunk_items[i], status);
            memory_durable(&engine->memory, key, true);
        }
    }
}

/* ---- retrieval and HSA ---- */

void model_name_landmarks(struct pass *p)
{
    for (uint32_t i = 0; i < p->count; i++)
        p->m->landmarks[i] = (struct ops_landmarks){.blocks = p->items[i].session->block_data,
                                                    .narrow = p->items[i].session->narrow_data,
                                                    .count = p->items[i].session->chunk_count};
}

/* The pages that were kept for the group's next HSA layers. */
static void let_pages_go(struct pass *p)
{
    struct model *m = p->m;
    while (m->kept)
        memory_page_unpin(&p->engine->memory, m->held[--m->kept]);
    m->picked = UNMARKED;
}

void model_retrieve(struct pass *p, const struct weights_layer *layer)
{
    struct model *m = p->m;
    let_pages_go(p);
    model_name_landmarks(p);
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
        for (uint32_t j = 0; j < model_picks_per_row(engine); j++) {
            const size_t at = row * model_picks_per_row(engine) + j;
            if (!(p->m->picks.weights[at] > 0))
                continue;
            if (engine->pick_count == engine->pick_capacity && !grow_picks(engine))
                return STATUS_NO_MEMORY;
            engine->noted[engine->pick_count++] =
                (struct engine_noted_pick){.item = p->first + i,
                                           .pick = {.group = group,
                                                    .head = j / c->topk,
                                                    .chunk = p->m->picks.chunks[at],
                                                    .weight = p->m->picks.weights[at]}};
        }
    }
    return STATUS_OK;
}

static bool holds_pick(const uint64_t *picks, uint32_t count, uint64_t chunk)
{
    for (uint32_t i = 0; i < count; i++)
        if (picks[i] == chunk)
            return true;
    return false;
}

/* Keeps what the last row of item `i` read, after a look at what the token before it did. */
static void keep_picks(struct pass *p, uint32_t i, uint32_t group)
{
    struct engine_session *session = p->items[i].session;
    const struct ops_segment *segment = &p->items[i].segment;
    const uint32_t per_row = model_picks_per_row(p->engine);
    const size_t from = (size_t)(segment->row + segment->count - 1) * per_row;
    const float *weights = p->m->picks.weights + from;
    const uint64_t *chunks = p->m->picks.chunks + from;
    if (!session->last_picks)
        return;
    uint64_t *last = session->last_picks + (size_t)group * per_row;
    for (uint32_t j = 0; j < per_row && segment->count == 1; j++) {
        p->engine->counted.picks += weights[j] > 0;
        p->engine->counted.picks_repeated += weights[j] > 0 && holds_pick(last, per_row, chunks[j]);
    }
    for (uint32_t j = 0; j < per_row; j++)
        last[j] = weights[j] > 0 ? chunks[j] : SESSION_NO_PICK;
}

void model_note_picks(struct pass *p, uint32_t group)
{
    for (uint32_t i = 0; i < p->count; i++)
        keep_picks(p, i, group);
    const enum status status = try_picks(p, group);
    for (uint32_t i = 0; status && i < p->count; i++)
        model_item_failed(&p->items[i], status);
}

/* The page of a chunk, pinned; NULL: no room. */
struct memory_page *model_pin_chunk(struct pass *p, struct block *b, uint32_t item, uint64_t chunk,
                                    bool expected)
{
    struct model *m = p->m;
    struct recent *recent = &m->recent[chunk % RECENT_PAGES];
    if (recent->stamp == m->stamp && recent->chunk == chunk && recent->item == item)
        return recent->page;
    uint64_t end;
    const struct chunk_key key = {session_branch_of(p->items[item].session, chunk, &end), chunk};
    bool added;
    struct memory_page *page = expected
                                   ? memory_page_expect(&p->engine->memory, key, m->stamp, &added)
                                   : memory_page_pin(&p->engine->memory, key, m->stamp, &added);
    if (added)
        memory_pins_add(&b->pins, page);
    if (page)
        *recent = (struct recent){m->stamp, chunk, item, page};
    return page;
}

/* Pins the pages of as many more rows from `first` on as there is room for, and of no more than
 * PIN_ROWS: a device works on them while the next are pinned. */
static void pin_more(struct pass *p, struct block *b, uint32_t end, uint32_t item)
{
    struct model *m = p->m;
    const uint32_t per_row = model_picks_per_row(p->engine);
    const size_t named = (size_t)OPS_STEP_ROWS * per_row;
    b->count = 0;
    for (uint32_t row = b->first; row < end && b->count < PIN_ROWS; row++) {
        while (row >= p->items[item].segment.row + p->items[item].segment.count)
            item++;
        for (uint32_t j = 0; j < per_row; j++) {
            const size_t at = (size_t)row * per_row + j;
            m->pages[at] = NULL;
            if (at < named)
                m->row_page[at] = NULL;
            if (!(m->picks.weights[at] > 0) || p->items[item].status)
                continue;
            struct memory_page *page = model_pin_chunk(p, b, item, m->picks.chunks[at], false);
            if (!page)
                return;
            m->pages[at] = page->data;
            if (at < named)
                m->row_page[at] = page;
        }
        b->count++;
    }
}

void model_pin_rows(struct pass *p, struct block *b, uint32_t end, uint32_t item)
{
    let_pages_go(p);
    p->m->stamp++;
    b->pins.count = b->pins.unread = 0;
    pin_more(p, b, end, item);
    ASSERT(b->count); /* one row always fits: checked before the step */
}

void model_unpin_rows(struct pass *p, struct block *b)
{
    while (b->pins.count)
        memory_page_unpin(&p->engine->memory, b->pins.pages[--b->pins.count]);
    b->pins.unread = 0;
}

enum status model_load_rows(struct pass *p, struct block *b)
{
    const size_t unread = b->pins.unread;
    b->pins.unread = 0;
    return memory_load(&p->engine->memory, &p->engine->io, b->pins.pages, unread);
}

static void attend_block(struct pass *p, const struct block *b)
{
    struct model *m = p->m;
    const size_t from = b->first * model_picks_per_row(p->engine);
    const size_t d = p->engine->config.hidden_size;
    p->engine->ops->hsa_attend(p->engine->context, b->count, m->q + b->first * d,
                               m->picks.weights + from, m->pages + from, m->o + b->first * d);
}

/* Attends rows [first, end), which begin in `item`; where `whole`, a failed read is tried again
 * sequence by sequence, so that only the one whose chunks are damaged fails, and pages that could
 * all be pinned together are kept for the group's next layers. */
static void attend_rows(struct pass *p, uint32_t first, uint32_t end, uint32_t item, bool whole)
{
    struct model *m = p->m;
    struct block b = {.first = first, .pins.pages = m->held};
    bool keep = whole;
    m->stamp++;
    while (b.first < end) {
        while (b.first >= p->items[item].segment.row + p->items[item].segment.count)
            item++;
        pin_more(p, &b, end, item);
        if (!b.count) { /* what earlier rows read makes room */
            model_unpin_rows(p, &b);
            model_pin_rows(p, &b, end, item);
            keep = false;
        }
        const enum status status = model_load_rows(p, &b);
        if (!status) {
            attend_block(p, &b);
            b.first += b.count;
            continue;
        }
        model_unpin_rows(p, &b);
        keep = false;
        if (!whole)
            model_item_failed(&p->items[item], status); /* its rows read nothing from here on */
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
        m->kept = b.pins.count;
    else
        model_unpin_rows(p, &b);
}

/* The chunks that the item's marks name, to m->marked; how many. */
static size_t list_marked(struct pass *p, const uint64_t *marks, uint32_t item)
{
    const uint64_t chunks = p->m->landmarks[item].count;
    size_t count = 0;
    for (uint64_t word = 0; word * 64 < chunks; word++)
        for (uint64_t left = marks[word]; left; left &= left - 1)
            p->m->marked[count++] = word * 64 + (uint64_t)__builtin_ctzll(left);
    return count;
}

/* Pins the pages of the item's marked chunks and puts where they lie to m->pages from `*count` on;
 * false: no room. */
static bool pin_marked(struct pass *p, struct block *b, uint32_t item, size_t *count)
{
    struct model *m = p->m;
    const uint64_t *marks = p->engine->ops->picked(p->engine->context, item);
    const size_t marked = marks ? list_marked(p, marks, item) : 0;
    const void **data = m->pages + *count;
    *count += marked;
    if (p->items[item].status)
        memset(data, 0, marked * sizeof *data);
    for (size_t i = 0, next; i < marked && !p->items[item].status; i = next) {
        uint64_t end;
        const uint64_t branch = session_branch_of(p->items[item].session, m->marked[i], &end);
        for (next = i + 1; next < marked && m->marked[next] < end; next++)
            ;
        if (!memory_pin_chunks(&p->engine->memory, branch, m->marked + i, next - i, m->stamp,
                               data + i, &b->pins))
            return false;
    }
    return marks;
}

/* Pins the pages of all picks, each once, and tells the backend where they lie. False, and nothing
 * is pinned: there is no room for all at once, or one cannot be read. */
static bool name_picked(struct pass *p)
{
    struct engine *engine = p->engine;
    struct model *m = p->m;
    struct block b = {.pins.pages = m->held};
    size_t count = 0;
    bool whole = true;
    m->stamp++;
    for (uint32_t i = 0; i < p->count && whole; i++)
        whole = pin_marked(p, &b, i, &count);
    if (whole && !model_load_rows(p, &b) &&
        engine->ops->name_picked(engine->context, m->pages, count)) {
        m->kept = b.pins.count;
        return true;
    }
    model_unpin_rows(p, &b);
    return false;
}

void model_hsa(struct pass *p, const struct weights_layer *layer)
{
    struct model *m = p->m;
    const struct ops *ops = p->engine->ops;
    ops->hsa_query(p->engine->context, &layer->hsa, &p->rows, m->x, m->q);
    const struct block all = {.count = p->rows.row_count};
    if (m->picked == MARKED)
        m->picked = name_picked(p) ? NAMED : UNMARKED;
    if (m->picked == NAMED)
        ops->hsa_attend(p->engine->context, all.count, m->q, NULL, NULL, m->o);
    else if (m->kept)
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
void model_last_logits(struct pass *p)
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
    uint32_t mamba = 0, group = 0, chunks = 0;
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
            chunks = gather_chunks(p);
            model_encode_chunks(p, layer, chunks);
            break;
        case MODEL_LAYER_RETRIEVAL: {
            model_retrieve(p, layer);
            m->picked = engine->ops->picked ? MARKED : UNMARKED;
            model_note_picks(p, group++);
            break;
        }
        case MODEL_LAYER_HSA:
            model_hsa(p, layer);
            break;
        }
    }
    /* Only now: they are copied while a device works on the layers behind. */
    model_append_chunks(p, chunks);
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
    if (model_goes_in_parts(&p)) {
        model_run_step(&p);
    } else {
        engine->ops->embed(engine->context, &engine->weights.embeddings, m->tokens, row, m->x);
        run_layers(&p);
        for (uint32_t i = 0; i < count; i++)
            if (items[i].step->targets)
                score_targets(&p, &items[i]);
        model_last_logits(&p);
    }
    for (uint32_t i = 0; i < count; i++) {
        items[i].session->position += items[i].segment.count;
        items[i].session->rounded &= !items[i].segment.count;
    }
    let_pages_go(&p);
    collect_picks(&p);
}
