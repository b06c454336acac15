/* step.c - steps in parts: every sequence goes on by one token, and the backend repeats what it
 * noted of an earlier step (see ops_step). The order of layers is that of model.c, but that chunks
 * are encoded once the first retrieval is done, which could not see them: the token that ends a
 * chunk does not read it.
 *
 * Pages come in three ways. While a part runs, the chunks that its sequences read for the token
 * before this one are brought, since most are read again. What a retrieval then picks and is not
 * there is brought in front of the part that needs it. Where that would take long, because a page
 * must come from the disk, or many from the host, the sequences that have theirs go on alone to the
 * end of the step, and the others follow when their pages are there. A sequence computes the same
 * whoever goes beside it, so none of this changes a token. */
#include <string.h>

#include "engine/model_private.h"
#include "engine/sampler.h"
#include "proto/base/assert.h"

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
        model_place_chunk(p, &p->items[i], n);
        n += m->chunk_items[n] != NULL;
    }
    return n;
}

struct step {
    struct ops_step ops;
    enum ops_part how;
    uint32_t part;
    struct block pinned; /* pages of the part under way */
    bool held;           /* they are pinned */
    bool divided;        /* it is of a part of the sequences already */
};

/* How far a step has come. */
struct place {
    uint32_t layer, mamba;
    const struct weights_layer *chunking;
};

/* From host memory a page comes at about a hundredth of the speed at which a device reads its own
 * weights. */
#define DIVIDE_RATIO 100

bool model_goes_in_parts(const struct pass *p)
{
    bool fits = p->engine->ops->step_begin && p->count <= OPS_STEP_ROWS;
    for (uint32_t i = 0; i < p->count && fits; i++)
        fits = p->items[i].segment.count == 1 && !p->items[i].step->targets;
    return fits;
}

/* Tells the backend of the rows that the step has now. */
static void name_step(struct pass *p, struct step *s)
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
    model_name_landmarks(p);
    s->ops = (struct ops_step){.count = p->count,
                               .tokens = m->tokens,
                               .positions = m->step.positions,
                               .states = m->step.states,
                               .kept = m->step.kept,
                               .logits = m->step.logits,
                               .landmarks = m->landmarks};
    p->engine->ops->step_begin(p->engine->context, &s->ops);
}

/* ---- pages that are expected ---- */

/* Whether pages have ever left the host's memory or the device's: until then all are there. */
static bool pages_are_short(const struct engine *engine)
{
    const struct ops_page_stats device = engine->ops->page_stats(engine->context);
    return engine->memory.evictions || device.resident == device.capacity;
}

/* What the group's retrieval picked for each sequence's last token begins to come, as far as there
 * is room beside what the step may need. */
static void expect_pages(struct pass *p, uint32_t group)
{
    struct engine *engine = p->engine;
    struct model *m = p->m;
    const uint32_t per_row = model_picks_per_row(engine);
    const size_t reserve = (size_t)p->count * (per_row + 1);
    size_t resident = 0;
    ASSERT(!m->ahead.pins.count);
    if (!engine->ops->prefetch || !pages_are_short(engine))
        return;
    m->ahead = (struct block){.pins.pages = m->ahead_held};
    m->stamp++;
    for (uint32_t i = 0; i < p->count; i++)
        for (uint32_t j = 0; j < per_row && memory_room(&engine->memory) > reserve; j++) {
            const uint64_t chunk = p->items[i].session->last_picks[(size_t)group * per_row + j];
            if (chunk != SESSION_NO_PICK)
                (void)model_pin_chunk(p, &m->ahead, i, chunk, true);
        }
    for (size_t i = 0; i < m->ahead.pins.count; i++)
        if (!m->ahead.pins.pages[i]->unread)
            m->expected[resident++] = m->ahead.pins.pages[i]->data;
    if (resident)
        engine->ops->prefetch(engine->context, m->expected, resident, true);
    (void)memory_load_begin(&engine->memory, &engine->io, m->ahead.pins.pages,
                            m->ahead.pins.unread);
}

/* They are there; those that could not be read are not, and whoever needs one will say so. */
static void await_expected(struct pass *p)
{
    if (!p->m->ahead.pins.count)
        return;
    (void)memory_load_end(&p->engine->memory);
    p->engine->ops->fetched(p->engine->context);
}

static void drop_expected(struct pass *p)
{
    model_unpin_rows(p, &p->m->ahead);
}

/* ---- parts ---- */

static void begin_step(struct pass *p, struct step *s)
{
    name_step(p, s);
    s->how = p->engine->ops->part_begin(p->engine->context, 0, NULL, NULL);
    expect_pages(p, 0);
}

static void let_go(struct pass *p, struct step *s)
{
    if (s->held)
        model_unpin_rows(p, &s->pinned);
    s->held = false;
}

/* Which rows had better wait for their pages while the others go on; false: none, or all. */
static bool find_late(const struct pass *p, const struct step *s, bool *late)
{
    const struct engine *engine = p->engine;
    const uint32_t per_row = model_picks_per_row(engine);
    const size_t weights = engine->info.weight_bytes / (engine->config.group_count + 1);
    size_t lacking = 0;
    uint32_t late_count = 0;
    bool unread[OPS_STEP_ROWS] = {0}, lacks[OPS_STEP_ROWS] = {0};
    if (s->divided || p->count < 2 || !engine->ops->prefetch)
        return false;
    for (uint32_t i = 0; i < p->count; i++)
        for (uint32_t j = 0; j < per_row; j++) {
            const struct memory_page *page = p->m->row_page[(size_t)i * per_row + j];
            if (!page)
                continue;
            unread[i] |= page->unread;
            if (!page->unread && !engine->ops->holds(engine->context, page->data)) {
                lacks[i] = true;
                lacking++;
            }
        }
    const bool many = lacking * engine->info.kv_bytes * DIVIDE_RATIO > weights;
    for (uint32_t i = 0; i < p->count; i++) {
        late[i] = unread[i] || (lacks[i] && many);
        late_count += late[i];
    }
    /* Later parts of those that go on need pages beside those of the others. */
    return late_count && late_count < p->count &&
           memory_room(&engine->memory) >= (size_t)p->count * per_row;
}

/* The part behind a retrieval: with all its pages at once, or, where they do not fit or cannot be
 * read, plainly, where each HSA layer goes by as many rows as fit. False, and nothing begun but
 * that pages are pinned: the step is to be divided. */
static bool begin_part(struct pass *p, struct step *s, bool *late)
{
    struct engine *engine = p->engine;
    await_expected(p);
    s->pinned = (struct block){.pins.pages = p->m->held};
    s->how = OPS_PART_PLAIN;
    s->part++;
    model_pin_rows(p, &s->pinned, p->rows.row_count, 0);
    drop_expected(p);
    s->held = true;
    if (s->pinned.count == p->rows.row_count) {
        if (find_late(p, s, late))
            return false;
        if (!model_load_rows(p, &s->pinned)) {
            s->how =
                engine->ops->part_begin(engine->context, s->part, p->m->picks.weights, p->m->pages);
        }
    }
    if (s->how == OPS_PART_PLAIN)
        let_go(p, s);
    else if (s->part < engine->config.group_count)
        expect_pages(p, s->part);
    return true;
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

/* Tokens that the device draws, of all items that leave it to it. */
static void draw_tokens(struct pass *p)
{
    struct model *m = p->m;
    const struct ops *ops = p->engine->ops;
    uint32_t n = 0;
    for (uint32_t i = 0; i < p->count; i++) {
        struct sampler *sampler = p->items[i].step->sampler;
        if (sampler && ops->draw && sampler_draws_plainly(sampler))
            m->step.draws[n++] = (struct ops_draw){
                .how = sampler_next_draw(sampler), .row = i, .largest = m->step.largest[i]};
    }
    if (n)
        ops->draw(p->engine->context, m->step.draws, n, m->logits, m->step.drawn);
    for (uint32_t i = 0; i < n; i++) {
        struct engine_session *session = p->items[m->step.draws[i].row].session;
        session->drawn = true;
        session->token = m->step.drawn[i];
    }
}

/* Whether an item's sampler must see the logits. */
static bool looks_at_logits(const struct model_item *item)
{
    return item->step->sampler && !item->session->drawn &&
           !sampler_takes_largest(item->step->sampler);
}

/* Logits that the step left on the device, for all items; what a sampler must look at comes to the
 * host in few copies. */
static void end_logits(struct pass *p)
{
    struct model *m = p->m;
    const size_t v = p->engine->config.vocab_size;
    draw_tokens(p);
    for (uint32_t first = 0; first < p->count; first += LOGIT_ROWS) {
        const uint32_t left = p->count - first, n = left < LOGIT_ROWS ? left : LOGIT_ROWS;
        bool wanted = false;
        for (uint32_t i = first; i < first + n; i++) {
            struct engine_session *session = p->items[i].session;
            const struct engine_step_item *step = p->items[i].step;
            session->has_logits = step->want_logits || step->sampler;
            session->away = true;
            session->largest = m->step.largest[i];
            wanted |= looks_at_logits(&p->items[i]);
        }
        if (wanted)
            p->engine->ops->copy(p->engine->context, m->host_logits, m->logits + first * v,
                                 n * v * sizeof(float));
        for (uint32_t i = first; i < first + n && wanted; i++) {
            if (!looks_at_logits(&p->items[i]))
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
        model_last_logits(p);
        return;
    }
    if (s->how == OPS_PART_RECORD)
        engine->ops->logits(engine->context, &engine->weights.final_norm, &engine->weights.head,
                            &p->rows, p->m->x, p->m->logits);
    end_part(p, s, NULL, p->m->step.largest);
    end_logits(p);
}

/* False: the step is to be divided. */
static bool step_retrieve(struct pass *p, struct step *s, const struct weights_layer *layer,
                          const struct weights_layer *chunking, bool *late)
{
    if (s->how != OPS_PART_REPLAY)
        model_retrieve(p, layer);
    end_part(p, s, &p->m->picks, NULL);
    await_expected(p); /* nothing is appended while the store is read */
    if (s->part == 0) {
        const uint32_t chunks = whole_chunks(p);
        model_encode_chunks(p, chunking, chunks);
        model_append_chunks(p, chunks);
    }
    model_name_landmarks(p); /* blocks may lie elsewhere now */
    model_note_picks(p, s->part);
    return begin_part(p, s, late);
}

static void run_divided(struct pass *p, struct step *s, const bool *late, struct place at);

/* All layers from `at` on. */
static void run_rest(struct pass *p, struct step *s, struct place at)
{
    struct engine *engine = p->engine;
    struct model *m = p->m;
    bool late[OPS_STEP_ROWS] = {0};
    for (; at.layer < engine->config.layer_count; at.layer++) {
        const struct weights_layer *layer = &engine->weights.layers[at.layer];
        if (layer->kind == MODEL_LAYER_RETRIEVAL) {
            if (!step_retrieve(p, s, layer, at.chunking, late)) {
                at.layer++;
                run_divided(p, s, late, at);
                return;
            }
        } else if (layer->kind == MODEL_LAYER_CHUNKING) {
            at.chunking = layer;
        }
        at.mamba += layer->kind == MODEL_LAYER_MAMBA;
        if (s->how == OPS_PART_REPLAY)
            continue;
        if (layer->kind == MODEL_LAYER_MAMBA) {
            for (uint32_t j = 0; j < p->count; j++)
                m->states[j] = p->items[j].session->layers[at.mamba - 1];
            engine->ops->mamba(engine->context, &layer->mamba, &p->rows, m->states, m->x);
        } else if (layer->kind == MODEL_LAYER_CHUNKING) {
            engine->ops->keep_rows(engine->context, m->x);
        } else if (layer->kind == MODEL_LAYER_HSA) {
            s->how == OPS_PART_PLAIN ? model_hsa(p, layer) : noted_hsa(p, layer);
        }
    }
    step_logits(p, s);
}

/* ---- a step that is divided ---- */

static void copy_picks(const struct pass *p, const struct ops_picks *to, size_t to_row,
                       const struct ops_picks *from, size_t from_row, size_t rows)
{
    const size_t per_row = model_picks_per_row(p->engine);
    memmove(to->chunks + to_row * per_row, from->chunks + from_row * per_row,
            rows * per_row * sizeof *to->chunks);
    memmove(to->weights + to_row * per_row, from->weights + from_row * per_row,
            rows * per_row * sizeof *to->weights);
}

/* Rows that are not late move together at the front, the others to `waiting`; items likewise change
 * places. Returns how many are not late. */
static uint32_t part_rows(struct pass *p, const bool *late)
{
    struct engine *engine = p->engine;
    struct model *m = p->m;
    const size_t d = engine->config.hidden_size, per_row = model_picks_per_row(engine);
    struct model_item items[OPS_STEP_ROWS];
    uint32_t places[OPS_STEP_ROWS], ready = 0, waiting = 0;
    for (uint32_t i = 0; i < p->count; i++)
        ready += !late[i];
    for (uint32_t i = 0, front = 0; i < p->count; i++) {
        places[i] = late[i] ? ready + waiting : front;
        items[places[i]] = p->items[i];
        if (late[i]) {
            engine->ops->copy(engine->context, m->waiting + waiting * d, m->x + i * d,
                              d * sizeof(float));
            copy_picks(p, &m->waiting_picks, waiting++, &m->picks, i, 1);
            continue;
        }
        if (front < i) {
            engine->ops->copy(engine->context, m->x + front * d, m->x + i * d, d * sizeof(float));
            copy_picks(p, &m->picks, front, &m->picks, i, 1);
            memcpy(m->pages + front * per_row, m->pages + i * per_row, per_row * sizeof *m->pages);
        }
        front++;
    }
    memcpy(p->items, items, p->count * sizeof *items);
    for (size_t i = 0; i < engine->pick_count; i++) {
        uint32_t *item = &engine->noted[i].item;
        if (*item >= p->first && *item - p->first < p->count)
            *item = p->first + places[*item - p->first];
    }
    return ready;
}

/* `count` items from `first` of the pass on, as a pass of their own whose rows lie at the front. */
static struct pass some_of(const struct pass *p, uint32_t first, uint32_t count)
{
    struct pass out = *p;
    out.items += first;
    out.first += first;
    out.count = count;
    for (uint32_t i = 0; i < count; i++) {
        out.items[i].segment.row = i;
        out.m->segments[i] = out.items[i].segment;
    }
    out.rows =
        (struct ops_rows){.segments = out.m->segments, .segment_count = count, .row_count = count};
    return out;
}

/* The pages of the rows that wait, as far as the host has them, begin to come to the device. */
static void fetch_waiting(struct pass *p, const struct block *held)
{
    size_t resident = 0;
    for (size_t i = 0; i < held->pins.count && resident < p->m->expected_capacity; i++)
        if (!held->pins.pages[i]->unread)
            p->m->expected[resident++] = held->pins.pages[i]->data;
    p->engine->ops->prefetch(p->engine->context, p->m->expected, resident, false);
}

/* Those that have their pages go on to the end of the step, then the others. */
static void run_divided(struct pass *p, struct step *s, const bool *late, struct place at)
{
    struct engine *engine = p->engine;
    struct model *m = p->m;
    const uint32_t part = s->part, all = p->count, ready = part_rows(p, late);
    struct step first = {.part = part, .divided = true},
                second = {.part = part - 1, .divided = true};
    /* All pages stay pinned, in a list that the parts to come leave alone. */
    struct memory_page **list = m->held;
    struct block held = s->pinned;
    m->held = m->waiting_held;
    m->waiting_held = list;
    engine->counted.steps_divided++;
    (void)memory_load_begin(&engine->memory, &engine->io, held.pins.pages, held.pins.unread);
    struct pass some = some_of(p, 0, ready);
    name_step(&some, &first);
    first.how = engine->ops->part_begin(engine->context, part, m->picks.weights, m->pages);
    fetch_waiting(&some, &held);
    run_rest(&some, &first, at);
    /* A failed read is tried again with the pages of each sequence alone. */
    (void)memory_load_end(&engine->memory);
    engine->ops->fetched(engine->context);
    some = some_of(p, ready, all - ready);
    engine->ops->copy(engine->context, m->x, m->waiting,
                      some.count * engine->config.hidden_size * sizeof(float));
    copy_picks(p, &m->picks, 0, &m->waiting_picks, 0, some.count);
    name_step(&some, &second);
    bool none[OPS_STEP_ROWS];
    const bool begun = begin_part(&some, &second, none);
    ASSERT(begun);
    model_unpin_rows(p, &held);
    run_rest(&some, &second, at);
}

void model_run_step(struct pass *p)
{
    struct engine *engine = p->engine;
    struct step s = {0};
    begin_step(p, &s);
    if (s.how != OPS_PART_REPLAY)
        engine->ops->embed(engine->context, &engine->weights.embeddings, p->m->tokens, p->count,
                           p->m->x);
    run_rest(p, &s, (struct place){0});
}
