/* sched.c - see sched.h. */
#include "server/sched.h"

#include <stdio.h>
#include <string.h>

#include "proto/base/assert.h"

#define AIM 0.8 /* of max_stall: no step takes just what the last one did */
#define RETRY_MAX_S 3600.0
#define NO_RATE_S 1.0 /* between starts, before any was measured */

static double least(double a, double b)
{
    return a < b ? a : b;
}

static double most(double a, double b)
{
    return a > b ? a : b;
}

void sched_init(struct sched *sched, const struct sched_options *options)
{
    ASSERT(options->running_max >= 1 && options->running_max <= LIMITS_RUNNING);
    ASSERT(options->row_max >= options->slice_tokens &&
           options->slice_tokens >= LIMITS_CUT_TOKENS + LIMITS_CUT_REST);
    *sched = (struct sched){.options = *options};
    list_init(&sched->waiting);
    list_init(&sched->running);
}

struct sched_share *sched_share(struct sched *sched, const char *name, double weight)
{
    struct sched_share *spare = NULL;
    weight = weight > 0 ? weight : 1;
    for (uint32_t i = 0; i < sched->share_count; i++) {
        struct sched_share *share = &sched->shares[i];
        if (strcmp(share->name, name) == 0) {
            share->used *= share->weight / weight; /* the seconds stay */
            share->weight = weight;
            return share;
        }
        if (!share->waiting && !share->running && (!spare || share->used < spare->used))
            spare = share;
    }
    /* One that is idle and has no more than it would begin with can be forgotten. */
    if (sched->share_count < SCHED_SHARES && !(spare && spare->used <= sched->level))
        spare = &sched->shares[sched->share_count++];
    ASSERT(spare); /* more keys than there may be, all at work: the queue is shorter */
    *spare = (struct sched_share){.weight = weight};
    snprintf(spare->name, sizeof spare->name, "%s", name);
    return spare;
}

/* ---- the queue ---- */

static uint32_t bulk_max(const struct sched *sched)
{
    const uint32_t most_of_them = sched->options.running_max * 3 / 4;
    return most_of_them ? most_of_them : 1;
}

/* Bulk entries stay long: half of the memory is for those that come and go. */
static uint64_t memory_max(const struct sched *sched, bool bulk)
{
    return bulk ? sched->options.memory_bytes / 2 : sched->options.memory_bytes;
}

bool sched_can_hold(const struct sched *sched, uint64_t bytes)
{
    return bytes <= sched->options.memory_bytes / 2;
}

/* Whether it wants more of the engine than it gets: others are measured by it. */
static bool is_short(const struct sched_share *share)
{
    return share->waiting || share->prefills;
}

/* One that begins to be short begins where the others are: what it did not want is not saved up. */
static void look_at_share(const struct sched *sched, struct sched_share *share)
{
    if (is_short(share) && !share->short_before)
        share->used = most(share->used, sched->level);
    share->short_before = is_short(share);
}

void sched_add(struct sched *sched, struct sched_entry *entry, struct sched_share *share)
{
    share->waiting++;
    share->waiting_bulk += entry->bulk;
    look_at_share(sched, share);
    entry->share = share;
    entry->phase = SCHED_WAITING;
    entry->decodes = entry->rows = 0;
    list_push_back(&sched->waiting, &entry->node);
    sched->waiting_count++;
}

/* When its turn is, within a share. */
static double turn(const struct sched *sched, const struct sched_entry *entry)
{
    const uint32_t n = sched->options.slice_tokens;
    const double slices = entry->phase == SCHED_RUNNING ? (double)entry->rows_left / n : 0;
    return entry->came + entry->priority + slices * sched_predict(sched, 0, n);
}

/* Whether it has less than the share's part of the places, were everybody short and one more here.
 * Bulk entries and others are counted apart, or a few uploads would shut their own key out. */
static bool under_its_part(const struct sched *sched, const struct sched_entry *entry)
{
    const struct sched_share *share = entry->share;
    const uint32_t has = entry->bulk ? share->bulk : share->running - share->bulk;
    double weights = 1;
    for (uint32_t i = 0; i < sched->share_count; i++)
        if (sched->shares[i].waiting || sched->shares[i].running)
            weights += sched->shares[i].weight;
    return has < sched->options.running_max * share->weight / weights;
}

/* Whether it may have a place: the last quarter is kept from bulk entries, and from shares that
 * have their part. */
static bool may_start(const struct sched *sched, const struct sched_entry *entry)
{
    const uint32_t free = sched->options.running_max - sched->running_count;
    if (entry->bulk &&
        (sched->bulk_count >= bulk_max(sched) ||
         (sched->bulk_count && sched->bulk_bytes + entry->bytes > memory_max(sched, true))))
        return false;
    return !sched->options.shared || free > sched->options.running_max / 4 ||
           under_its_part(sched, entry);
}

static bool goes_before(const struct sched *sched, const struct sched_entry *a,
                        const struct sched_entry *b)
{
    if (a->share != b->share)
        return a->share->used < b->share->used;
    return turn(sched, a) < turn(sched, b);
}

struct sched_entry *sched_start(struct sched *sched)
{
    struct sched_entry *first = NULL;
    if (sched->running_count == sched->options.running_max)
        return NULL;
    LIST_EACH(node, &sched->waiting)
    {
        struct sched_entry *entry = LIST_ENTRY(node, struct sched_entry, node);
        if (may_start(sched, entry) && (!first || goes_before(sched, entry, first)))
            first = entry;
    }
    /* Where there is no room for the first, a later small one does not overtake it: or it might
     * never have its turn. */
    if (!first ||
        (sched->running_count && sched->bytes + first->bytes > sched->options.memory_bytes))
        return NULL;
    list_remove(&first->node);
    list_push_back(&sched->running, &first->node);
    sched->waiting_count--;
    sched->running_count++;
    sched->bulk_count += first->bulk;
    sched->bytes += first->bytes;
    sched->bulk_bytes += first->bulk ? first->bytes : 0;
    first->share->waiting--;
    first->share->waiting_bulk -= first->bulk;
    first->share->running++;
    first->share->bulk += first->bulk;
    first->phase = SCHED_RUNNING;
    return first;
}

void sched_resize(struct sched *sched, struct sched_entry *entry, uint64_t bytes)
{
    ASSERT(entry->phase == SCHED_RUNNING);
    sched->bytes += bytes - entry->bytes;
    sched->bulk_bytes += entry->bulk ? bytes - entry->bytes : 0;
    entry->bytes = bytes;
}

void sched_remove(struct sched *sched, struct sched_entry *entry)
{
    list_remove(&entry->node);
    if (entry->phase == SCHED_WAITING) {
        sched->waiting_count--;
        entry->share->waiting--;
        entry->share->waiting_bulk -= entry->bulk;
        return;
    }
    sched->running_count--;
    sched->bulk_count -= entry->bulk;
    sched->bytes -= entry->bytes;
    sched->bulk_bytes -= entry->bulk ? entry->bytes : 0;
    entry->share->running--;
    entry->share->bulk -= entry->bulk;
}

/* ---- what steps take ---- */

static uint32_t units_of(uint32_t rows)
{
    const uint32_t units = (rows + LIMITS_CUT_TOKENS - 1) / LIMITS_CUT_TOKENS;
    return units < SCHED_UNITS ? units : SCHED_UNITS;
}

/* Twice as many never take more than twice the time, nor fewer take more than many: what was not
 * seen yet is between. */
static double predict_decode(const struct sched_speed *speed, uint32_t n)
{
    double guess = 0;
    if (speed->decode[n] > 0 || !n)
        return n ? speed->decode[n] : 0;
    for (uint32_t i = n - 1; i && guess <= 0; i--)
        guess = speed->decode[i] * n / i;
    for (uint32_t i = n + 1; i <= LIMITS_RUNNING; i++)
        if (speed->decode[i] > 0)
            return guess > 0 ? least(guess, speed->decode[i]) : speed->decode[i];
    return guess;
}

/* At least so much: what the rest took is rather taken for more. */
static double least_decode(const struct sched_speed *speed, uint32_t n)
{
    while (n && speed->decode[n] <= 0)
        n--;
    return n ? speed->decode[n] : 0;
}

static double predict_prefill(const struct sched_speed *speed, uint32_t rows)
{
    const uint32_t units = units_of(rows), last = speed->units;
    const double seen = speed->prefill[units];
    if (!rows || !last)
        return 0;
    const double scaled = speed->prefill[last] * units / last;
    if (units >= last) /* the last one counts for more than one of this size long ago */
        return seen > 0 ? least(seen, scaled) : scaled;
    return seen > 0 ? seen : scaled + (speed->prefill[last] - scaled) / 4;
}

double sched_predict(const struct sched *sched, uint32_t decodes, uint32_t rows)
{
    return predict_decode(&sched->speed, decodes) + predict_prefill(&sched->speed, rows);
}

/* Up soon, down slowly, and not far for one step that was disturbed. */
static void learn(double *value, double seen)
{
    if (*value <= 0)
        *value = seen;
    else if (seen > *value)
        *value += 0.3 * (least(seen, 4 * *value) - *value);
    else
        *value += 0.1 * (seen - *value);
}

/* A few rows tell nothing of many. */
static void learn_prefill(struct sched_speed *speed, uint32_t rows, double seconds)
{
    const uint32_t units = units_of(rows), whole = units * LIMITS_CUT_TOKENS;
    if (4 * rows < 3 * whole)
        return;
    speed->units = units;
    learn(&speed->prefill[units], rows < whole ? seconds * whole / rows : seconds);
}

/* ---- the step ---- */

uint32_t sched_cut(uint32_t want, uint32_t left)
{
    uint32_t n = want / LIMITS_CUT_TOKENS * LIMITS_CUT_TOKENS;
    n = n ? n : LIMITS_CUT_TOKENS;
    if (want >= left || n >= left)
        return left;
    if (left - n > LIMITS_CUT_REST)
        return n;
    return n > LIMITS_CUT_TOKENS ? n - LIMITS_CUT_TOKENS : left;
}

/* Seats for all, or as many for each, and what is left over for the first. */
static void plan_decodes(struct sched *sched)
{
    uint32_t entries = 0, seats = sched->options.running_max;
    LIST_EACH(node, &sched->running)
    {
        entries += LIST_ENTRY(node, struct sched_entry, node)->decodes > 0;
    }
    if (!entries)
        return;
    const uint32_t each = seats / entries ? seats / entries : 1;
    LIST_EACH(node, &sched->running)
    {
        struct sched_entry *entry = LIST_ENTRY(node, struct sched_entry, node);
        uint32_t n = entry->decodes < each ? entry->decodes : each;
        n = n < seats ? n : seats;
        if (!n)
            continue;
        sched->picks[sched->pick_count++] = (struct sched_pick){.entry = entry, .decodes = n};
        seats -= n;
    }
    for (uint32_t i = 0; i < sched->pick_count; i++) {
        struct sched_pick *pick = &sched->picks[i];
        const uint32_t wish = pick->entry->decodes - pick->decodes;
        const uint32_t more = wish < seats ? wish : seats;
        pick->decodes += more;
        seats -= more;
    }
    sched->step_decodes = sched->options.running_max - seats;
}

/* Whether it has something to do beside bulk, or would have if it could start. */
static bool wants_other(const struct sched_share *share)
{
    return share->has_other || share->waiting > share->waiting_bulk;
}

/* What each share has to do in this step, and how bulk and the rest divide the time. */
static void look_at_shares(struct sched *sched)
{
    double bulk = 0, other = 0;
    for (uint32_t i = 0; i < sched->share_count; i++) {
        struct sched_share *share = &sched->shares[i];
        share->decodes = share->prefills = 0;
        share->has_bulk = share->has_other = false;
    }
    LIST_EACH(node, &sched->running)
    {
        struct sched_entry *entry = LIST_ENTRY(node, struct sched_entry, node);
        struct sched_share *share = entry->share;
        entry->picked = false;
        share->decodes += entry->decodes;
        share->prefills += entry->rows > 0;
        share->has_bulk |= entry->bulk && entry->rows;
        share->has_other |= !entry->bulk && (entry->rows || entry->decodes);
    }
    for (uint32_t i = 0; i < sched->share_count; i++) {
        struct sched_share *share = &sched->shares[i];
        look_at_share(sched, share);
        if (!share->has_bulk || !wants_other(share)) /* there is nothing to balance */
            share->balance = 0;
        bulk += share->has_bulk ? share->weight : 0;
        other += share->has_other ? share->weight : 0;
    }
    sched->bulk_part = other > 0 ? bulk / other : 0;
    if (!(other > 0) || !(bulk > 0))
        sched->bulk_credit = 0;
}

/* Whether a share that is short and can go on has had less than this one, by more than a step. */
static bool is_ahead(const struct sched *sched, const struct sched_share *share)
{
    for (uint32_t i = 0; i < sched->share_count; i++) {
        const struct sched_share *other = &sched->shares[i];
        if (is_short(other) && (other->decodes || other->prefills) &&
            other->used + sched->options.max_stall < share->used)
            return true;
    }
    return false;
}

/* Whether bulk has had its part, of the engine or of its share. */
static bool bulk_waits(const struct sched *sched, const struct sched_share *share)
{
    return (sched->bulk_part > 0 && sched->bulk_credit < 0) || share->balance < 0;
}

/* Of two prefills: the share that has had less, then what is no bulk, then by turns. */
static bool is_next(const struct sched *sched, const struct sched_entry *a,
                    const struct sched_entry *b)
{
    if (a->share != b->share || (!a->bulk && !b->bulk))
        return goes_before(sched, a, b);
    return a->bulk && b->bulk ? a->served < b->served : b->bulk;
}

/* The entry whose prefill is next; NULL: none. */
static struct sched_entry *next_prefill(const struct sched *sched)
{
    struct sched_entry *first = NULL;
    LIST_EACH(node, &sched->running)
    {
        struct sched_entry *entry = LIST_ENTRY(node, struct sched_entry, node);
        if (!entry->rows || entry->picked || (entry->bulk && bulk_waits(sched, entry->share)) ||
            is_ahead(sched, entry->share))
            continue;
        if (!first || is_next(sched, entry, first))
            first = entry;
    }
    return first;
}

/* Rows of `entry` that fit into the step beside what is in it; 0: none. */
static uint32_t rows_that_fit(const struct sched *sched, const struct sched_entry *entry)
{
    const uint32_t room = sched->options.row_max - sched->step_rows;
    uint32_t want = entry->rows < room ? entry->rows : room;
    want = want < sched->options.slice_tokens ? want : sched->options.slice_tokens;
    uint32_t rows = sched_cut(want, entry->rows);
    if (sched->step_decodes) {
        const double time =
            AIM * sched->options.max_stall - predict_decode(&sched->speed, sched->step_decodes);
        const bool unknown = !sched->speed.units; /* the first one is a small one */
        while (rows > LIMITS_CUT_TOKENS &&
               (unknown || predict_prefill(&sched->speed, sched->step_rows + rows) > time)) {
            const uint32_t fewer = sched_cut(rows - LIMITS_CUT_TOKENS, entry->rows);
            if (fewer >= rows)
                break;
            rows = fewer;
        }
        /* The smallest goes on whatever it takes, or it never would. */
        if (sched->step_rows &&
            (unknown || predict_prefill(&sched->speed, sched->step_rows + rows) > time))
            return 0;
    }
    return rows <= room && rows <= sched->options.slice_tokens ? rows : 0;
}

static void plan_prefills(struct sched *sched)
{
    struct sched_entry *entry;
    while (sched->pick_count < SCHED_PICKS && (entry = next_prefill(sched))) {
        const uint32_t rows = rows_that_fit(sched, entry);
        if (!rows)
            break; /* the first of them waits for the next step, and nobody overtakes it */
        entry->picked = true;
        entry->served = sched->step_count;
        sched->picks[sched->pick_count++] = (struct sched_pick){.entry = entry, .rows = rows};
        sched->step_rows += rows;
    }
}

void sched_plan(struct sched *sched)
{
    sched->pick_count = sched->step_decodes = sched->step_rows = 0;
    sched->step_count++;
    look_at_shares(sched);
    plan_decodes(sched);
    plan_prefills(sched);
    if (!sched->pick_count) { /* one share waits for another's bulk, which waits for the first */
        sched->bulk_credit = 0;
        for (uint32_t i = 0; i < sched->share_count; i++)
            sched->shares[i].balance = 0;
        plan_prefills(sched);
    }
}

/* Where shares that come back begin. */
static void raise_level(struct sched *sched)
{
    bool any = false;
    double level = 0;
    for (uint32_t i = 0; i < sched->share_count; i++) {
        const struct sched_share *share = &sched->shares[i];
        if (is_short(share) && (!any || share->used < level)) {
            level = share->used;
            any = true;
        }
    }
    if (any)
        sched->level = most(sched->level, level);
}

/* Not more than a step ahead, nor so far behind that it would take long to come back. */
static double bounded(const struct sched *sched, double balance)
{
    return most(least(balance, sched->options.max_stall), -4 * sched->options.max_stall);
}

void sched_done(struct sched *sched, double seconds)
{
    struct sched_speed *speed = &sched->speed;
    const uint32_t decodes = sched->step_decodes, rows = sched->step_rows;
    double decoding = seconds, bulk = 0, other = 0;
    if (rows) {
        decoding = least(least_decode(speed, decodes), seconds);
        learn_prefill(speed, rows, seconds - decoding);
    } else if (decodes) {
        learn(&speed->decode[decodes], seconds);
    }
    for (uint32_t i = 0; i < sched->pick_count; i++) {
        const struct sched_pick *pick = &sched->picks[i];
        const double took = (pick->decodes ? decoding * pick->decodes / decodes : 0) +
                            (pick->rows ? (seconds - decoding) * pick->rows / rows : 0);
        struct sched_share *share = pick->entry->share;
        share->total += took;
        share->used += took / share->weight;
        share->balance = bounded(sched, share->balance + (pick->entry->bulk ? -took : took));
        *(pick->entry->bulk ? &bulk : &other) += took;
    }
    sched->bulk_credit = bounded(sched, sched->bulk_credit + other * sched->bulk_part -
                                            (sched->bulk_part > 0 ? bulk : 0));
    raise_level(sched);
}

/* ---- the gate ---- */

void sched_gate_init(struct sched_gate *gate, uint64_t request_max, uint64_t token_max,
                     uint64_t running_max)
{
    *gate = (struct sched_gate){
        .request_max = request_max, .token_max = token_max, .running_max = running_max};
}

bool sched_gate_enter(struct sched_gate *gate, uint64_t tokens, double now, double *retry_s)
{
    const uint64_t places =
        gate->running < gate->running_max ? gate->running_max - gate->running : 0;
    const bool full = gate->requests >= gate->request_max + places;
    const bool heavy = gate->token_max && gate->requests && gate->tokens + tokens > gate->token_max;
    if (!full && !heavy) {
        gate->requests++;
        gate->tokens += tokens;
        return true;
    }
    gate->refused_requests += full;
    gate->refused_tokens += !full;
    /* When nothing has started for long, what was measured before is no longer true: some have
     * waited since then, or all places have been taken. */
    double each = gate->start_s > 0 ? gate->start_s : NO_RATE_S;
    if (gate->backlogged || !places)
        each = most(each, now - gate->last_start);
    double starts = 1;
    if (heavy && gate->start_tokens > 0)
        starts =
            most(starts, (double)(gate->tokens + tokens - gate->token_max) / gate->start_tokens);
    gate->promised =
        least(most(gate->promised, now) + each, now + each * (double)(gate->requests + 1));
    *retry_s = least(most(each * starts, gate->promised - now), RETRY_MAX_S);
    return false;
}

void sched_gate_start(struct sched_gate *gate, uint64_t tokens, double now)
{
    ASSERT(gate->requests && gate->tokens >= tokens);
    gate->requests--;
    gate->tokens -= tokens;
    gate->running++;
    if (gate->backlogged) {
        const double part = gate->start_s > 0 ? 0.1 : 1;
        gate->start_s += part * (now - gate->last_start - gate->start_s);
        gate->start_tokens += part * ((double)tokens - gate->start_tokens);
    }
    gate->backlogged = gate->requests > 0;
    gate->last_start = now;
}

void sched_gate_leave(struct sched_gate *gate, uint64_t tokens)
{
    ASSERT(gate->requests && gate->tokens >= tokens);
    gate->requests--;
    gate->tokens -= tokens;
}

void sched_gate_end(struct sched_gate *gate)
{
    ASSERT(gate->running);
    gate->running--;
}
