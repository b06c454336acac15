/* Storage, driven through storage.h alone: round trips, forks, deletes, failures. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/lib/store_helper.h"

#define S 8u
#define KV 600u /* two to a page, so runs of many sizes come up */
#define LANDMARK 40u
#define FINGERPRINT 0x1234abcdu

static struct storage_options options_of(const char *path)
{
    return (struct storage_options){.path = path,
                                    .kv_bytes = KV,
                                    .landmark_bytes = LANDMARK,
                                    .chunk_tokens = S,
                                    .model_fingerprint = FINGERPRINT,
                                    .model_name = "test-model",
                                    .map_bytes = 256 * LIMITS_MIB,
                                    .linger_ms = 1};
}

static struct storage *open_at(const char *path)
{
    const struct storage_options options = options_of(path);
    return store_open(&options);
}

static void print_problem(void *context, const char *message)
{
    (void)context;
    print_message("  problem: %s\n", message);
}

/* The folder must be closed. */
static struct storage_check_report assert_clean(const char *path)
{
    struct storage_check_report report;
    struct error err = {0};
    enum status status = storage_check(path, print_problem, NULL, &report, &err);
    if (status)
        fail_msg("storage_check: %s: %s", status_text(status), err.message);
    assert_int_equal(report.problems, 0);
    return report;
}

static struct storage_memory get(struct storage *storage, const char *id)
{
    struct storage_memory memory;
    assert_int_equal(storage_memory_get(storage, id, &memory), STATUS_OK);
    return memory;
}

static uint64_t branch_of(struct storage *storage, const char *id)
{
    struct storage_memory memory = get(storage, id);
    storage_memory_close(&memory);
    return memory.branch;
}

/* Chunks of a branch are filled with the branch and index; tokens and snapshots likewise, so what
 * is read back tells where it came from. */
static enum status append_range(struct storage *storage, uint64_t branch, uint64_t from,
                                uint64_t end)
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

static enum status commit_to(struct storage *storage, const char *id, uint64_t position)
{
    struct storage_memory memory = get(storage, id);
    storage_memory_close(&memory);
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

/* Writes on to `position`: the chunks that become full, then the commit. */
static void write_to(struct storage *storage, const char *id, uint64_t position)
{
    struct storage_memory memory = get(storage, id);
    storage_memory_close(&memory);
    assert_int_equal(append_range(storage, memory.branch, memory.token_count / S, position / S),
                     STATUS_OK);
    assert_int_equal(commit_to(storage, id, position), STATUS_OK);
}

struct segment { /* tokens up to `end` were written by `branch` */
    uint64_t branch, end;
};

/* Everything a memory holds, against who wrote what: `segments`, oldest first. */
static void assert_memory(struct storage *storage, const char *id, const struct segment *segments,
                          size_t count)
{
    struct storage_memory memory = get(storage, id);
    uint64_t position = segments[count - 1].end;
    assert_int_equal(memory.token_count, position);
    assert_int_equal(memory.chunk_count, position / S);
    assert_int_equal(memory.text_bytes, position * 3);
    storage_memory_close(&memory);
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

static void wait_for_collection(struct storage *storage)
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

static int setup(void **state)
{
    *state = store_helper_folder();
    return 0;
}

static int teardown(void **state)
{
    store_helper_remove(*state);
    return 0;
}

/* ---- tests ---- */

static void test_round_trip(void **state)
{
    struct storage *storage = open_at(*state);
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    struct storage_memory memory = get(storage, "a");
    assert_int_equal(memory.token_count, 0);
    assert_int_equal(memory.snapshot_bytes, 0);
    assert_string_equal(memory.metadata, "{}");
    assert_string_equal(memory.parent, "");
    uint64_t branch = memory.branch;
    storage_memory_close(&memory);
    void *snapshot;
    size_t size;
    uint64_t position;
    assert_int_equal(storage_snapshot(storage, "a", &snapshot, &size, &position), STATUS_NOT_FOUND);
    for (uint64_t p = 13; p < 3000; p += p / 3 + 1) {
        write_to(storage, "a", p);
        assert_memory(storage, "a", &(struct segment){branch, p}, 1);
        if (p % 2) { /* and what is on disk is what was in the process */
            storage_close(storage);
            storage = open_at(*state);
            assert_memory(storage, "a", &(struct segment){branch, p}, 1);
        }
    }
    storage_close(storage);
    struct storage_check_report report = assert_clean(*state);
    assert_int_equal(report.memories, 1);
    assert_int_equal(report.snapshots, LIMITS_KEEP_SNAPSHOTS);
}

static void test_bad_calls(void **state)
{
    struct storage *storage = open_at(*state);
    unsigned char kv[KV] = {0}, landmark[LANDMARK] = {0};
    int32_t tokens[4] = {1, 2, 3, 4};
    struct storage_memory memory;
    char long_id[LIMITS_ID_BYTES + 1];
    memset(long_id, 'x', sizeof long_id - 1);
    long_id[sizeof long_id - 1] = 0;
    assert_int_equal(store_create(storage, "", NULL), STATUS_INVALID);
    assert_int_equal(store_create(storage, long_id, NULL), STATUS_INVALID);
    long_id[LIMITS_ID_BYTES - 1] = 0;
    assert_int_equal(store_create(storage, long_id, NULL), STATUS_OK);
    assert_int_equal(store_create(storage, long_id, NULL), STATUS_CONFLICT);
    assert_int_equal(store_create(storage, "b", "nobody"), STATUS_NOT_FOUND);
    assert_int_equal(store_remove(storage, "nobody"), STATUS_NOT_FOUND);
    assert_int_equal(store_truncate(storage, "nobody"), STATUS_NOT_FOUND);
    assert_int_equal(storage_memory_get(storage, "nobody", &memory), STATUS_NOT_FOUND);
    assert_int_equal(storage_memory_get(storage, "", &memory), STATUS_NOT_FOUND);
    assert_int_equal(store_append(storage, 999, 0, kv, landmark), STATUS_NOT_FOUND);
    struct storage_commit commit = {.id = long_id,
                                    .position = 4,
                                    .tokens = tokens,
                                    .token_count = 4,
                                    .snapshot = "s",
                                    .snapshot_bytes = 1};
    commit.id = "nobody";
    assert_int_equal(store_commit(storage, &commit), STATUS_NOT_FOUND);
    commit.id = long_id;
    commit.snapshot_bytes = 0;
    assert_int_equal(store_commit(storage, &commit), STATUS_INVALID);
    commit.snapshot_bytes = 1;
    commit.position = 3;
    assert_int_equal(store_commit(storage, &commit), STATUS_INVALID);
    commit.position = 5; /* does not extend position 0 */
    assert_int_equal(store_commit(storage, &commit), STATUS_CONFLICT);
    commit.position = 4; /* right, but the branch waits for a truncate now */
    assert_int_equal(store_commit(storage, &commit), STATUS_IO);
    assert_int_equal(store_truncate(storage, long_id), STATUS_OK);
    assert_int_equal(store_commit(storage, &commit), STATUS_OK);
    assert_int_equal(storage_read_tokens(storage, long_id, 0, 5, tokens), STATUS_INVALID);
    assert_int_equal(storage_read_tokens(storage, long_id, 5, 0, tokens), STATUS_INVALID);
    assert_int_equal(storage_read_tokens(storage, long_id, 4, 0, tokens), STATUS_OK);
    storage_close(storage);
    assert_clean(*state);
}

static void test_metadata(void **state)
{
    struct storage *storage = open_at(*state);
    struct storage_memory_options options = {.id = "m", .metadata = "{\"a\":\"b\"}"};
    struct store_wait wait;
    store_wait_init(&wait);
    assert_int_equal(
        store_wait_finish(&wait, storage_memory_create(storage, &options, store_wait_cb, &wait)),
        STATUS_OK);
    write_to(storage, "m", 20);
    struct storage_memory memory = get(storage, "m");
    assert_string_equal(memory.metadata, "{\"a\":\"b\"}");
    storage_memory_close(&memory);
    char *large = calloc(1, ((size_t)128 << 10) + 2);
    memset(large, 'm', (size_t)128 << 10);
    store_wait_init(&wait);
    assert_int_equal(store_wait_finish(&wait, storage_memory_update(storage, "m", large, NULL,
                                                                    store_wait_cb, &wait)),
                     STATUS_OK);
    write_to(storage, "m", 40);
    memory = get(storage, "m");
    assert_string_equal(memory.metadata, large);
    storage_memory_close(&memory);
    large[(size_t)128 << 10] = 'x';
    assert_int_equal(storage_memory_update(storage, "m", large, NULL, NULL, NULL),
                     STATUS_TOO_LARGE);
    free(large);
    storage_close(storage);
    assert_clean(*state);
}

/* A hole, a repeat or anything after it fails until the truncate; then it goes on as if nothing
 * had been. */
static void test_order_of_appends(void **state)
{
    struct storage *storage = open_at(*state);
    unsigned char kv[KV] = {0}, landmark[LANDMARK] = {0};
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    assert_int_equal(store_create(storage, "b", NULL), STATUS_OK);
    uint64_t branch = branch_of(storage, "a"), other = branch_of(storage, "b");
    write_to(storage, "a", 3 * S);
    assert_int_equal(append_range(storage, branch, 3, 5), STATUS_OK);
    assert_int_equal(store_append(storage, branch, 6, kv, landmark), STATUS_INVALID);
    assert_int_equal(store_append(storage, branch, 5, kv, landmark), STATUS_IO);
    assert_int_equal(commit_to(storage, "a", 4 * S), STATUS_IO);
    write_to(storage, "b", 5 * S); /* its neighbour does not care */
    assert_memory(storage, "a", &(struct segment){branch, 3 * S}, 1);
    assert_int_equal(store_truncate(storage, "a"), STATUS_OK);
    unsigned char got[KV];
    struct storage_read read = {branch, 3, got};
    assert_int_equal(storage_read_chunks(storage, &read, 1), STATUS_CORRUPT); /* dropped */
    assert_int_equal(store_append(storage, branch, 2, kv, landmark), STATUS_INVALID);
    assert_int_equal(store_truncate(storage, "a"), STATUS_OK);
    write_to(storage, "a", 6 * S + 1);
    /* A commit cannot cover a chunk that was never appended. */
    assert_int_equal(commit_to(storage, "a", 7 * S), STATUS_INVALID);
    assert_int_equal(store_truncate(storage, "a"), STATUS_OK);
    assert_memory(storage, "a", &(struct segment){branch, 6 * S + 1}, 1);
    assert_memory(storage, "b", &(struct segment){other, 5 * S}, 1);
    storage_close(storage);
    assert_clean(*state);
}

static void test_forks_of_forks(void **state)
{
    struct storage *storage = open_at(*state);
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    uint64_t a = branch_of(storage, "a");
    write_to(storage, "a", 100); /* within chunk 12 */
    assert_int_equal(store_create(storage, "b", "a"), STATUS_OK);
    uint64_t b = branch_of(storage, "b");
    struct storage_memory memory = get(storage, "b");
    assert_string_equal(memory.parent, "a");
    assert_int_equal(memory.bytes_on_disk, 0); /* a fork takes nothing */
    assert_int_equal(memory.token_count, 100);
    storage_memory_close(&memory);
    write_to(storage, "a", 300); /* the parent goes on, with a chunk 12 of its own */
    write_to(storage, "b", 102); /* and the child stays in that chunk */
    assert_int_equal(store_create(storage, "c", "b"), STATUS_OK);
    uint64_t c = branch_of(storage, "c");
    write_to(storage, "c", 217);
    write_to(storage, "b", 500);
    assert_int_equal(store_create(storage, "d", "c"), STATUS_OK); /* nothing of its own */
    assert_int_equal(store_create(storage, "e", "d"), STATUS_OK);
    uint64_t e = branch_of(storage, "e");
    write_to(storage, "e", 218);
    const struct segment in_a[] = {{a, 300}}, in_b[] = {{a, 100}, {b, 500}};
    const struct segment in_c[] = {{a, 100}, {b, 102}, {c, 217}};
    const struct segment in_e[] = {{a, 100}, {b, 102}, {c, 217}, {e, 218}};
    for (int again = 0; again < 2; again++) {
        assert_memory(storage, "a", in_a, 1);
        assert_memory(storage, "b", in_b, 2);
        assert_memory(storage, "c", in_c, 3);
        assert_memory(storage, "e", in_e, 4);
        struct storage_range *ranges;
        size_t count;
        assert_int_equal(storage_lineage(storage, "d", &ranges, &count), STATUS_OK);
        assert_int_equal(ranges[count - 1].branch, branch_of(storage, "d"));
        assert_int_equal(ranges[count - 1].first, 217 / S);
        free(ranges);
        storage_close(storage);
        storage = open_at(*state);
    }
    storage_close(storage);
    assert_clean(*state);
}

/* Every order of deleting four memories of one tree; after each delete the others are whole, and
 * after the last one the store is empty. */
static void test_delete_orders(void **state)
{
    static const char *const ids[4] = {"a", "b", "c", "d"};
    for (int order = 0; order < 24; order++) {
        struct storage *storage = open_at(*state);
        int left[4] = {0, 1, 2, 3}, code = order;
        assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
        write_to(storage, "a", 700);
        assert_int_equal(store_create(storage, "b", "a"), STATUS_OK);
        write_to(storage, "a", 900);
        write_to(storage, "b", 1000);
        assert_int_equal(store_create(storage, "c", "b"), STATUS_OK);
        write_to(storage, "b", 1003);
        write_to(storage, "c", 1017);
        assert_int_equal(store_create(storage, "d", "a"), STATUS_OK);
        uint64_t a = branch_of(storage, "a"), b = branch_of(storage, "b");
        uint64_t c = branch_of(storage, "c");
        const struct segment segments[4][3] = {
            {{a, 900}}, {{a, 700}, {b, 1003}}, {{a, 700}, {b, 1000}, {c, 1017}}, {{a, 900}}};
        const size_t counts[4] = {1, 2, 3, 1};
        for (int alive = 4; alive > 0; alive--) {
            int which = code % alive;
            code /= alive;
            assert_int_equal(store_remove(storage, ids[left[which]]), STATUS_OK);
            memmove(left + which, left + which + 1, sizeof *left * (size_t)(alive - 1 - which));
            wait_for_collection(storage);
            for (int i = 0; i < alive - 1; i++)
                assert_memory(storage, ids[left[i]], segments[left[i]], counts[left[i]]);
            storage_close(storage);
            assert_clean(*state);
            storage = open_at(*state);
        }
        storage_close(storage);
        struct storage_check_report report = assert_clean(*state);
        assert_int_equal(report.branches, 0);
        assert_int_equal(report.chunks, 0);
        assert_int_equal(report.tokens, 0);
        assert_int_equal(report.snapshots, 0);
    }
}

/* What lies past the commit, and what was ephemeral, is gone at the next opening. */
static void test_recovery(void **state)
{
    struct storage *storage = open_at(*state);
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    uint64_t a = branch_of(storage, "a");
    write_to(storage, "a", 77);
    assert_int_equal(append_range(storage, a, 9, 400), STATUS_OK); /* never committed */
    assert_int_equal(store_create_ephemeral(storage, "e", "a"), STATUS_OK);
    write_to(storage, "e", 150);
    assert_int_equal(store_create(storage, "f", "e"), STATUS_OK); /* keeps what it needs of it */
    uint64_t e = branch_of(storage, "e"), f = branch_of(storage, "f");
    write_to(storage, "e", 300);
    write_to(storage, "f", 160);
    for (int i = 0; i < 600; i++) { /* more than one batch of the recovery */
        char id[16];
        snprintf(id, sizeof id, "gone%d", i);
        assert_int_equal(
            storage_memory_create(
                storage, &(struct storage_memory_options){.id = id, .ephemeral = true}, NULL, NULL),
            STATUS_OK);
    }
    storage_close(storage);
    storage = open_at(*state);
    struct storage_memory memory;
    assert_int_equal(storage_memory_get(storage, "e", &memory), STATUS_NOT_FOUND);
    assert_int_equal(storage_memory_get(storage, "gone599", &memory), STATUS_NOT_FOUND);
    unsigned char got[KV];
    struct storage_read read = {a, 9, got};
    assert_int_equal(storage_read_chunks(storage, &read, 1), STATUS_CORRUPT);
    const struct segment in_f[] = {{a, 77}, {e, 150}, {f, 160}};
    wait_for_collection(storage);
    assert_memory(storage, "f", in_f, 3);
    write_to(storage, "a", 90);
    assert_memory(storage, "a", &(struct segment){a, 90}, 1);
    struct storage_stats stats;
    storage_get_stats(storage, &stats);
    assert_int_equal(stats.memories, 2);
    storage_close(storage);
    struct storage_check_report report = assert_clean(*state);
    assert_int_equal(report.branches, 3);
    assert_int_equal(report.tokens, 90 + (150 - 77) + (160 - 150));
}

static void test_list(void **state)
{
    struct storage *storage = open_at(*state);
    struct storage_memory page[7];
    size_t count;
    bool more;
    assert_int_equal(storage_memory_list(storage, NULL, NULL, 7, page, &count, &more), STATUS_OK);
    assert_true(count == 0 && !more);
    for (int i = 0; i < 20; i++) {
        char id[16];
        snprintf(id, sizeof id, "m%d", (i * 7) % 20); /* names in no order */
        assert_int_equal(i % 5 == 3 ? store_create_ephemeral(storage, id, NULL)
                                    : store_create(storage, id, NULL),
                         STATUS_OK);
    }
    assert_int_equal(store_remove(storage, "m5"), STATUS_OK);
    char after[LIMITS_ID_BYTES] = "";
    int seen = 0, expect = 19;
    do {
        assert_int_equal(
            storage_memory_list(storage, NULL, after[0] ? after : NULL, 7, page, &count, &more),
            STATUS_OK);
        for (size_t i = 0; i < count; i++, expect--, seen++) {
            char id[16];
            while (expect % 5 == 3 || (expect * 7) % 20 == 5)
                expect--;
            snprintf(id, sizeof id, "m%d", (expect * 7) % 20);
            assert_string_equal(page[i].id, id);
            memcpy(after, page[i].id, sizeof after);
            storage_memory_close(&page[i]);
        }
        assert_true(count == 7 || !more);
    } while (more);
    assert_int_equal(seen, 15);
    assert_int_equal(storage_memory_list(storage, NULL, "m5", 7, page, &count, &more),
                     STATUS_NOT_FOUND);
    assert_int_equal(storage_memory_list(storage, NULL, NULL, 0, page, &count, &more), STATUS_OK);
    assert_true(count == 0 && more);
    storage_close(storage);
}

static void create_for(struct storage *storage, const char *id, const char *from,
                       const char *tenant)
{
    const struct storage_memory_options options = {.id = id, .from = from, .tenant = tenant};
    struct store_wait wait;
    store_wait_init(&wait);
    assert_int_equal(
        store_wait_finish(&wait, storage_memory_create(storage, &options, store_wait_cb, &wait)),
        STATUS_OK);
}

/* The tenant's memories behind `after`, "a b c". */
static void assert_listed(struct storage *storage, const char *tenant, const char *after,
                          size_t limit, bool has_more, const char *ids)
{
    struct storage_memory page[7];
    char names[128] = "";
    size_t count, size = 0;
    bool more;
    assert_int_equal(storage_memory_list(storage, tenant, after, limit, page, &count, &more),
                     STATUS_OK);
    for (size_t i = 0; i < count; i++) {
        assert_string_equal(page[i].tenant, tenant);
        size +=
            (size_t)snprintf(names + size, sizeof names - size, "%s%s", i ? " " : "", page[i].id);
        storage_memory_close(&page[i]);
    }
    assert_string_equal(names, ids);
    assert_int_equal(more, has_more);
}

/* A tenant's list holds the tenant's memories, in pages too; whose a memory is stays with it
 * through metadata, settling and a restart. */
static void test_tenants(void **state)
{
    static const char *const tenants[] = {"ann", "bob", NULL};
    struct storage *storage = open_at(*state);
    struct storage_memory page[7];
    struct store_wait wait;
    size_t count;
    bool more;
    for (int i = 0; i < 9; i++) {
        char id[16];
        snprintf(id, sizeof id, "m%d", i);
        create_for(storage, id, NULL, tenants[i % 3]);
    }
    create_for(storage, "fork", "m0", "ann");
    store_wait_init(&wait);
    assert_int_equal(store_wait_finish(&wait, storage_memory_update(storage, "m1", "{}", NULL,
                                                                    store_wait_cb, &wait)),
                     STATUS_OK);
    assert_int_equal(store_create_ephemeral(storage, "e", "m4"), STATUS_OK);
    assert_int_equal(store_settle(storage, "e", "m4"), STATUS_OK);
    storage_close(storage);
    storage = open_at(*state);
    assert_listed(storage, "ann", NULL, 2, true, "fork m6");
    assert_listed(storage, "ann", "m6", 7, false, "m3 m0");
    assert_listed(storage, "bob", NULL, 7, false, "m4 m7 m1");
    assert_listed(storage, "", NULL, 7, false, "m8 m5 m2");
    assert_listed(storage, "eve", NULL, 7, false, "");
    assert_int_equal(storage_memory_list(storage, "bob", "m6", 7, page, &count, &more),
                     STATUS_NOT_FOUND);
    storage_close(storage);
    assert_clean(*state);
}

/* Short turns must not cost a page or more for every few bytes. */
static void test_packing(void **state)
{
    struct storage *storage = open_at(*state);
    assert_int_equal(store_create(storage, "long", NULL), STATUS_OK);
    assert_int_equal(store_create(storage, "turns", NULL), STATUS_OK);
    const uint64_t tokens = 40000;
    for (uint64_t p = 5000; p <= tokens; p += 5000)
        write_to(storage, "long", p);
    for (uint64_t p = 100; p <= tokens; p += 100)
        write_to(storage, "turns", p);
    const char *const ids[2] = {"long", "turns"};
    for (int i = 0; i < 2; i++) {
        struct storage_memory memory = get(storage, ids[i]);
        double payload = (double)(tokens / S * (KV + LANDMARK) + tokens * 4);
        double ratio = (double)(memory.bytes_on_disk - 8192) / payload; /* the snapshot's pages */
        print_message("%s: %.3f bytes on disk for each of payload\n", ids[i], ratio);
        assert_true(ratio < 1.10);
        storage_memory_close(&memory);
    }
    storage_close(storage);
    assert_clean(*state);
}

static void test_second_process(void **state)
{
    struct storage_options options = options_of(*state);
    struct storage *storage = open_at(*state), *second = NULL;
    struct error err = {0};
    char pid[32];
    /* The same process, too: LMDB must not be opened twice in one. */
    assert_int_equal(storage_open(&options, &second, &err), STATUS_CONFLICT);
    snprintf(pid, sizeof pid, "%ld", (long)getpid());
    assert_non_null(strstr(err.message, pid));
    assert_non_null(strstr(err.message, *state));
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0)
        _exit(storage_open(&options, &second, &err) == STATUS_CONFLICT ? 0 : 1);
    int how;
    assert_int_equal(waitpid(child, &how, 0), child);
    assert_true(WIFEXITED(how) && WEXITSTATUS(how) == 0);
    storage_close(storage);
    storage_close(open_at(*state));
}

static void test_refusals(void **state)
{
    struct storage_options options = options_of(*state);
    struct storage *storage;
    struct storage_check_report report;
    struct error err = {0};
    char path[1200];
    assert_int_equal(storage_check(*state, NULL, NULL, &report, &err), STATUS_NOT_FOUND);
    storage_close(open_at(*state));
    options.model_fingerprint++;
    options.model_name = "another-model";
    assert_int_equal(storage_open(&options, &storage, &err), STATUS_MISMATCH);
    assert_non_null(strstr(err.message, "test-model"));
    assert_non_null(strstr(err.message, "another-model"));
    options = options_of(*state);
    options.kv_bytes += 2;
    assert_int_equal(storage_open(&options, &storage, &err), STATUS_MISMATCH);
    options.kv_bytes = 0;
    assert_int_equal(storage_open(&options, &storage, &err), STATUS_INVALID);
    options = options_of(*state);
    options.map_bytes = 4096;
    assert_int_equal(storage_open(&options, &storage, &err), STATUS_INVALID);
    /* A path that cannot be a folder, whoever runs this. */
    snprintf(path, sizeof path, "%s/file", (char *)*state);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fclose(file);
    options = options_of(path);
    assert_int_equal(storage_open(&options, &storage, &err), STATUS_IO);
    assert_non_null(strstr(err.message, path));
    snprintf(path, sizeof path, "%s/missing/folder", (char *)*state);
    options = options_of(path);
    assert_int_equal(storage_open(&options, &storage, &err), STATUS_NOT_FOUND);
    if (geteuid() == 0) {
        print_message("read-only folder: skipped, root may write anywhere\n");
    } else {
        options = options_of(*state);
        assert_int_equal(chmod(*state, 0500), 0);
        assert_int_equal(storage_open(&options, &storage, &err), STATUS_IO);
        assert_int_equal(chmod(*state, 0700), 0);
    }
    storage_close(open_at(*state)); /* none of that hurt it */
}

static void test_read_only(void **state)
{
    struct storage *storage = open_at(*state);
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    uint64_t a = branch_of(storage, "a");
    write_to(storage, "a", 100);
    storage_close(storage);
    struct storage_options options = options_of(*state);
    options.read_only = true;
    struct error err = {0};
    assert_int_equal(storage_open(&options, &storage, &err), STATUS_OK);
    assert_memory(storage, "a", &(struct segment){a, 100}, 1);
    assert_int_equal(store_create(storage, "b", NULL), STATUS_CLOSED);
    assert_int_equal(storage_append_room(storage), 0);
    storage_close(storage);
}

struct busy_gate { /* holds the writer thread inside a callback */
    pthread_mutex_t mutex;
    int answered;
};

static void gate_cb(void *context, enum status status)
{
    struct busy_gate *gate = context;
    (void)status;
    pthread_mutex_lock(&gate->mutex);
    gate->answered++;
    pthread_mutex_unlock(&gate->mutex);
}

/* A full queue says so, accepts again after callbacks, and close answers everything. */
static void test_full_queue(void **state)
{
    struct storage_options options = options_of(*state);
    struct storage *storage;
    struct error err;
    unsigned char kv[KV] = {0}, landmark[LANDMARK] = {0};
    options.queue_bytes = 50000;
    assert_int_equal(storage_open(&options, &storage, &err), STATUS_OK);
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    uint64_t a = branch_of(storage, "a");
    struct busy_gate gate = {.answered = 0};
    pthread_mutex_init(&gate.mutex, NULL);
    pthread_mutex_lock(&gate.mutex); /* the first callback waits here */
    size_t room = storage_append_room(storage), accepted = 0;
    assert_true(room > 40 && room < 90);
    enum status status;
    while ((status = storage_append(storage, a, accepted, kv, landmark, gate_cb, &gate)) ==
           STATUS_OK)
        accepted++;
    assert_int_equal(status, STATUS_BUSY);
    assert_true(accepted >= room);
    assert_int_equal(storage_append_room(storage), 0);
    /* What was promised when there was room is taken though others have filled it. */
    for (int i = 0; i < 3; i++)
        assert_int_equal(
            storage_append_promised(storage, a, accepted++, kv, landmark, gate_cb, &gate),
            STATUS_OK);
    assert_int_equal(storage_append_room(storage), 0);
    assert_int_equal(storage_append(storage, a, accepted, kv, landmark, gate_cb, &gate),
                     STATUS_BUSY);
    pthread_mutex_unlock(&gate.mutex);
    /* A write larger than the queue is not locked out for ever. */
    unsigned char *snapshot = calloc(1, 200000);
    struct storage_commit commit = {.id = "a", .snapshot = snapshot, .snapshot_bytes = 200000};
    while ((status = storage_commit(storage, &commit, gate_cb, &gate)) == STATUS_BUSY)
        usleep(1000);
    assert_int_equal(status, STATUS_OK);
    accepted++;
    storage_close(storage);
    assert_int_equal(gate.answered, accepted);
    pthread_mutex_destroy(&gate.mutex);
    free(snapshot);
}

struct order {
    uint64_t next;
    bool wrong;
};
struct ordered {
    struct order *order;
    uint64_t number;
};

static void order_cb(void *context, enum status status)
{
    struct ordered *one = context;
    if (one->order->next != one->number || status != STATUS_OK)
        one->order->wrong = true;
    one->order->next++;
}

/* Answers come in the order of the queue, across branches and kinds. */
static void test_order_of_answers(void **state)
{
    enum { COUNT = 5000 };
    struct storage *storage = open_at(*state);
    unsigned char kv[KV] = {0}, landmark[LANDMARK] = {0};
    struct order order = {0};
    struct ordered *items = calloc(COUNT, sizeof *items);
    uint64_t next[3] = {0}, branches[3];
    static const char *const ids[3] = {"a", "b", "c"};
    for (int i = 0; i < 3; i++) {
        assert_int_equal(store_create(storage, ids[i], NULL), STATUS_OK);
        branches[i] = branch_of(storage, ids[i]);
    }
    for (uint64_t i = 0; i < COUNT; i++) {
        size_t b = (size_t)(i * i % 7) % 3;
        items[i] = (struct ordered){&order, i};
        if (i % 97 == 0)
            assert_int_equal(
                storage_memory_update(storage, ids[b], "{}", NULL, order_cb, &items[i]), STATUS_OK);
        else
            assert_int_equal(
                storage_append(storage, branches[b], next[b]++, kv, landmark, order_cb, &items[i]),
                STATUS_OK);
    }
    storage_close(storage);
    assert_int_equal(order.next, COUNT);
    assert_false(order.wrong);
    free(items);
    assert_clean(*state);
}

/* Readers and the writer at once, for the thread sanitizer as much as for the values. */
struct racer {
    struct storage *storage;
    uint64_t branch;
    uint64_t committed; /* atomic */
    bool failed;
};

static void *race_reader(void *context)
{
    struct racer *racer = context;
    unsigned char got[KV], want[KV];
    for (uint64_t end = 0, i = 0; end < 400; i++) {
        end = __atomic_load_n(&racer->committed, __ATOMIC_ACQUIRE);
        if (end == 0)
            continue;
        uint64_t index = i * 7919 % end;
        struct storage_read read = {racer->branch, index, got};
        store_fill(want, KV, racer->branch, index);
        if (storage_read_chunks(racer->storage, &read, 1) || memcmp(got, want, KV) != 0)
            racer->failed = true;
        struct storage_memory memory;
        if (storage_memory_get(racer->storage, "a", &memory))
            racer->failed = true;
        else
            storage_memory_close(&memory);
    }
    return NULL;
}

static void test_readers_and_writer(void **state)
{
    struct storage *storage = open_at(*state);
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    struct racer racer = {.storage = storage, .branch = branch_of(storage, "a")};
    pthread_t threads[2];
    for (int i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, race_reader, &racer), 0);
    for (uint64_t c = 0; c < 400; c += 20) {
        write_to(storage, "a", (c + 20) * S);
        __atomic_store_n(&racer.committed, c + 20, __ATOMIC_RELEASE);
    }
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    assert_false(racer.failed);
    storage_close(storage);
}

/* The map fills up: what does not fit fails alone, reads go on, a delete goes through, and then
 * there is room again. */
static void test_map_full(void **state)
{
    struct storage_options options = options_of(*state);
    struct storage *storage;
    struct error err;
    options.map_bytes = 4 * LIMITS_MIB;
    assert_int_equal(storage_open(&options, &storage, &err), STATUS_OK);
    for (int round = 0; round < 5; round++) {
        assert_int_equal(store_create(storage, "small", NULL), STATUS_OK);
        write_to(storage, "small", 500);
        uint64_t small = branch_of(storage, "small");
        assert_int_equal(store_create(storage, "big", NULL), STATUS_OK);
        uint64_t big = branch_of(storage, "big"), position = 0;
        enum status status = STATUS_OK;
        while (!status) {
            status = append_range(storage, big, position / S, position / S + 50);
            if (!status)
                status = commit_to(storage, "big", position + 50 * S);
            if (!status)
                position += 50 * S;
        }
        assert_int_equal(status, STATUS_DISK_FULL);
        print_message("round %d: full at %llu tokens\n", round, (unsigned long long)position);
        assert_true(position >= 2000 * S); /* 1.3 MB of chunks and tokens in 4 MiB */
        assert_memory(storage, "small", &(struct segment){small, 500}, 1);
        assert_memory(storage, "big", &(struct segment){big, position}, 1);
        assert_int_equal(store_truncate(storage, "big"), STATUS_OK);
        assert_int_equal(store_remove(storage, "big"), STATUS_OK);
        write_to(storage, "small", 1500); /* at once, before anything was collected in peace */
        assert_memory(storage, "small", &(struct segment){small, 1500}, 1);
        assert_int_equal(store_remove(storage, "small"), STATUS_OK);
        wait_for_collection(storage);
        if (round % 2) {
            storage_close(storage);
            assert_clean(*state);
            assert_int_equal(storage_open(&options, &storage, &err), STATUS_OK);
        }
    }
    storage_close(storage);
    assert_clean(*state);
}

/* In one group: the item that does not fit fails, its neighbours do not. */
static void test_bad_neighbour(void **state)
{
    struct storage_options options = options_of(*state);
    struct storage *storage;
    struct error err;
    options.map_bytes = 4 * LIMITS_MIB;
    assert_int_equal(storage_open(&options, &storage, &err), STATUS_OK);
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    assert_int_equal(store_create(storage, "b", NULL), STATUS_OK);
    uint64_t a = branch_of(storage, "a");
    unsigned char *snapshot = calloc(1, 8 * LIMITS_MIB), kv[KV], landmark[LANDMARK];
    struct storage_commit commit = {
        .id = "b", .snapshot = snapshot, .snapshot_bytes = 8 * LIMITS_MIB};
    struct store_wait waits[41], big;
    for (int i = 0; i < 41; i++)
        store_wait_init(&waits[i]);
    store_wait_init(&big);
    for (uint64_t i = 0; i < 40; i++) {
        store_fill(kv, sizeof kv, a, i);
        store_fill(landmark, sizeof landmark, ~a, i);
        if (i == 20)
            assert_int_equal(storage_commit(storage, &commit, store_wait_cb, &big), STATUS_OK);
        assert_int_equal(storage_append(storage, a, i, kv, landmark, store_wait_cb, &waits[i]),
                         STATUS_OK);
    }
    for (int i = 0; i < 40; i++)
        assert_int_equal(store_wait_finish(&waits[i], STATUS_OK), STATUS_OK);
    assert_int_equal(store_wait_finish(&big, STATUS_OK), STATUS_DISK_FULL);
    assert_int_equal(commit_to(storage, "a", 40 * S), STATUS_OK);
    assert_memory(storage, "a", &(struct segment){a, 40 * S}, 1);
    /* What follows hears the same, until it is truncated. */
    assert_int_equal(commit_to(storage, "b", 0), STATUS_DISK_FULL);
    assert_int_equal(store_truncate(storage, "b"), STATUS_OK);
    assert_int_equal(commit_to(storage, "b", 0), STATUS_OK);
    storage_close(storage);
    free(snapshot);
    assert_clean(*state);
}

static void test_lineage_limit(void **state)
{
    struct storage *storage = open_at(*state);
    char id[2][16] = {"f0", ""};
    assert_int_equal(store_create(storage, id[0], NULL), STATUS_OK);
    int i = 0;
    enum status status = STATUS_OK;
    uint64_t root = branch_of(storage, id[0]);
    unsigned char kv[KV] = {0}, landmark[LANDMARK] = {0};
    /* Queued without waiting: thousands of commits would only measure the disk. Branches are
     * numbered as they are created. */
    for (; i < LIMITS_LINEAGE + 1; i++) {
        int32_t token = i;
        struct storage_commit commit = {.id = id[i % 2],
                                        .position = (uint64_t)i + 1,
                                        .tokens = &token,
                                        .token_count = 1,
                                        .snapshot = "s",
                                        .snapshot_bytes = 1};
        struct storage_memory_options options = {.id = id[(i + 1) % 2], .from = id[i % 2]};
        if ((uint64_t)i % S == S - 1)
            assert_int_equal(storage_append(storage, root + (uint64_t)i, (uint64_t)i / S, kv,
                                            landmark, NULL, NULL),
                             STATUS_OK);
        assert_int_equal(storage_commit(storage, &commit, NULL, NULL), STATUS_OK);
        snprintf(id[(i + 1) % 2], sizeof id[0], "f%d", i + 1);
        if (i + 1 < LIMITS_LINEAGE)
            assert_int_equal(storage_memory_create(storage, &options, NULL, NULL), STATUS_OK);
        else
            break;
    }
    status = store_create(storage, id[(i + 1) % 2], id[i % 2]);
    assert_int_equal(status, STATUS_TOO_LARGE);
    int32_t *tokens = calloc((size_t)i + 1, sizeof *tokens);
    assert_int_equal(storage_read_tokens(storage, id[i % 2], 0, (size_t)i + 1, tokens), STATUS_OK);
    for (int t = 0; t <= i; t++)
        assert_int_equal(tokens[t], t);
    free(tokens);
    storage_close(storage);
    assert_clean(*state);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_round_trip),       TEST(test_bad_calls),
        TEST(test_metadata),         TEST(test_order_of_appends),
        TEST(test_forks_of_forks),   TEST(test_delete_orders),
        TEST(test_recovery),         TEST(test_list),
        TEST(test_tenants),          TEST(test_packing),
        TEST(test_second_process),   TEST(test_refusals),
        TEST(test_read_only),        TEST(test_full_queue),
        TEST(test_order_of_answers), TEST(test_readers_and_writer),
        TEST(test_map_full),         TEST(test_bad_neighbour),
        TEST(test_lineage_limit),
    };
    return cmocka_run_group_tests_name("storage", tests, NULL, NULL);
}
