/* Receipts: there with the write and only with it, found again after a restart, gone when old. */
#include <lmdb.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "storage/record.h"
#include "tests/lib/store_helper.h"
#include "tests/lib/store_past.h"

/* Receipt `index`, which says its text. */
static struct storage_receipt receipt_of(uint64_t index, const char *text)
{
    struct storage_receipt receipt = {.bytes = text, .size = strlen(text)};
    store_fill(receipt.name, sizeof receipt.name, 77, index);
    return receipt;
}

/* NULL: there is none. */
static void assert_receipt(struct storage *storage, uint64_t index, const char *text)
{
    const struct storage_receipt name = receipt_of(index, "");
    void *bytes;
    size_t size;
    const enum status status = storage_receipt_get(storage, name.name, &bytes, &size);
    assert_int_equal(status, text ? STATUS_OK : STATUS_NOT_FOUND);
    if (status || !text)
        return;
    assert_string_equal(bytes, text);
    assert_int_equal(size, strlen(text));
    free(bytes);
}

static enum status create(struct storage *storage, const char *id, const char *from, uint64_t index,
                          const char *text)
{
    const struct storage_receipt receipt = receipt_of(index, text);
    const struct storage_memory_options options = {.id = id, .from = from, .receipt = &receipt};
    struct store_wait wait;
    store_wait_init(&wait);
    return store_wait_finish(&wait, storage_memory_create(storage, &options, store_wait_cb, &wait));
}

static enum status commit(struct storage *storage, uint64_t position, size_t token_count,
                          uint64_t index, const char *text)
{
    static const int32_t tokens[STORE_PAST_CHUNK] = {1, 2, 3, 4};
    const struct storage_receipt receipt = receipt_of(index, text);
    const struct storage_commit write = {.id = "a",
                                         .position = position,
                                         .tokens = tokens,
                                         .token_count = token_count,
                                         .text_bytes = position,
                                         .snapshot = "snapshot",
                                         .snapshot_bytes = 8,
                                         .receipt = &receipt};
    return store_commit(storage, &write);
}

static void test_with_its_write(void **state)
{
    struct storage *storage = store_past_open(*state);
    assert_receipt(storage, 1, NULL);
    assert_int_equal(create(storage, "a", NULL, 1, "made a"), STATUS_OK);
    assert_int_equal(create(storage, "a", NULL, 2, "made another"), STATUS_CONFLICT);
    assert_int_equal(create(storage, "b", "none", 3, "made b"), STATUS_NOT_FOUND);
    assert_receipt(storage, 1, "made a");
    assert_receipt(storage, 2, NULL);
    assert_receipt(storage, 3, NULL);
    assert_int_equal(commit(storage, 3, 3, 4, "three"), STATUS_OK);
    assert_int_equal(commit(storage, 5, 1, 5, "a hole"), STATUS_CONFLICT);
    assert_int_equal(store_truncate(storage, "a"), STATUS_OK);
    assert_int_equal(commit(storage, 5, 2, 4, "five"), STATUS_OK); /* in place of the older one */
    assert_int_equal(commit(storage, 6, 1, 6, ""), STATUS_OK);
    assert_receipt(storage, 5, NULL);
    storage_close(storage);
    store_past_check(*state);
    storage = store_past_open(*state);
    assert_receipt(storage, 1, "made a");
    assert_receipt(storage, 4, "five");
    assert_receipt(storage, 5, NULL);
    assert_receipt(storage, 6, "");
    /* It outlives its memory: that it was made stays true. */
    assert_int_equal(store_remove(storage, "a"), STATUS_OK);
    assert_receipt(storage, 1, "made a");
    storage_close(storage);
    store_past_check(*state);
}

#define OLD 100

/* The table `name` of the closed store, to be written behind storage's back. */
static MDB_env *open_raw(const char *path, const char *name, MDB_txn **txn, MDB_dbi *db)
{
    char file[1024];
    MDB_env *env;
    snprintf(file, sizeof file, "%s/data.mdb", path);
    assert_int_equal(mdb_env_create(&env), 0);
    assert_int_equal(mdb_env_set_maxdbs(env, 16), 0);
    assert_int_equal(mdb_env_set_mapsize(env, (size_t)64 << 20), 0);
    assert_int_equal(mdb_env_open(env, file, MDB_NOSUBDIR | MDB_NOLOCK, 0600), 0);
    assert_int_equal(mdb_txn_begin(env, NULL, 0, txn), 0);
    assert_int_equal(mdb_dbi_open(*txn, name, 0, db), 0);
    return env;
}

/* Puts receipts into the closed store, or counts those that are there. */
static size_t old_receipts(const char *path, bool put, int64_t created_at)
{
    MDB_txn *txn;
    MDB_dbi db;
    MDB_stat stat;
    MDB_env *env = open_raw(path, "receipt", &txn, &db);
    for (uint64_t i = 0; put && i < OLD; i++) {
        const struct storage_receipt name = receipt_of(i, "");
        const struct record_receipt record = {
            .created_at = created_at, .bytes = (const unsigned char *)"old", .size = 3};
        struct buf buf;
        buf_init(&buf);
        record_receipt_encode(&buf, name.name, sizeof name.name, &record);
        MDB_val key = {sizeof name.name, (void *)(uintptr_t)name.name};
        MDB_val value = {buf.size, buf.data};
        assert_int_equal(mdb_put(txn, db, &key, &value, 0), 0);
        buf_close(&buf);
    }
    assert_int_equal(mdb_stat(txn, db, &stat), 0);
    assert_int_equal(mdb_txn_commit(txn), 0);
    mdb_env_close(env);
    return stat.ms_entries;
}

static void test_old(void **state)
{
    struct storage *storage = store_past_open(*state);
    char id[16];
    storage_close(storage);
    const int64_t now = (int64_t)time(NULL);
    assert_int_equal(old_receipts(*state, true, now - LIMITS_RECEIPT_S + 600), OLD);
    storage = store_past_open(*state);
    assert_receipt(storage, 3, "old"); /* not yet */
    storage_close(storage);
    assert_int_equal(old_receipts(*state, true, now - LIMITS_RECEIPT_S - 600), OLD);
    storage = store_past_open(*state);
    assert_receipt(storage, 3, NULL);
    /* New ones sweep the old ones out, and nothing else. */
    for (uint64_t i = 0; i < OLD; i++) {
        snprintf(id, sizeof id, "m%d", (int)i);
        assert_int_equal(create(storage, id, NULL, 1000 + i, id), STATUS_OK);
    }
    for (uint64_t i = 0; i < OLD; i++) {
        snprintf(id, sizeof id, "m%d", (int)i);
        assert_receipt(storage, 1000 + i, id);
    }
    storage_close(storage);
    store_past_check(*state);
    assert_in_range(old_receipts(*state, false, 0), OLD, OLD + OLD / 10);
}

/* Every snapshot of the closed store is gone. */
static void lose_snapshots(const char *path)
{
    MDB_txn *txn;
    MDB_dbi db;
    MDB_env *env = open_raw(path, "snapshot", &txn, &db);
    assert_int_equal(mdb_drop(txn, db, 0), 0);
    assert_int_equal(mdb_txn_commit(txn), 0);
    mdb_env_close(env);
}

/* A repair that takes words away takes the receipts too: they would tell a retry that its words are
 * there. */
static void test_repair(void **state)
{
    struct error err;
    uint64_t changes;
    struct storage *storage = store_past_open(*state);
    assert_int_equal(create(storage, "a", NULL, 1, "made a"), STATUS_OK);
    assert_int_equal(commit(storage, 3, 3, 2, "three"), STATUS_OK);
    storage_close(storage);
    assert_int_equal(storage_repair(*state, true, NULL, NULL, &changes, &err), STATUS_OK);
    assert_int_equal(changes, 0);
    storage = store_past_open(*state);
    assert_receipt(storage, 1, "made a");
    assert_receipt(storage, 2, "three");
    storage_close(storage);

    lose_snapshots(*state);
    assert_int_equal(storage_repair(*state, true, NULL, NULL, &changes, &err), STATUS_OK);
    assert_true(changes > 0);
    store_past_check(*state);
    storage = store_past_open(*state);
    assert_receipt(storage, 1, NULL);
    assert_receipt(storage, 2, NULL);
    storage_close(storage);
}

int main(void)
{
    const struct CMUnitTest tests[] = {STORE_TEST(test_with_its_write), STORE_TEST(test_old),
                                       STORE_TEST(test_repair)};
    return cmocka_run_group_tests_name("storage_receipt", tests, NULL, NULL);
}
