#include "tests/lib/store_past.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "proto/base/hash.h"

#define KV 600u
#define LANDMARK 40u

struct storage_options store_past_options(const char *path)
{
    return (struct storage_options){.path = path,
                                    .kv_bytes = KV,
                                    .landmark_bytes = LANDMARK,
                                    .chunk_tokens = STORE_PAST_CHUNK,
                                    .model_fingerprint = 7,
                                    .model_name = "m",
                                    .map_bytes = 256 * LIMITS_MIB,
                                    .keep_snapshots = STORE_PAST_KEEP};
}

struct storage *store_past_open(const char *path)
{
    const struct storage_options options = store_past_options(path);
    return store_open(&options);
}

static void print_problem(void *context, const char *message)
{
    (void)context;
    print_message("  problem: %s\n", message);
}

struct storage_check_report store_past_check(const char *path)
{
    struct storage_check_report report;
    struct error err = {0};
    assert_int_equal(storage_check(path, print_problem, NULL, &report, &err), STATUS_OK);
    assert_int_equal(report.problems, 0);
    return report;
}

static uint64_t hash_of(const struct store_past *past, uint64_t from, uint64_t end)
{
    return hash64(past->tokens + from, (size_t)(end - from) * sizeof *past->tokens, from);
}

static void chunk_of(const struct store_past *past, uint64_t index, unsigned char *kv,
                     unsigned char *landmark)
{
    uint64_t hash = hash_of(past, index * STORE_PAST_CHUNK, (index + 1) * STORE_PAST_CHUNK);
    store_fill(kv, KV, hash, index);
    store_fill(landmark, LANDMARK, ~hash, index);
}

struct storage_memory store_past_get(struct storage *storage, const char *id)
{
    struct storage_memory memory;
    assert_int_equal(storage_memory_get(storage, id, &memory), STATUS_OK);
    storage_memory_close(&memory);
    return memory;
}

/* The tokens before `count` as they are committed: some have a mark. */
static void mark_tokens(const struct store_past *past, uint64_t count, int32_t *marked)
{
    for (uint64_t i = 0; i < count; i++)
        marked[i] = past->tokens[i] | (i >= past->unmarked && i % 7 == 3 ? STORAGE_TOKEN_MARK : 0);
}

enum status store_past_try_commit(struct storage *storage, const struct store_past *past,
                                  const char *id, uint64_t position, bool goes_on)
{
    unsigned char kv[KV], landmark[LANDMARK], *snapshot = malloc(STORE_PAST_SNAPSHOT);
    int32_t marked[STORE_PAST_TOKENS];
    struct storage_memory memory = store_past_get(storage, id);
    assert_non_null(snapshot);
    mark_tokens(past, position, marked);
    for (uint64_t i = memory.token_count / STORE_PAST_CHUNK; i < position / STORE_PAST_CHUNK; i++) {
        chunk_of(past, i, kv, landmark);
        assert_int_equal(storage_append(storage, memory.branch, i, kv, landmark, NULL, NULL),
                         STATUS_OK);
    }
    store_fill(snapshot, STORE_PAST_SNAPSHOT, hash_of(past, 0, position), position);
    struct storage_commit commit = {.id = id,
                                    .position = position,
                                    .tokens = marked + memory.token_count,
                                    .token_count = (size_t)(position - memory.token_count),
                                    .text_bytes = position * 3,
                                    .snapshot = snapshot,
                                    .snapshot_bytes = STORE_PAST_SNAPSHOT,
                                    .takes_snapshot = position % 2,
                                    .goes_on = goes_on};
    const enum status status = store_commit(storage, &commit);
    if (!commit.takes_snapshot)
        free(snapshot);
    return status;
}

void store_past_commit(struct storage *storage, const struct store_past *past, const char *id,
                       uint64_t position, bool goes_on)
{
    assert_int_equal(store_past_try_commit(storage, past, id, position, goes_on), STATUS_OK);
}

void store_past_write(struct storage *storage, struct store_past *past, uint64_t count,
                      uint64_t seed, bool goes_on)
{
    for (uint64_t i = 0; i < count; i++)
        past->tokens[past->count + i] = store_token(seed, past->count + i);
    past->count += count;
    past->is_turn[past->count] = true;
    store_past_commit(storage, past, past->id, past->count, goes_on);
}

size_t store_past_turns(struct storage *storage, const char *id, struct storage_turn *turns)
{
    size_t count;
    bool more;
    assert_int_equal(
        storage_turn_list(storage, id, UINT64_MAX, STORE_PAST_TOKENS, turns, &count, &more),
        STATUS_OK);
    assert_false(more);
    return count;
}

void store_past_assert(struct storage *storage, const struct store_past *past)
{
    unsigned char kv[KV], landmark[LANDMARK], want_kv[KV], want_landmark[LANDMARK];
    int32_t tokens[STORE_PAST_TOKENS], marked[STORE_PAST_TOKENS];
    struct storage_memory memory = store_past_get(storage, past->id);
    struct storage_range *ranges;
    size_t range_count;
    assert_int_equal(memory.token_count, past->count);
    assert_int_equal(memory.text_bytes, past->count * 3);
    assert_int_equal(storage_read_tokens(storage, past->id, 0, (size_t)past->count, tokens),
                     STATUS_OK);
    assert_memory_equal(tokens, past->tokens, past->count * sizeof *tokens);
    mark_tokens(past, past->count, marked);
    assert_int_equal(storage_read_marked(storage, past->id, 0, (size_t)past->count, tokens),
                     STATUS_OK);
    assert_memory_equal(tokens, marked, past->count * sizeof *tokens);
    assert_int_equal(storage_lineage(storage, past->id, &ranges, &range_count), STATUS_OK);
    for (uint64_t i = 0; i < past->count / STORE_PAST_CHUNK; i++) {
        size_t r = range_count - 1;
        while (ranges[r].first > i)
            r--;
        struct storage_read read = {.branch = ranges[r].branch, .index = i, .kv = kv};
        assert_int_equal(storage_read_chunks(storage, &read, 1), STATUS_OK);
        assert_int_equal(storage_read_landmarks(storage, ranges[r].branch, i, 1, landmark),
                         STATUS_OK);
        chunk_of(past, i, want_kv, want_landmark);
        assert_memory_equal(kv, want_kv, KV);
        assert_memory_equal(landmark, want_landmark, LANDMARK);
    }
    free(ranges);
    if (past->count == 0)
        return;
    void *snapshot;
    unsigned char want[STORE_PAST_SNAPSHOT];
    size_t size;
    uint64_t position;
    assert_int_equal(storage_snapshot(storage, past->id, &snapshot, &size, &position), STATUS_OK);
    store_fill(want, STORE_PAST_SNAPSHOT, hash_of(past, 0, past->count), past->count);
    assert_int_equal(size, STORE_PAST_SNAPSHOT);
    assert_memory_equal(snapshot, want, STORE_PAST_SNAPSHOT);
    free(snapshot);
    struct storage_turn *turns = calloc(STORE_PAST_TOKENS, sizeof *turns);
    size_t count = store_past_turns(storage, past->id, turns);
    for (size_t i = 0; i < count; i++) {
        assert_true(i == 0 || turns[i].position < turns[i - 1].position);
        assert_true(turns[i].position <= past->count);
        assert_true(past->is_turn[turns[i].position]);
        assert_int_equal(turns[i].text_bytes, turns[i].position * 3);
    }
    free(turns);
}
