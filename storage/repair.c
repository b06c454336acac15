/* What is wrong in a store is dropped, in one transaction: every memory goes back to its last place
 * whose past is whole, then what nothing reaches any more goes, then counts are taken anew. */
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "storage/branch.h"
#include "storage/memory.h"
#include "storage/quota.h"
#include "storage/run.h"
#include "storage/snapshot.h"
#include "storage/turn.h"

struct node { /* a branch */
    uint64_t id;
    struct record_branch record;
    uint64_t reach; /* positions up to here have their whole past; below fork_position: none has */
    uint64_t keep;  /* what memories and children stand on */
    uint64_t space;
    bool is_owned, is_alive;
};

struct repair {
    struct storage *storage;
    struct store_write write;
    uint64_t changes;
    void (*change_cb)(void *context, const char *message);
    void *context;
    struct node *nodes; /* in order of ids: parents before children */
    size_t node_count, node_capacity;
    uint64_t *snapshots; /* those that memories and turns name, sorted once they are all there */
    size_t snapshot_count, snapshot_capacity;
    uint64_t next_branch, next_snapshot;
    bool lost_words; /* some memory went back, or is gone */
};

static void __attribute__((format(printf, 2, 3)))
say(struct repair *repair, const char *format, ...)
{
    char message[512];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    repair->changes++;
    if (repair->change_cb)
        repair->change_cb(repair->context, message);
}

/* ---- tables ---- */

enum verdict { KEEP, DROP };

/* Calls `each` for every entry, which may write to other tables or tell to drop this one. */
static enum status walk(struct repair *repair, enum store_db db,
                        enum status (*each)(struct repair *repair, const MDB_val *key,
                                            const MDB_val *value, enum verdict *verdict))
{
    MDB_cursor *cursor;
    MDB_val key, value;
    enum status status = STATUS_OK;
    int rc = mdb_cursor_open(repair->write.txn, repair->storage->db[db], &cursor);
    if (rc)
        return store_status(rc);
    while (!status && (rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)) == 0) {
        enum verdict verdict = KEEP;
        status = each(repair, &key, &value, &verdict);
        if (!status && verdict == DROP)
            status = store_status(mdb_cursor_del(cursor, 0));
    }
    mdb_cursor_close(cursor);
    return status || rc == MDB_NOTFOUND ? status : store_status(rc);
}

static struct node *find(const struct repair *repair, uint64_t id)
{
    size_t low = 0, high = repair->node_count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (repair->nodes[middle].id < id)
            low = middle + 1;
        else
            high = middle;
    }
    return low < repair->node_count && repair->nodes[low].id == id ? &repair->nodes[low] : NULL;
}

static enum status add_node(struct repair *repair, const struct node *node)
{
    if (repair->node_count == repair->node_capacity) {
        size_t capacity = repair->node_capacity ? 2 * repair->node_capacity : 64;
        struct node *nodes = realloc(repair->nodes, capacity * sizeof *nodes);
        if (!nodes)
            return STATUS_NO_MEMORY;
        repair->nodes = nodes;
        repair->node_capacity = capacity;
    }
    repair->nodes[repair->node_count++] = *node;
    if (node->id >= repair->next_branch)
        repair->next_branch = node->id + 1;
    return STATUS_OK;
}

static enum status name_snapshot(struct repair *repair, uint64_t snapshot)
{
    if (repair->snapshot_count == repair->snapshot_capacity) {
        size_t capacity = repair->snapshot_capacity ? 2 * repair->snapshot_capacity : 64;
        uint64_t *snapshots = realloc(repair->snapshots, capacity * sizeof *snapshots);
        if (!snapshots)
            return STATUS_NO_MEMORY;
        repair->snapshots = snapshots;
        repair->snapshot_capacity = capacity;
    }
    repair->snapshots[repair->snapshot_count++] = snapshot;
    return STATUS_OK;
}

/* ---- what is whole ---- */

static enum status take_branch(struct repair *repair, const MDB_val *key, const MDB_val *value,
                               enum verdict *verdict)
{
    struct node node = {0};
    if (key->mv_size != 8 || record_branch_decode(key->mv_data, key->mv_size, value->mv_data,
                                                  value->mv_size, &node.record)) {
        say(repair, "branch %" PRIu64 ": its record is damaged; dropped with all it holds",
            key->mv_size == 8 ? record_key_read(key->mv_data) : 0);
        *verdict = DROP;
        return STATUS_OK;
    }
    node.id = record_key_read(key->mv_data);
    return add_node(repair, &node);
}

/* Where the intact items of one kind end that begin at `first` without a hole. */
static enum status whole_end(struct repair *repair, enum store_db db, uint64_t branch,
                             uint64_t first, uint64_t *end)
{
    struct run_shape shape = run_shape_of(repair->storage, db);
    unsigned char from[RECORD_PAIR_KEY_BYTES];
    MDB_cursor *cursor;
    MDB_val key = {sizeof from, from}, value;
    int rc = mdb_cursor_open(repair->write.txn, repair->storage->db[db], &cursor);
    if (rc)
        return store_status(rc);
    *end = first;
    record_pair_key(from, branch, 0);
    for (rc = mdb_cursor_get(cursor, &key, &value, MDB_SET_RANGE); rc == 0;
         rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)) {
        struct record_run run;
        if (record_run_decode(shape.kind, key.mv_data, key.mv_size, value.mv_data, value.mv_size,
                              &run) ||
            run.item_bytes != shape.item_bytes || run.branch != branch || run.first != *end)
            break;
        uint64_t i = 0;
        while (i < run.count && record_run_intact(&run, (uint32_t)i))
            i += run.group;
        *end += i < run.count ? i : run.count;
        if (i < run.count)
            break;
    }
    mdb_cursor_close(cursor);
    return rc && rc != MDB_NOTFOUND ? store_status(rc) : STATUS_OK;
}

static enum status find_reach(struct repair *repair, struct node *node)
{
    const struct record_branch *record = &node->record;
    const struct node *parent = record->parent ? find(repair, record->parent) : NULL;
    const uint64_t chunk_tokens = repair->storage->chunk_tokens;
    const uint64_t first = branch_first_chunk(repair->storage, record);
    uint64_t kv, landmark, token;
    node->reach = 0;
    if (record->parent
            ? !parent || parent->id >= node->id || parent->reach < record->fork_position ||
                  parent->record.fork_position >= record->fork_position ||
                  record->depth != parent->record.depth + 1
            : record->fork_position || record->depth) {
        say(repair, "branch %" PRIu64 ": the past it starts from is lost", node->id);
        return STATUS_OK;
    }
    enum status status = whole_end(repair, STORE_KV, node->id, first, &kv);
    if (!status)
        status = whole_end(repair, STORE_LANDMARK, node->id, first, &landmark);
    if (!status)
        status = whole_end(repair, STORE_TOKEN, node->id, record->fork_position, &token);
    if (status)
        return status;
    const uint64_t chunks = kv < landmark ? kv : landmark;
    node->reach = chunks * chunk_tokens + chunk_tokens - 1;
    if (node->reach > token)
        node->reach = token;
    return STATUS_OK;
}

static bool is_whole(const struct repair *repair, uint64_t snapshot, uint64_t position)
{
    struct record_snapshot record;
    return !snapshot_get(repair->storage, repair->write.txn, snapshot, &record) &&
           record.position == position &&
           !snapshot_read(repair->storage, repair->write.txn, snapshot, &record, NULL);
}

static enum status put_turn(struct repair *repair, uint64_t branch, uint64_t position,
                            const struct record_turn *turn)
{
    unsigned char key[RECORD_PAIR_KEY_BYTES];
    struct buf buf;
    buf_init(&buf);
    record_pair_key(key, branch, position);
    record_turn_encode(&buf, key, sizeof key, turn);
    enum status status = store_put(&repair->write, STORE_TURN, key, sizeof key, buf.data, buf.size);
    buf_close(&buf);
    return status;
}

/* Drops what is no turn of a whole place, and names of snapshots that are damaged. */
static enum status settle_turn(struct repair *repair, const MDB_val *key, const MDB_val *value,
                               enum verdict *verdict)
{
    struct record_turn turn;
    if (record_turn_decode(key->mv_data, key->mv_size, value->mv_data, value->mv_size, &turn)) {
        say(repair, "the record of a turn is damaged; dropped");
        *verdict = DROP;
        return STATUS_OK;
    }
    const uint64_t branch = record_key_read(key->mv_data);
    const uint64_t position = record_key_read((const unsigned char *)key->mv_data + 8);
    const struct node *node = find(repair, branch);
    if (!node || position <= node->record.fork_position || position > node->reach) {
        say(repair, "branch %" PRIu64 ": its turn at %" PRIu64 " is not whole; dropped", branch,
            position);
        *verdict = DROP;
    } else if (turn.snapshot && !is_whole(repair, turn.snapshot, position)) {
        say(repair,
            "branch %" PRIu64 ": the snapshot of its turn at %" PRIu64 " is damaged; dropped",
            branch, position);
        turn.snapshot = 0;
        turn.bookmark[0] = 0; /* it is what keeps a snapshot */
        return put_turn(repair, branch, position, &turn);
    }
    return STATUS_OK;
}

/* ---- memories ---- */

/* The last place at or before `end` in the lineage of `branch` that has a snapshot. */
static enum status last_place(struct repair *repair, uint64_t branch, uint64_t end,
                              uint64_t *found_branch, uint64_t *position, struct record_turn *turn)
{
    MDB_cursor *cursor;
    int rc = mdb_cursor_open(repair->write.txn, repair->storage->db[STORE_TURN], &cursor);
    if (rc)
        return store_status(rc);
    enum status status = STATUS_NOT_FOUND;
    for (const struct node *node = find(repair, branch); node && status == STATUS_NOT_FOUND;
         node = node->record.parent < node->id ? find(repair, node->record.parent) : NULL) {
        unsigned char from[RECORD_PAIR_KEY_BYTES];
        MDB_val key = {sizeof from, from}, value;
        record_pair_key(from, node->id, end == UINT64_MAX ? end : end + 1);
        rc = mdb_cursor_get(cursor, &key, &value, MDB_SET_RANGE);
        rc = mdb_cursor_get(cursor, &key, &value, rc == MDB_NOTFOUND ? MDB_LAST : MDB_PREV);
        for (; rc == 0 && record_key_read(key.mv_data) == node->id;
             rc = mdb_cursor_get(cursor, &key, &value, MDB_PREV)) {
            if (record_turn_decode(key.mv_data, key.mv_size, value.mv_data, value.mv_size, turn) ||
                !turn->snapshot)
                continue;
            *found_branch = node->id;
            *position = record_key_read((const unsigned char *)key.mv_data + 8);
            status = STATUS_OK;
            break;
        }
        if (node->record.fork_position < end)
            end = node->record.fork_position;
    }
    mdb_cursor_close(cursor);
    return status;
}

/* A branch of the memory's own that starts at `position` of `parent`. */
static enum status new_branch(struct repair *repair, const char *id, uint64_t parent,
                              uint64_t position, uint64_t *branch)
{
    const struct node *above = parent ? find(repair, parent) : NULL;
    struct node node = {.id = repair->next_branch, .reach = position};
    node.record.parent = parent;
    node.record.fork_position = node.record.token_end = position;
    node.record.chunk_end = position / repair->storage->chunk_tokens;
    node.record.depth = above ? above->record.depth + 1 : 0;
    snprintf(node.record.owner, sizeof node.record.owner, "%s", id);
    *branch = node.id;
    return add_node(repair, &node);
}

static enum status step_back(struct repair *repair, const char *id, struct record_memory *memory,
                             bool is_own)
{
    uint64_t branch = 0, position = 0;
    struct record_turn turn = {0};
    enum status status = last_place(repair, memory->branch, is_own ? memory->position : UINT64_MAX,
                                    &branch, &position, &turn);
    if (status && status != STATUS_NOT_FOUND)
        return status;
    repair->lost_words = true;
    say(repair, "memory %s: goes back from token %" PRIu64 " to %" PRIu64 "%s", id,
        memory->position, position, position ? "" : ": nothing of it is whole");
    const bool stays = is_own && branch == memory->branch;
    memory->position = position;
    memory->text_bytes = turn.text_bytes;
    memory->snapshot = turn.snapshot;
    return stays ? STATUS_OK : new_branch(repair, id, branch, position, &memory->branch);
}

static enum status settle_end(struct repair *repair, const char *id,
                              const struct record_memory *memory)
{
    unsigned char key[EXPIRY_KEY_BYTES];
    const int64_t end = expiry_end(memory);
    const size_t size = expiry_key(key, end, id);
    MDB_val value;
    if (!end || store_get(repair->storage, repair->write.txn, STORE_EXPIRY, key, size, &value) !=
                    STATUS_NOT_FOUND)
        return STATUS_OK;
    say(repair, "memory %s: its end is put into the table of ends", id);
    return store_put(&repair->write, STORE_EXPIRY, key, size, "", 0);
}

static enum status settle_memory(struct repair *repair, const char *id,
                                 struct record_memory *memory)
{
    const struct node *node = find(repair, memory->branch);
    const bool is_own = node && strcmp(node->record.owner, id) == 0;
    const bool stands = is_own && memory->position >= node->record.fork_position &&
                        memory->position <= node->reach &&
                        (memory->snapshot ? is_whole(repair, memory->snapshot, memory->position)
                                          : memory->position == 0);
    enum status status = STATUS_OK;
    if (!stands) {
        status = step_back(repair, id, memory, is_own);
        if (!status)
            status = memory_put(&repair->write, id, memory);
    }
    if (status)
        return status;
    struct node *own = find(repair, memory->branch);
    own->is_owned = own->is_alive = true;
    const char *tenant = quota_tenant(id, memory->tenant);
    if (stands && strcmp(own->record.tenant, tenant) != 0)
        say(repair, "memory %s: its branch counts for its tenant", id);
    snprintf(own->record.tenant, sizeof own->record.tenant, "%s", tenant);
    own->keep = memory->position;
    struct record_turn turn;
    if (!memory->ephemeral && memory->position > own->record.fork_position &&
        turn_get(repair->storage, repair->write.txn, own->id, memory->position, &turn) ==
            STATUS_NOT_FOUND) {
        say(repair, "memory %s: the turn it stands at was missing; made anew", id);
        turn = (struct record_turn){.snapshot = memory->snapshot,
                                    .text_bytes = memory->text_bytes,
                                    .created_at = (int64_t)time(NULL)};
        status = put_turn(repair, own->id, memory->position, &turn);
    }
    if (!status)
        status = settle_end(repair, id, memory);
    return status || !memory->snapshot ? status : name_snapshot(repair, memory->snapshot);
}

static enum status take_memory(struct repair *repair, const MDB_val *key, const MDB_val *value,
                               enum verdict *verdict)
{
    struct record_memory memory;
    char id[LIMITS_ID_BYTES];
    if (key->mv_size >= sizeof id ||
        record_memory_decode(key->mv_data, key->mv_size, value->mv_data, value->mv_size, &memory)) {
        repair->lost_words = true;
        say(repair, "memory %.*s: its record is damaged; dropped",
            (int)(key->mv_size < sizeof id ? key->mv_size : sizeof id), (const char *)key->mv_data);
        *verdict = DROP;
        return STATUS_OK;
    }
    memcpy(id, key->mv_data, key->mv_size);
    id[key->mv_size] = 0;
    /* The record may move when it is written. */
    char *metadata = malloc(memory.metadata_size + 1);
    if (!metadata)
        return STATUS_NO_MEMORY;
    memcpy(metadata, memory.metadata, memory.metadata_size);
    memory.metadata = metadata;
    enum status status = settle_memory(repair, id, &memory);
    free(metadata);
    return status;
}

/* ---- what nothing reaches ---- */

static bool is_child_key(const struct repair *repair, const MDB_val *key, const MDB_val *value)
{
    const unsigned char *k = key->mv_data;
    if (key->mv_size != STORE_CHILD_KEY_BYTES || value->mv_size)
        return false;
    const struct node *node = find(repair, record_key_read(k + 16));
    return node && node->is_alive && node->record.parent == record_key_read(k) &&
           node->record.parent && node->record.fork_position == record_key_read(k + 8);
}

static enum status settle_child(struct repair *repair, const MDB_val *key, const MDB_val *value,
                                enum verdict *verdict)
{
    if (is_child_key(repair, key, value))
        return STATUS_OK;
    say(repair, "an entry of the table of children is not one; dropped");
    *verdict = DROP;
    return STATUS_OK;
}

static enum status settle_collect(struct repair *repair, const MDB_val *key, const MDB_val *value,
                                  enum verdict *verdict)
{
    if (key->mv_size != 8 || value->mv_size || !find(repair, record_key_read(key->mv_data)))
        say(repair, "an entry of the table of branches to collect is not one; dropped");
    *verdict = DROP; /* what there was to collect goes below */
    return STATUS_OK;
}

static enum status settle_receipt(struct repair *repair, const MDB_val *key, const MDB_val *value,
                                  enum verdict *verdict)
{
    struct record_receipt receipt;
    const bool damaged =
        record_receipt_decode(key->mv_data, key->mv_size, value->mv_data, value->mv_size, &receipt);
    /* It does not tell which memory it speaks of, and a retry must not hear that lost words are
     * there. */
    if (!damaged && !repair->lost_words)
        return STATUS_OK;
    say(repair, damaged ? "a receipt is damaged; dropped"
                        : "a receipt may be of words that are lost; dropped");
    *verdict = DROP;
    return STATUS_OK;
}

static enum status settle_expiry(struct repair *repair, const MDB_val *key, const MDB_val *value,
                                 enum verdict *verdict)
{
    struct record_memory memory;
    char id[LIMITS_ID_BYTES] = "";
    bool good = key->mv_size > 8 && key->mv_size < EXPIRY_KEY_BYTES && !value->mv_size;
    if (good)
        memcpy(id, (const char *)key->mv_data + 8, key->mv_size - 8);
    if (good && !memory_get(repair->storage, repair->write.txn, id, &memory) &&
        (uint64_t)expiry_end(&memory) == record_key_read(key->mv_data))
        return STATUS_OK;
    say(repair, "an entry of the table of ends is not one; dropped");
    *verdict = DROP;
    return STATUS_OK;
}

static enum status settle_object(struct repair *repair, const MDB_val *key, const MDB_val *value,
                                 enum verdict *verdict)
{
    struct record_object object;
    if (!record_object_decode(key->mv_data, key->mv_size, value->mv_data, value->mv_size, &object))
        return STATUS_OK;
    say(repair, "the object %.*s is damaged; dropped", (int)key->mv_size, (char *)key->mv_data);
    *verdict = DROP;
    return STATUS_OK;
}

/* What an item says may lie behind the place that its memory went back to: it was said, and stays.
 * A list without its object or memory goes. */
static enum status settle_item(struct repair *repair, const MDB_val *key, const MDB_val *value,
                               enum verdict *verdict)
{
    struct record_item item;
    struct record_memory memory;
    MDB_val owner;
    const char *id = key->mv_data; /* once decoded, a NUL ends it */
    const bool damaged =
        record_item_decode(key->mv_data, key->mv_size, value->mv_data, value->mv_size, &item);
    if (!damaged &&
        (store_get(repair->storage, repair->write.txn, STORE_OBJECT, id, strlen(id), &owner) !=
             STATUS_NOT_FOUND ||
         memory_get(repair->storage, repair->write.txn, id, &memory) != STATUS_NOT_FOUND))
        return STATUS_OK;
    say(repair, damaged ? "an item of a list is damaged; dropped"
                        : "an item of a list that nobody has; dropped");
    *verdict = DROP;
    return STATUS_OK;
}

/* From the last child to the first parent: what lives, and up to where. */
static enum status settle_branches(struct repair *repair)
{
    enum status status = STATUS_OK;
    for (size_t i = repair->node_count; i-- > 0 && !status;) {
        struct node *node = &repair->nodes[i];
        unsigned char key[8];
        record_key(key, node->id);
        if (!node->is_alive) {
            say(repair, "branch %" PRIu64 ": nothing reaches it; dropped", node->id);
            status = store_delete(&repair->write, STORE_BRANCH, key, sizeof key);
            continue;
        }
        if (node->record.parent) {
            struct node *parent = find(repair, node->record.parent);
            parent->is_alive = true;
            if (parent->keep < node->record.fork_position)
                parent->keep = node->record.fork_position;
        }
        if (node->keep < node->record.token_end)
            say(repair, "branch %" PRIu64 ": tokens %" PRIu64 " to %" PRIu64 " are dropped",
                node->id, node->keep, node->record.token_end);
    }
    return status;
}

/* A run that goes on past what is kept is written anew without it. */
static enum status shorten(struct repair *repair, enum store_db db, const MDB_val *key,
                           const struct record_run *run, uint32_t count)
{
    struct record_run kept = *run;
    kept.count = count;
    const size_t size = record_run_bytes(count, run->item_bytes, run->group);
    void *value = malloc(size);
    if (!value)
        return STATUS_NO_MEMORY;
    memcpy(record_run_item(value, &kept, 0), run->items, (size_t)count * run->item_bytes);
    record_run_seal(value, &kept);
    unsigned char copy[RECORD_PAIR_KEY_BYTES];
    memcpy(copy, key->mv_data, sizeof copy);
    enum status status = store_put(&repair->write, db, copy, sizeof copy, value, size);
    free(value);
    return status;
}

static enum status settle_run(struct repair *repair, enum store_db db, const MDB_val *key,
                              const MDB_val *value, enum verdict *verdict)
{
    struct run_shape shape = run_shape_of(repair->storage, db);
    struct node *node =
        key->mv_size == RECORD_PAIR_KEY_BYTES ? find(repair, record_key_read(key->mv_data)) : NULL;
    struct record_run run;
    const uint64_t end = !node || !node->is_alive ? 0
                         : db == STORE_TOKEN      ? node->keep
                                                  : node->keep / repair->storage->chunk_tokens;
    if (!node)
        say(repair, "items of a branch that does not exist; dropped");
    if (!end || record_key_read((const unsigned char *)key->mv_data + 8) >= end ||
        record_run_decode(shape.kind, key->mv_data, key->mv_size, value->mv_data, value->mv_size,
                          &run)) {
        if (node && node->is_alive)
            say(repair, "branch %" PRIu64 ": items past token %" PRIu64 " are dropped", node->id,
                node->keep);
        *verdict = DROP;
        return STATUS_OK;
    }
    uint32_t count = run.count;
    enum status status = STATUS_OK;
    if (run.first + run.count > end) {
        count = (uint32_t)(end - run.first);
        say(repair, "branch %" PRIu64 ": items past token %" PRIu64 " are dropped", node->id,
            node->keep);
        status = shorten(repair, db, key, &run, count);
    }
    node->space += store_space(repair->storage, RECORD_PAIR_KEY_BYTES,
                               record_run_bytes(count, run.item_bytes, run.group));
    return status;
}

static enum status settle_kv(struct repair *repair, const MDB_val *key, const MDB_val *value,
                             enum verdict *verdict)
{
    return settle_run(repair, STORE_KV, key, value, verdict);
}

static enum status settle_landmark(struct repair *repair, const MDB_val *key, const MDB_val *value,
                                   enum verdict *verdict)
{
    return settle_run(repair, STORE_LANDMARK, key, value, verdict);
}

static enum status settle_token(struct repair *repair, const MDB_val *key, const MDB_val *value,
                                enum verdict *verdict)
{
    return settle_run(repair, STORE_TOKEN, key, value, verdict);
}

/* Turns that nothing reaches go; the others' snapshots are counted. */
static enum status count_turn(struct repair *repair, const MDB_val *key, const MDB_val *value,
                              enum verdict *verdict)
{
    struct node *node = find(repair, record_key_read(key->mv_data));
    const uint64_t position = record_key_read((const unsigned char *)key->mv_data + 8);
    struct record_turn turn;
    struct record_snapshot snapshot;
    if (!node || !node->is_alive || position > node->keep) {
        say(repair, "a turn at %" PRIu64 ", where nothing reaches it; dropped", position);
        *verdict = DROP;
        return STATUS_OK;
    }
    enum status status =
        record_turn_decode(key->mv_data, key->mv_size, value->mv_data, value->mv_size, &turn);
    if (status || !turn.snapshot)
        return status;
    status = snapshot_get(repair->storage, repair->write.txn, turn.snapshot, &snapshot);
    if (status)
        return status;
    node->space += snapshot_space(repair->storage, &snapshot);
    return name_snapshot(repair, turn.snapshot);
}

/* The branches' records as what they hold says. */
static enum status put_branches(struct repair *repair)
{
    enum status status = STATUS_OK;
    for (size_t i = 0; i < repair->node_count && !status; i++) {
        struct node *node = &repair->nodes[i];
        struct record_branch *record = &node->record;
        unsigned char key[STORE_CHILD_KEY_BYTES];
        MDB_val value;
        if (!node->is_alive)
            continue;
        if (record->parent) {
            record_pair_key(key, record->parent, record->fork_position);
            record_key(key + 16, node->id);
            status =
                store_get(repair->storage, repair->write.txn, STORE_CHILD, key, sizeof key, &value);
            if (status == STATUS_NOT_FOUND) {
                say(repair, "branch %" PRIu64 ": its parent is told of it", node->id);
                status = store_put(&repair->write, STORE_CHILD, key, sizeof key, "", 0);
            }
        }
        if (!node->is_owned)
            record->owner[0] = 0;
        const uint64_t chunk_end = node->keep / repair->storage->chunk_tokens;
        if (record->chunk_end != chunk_end || record->token_end != node->keep ||
            record->bytes != node->space)
            say(repair, "branch %" PRIu64 ": its record is put right", node->id);
        record->chunk_end = chunk_end;
        record->token_end = node->keep;
        record->bytes = node->space;
        if (!status)
            status = branch_put(&repair->write, node->id, record);
    }
    return status;
}

/* ---- snapshots and names ---- */

static enum status settle_snapshot(struct repair *repair, const MDB_val *key, const MDB_val *value,
                                   enum verdict *verdict)
{
    const unsigned char *k = key->mv_data;
    struct record_snapshot record;
    if (key->mv_size != RECORD_PIECE_KEY_BYTES) {
        say(repair, "a snapshot's key of %zu bytes; dropped", key->mv_size);
        *verdict = DROP;
        return STATUS_OK;
    }
    const uint64_t snapshot = record_key_read(k);
    const uint64_t references =
        snapshot_occurrences(repair->snapshots, repair->snapshot_count, snapshot);
    const uint32_t number =
        (uint32_t)k[8] << 24 | (uint32_t)k[9] << 16 | (uint32_t)k[10] << 8 | k[11];
    if (snapshot >= repair->next_snapshot)
        repair->next_snapshot = snapshot + 1;
    enum status status = snapshot_get(repair->storage, repair->write.txn, snapshot, &record);
    if (!references || status || number > (record.size - 1) / record.piece_bytes + 1) {
        say(repair, "snapshot %" PRIu64 ": nothing stands at it; piece %u dropped", snapshot,
            number);
        *verdict = DROP;
        return STATUS_OK;
    }
    if (number > 0 || record.references == references)
        return STATUS_OK;
    (void)value;
    say(repair, "snapshot %" PRIu64 ": its count of references is put right", snapshot);
    return snapshot_put_references(&repair->write, snapshot, references);
}

static enum status settle_meta(struct repair *repair, const MDB_val *key, const MDB_val *value,
                               enum verdict *verdict)
{
    (void)value;
    if (store_is_meta_key(key))
        return STATUS_OK;
    say(repair, "an entry of the table of first records does not belong there; dropped");
    *verdict = DROP;
    return STATUS_OK;
}

static enum status settle_counter(struct repair *repair)
{
    struct record_counter counter;
    if (!store_get_counter(repair->storage, repair->write.txn, &counter)) {
        if (counter.branch >= repair->next_branch && counter.snapshot >= repair->next_snapshot)
            return STATUS_OK;
        if (counter.branch > repair->next_branch)
            repair->next_branch = counter.branch;
        if (counter.snapshot > repair->next_snapshot)
            repair->next_snapshot = counter.snapshot;
    }
    say(repair, "the record of the next names is put right");
    counter = (struct record_counter){repair->next_branch, repair->next_snapshot};
    return store_put_counter(&repair->write, &counter);
}

/* ---- all of it ---- */

static enum status repair_all(struct repair *repair)
{
    struct record_counter counter;
    repair->next_branch = repair->next_snapshot = 1;
    /* New branches take names behind every one that was ever given. */
    if (!store_get_counter(repair->storage, repair->write.txn, &counter))
        repair->next_branch = counter.branch;
    enum status status = walk(repair, STORE_BRANCH, take_branch);
    for (size_t i = 0; i < repair->node_count && !status; i++)
        status = find_reach(repair, &repair->nodes[i]);
    static const struct {
        enum store_db db;
        enum status (*each)(struct repair *repair, const MDB_val *key, const MDB_val *value,
                            enum verdict *verdict);
    } first[] = {{STORE_META, settle_meta}, {STORE_TURN, settle_turn}, {STORE_MEMORY, take_memory}},
      then[] = {{STORE_CHILD, settle_child},       {STORE_COLLECT, settle_collect},
                {STORE_RECEIPT, settle_receipt},   {STORE_KV, settle_kv},
                {STORE_LANDMARK, settle_landmark}, {STORE_TOKEN, settle_token},
                {STORE_TURN, count_turn},          {STORE_OBJECT, settle_object},
                {STORE_ITEM, settle_item},         {STORE_EXPIRY, settle_expiry}};
    for (size_t i = 0; i < sizeof first / sizeof *first && !status; i++)
        status = walk(repair, first[i].db, first[i].each);
    if (!status)
        status = settle_branches(repair);
    for (size_t i = 0; i < sizeof then / sizeof *then && !status; i++)
        status = walk(repair, then[i].db, then[i].each);
    if (!status)
        status = put_branches(repair);
    snapshot_sort(repair->snapshots, repair->snapshot_count);
    if (!status)
        status = walk(repair, STORE_SNAPSHOT, settle_snapshot);
    return status ? status : settle_counter(repair);
}

enum status storage_repair(const char *path, bool carry_out,
                           void (*change_cb)(void *context, const char *message), void *context,
                           uint64_t *changes, struct error *err)
{
    struct storage_options options = {.path = path, .repair = true};
    struct repair repair = {.change_cb = change_cb, .context = context};
    *changes = 0;
    enum status status = storage_open(&options, &repair.storage, err);
    if (status)
        return status;
    status = store_write_begin(repair.storage, &repair.write);
    if (!status) {
        status = repair_all(&repair);
        if (!status && carry_out)
            status = store_write_commit(&repair.write);
        else
            store_write_abort(&repair.write);
    }
    *changes = repair.changes;
    free(repair.nodes);
    free(repair.snapshots);
    storage_close(repair.storage);
    return status ? error_set(err, status, "cannot repair %s: %s; it is as it was", path,
                              status_text(status))
                  : STATUS_OK;
}
