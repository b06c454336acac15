#include "storage/memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/base/assert.h"
#include "proto/base/log.h"
#include "storage/branch.h"
#include "storage/keep.h"
#include "storage/quota.h"
#include "storage/snapshot.h"
#include "storage/turn.h"

/* Memories looked at in one transaction of the recovery: its pages stay few. */
#define RECOVER_BATCH 256

enum status memory_get(const struct storage *storage, MDB_txn *txn, const char *id,
                       struct record_memory *record)
{
    MDB_val value;
    size_t size = strlen(id);
    if (size == 0 || size >= LIMITS_ID_BYTES)
        return STATUS_NOT_FOUND;
    enum status status = store_get(storage, txn, STORE_MEMORY, id, size, &value);
    return status ? status : record_memory_decode(id, size, value.mv_data, value.mv_size, record);
}

/* Disk space of the record of a memory that is there. */
static uint64_t space_of(const struct store_write *write, const char *id)
{
    MDB_val value;
    const size_t size = strlen(id);
    return store_get(write->storage, write->txn, STORE_MEMORY, id, size, &value)
               ? 0
               : store_space(write->storage, size, value.mv_size);
}

/* Puts the record and counts it for its tenant, who must have room for it when `asks`. */
static enum status put_record(struct store_write *write, const char *id,
                              const struct record_memory *record, bool asks)
{
    const char *tenant = quota_tenant(id, record->tenant);
    const size_t id_size = strlen(id);
    struct record_memory old;
    struct buf buf;
    const enum status was = memory_get(write->storage, write->txn, id, &old);
    const uint64_t before = was ? 0 : space_of(write, id);
    enum status status = expiry_update(write, id, was ? NULL : &old, record);
    if (status)
        return status;
    buf_init(&buf);
    record_memory_encode(&buf, id, id_size, record);
    const uint64_t space = store_space(write->storage, id_size, buf.size);
    if (asks && space > before)
        status = quota_check_bytes(write, tenant, space - before);
    if (!status)
        status = store_put(write, STORE_MEMORY, id, id_size, buf.data, buf.size);
    if (!status)
        quota_count_bytes(write, tenant, (int64_t)space - (int64_t)before);
    buf_close(&buf);
    return status;
}

enum status memory_put(struct store_write *write, const char *id,
                       const struct record_memory *record)
{
    return put_record(write, id, record, false);
}

static enum status delete_record(struct store_write *write, const char *id,
                                 const struct record_memory *record)
{
    const uint64_t space = space_of(write, id);
    enum status status = store_delete(write, STORE_MEMORY, id, strlen(id));
    if (!status)
        quota_count_bytes(write, quota_tenant(id, record->tenant), -(int64_t)space);
    return status;
}

/* A copy of the metadata, which else lies in a page that writes may move; free it. */
static enum status keep_metadata(struct record_memory *memory, char **copy)
{
    *copy = malloc(memory->metadata_size + 1);
    if (!*copy)
        return STATUS_NO_MEMORY;
    memcpy(*copy, memory->metadata, memory->metadata_size);
    memory->metadata = *copy;
    return STATUS_OK;
}

/* A fork is made of the memory: it is in use. */
static enum status touch(struct store_write *write, const char *id)
{
    struct record_memory memory;
    char *metadata;
    enum status status = memory_get(write->storage, write->txn, id, &memory);
    if (status || !expiry_touch(&memory, store_stamp(write->storage)))
        return status;
    status = keep_metadata(&memory, &metadata);
    if (!status)
        status = memory_put(write, id, &memory);
    free(metadata);
    return status;
}

/* A memory and its branch; whichever is missing behind an existing memory is damage. */
static enum status get_both(struct store_write *write, const char *id, struct record_memory *memory,
                            struct record_branch *branch)
{
    enum status status = memory_get(write->storage, write->txn, id, memory);
    if (status)
        return status;
    status = branch_get(write->storage, write->txn, memory->branch, branch);
    if (status == STATUS_NOT_FOUND || (!status && strcmp(branch->owner, id) != 0))
        return STATUS_CORRUPT;
    return status;
}

/* Moves `source` back to the last place at or before `at` that has a snapshot; to the beginning
 * when there is none. */
static enum status step_back(struct store_write *write, struct record_memory *source, uint64_t at)
{
    struct turn_walk walk;
    struct record_turn turn;
    uint64_t position;
    if (at >= source->position)
        return STATUS_OK;
    enum status status = turn_walk_begin(&walk, write->storage, write->txn, source->branch, at);
    do
        status = status ? status : turn_walk_next(&walk, &position, &turn);
    while (!status && turn.snapshot == 0);
    if (status && status != STATUS_NOT_FOUND)
        return status;
    source->position = status ? 0 : position;
    source->text_bytes = status ? 0 : turn.text_bytes;
    source->snapshot = status ? 0 : turn.snapshot;
    return STATUS_OK;
}

enum status memory_create(struct store_write *write, const struct storage_memory_options *options,
                          const char *metadata, size_t metadata_size)
{
    const char *id = options->id, *from = options->from;
    struct record_memory record = {0}, source = {0};
    enum status status = memory_get(write->storage, write->txn, id, &record);
    if (status != STATUS_NOT_FOUND)
        return status ? status : STATUS_CONFLICT;
    if (from) {
        status = memory_get(write->storage, write->txn, from, &source);
        if (!status && options->at > source.position)
            status = STATUS_INVALID;
        if (!status && options->at)
            status = step_back(write, &source, options->at);
        if (status)
            return status;
    }
    record = (struct record_memory){.created_at = store_stamp(write->storage),
                                    .ephemeral = options->ephemeral,
                                    .expires_s = options->expires.seconds,
                                    .expires_from_use = options->expires.from_use};
    record.active_at = record.created_at;
    record.position = source.position;
    record.text_bytes = source.text_bytes;
    record.snapshot = source.snapshot;
    record.metadata = metadata;
    record.metadata_size = metadata_size;
    if (from)
        memcpy(record.parent, from, strlen(from) + 1);
    memcpy(record.tenant, options->tenant, strlen(options->tenant) + 1);
    status = branch_create(write, source.branch, source.position, id,
                           quota_tenant(id, record.tenant), &record.branch);
    if (!status && record.snapshot)
        status = snapshot_reference(write, record.snapshot);
    if (!status && from)
        status = touch(write, from);
    return status ? status : put_record(write, id, &record, true);
}

enum status memory_update(struct store_write *write, const char *id, const char *metadata,
                          size_t metadata_size, const struct storage_expires *expires)
{
    struct record_memory record;
    char *old = NULL;
    enum status status = memory_get(write->storage, write->txn, id, &record);
    if (status)
        return status;
    if (metadata) {
        record.metadata = metadata;
        record.metadata_size = metadata_size;
    } else {
        status = keep_metadata(&record, &old);
    }
    if (expires) {
        record.expires_s = expires->seconds;
        record.expires_from_use = expires->from_use;
        record.active_at = store_stamp(write->storage);
    }
    if (!status)
        status = put_record(write, id, &record, true);
    free(old);
    return status;
}

enum status memory_delete(struct store_write *write, const char *id)
{
    struct record_memory record;
    enum status status = memory_get(write->storage, write->txn, id, &record);
    if (status)
        return status;
    status = keep_cut(write, id, 0);
    if (!status)
        status = delete_record(write, id, &record);
    if (!status)
        status = expiry_update(write, id, &record, NULL);
    if (!status && record.snapshot)
        status = snapshot_release(write, record.snapshot);
    return status ? status : branch_disown(write, record.branch);
}

enum status memory_expire(struct store_write *write, const char *id)
{
    struct record_memory record;
    enum status status = memory_get(write->storage, write->txn, id, &record);
    if (status)
        return status;
    const int64_t end = expiry_end(&record);
    return end && end <= store_now(write->storage) ? memory_delete(write, id) : STATUS_CONFLICT;
}

/* The commit's turn; it replaces the last one when it goes on with it. */
static enum status commit_turn(struct store_write *write, const struct storage_commit *commit,
                               const struct record_memory *memory, uint64_t old_position)
{
    struct record_turn turn, old;
    enum status status = STATUS_OK;
    if (commit->goes_on && old_position < commit->position) {
        status = turn_get(write->storage, write->txn, memory->branch, old_position, &old);
        if (!status && !old.bookmark[0])
            status = turn_remove(write, memory->branch, old_position);
        if (status == STATUS_NOT_FOUND)
            status = STATUS_OK;
    }
    turn = (struct record_turn){.snapshot = memory->snapshot,
                                .text_bytes = memory->text_bytes,
                                .created_at = (int64_t)time(NULL)};
    if (!status)
        status = turn_put(write, memory->branch, memory->position, &turn);
    return status ? status
                  : turn_retain(write, commit->id, memory->branch, memory->position, false);
}

enum status memory_commit(struct store_write *write, const struct storage_commit *commit)
{
    struct record_memory memory;
    struct record_branch branch;
    enum status status = get_both(write, commit->id, &memory, &branch);
    if (status)
        return status;
    if (commit->position < commit->token_count ||
        commit->position - commit->token_count != memory.position)
        return STATUS_CONFLICT;
    if (branch.token_end != memory.position)
        return STATUS_CORRUPT;
    /* A position is only good with every chunk before it. */
    if (branch.chunk_end < commit->position / write->storage->chunk_tokens)
        return STATUS_INVALID;
    char *metadata;
    status = quota_check(write, &branch,
                         commit->token_count * sizeof *commit->tokens + commit->snapshot_bytes);
    if (!status)
        status = keep_metadata(&memory, &metadata);
    if (status)
        return status;
    uint64_t old_snapshot = memory.snapshot, old_position = memory.position;
    memory.ephemeral = memory.ephemeral && !commit->settles;
    (void)expiry_touch(&memory, store_stamp(write->storage)); /* it is written anyway */
    /* A fork's turns begin behind where it starts. */
    bool is_turn = !memory.ephemeral && commit->position > branch.fork_position;
    memory.position = commit->position;
    memory.text_bytes = commit->text_bytes;
    if (commit->token_count)
        status = branch_append_tokens(write, memory.branch, &branch, commit->tokens,
                                      commit->token_count);
    if (!status && old_snapshot)
        status = snapshot_release(write, old_snapshot);
    if (!status)
        status = snapshot_put(write, memory.branch, commit->position, commit->snapshot,
                              commit->snapshot_bytes, is_turn ? 2 : 1, &memory.snapshot);
    if (!status)
        status = memory_put(write, commit->id, &memory);
    if (!status && is_turn)
        status = commit_turn(write, commit, &memory, old_position);
    free(metadata);
    return status;
}

enum status memory_truncate(struct store_write *write, const char *id)
{
    struct record_memory memory;
    struct record_branch branch;
    enum status status = get_both(write, id, &memory, &branch);
    return status ? status : branch_truncate(write, memory.branch, &branch, memory.position);
}

/* The turn that a memory stands at gets its record, where the branch is its own. */
static enum status settle_turn(struct store_write *write, const char *id,
                               const struct record_memory *memory, uint64_t fork_position)
{
    struct record_turn turn = {.snapshot = memory->snapshot,
                               .text_bytes = memory->text_bytes,
                               .created_at = (int64_t)time(NULL)};
    struct record_turn imported;
    if (!memory->snapshot || memory->position <= fork_position)
        return STATUS_OK;
    enum status status =
        turn_get(write->storage, write->txn, memory->branch, memory->position, &imported);
    if (!status) { /* it was this turn where it comes from, too */
        turn.created_at = imported.created_at;
        memcpy(turn.bookmark, imported.bookmark, sizeof turn.bookmark);
    }
    if (!status || status == STATUS_NOT_FOUND)
        status = snapshot_reference(write, memory->snapshot);
    if (!status)
        status = turn_put(write, memory->branch, memory->position, &turn);
    return status ? status : turn_retain(write, id, memory->branch, memory->position, false);
}

enum status memory_settle(struct store_write *write, const char *ephemeral, const char *id,
                          bool replaces)
{
    struct record_memory from, old, memory;
    struct record_branch branch;
    enum status status = get_both(write, ephemeral, &from, &branch);
    if (status)
        return status;
    if (!from.ephemeral)
        return STATUS_INVALID;
    status = memory_get(write->storage, write->txn, id, &old);
    if (status && (replaces || status != STATUS_NOT_FOUND))
        return status;
    if (!status && !replaces)
        return STATUS_CONFLICT;
    memory = replaces ? old : from;
    char *metadata;
    status = keep_metadata(&memory, &metadata);
    if (status)
        return status;
    memory.ephemeral = replaces && old.ephemeral;
    (void)expiry_touch(&memory, store_stamp(write->storage)); /* it is written anyway */
    memory.branch = from.branch;
    memory.position = from.position;
    memory.text_bytes = from.text_bytes;
    memory.snapshot = from.snapshot;
    memset(branch.owner, 0, sizeof branch.owner);
    memcpy(branch.owner, id, strlen(id));
    snprintf(branch.tenant, sizeof branch.tenant, "%s", quota_tenant(id, memory.tenant));
    status = delete_record(write, ephemeral, &from);
    if (!status)
        status = branch_put(write, memory.branch, &branch);
    if (!status && replaces && old.snapshot)
        status = snapshot_release(write, old.snapshot);
    if (!status && replaces)
        status = branch_disown(write, old.branch);
    if (!status && replaces)
        status = keep_cut(write, id, memory.position);
    if (!status)
        status = memory_put(write, id, &memory);
    if (!status)
        status = settle_turn(write, id, &memory, branch.fork_position);
    free(metadata);
    return status;
}

/* ---- turns ---- */

/* The turn at `position` of a memory, and its branch. STATUS_NOT_FOUND: there is no such turn. */
static enum status find_turn(const struct storage *storage, MDB_txn *txn,
                             const struct record_memory *memory, uint64_t position,
                             uint64_t *branch, struct record_turn *turn)
{
    struct turn_walk walk;
    uint64_t found;
    if (position > memory->position)
        return STATUS_NOT_FOUND;
    enum status status = turn_walk_begin(&walk, storage, txn, memory->branch, position);
    if (!status)
        status = turn_walk_next(&walk, &found, turn);
    *branch = walk.branch;
    return status ? status : found == position ? STATUS_OK : STATUS_NOT_FOUND;
}

/* A turn that the memory may change: on a branch that is its own or nobody's. */
static enum status own_turn(struct store_write *write, const char *id, uint64_t position,
                            struct record_memory *memory, uint64_t *branch,
                            struct record_turn *turn)
{
    struct record_branch record;
    enum status status = memory_get(write->storage, write->txn, id, memory);
    if (!status)
        status = find_turn(write->storage, write->txn, memory, position, branch, turn);
    if (!status)
        status = branch_get(write->storage, write->txn, *branch, &record);
    if (!status && record.owner[0] && strcmp(record.owner, id) != 0)
        status = STATUS_CONFLICT;
    return status;
}

enum status memory_bookmark(struct store_write *write, const char *id, uint64_t position,
                            const char *bookmark)
{
    struct record_memory memory;
    struct record_turn turn;
    uint64_t branch;
    enum status status = own_turn(write, id, position, &memory, &branch, &turn);
    if (!status && !turn.snapshot && bookmark[0])
        status = STATUS_CONFLICT;
    if (status)
        return status;
    uint64_t head_branch = memory.branch, head = memory.position;
    memset(turn.bookmark, 0, sizeof turn.bookmark);
    memcpy(turn.bookmark, bookmark, strlen(bookmark));
    status = turn_put(write, branch, position, &turn);
    if (!status && !bookmark[0])
        status = turn_retain(write, id, head_branch, head, true);
    return status;
}

enum status memory_delete_turn(struct store_write *write, const char *id, uint64_t position)
{
    struct record_memory memory;
    struct record_turn turn;
    uint64_t branch;
    enum status status = own_turn(write, id, position, &memory, &branch, &turn);
    if (!status && position == memory.position)
        status = STATUS_CONFLICT;
    return status ? status : turn_remove(write, branch, position);
}

enum status memory_put_turns(struct store_write *write, const char *id,
                             const struct storage_turn *turns, size_t count)
{
    struct record_memory memory;
    struct record_branch branch;
    enum status status = get_both(write, id, &memory, &branch);
    if (status)
        return status;
    if (!memory.ephemeral)
        return STATUS_INVALID;
    for (size_t i = 0; i < count; i++)
        if (turns[i].position <= branch.fork_position || turns[i].position > memory.position)
            return STATUS_INVALID;
    for (size_t i = 0; i < count && !status; i++) {
        struct record_turn turn = {.text_bytes = turns[i].text_bytes,
                                   .created_at = turns[i].created_at};
        memcpy(turn.bookmark, turns[i].bookmark, sizeof turn.bookmark);
        status = turn_put(write, memory.branch, turns[i].position, &turn);
    }
    return status;
}

/* ---- recovery ---- */

struct id {
    char text[LIMITS_ID_BYTES];
};

/* The ids that follow `after` ("" for the first), at most `room`. */
static enum status next_ids(struct store_write *write, const char *after, struct id *ids,
                            size_t room, size_t *count)
{
    MDB_cursor *cursor;
    MDB_val key = {strlen(after), (void *)(uintptr_t)after}, value;
    *count = 0;
    int rc = mdb_cursor_open(write->txn, write->storage->db[STORE_MEMORY], &cursor);
    if (rc)
        return store_status(rc);
    rc = mdb_cursor_get(cursor, &key, &value, after[0] ? MDB_SET_RANGE : MDB_FIRST);
    for (; rc == 0 && *count < room; rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)) {
        if (key.mv_size >= LIMITS_ID_BYTES)
            continue; /* not written by us; `check` names it */
        if (key.mv_size == strlen(after) && memcmp(key.mv_data, after, key.mv_size) == 0)
            continue;
        memcpy(ids[*count].text, key.mv_data, key.mv_size);
        ids[(*count)++].text[key.mv_size] = 0;
    }
    mdb_cursor_close(cursor);
    return rc == MDB_NOTFOUND ? STATUS_OK : store_status(rc);
}

static enum status recover_memory(struct store_write *write, const char *id)
{
    struct record_memory memory;
    enum status status = memory_get(write->storage, write->txn, id, &memory);
    int64_t *newest = &write->storage->newest;
    if (!status && *newest < memory.created_at)
        *newest = memory.created_at;
    if (!status && *newest < memory.active_at)
        *newest = memory.active_at;
    if (!status)
        status = memory.ephemeral ? memory_delete(write, id) : memory_truncate(write, id);
    return status;
}

/* One transaction over `ids`. A damaged one is noted in `skip`; when it had begun to write, the
 * transaction is given up and `*again` asks for another without it. */
static enum status recover_batch(struct storage *storage, const struct id *ids, size_t count,
                                 bool *skip, bool *again)
{
    struct store_write write;
    *again = false;
    enum status status = store_write_begin(storage, &write);
    if (status)
        return status;
    for (size_t i = 0; i < count; i++) {
        if (skip[i])
            continue;
        uint64_t mutations = write.mutations;
        status = recover_memory(&write, ids[i].text);
        if (status == STATUS_CORRUPT) {
            log_event(LOG_ERROR, "storage_memory_damaged", "memory", LOG_STR, ids[i].text, NULL);
            skip[i] = true;
            *again = write.mutations != mutations;
            status = STATUS_OK;
            if (!*again)
                continue;
        }
        if (status || *again) {
            store_write_abort(&write);
            return status;
        }
    }
    return store_write_commit(&write);
}

/* ---- migration ---- */

enum status memory_migrate(struct store_write *write, uint32_t format)
{
    char after[LIMITS_ID_BYTES] = "";
    struct id *ids = calloc(RECOVER_BATCH, sizeof *ids);
    size_t count = 1;
    enum status status = ids ? STATUS_OK : STATUS_NO_MEMORY;
    while (!status && count > 0) {
        status = next_ids(write, after, ids, RECOVER_BATCH, &count);
        for (size_t i = 0; !status && i < count; i++) {
            struct record_memory memory;
            struct record_branch branch;
            status = get_both(write, ids[i].text, &memory, &branch);
            if (!status && format < 2 && !memory.ephemeral) {
                status = settle_turn(write, ids[i].text, &memory, branch.fork_position);
                if (!status) /* it counts the turn's snapshot */
                    status = get_both(write, ids[i].text, &memory, &branch);
            }
            const char *tenant = quota_tenant(ids[i].text, memory.tenant);
            if (!status && tenant[0]) {
                memcpy(branch.tenant, tenant, strlen(tenant) + 1);
                status = branch_put(write, memory.branch, &branch);
            }
        }
        if (count > 0)
            memcpy(after, ids[count - 1].text, sizeof after);
    }
    free(ids);
    return status;
}

enum status memory_recover(struct storage *storage, struct error *err)
{
    struct id *ids = calloc(RECOVER_BATCH, sizeof *ids);
    char after[LIMITS_ID_BYTES] = "";
    enum status status = ids ? STATUS_OK : STATUS_NO_MEMORY;
    for (size_t count = 1; !status && count > 0;) {
        struct store_write write;
        bool skip[RECOVER_BATCH] = {false};
        status = store_write_begin(storage, &write);
        if (status)
            break;
        status = next_ids(&write, after, ids, RECOVER_BATCH, &count);
        store_write_abort(&write);
        if (status || count == 0)
            break;
        bool again;
        do /* each turn skips one more damaged memory, so this ends */
            status = recover_batch(storage, ids, count, skip, &again);
        while (!status && again);
        memcpy(after, ids[count - 1].text, sizeof after);
    }
    free(ids);
    return status ? error_set(err, status, "cannot recover the store in %s: %s", storage->path,
                              status_text(status))
                  : STATUS_OK;
}
