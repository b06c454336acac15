#include "storage/expiry.h"

#include <stdlib.h>
#include <string.h>

#include "storage/memory.h"
#include "storage/store.h"

/* ---- the clock ---- */

void expiry_clock_init(struct expiry_clock *clock, int64_t newest, int64_t wall, int64_t monotonic)
{
    /* Nothing that was written can have been written later than now. How much later it is, after
     * the time in which nothing ran, only the wall clock says, and it has to be believed first. */
    *clock = (struct expiry_clock){.now = newest ? newest : wall, .seen = monotonic};
}

static bool near(int64_t a, int64_t b)
{
    return a - b <= EXPIRY_SLACK_S && b - a <= EXPIRY_SLACK_S;
}

int64_t expiry_clock_now(struct expiry_clock *clock, int64_t wall, int64_t monotonic)
{
    clock->now += monotonic - clock->seen;
    clock->seen = monotonic;
    const int64_t offset = wall - clock->now;
    if (near(offset, 0)) {
        clock->now = wall;
        clock->since = 0;
    } else if (!clock->since || !near(offset, clock->offset) || wall < EXPIRY_WALL_LEAST) {
        clock->offset = offset;
        clock->since = monotonic ? monotonic : 1;
    } else if (monotonic - clock->since >= EXPIRY_BELIEF_S) {
        clock->now = wall;
        clock->since = 0;
    }
    return clock->now;
}

/* ---- the table ---- */

int64_t expiry_end(const struct record_memory *memory)
{
    if (!memory->expires_s || memory->ephemeral)
        return 0;
    return (memory->expires_from_use ? memory->active_at : memory->created_at) + memory->expires_s;
}

bool expiry_touch(struct record_memory *memory, int64_t stamp)
{
    if (!memory->expires_s || stamp <= memory->active_at)
        return false;
    /* A hundredth of the time more or less is not worth moving the entry for. */
    if (stamp - memory->active_at < memory->expires_s / 100)
        return false;
    memory->active_at = stamp;
    return true;
}

size_t expiry_key(unsigned char key[EXPIRY_KEY_BYTES], int64_t end, const char *id)
{
    const size_t size = strlen(id);
    record_key(key, (uint64_t)end);
    memcpy(key + 8, id, size);
    return 8 + size;
}

enum status expiry_update(struct store_write *write, const char *id,
                          const struct record_memory *old, const struct record_memory *memory)
{
    unsigned char key[EXPIRY_KEY_BYTES];
    const int64_t before = old ? expiry_end(old) : 0, after = memory ? expiry_end(memory) : 0;
    enum status status = STATUS_OK;
    if (before == after)
        return STATUS_OK;
    if (before)
        status = store_delete(write, STORE_EXPIRY, key, expiry_key(key, before, id));
    if (status == STATUS_NOT_FOUND)
        status = STATUS_OK; /* damage that `check` names; there is nothing left to undo here */
    if (!status && after)
        status = store_put(write, STORE_EXPIRY, key, expiry_key(key, after, id), "", 0);
    return status;
}

/* ---- what is over ---- */

enum status storage_expired(struct storage *storage, const char *after, size_t limit,
                            char (*ids)[LIMITS_ID_BYTES], size_t *count)
{
    const int64_t now = store_now(storage);
    bool passed = after == NULL;
    MDB_cursor *cursor;
    MDB_val key, value;
    MDB_txn *txn;
    *count = 0;
    enum status status = store_cursor_open(storage, STORE_EXPIRY, &txn, &cursor);
    if (status)
        return status;
    int rc = 0;
    while (!rc && *count < limit && !(rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT))) {
        if (key.mv_size <= 8 || key.mv_size >= EXPIRY_KEY_BYTES)
            continue; /* not written by us; `check` names it */
        if (record_key_read(key.mv_data) > (uint64_t)now)
            break;
        const size_t size = key.mv_size - 8;
        char *id = ids[*count];
        memcpy(id, (const char *)key.mv_data + 8, size);
        id[size] = 0;
        if (passed)
            ++*count;
        else
            passed = strcmp(id, after) == 0;
    }
    if (rc != MDB_NOTFOUND)
        status = store_status(rc);
    store_cursor_close(storage, txn, cursor);
    return status;
}
