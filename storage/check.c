#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "storage/branch.h"
#include "storage/memory.h"
#include "storage/quota.h"
#include "storage/run.h"
#include "storage/snapshot.h"
#include "storage/turn.h"

struct check {
    struct storage *storage;
    MDB_txn *txn;
    struct storage_check_report *report;
    void (*problem_cb)(void *context, const char *message);
    void *context;
    struct record_counter counter;
    /* Snapshots that memories and turns name, for counting references: 8 bytes each. */
    uint64_t *snapshots;
    size_t snapshot_count;
};

static void __attribute__((format(printf, 2, 3)))
problem(struct check *check, const char *format, ...)
{
    char message[512];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    check->report->problems++;
    if (check->problem_cb)
        check->problem_cb(check->context, message);
}

/* Calls `each` for every entry of a sub-database. */
static enum status walk(struct check *check, enum store_db db,
                        void (*each)(struct check *check, const MDB_val *key, const MDB_val *value))
{
    MDB_cursor *cursor;
    MDB_val key, value;
    int rc = mdb_cursor_open(check->txn, check->storage->db[db], &cursor);
    if (rc)
        return store_status(rc);
    while ((rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)) == 0) {
        check->report->bytes += value.mv_size;
        each(check, &key, &value);
    }
    mdb_cursor_close(cursor);
    return rc == MDB_NOTFOUND ? STATUS_OK : store_status(rc);
}

/* ---- memories ---- */

static void check_end(struct check *check, const char *id, const struct record_memory *memory)
{
    unsigned char key[EXPIRY_KEY_BYTES];
    const int64_t end = expiry_end(memory);
    MDB_val value;
    if (end &&
        store_get(check->storage, check->txn, STORE_EXPIRY, key, expiry_key(key, end, id), &value))
        problem(check, "memory %s: its end at %" PRId64 " is not in the table of ends", id, end);
}

static void check_expiry(struct check *check, const MDB_val *key, const MDB_val *value)
{
    struct record_memory memory;
    char id[LIMITS_ID_BYTES] = "";
    if (key->mv_size <= 8 || key->mv_size >= EXPIRY_KEY_BYTES) {
        problem(check, "an entry of the table of ends is damaged");
        return;
    }
    memcpy(id, (const char *)key->mv_data + 8, key->mv_size - 8);
    if (value->mv_size)
        problem(check, "memory %s: its entry in the table of ends is damaged", id);
    if (memory_get(check->storage, check->txn, id, &memory) ||
        (uint64_t)expiry_end(&memory) != record_key_read(key->mv_data))
        problem(check, "memory %s: its entry in the table of ends is another's", id);
}

static void check_standing(struct check *check, const char *id, const struct record_memory *memory)
{
    struct record_branch branch;
    struct record_snapshot snapshot;
    enum status status = branch_get(check->storage, check->txn, memory->branch, &branch);
    if (status) {
        problem(check, "memory %s: its branch %" PRIu64 " is %s", id, memory->branch,
                status == STATUS_NOT_FOUND ? "missing" : "damaged");
        return;
    }
    if (strcmp(branch.owner, id) != 0)
        problem(check, "memory %s: its branch %" PRIu64 " belongs to \"%s\"", id, memory->branch,
                branch.owner);
    if (strcmp(branch.tenant, quota_tenant(id, memory->tenant)) != 0)
        problem(check, "memory %s: its branch %" PRIu64 " counts for \"%s\"", id, memory->branch,
                branch.tenant);
    if (branch.token_end < memory->position ||
        branch.chunk_end < memory->position / check->storage->chunk_tokens)
        problem(check,
                "memory %s: committed to %" PRIu64 ", but branch %" PRIu64 " ends at token %" PRIu64
                ", chunk %" PRIu64,
                id, memory->position, memory->branch, branch.token_end, branch.chunk_end);
    if (memory->snapshot == 0) {
        if (memory->position > 0)
            problem(check, "memory %s: committed to %" PRIu64 " without a snapshot", id,
                    memory->position);
        return;
    }
    status = snapshot_get(check->storage, check->txn, memory->snapshot, &snapshot);
    if (status)
        problem(check, "memory %s: its snapshot %" PRIu64 " is %s", id, memory->snapshot,
                status == STATUS_NOT_FOUND ? "missing" : "damaged");
    else if (snapshot.position != memory->position)
        problem(check, "memory %s: committed to %" PRIu64 ", but its snapshot stands at %" PRIu64,
                id, memory->position, snapshot.position);
    struct record_turn turn;
    if (!memory->ephemeral && memory->position > branch.fork_position &&
        turn_get(check->storage, check->txn, memory->branch, memory->position, &turn) ==
            STATUS_NOT_FOUND)
        problem(check, "memory %s: stands at no turn", id);
}

static void check_memory(struct check *check, const MDB_val *key, const MDB_val *value)
{
    struct record_memory memory;
    char id[LIMITS_ID_BYTES];
    check->report->memories++;
    if (key->mv_size >= sizeof id) {
        problem(check, "a memory's id of %zu bytes", key->mv_size);
        return;
    }
    memcpy(id, key->mv_data, key->mv_size);
    id[key->mv_size] = 0;
    if (record_memory_decode(key->mv_data, key->mv_size, value->mv_data, value->mv_size, &memory)) {
        problem(check, "memory %s: its record is damaged", id);
        return;
    }
    check_standing(check, id, &memory);
    check_end(check, id, &memory);
    if (memory.snapshot && check->snapshots)
        check->snapshots[check->snapshot_count++] = memory.snapshot;
}

/* ---- branches ---- */

/* The runs of one kind: whole, without a hole from `first` on. `*end` is where they end. */
static enum status check_runs(struct check *check, enum store_db db, uint64_t branch,
                              uint64_t first, uint64_t *end, uint64_t *space)
{
    struct run_shape shape = run_shape_of(check->storage, db);
    static const char *const names[] = {
        [STORE_KV] = "chunk", [STORE_LANDMARK] = "landmark", [STORE_TOKEN] = "token"};
    unsigned char from[RECORD_PAIR_KEY_BYTES];
    MDB_cursor *cursor;
    MDB_val key = {sizeof from, from}, value;
    int rc = mdb_cursor_open(check->txn, check->storage->db[db], &cursor);
    if (rc)
        return store_status(rc);
    *end = first;
    record_pair_key(from, branch, 0);
    for (rc = mdb_cursor_get(cursor, &key, &value, MDB_SET_RANGE); rc == 0;
         rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)) {
        struct record_run run;
        if (key.mv_size < 8 || record_key_read(key.mv_data) != branch)
            break;
        check->report->bytes += value.mv_size;
        *space += store_space(check->storage, key.mv_size, value.mv_size);
        if (record_run_decode(shape.kind, key.mv_data, key.mv_size, value.mv_data, value.mv_size,
                              &run) ||
            run.item_bytes != shape.item_bytes) {
            problem(check, "branch %" PRIu64 ": the %s record from %" PRIu64 " on is damaged",
                    branch, names[db],
                    key.mv_size == 16 ? record_key_read((unsigned char *)key.mv_data + 8) : 0);
            continue;
        }
        if (run.first != *end)
            problem(check, "branch %" PRIu64 ": %s %" PRIu64 " follows where %" PRIu64 " should",
                    branch, names[db], run.first, *end);
        for (uint64_t i = 0; i < run.count; i += run.group)
            if (!record_run_intact(&run, (uint32_t)i))
                problem(check, "branch %" PRIu64 ": %s %" PRIu64 " is damaged", branch, names[db],
                        run.first + i);
        *end = run.first + run.count;
        if (db == STORE_KV)
            check->report->chunks += run.count;
        else if (db == STORE_TOKEN)
            check->report->tokens += run.count;
    }
    mdb_cursor_close(cursor);
    return rc == MDB_NOTFOUND ? STATUS_OK : store_status(rc);
}

static void check_turn(struct check *check, uint64_t branch, const MDB_val *key,
                       const MDB_val *value, const struct record_branch *record, uint64_t needed,
                       bool collecting, uint64_t *space)
{
    struct record_turn turn;
    struct record_snapshot snapshot;
    uint64_t position =
        key->mv_size == 16 ? record_key_read((const unsigned char *)key->mv_data + 8) : 0;
    check->report->turns++;
    if (record_turn_decode(key->mv_data, key->mv_size, value->mv_data, value->mv_size, &turn)) {
        problem(check, "branch %" PRIu64 ": the record of its turn at %" PRIu64 " is damaged",
                branch, position);
        return;
    }
    if (position <= record->fork_position || (position > needed && !collecting))
        problem(check, "branch %" PRIu64 ": has a turn at %" PRIu64 ", where nothing reaches it",
                branch, position);
    if (!turn.snapshot)
        return;
    check->snapshots[check->snapshot_count++] = turn.snapshot;
    enum status status = snapshot_get(check->storage, check->txn, turn.snapshot, &snapshot);
    if (status || snapshot.position != position)
        problem(check, "branch %" PRIu64 ": the snapshot of its turn at %" PRIu64 " is %s", branch,
                position,
                status == STATUS_NOT_FOUND ? "missing"
                : status                   ? "damaged"
                                           : "another's");
    if (!status)
        *space += snapshot_space(check->storage, &snapshot);
}

static enum status check_turns(struct check *check, uint64_t branch,
                               const struct record_branch *record, uint64_t needed, bool collecting,
                               uint64_t *space)
{
    unsigned char from[RECORD_PAIR_KEY_BYTES];
    MDB_cursor *cursor;
    MDB_val key = {sizeof from, from}, value;
    int rc = mdb_cursor_open(check->txn, check->storage->db[STORE_TURN], &cursor);
    if (rc)
        return store_status(rc);
    record_pair_key(from, branch, 0);
    for (rc = mdb_cursor_get(cursor, &key, &value, MDB_SET_RANGE);
         rc == 0 && key.mv_size >= 8 && record_key_read(key.mv_data) == branch;
         rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)) {
        check->report->bytes += value.mv_size;
        check_turn(check, branch, &key, &value, record, needed, collecting, space);
    }
    mdb_cursor_close(cursor);
    return rc == MDB_NOTFOUND ? STATUS_OK : store_status(rc);
}

/* Whether the branch waits for collection: then parts of what nobody reaches are gone already. */
static bool is_collecting(struct check *check, uint64_t branch)
{
    unsigned char key[8];
    MDB_val value;
    record_key(key, branch);
    return store_get(check->storage, check->txn, STORE_COLLECT, key, sizeof key, &value) ==
           STATUS_OK;
}

static void check_contents(struct check *check, uint64_t branch, const struct record_branch *record,
                           uint64_t needed, bool collecting)
{
    uint64_t first = branch_first_chunk(check->storage, record), space = 0;
    uint64_t kv_end, landmark_end, token_end;
    enum status status = check_runs(check, STORE_KV, branch, first, &kv_end, &space);
    if (!status)
        status = check_runs(check, STORE_LANDMARK, branch, first, &landmark_end, &space);
    if (!status)
        status = check_runs(check, STORE_TOKEN, branch, record->fork_position, &token_end, &space);
    if (!status)
        status = check_turns(check, branch, record, needed, collecting, &space);
    if (status) {
        problem(check, "branch %" PRIu64 ": cannot be read: %s", branch, status_text(status));
        return;
    }
    uint64_t needed_chunks = needed / check->storage->chunk_tokens;
    if (kv_end < needed_chunks || landmark_end < needed_chunks || token_end < needed)
        problem(check,
                "branch %" PRIu64 ": ends at chunk %" PRIu64 ", landmark %" PRIu64
                ", token %" PRIu64 ", before the %" PRIu64 " tokens that memories stand on",
                branch, kv_end, landmark_end, token_end, needed);
    if (!collecting && (kv_end != record->chunk_end || landmark_end != record->chunk_end ||
                        token_end != record->token_end))
        problem(check,
                "branch %" PRIu64 ": ends at chunk %" PRIu64 ", landmark %" PRIu64
                ", token %" PRIu64 "; its record says %" PRIu64 " and %" PRIu64,
                branch, kv_end, landmark_end, token_end, record->chunk_end, record->token_end);
    if (space != record->bytes)
        problem(check, "branch %" PRIu64 ": takes %" PRIu64 " bytes, its record says %" PRIu64,
                branch, space, record->bytes);
}

static void check_parent(struct check *check, uint64_t branch, const struct record_branch *record)
{
    struct record_branch parent;
    unsigned char key[STORE_CHILD_KEY_BYTES];
    MDB_val value;
    if (record->parent == 0) {
        if (record->fork_position || record->depth)
            problem(check, "branch %" PRIu64 ": starts at %" PRIu64 " without a parent", branch,
                    record->fork_position);
        return;
    }
    if (branch_get(check->storage, check->txn, record->parent, &parent)) {
        problem(check, "branch %" PRIu64 ": its parent %" PRIu64 " is missing or damaged", branch,
                record->parent);
        return;
    }
    if (parent.fork_position >= record->fork_position || parent.token_end < record->fork_position ||
        record->depth != parent.depth + 1)
        problem(check, "branch %" PRIu64 ": does not fit its parent %" PRIu64, branch,
                record->parent);
    record_pair_key(key, record->parent, record->fork_position);
    record_key(key + 16, branch);
    if (store_get(check->storage, check->txn, STORE_CHILD, key, sizeof key, &value))
        problem(check, "branch %" PRIu64 ": its parent %" PRIu64 " does not know of it", branch,
                record->parent);
}

static void check_branch(struct check *check, const MDB_val *key, const MDB_val *value)
{
    struct record_branch record;
    struct record_memory memory;
    uint64_t needed = 0;
    check->report->branches++;
    if (key->mv_size != 8 ||
        record_branch_decode(key->mv_data, key->mv_size, value->mv_data, value->mv_size, &record)) {
        problem(check, "branch %" PRIu64 ": its record is damaged",
                key->mv_size == 8 ? record_key_read(key->mv_data) : 0);
        return;
    }
    uint64_t branch = record_key_read(key->mv_data);
    bool any_child, collecting = is_collecting(check, branch);
    if (branch >= check->counter.branch)
        problem(check, "branch %" PRIu64 ": the counter of branches is behind it", branch);
    if (branch_children(check->storage, check->txn, branch, &any_child, &needed))
        problem(check, "branch %" PRIu64 ": its children cannot be read", branch);
    if (record.owner[0]) {
        enum status status = memory_get(check->storage, check->txn, record.owner, &memory);
        if (status == STATUS_NOT_FOUND || (!status && memory.branch != branch))
            problem(check, "branch %" PRIu64 ": no memory %s stands on it", branch, record.owner);
        else if (!status)
            needed = memory.position;
    } else if (!any_child && !collecting) {
        problem(check, "branch %" PRIu64 ": nothing reaches it", branch);
    }
    check_parent(check, branch, &record);
    check_contents(check, branch, &record, needed, collecting);
}

static void check_child(struct check *check, const MDB_val *key, const MDB_val *value)
{
    struct record_branch record;
    const unsigned char *k = key->mv_data;
    if (key->mv_size != STORE_CHILD_KEY_BYTES || value->mv_size != 0) {
        problem(check, "an entry of the table of children is damaged");
        return;
    }
    uint64_t parent = record_key_read(k), child = record_key_read(k + 16);
    if (branch_get(check->storage, check->txn, child, &record) || record.parent != parent ||
        record.fork_position != record_key_read(k + 8))
        problem(check, "branch %" PRIu64 ": its child %" PRIu64 " is missing or another's", parent,
                child);
}

static void check_object(struct check *check, const MDB_val *key, const MDB_val *value)
{
    struct record_object object;
    if (record_object_decode(key->mv_data, key->mv_size, value->mv_data, value->mv_size, &object))
        problem(check, "the object %.*s is damaged", (int)key->mv_size, (char *)key->mv_data);
}

/* A list is an object's or a memory's. */
static void check_item(struct check *check, const MDB_val *key, const MDB_val *value)
{
    struct record_item item;
    struct record_memory memory;
    MDB_val owner;
    const char *id = key->mv_data; /* once decoded, a NUL ends it */
    if (record_item_decode(key->mv_data, key->mv_size, value->mv_data, value->mv_size, &item)) {
        problem(check, "the item %" PRIu64 " of the list of %.*s is damaged",
                key->mv_size > 8 ? record_key_read((const unsigned char *)id + key->mv_size - 8)
                                 : 0,
                key->mv_size > 8 ? (int)key->mv_size - 8 : 0, id);
        return;
    }
    if (store_get(check->storage, check->txn, STORE_OBJECT, id, strlen(id), &owner) ==
            STATUS_NOT_FOUND &&
        memory_get(check->storage, check->txn, id, &memory) == STATUS_NOT_FOUND)
        problem(check, "the item %s is of the list of %s, which is not there", item.id, id);
}

static void check_receipt(struct check *check, const MDB_val *key, const MDB_val *value)
{
    const unsigned char *name = key->mv_data;
    struct record_receipt receipt;
    if (record_receipt_decode(key->mv_data, key->mv_size, value->mv_data, value->mv_size, &receipt))
        problem(check, "the receipt %02x%02x%02x%02x... is damaged", name[0],
                key->mv_size > 1 ? name[1] : 0, key->mv_size > 2 ? name[2] : 0,
                key->mv_size > 3 ? name[3] : 0);
}

static void check_collect(struct check *check, const MDB_val *key, const MDB_val *value)
{
    struct record_branch record;
    if (key->mv_size != 8 || value->mv_size != 0) {
        problem(check, "an entry of the table of branches to collect is damaged");
        return;
    }
    const uint64_t branch = record_key_read(key->mv_data);
    enum status status = branch_get(check->storage, check->txn, branch, &record);
    if (status == STATUS_NOT_FOUND || (!status && record.owner[0]))
        problem(check, "branch %" PRIu64 ": to be collected, but %s", branch,
                status ? "missing" : "a memory's");
}

/* Runs whose branch does not exist: nothing would ever free them. */
static enum status check_orphans(struct check *check, enum store_db db)
{
    unsigned char from[RECORD_PAIR_KEY_BYTES] = {0};
    MDB_cursor *cursor;
    MDB_val key = {sizeof from, from}, value;
    int rc = mdb_cursor_open(check->txn, check->storage->db[db], &cursor);
    if (rc)
        return store_status(rc);
    while ((rc = mdb_cursor_get(cursor, &key, &value, MDB_SET_RANGE)) == 0) {
        struct record_branch record;
        uint64_t branch = key.mv_size >= 8 ? record_key_read(key.mv_data) : 0;
        if (branch_get(check->storage, check->txn, branch, &record) == STATUS_NOT_FOUND)
            problem(check, "branch %" PRIu64 ": has chunks, tokens or turns, but does not exist",
                    branch);
        if (branch == UINT64_MAX)
            break;
        record_pair_key(from, branch + 1, 0);
        key = (MDB_val){sizeof from, from};
    }
    mdb_cursor_close(cursor);
    return rc == MDB_NOTFOUND ? STATUS_OK : store_status(rc);
}

/* ---- snapshots ---- */

static void check_snapshot(struct check *check, const MDB_val *key, const MDB_val *value)
{
    const unsigned char *k = key->mv_data;
    struct record_snapshot record;
    if (key->mv_size != RECORD_PIECE_KEY_BYTES) {
        problem(check, "a snapshot's key of %zu bytes", key->mv_size);
        return;
    }
    uint64_t snapshot = record_key_read(k);
    uint32_t number = (uint32_t)k[8] << 24 | (uint32_t)k[9] << 16 | (uint32_t)k[10] << 8 | k[11];
    enum status status = snapshot_get(check->storage, check->txn, snapshot, &record);
    if (number > 0) {
        /* The pieces are read with their head; here only those without a head, or too many. */
        if (status == STATUS_NOT_FOUND)
            problem(check, "snapshot %" PRIu64 ": piece %u without a head", snapshot, number);
        else if (!status && number > (record.size - 1) / record.piece_bytes + 1)
            problem(check, "snapshot %" PRIu64 ": piece %u too many", snapshot, number);
        return;
    }
    (void)value;
    check->report->snapshots++;
    if (status) {
        problem(check, "snapshot %" PRIu64 ": its record is damaged", snapshot);
        return;
    }
    if (snapshot >= check->counter.snapshot)
        problem(check, "snapshot %" PRIu64 ": the counter of snapshots is behind it", snapshot);
    if (snapshot_read(check->storage, check->txn, snapshot, &record, NULL))
        problem(check, "snapshot %" PRIu64 ": a piece is missing or damaged", snapshot);
    uint64_t references = snapshot_occurrences(check->snapshots, check->snapshot_count, snapshot);
    if (references != record.references)
        problem(check,
                "snapshot %" PRIu64 ": %" PRIu64
                " memories and turns stand at it, it counts %" PRIu64,
                snapshot, references, record.references);
}

/* ---- all of it ---- */

static enum status check_all(struct check *check)
{
    uint64_t names = store_count(check->storage, check->txn, STORE_MEMORY) +
                     store_count(check->storage, check->txn, STORE_TURN);
    check->snapshots = calloc((size_t)names + 1, sizeof *check->snapshots);
    if (!check->snapshots)
        return STATUS_NO_MEMORY;
    if (store_get_counter(check->storage, check->txn, &check->counter)) {
        problem(check, "the record of the next names is missing or damaged");
        check->counter = (struct record_counter){UINT64_MAX, UINT64_MAX};
    }
    if (store_count(check->storage, check->txn, STORE_META) != 2)
        problem(check, "the table of first records has entries that do not belong there");
    enum status status = walk(check, STORE_MEMORY, check_memory);
    if (!status)
        status = walk(check, STORE_BRANCH, check_branch);
    snapshot_sort(check->snapshots, check->snapshot_count);
    if (!status)
        status = walk(check, STORE_CHILD, check_child);
    if (!status)
        status = walk(check, STORE_COLLECT, check_collect);
    if (!status)
        status = walk(check, STORE_RECEIPT, check_receipt);
    if (!status)
        status = walk(check, STORE_EXPIRY, check_expiry);
    if (!status)
        status = walk(check, STORE_OBJECT, check_object);
    if (!status)
        status = walk(check, STORE_ITEM, check_item);
    if (!status)
        status = check_orphans(check, STORE_KV);
    if (!status)
        status = check_orphans(check, STORE_LANDMARK);
    if (!status)
        status = check_orphans(check, STORE_TOKEN);
    if (!status)
        status = check_orphans(check, STORE_TURN);
    if (!status)
        status = walk(check, STORE_SNAPSHOT, check_snapshot);
    return status;
}

enum status storage_check(const char *path, void (*problem_cb)(void *context, const char *message),
                          void *context, struct storage_check_report *report, struct error *err)
{
    struct storage_options options = {.path = path, .read_only = true};
    struct check check = {.problem_cb = problem_cb, .context = context, .report = report};
    *report = (struct storage_check_report){0};
    enum status status = storage_open(&options, &check.storage, err);
    if (status)
        return status;
    status = store_read_begin(check.storage, &check.txn);
    if (!status) {
        status = check_all(&check);
        store_read_end(check.storage, check.txn);
    }
    free(check.snapshots);
    storage_close(check.storage);
    return status ? error_set(err, status, "cannot read all of %s: %s", path, status_text(status))
                  : STATUS_OK;
}
