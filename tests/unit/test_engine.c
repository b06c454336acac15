/* What the engine promises beyond right numbers: a sequence computes the same bits whatever runs
 * beside it, after a snapshot, in a fork, and with fewer pages than its past has; a full queue
 * changes nothing. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/bf16.h"
#include "engine/engine_private.h"
#include "engine/packed.h"
#include "engine/session.h"
#include "server/sched.h"
#include "tests/lib/chunk_ram.h"
#include "tests/lib/noise_io.h"

#define MODEL "tests/golden/wide-stickbreaking-topk8"
#define LENGTH 2500 /* 156 chunks, over the 110 pages of the smallest budget */

struct bed {
    struct chunk_ram ram;
    struct engine *engine;
    int32_t tokens[LENGTH];
    size_t vocab;
};

static void open_bed_of(struct bed *bed, size_t pages, enum engine_backend backend,
                        bool states_bf16)
{
    memset(bed, 0, sizeof *bed);
    chunk_ram_init(&bed->ram);
    struct engine_options options = {.model_path = MODEL,
                                     .backend = backend,
                                     .states_bf16 = states_bf16,
                                     .threads = 2,
                                     .host_memory_bytes = (size_t)64 << 20,
                                     .io = chunk_ram_io(&bed->ram)};
    struct error err = {0};
    if (engine_open(&options, &bed->engine, &err))
        fail_msg("%s", err.message);
    if (pages) { /* the least that a step may need, found from the refusal of less */
        options.host_memory_bytes = pages * engine_get_info(bed->engine)->kv_bytes;
        engine_close(bed->engine);
        if (engine_open(&options, &bed->engine, &err))
            fail_msg("%s", err.message);
    }
    chunk_ram_attach(&bed->ram, bed->engine);
    bed->vocab = engine_get_info(bed->engine)->config->vocab_size;
    uint64_t seed = 7;
    for (size_t i = 0; i < LENGTH; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        bed->tokens[i] = (int32_t)((seed >> 33) % bed->vocab);
    }
}

static void open_bed(struct bed *bed, size_t pages, enum engine_backend backend)
{
    open_bed_of(bed, pages, backend, false);
}

static void close_bed(struct bed *bed)
{
    engine_close(bed->engine);
    chunk_ram_close(&bed->ram);
}

static struct engine_session *open_session(struct bed *bed, uint64_t branch)
{
    const struct chunk_range range = {.branch = branch};
    struct engine_session *session;
    struct error err = {0};
    if (engine_session_create(bed->engine, &range, 1, NULL, 0, &session, &err))
        fail_msg("%s", err.message);
    return session;
}

/* Carries the session to `end` in slices of `slice`, ending at multiples of it. */
static void feed(struct bed *bed, struct engine_session *session, size_t end, size_t slice)
{
    while (engine_session_position(session) < end) {
        const size_t at = (size_t)engine_session_position(session);
        size_t n = slice - at % slice;
        n = n < end - at ? n : end - at;
        struct engine_step_item item = {.session = session,
                                        .tokens = bed->tokens + at,
                                        .token_count = (uint32_t)n,
                                        .want_logits = true};
        assert_int_equal(engine_step(bed->engine, &item, 1), STATUS_OK);
        assert_int_equal(item.status, STATUS_OK);
        chunk_ram_acknowledge(&bed->ram, bed->engine);
    }
}

static void same_logits(struct bed *bed, const struct engine_session *a,
                        const struct engine_session *b)
{
    assert_memory_equal(a->logits, b->logits, bed->vocab * sizeof *a->logits);
}

static void neighbours_change_nothing(void **state)
{
    (void)state;
    struct bed bed;
    open_bed(&bed, 0, ENGINE_BACKEND_CPU);
    struct engine_session *alone = open_session(&bed, 1), *beside = open_session(&bed, 2);
    feed(&bed, alone, 500, 256);
    feed(&bed, beside, 500, 256);
    struct engine_session *others[9];
    for (size_t i = 0; i < 9; i++) {
        others[i] = open_session(&bed, 10 + i);
        feed(&bed, others[i], 40 * i, 100);
    }
    for (size_t at = 500; at < 600; at++) {
        feed(&bed, alone, at + 1, 256);
        struct engine_step_item items[10] = {0};
        size_t count = 0;
        for (size_t i = 0; i < 9; i++) {
            const size_t from = (size_t)engine_session_position(others[i]);
            const uint32_t n = i == 4 ? 12 : (uint32_t)(1 + i % 3);
            if (i == at % 9 && count == i)
                items[count++] = (struct engine_step_item){.session = beside,
                                                           .tokens = bed.tokens + at,
                                                           .token_count = 1,
                                                           .want_logits = true};
            if (from + n <= LENGTH)
                items[count++] = (struct engine_step_item){
                    .session = others[i], .tokens = bed.tokens + from, .token_count = n};
        }
        if (engine_session_position(beside) == at) {
            bool listed = false;
            for (size_t i = 0; i < count; i++)
                listed |= items[i].session == beside;
            if (!listed)
                items[count++] = (struct engine_step_item){.session = beside,
                                                           .tokens = bed.tokens + at,
                                                           .token_count = 1,
                                                           .want_logits = true};
        }
        assert_int_equal(engine_step(bed.engine, items, count), STATUS_OK);
        for (size_t i = 0; i < count; i++)
            assert_int_equal(items[i].status, STATUS_OK);
        chunk_ram_acknowledge(&bed.ram, bed.engine);
        same_logits(&bed, alone, beside);
    }
    engine_session_destroy(alone);
    engine_session_destroy(beside);
    for (size_t i = 0; i < 9; i++)
        engine_session_destroy(others[i]);
    close_bed(&bed);
}

static void a_snapshot_brings_everything_back(void **state)
{
    (void)state;
    struct bed bed;
    open_bed(&bed, 0, ENGINE_BACKEND_CPU);
    struct engine_session *whole = open_session(&bed, 1), *kept = open_session(&bed, 2);
    feed(&bed, whole, LENGTH, 256);
    static const size_t stops[] = {3, 16, 300, 512, 777, LENGTH};
    for (size_t i = 0; i < sizeof stops / sizeof *stops; i++) {
        /* Whatever the stop, slices end where the uninterrupted run's did only at multiples; a
         * stop between them is its own slice in both. */
        feed(&bed, kept, stops[i], 256);
        const size_t size = engine_session_snapshot_bytes(kept);
        void *snapshot = malloc(size);
        engine_session_snapshot(kept, snapshot);
        struct engine_session *again;
        const struct chunk_range range = {.branch = 2};
        struct error err = {0};
        engine_session_forget(kept, 0);
        assert_int_equal(engine_session_create(bed.engine, &range, 1, snapshot, size, &again, &err),
                         STATUS_OK);
        assert_int_equal(engine_session_position(again), stops[i]);
        same_logits(&bed, kept, again);
        char *copy = malloc(size);
        engine_session_snapshot(again, copy);
        assert_memory_equal(copy, snapshot, size);
        /* A damaged or foreign one is refused. */
        assert_int_equal(
            engine_session_create(bed.engine, &range, 1, snapshot, size - 1, &again, &err) != 0, 1);
        copy[8] ^= 1; /* the fingerprint */
        struct engine_session *none;
        assert_int_equal(engine_session_create(bed.engine, &range, 1, copy, size, &none, &err),
                         STATUS_MISMATCH);
        engine_session_destroy(kept);
        kept = again;
        free(copy);
        free(snapshot);
    }
    struct engine_session *cut = open_session(&bed, 3);
    for (size_t i = 0; i < sizeof stops / sizeof *stops; i++)
        feed(&bed, cut, stops[i], 256);
    same_logits(&bed, cut, kept);
    engine_session_destroy(whole);
    engine_session_destroy(kept);
    engine_session_destroy(cut);
    close_bed(&bed);
}

/* A session whose state is rounded now and then, and one that is made anew of its small snapshot
 * each time, compute the same bits; without a rounding they are others, but near. */
static void a_rounded_session_goes_on_as_its_snapshot(void **state)
{
    (void)state;
    struct bed bed;
    struct error err = {0};
    open_bed(&bed, 0, ENGINE_BACKEND_CPU);
    struct engine_session *whole = open_session(&bed, 1), *kept = open_session(&bed, 2);
    struct engine_session *exact = open_session(&bed, 3), *again, *fork;
    static const size_t stops[] = {3, 64, 300, 512, 777, 1101};
    for (size_t i = 0; i < sizeof stops / sizeof *stops; i++) {
        feed(&bed, whole, stops[i], 256);
        feed(&bed, kept, stops[i], 256);
        feed(&bed, exact, stops[i], 256);
        const size_t full = engine_session_snapshot_bytes(kept);
        assert_false(engine_session_is_rounded(kept));
        engine_session_round(whole);
        engine_session_round(kept);
        assert_true(engine_session_is_rounded(kept));
        const size_t size = engine_session_snapshot_bytes(kept);
        const size_t floats = bed.engine->state_numbers;
        assert_int_equal(full - size, floats * 4 - packed_bytes(floats));
        assert_true(packed_bytes(floats) * 2 < floats * 4);
        char *snapshot = malloc(size), *copy = malloc(size);
        assert_true(snapshot && copy);
        engine_session_snapshot(kept, snapshot);
        const struct chunk_range range = {.branch = 2};
        assert_int_equal(engine_session_create(bed.engine, &range, 1, snapshot, size, &again, &err),
                         STATUS_OK);
        assert_true(engine_session_is_rounded(again));
        engine_session_round(again); /* it is */
        engine_session_snapshot(again, copy);
        assert_memory_equal(copy, snapshot, size);
        assert_int_equal(engine_session_fork(kept, 9, &fork), STATUS_OK);
        engine_session_snapshot(fork, copy);
        assert_memory_equal(copy, snapshot, size);
        engine_session_destroy(fork);
        engine_session_snapshot(whole, copy); /* another one's comes between */
        engine_session_snapshot(kept, copy);
        assert_memory_equal(copy, snapshot, size);
        assert_int_equal(
            engine_session_create(bed.engine, &range, 1, snapshot, size - 1, &fork, &err),
            STATUS_CORRUPT);
        engine_session_destroy(kept);
        kept = again;
        free(snapshot);
        free(copy);
    }
    feed(&bed, whole, LENGTH, 256);
    feed(&bed, kept, LENGTH, 256);
    feed(&bed, exact, LENGTH, 256);
    same_logits(&bed, whole, kept);
    /* Six roundings by 2^-14 of the largest, most of them long forgotten. */
    const float *a = kept->logits, *b = exact->logits;
    float largest = 0, error = 0;
    for (size_t i = 0; i < bed.vocab; i++) {
        largest = fmaxf(largest, fabsf(b[i]));
        error = fmaxf(error, fabsf(a[i] - b[i]));
    }
    assert_true(error > 0 && error <= 6 * largest / (1 << 14));
    engine_session_destroy(whole);
    engine_session_destroy(kept);
    engine_session_destroy(exact);
    close_bed(&bed);
}

static void *snapshot_of(const struct engine_session *session, size_t *size)
{
    *size = engine_session_snapshot_bytes(session);
    void *snapshot = malloc(*size);
    assert_non_null(snapshot);
    engine_session_snapshot(session, snapshot);
    return snapshot;
}

static struct engine_session *restored(struct bed *bed, const void *snapshot, size_t size)
{
    const struct chunk_range range = {.branch = 2};
    struct engine_session *session;
    struct error err = {0};
    if (engine_session_create(bed->engine, &range, 1, snapshot, size, &session, &err))
        fail_msg("%s", err.message);
    return session;
}

/* With states in bf16 a session and one that is made anew of its snapshot each time compute the
 * same bits, be the turn's state rounded or not: a snapshot holds the state as it is. */
static void states_in_bf16_go_on_as_their_snapshots(void **state)
{
    (void)state;
    struct bed bed;
    struct engine_session *fork;
    open_bed_of(&bed, 0, ENGINE_BACKEND_CPU, true);
    struct engine_session *whole = open_session(&bed, 1), *kept = open_session(&bed, 2);
    static const size_t stops[] = {3, 64, 300, 512, 777, 1101};
    for (size_t i = 0; i < sizeof stops / sizeof *stops; i++) {
        size_t size, again;
        feed(&bed, whole, stops[i], 256);
        feed(&bed, kept, stops[i], 256);
        void *before = snapshot_of(kept, &size);
        engine_session_round(kept);
        assert_true(engine_session_is_rounded(kept));
        void *after = snapshot_of(kept, &again);
        assert_int_equal(again, size);
        assert_memory_equal(after, before, size);
        free(after);
        assert_int_equal(engine_session_fork(kept, 9, &fork), STATUS_OK);
        engine_session_destroy(kept);
        kept = restored(&bed, before, size);
        struct engine_session *const copies[] = {kept, fork};
        for (size_t j = 0; j < 2; j++) {
            after = snapshot_of(copies[j], &again);
            assert_int_equal(again, size);
            assert_memory_equal(after, before, size);
            free(after);
        }
        engine_session_destroy(fork);
        free(before);
    }
    feed(&bed, whole, LENGTH, 256);
    feed(&bed, kept, LENGTH, 256);
    same_logits(&bed, whole, kept);
    engine_session_destroy(whole);
    engine_session_destroy(kept);
    close_bed(&bed);
}

/* What `number` of `layer` says in a session's state. */
static float state_number(const struct engine_session *session, size_t layer, size_t number)
{
    const void *ssm = session->layers[layer].ssm;
    return session->engine->states_bf16 ? bf16_to_float(((const uint16_t *)ssm)[number])
                                        : ((const float *)ssm)[number];
}

/* A snapshot of an engine whose states are of the other type: each number is what it was, or that
 * rounded to bf16; and the session goes on. */
static void snapshots_cross_types_of_states(void **state)
{
    (void)state;
    for (int way = 0; way < 3; way++) { /* in full, packed, bf16 */
        struct bed from, to;
        size_t size;
        open_bed_of(&from, 0, ENGINE_BACKEND_CPU, way == 2);
        open_bed_of(&to, 0, ENGINE_BACKEND_CPU, way != 2);
        struct engine_session *given = open_session(&from, 1);
        feed(&from, given, 13, 256); /* no chunk is complete that the other would have to read */
        if (way)
            engine_session_round(given);
        void *snapshot = snapshot_of(given, &size);
        struct engine_session *taken = restored(&to, snapshot, size);
        assert_int_equal(engine_session_position(taken), 13);
        const struct model_config *c = &from.engine->config;
        const size_t conv = engine_conv_numbers(from.engine) * sizeof(float);
        for (size_t layer = 0; layer < c->mamba_count; layer++) {
            for (size_t i = 0; i < engine_ssm_numbers(from.engine); i++) {
                const float want = bf16_to_float(bf16_from_float(state_number(given, layer, i)));
                assert_memory_equal(&want, &(float){state_number(taken, layer, i)}, sizeof want);
            }
            assert_memory_equal(given->layers[layer].conv, taken->layers[layer].conv, conv);
        }
        same_logits(&from, given, taken);
        feed(&to, taken, 60, 256);
        free(snapshot);
        engine_session_destroy(given);
        engine_session_destroy(taken);
        close_bed(&from);
        close_bed(&to);
    }
}

/* A slice may be cut by what time there is, and nothing comes out different. */
static void cuts_change_nothing(void **state)
{
    (void)state;
    struct bed bed;
    open_bed(&bed, 0, ENGINE_BACKEND_CPU);
    struct engine_session *whole = open_session(&bed, 1), *cut = open_session(&bed, 2);
    static const size_t stops[] = {3, 70, 139, 512, 591, 1100, 1109, LENGTH};
    uint32_t want = 0, cuts = 0;
    for (size_t i = 0; i < sizeof stops / sizeof *stops; i++) {
        feed(&bed, whole, stops[i], 256);
        for (size_t at; (at = (size_t)engine_session_position(cut)) < stops[i]; cuts++) {
            const size_t border = 256 - at % 256, left = stops[i] - at;
            struct engine_step_item item = {
                .session = cut,
                .tokens = bed.tokens + at,
                .token_count =
                    sched_cut(1 + (want += 61) % 200, (uint32_t)(left < border ? left : border)),
                .want_logits = true};
            assert_int_equal(engine_step(bed.engine, &item, 1), STATUS_OK);
            chunk_ram_acknowledge(&bed.ram, bed.engine);
        }
        same_logits(&bed, whole, cut);
    }
    assert_true(cuts > 20); /* not just whole slices */
    engine_session_destroy(whole);
    engine_session_destroy(cut);
    close_bed(&bed);
}

static void a_fork_goes_its_own_way(void **state)
{
    (void)state;
    struct bed bed;
    open_bed(&bed, 0, ENGINE_BACKEND_CPU);
    struct engine_session *trunk = open_session(&bed, 1), *fork, *straight;
    feed(&bed, trunk, 333, 256);
    assert_int_equal(engine_session_fork(trunk, 5, &fork), STATUS_OK);
    same_logits(&bed, trunk, fork);
    /* The trunk goes on with other tokens; the fork must not see them. */
    for (size_t i = 0; i < 200; i++) {
        const int32_t other = (bed.tokens[333 + i] + 1) % (int32_t)bed.vocab;
        struct engine_step_item item = {.session = trunk, .tokens = &other, .token_count = 1};
        assert_int_equal(engine_step(bed.engine, &item, 1), STATUS_OK);
        chunk_ram_acknowledge(&bed.ram, bed.engine);
    }
    feed(&bed, fork, LENGTH, 256);
    straight = open_session(&bed, 9);
    feed(&bed, straight, 333, 256);
    feed(&bed, straight, LENGTH, 256);
    same_logits(&bed, straight, fork);
    engine_session_destroy(trunk);
    engine_session_destroy(fork);
    engine_session_destroy(straight);
    close_bed(&bed);
}

/* Pages of the branch that are in memory. */
static size_t pages_of(const struct bed *bed, uint64_t branch)
{
    const struct memory *memory = &bed->engine->memory;
    size_t count = 0;
    for (size_t i = 0; i <= memory->table_mask; i++)
        for (const struct memory_page *page = memory->table[i]; page; page = page->next)
            count += page->key.branch == branch;
    return count;
}

static void a_fork_forgets_its_own_pages_alone(void **state)
{
    (void)state;
    struct bed bed;
    open_bed(&bed, 0, ENGINE_BACKEND_CPU);
    struct engine_session *trunk = open_session(&bed, 1), *fork, *straight;
    feed(&bed, trunk, 333, 256);
    assert_int_equal(engine_session_fork(trunk, 5, &fork), STATUS_OK);
    feed(&bed, fork, 433, 256);
    assert_int_equal(pages_of(&bed, 1), 20);
    assert_int_equal(pages_of(&bed, 5), 7); /* chunks 20 to 26 */
    engine_session_forget(fork, 25);
    assert_int_equal(pages_of(&bed, 5), 5);
    engine_session_forget(fork, 0);
    assert_int_equal(pages_of(&bed, 5), 0);
    assert_int_equal(pages_of(&bed, 1), 20);
    /* They come back from the disk. */
    feed(&bed, fork, 800, 256);
    assert_true(bed.ram.reads > 0);
    straight = open_session(&bed, 9);
    feed(&bed, straight, 333, 256);
    feed(&bed, straight, 433, 256);
    feed(&bed, straight, 800, 256);
    same_logits(&bed, straight, fork);
    /* One that waits for the disk goes, too, and its answer finds nothing. */
    const size_t pages = pages_of(&bed, 5);
    struct engine_step_item item = {.session = fork, .tokens = bed.tokens + 800, .token_count = 32};
    assert_int_equal(engine_step(bed.engine, &item, 1), STATUS_OK);
    assert_int_equal(pages_of(&bed, 5), pages + 2);
    assert_int_equal(bed.engine->memory.pinned, 2);
    engine_session_forget(fork, 50);
    assert_int_equal(pages_of(&bed, 5), pages);
    assert_int_equal(bed.engine->memory.pinned, 0);
    chunk_ram_acknowledge(&bed.ram, bed.engine);
    assert_int_equal(bed.engine->memory.pinned, 0);
    engine_session_destroy(trunk);
    engine_session_destroy(fork);
    engine_session_destroy(straight);
    close_bed(&bed);
}

static void few_pages_give_the_same_output(void **state)
{
    (void)state;
    struct bed roomy, tight;
    open_bed(&roomy, 0, ENGINE_BACKEND_CPU);
    open_bed(&tight, 110, ENGINE_BACKEND_CPU);
    struct engine_session *a = open_session(&roomy, 1), *b = open_session(&tight, 1);
    feed(&roomy, a, LENGTH, 256);
    feed(&tight, b, LENGTH, 256);
    same_logits(&roomy, a, b);
    struct engine_stats stats;
    engine_get_stats(tight.engine, &stats);
    assert_true(stats.page_misses > 0 && stats.page_evictions > 0);
    assert_true(tight.ram.calls < tight.ram.reads); /* read in batches */
    engine_session_destroy(a);
    engine_session_destroy(b);
    close_bed(&roomy);
    close_bed(&tight);
}

static void a_full_queue_changes_nothing(void **state)
{
    (void)state;
    struct bed bed;
    open_bed(&bed, 0, ENGINE_BACKEND_CPU);
    struct engine_session *a = open_session(&bed, 1), *b = open_session(&bed, 2);
    feed(&bed, a, 500, 256);
    feed(&bed, a, 600, 256);
    feed(&bed, b, 500, 256);
    bed.ram.room = 2; /* of the seven chunks that the next hundred tokens complete */
    struct engine_step_item item = {
        .session = b, .tokens = bed.tokens + 500, .token_count = 100, .want_logits = true};
    assert_int_equal(engine_step(bed.engine, &item, 1), STATUS_OK);
    assert_int_equal(item.status, STATUS_BUSY);
    assert_int_equal(engine_session_position(b), 500);
    bed.ram.room = SIZE_MAX;
    feed(&bed, b, 600, 256);
    same_logits(&bed, a, b);
    engine_session_destroy(a);
    engine_session_destroy(b);
    close_bed(&bed);
}

/* More sequences in a step than scratch memory is made for: those whose chunks find no room wait,
 * and go on as if they had not; more tokens than fit are refused. */
static void chunks_of_many_at_once_wait(void **state)
{
    (void)state;
    enum { MANY = 80 };
    struct bed bed;
    open_bed(&bed, 0, ENGINE_BACKEND_CPU);
    const struct engine_info *info = engine_get_info(bed.engine);
    const uint32_t chunk = info->config->chunk_tokens;
    const size_t rows = info->slice_tokens + info->running_max,
                 room = rows / chunk + info->running_max + 1;
    struct engine_session *sessions[MANY], *alone = open_session(&bed, 1 + MANY);
    struct engine_step_item items[MANY];
    assert_in_range(room, 1, MANY - 1);
    for (uint32_t i = 0; i < MANY; i++) {
        sessions[i] = open_session(&bed, 1 + i);
        feed(&bed, sessions[i], chunk - 1, chunk);
        items[i] = (struct engine_step_item){.session = sessions[i],
                                             .tokens = bed.tokens + chunk - 1,
                                             .token_count = 1,
                                             .want_logits = true};
    }
    assert_int_equal(engine_step(bed.engine, items, MANY), STATUS_OK);
    for (uint32_t i = 0; i < MANY; i++)
        assert_int_equal(items[i].status, i < room ? STATUS_OK : STATUS_BUSY);
    chunk_ram_acknowledge(&bed.ram, bed.engine);
    assert_int_equal(engine_step(bed.engine, items + room, MANY - room), STATUS_OK);
    chunk_ram_acknowledge(&bed.ram, bed.engine);
    feed(&bed, alone, chunk - 1, chunk);
    feed(&bed, alone, chunk, chunk);
    for (uint32_t i = 0; i < MANY; i++)
        same_logits(&bed, alone, sessions[i]);
    for (uint32_t i = 0; i < 2; i++)
        items[i].token_count = (uint32_t)(rows / 2 + 1);
    assert_int_equal(engine_step(bed.engine, items, 2), STATUS_INVALID);
    for (uint32_t i = 0; i < MANY; i++) {
        assert_int_equal(engine_session_position(sessions[i]), chunk);
        engine_session_destroy(sessions[i]);
    }
    engine_session_destroy(alone);
    close_bed(&bed);
}

static void a_lost_chunk_fails_its_memory_alone(void **state)
{
    (void)state;
    struct bed bed;
    open_bed(&bed, 110, ENGINE_BACKEND_CPU);
    struct engine_session *good = open_session(&bed, 1), *bad = open_session(&bed, 2);
    feed(&bed, good, 800, 256);
    feed(&bed, bad, 800, 256);
    for (size_t i = 0; i < bed.ram.count; i++)
        if (bed.ram.items[i].key.branch == 2)
            bed.ram.items[i].key.branch = 77; /* gone */
    engine_session_forget(bad, 0);
    struct engine_step_item items[] = {
        {.session = bad, .tokens = bed.tokens + 800, .token_count = 1, .want_logits = true},
        {.session = good, .tokens = bed.tokens + 800, .token_count = 1, .want_logits = true}};
    assert_int_equal(engine_step(bed.engine, items, 2), STATUS_OK);
    assert_int_equal(items[0].status, STATUS_CORRUPT);
    assert_int_equal(items[1].status, STATUS_OK);
    struct engine_session *alone = open_session(&bed, 3);
    feed(&bed, alone, 800, 256);
    feed(&bed, alone, 801, 256);
    same_logits(&bed, alone, good);
    engine_session_destroy(good);
    engine_session_destroy(bad);
    engine_session_destroy(alone);
    close_bed(&bed);
}

/* Allocations that lie side by side, as a GPU's do, whose copies must stay within one. */
static struct {
    const struct ops *ops; /* the real ones */
    char *memory, *ends[64];
    size_t used, count, copies;
} arena;

#define ARENA_BYTES ((size_t)64 << 20)

static void *arena_alloc(struct ops_context *context, size_t bytes)
{
    (void)context;
    char *const to = arena.memory + arena.used;
    arena.used += (bytes + 63) / 64 * 64;
    assert_true(arena.used <= ARENA_BYTES && arena.count < sizeof arena.ends / sizeof *arena.ends);
    arena.ends[arena.count++] = to + bytes;
    return to;
}

static bool in_arena(const void *memory)
{
    return (const char *)memory >= arena.memory && (const char *)memory < arena.memory + arena.used;
}

static void arena_release(struct ops_context *context, void *memory)
{
    if (!in_arena(memory))
        arena.ops->release(context, memory);
}

static void within_one(const char *memory, size_t bytes)
{
    size_t i = 0;
    if (!bytes || !in_arena(memory))
        return;
    while (arena.ends[i] <= memory)
        i++;
    assert_true(memory + bytes <= arena.ends[i]);
    arena.copies++;
}

static void arena_copy(struct ops_context *context, void *to, const void *from, size_t bytes)
{
    within_one(to, bytes);
    within_one(from, bytes);
    arena.ops->copy(context, to, from, bytes);
}

/* A slice whose chunks go on from the last block of one allocation into the next one. */
static void copies_stay_within_an_allocation(void **state)
{
    (void)state;
    struct noise_io past;
    struct engine *engine;
    struct engine_session *session;
    struct error err = {0};
    noise_io_init(&past);
    const struct engine_options options = {.model_path = MODEL,
                                           .backend = ENGINE_BACKEND_CPU,
                                           .threads = 1,
                                           .host_memory_bytes = (size_t)64 << 20,
                                           .io = noise_io(&past)};
    if (engine_open(&options, &engine, &err))
        fail_msg("%s", err.message);
    noise_io_attach(&past, engine);
    arena.ops = engine->ops;
    arena.memory = aligned_alloc(64, ARENA_BYTES);
    assert_non_null(arena.memory);
    struct ops table = *engine->ops;
    table.alloc = arena_alloc;
    table.release = arena_release;
    table.copy = arena_copy;
    engine->ops = engine->memory.ops = &table;
    const uint32_t s = engine_get_info(engine)->config->chunk_tokens;
    const uint64_t chunks = (uint64_t)OPS_LANDMARK_BLOCK * MEMORY_SLAB_BLOCKS;
    if (noise_io_session(engine, 1, (chunks - 1) * s, &session, &err))
        fail_msg("%s", err.message);
    int32_t tokens[100] = {0};
    struct engine_step_item item = {.session = session, .tokens = tokens, .token_count = 100};
    arena.copies = 0;
    assert_int_equal(engine_step(engine, &item, 1), STATUS_OK);
    assert_int_equal(item.status, STATUS_OK);
    assert_true(arena.copies > 0);
    const struct memory_landmarks *last = session->blocks[MEMORY_SLAB_BLOCKS - 1];
    assert_ptr_not_equal(last->slab, session->blocks[MEMORY_SLAB_BLOCKS]->slab);
    assert_ptr_equal(session->blocks[MEMORY_SLAB_BLOCKS]->data,
                     (char *)last->data + OPS_LANDMARK_BLOCK * engine->info.landmark_bytes);
    engine_session_destroy(session);
    engine->ops = engine->memory.ops = arena.ops;
    engine_close(engine);
    noise_io_close(&past);
    free(arena.memory);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(neighbours_change_nothing),
        cmocka_unit_test(a_snapshot_brings_everything_back),
        cmocka_unit_test(a_rounded_session_goes_on_as_its_snapshot),
        cmocka_unit_test(states_in_bf16_go_on_as_their_snapshots),
        cmocka_unit_test(snapshots_cross_types_of_states),
        cmocka_unit_test(cuts_change_nothing),
        cmocka_unit_test(a_fork_goes_its_own_way),
        cmocka_unit_test(a_fork_forgets_its_own_pages_alone),
        cmocka_unit_test(few_pages_give_the_same_output),
        cmocka_unit_test(a_full_queue_changes_nothing),
        cmocka_unit_test(chunks_of_many_at_once_wait),
        cmocka_unit_test(a_lost_chunk_fails_its_memory_alone),
        cmocka_unit_test(copies_stay_within_an_allocation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
