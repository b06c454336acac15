/* Damage on disk, and formats that are not ours: every byte of every record and of its key flipped,
 * every record taken away; `check` must notice each time and name the part, and a read must never
 * hand out what is wrong. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <lmdb.h>

#include "storage/record.h"
#include "tests/lib/store_helper.h"

/* Small sizes: a test runs over every byte. */
#define S 4u
#define KV 24u
#define LANDMARK 8u
#define SNAPSHOT 33u

/* What a problem that `check` tells of must begin with and hold, to name a record of the table. */
static const struct {
    const char *name, *part, *kind;
} dbs[] = {{"meta", "the ", "record"},
           {"memory", "memory ", ""},
           {"branch", "branch ", ""},
           {"child", "branch ", "child"},
           {"kv", "branch ", "chunk"},
           {"landmark", "branch ", "landmark"},
           {"token", "branch ", "token"},
           {"snapshot", "snapshot ", ""},
           {"turn", "branch ", "turn"},
           {"object", "the object ", ""},
           {"expiry", "memory ", "table of ends"},
           {"receipt", "the receipt ", ""},
           {"item", "the item ", "of the list of "},
           {"collect", "branch ", "to be collected"}};
#define DB_COUNT (sizeof dbs / sizeof dbs[0])
#define DB_TOLD (DB_COUNT - 3) /* nothing tells of a receipt, an item or a mark that is gone */

static struct storage *open_at(const char *path)
{
    const struct storage_options options = {.path = path,
                                            .kv_bytes = KV,
                                            .landmark_bytes = LANDMARK,
                                            .chunk_tokens = S,
                                            .model_name = "m",
                                            .map_bytes = 16 * LIMITS_MIB};
    return store_open(&options);
}

static void write_to(struct storage *storage, const char *id, uint64_t position)
{
    struct storage_memory memory;
    unsigned char kv[KV], landmark[LANDMARK], snapshot[SNAPSHOT];
    int32_t tokens[64];
    assert_int_equal(storage_memory_get(storage, id, &memory), STATUS_OK);
    storage_memory_close(&memory);
    for (uint64_t i = memory.chunk_count; i < position / S; i++) {
        store_fill(kv, KV, memory.branch, i);
        store_fill(landmark, LANDMARK, ~memory.branch, i);
        assert_int_equal(storage_append(storage, memory.branch, i, kv, landmark, NULL, NULL),
                         STATUS_OK);
    }
    for (uint64_t p = memory.token_count; p < position; p++)
        tokens[p - memory.token_count] = store_token(1, p);
    store_fill(snapshot, SNAPSHOT, memory.branch, position);
    const struct storage_receipt receipt = {.name = {1, 2, 3}, .bytes = "done", .size = 4};
    const struct storage_item item = {.id = "i", .bytes = "said", .size = 4};
    struct storage_object object = {.made_memory = true, .bytes = "kept", .size = 4};
    const struct storage_keep keep = {.object = &object, .lists = {{object.id, &item, 1}}};
    snprintf(object.id, sizeof object.id, "of_%s", id);
    snprintf(object.memory, sizeof object.memory, "%s", id);
    struct storage_commit commit = {.id = id,
                                    .receipt = &receipt,
                                    .keep = &keep,
                                    .position = position,
                                    .tokens = tokens,
                                    .token_count = (size_t)(position - memory.token_count),
                                    .snapshot = snapshot,
                                    .snapshot_bytes = SNAPSHOT};
    assert_int_equal(store_commit(storage, &commit), STATUS_OK);
}

/* ---- raw access, between openings ---- */

struct raw {
    MDB_env *env;
    MDB_txn *txn;
    MDB_dbi dbi;
};

static struct raw raw_open(const char *path, size_t db)
{
    struct raw raw;
    assert_int_equal(mdb_env_create(&raw.env), 0);
    assert_int_equal(mdb_env_set_maxdbs(raw.env, DB_COUNT), 0);
    assert_int_equal(mdb_env_open(raw.env, path, MDB_NOSYNC, 0600), 0);
    assert_int_equal(mdb_txn_begin(raw.env, NULL, 0, &raw.txn), 0);
    assert_int_equal(mdb_dbi_open(raw.txn, dbs[db].name, 0, &raw.dbi), 0);
    return raw;
}

static void raw_close(struct raw *raw)
{
    assert_int_equal(mdb_txn_commit(raw->txn), 0);
    mdb_env_close(raw->env);
}

struct record {
    unsigned char key[64], value[2048];
    size_t key_size, size;
};

/* Record `number` of a sub-database; false when there are not so many. */
static bool raw_get(const char *path, size_t db, size_t number, struct record *record)
{
    struct raw raw = raw_open(path, db);
    MDB_cursor *cursor;
    MDB_val key, value;
    assert_int_equal(mdb_cursor_open(raw.txn, raw.dbi, &cursor), 0);
    int rc = mdb_cursor_get(cursor, &key, &value, MDB_FIRST);
    for (size_t i = 0; rc == 0 && i < number; i++)
        rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT);
    if (rc == 0) {
        assert_true(key.mv_size <= sizeof record->key && value.mv_size <= sizeof record->value);
        record->key_size = key.mv_size;
        record->size = value.mv_size;
        memcpy(record->key, key.mv_data, key.mv_size);
        memcpy(record->value, value.mv_data, value.mv_size);
    }
    mdb_cursor_close(cursor);
    raw_close(&raw);
    return rc == 0;
}

static void raw_put(const char *path, size_t db, const struct record *record)
{
    struct raw raw = raw_open(path, db);
    MDB_val key = {record->key_size, (void *)(uintptr_t)record->key};
    MDB_val value = {record->size, (void *)(uintptr_t)record->value};
    assert_int_equal(mdb_put(raw.txn, raw.dbi, &key, &value, 0), 0);
    raw_close(&raw);
}

static void raw_delete(const char *path, size_t db, const struct record *record)
{
    struct raw raw = raw_open(path, db);
    MDB_val key = {record->key_size, (void *)(uintptr_t)record->key};
    assert_int_equal(mdb_del(raw.txn, raw.dbi, &key, NULL), 0);
    raw_close(&raw);
}

/* The branch of the deleted memory is to be looked at again, as after a kill. */
static void mark_for_collection(const char *path)
{
    struct record record = {.key = {0, 0, 0, 0, 0, 0, 0, 1}, .key_size = 8};
    raw_put(path, DB_COUNT - 1, &record);
}

/* A memory, a fork that went on, a fork of it that shares its snapshot, and a branch whose memory
 * is deleted but which others stand on. */
static int setup(void **state)
{
    char *path = store_helper_folder();
    struct storage *storage = open_at(path);
    assert_int_equal(store_create(storage, "gone", NULL), STATUS_OK);
    write_to(storage, "gone", 9);
    assert_int_equal(store_create(storage, "a", "gone"), STATUS_OK);
    assert_int_equal(store_remove(storage, "gone"), STATUS_OK);
    write_to(storage, "a", 18);
    assert_int_equal(store_create(storage, "b", "a"), STATUS_OK);
    struct store_wait wait;
    store_wait_init(&wait);
    const struct storage_expires expires = {.seconds = 86400};
    assert_int_equal(store_wait_finish(&wait, storage_memory_update(storage, "b", NULL, &expires,
                                                                    store_wait_cb, &wait)),
                     STATUS_OK);
    struct storage_stats stats;
    do
        storage_get_stats(storage, &stats);
    while (stats.branches_to_collect > 0);
    storage_close(storage);
    mark_for_collection(path);
    *state = path;
    return 0;
}

static int teardown(void **state)
{
    store_helper_remove(*state);
    return 0;
}

static bool is_noticed(const char *path)
{
    struct storage_check_report report;
    struct error err;
    return storage_check(path, NULL, NULL, &report, &err) != STATUS_OK || report.problems > 0;
}

/* What a problem must say to name the part that is damaged. */
struct wanted {
    size_t db;
    bool is_named;
    struct buf told;
};

static void compare_problem(void *context, const char *message)
{
    struct wanted *wanted = context;
    const char *part = dbs[wanted->db].part;
    wanted->is_named |= strncmp(message, part, strlen(part)) == 0 &&
                        strstr(message + strlen(part), dbs[wanted->db].kind) != NULL;
    buf_append_format(&wanted->told, "  %s\n", message);
}

/* `check` must tell of damage to a record of that table, by name. */
static void assert_named(const char *path, size_t db, size_t number, const char *what, size_t byte)
{
    struct storage_check_report report = {0};
    struct error err = {0};
    struct wanted wanted = {.db = db};
    buf_init(&wanted.told);
    if (storage_check(path, compare_problem, &wanted, &report, &err)) {
        compare_problem(&wanted, err.message);
        report.problems = 1;
    }
    if (!report.problems || !wanted.is_named)
        fail_msg("%s record %zu, byte %zu of its %s: %s\n%s", dbs[db].name, number, byte, what,
                 report.problems ? "not named" : "unnoticed", buf_text(&wanted.told));
    buf_close(&wanted.told);
}

/* ---- tests ---- */

static void test_every_byte(void **state)
{
    struct record record;
    size_t flips = 0, records = 0;
    assert_false(is_noticed(*state));
    for (size_t db = 0; db < DB_COUNT; db++) {
        for (size_t n = 0; raw_get(*state, db, n, &record); n++, records++) {
            for (size_t i = 0; i < record.size; i++, flips++) {
                unsigned char before = record.value[i];
                record.value[i] ^= (unsigned char)(1u << (flips % 8));
                raw_put(*state, db, &record);
                assert_named(*state, db, n, "value", i);
                record.value[i] = before;
            }
            raw_put(*state, db, &record);
        }
    }
    print_message("%zu bytes of %zu records\n", flips, records);
    assert_true(records >= 15 && flips > 1000);
    assert_false(is_noticed(*state));
}

static void test_every_byte_of_keys(void **state)
{
    struct record record;
    size_t flips = 0;
    for (size_t db = 0; db < DB_COUNT; db++) {
        size_t n = 0;
        for (; raw_get(*state, db, n, &record); n++) {
            for (size_t i = 0; i < record.key_size; i++, flips++) {
                const unsigned char bit = (unsigned char)(1u << (flips % 8));
                raw_delete(*state, db, &record);
                record.key[i] ^= bit;
                raw_put(*state, db, &record);
                if (!is_noticed(*state))
                    fail_msg("%s record %zu: byte %zu of its key changed unnoticed", dbs[db].name,
                             n, i);
                raw_delete(*state, db, &record);
                record.key[i] ^= bit;
                raw_put(*state, db, &record);
            }
        }
        if (!n)
            fail_msg("there is no %s record to damage", dbs[db].name);
    }
    print_message("%zu bytes of keys\n", flips);
    assert_false(is_noticed(*state));
}

static void test_every_record_missing(void **state)
{
    struct record record;
    for (size_t db = 0; db < DB_TOLD; db++) {
        for (size_t n = 0; raw_get(*state, db, n, &record); n++) {
            raw_delete(*state, db, &record);
            if (!is_noticed(*state))
                fail_msg("%s record %zu taken away unnoticed", dbs[db].name, n);
            raw_put(*state, db, &record);
        }
    }
    assert_false(is_noticed(*state));
}

/* A record cut short or made longer, whatever its checksum. */
static void test_every_length(void **state)
{
    struct record record;
    for (size_t db = 0; db < DB_COUNT; db++) {
        for (size_t n = 0; raw_get(*state, db, n, &record); n++) {
            size_t size = record.size;
            for (record.size = 0; record.size <= size + 8; record.size += 5) {
                memset(record.value + size, 0, 16);
                raw_put(*state, db, &record);
                if (record.size != size && !is_noticed(*state))
                    fail_msg("%s record %zu: %zu bytes for %zu unnoticed", dbs[db].name, n,
                             record.size, size);
            }
            record.size = size;
            raw_put(*state, db, &record);
        }
    }
    assert_false(is_noticed(*state));
}

/* Reads through the public door: whatever byte is wrong, a read succeeds only with right bytes,
 * and a store with one damaged memory still opens. */
static void test_reads_of_damage(void **state)
{
    static const size_t read_dbs[] = {4, 5, 6, 7};
    size_t refused = 0;
    for (size_t d = 0; d < 4; d++) {
        struct record record;
        for (size_t n = 0; raw_get(*state, read_dbs[d], n, &record); n++) {
            for (size_t i = 0; i < record.size; i += 3) {
                struct storage_range *ranges;
                size_t count, size;
                uint64_t position;
                int32_t tokens[18];
                void *snapshot;
                record.value[i] ^= 0x10;
                raw_put(*state, read_dbs[d], &record);
                struct storage *storage = open_at(*state);
                assert_int_equal(storage_lineage(storage, "a", &ranges, &count), STATUS_OK);
                for (uint64_t c = 0, r = 0; c < 18 / S; c++) {
                    unsigned char got[KV], want[KV];
                    while (r + 1 < count && c >= ranges[r + 1].first)
                        r++;
                    struct storage_read read = {ranges[r].branch, c, got};
                    enum status status = storage_read_chunks(storage, &read, 1);
                    store_fill(want, KV, ranges[r].branch, c);
                    assert_true(status == STATUS_CORRUPT ||
                                (status == STATUS_OK && memcmp(got, want, KV) == 0));
                    refused += status != STATUS_OK;
                    status = storage_read_landmarks(storage, ranges[r].branch, c, 1, got);
                    store_fill(want, LANDMARK, ~ranges[r].branch, c);
                    assert_true(status == STATUS_CORRUPT ||
                                (status == STATUS_OK && memcmp(got, want, LANDMARK) == 0));
                    refused += status != STATUS_OK;
                }
                enum status status = storage_read_tokens(storage, "a", 0, 18, tokens);
                for (uint64_t p = 0; !status && p < 18; p++)
                    assert_int_equal(tokens[p], store_token(1, p));
                assert_true(status == STATUS_OK || status == STATUS_CORRUPT);
                refused += status != STATUS_OK;
                status = storage_snapshot(storage, "a", &snapshot, &size, &position);
                assert_true(status == STATUS_OK || status == STATUS_CORRUPT);
                refused += status != STATUS_OK;
                if (!status) {
                    unsigned char want[SNAPSHOT];
                    store_fill(want, SNAPSHOT, ranges[count - 1].branch, 18);
                    assert_true(size == SNAPSHOT && position == 18);
                    assert_memory_equal(snapshot, want, SNAPSHOT);
                    free(snapshot);
                }
                free(ranges);
                storage_close(storage);
                record.value[i] ^= 0x10;
            }
            raw_put(*state, read_dbs[d], &record);
        }
    }
    assert_true(refused > 100);
}

/* A damaged memory does not keep the others from being listed. */
static void test_list_of_damage(void **state)
{
    static const struct {
        size_t db, record;
        const char *left;
    } cases[] = {{1, 0, "b "}, {1, 1, "a "}, {2, 0, "b a "}, {2, 1, "b "}, {2, 2, "a "}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct storage_memory memories[4];
        struct record record;
        char listed[64] = "";
        size_t count;
        bool more;
        assert_true(raw_get(*state, cases[i].db, cases[i].record, &record));
        record.value[record.size - 1] ^= 1;
        raw_put(*state, cases[i].db, &record);
        struct storage *storage = open_at(*state);
        assert_int_equal(storage_memory_list(storage, NULL, NULL, 4, memories, &count, &more),
                         STATUS_OK);
        for (size_t j = 0; j < count; j++) {
            strcat(strcat(listed, memories[j].id), " ");
            storage_memory_close(&memories[j]);
        }
        assert_string_equal(listed, cases[i].left);
        assert_false(more);
        storage_close(storage);
        record.value[record.size - 1] ^= 1;
        raw_put(*state, cases[i].db, &record);
    }
}

/* ---- repair ---- */

static void copy_file(const char *folder, const char *from, const char *to)
{
    char command[1200];
    snprintf(command, sizeof command, "cp %s/%s %s/%s", folder, from, folder, to);
    assert_int_equal(system(command), 0);
}

static uint64_t repair(const char *path, bool carry_out)
{
    uint64_t changes;
    struct error err = {0};
    enum status status = storage_repair(path, carry_out, NULL, NULL, &changes, &err);
    if (status)
        fail_msg("repair: %s: %s", status_text(status), err.message);
    return changes;
}

/* What is left of a memory says what it said; returns how far it goes, 0 when it is gone. */
static uint64_t read_memory(struct storage *storage, const char *id)
{
    struct storage_memory memory;
    struct storage_range *ranges;
    size_t count, size;
    uint64_t position = 0;
    int32_t tokens[18];
    void *snapshot;
    enum status status = storage_memory_get(storage, id, &memory);
    if (status == STATUS_NOT_FOUND)
        return 0;
    assert_int_equal(status, STATUS_OK);
    storage_memory_close(&memory);
    assert_true(memory.token_count <= 18);
    assert_int_equal(storage_read_tokens(storage, id, 0, (size_t)memory.token_count, tokens),
                     STATUS_OK);
    for (uint64_t p = 0; p < memory.token_count; p++)
        assert_int_equal(tokens[p], store_token(1, p));
    assert_int_equal(storage_lineage(storage, id, &ranges, &count), STATUS_OK);
    for (uint64_t c = 0, r = 0; c < memory.token_count / S; c++) {
        unsigned char got[KV], want[KV];
        while (r + 1 < count && c >= ranges[r + 1].first)
            r++;
        struct storage_read read = {ranges[r].branch, c, got};
        assert_int_equal(storage_read_chunks(storage, &read, 1), STATUS_OK);
        store_fill(want, KV, ranges[r].branch, c);
        assert_memory_equal(got, want, KV);
    }
    free(ranges);
    status = storage_snapshot(storage, id, &snapshot, &size, &position);
    assert_int_equal(status, memory.token_count ? STATUS_OK : STATUS_NOT_FOUND);
    if (!status)
        free(snapshot);
    assert_true(position == memory.token_count);
    return position;
}

/* How often damage cost nothing, cost the last turn, cost all. */
struct outcomes {
    size_t cases, kept, shortened, back, lost, refused;
};

/* The store is damaged as the caller made it: repair tells first and changes nothing, then makes it
 * whole; it opens, and what it still holds is right and goes on. */
static void repair_damage(const char *path, const char *what, size_t n, struct outcomes *outcomes)
{
    struct error err = {0};
    uint64_t changes;
    if (!is_noticed(path))
        return; /* the same bytes again */
    outcomes->cases++;
    const enum status status = storage_repair(path, false, NULL, NULL, &changes, &err);
    if (status) { /* without the first record nothing says what the others are */
        assert_string_equal(what, "meta");
        assert_true(status == STATUS_CORRUPT || status == STATUS_UNSUPPORTED);
        assert_true(is_noticed(path));
        outcomes->refused++;
        return;
    }
    if (!changes || !is_noticed(path))
        fail_msg("%s record %zu: %d changes told of", what, n, (int)changes);
    assert_true(repair(path, true) == changes);
    if (is_noticed(path))
        fail_msg("%s record %zu: not whole after the repair", what, n);
    assert_true(repair(path, false) == 0);
    struct storage *storage = open_at(path);
    const uint64_t a = read_memory(storage, "a"), b = read_memory(storage, "b");
    outcomes->kept += a == 18 && b == 18;
    outcomes->lost += a == 0 && b == 0;
    outcomes->back += a == 9 && b == 9; /* to where the deleted memory stood */
    outcomes->shortened += !(a == 18 && b == 18) && (a || b);
    struct storage_memory memory;
    if (storage_memory_get(storage, "a", &memory) == STATUS_OK) {
        storage_memory_close(&memory);
        write_to(storage, "a", 22);
    }
    storage_close(storage);
    assert_false(is_noticed(path));
}

static void test_repair(void **state)
{
    struct record record;
    struct outcomes outcomes = {0};
    assert_true(repair(*state, false) == 0);
    copy_file(*state, "data.mdb", "whole");
    for (size_t db = 0; db < DB_COUNT; db++) {
        for (size_t n = 0; raw_get(*state, db, n, &record); n++) {
            const size_t size = record.size;
            for (size_t i = n % 5; i < size; i += 5) {
                record.value[i] ^= (unsigned char)(1u << (i % 8));
                raw_put(*state, db, &record);
                repair_damage(*state, dbs[db].name, n, &outcomes);
                record.value[i] ^= (unsigned char)(1u << (i % 8));
                copy_file(*state, "whole", "data.mdb");
            }
            memset(record.value + size, 0, 16);
            for (record.size = 0; record.size <= size + 8; record.size += 13) {
                raw_put(*state, db, &record);
                repair_damage(*state, dbs[db].name, n, &outcomes);
                copy_file(*state, "whole", "data.mdb");
            }
            record.size = size;
            for (size_t i = n % 3; i < record.key_size; i += 3) {
                raw_delete(*state, db, &record);
                record.key[i] ^= (unsigned char)(1u << (i % 8));
                raw_put(*state, db, &record);
                repair_damage(*state, dbs[db].name, n, &outcomes);
                record.key[i] ^= (unsigned char)(1u << (i % 8));
                copy_file(*state, "whole", "data.mdb");
            }
            raw_delete(*state, db, &record);
            repair_damage(*state, dbs[db].name, n, &outcomes);
            copy_file(*state, "whole", "data.mdb");
        }
    }
    print_message("%zu damaged stores: %zu kept all, %zu lost a part, %zu both memories, %zu have "
                  "no first record\n",
                  outcomes.cases, outcomes.kept, outcomes.shortened, outcomes.lost,
                  outcomes.refused);
    assert_true(outcomes.kept > 50 && outcomes.shortened > 50 && outcomes.back > 20 &&
                outcomes.refused > 5);
    assert_false(is_noticed(*state));
}

/* ---- formats ---- */

/* The first record says another format. */
static void set_format(const char *path, uint32_t format)
{
    static const char key[] = "format";
    struct record record = {.key_size = sizeof key - 1};
    struct record_meta meta;
    struct raw raw = raw_open(path, 0);
    MDB_val k = {sizeof key - 1, (void *)(uintptr_t)key}, value;
    struct buf buf;
    assert_int_equal(mdb_get(raw.txn, raw.dbi, &k, &value), 0);
    assert_int_equal(record_meta_decode(key, sizeof key - 1, value.mv_data, value.mv_size, &meta),
                     STATUS_OK);
    raw_close(&raw);
    meta.format = format;
    buf_init(&buf);
    record_meta_encode(&buf, key, sizeof key - 1, &meta);
    memcpy(record.key, key, sizeof key - 1);
    memcpy(record.value, buf.data, buf.size);
    record.size = buf.size;
    raw_put(path, 0, &record);
    buf_close(&buf);
}

static void drop_table(const char *path, const char *name)
{
    for (size_t db = 0; db < DB_COUNT; db++) {
        if (strcmp(dbs[db].name, name) != 0)
            continue;
        struct raw raw = raw_open(path, db);
        assert_int_equal(mdb_drop(raw.txn, raw.dbi, 1), 0);
        raw_close(&raw);
    }
}

/* A store of each older format: it lacks the tables that came later. What it holds is there when it
 * is opened, and a marker says what was done. (Format 1 has records of its own: see storage_turns.)
 */
static void test_older_formats(void **state)
{
    static const struct {
        uint32_t format;
        const char *lacks[4];
    } formats[] = {{2, {"receipt", "object", "item", "expiry"}},
                   {3, {"receipt", "object", "item", "expiry"}},
                   {4, {"object", "item", "expiry"}},
                   {5, {"expiry"}},
                   {6, {NULL}}};
    char path[1200], text[64];
    struct storage *storage = open_at(*state);
    struct store_wait wait;
    store_wait_init(&wait);
    const struct storage_expires never = {0};
    assert_int_equal(store_wait_finish(&wait, storage_memory_update(storage, "b", NULL, &never,
                                                                    store_wait_cb, &wait)),
                     STATUS_OK);
    storage_close(storage);
    copy_file(*state, "data.mdb", "whole");
    assert_int_equal(formats[sizeof formats / sizeof *formats - 1].format, RECORD_FORMAT - 1);
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++) {
        struct storage_check_report report;
        struct error err = {0};
        copy_file(*state, "whole", "data.mdb");
        for (size_t t = 0; t < 4 && formats[i].lacks[t]; t++)
            drop_table(*state, formats[i].lacks[t]);
        set_format(*state, formats[i].format);
        assert_int_equal(storage_check(*state, NULL, NULL, &report, &err), STATUS_UNSUPPORTED);
        assert_non_null(strstr(err.message, "rambad serve brings it"));
        storage = open_at(*state);
        assert_int_equal(read_memory(storage, "a"), 18);
        assert_int_equal(read_memory(storage, "b"), 18);
        write_to(storage, "a", 22); /* with a receipt, an object and its item */
        storage_close(storage);
        assert_false(is_noticed(*state));
        snprintf(path, sizeof path, "%s/MIGRATED-FROM-%u", (char *)*state, formats[i].format);
        FILE *marker = fopen(path, "r");
        assert_non_null(marker);
        assert_non_null(fgets(text, sizeof text, marker));
        fclose(marker);
        assert_int_equal(remove(path), 0);
        storage_close(open_at(*state)); /* once is enough */
        assert_null(fopen(path, "r"));
    }
}

/* A newer one is refused by whoever comes, and left as it is. */
static void test_newer_format(void **state)
{
    struct storage_options options = {.path = *state,
                                      .kv_bytes = KV,
                                      .landmark_bytes = LANDMARK,
                                      .chunk_tokens = S,
                                      .model_name = "m"};
    struct storage_check_report report;
    struct storage *storage;
    uint64_t changes;
    char command[2400];
    struct error errors[3] = {0};
    set_format(*state, RECORD_FORMAT + 1);
    copy_file(*state, "data.mdb", "newer");
    assert_int_equal(storage_open(&options, &storage, &errors[0]), STATUS_UNSUPPORTED);
    assert_int_equal(storage_check(*state, NULL, NULL, &report, &errors[1]), STATUS_UNSUPPORTED);
    assert_int_equal(storage_repair(*state, true, NULL, NULL, &changes, &errors[2]),
                     STATUS_UNSUPPORTED);
    for (int i = 0; i < 3; i++)
        assert_non_null(strstr(errors[i].message, "newer than this program's"));
    snprintf(command, sizeof command, "cmp %s/data.mdb %s/newer", (char *)*state, (char *)*state);
    assert_int_equal(system(command), 0);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_every_byte),   TEST(test_every_byte_of_keys), TEST(test_every_record_missing),
        TEST(test_every_length), TEST(test_reads_of_damage),    TEST(test_list_of_damage),
        TEST(test_repair),       TEST(test_older_formats),      TEST(test_newer_format),
    };
    return cmocka_run_group_tests_name("storage_damage", tests, NULL, NULL);
}
