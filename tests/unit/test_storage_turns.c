/* The past of memories: turns, forks and rewinds to any of them, what is kept and what is not. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <sys/random.h>
#include <sys/stat.h>

#include <cmocka.h>

#include "proto/base/hash.h"
#include "tests/lib/store_past.h"

#define OLD_STORE "tests/golden/store-format-1"

/* ---- the calls, waited for ---- */

static enum status bookmark(struct storage *storage, const char *id, uint64_t position,
                            const char *name)
{
    struct store_wait wait;
    store_wait_init(&wait);
    return store_wait_finish(
        &wait, storage_turn_bookmark(storage, id, position, name, store_wait_cb, &wait));
}

static enum status delete_turn(struct storage *storage, const char *id, uint64_t position)
{
    struct store_wait wait;
    store_wait_init(&wait);
    return store_wait_finish(&wait,
                             storage_turn_delete(storage, id, position, store_wait_cb, &wait));
}

/* An ephemeral fork "e" of `past` that stands at `at`: from the nearest snapshot, what is missing
 * written again. Returns the tokens that took. */
static uint64_t reach(struct storage *storage, const struct store_past *past, uint64_t at)
{
    assert_int_equal(store_fork_at(storage, "e", at ? past->id : NULL, at, true), STATUS_OK);
    uint64_t position = store_past_get(storage, "e").token_count;
    assert_true(position <= at);
    if (position < at)
        store_past_commit(storage, past, "e", at, false);
    return at - position;
}

static void wait_collected(struct storage *storage)
{
    struct storage_stats stats;
    do
        storage_get_stats(storage, &stats);
    while (stats.branches_to_collect > 0);
}

/* ---- tests ---- */

static void test_history(void **state)
{
    struct storage *storage = store_past_open(*state);
    struct store_past *a = calloc(1, sizeof *a);
    struct storage_turn turns[64];
    strcpy(a->id, "a");
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    assert_int_equal(store_past_turns(storage, "a", turns), 0);
    for (unsigned i = 0; i < 10; i++)
        store_past_write(storage, a, 20, 1, false);
    store_past_write(storage, a, 7, 1, true); /* the tenth turn goes on */
    assert_int_equal(store_past_turns(storage, "a", turns), 10);
    for (unsigned i = 0; i < 10; i++) {
        assert_int_equal(turns[i].position, i ? 200 - 20 * i : 207);
        assert_int_equal(turns[i].has_snapshot, i < STORE_PAST_KEEP);
    }
    /* Page by page it is the same. */
    size_t count;
    bool more;
    assert_int_equal(storage_turn_list(storage, "a", 180, 3, turns, &count, &more), STATUS_OK);
    assert_true(more && count == 3 && turns[0].position == 180 && turns[2].position == 140);
    assert_int_equal(storage_turn_list(storage, "b", 0, 3, turns, &count, &more), STATUS_NOT_FOUND);

    /* A bookmark keeps its snapshot however many turns follow; without it, it goes. */
    assert_int_equal(bookmark(storage, "a", 180, "before the storm"), STATUS_OK);
    assert_int_equal(bookmark(storage, "a", 100, "too late"), STATUS_CONFLICT);
    assert_int_equal(bookmark(storage, "a", 101, "no turn"), STATUS_NOT_FOUND);
    for (unsigned i = 0; i < 5; i++)
        store_past_write(storage, a, 3, 1, false);
    assert_int_equal(store_past_turns(storage, "a", turns), 15);
    assert_int_equal(turns[6].position, 180);
    assert_true(turns[6].has_snapshot && !turns[5].has_snapshot);
    assert_string_equal(turns[6].bookmark, "before the storm");
    assert_int_equal(bookmark(storage, "a", 180, NULL), STATUS_OK);
    assert_int_equal(store_past_turns(storage, "a", turns), 15);
    assert_true(!turns[6].has_snapshot && turns[2].has_snapshot);

    /* Any turn but the last can be forgotten; what it said stays. */
    assert_int_equal(delete_turn(storage, "a", a->count), STATUS_CONFLICT);
    assert_int_equal(delete_turn(storage, "a", a->count - 3), STATUS_OK);
    assert_int_equal(delete_turn(storage, "a", a->count - 3), STATUS_NOT_FOUND);
    assert_int_equal(delete_turn(storage, "a", 60), STATUS_OK);
    assert_int_equal(store_past_turns(storage, "a", turns), 13);
    store_past_assert(storage, a);
    storage_close(storage);
    assert_int_equal(store_past_check(*state).turns, 13);
    free(a);
}

static void test_rewind(void **state)
{
    struct storage *storage = store_past_open(*state);
    struct store_past *a = calloc(1, sizeof *a), *b = calloc(1, sizeof *b);
    struct storage_turn turns[64];
    strcpy(a->id, "a");
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    for (unsigned i = 0; i < 10; i++)
        store_past_write(storage, a, 21, 1, false);
    *b = *a;
    strcpy(b->id, "b");

    /* Behind the end there is nothing to fork. */
    assert_int_equal(store_fork_at(storage, "b", "a", 211, false), STATUS_INVALID);
    /* A retained turn is there at once, a dropped one is written again from nothing. */
    assert_int_equal(reach(storage, a, 189), 0);
    assert_int_equal(store_settle(storage, "e", "a"), STATUS_CONFLICT);
    assert_int_equal(store_replace(storage, "e", "b"), STATUS_NOT_FOUND);
    assert_int_equal(store_settle(storage, "e", "b"), STATUS_OK);
    b->count = 189;
    store_past_assert(storage, b);
    assert_string_equal(store_past_get(storage, "b").parent, "a");
    assert_int_equal(reach(storage, a, 63), 63);
    assert_int_equal(store_replace(storage, "e", "a"), STATUS_OK);
    a->count = 63;
    store_past_assert(storage, a);
    store_past_assert(storage, b);
    assert_int_equal(store_settle(storage, "a", "b"), STATUS_INVALID);
    assert_int_equal(store_settle(storage, "e", "b"), STATUS_NOT_FOUND);
    wait_collected(storage);
    store_past_assert(storage, a);
    store_past_assert(storage, b);
    /* The branch that `a` left belongs to nobody: `b` reaches its turns and may change them. */
    assert_int_equal(store_past_turns(storage, "b", turns), 9);
    assert_int_equal(bookmark(storage, "b", 168, "here"), STATUS_OK);
    assert_int_equal(store_fork_at(storage, "c", "b", 168, false), STATUS_OK);
    assert_int_equal(store_past_get(storage, "c").token_count, 168);
    /* What another memory wrote is not b's to change. */
    assert_int_equal(store_fork_at(storage, "d", "a", 0, false), STATUS_OK);
    assert_int_equal(bookmark(storage, "d", 63, "mine"), STATUS_CONFLICT);

    /* To the beginning, and on along another way. */
    assert_int_equal(reach(storage, a, 0), 0);
    assert_int_equal(store_replace(storage, "e", "a"), STATUS_OK);
    a->count = 0;
    store_past_assert(storage, a);
    store_past_write(storage, a, 50, 2, false);
    store_past_assert(storage, a);
    const char *all[] = {"a", "c", "d"};
    for (size_t i = 0; i < 3; i++)
        assert_int_equal(store_remove(storage, all[i]), STATUS_OK);
    wait_collected(storage);
    store_past_assert(storage, b);
    assert_int_equal(store_remove(storage, "b"), STATUS_OK);
    wait_collected(storage);
    storage_close(storage);
    struct storage_check_report report = store_past_check(*state);
    assert_int_equal(report.branches + report.turns + report.snapshots + report.chunks, 0);
    free(a);
    free(b);
}

/* 1,000 forks take no chunk, no token and no snapshot. */
static void test_many_forks(void **state)
{
    struct storage *storage = store_past_open(*state);
    struct store_past *a = calloc(1, sizeof *a);
    struct storage_stats before, after;
    char id[16];
    strcpy(a->id, "a");
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    for (unsigned i = 0; i < 4; i++)
        store_past_write(storage, a, 1000, 1, false);
    storage_get_stats(storage, &before);
    for (unsigned i = 0; i < 1000; i++) {
        snprintf(id, sizeof id, "f%u", i);
        assert_int_equal(store_fork_at(storage, id, "a", i % 2 ? 3000 : 0, false), STATUS_OK);
    }
    storage_get_stats(storage, &after);
    print_message("1,000 forks: %llu bytes each\n",
                  (unsigned long long)(after.map_used_bytes - before.map_used_bytes) / 1000);
    assert_true(after.map_used_bytes - before.map_used_bytes < 1000 * STORE_PAST_SNAPSHOT / 4);
    strcpy(a->id, "f8");
    store_past_assert(storage, a);
    a->count = 3000;
    strcpy(a->id, "f999");
    store_past_assert(storage, a);
    storage_close(storage);
    struct storage_check_report report = store_past_check(*state);
    assert_int_equal(report.chunks, 500);
    assert_int_equal(report.snapshots, STORE_PAST_KEEP);
    free(a);
}

/* A store of the first format, written by the program of that time: two memories of 100 and, its
 * fork, of 130 tokens. */
static void test_migration(void **state)
{
    char command[1024];
    struct storage_turn turns[4];
    struct storage_check_report report;
    struct error err = {0};
    snprintf(command, sizeof command, "cp %s/data.mdb %s/", OLD_STORE, (const char *)*state);
    assert_int_equal(system(command), 0);
    assert_int_equal(storage_check(*state, NULL, NULL, &report, &err), STATUS_UNSUPPORTED);
    assert_non_null(strstr(err.message, "rambad serve"));
    /* One that cannot say so is left as it is. */
    snprintf(command, sizeof command, "%s/MIGRATED-FROM-1", (const char *)*state);
    assert_int_equal(mkdir(command, 0700), 0);
    struct storage_options options = store_past_options(*state);
    struct storage *storage;
    assert_int_equal(storage_open(&options, &storage, &err), STATUS_IO);
    assert_non_null(strstr(err.message, "it is as it was"));
    assert_int_equal(storage_check(*state, NULL, NULL, &report, &err), STATUS_UNSUPPORTED);
    assert_int_equal(rmdir(command), 0);
    storage = store_past_open(*state);
    char marker[512] = "";
    FILE *file = fopen(command, "re");
    assert_non_null(file);
    assert_true(fread(marker, 1, sizeof marker - 1, file) > 0);
    fclose(file);
    assert_non_null(strstr(marker, "from format 1 to format"));
    struct store_past *a = calloc(1, sizeof *a);
    for (uint64_t i = 0; i < 130; i++)
        a->tokens[i] = store_token(1, i);
    a->is_turn[100] = a->is_turn[130] = true;
    strcpy(a->id, "old");
    a->unmarked = 130;
    a->count = 100;
    store_past_assert(storage, a);
    assert_int_equal(store_past_turns(storage, "old", turns), 1);
    strcpy(a->id, "old fork");
    a->count = 130;
    store_past_assert(storage, a);
    assert_int_equal(store_past_turns(storage, "old fork", turns), 2);
    assert_true(turns[1].position == 100 && turns[1].has_snapshot);
    store_past_write(storage, a, 40, 9, false);
    store_past_assert(storage, a);
    storage_close(storage);
    assert_int_equal(store_past_check(*state).turns, 3);
    free(a);
}

/* ---- anything, in any order ---- */

#define PASTS 6
#define STEPS 1500

static uint64_t draw(uint64_t *random, uint64_t below)
{
    *random = hash64(random, sizeof *random, 99);
    return *random % below;
}

static uint64_t some_turn(const struct store_past *past, uint64_t *random)
{
    uint64_t at = past->count ? draw(random, past->count) + 1 : 0;
    if (draw(random, 3) > 0)
        while (at > 0 && !past->is_turn[at])
            at--;
    return at;
}

/* Forks or rewinds: past `to` becomes past `from` as it was at `at`. */
static void go_to(struct storage *storage, struct store_past *to, const struct store_past *from,
                  uint64_t at)
{
    char id[LIMITS_ID_BYTES];
    reach(storage, from, at);
    strcpy(id, to->id);
    assert_int_equal(to == from ? store_replace(storage, "e", id) : store_settle(storage, "e", id),
                     STATUS_OK);
    if (to != from)
        *to = *from;
    strcpy(to->id, id);
    to->count = at;
    memset(to->is_turn + at + 1, 0, STORE_PAST_TOKENS - (size_t)at);
    to->is_turn[at] = at > 0; /* it may be a new one */
}

static void test_random(void **state)
{
    uint64_t seed, random, id = 0;
    struct store_past *pasts = calloc(PASTS, sizeof *pasts);
    struct storage *storage = store_past_open(*state);
    const char *given = getenv("RAMBAD_SEED");
    if (given)
        seed = strtoull(given, NULL, 10);
    else
        assert_int_equal(getrandom(&seed, sizeof seed, 0), sizeof seed);
    print_message("RAMBAD_SEED=%llu\n", (unsigned long long)seed);
    random = seed;
    for (unsigned step = 0; step < STEPS; step++) {
        struct store_past *p = &pasts[draw(&random, PASTS)], *q = &pasts[draw(&random, PASTS)];
        uint64_t what = draw(&random, 100), at;
        if (!p->id[0]) {
            snprintf(p->id, sizeof p->id, "m%llu", (unsigned long long)id++);
            if (q != p && q->id[0] && what < 80) {
                go_to(storage, p, q, some_turn(q, &random));
            } else {
                char name[LIMITS_ID_BYTES];
                strcpy(name, p->id);
                *p = (struct store_past){0};
                strcpy(p->id, name);
                assert_int_equal(store_create(storage, p->id, NULL), STATUS_OK);
            }
        } else if (what < 45) {
            uint64_t count = 1 + draw(&random, 60);
            if (p->count + count <= STORE_PAST_TOKENS)
                store_past_write(storage, p, count, draw(&random, UINT64_MAX), what < 10);
        } else if (what < 65) {
            go_to(storage, p, p, some_turn(p, &random));
        } else if (what < 75) {
            at = some_turn(p, &random);
            enum status status = bookmark(storage, p->id, at, what < 70 ? "kept" : NULL);
            assert_true(status == STATUS_OK || status == STATUS_CONFLICT ||
                        status == STATUS_NOT_FOUND);
        } else if (what < 83) {
            at = some_turn(p, &random);
            enum status status = delete_turn(storage, p->id, at);
            assert_true(status == STATUS_OK || status == STATUS_CONFLICT ||
                        status == STATUS_NOT_FOUND);
        } else if (what < 88) {
            assert_int_equal(store_remove(storage, p->id), STATUS_OK);
            p->id[0] = 0;
        } else if (what < 91) {
            storage_close(storage);
            store_past_check(*state);
            storage = store_past_open(*state);
        }
        for (unsigned i = 0; i < PASTS; i++)
            if (pasts[i].id[0] && (i == step % PASTS || &pasts[i] == p))
                store_past_assert(storage, &pasts[i]);
    }
    for (unsigned i = 0; i < PASTS; i++) {
        if (!pasts[i].id[0])
            continue;
        store_past_assert(storage, &pasts[i]);
        assert_int_equal(store_remove(storage, pasts[i].id), STATUS_OK);
    }
    wait_collected(storage);
    storage_close(storage);
    struct storage_check_report report = store_past_check(*state);
    assert_int_equal(report.branches + report.turns + report.snapshots + report.chunks, 0);
    free(pasts);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        STORE_TEST(test_history),   STORE_TEST(test_rewind), STORE_TEST(test_many_forks),
        STORE_TEST(test_migration), STORE_TEST(test_random),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
