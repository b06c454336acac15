#include "storage/branch.h"

#include <stdlib.h>
#include <string.h>

#include "proto/base/assert.h"
#include "storage/quota.h"
#include "storage/run.h"
#include "storage/turn.h"

enum status branch_get(const struct storage *storage, MDB_txn *txn, uint64_t branch,
                       struct record_branch *record)
{
    unsigned char key[8];
    MDB_val value;
    record_key(key, branch);
    enum status status = store_get(storage, txn, STORE_BRANCH, key, sizeof key, &value);
    return status ? status
                  : record_branch_decode(key, sizeof key, value.mv_data, value.mv_size, record);
}

enum status branch_put(struct store_write *write, uint64_t branch,
                       const struct record_branch *record)
{
    unsigned char key[8];
    struct record_branch old;
    struct buf buf;
    enum status was = branch_get(write->storage, write->txn, branch, &old);
    quota_count(write, was ? NULL : &old, record);
    buf_init(&buf);
    record_key(key, branch);
    record_branch_encode(&buf, key, sizeof key, record);
    enum status status = store_put(write, STORE_BRANCH, key, sizeof key, buf.data, buf.size);
    buf_close(&buf);
    return status;
}

uint64_t branch_first_chunk(const struct storage *storage, const struct record_branch *record)
{
    return record->fork_position / storage->chunk_tokens;
}

static void child_key(unsigned char key[STORE_CHILD_KEY_BYTES], uint64_t parent,
                      uint64_t position, uint64_t child)
{
    record_pair_key(key, parent, position);
    record_key(key + 16, child);
}

enum status branch_children(const struct storage *storage, MDB_txn *txn, uint64_t branch,
                            bool *any, uint64_t *position)
{
    unsigned char wanted[STORE_CHILD_KEY_BYTES];
    MDB_cursor *cursor;
    MDB_val key = {sizeof wanted, wanted}, value;
    *any = false;
    *position = 0;
    int rc = mdb_cursor_open(txn, storage->db[STORE_CHILD], &cursor);
    if (rc)
        return store_status(rc);
    /* No child is named UINT64_MAX, so the place of that one is behind the last real one. */
    child_key(wanted, branch, UINT64_MAX, UINT64_MAX);
    rc = mdb_cursor_get(cursor, &key, &value, MDB_SET_RANGE);
    rc = mdb_cursor_get(cursor, &key, &value, rc == MDB_NOTFOUND ? MDB_LAST : MDB_PREV);
    if (rc == 0 && key.mv_size == sizeof wanted && record_key_read(key.mv_data) == branch) {
        *any = true;
        *position = record_key_read((const unsigned char *)key.mv_data + 8);
    }
    mdb_cursor_close(cursor);
    return rc == MDB_NOTFOUND ? STATUS_OK : store_status(rc);
}

enum status branch_create(struct store_write *write, uint64_t parent, uint64_t position,
                          const char *owner, const char *tenant, uint64_t *branch)
{
    struct storage *storage = write->storage;
    struct record_counter counter;
    struct record_branch record = {0};
    enum status status = store_get_counter(storage, write->txn, &counter);
    if (status)
        return status;
    while (parent && position > 0) {
        struct record_branch above;
        status = branch_get(storage, write->txn, parent, &above);
        if (status)
            return STATUS_CORRUPT;
        record.depth = above.depth + 1;
        if (above.fork_position < position)
            break;
        parent = above.parent;
    }
    if (position == 0) {
        parent = 0; /* nothing to share */
        record.depth = 0;
    }
    if (record.depth >= LIMITS_LINEAGE)
        return STATUS_TOO_LARGE;
    record.parent = parent;
    record.fork_position = record.token_end = position;
    record.chunk_end = position / storage->chunk_tokens;
    memcpy(record.owner, owner, strlen(owner) + 1);
    memcpy(record.tenant, tenant, strlen(tenant) + 1);
    *branch = counter.branch++;
    status = store_put_counter(write, &counter);
    if (!status)
        status = branch_put(write, *branch, &record);
    if (!status && parent) {
        unsigned char key[STORE_CHILD_KEY_BYTES];
        child_key(key, parent, position, *branch);
        status = store_put(write, STORE_CHILD, key, sizeof key, "", 0);
    }
    return status;
}

enum status branch_append_chunks(struct store_write *write, uint64_t branch,
                                 struct record_branch *record, const void *const *kvs,
                                 const void *const *landmarks, size_t count)
{
    struct run_shape kv = run_shape_of(write->storage, STORE_KV);
    struct run_shape landmark = run_shape_of(write->storage, STORE_LANDMARK);
    struct run_source kv_source = {.pointers = kvs}, landmark_source = {.pointers = landmarks};
    enum status status = run_append(write, &kv, branch, record->chunk_end, &kv_source, count,
                                    &record->bytes);
    if (!status)
        status = run_append(write, &landmark, branch, record->chunk_end, &landmark_source, count,
                            &record->bytes);
    record->chunk_end += count;
    return status ? status : branch_put(write, branch, record);
}

enum status branch_append_tokens(struct store_write *write, uint64_t branch,
                                 struct record_branch *record, const int32_t *tokens, size_t count)
{
    struct run_shape shape = run_shape_of(write->storage, STORE_TOKEN);
    struct run_source source = {.flat = tokens};
    enum status status = run_append(write, &shape, branch, record->token_end, &source, count,
                                    &record->bytes);
    record->token_end += count;
    return status ? status : branch_put(write, branch, record);
}

/* Cuts the three kinds of runs of a branch down to `position`, the first ones first. */
static enum status cut(struct store_write *write, uint64_t branch, struct record_branch *record,
                       uint64_t position, size_t *budget, bool *done)
{
    static const enum store_db dbs[] = {STORE_KV, STORE_LANDMARK, STORE_TOKEN};
    uint64_t first_chunk = branch_first_chunk(write->storage, record);
    if (position < record->fork_position)
        position = record->fork_position;
    *done = true;
    for (size_t i = 0; i < sizeof dbs / sizeof dbs[0] && *done; i++) {
        struct run_shape shape = run_shape_of(write->storage, dbs[i]);
        bool tokens = dbs[i] == STORE_TOKEN;
        uint64_t end = tokens ? position : position / write->storage->chunk_tokens;
        uint64_t floor = tokens ? record->fork_position : first_chunk, left;
        enum status status =
            run_cut(write, &shape, branch, end, floor, budget, &record->bytes, &left);
        if (status)
            return status;
        *done = left <= end;
        if (tokens)
            record->token_end = left;
        else
            record->chunk_end = left;
    }
    return STATUS_OK;
}

enum status branch_truncate(struct store_write *write, uint64_t branch,
                            struct record_branch *record, uint64_t position)
{
    uint64_t end = position / write->storage->chunk_tokens;
    if (record->chunk_end <= end && record->token_end <= position)
        return STATUS_OK;
    size_t budget = SIZE_MAX;
    bool done;
    enum status status = cut(write, branch, record, position, &budget, &done);
    return status ? status : branch_put(write, branch, record);
}

static enum status mark_for_collection(struct store_write *write, uint64_t branch)
{
    unsigned char key[8];
    record_key(key, branch);
    return store_put(write, STORE_COLLECT, key, sizeof key, "", 0);
}

enum status branch_disown(struct store_write *write, uint64_t branch)
{
    struct record_branch record;
    enum status status = branch_get(write->storage, write->txn, branch, &record);
    if (status)
        return STATUS_CORRUPT;
    memset(record.owner, 0, sizeof record.owner);
    status = branch_put(write, branch, &record);
    return status ? status : mark_for_collection(write, branch);
}

/* Nothing reaches the branch any more and its runs are gone: takes it out of the tree. */
static enum status remove_branch(struct store_write *write, uint64_t branch,
                                 const struct record_branch *record)
{
    unsigned char key[STORE_CHILD_KEY_BYTES];
    struct record_branch parent, written;
    record_key(key, branch);
    /* What was counted is what was written down; `record` may be further on. */
    if (branch_get(write->storage, write->txn, branch, &written) == STATUS_OK)
        quota_count(write, &written, NULL);
    enum status status = store_delete(write, STORE_BRANCH, key, 8);
    if (status || record->parent == 0)
        return status;
    child_key(key, record->parent, record->fork_position, branch);
    status = store_delete(write, STORE_CHILD, key, sizeof key);
    if (status == STATUS_NOT_FOUND)
        status = STATUS_OK; /* damage that `check` names; there is nothing left to undo here */
    if (!status)
        status = branch_get(write->storage, write->txn, record->parent, &parent);
    if (status)
        return status == STATUS_NOT_FOUND ? STATUS_OK : status;
    return parent.owner[0] ? STATUS_OK : mark_for_collection(write, record->parent);
}

static enum status collect_branch(struct store_write *write, uint64_t branch, size_t *budget,
                                  bool *done)
{
    struct record_branch record;
    bool any_child;
    uint64_t reached;
    *done = true;
    enum status status = branch_get(write->storage, write->txn, branch, &record);
    if (status)
        return status == STATUS_NOT_FOUND ? STATUS_OK : status;
    if (record.owner[0])
        return STATUS_OK;
    status = branch_children(write->storage, write->txn, branch, &any_child, &reached);
    if (!status)
        status = turn_cut(write, branch, reached, budget, done);
    if (status || !*done)
        return status;
    status = branch_get(write->storage, write->txn, branch, &record); /* it counted on */
    if (!status)
        status = cut(write, branch, &record, reached, budget, done);
    if (status)
        return status;
    if (*done && !any_child)
        return remove_branch(write, branch, &record);
    return branch_put(write, branch, &record);
}

enum status branch_collect(struct store_write *write, size_t budget, bool *more)
{
    *more = true;
    while (budget > 0) {
        unsigned char name[8];
        MDB_cursor *cursor;
        MDB_val key, value;
        bool done;
        int rc = mdb_cursor_open(write->txn, write->storage->db[STORE_COLLECT], &cursor);
        if (rc)
            return store_status(rc);
        /* The newest first: its end may set its parent free. */
        rc = mdb_cursor_get(cursor, &key, &value, MDB_LAST);
        if (rc == 0 && key.mv_size == sizeof name)
            memcpy(name, key.mv_data, sizeof name);
        else if (rc == 0)
            rc = MDB_CORRUPTED;
        mdb_cursor_close(cursor);
        if (rc == MDB_NOTFOUND) {
            *more = false;
            return STATUS_OK;
        }
        if (rc)
            return store_status(rc);
        budget--;
        enum status status = collect_branch(write, record_key_read(name), &budget, &done);
        if (status)
            return status;
        if (!done)
            continue; /* the budget is spent */
        status = store_delete(write, STORE_COLLECT, name, sizeof name);
        if (status)
            return status;
    }
    return STATUS_OK;
}

enum status branch_lineage(const struct storage *storage, MDB_txn *txn, uint64_t branch,
                           struct branch_link **links, size_t *count)
{
    struct record_branch record;
    enum status status = branch_get(storage, txn, branch, &record);
    if (status)
        return status == STATUS_NOT_FOUND ? STATUS_CORRUPT : status;
    if (record.depth >= LIMITS_LINEAGE)
        return STATUS_CORRUPT;
    size_t room = (size_t)record.depth + 1, n = 0;
    struct branch_link *chain = malloc(room * sizeof *chain);
    if (!chain)
        return STATUS_NO_MEMORY;
    for (;;) {
        chain[n++] = (struct branch_link){branch, record.fork_position};
        if (record.parent == 0)
            break;
        branch = record.parent;
        status = n == room ? STATUS_CORRUPT : branch_get(storage, txn, branch, &record);
        if (status) {
            free(chain);
            return status == STATUS_NOT_FOUND ? STATUS_CORRUPT : status;
        }
    }
    *links = chain;
    *count = n;
    return STATUS_OK;
}
