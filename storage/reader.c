#include <stdlib.h>
#include <string.h>

#include "proto/base/log.h"
#include "storage/branch.h"
#include "storage/keep.h"
#include "storage/memory.h"
#include "storage/run.h"
#include "storage/snapshot.h"
#include "storage/turn.h"

/* From here on mapping the pages at once is cheaper than one fault each. */
#define POPULATE_BYTES ((size_t)64 << 10)

static void count_read(struct storage *storage, uint64_t chunks, uint64_t bytes)
{
    atomic_fetch_add_explicit(&storage->chunks_read, chunks, memory_order_relaxed);
    atomic_fetch_add_explicit(&storage->bytes_read, bytes, memory_order_relaxed);
}

/* ---- memories ---- */

static enum status fill_memory(const struct storage *storage, MDB_txn *txn, const char *id,
                               const struct record_memory *record, struct storage_memory *memory)
{
    struct record_branch branch;
    enum status status = branch_get(storage, txn, record->branch, &branch);
    if (status)
        return status == STATUS_NOT_FOUND ? STATUS_CORRUPT : status;
    *memory = (struct storage_memory){.branch = record->branch};
    memcpy(memory->id, id, strlen(id) + 1);
    memcpy(memory->parent, record->parent, sizeof memory->parent);
    memcpy(memory->tenant, record->tenant, sizeof memory->tenant);
    memory->created_at = record->created_at;
    memory->expires = (struct storage_expires){record->expires_s, record->expires_from_use};
    memory->expires_at = expiry_end(record);
    memory->token_count = record->position;
    memory->chunk_count = record->position / storage->chunk_tokens;
    memory->text_bytes = record->text_bytes;
    memory->ephemeral = record->ephemeral;
    status = keep_list_bytes(storage, txn, id, &memory->bytes_on_disk);
    if (status)
        return status;
    memory->bytes_on_disk += branch.bytes;
    if (record->snapshot) {
        struct record_snapshot snapshot;
        status = snapshot_get(storage, txn, record->snapshot, &snapshot);
        if (status)
            return status == STATUS_NOT_FOUND ? STATUS_CORRUPT : status;
        memory->snapshot_bytes = (size_t)snapshot.size;
    }
    memory->metadata = malloc(record->metadata_size + 1);
    if (!memory->metadata)
        return STATUS_NO_MEMORY;
    memcpy(memory->metadata, record->metadata, record->metadata_size);
    memory->metadata[record->metadata_size] = 0;
    return STATUS_OK;
}

enum status storage_memory_get(struct storage *storage, const char *id,
                               struct storage_memory *memory)
{
    struct record_memory record;
    MDB_txn *txn;
    enum status status = store_read_begin(storage, &txn);
    if (status)
        return status;
    status = memory_get(storage, txn, id, &record);
    if (!status)
        status = fill_memory(storage, txn, id, &record, memory);
    store_read_end(storage, txn);
    return status;
}

void storage_memory_close(struct storage_memory *memory)
{
    free(memory->metadata);
    memory->metadata = NULL;
}

/* Whether the memory that writes the branch may be in the tenant's list, as the branch alone tells:
 * its tenant is the memory's. */
static bool may_be_listed(const struct record_branch *branch, const char *tenant)
{
    return branch->owner[0] && !storage_is_prefix(branch->owner) &&
           (!tenant || strcmp(branch->tenant, tenant) == 0);
}

/* The memory that writes a branch, as the branch's record names it. STATUS_NOT_FOUND: it is not to be
 * listed. */
static enum status read_listed(const struct storage *storage, MDB_txn *txn, const MDB_val *key,
                               const MDB_val *value, const char *tenant,
                               struct storage_memory *memory)
{
    struct record_branch branch;
    struct record_memory record;
    enum status status =
        record_branch_decode(key->mv_data, key->mv_size, value->mv_data, value->mv_size, &branch);
    if (status || !may_be_listed(&branch, tenant))
        return status ? status : STATUS_NOT_FOUND;
    status = memory_get(storage, txn, branch.owner, &record);
    if (status)
        return status == STATUS_NOT_FOUND ? STATUS_CORRUPT : status;
    return record.ephemeral ? STATUS_NOT_FOUND
                            : fill_memory(storage, txn, branch.owner, &record, memory);
}

/* A damaged memory does not keep the others from being listed. */
static void log_damaged(const MDB_val *key)
{
    log_event(LOG_ERROR, "storage_memory_damaged", "branch", LOG_INT,
              key->mv_size == 8 ? (int64_t)record_key_read(key->mv_data) : -1, NULL);
}

/* Walks the branches from the newest down: their order is the order of creation. */
static enum status list_memories(struct storage *storage, MDB_txn *txn, const char *tenant,
                                 uint64_t before, size_t limit, struct storage_memory *memories,
                                 size_t *count, bool *has_more)
{
    unsigned char wanted[8];
    MDB_cursor *cursor;
    MDB_val key = {sizeof wanted, wanted}, value;
    enum status status = STATUS_OK;
    int rc = mdb_cursor_open(txn, storage->db[STORE_BRANCH], &cursor);
    if (rc)
        return store_status(rc);
    record_key(wanted, before);
    rc = mdb_cursor_get(cursor, &key, &value, MDB_SET_RANGE);
    rc = mdb_cursor_get(cursor, &key, &value, rc == MDB_NOTFOUND ? MDB_LAST : MDB_PREV);
    for (; rc == 0 && !status && !*has_more; rc = mdb_cursor_get(cursor, &key, &value, MDB_PREV)) {
        struct storage_memory memory;
        status = read_listed(storage, txn, &key, &value, tenant, &memory);
        if (status == STATUS_CORRUPT)
            log_damaged(&key);
        if (status == STATUS_CORRUPT || status == STATUS_NOT_FOUND) {
            status = STATUS_OK;
        } else if (!status && *count == limit) {
            *has_more = true;
            storage_memory_close(&memory);
        } else if (!status) {
            memories[(*count)++] = memory;
        }
    }
    mdb_cursor_close(cursor);
    return status || rc == 0 || rc == MDB_NOTFOUND ? status : store_status(rc);
}

enum status storage_memory_list(struct storage *storage, const char *tenant, const char *after,
                                size_t limit, struct storage_memory *memories, size_t *count,
                                bool *has_more)
{
    struct record_memory record = {.branch = UINT64_MAX};
    MDB_txn *txn;
    *count = 0;
    *has_more = false;
    enum status status = store_read_begin(storage, &txn);
    if (status)
        return status;
    if (after)
        status = memory_get(storage, txn, after, &record);
    if (!status && after && tenant && strcmp(record.tenant, tenant) != 0)
        status = STATUS_NOT_FOUND;
    if (!status)
        status =
            list_memories(storage, txn, tenant, record.branch, limit, memories, count, has_more);
    store_read_end(storage, txn);
    if (status) {
        for (size_t i = 0; i < *count; i++)
            storage_memory_close(&memories[i]);
        *count = 0;
    }
    return status;
}

static enum status list_turns(struct turn_walk *walk, size_t limit, struct storage_turn *turns,
                              size_t *count, bool *has_more)
{
    struct record_turn turn;
    uint64_t position;
    for (;;) {
        enum status status = turn_walk_next(walk, &position, &turn);
        if (status)
            return status == STATUS_NOT_FOUND ? STATUS_OK : status;
        if (*count == limit) {
            *has_more = true;
            return STATUS_OK;
        }
        struct storage_turn *out = &turns[(*count)++];
        *out = (struct storage_turn){.position = position,
                                     .text_bytes = turn.text_bytes,
                                     .created_at = turn.created_at,
                                     .has_snapshot = turn.snapshot != 0};
        memcpy(out->bookmark, turn.bookmark, sizeof out->bookmark);
    }
}

enum status storage_turn_list(struct storage *storage, const char *id, uint64_t from, size_t limit,
                              struct storage_turn *turns, size_t *count, bool *has_more)
{
    struct record_memory record;
    struct turn_walk walk;
    MDB_txn *txn;
    *count = 0;
    *has_more = false;
    enum status status = store_read_begin(storage, &txn);
    if (status)
        return status;
    status = memory_get(storage, txn, id, &record);
    if (!status) {
        uint64_t end = from < record.position ? from : record.position;
        status = turn_walk_begin(&walk, storage, txn, record.branch, end);
        status = status == STATUS_NOT_FOUND ? STATUS_CORRUPT : status;
    }
    if (!status)
        status = list_turns(&walk, limit, turns, count, has_more);
    store_read_end(storage, txn);
    return status;
}

enum status storage_lineage(struct storage *storage, const char *id, struct storage_range **ranges,
                            size_t *count)
{
    struct record_memory record;
    struct branch_link *links = NULL;
    size_t link_count = 0, n = 0;
    MDB_txn *txn;
    enum status status = store_read_begin(storage, &txn);
    if (status)
        return status;
    status = memory_get(storage, txn, id, &record);
    if (!status)
        status = branch_lineage(storage, txn, record.branch, &links, &link_count);
    store_read_end(storage, txn);
    if (status)
        return status;
    struct storage_range *out = malloc(link_count * sizeof *out);
    if (!out) {
        free(links);
        return STATUS_NO_MEMORY;
    }
    /* Two forks within one chunk leave the older of the branches without any chunk. */
    for (size_t i = link_count; i-- > 0;) {
        uint64_t first = links[i].fork_position / storage->chunk_tokens;
        if (n > 0 && out[n - 1].first == first)
            n--;
        out[n++] = (struct storage_range){links[i].branch, first};
    }
    free(links);
    *ranges = out;
    *count = n;
    return STATUS_OK;
}

enum status storage_snapshot(struct storage *storage, const char *id, void **snapshot, size_t *size,
                             uint64_t *position)
{
    struct record_memory record;
    struct record_snapshot head;
    void *bytes = NULL;
    MDB_txn *txn;
    enum status status = store_read_begin(storage, &txn);
    if (status)
        return status;
    status = memory_get(storage, txn, id, &record);
    if (!status && record.snapshot == 0)
        status = STATUS_NOT_FOUND;
    if (!status) {
        status = snapshot_get(storage, txn, record.snapshot, &head);
        if (status == STATUS_NOT_FOUND || (!status && head.position != record.position))
            status = STATUS_CORRUPT;
    }
    if (!status) {
        bytes = malloc((size_t)head.size);
        status =
            bytes ? snapshot_read(storage, txn, record.snapshot, &head, bytes) : STATUS_NO_MEMORY;
    }
    store_read_end(storage, txn);
    if (status) {
        free(bytes);
        return status;
    }
    count_read(storage, 0, head.size);
    *snapshot = bytes;
    *size = (size_t)head.size;
    *position = head.position;
    return STATUS_OK;
}

/* ---- runs ---- */

/* A run that is missing where one was asked for is damage. */
static enum status find(MDB_cursor *cursor, const struct run_shape *shape, uint64_t branch,
                        uint64_t index, struct record_run *run)
{
    enum status status = run_find(cursor, shape, branch, index, run);
    return status == STATUS_NOT_FOUND ? STATUS_CORRUPT : status;
}

static enum status copy_chunk(const struct run_shape *shape, const struct record_run *run,
                              uint64_t index, void *out)
{
    uint32_t i = (uint32_t)(index - run->first);
    if (!record_run_intact(run, i))
        return STATUS_CORRUPT;
    memcpy(out, run->items + (size_t)i * shape->item_bytes, shape->item_bytes);
    return STATUS_OK;
}

/* Runs found ahead of the copying; more than any step's picks of one sequence. */
#define READ_AHEAD 64

static enum status read_chunks(struct storage *storage, MDB_cursor *cursor,
                               const struct run_shape *shape, const struct storage_read *reads,
                               size_t count)
{
    struct record_run runs[READ_AHEAD];
    enum status status = STATUS_OK;
    for (size_t from = 0; !status && from < count; from += READ_AHEAD) {
        size_t n = count - from < READ_AHEAD ? count - from : READ_AHEAD;
        for (size_t i = 0; !status && i < n; i++) {
            const struct storage_read *read = &reads[from + i];
            status = find(cursor, shape, read->branch, read->index, &runs[i]);
            if (!status)
                store_prefetch(storage,
                               runs[i].items + (read->index - runs[i].first) * shape->item_bytes,
                               shape->item_bytes);
        }
        for (size_t i = 0; !status && i < n; i++)
            status = copy_chunk(shape, &runs[i], reads[from + i].index, reads[from + i].kv);
    }
    return status;
}

enum status storage_read_chunks(struct storage *storage, const struct storage_read *reads,
                                size_t count)
{
    struct run_shape shape = run_shape_of(storage, STORE_KV);
    MDB_cursor *cursor;
    MDB_txn *txn;
    enum status status = store_cursor_open(storage, STORE_KV, &txn, &cursor);
    if (status)
        return status;
    status = read_chunks(storage, cursor, &shape, reads, count);
    store_cursor_close(storage, txn, cursor);
    if (!status)
        count_read(storage, count, (uint64_t)count * storage->kv_bytes);
    return status;
}

/* Items [first, first + count) of a branch, run by run. Every byte copied is checked. */
static enum status read_items(struct storage *storage, MDB_txn *txn, enum store_db db,
                              uint64_t branch, uint64_t first, uint64_t count, void *out)
{
    struct run_shape shape = run_shape_of(storage, db);
    unsigned char *to = out;
    MDB_cursor *cursor;
    enum status status = store_status(mdb_cursor_open(txn, storage->db[db], &cursor));
    if (status)
        return status;
    while (!status && count > 0) {
        struct record_run run;
        status = find(cursor, &shape, branch, first, &run);
        if (status)
            break;
        uint32_t from = (uint32_t)(first - run.first);
        uint64_t n = run.count - from < count ? run.count - from : count;
        const unsigned char *items = run.items + (size_t)from * shape.item_bytes;
        store_prefetch(storage, items, n * shape.item_bytes);
        if (n * shape.item_bytes >= POPULATE_BYTES)
            store_populate(storage, items, n * shape.item_bytes);
        for (uint64_t i = from - from % run.group; !status && i < from + n; i += run.group)
            if (!record_run_intact(&run, (uint32_t)i))
                status = STATUS_CORRUPT;
        if (!status)
            memcpy(to, items, n * shape.item_bytes);
        to += n * shape.item_bytes;
        first += n;
        count -= n;
    }
    mdb_cursor_close(cursor);
    return status;
}

enum status storage_read_landmarks(struct storage *storage, uint64_t branch, uint64_t first,
                                   uint64_t count, void *out)
{
    MDB_txn *txn;
    enum status status = store_read_begin(storage, &txn);
    if (status)
        return status;
    status = read_items(storage, txn, STORE_LANDMARK, branch, first, count, out);
    store_read_end(storage, txn);
    if (!status)
        count_read(storage, 0, count * storage->landmark_bytes);
    return status;
}

static enum status read_tokens(struct storage *storage, MDB_txn *txn, const char *id, uint64_t from,
                               size_t count, int32_t *tokens)
{
    struct record_memory record;
    struct branch_link *links;
    size_t link_count;
    enum status status = memory_get(storage, txn, id, &record);
    if (status)
        return status;
    if (from > record.position || count > record.position - from)
        return STATUS_INVALID;
    if (count == 0)
        return STATUS_OK;
    status = branch_lineage(storage, txn, record.branch, &links, &link_count);
    if (status)
        return status;
    /* From the memory's own branch, which holds the end, up to the root. */
    uint64_t end = from + count;
    for (size_t i = 0; !status && i < link_count && end > from; i++) {
        uint64_t begin = links[i].fork_position > from ? links[i].fork_position : from;
        if (begin >= end)
            continue;
        status = read_items(storage, txn, STORE_TOKEN, links[i].branch, begin, end - begin,
                            tokens + (begin - from));
        end = begin;
    }
    free(links);
    return status;
}

enum status storage_read_tokens(struct storage *storage, const char *id, uint64_t from,
                                size_t count, int32_t *tokens)
{
    const enum status status = storage_read_marked(storage, id, from, count, tokens);
    for (size_t i = 0; !status && i < count; i++)
        tokens[i] &= ~STORAGE_TOKEN_MARK;
    return status;
}

enum status storage_read_marked(struct storage *storage, const char *id, uint64_t from,
                                size_t count, int32_t *tokens)
{
    MDB_txn *txn;
    enum status status = store_read_begin(storage, &txn);
    if (status)
        return status;
    status = read_tokens(storage, txn, id, from, count, tokens);
    store_read_end(storage, txn);
    return status;
}
