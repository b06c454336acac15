#include "tests/lib/store_tree.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <unistd.h>

#include <cmocka.h>

#define S STORE_TREE_CHUNK
#define KV STORE_TREE_KV
#define LANDMARK STORE_TREE_LANDMARK

struct storage_options store_tree_options(const char *path)
{
    return (struct storage_options){.path = path,
                                    .kv_bytes = KV,
                                    .landmark_bytes = LANDMARK,
                                    .chunk_tokens = S,
                                    .model_fingerprint = STORE_TREE_FINGERPRINT,
                                    .model_name = "test-model",
                                    .map_bytes = 256 * LIMITS_MIB,
                                    .linger_ms = 1};
}

struct storage *store_tree_open(const char *path)
{
    const struct storage_options options = store_tree_options(path);
    return store_open(&options);
}

uint64_t store_tree_branch(struct storage *storage, const char *id)
{
    return store_past_get(storage, id).branch;
}

enum status store_tree_append(struct storage *storage, uint64_t branch, uint64_t from, uint64_t end)
{
    unsigned char kv[KV], landmark[LANDMARK];
    enum status status = STATUS_OK;
    struct store_wait *waits = calloc((size_t)(end - from) + 1, sizeof *waits);
    size_t n = 0;
    for (uint64_t i = from; i < end; i++, n++) {
        store_fill(kv, sizeof kv, branch, i);
        store_fill(landmark, sizeof landmark, ~branch, i);
        store_wait_init(&waits[n]);
        assert_int_equal(storage_append(storage, branch, i, kv, landmark, store_wait_cb, &waits[n]),
                         STATUS_OK);
    }
    for (size_t i = 0; i < n; i++) {
        enum status one = store_wait_finish(&waits[i], STATUS_OK);
        status = status ? status : one;
    }
    free(waits);
    return status;
}

enum status store_tree_commit(struct storage *storage, const char *id, uint64_t position)
{
    struct storage_memory memory = store_past_get(storage, id);
    size_t count = (size_t)(position - memory.token_count);
    int32_t *tokens = calloc(count + 1, sizeof *tokens);
    unsigned char snapshot[5000];
    for (size_t i = 0; i < count; i++)
        tokens[i] = store_token(memory.branch, memory.token_count + i);
    store_fill(snapshot, sizeof snapshot, memory.branch, position);
    struct storage_commit commit = {.id = id,
                                    .position = position,
                                    .tokens = tokens,
                                    .token_count = count,
                                    .text_bytes = position * 3,
                                    .snapshot = snapshot,
                                    .snapshot_bytes = sizeof snapshot};
    enum status status = store_commit(storage, &commit);
    free(tokens);
    return status;
}

void store_tree_write(struct storage *storage, const char *id, uint64_t position)
{
    struct storage_memory memory = store_past_get(storage, id);
    assert_int_equal(
        store_tree_append(storage, memory.branch, memory.token_count / S, position / S), STATUS_OK);
    assert_int_equal(store_tree_commit(storage, id, position), STATUS_OK);
}

void store_tree_assert(struct storage *storage, const char *id,
                       const struct store_segment *segments, size_t count)
{
    const struct storage_memory memory = store_past_get(storage, id);
    uint64_t position = segments[count - 1].end;
    assert_int_equal(memory.token_count, position);
    assert_int_equal(memory.chunk_count, position / S);
    assert_int_equal(memory.text_bytes, position * 3);
    int32_t *tokens = calloc((size_t)position + 1, sizeof *tokens);
    assert_int_equal(storage_read_tokens(storage, id, 0, (size_t)position, tokens), STATUS_OK);
    for (uint64_t p = 0, s = 0; p < position; p++) {
        while (p >= segments[s].end)
            s++;
        assert_int_equal(tokens[p], store_token(segments[s].branch, p));
    }
    free(tokens);
    struct storage_range *ranges;
    size_t range_count;
    assert_int_equal(storage_lineage(storage, id, &ranges, &range_count), STATUS_OK);
    assert_int_equal(ranges[range_count - 1].branch, memory.branch);
    assert_int_equal(ranges[0].first, 0);
    for (size_t r = 0; r < range_count; r++) {
        uint64_t end = r + 1 < range_count ? ranges[r + 1].first : position / S;
        unsigned char want[KV], got[KV];
        unsigned char *landmarks = malloc((size_t)(end - ranges[r].first) * LANDMARK + 1);
        assert_int_equal(storage_read_landmarks(storage, ranges[r].branch, ranges[r].first,
                                                end - ranges[r].first, landmarks),
                         STATUS_OK);
        for (uint64_t i = ranges[r].first; i < end; i++) {
            /* A chunk belongs to whoever wrote its last token. */
            size_t s = 0;
            while (segments[s].end < (i + 1) * S)
                s++;
            assert_int_equal(ranges[r].branch, segments[s].branch);
            struct storage_read read = {ranges[r].branch, i, got};
            assert_int_equal(storage_read_chunks(storage, &read, 1), STATUS_OK);
            store_fill(want, KV, ranges[r].branch, i);
            assert_memory_equal(got, want, KV);
            store_fill(want, LANDMARK, ~ranges[r].branch, i);
            assert_memory_equal(landmarks + (i - ranges[r].first) * LANDMARK, want, LANDMARK);
        }
        free(landmarks);
    }
    free(ranges);
    void *snapshot;
    size_t size;
    uint64_t at;
    unsigned char want[5000];
    assert_int_equal(storage_snapshot(storage, id, &snapshot, &size, &at), STATUS_OK);
    assert_int_equal(at, position);
    assert_int_equal(size, sizeof want);
    store_fill(want, sizeof want, segments[count - 1].branch, position);
    assert_memory_equal(snapshot, want, size);
    free(snapshot);
}

void store_wait_collected(struct storage *storage)
{
    struct storage_stats stats;
    for (int i = 0; i < 2000; i++) {
        storage_get_stats(storage, &stats);
        if (stats.branches_to_collect == 0)
            return;
        usleep(5000);
    }
    fail_msg("%llu branches are still not collected",
             (unsigned long long)stats.branches_to_collect);
}
