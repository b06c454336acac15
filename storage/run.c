#include "storage/run.h"

#include <stdlib.h>
#include <string.h>

#include "proto/base/assert.h"

/* A run and LMDB's page header just fill this: large enough that the last, partly used page is
 * lost in it, small enough that finding that many pages in a row stays easy. */
#define RUN_BYTES (1 * LIMITS_MIB)
#define PAGE_HEADER_BYTES 16
/* Below these a run wastes too much of its last page and is worth writing again. Chunks are big,
 * so few of them suffice; 4,084 tokens and their header are four pages exactly. */
#define KV_MERGE_BYTES ((size_t)128 << 10)
#define LANDMARK_MERGE_BYTES ((size_t)64 << 10)
#define TOKEN_RUN_BYTES ((size_t)16 << 10)

struct run_shape run_shape_of(const struct storage *storage, enum store_db db)
{
    struct run_shape shape = {.db = db, .group = 1};
    size_t per_item = 0, room = RUN_BYTES - PAGE_HEADER_BYTES - RECORD_RUN_HEADER_BYTES;
    if (db == STORE_KV) {
        shape.kind = RECORD_KV;
        shape.item_bytes = (uint32_t)storage->kv_bytes;
        shape.merge_bytes = KV_MERGE_BYTES;
        per_item = storage->kv_bytes + 8;
    } else if (db == STORE_LANDMARK) {
        shape.kind = RECORD_LANDMARK;
        shape.item_bytes = (uint32_t)storage->landmark_bytes;
        shape.merge_bytes = LANDMARK_MERGE_BYTES;
        per_item = storage->landmark_bytes + 8;
    } else {
        ASSERT(db == STORE_TOKEN);
        shape.kind = RECORD_TOKEN;
        shape.item_bytes = sizeof(int32_t);
        shape.merge_bytes = TOKEN_RUN_BYTES;
        per_item = sizeof(int32_t);
        room = TOKEN_RUN_BYTES - PAGE_HEADER_BYTES - RECORD_RUN_HEADER_BYTES - 8;
    }
    size_t count = room / per_item;
    if (count > RECORD_RUN_ITEMS)
        count = RECORD_RUN_ITEMS;
    shape.max_count = count > 0 ? (uint32_t)count : 1;
    if (db == STORE_TOKEN)
        shape.group = shape.max_count;
    return shape;
}

static enum status decode(const struct run_shape *shape, const MDB_val *key, const MDB_val *value,
                          struct record_run *run)
{
    enum status status = record_run_decode(shape->kind, key->mv_data, key->mv_size,
                                           value->mv_data, value->mv_size, run);
    if (!status && run->item_bytes != shape->item_bytes)
        status = STATUS_CORRUPT;
    return status;
}

/* The last run of `branch` whose first index is at most `index`. */
static enum status run_at_or_before(MDB_cursor *cursor, const struct run_shape *shape,
                                    uint64_t branch, uint64_t index, struct record_run *run)
{
    unsigned char wanted[RECORD_PAIR_KEY_BYTES];
    record_pair_key(wanted, branch, index);
    MDB_val key = {sizeof wanted, wanted}, value;
    int rc = mdb_cursor_get(cursor, &key, &value, MDB_SET_RANGE);
    if (rc == MDB_NOTFOUND)
        rc = mdb_cursor_get(cursor, &key, &value, MDB_LAST);
    else if (rc == 0 && (key.mv_size != sizeof wanted || memcmp(key.mv_data, wanted, 16) != 0))
        rc = mdb_cursor_get(cursor, &key, &value, MDB_PREV);
    if (rc)
        return store_status(rc);
    if (key.mv_size != RECORD_PAIR_KEY_BYTES)
        return STATUS_CORRUPT;
    if (record_key_read(key.mv_data) != branch)
        return STATUS_NOT_FOUND;
    return decode(shape, &key, &value, run);
}

static enum status last_run(MDB_cursor *cursor, const struct run_shape *shape, uint64_t branch,
                            struct record_run *run)
{
    return run_at_or_before(cursor, shape, branch, UINT64_MAX, run);
}

enum status run_find(MDB_cursor *cursor, const struct run_shape *shape, uint64_t branch,
                     uint64_t index, struct record_run *run)
{
    enum status status = run_at_or_before(cursor, shape, branch, index, run);
    if (status)
        return status;
    return index - run->first < run->count ? STATUS_OK : STATUS_NOT_FOUND;
}

static uint64_t run_space(const struct storage *storage, const struct run_shape *shape,
                          uint32_t count)
{
    return store_space(storage, RECORD_PAIR_KEY_BYTES,
                       record_run_bytes(count, shape->item_bytes, shape->group));
}

/* Writes one run: `kept` items of `old`, which must not lie in the transaction's pages, then
 * `count` items of the source from its item `from` on. */
static enum status put_run(struct store_write *write, const struct run_shape *shape,
                           struct record_run run, const unsigned char *old, uint32_t kept,
                           const struct run_source *source, size_t from)
{
    unsigned char key[RECORD_PAIR_KEY_BYTES];
    void *room;
    run.kind = shape->kind;
    run.item_bytes = shape->item_bytes;
    run.group = shape->group;
    record_pair_key(key, run.branch, run.first);
    enum status status =
        store_put_room(write, shape->db, key, sizeof key,
                       record_run_bytes(run.count, run.item_bytes, run.group), &room);
    if (status)
        return status;
    if (kept)
        memcpy(record_run_item(room, &run, 0), old, (size_t)kept * run.item_bytes);
    uint32_t added = run.count - kept;
    if (added && source->pointers)
        for (uint32_t i = 0; i < added; i++)
            memcpy(record_run_item(room, &run, kept + i), source->pointers[from + i],
                   run.item_bytes);
    else if (added)
        memcpy(record_run_item(room, &run, kept),
               (const unsigned char *)source->flat + from * run.item_bytes,
               (size_t)added * run.item_bytes);
    record_run_seal(room, &run);
    return STATUS_OK;
}

/* A copy of the items of the branch's last run when it is small and whole and ends at `first`;
 * NULL in `*items` otherwise. A damaged run is left as it is, so that its damage stays visible. */
static enum status copy_small_tail(struct store_write *write, const struct run_shape *shape,
                                   uint64_t branch, uint64_t first, struct record_run *run,
                                   unsigned char **items)
{
    MDB_cursor *cursor;
    *items = NULL;
    int rc = mdb_cursor_open(write->txn, write->storage->db[shape->db], &cursor);
    if (rc)
        return store_status(rc);
    enum status status = last_run(cursor, shape, branch, run);
    if (!status && run->first + run->count == first && run->count < shape->max_count &&
        run->group == shape->group &&
        record_run_bytes(run->count, run->item_bytes, run->group) < shape->merge_bytes &&
        record_run_all_intact(run)) {
        size_t size = (size_t)run->count * run->item_bytes;
        *items = malloc(size);
        if (*items)
            memcpy(*items, run->items, size);
        status = *items ? STATUS_OK : STATUS_NO_MEMORY;
    }
    mdb_cursor_close(cursor);
    return status == STATUS_NOT_FOUND || status == STATUS_CORRUPT ? STATUS_OK : status;
}

enum status run_append(struct store_write *write, const struct run_shape *shape, uint64_t branch,
                       uint64_t first, const struct run_source *source, size_t count,
                       uint64_t *space)
{
    struct record_run tail;
    unsigned char *old;
    size_t done = 0;
    if (count == 0)
        return STATUS_OK;
    enum status status = copy_small_tail(write, shape, branch, first, &tail, &old);
    if (status)
        return status;
    if (old) {
        size_t room = shape->max_count - tail.count;
        done = count < room ? count : room;
        struct record_run run = {.branch = branch, .first = tail.first};
        run.count = tail.count + (uint32_t)done;
        status = put_run(write, shape, run, old, tail.count, source, 0);
        *space += run_space(write->storage, shape, run.count) -
                  run_space(write->storage, shape, tail.count);
        free(old);
    }
    while (!status && done < count) {
        struct record_run run = {.branch = branch, .first = first + done};
        run.count = count - done < shape->max_count ? (uint32_t)(count - done) : shape->max_count;
        status = put_run(write, shape, run, NULL, 0, source, done);
        *space += run_space(write->storage, shape, run.count);
        done += run.count;
    }
    return status;
}

/* Shortens the run under the cursor to its items before `end`. */
static enum status shorten(struct store_write *write, const struct run_shape *shape,
                           const struct record_run *run, uint64_t end, uint64_t *space)
{
    struct record_run less = {.branch = run->branch, .first = run->first};
    less.count = (uint32_t)(end - run->first);
    if (run->group != shape->group)
        return STATUS_UNSUPPORTED;
    for (uint32_t i = 0; i < less.count; i += run->group)
        if (!record_run_intact(run, i))
            return STATUS_CORRUPT; /* sealing it again would hide the damage */
    size_t size = (size_t)less.count * run->item_bytes;
    unsigned char *old = malloc(size);
    if (!old)
        return STATUS_NO_MEMORY;
    memcpy(old, run->items, size);
    *space -= run_space(write->storage, shape, run->count);
    *space += run_space(write->storage, shape, less.count);
    enum status status = put_run(write, shape, less, old, less.count, NULL, 0);
    free(old);
    return status;
}

/* The run under the cursor has a damaged header, so its count is unknown; but its key still says
 * where it starts, and when all of it lies past `end` that is enough to drop it. */
static enum status damaged_run(const struct storage *storage, MDB_cursor *cursor, uint64_t end,
                               struct record_run *run, uint64_t *space)
{
    MDB_val key, value;
    int rc = mdb_cursor_get(cursor, &key, &value, MDB_GET_CURRENT);
    if (rc || key.mv_size != RECORD_PAIR_KEY_BYTES)
        return STATUS_CORRUPT;
    *run = (struct record_run){.branch = record_key_read(key.mv_data)};
    run->first = record_key_read((const unsigned char *)key.mv_data + 8);
    *space = store_space(storage, key.mv_size, value.mv_size);
    return run->first >= end ? STATUS_OK : STATUS_CORRUPT;
}

enum status run_cut(struct store_write *write, const struct run_shape *shape, uint64_t branch,
                    uint64_t end, uint64_t floor, size_t *budget, uint64_t *space,
                    uint64_t *left_end)
{
    MDB_cursor *cursor;
    enum status status;
    int rc = mdb_cursor_open(write->txn, write->storage->db[shape->db], &cursor);
    if (rc)
        return store_status(rc);
    *left_end = floor;
    for (;;) {
        struct record_run run;
        uint64_t freed = 0;
        status = last_run(cursor, shape, branch, &run);
        if (!status)
            freed = run_space(write->storage, shape, run.count);
        else if (status == STATUS_CORRUPT)
            status = damaged_run(write->storage, cursor, end, &run, &freed);
        if (status == STATUS_NOT_FOUND) {
            status = STATUS_OK;
            break;
        }
        if (status)
            break;
        *left_end = run.first + run.count;
        if (*left_end <= end && run.first < end)
            break;
        if (*budget == 0)
            break;
        --*budget;
        if (run.first < end) {
            status = shorten(write, shape, &run, end, space);
            if (!status)
                *left_end = end;
            break;
        }
        unsigned char key[RECORD_PAIR_KEY_BYTES];
        record_pair_key(key, branch, run.first);
        status = store_delete(write, shape->db, key, sizeof key);
        if (status)
            break;
        *space -= freed;
        *left_end = floor;
    }
    mdb_cursor_close(cursor);
    return status;
}
