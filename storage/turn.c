#include "storage/turn.h"

#include <stdbool.h>
#include <string.h>

#include "storage/branch.h"
#include "storage/snapshot.h"

/* Snapshots dropped behind one commit; in the normal course it is one. */
#define RETAIN_DROPS 64

/* The last turn of `branch` at or before `end`. */
static enum status last_turn(const struct storage *storage, MDB_txn *txn, uint64_t branch,
                             uint64_t end, uint64_t *position, struct record_turn *turn)
{
    unsigned char wanted[RECORD_PAIR_KEY_BYTES];
    MDB_cursor *cursor;
    MDB_val key = {sizeof wanted, wanted}, value;
    enum status status = store_status(mdb_cursor_open(txn, storage->db[STORE_TURN], &cursor));
    if (status)
        return status;
    record_pair_key(wanted, branch, end);
    int rc = mdb_cursor_get(cursor, &key, &value, MDB_SET_RANGE);
    if (rc == MDB_NOTFOUND)
        rc = mdb_cursor_get(cursor, &key, &value, MDB_LAST);
    else if (rc == 0 && (key.mv_size != sizeof wanted || memcmp(key.mv_data, wanted, 16) != 0))
        rc = mdb_cursor_get(cursor, &key, &value, MDB_PREV);
    status = store_status(rc);
    if (!status && key.mv_size != sizeof wanted)
        status = STATUS_CORRUPT;
    if (!status && record_key_read(key.mv_data) != branch)
        status = STATUS_NOT_FOUND;
    if (!status) {
        *position = record_key_read((const unsigned char *)key.mv_data + 8);
        status = record_turn_decode(key.mv_data, key.mv_size, value.mv_data, value.mv_size, turn);
    }
    mdb_cursor_close(cursor);
    return status;
}

enum status turn_walk_begin(struct turn_walk *walk, const struct storage *storage, MDB_txn *txn,
                            uint64_t branch, uint64_t end)
{
    *walk = (struct turn_walk){.storage = storage, .txn = txn, .branch = branch, .end = end};
    return branch_get(storage, txn, branch, &walk->record);
}

enum status turn_walk_next(struct turn_walk *walk, uint64_t *position, struct record_turn *turn)
{
    for (;;) {
        enum status status = STATUS_NOT_FOUND;
        uint64_t fork = walk->record.fork_position;
        if (walk->end > fork)
            status = last_turn(walk->storage, walk->txn, walk->branch, walk->end, position, turn);
        if (!status && *position > fork) {
            walk->end = *position - 1;
            return STATUS_OK;
        }
        if (status && status != STATUS_NOT_FOUND)
            return status;
        if (walk->record.parent == 0)
            return STATUS_NOT_FOUND;
        if (walk->end > fork)
            walk->end = fork;
        walk->branch = walk->record.parent;
        status = branch_get(walk->storage, walk->txn, walk->branch, &walk->record);
        if (status)
            return STATUS_CORRUPT;
    }
}

enum status turn_get(const struct storage *storage, MDB_txn *txn, uint64_t branch,
                     uint64_t position, struct record_turn *turn)
{
    unsigned char key[RECORD_PAIR_KEY_BYTES];
    MDB_val value;
    record_pair_key(key, branch, position);
    enum status status = store_get(storage, txn, STORE_TURN, key, sizeof key, &value);
    return status ? status
                  : record_turn_decode(key, sizeof key, value.mv_data, value.mv_size, turn);
}

/* Space of a snapshot, added to or taken from what the branch's record counts. */
static enum status count_space(struct store_write *write, uint64_t branch, uint64_t snapshot,
                               bool add)
{
    struct record_branch record;
    struct record_snapshot head;
    enum status status = snapshot_get(write->storage, write->txn, snapshot, &head);
    if (!status)
        status = branch_get(write->storage, write->txn, branch, &record);
    if (status)
        return STATUS_CORRUPT;
    uint64_t space = snapshot_space(write->storage, &head);
    record.bytes = add ? record.bytes + space : record.bytes - space;
    return branch_put(write, branch, &record);
}

static enum status drop_snapshot(struct store_write *write, uint64_t branch, uint64_t snapshot)
{
    enum status status = count_space(write, branch, snapshot, false);
    return status ? status : snapshot_release(write, snapshot);
}

enum status turn_put(struct store_write *write, uint64_t branch, uint64_t position,
                     const struct record_turn *turn)
{
    unsigned char key[RECORD_PAIR_KEY_BYTES];
    struct record_turn old;
    struct buf buf;
    enum status status = turn_get(write->storage, write->txn, branch, position, &old);
    bool same = !status && old.snapshot == turn->snapshot;
    if (!status && old.snapshot && !same)
        status = drop_snapshot(write, branch, old.snapshot);
    if (status == STATUS_NOT_FOUND)
        status = STATUS_OK;
    if (!status && turn->snapshot && !same)
        status = count_space(write, branch, turn->snapshot, true);
    if (status)
        return status;
    buf_init(&buf);
    record_pair_key(key, branch, position);
    record_turn_encode(&buf, key, sizeof key, turn);
    status = store_put(write, STORE_TURN, key, sizeof key, buf.data, buf.size);
    buf_close(&buf);
    return status;
}

enum status turn_remove(struct store_write *write, uint64_t branch, uint64_t position)
{
    unsigned char key[RECORD_PAIR_KEY_BYTES];
    struct record_turn turn;
    enum status status = turn_get(write->storage, write->txn, branch, position, &turn);
    if (!status && turn.snapshot)
        status = drop_snapshot(write, branch, turn.snapshot);
    record_pair_key(key, branch, position);
    return status ? status : store_delete(write, STORE_TURN, key, sizeof key);
}

enum status turn_retain(struct store_write *write, const char *id, uint64_t branch,
                        uint64_t position, bool all)
{
    struct turn_walk walk;
    struct record_turn turn;
    uint64_t at;
    uint32_t kept = 0, dropped = 0;
    const uint32_t keep =
        storage_is_prefix(id) ? LIMITS_PREFIX_SNAPSHOTS : write->storage->keep_snapshots;
    enum status status = turn_walk_begin(&walk, write->storage, write->txn, branch, position);
    while (!status && dropped < RETAIN_DROPS) {
        status = turn_walk_next(&walk, &at, &turn);
        if (status || (walk.record.owner[0] && strcmp(walk.record.owner, id) != 0))
            break;
        if (turn.bookmark[0] || (!turn.snapshot && all))
            continue;
        if (!turn.snapshot)
            break;
        if (kept < keep) {
            kept++;
            continue;
        }
        /* turn_put gives back the reference of what stood there. */
        turn.snapshot = 0;
        status = turn_put(write, walk.branch, at, &turn);
        dropped++;
    }
    return status == STATUS_NOT_FOUND ? STATUS_OK : status;
}

enum status turn_cut(struct store_write *write, uint64_t branch, uint64_t end, size_t *budget,
                     bool *done)
{
    *done = false;
    while (*budget > 0) {
        struct record_turn turn;
        uint64_t position = UINT64_MAX;
        enum status status =
            last_turn(write->storage, write->txn, branch, UINT64_MAX, &position, &turn);
        if (status == STATUS_NOT_FOUND || (!status && position <= end)) {
            *done = true;
            return STATUS_OK;
        }
        bool damaged = status == STATUS_CORRUPT && position > end && position < UINT64_MAX;
        if (status && !damaged)
            return status;
        /* A snapshot is dozens of records. */
        size_t cost = damaged || turn.snapshot ? 32 : 1;
        *budget -= *budget < cost ? *budget : cost;
        if (damaged) { /* its place is enough to drop it; `check` names what that leaves behind */
            unsigned char key[RECORD_PAIR_KEY_BYTES];
            record_pair_key(key, branch, position);
            status = store_delete(write, STORE_TURN, key, sizeof key);
        } else {
            status = turn_remove(write, branch, position);
        }
        if (status)
            return status;
    }
    return STATUS_OK;
}
