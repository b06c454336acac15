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

#include "tests/lib/store_tree.h"

#define S STORE_TREE_CHUNK
#define KV STORE_TREE_KV
#define LANDMARK STORE_TREE_LANDMARK

/* ---- tests ---- */

static void test_round_trip(void **state)
{
    struct storage *storage = store_tree_open(*state);
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    struct storage_memory memory;
    assert_int_equal(storage_memory_get(storage, "a", &memory), STATUS_OK);
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
        store_tree_write(storage, "a", p);
        store_tree_assert(storage, "a", &(struct store_segment){branch, p}, 1);
        if (p % 2) { /* and what is on disk is what was in the process */
            storage_close(storage);
            storage = store_tree_open(*state);
            store_tree_assert(storage, "a", &(struct store_segment){branch, p}, 1);
        }
    }
    storage_close(storage);
    struct storage_check_report report = store_past_check(*state);
    assert_int_equal(report.memories, 1);
    assert_int_equal(report.snapshots, LIMITS_KEEP_SNAPSHOTS);
}

static void test_bad_calls(void **state)
{
    struct storage *storage = store_tree_open(*state);
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
    store_past_check(*state);
}

static void test_metadata(void **state)
{
    struct storage *storage = store_tree_open(*state);
    struct storage_memory_options options = {.id = "m", .metadata = "{\"a\":\"b\"}"};
    struct store_wait wait;
    store_wait_init(&wait);
    assert_int_equal(
        store_wait_finish(&wait, storage_memory_create(storage, &options, store_wait_cb, &wait)),
        STATUS_OK);
    store_tree_write(storage, "m", 20);
    struct storage_memory memory;
    assert_int_equal(storage_memory_get(storage, "m", &memory), STATUS_OK);
    assert_string_equal(memory.metadata, "{\"a\":\"b\"}");
    storage_memory_close(&memory);
    char *large = calloc(1, ((size_t)128 << 10) + 2);
    memset(large, 'm', (size_t)128 << 10);
    store_wait_init(&wait);
    assert_int_equal(store_wait_finish(&wait, storage_memory_update(storage, "m", large, NULL,
                                                                    store_wait_cb, &wait)),
                     STATUS_OK);
    store_tree_write(storage, "m", 40);
    assert_int_equal(storage_memory_get(storage, "m", &memory), STATUS_OK);
    assert_string_equal(memory.metadata, large);
    storage_memory_close(&memory);
    large[(size_t)128 << 10] = 'x';
    assert_int_equal(storage_memory_update(storage, "m", large, NULL, NULL, NULL),
                     STATUS_TOO_LARGE);
    free(large);
    storage_close(storage);
    store_past_check(*state);
}

/* A hole, a repeat or anything after it fails until the truncate; then it goes on as if nothing
 * had been. */
static void test_order_of_appends(void **state)
{
    struct storage *storage = store_tree_open(*state);
    unsigned char kv[KV] = {0}, landmark[LANDMARK] = {0};
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    assert_int_equal(store_create(storage, "b", NULL), STATUS_OK);
    uint64_t branch = store_tree_branch(storage, "a"), other = store_tree_branch(storage, "b");
    store_tree_write(storage, "a", 3 * S);
    assert_int_equal(store_tree_append(storage, branch, 3, 5), STATUS_OK);
    assert_int_equal(store_append(storage, branch, 6, kv, landmark), STATUS_INVALID);
    assert_int_equal(store_append(storage, branch, 5, kv, landmark), STATUS_IO);
    assert_int_equal(store_tree_commit(storage, "a", 4 * S), STATUS_IO);
    store_tree_write(storage, "b", 5 * S); /* its neighbour does not care */
    store_tree_assert(storage, "a", &(struct store_segment){branch, 3 * S}, 1);
    assert_int_equal(store_truncate(storage, "a"), STATUS_OK);
    unsigned char got[KV];
    struct storage_read read = {branch, 3, got};
    assert_int_equal(storage_read_chunks(storage, &read, 1), STATUS_CORRUPT); /* dropped */
    assert_int_equal(store_append(storage, branch, 2, kv, landmark), STATUS_INVALID);
    assert_int_equal(store_truncate(storage, "a"), STATUS_OK);
    store_tree_write(storage, "a", 6 * S + 1);
    /* A commit cannot cover a chunk that was never appended. */
    assert_int_equal(store_tree_commit(storage, "a", 7 * S), STATUS_INVALID);
    assert_int_equal(store_truncate(storage, "a"), STATUS_OK);
    store_tree_assert(storage, "a", &(struct store_segment){branch, 6 * S + 1}, 1);
    store_tree_assert(storage, "b", &(struct store_segment){other, 5 * S}, 1);
    storage_close(storage);
    store_past_check(*state);
}

static void test_forks_of_forks(void **state)
{
    struct storage *storage = store_tree_open(*state);
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    uint64_t a = store_tree_branch(storage, "a");
    store_tree_write(storage, "a", 100); /* within chunk 12 */
    assert_int_equal(store_create(storage, "b", "a"), STATUS_OK);
    uint64_t b = store_tree_branch(storage, "b");
    struct storage_memory memory = store_past_get(storage, "b");
    assert_string_equal(memory.parent, "a");
    assert_int_equal(memory.bytes_on_disk, 0); /* a fork takes nothing */
    assert_int_equal(memory.token_count, 100);
    store_tree_write(storage, "a", 300); /* the parent goes on, with a chunk 12 of its own */
    store_tree_write(storage, "b", 102); /* and the child stays in that chunk */
    assert_int_equal(store_create(storage, "c", "b"), STATUS_OK);
    uint64_t c = store_tree_branch(storage, "c");
    store_tree_write(storage, "c", 217);
    store_tree_write(storage, "b", 500);
    assert_int_equal(store_create(storage, "d", "c"), STATUS_OK); /* nothing of its own */
    assert_int_equal(store_create(storage, "e", "d"), STATUS_OK);
    uint64_t e = store_tree_branch(storage, "e");
    store_tree_write(storage, "e", 218);
    const struct store_segment in_a[] = {{a, 300}}, in_b[] = {{a, 100}, {b, 500}};
    const struct store_segment in_c[] = {{a, 100}, {b, 102}, {c, 217}};
    const struct store_segment in_e[] = {{a, 100}, {b, 102}, {c, 217}, {e, 218}};
    for (int again = 0; again < 2; again++) {
        store_tree_assert(storage, "a", in_a, 1);
        store_tree_assert(storage, "b", in_b, 2);
        store_tree_assert(storage, "c", in_c, 3);
        store_tree_assert(storage, "e", in_e, 4);
        struct storage_range *ranges;
        size_t count;
        assert_int_equal(storage_lineage(storage, "d", &ranges, &count), STATUS_OK);
        assert_int_equal(ranges[count - 1].branch, store_tree_branch(storage, "d"));
        assert_int_equal(ranges[count - 1].first, 217 / S);
        free(ranges);
        storage_close(storage);
        storage = store_tree_open(*state);
    }
    storage_close(storage);
    store_past_check(*state);
}

/* Every order of deleting four memories of one tree; after each delete the others are whole, and
 * after the last one the store is empty. */
static void test_delete_orders(void **state)
{
    static const char *const ids[4] = {"a", "b", "c", "d"};
    for (int order = 0; order < 24; order++) {
        struct storage *storage = store_tree_open(*state);
        int left[4] = {0, 1, 2, 3}, code = order;
        assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
        store_tree_write(storage, "a", 700);
        assert_int_equal(store_create(storage, "b", "a"), STATUS_OK);
        store_tree_write(storage, "a", 900);
        store_tree_write(storage, "b", 1000);
        assert_int_equal(store_create(storage, "c", "b"), STATUS_OK);
        store_tree_write(storage, "b", 1003);
        store_tree_write(storage, "c", 1017);
        assert_int_equal(store_create(storage, "d", "a"), STATUS_OK);
        uint64_t a = store_tree_branch(storage, "a"), b = store_tree_branch(storage, "b");
        uint64_t c = store_tree_branch(storage, "c");
        const struct store_segment segments[4][3] = {
            {{a, 900}}, {{a, 700}, {b, 1003}}, {{a, 700}, {b, 1000}, {c, 1017}}, {{a, 900}}};
        const size_t counts[4] = {1, 2, 3, 1};
        for (int alive = 4; alive > 0; alive--) {
            int which = code % alive;
            code /= alive;
            assert_int_equal(store_remove(storage, ids[left[which]]), STATUS_OK);
            memmove(left + which, left + which + 1, sizeof *left * (size_t)(alive - 1 - which));
            store_wait_collected(storage);
            for (int i = 0; i < alive - 1; i++)
                store_tree_assert(storage, ids[left[i]], segments[left[i]], counts[left[i]]);
            storage_close(storage);
            store_past_check(*state);
            storage = store_tree_open(*state);
        }
        storage_close(storage);
        struct storage_check_report report = store_past_check(*state);
        assert_int_equal(report.branches, 0);
        assert_int_equal(report.chunks, 0);
        assert_int_equal(report.tokens, 0);
        assert_int_equal(report.snapshots, 0);
    }
}

/* What lies past the commit, and what was ephemeral, is gone at the next opening. */
static void test_recovery(void **state)
{
    struct storage *storage = store_tree_open(*state);
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    uint64_t a = store_tree_branch(storage, "a");
    store_tree_write(storage, "a", 77);
    assert_int_equal(store_tree_append(storage, a, 9, 400), STATUS_OK); /* never committed */
    assert_int_equal(store_create_ephemeral(storage, "e", "a"), STATUS_OK);
    store_tree_write(storage, "e", 150);
    assert_int_equal(store_create(storage, "f", "e"), STATUS_OK); /* keeps what it needs of it */
    uint64_t e = store_tree_branch(storage, "e"), f = store_tree_branch(storage, "f");
    store_tree_write(storage, "e", 300);
    store_tree_write(storage, "f", 160);
    for (int i = 0; i < 600; i++) { /* more than one batch of the recovery */
        char id[16];
        snprintf(id, sizeof id, "gone%d", i);
        assert_int_equal(
            storage_memory_create(
                storage, &(struct storage_memory_options){.id = id, .ephemeral = true}, NULL, NULL),
            STATUS_OK);
    }
    storage_close(storage);
    storage = store_tree_open(*state);
    struct storage_memory memory;
    assert_int_equal(storage_memory_get(storage, "e", &memory), STATUS_NOT_FOUND);
    assert_int_equal(storage_memory_get(storage, "gone599", &memory), STATUS_NOT_FOUND);
    unsigned char got[KV];
    struct storage_read read = {a, 9, got};
    assert_int_equal(storage_read_chunks(storage, &read, 1), STATUS_CORRUPT);
    const struct store_segment in_f[] = {{a, 77}, {e, 150}, {f, 160}};
    store_wait_collected(storage);
    store_tree_assert(storage, "f", in_f, 3);
    store_tree_write(storage, "a", 90);
    store_tree_assert(storage, "a", &(struct store_segment){a, 90}, 1);
    struct storage_stats stats;
    storage_get_stats(storage, &stats);
    assert_int_equal(stats.memories, 2);
    storage_close(storage);
    struct storage_check_report report = store_past_check(*state);
    assert_int_equal(report.branches, 3);
    assert_int_equal(report.tokens, 90 + (150 - 77) + (160 - 150));
}

static void test_list(void **state)
{
    struct storage *storage = store_tree_open(*state);
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
    struct storage *storage = store_tree_open(*state);
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
    assert_int_equal(store_replace(storage, "e", "m4"), STATUS_OK);
    storage_close(storage);
    storage = store_tree_open(*state);
    assert_listed(storage, "ann", NULL, 2, true, "fork m6");
    assert_listed(storage, "ann", "m6", 7, false, "m3 m0");
    assert_listed(storage, "bob", NULL, 7, false, "m4 m7 m1");
    assert_listed(storage, "", NULL, 7, false, "m8 m5 m2");
    assert_listed(storage, "eve", NULL, 7, false, "");
    assert_int_equal(storage_memory_list(storage, "bob", "m6", 7, page, &count, &more),
                     STATUS_NOT_FOUND);
    storage_close(storage);
    store_past_check(*state);
}

/* Short turns must not cost a page or more for every few bytes. */
static void test_packing(void **state)
{
    struct storage *storage = store_tree_open(*state);
    assert_int_equal(store_create(storage, "long", NULL), STATUS_OK);
    assert_int_equal(store_create(storage, "turns", NULL), STATUS_OK);
    const uint64_t tokens = 40000;
    for (uint64_t p = 5000; p <= tokens; p += 5000)
        store_tree_write(storage, "long", p);
    for (uint64_t p = 100; p <= tokens; p += 100)
        store_tree_write(storage, "turns", p);
    const char *const ids[2] = {"long", "turns"};
    for (int i = 0; i < 2; i++) {
        struct storage_memory memory = store_past_get(storage, ids[i]);
        double payload = (double)(tokens / S * (KV + LANDMARK) + tokens * 4);
        double ratio = (double)(memory.bytes_on_disk - 8192) / payload; /* the snapshot's pages */
        print_message("%s: %.3f bytes on disk for each of payload\n", ids[i], ratio);
        assert_true(ratio < 1.10);
    }
    storage_close(storage);
    store_past_check(*state);
}

static void test_second_process(void **state)
{
    struct storage_options options = store_tree_options(*state);
    struct storage *storage = store_tree_open(*state), *second = NULL;
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
    storage_close(store_tree_open(*state));
}

static void test_refusals(void **state)
{
    struct storage_options options = store_tree_options(*state);
    struct storage *storage;
    struct storage_check_report report;
    struct error err = {0};
    char path[1200];
    assert_int_equal(storage_check(*state, NULL, NULL, &report, &err), STATUS_NOT_FOUND);
    storage_close(store_tree_open(*state));
    options.model_fingerprint++;
    options.model_name = "another-model";
    assert_int_equal(storage_open(&options, &storage, &err), STATUS_MISMATCH);
    assert_non_null(strstr(err.message, "test-model"));
    assert_non_null(strstr(err.message, "another-model"));
    options = store_tree_options(*state);
    options.kv_bytes += 2;
    assert_int_equal(storage_open(&options, &storage, &err), STATUS_MISMATCH);
    options.kv_bytes = 0;
    assert_int_equal(storage_open(&options, &storage, &err), STATUS_INVALID);
    options = store_tree_options(*state);
    options.map_bytes = 4096;
    assert_int_equal(storage_open(&options, &storage, &err), STATUS_INVALID);
    /* A path that cannot be a folder, whoever runs this. */
    snprintf(path, sizeof path, "%s/file", (char *)*state);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fclose(file);
    options = store_tree_options(path);
    assert_int_equal(storage_open(&options, &storage, &err), STATUS_IO);
    assert_non_null(strstr(err.message, path));
    snprintf(path, sizeof path, "%s/missing/folder", (char *)*state);
    options = store_tree_options(path);
    assert_int_equal(storage_open(&options, &storage, &err), STATUS_NOT_FOUND);
    if (geteuid() == 0) {
        print_message("read-only folder: skipped, root may write anywhere\n");
    } else {
        options = store_tree_options(*state);
        assert_int_equal(chmod(*state, 0500), 0);
        assert_int_equal(storage_open(&options, &storage, &err), STATUS_IO);
        assert_int_equal(chmod(*state, 0700), 0);
    }
    storage_close(store_tree_open(*state)); /* none of that hurt it */
}

static void test_read_only(void **state)
{
    struct storage *storage = store_tree_open(*state);
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    uint64_t a = store_tree_branch(storage, "a");
    store_tree_write(storage, "a", 100);
    storage_close(storage);
    struct storage_options options = store_tree_options(*state);
    options.read_only = true;
    struct error err = {0};
    assert_int_equal(storage_open(&options, &storage, &err), STATUS_OK);
    store_tree_assert(storage, "a", &(struct store_segment){a, 100}, 1);
    assert_int_equal(store_create(storage, "b", NULL), STATUS_CLOSED);
    assert_int_equal(storage_append_room(storage), 0);
    storage_close(storage);
}

static void test_lineage_limit(void **state)
{
    struct storage *storage = store_tree_open(*state);
    char id[2][16] = {"f0", ""};
    assert_int_equal(store_create(storage, id[0], NULL), STATUS_OK);
    int i = 0;
    enum status status = STATUS_OK;
    uint64_t root = store_tree_branch(storage, id[0]);
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
    store_past_check(*state);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        STORE_TEST(test_round_trip),     STORE_TEST(test_bad_calls),
        STORE_TEST(test_metadata),       STORE_TEST(test_order_of_appends),
        STORE_TEST(test_forks_of_forks), STORE_TEST(test_delete_orders),
        STORE_TEST(test_recovery),       STORE_TEST(test_list),
        STORE_TEST(test_tenants),        STORE_TEST(test_packing),
        STORE_TEST(test_second_process), STORE_TEST(test_refusals),
        STORE_TEST(test_read_only),      STORE_TEST(test_lineage_limit),
    };
    return cmocka_run_group_tests_name("storage", tests, NULL, NULL);
}
