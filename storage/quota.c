#include "storage/quota.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "proto/base/assert.h"
#include "proto/base/hash.h"
#include "proto/base/log.h"
#include "storage/keep.h"
#include "storage/store.h"

#define SLOTS 1024 /* of names; many more tenants than this only make it slower */

struct entry {
    struct entry *next, *next_touched;
    char tenant[LIMITS_ID_BYTES];
    uint64_t bytes, limit; /* 0: no limit */
    int64_t pending;       /* of the transaction under way */
    bool touched;
};

struct quota {
    pthread_mutex_t lock; /* of all that follows */
    struct entry *slots[SLOTS];
    struct entry *touched;
};

/* Under the lock. NULL: there is none, or no memory for one. */
static struct entry *find(struct quota *quota, const char *tenant, bool make)
{
    struct entry **at = &quota->slots[hash64(tenant, strlen(tenant), 0) % SLOTS];
    while (*at && strcmp((*at)->tenant, tenant) != 0)
        at = &(*at)->next;
    if (!*at && make) {
        *at = calloc(1, sizeof **at);
        if (*at)
            memcpy((*at)->tenant, tenant, strlen(tenant) + 1);
    }
    return *at;
}

static enum status count_one(struct quota *quota, const char *tenant, uint64_t bytes)
{
    if (!tenant[0])
        return STATUS_OK;
    struct entry *entry = find(quota, tenant, true);
    if (!entry)
        return STATUS_NO_MEMORY;
    entry->bytes += bytes;
    return STATUS_OK;
}

/* What counts one record; a damaged one is left to `check`. */
struct count {
    const struct storage *storage;
    MDB_txn *txn;
    struct quota *quota;
    /* The list that the last item was of, and for whom it counts. */
    char owner[LIMITS_ID_BYTES], tenant[LIMITS_ID_BYTES];
};

static enum status count_memory(struct count *count, const MDB_val *key, const MDB_val *value)
{
    struct record_memory record;
    char id[LIMITS_ID_BYTES] = "";
    if (key->mv_size >= sizeof id ||
        record_memory_decode(key->mv_data, key->mv_size, value->mv_data, value->mv_size, &record))
        return STATUS_OK;
    memcpy(id, key->mv_data, key->mv_size);
    return count_one(count->quota, quota_tenant(id, record.tenant),
                     store_space(count->storage, key->mv_size, value->mv_size));
}

static enum status count_branch(struct count *count, const MDB_val *key, const MDB_val *value)
{
    struct record_branch record;
    if (record_branch_decode(key->mv_data, key->mv_size, value->mv_data, value->mv_size, &record))
        return STATUS_OK;
    return count_one(count->quota, record.tenant, record.bytes);
}

static enum status count_object(struct count *count, const MDB_val *key, const MDB_val *value)
{
    char tenant[LIMITS_ID_BYTES];
    if (record_object_tenant(value->mv_data, value->mv_size, tenant))
        return STATUS_OK;
    return count_one(count->quota, tenant,
                     store_space(count->storage, key->mv_size, value->mv_size));
}

static enum status count_item(struct count *count, const MDB_val *key, const MDB_val *value)
{
    const char *owner = key->mv_data;
    if (key->mv_size < 10 || key->mv_size > RECORD_ITEM_KEY_BYTES || owner[key->mv_size - 9])
        return STATUS_OK;
    if (strcmp(owner, count->owner) != 0) {
        memcpy(count->owner, owner, key->mv_size - 8);
        if (keep_tenant(count->storage, count->txn, owner, count->tenant))
            count->tenant[0] = 0;
    }
    return count_one(count->quota, count->tenant,
                     store_space(count->storage, key->mv_size, value->mv_size));
}

static enum status count_table(struct count *count, enum store_db db,
                               enum status (*each)(struct count *count, const MDB_val *key,
                                                   const MDB_val *value))
{
    MDB_cursor *cursor;
    MDB_val key, value;
    enum status status = STATUS_OK;
    int rc = mdb_cursor_open(count->txn, count->storage->db[db], &cursor);
    if (rc)
        return store_status(rc);
    while (!status && !(rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)))
        status = each(count, &key, &value);
    mdb_cursor_close(cursor);
    return status || rc == MDB_NOTFOUND ? status : store_status(rc);
}

static enum status count_all(struct storage *storage, struct quota *quota)
{
    struct count count = {.storage = storage, .quota = quota};
    enum status status = store_read_begin(storage, &count.txn);
    if (status)
        return status;
    status = count_table(&count, STORE_MEMORY, count_memory);
    if (!status)
        status = count_table(&count, STORE_BRANCH, count_branch);
    if (!status)
        status = count_table(&count, STORE_OBJECT, count_object);
    if (!status)
        status = count_table(&count, STORE_ITEM, count_item);
    store_read_end(storage, count.txn);
    return status;
}

enum status quota_open(struct storage *storage, struct quota **out)
{
    struct quota *quota = calloc(1, sizeof *quota);
    if (!quota)
        return STATUS_NO_MEMORY;
    pthread_mutex_init(&quota->lock, NULL);
    enum status status = count_all(storage, quota);
    if (status)
        quota_close(quota);
    else
        *out = quota;
    return status;
}

void quota_close(struct quota *quota)
{
    if (!quota)
        return;
    for (size_t i = 0; i < SLOTS; i++)
        while (quota->slots[i]) {
            struct entry *entry = quota->slots[i];
            quota->slots[i] = entry->next;
            free(entry);
        }
    pthread_mutex_destroy(&quota->lock);
    free(quota);
}

const char *quota_tenant(const char *id, const char *tenant)
{
    return storage_is_prefix(id) ? "" : tenant;
}

static void add(struct quota *quota, const char *tenant, int64_t bytes)
{
    struct entry *entry = tenant[0] && bytes ? find(quota, tenant, true) : NULL;
    if (!entry)
        return;
    entry->pending += bytes;
    if (!entry->touched) {
        entry->touched = true;
        entry->next_touched = quota->touched;
        quota->touched = entry;
    }
}

void quota_count(struct store_write *write, const struct record_branch *old,
                 const struct record_branch *record)
{
    struct quota *quota = write->storage->quota;
    if (!quota)
        return;
    pthread_mutex_lock(&quota->lock);
    if (old)
        add(quota, old->tenant, -(int64_t)old->bytes);
    if (record)
        add(quota, record->tenant, (int64_t)record->bytes);
    pthread_mutex_unlock(&quota->lock);
}

void quota_count_bytes(struct store_write *write, const char *tenant, int64_t bytes)
{
    struct quota *quota = write->storage->quota;
    if (!quota)
        return;
    pthread_mutex_lock(&quota->lock);
    add(quota, tenant, bytes);
    pthread_mutex_unlock(&quota->lock);
}

void quota_end(struct storage *storage, bool committed)
{
    struct quota *quota = storage->quota;
    if (!quota)
        return;
    pthread_mutex_lock(&quota->lock);
    for (struct entry *entry = quota->touched; entry; entry = entry->next_touched) {
        if (committed)
            entry->bytes += (uint64_t)entry->pending;
        entry->pending = 0;
        entry->touched = false;
    }
    quota->touched = NULL;
    pthread_mutex_unlock(&quota->lock);
}

enum status quota_check_bytes(struct store_write *write, const char *tenant, uint64_t more)
{
    struct quota *quota = write->storage->quota;
    enum status status = STATUS_OK;
    if (!quota || !tenant[0])
        return STATUS_OK;
    pthread_mutex_lock(&quota->lock);
    const struct entry *entry = find(quota, tenant, false);
    if (entry && entry->limit && entry->bytes + (uint64_t)entry->pending + more > entry->limit)
        status = STATUS_KEY_QUOTA;
    pthread_mutex_unlock(&quota->lock);
    return status;
}

enum status quota_check(struct store_write *write, const struct record_branch *record,
                        uint64_t more)
{
    const struct storage *storage = write->storage;
    if (storage_is_prefix(record->owner))
        return STATUS_OK;
    if (storage->memory_quota) {
        uint64_t items;
        enum status status = keep_list_bytes(storage, write->txn, record->owner, &items);
        if (status)
            return status;
        if (record->bytes + items + more > storage->memory_quota)
            return STATUS_MEMORY_QUOTA;
    }
    return quota_check_bytes(write, record->tenant, more);
}

enum status storage_set_quotas(struct storage *storage, const struct storage_quota *quotas,
                               size_t count)
{
    struct quota *quota = storage->quota;
    enum status status = STATUS_OK;
    pthread_mutex_lock(&quota->lock);
    for (size_t i = 0; i < SLOTS; i++)
        for (struct entry *entry = quota->slots[i]; entry; entry = entry->next)
            entry->limit = 0;
    for (size_t i = 0; i < count; i++) {
        struct entry *entry = find(quota, quotas[i].tenant, true);
        if (entry)
            entry->limit = quotas[i].bytes;
        else
            status = STATUS_NO_MEMORY;
    }
    pthread_mutex_unlock(&quota->lock);
    return status;
}

void storage_get_quota(struct storage *storage, const char *tenant, struct storage_usage *usage)
{
    struct quota *quota = storage->quota;
    *usage = (struct storage_usage){.memory_quota = storage->memory_quota};
    pthread_mutex_lock(&quota->lock);
    const struct entry *entry = find(quota, tenant, false);
    if (entry) {
        usage->bytes = entry->bytes;
        usage->key_quota = entry->limit;
    }
    pthread_mutex_unlock(&quota->lock);
}
