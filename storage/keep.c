#include "storage/keep.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/base/assert.h"
#include "storage/branch.h"
#include "storage/memory.h"
#include "storage/quota.h"

/* ---- packing: the object, if any, then the items, each behind a head of fixed size ---- */

struct head {
    bool is_object;
    char owner[LIMITS_ID_BYTES]; /* an item's list; an object's memory */
    char id[LIMITS_ID_BYTES];
    char tenant[LIMITS_ID_BYTES];
    bool made_memory;
    int64_t created_at;
    size_t size; /* bytes that follow */
};

static void pack(struct buf *out, const struct head *head, const void *bytes)
{
    buf_append(out, head, sizeof *head);
    if (head->size)
        buf_append(out, bytes, head->size);
}

static void set_id(char out[LIMITS_ID_BYTES], const char *id)
{
    ASSERT(strlen(id) < LIMITS_ID_BYTES);
    memcpy(out, id, strlen(id) + 1);
}

void keep_pack(const struct storage_keep *keep, struct buf *out)
{
    struct head head;
    if (keep->object) {
        const struct storage_object *object = keep->object;
        memset(&head, 0, sizeof head);
        head.is_object = true;
        head.made_memory = object->made_memory;
        head.created_at = object->created_at;
        head.size = object->size;
        set_id(head.owner, object->memory);
        set_id(head.id, object->id);
        set_id(head.tenant, object->tenant);
        pack(out, &head, object->bytes);
    }
    for (size_t i = 0; i < sizeof keep->lists / sizeof *keep->lists; i++) {
        const struct storage_list *list = &keep->lists[i];
        for (size_t j = 0; j < list->count; j++) {
            memset(&head, 0, sizeof head);
            head.size = list->items[j].size;
            set_id(head.owner, list->owner);
            set_id(head.id, list->items[j].id);
            pack(out, &head, list->items[j].bytes);
        }
    }
}

/* ---- lists ---- */

/* A walk over a list. The cursor stands at an item while `rc` is 0. */
struct list_walk {
    MDB_cursor *cursor;
    MDB_val key, value;
    unsigned char wanted[RECORD_ITEM_KEY_BYTES];
    size_t wanted_size;
    int rc;
};

static void settle(struct list_walk *walk)
{
    const size_t owner_size = walk->wanted_size - 8;
    if (!walk->rc && (walk->key.mv_size != walk->wanted_size ||
                      memcmp(walk->key.mv_data, walk->wanted, owner_size) != 0))
        walk->rc = MDB_NOTFOUND;
}

static void walk_step(struct list_walk *walk, bool forward)
{
    walk->rc =
        mdb_cursor_get(walk->cursor, &walk->key, &walk->value, forward ? MDB_NEXT : MDB_PREV);
    settle(walk);
}

/* At the first item, or the last. */
static void walk_to_end(struct list_walk *walk, bool first)
{
    record_key(walk->wanted + walk->wanted_size - 8, first ? 0 : UINT64_MAX);
    walk->key = (MDB_val){walk->wanted_size, walk->wanted};
    walk->rc = mdb_cursor_get(walk->cursor, &walk->key, &walk->value, MDB_SET_RANGE);
    if (!first) /* nothing has the last number: before whatever comes behind it */
        walk->rc = mdb_cursor_get(walk->cursor, &walk->key, &walk->value,
                                  walk->rc == MDB_NOTFOUND ? MDB_LAST : MDB_PREV);
    settle(walk);
}

static enum status walk_begin(struct list_walk *walk, const struct storage *storage, MDB_txn *txn,
                              const char *owner, bool first)
{
    *walk = (struct list_walk){0};
    walk->wanted_size = record_item_key(walk->wanted, owner, 0);
    walk->rc = mdb_cursor_open(txn, storage->db[STORE_ITEM], &walk->cursor);
    if (walk->rc)
        return store_status(walk->rc);
    walk_to_end(walk, first);
    return STATUS_OK;
}

static uint64_t walk_number(const struct list_walk *walk)
{
    return record_key_read((const unsigned char *)walk->key.mv_data + walk->wanted_size - 8);
}

static enum status walk_read(const struct list_walk *walk, struct record_item *item)
{
    return record_item_decode(walk->key.mv_data, walk->key.mv_size, walk->value.mv_data,
                              walk->value.mv_size, item);
}

/* Ends the walk; what went wrong with it, if anything did. */
static enum status walk_end(struct list_walk *walk)
{
    mdb_cursor_close(walk->cursor);
    return walk->rc == MDB_NOTFOUND ? STATUS_OK : store_status(walk->rc);
}

/* The number of the item `id`. STATUS_NOT_FOUND. */
static enum status find_item(const struct storage *storage, MDB_txn *txn, const char *owner,
                             const char *id, uint64_t *number)
{
    struct list_walk walk;
    bool found = false;
    enum status status = walk_begin(&walk, storage, txn, owner, false);
    if (status)
        return status;
    for (; !status && !walk.rc && !found; found ? (void)0 : walk_step(&walk, false)) {
        struct record_item item;
        status = walk_read(&walk, &item);
        found = !status && strcmp(item.id, id) == 0;
        if (found)
            *number = walk_number(&walk);
    }
    const enum status end = walk_end(&walk);
    return status ? status : end ? end : found ? STATUS_OK : STATUS_NOT_FOUND;
}

enum status keep_list_bytes(const struct storage *storage, MDB_txn *txn, const char *owner,
                            uint64_t *bytes)
{
    struct list_walk walk;
    *bytes = 0;
    enum status status = walk_begin(&walk, storage, txn, owner, true);
    if (status)
        return status;
    for (; !walk.rc; walk_step(&walk, true))
        *bytes += store_space(storage, walk.key.mv_size, walk.value.mv_size);
    return walk_end(&walk);
}

static enum status get_object(const struct storage *storage, MDB_txn *txn, const char *id,
                              struct record_object *object)
{
    MDB_val value;
    const size_t size = strlen(id);
    if (!size || size >= LIMITS_ID_BYTES)
        return STATUS_NOT_FOUND;
    enum status status = store_get(storage, txn, STORE_OBJECT, id, size, &value);
    return status ? status : record_object_decode(id, size, value.mv_data, value.mv_size, object);
}

enum status keep_tenant(const struct storage *storage, MDB_txn *txn, const char *owner,
                        char tenant[LIMITS_ID_BYTES])
{
    struct record_memory memory;
    MDB_val value;
    tenant[0] = 0;
    enum status status = store_get(storage, txn, STORE_OBJECT, owner, strlen(owner), &value);
    if (!status)
        return record_object_tenant(value.mv_data, value.mv_size, tenant);
    if (status == STATUS_NOT_FOUND)
        status = memory_get(storage, txn, owner, &memory);
    if (!status)
        strcpy(tenant, quota_tenant(owner, memory.tenant));
    return status;
}

/* ---- writes ---- */

/* Whether the list of `owner`, where that is a memory, may take so much more. */
static enum status check_list(struct store_write *write, const char *owner, uint64_t more)
{
    struct record_memory memory;
    struct record_branch branch;
    if (!write->storage->memory_quota)
        return STATUS_OK;
    enum status status = memory_get(write->storage, write->txn, owner, &memory);
    if (!status)
        status = branch_get(write->storage, write->txn, memory.branch, &branch);
    if (status)
        return status == STATUS_NOT_FOUND ? STATUS_OK : status;
    return quota_check(write, &branch, more);
}

/* Puts a record and counts it for the tenant; `old`: the space of the one whose place it takes. */
static enum status put_counted(struct store_write *write, enum store_db db, const void *key,
                               size_t key_size, const struct buf *record, const char *tenant,
                               uint64_t old)
{
    const uint64_t space = store_space(write->storage, key_size, record->size);
    enum status status = old ? STATUS_OK : quota_check_bytes(write, tenant, space);
    if (!status)
        status = store_put(write, db, key, key_size, record->data, record->size);
    if (!status)
        quota_count_bytes(write, tenant, (int64_t)space - (int64_t)old);
    return status;
}

/* Deletes one that is there. */
static enum status delete_counted(struct store_write *write, enum store_db db, const void *key,
                                  size_t key_size, const char *tenant)
{
    MDB_val value;
    enum status status = store_get(write->storage, write->txn, db, key, key_size, &value);
    const uint64_t space = status ? 0 : store_space(write->storage, key_size, value.mv_size);
    if (!status)
        status = store_delete(write, db, key, key_size);
    if (!status)
        quota_count_bytes(write, tenant, -(int64_t)space);
    return status;
}

static enum status put_item(struct store_write *write, const char *owner,
                            const struct record_item *item)
{
    unsigned char key[RECORD_ITEM_KEY_BYTES];
    char tenant[LIMITS_ID_BYTES];
    struct list_walk walk;
    uint64_t number = 1;
    struct buf buf;
    enum status status = walk_begin(&walk, write->storage, write->txn, owner, false);
    if (status)
        return status;
    if (!walk.rc)
        number = walk_number(&walk) + 1;
    status = walk_end(&walk);
    if (!status)
        status = keep_tenant(write->storage, write->txn, owner, tenant);
    if (status && status != STATUS_NOT_FOUND)
        return status;
    const size_t key_size = record_item_key(key, owner, number);
    buf_init(&buf);
    record_item_encode(&buf, key, key_size, item);
    if (item->size) /* one without says only what a memory was made for */
        status = check_list(write, owner, store_space(write->storage, key_size, buf.size));
    else
        status = STATUS_OK;
    if (!status)
        status = put_counted(write, STORE_ITEM, key, key_size, &buf, tenant, 0);
    buf_close(&buf);
    return status;
}

static enum status put_object(struct store_write *write, const struct head *head,
                              const unsigned char *bytes, uint64_t branch, uint64_t position)
{
    struct record_object object = {.created_at = head->created_at,
                                   .branch = branch,
                                   .position = position,
                                   .made_memory = head->made_memory,
                                   .bytes = bytes,
                                   .size = head->size};
    const size_t id_size = strlen(head->id);
    MDB_val old;
    struct buf buf;
    memcpy(object.memory, head->owner, sizeof object.memory);
    memcpy(object.tenant, head->tenant, sizeof object.tenant);
    enum status status =
        store_get(write->storage, write->txn, STORE_OBJECT, head->id, id_size, &old);
    if (status && status != STATUS_NOT_FOUND)
        return status;
    const uint64_t old_space = status ? 0 : store_space(write->storage, id_size, old.mv_size);
    buf_init(&buf);
    record_object_encode(&buf, head->id, id_size, &object);
    status = put_counted(write, STORE_OBJECT, head->id, id_size, &buf, object.tenant, old_space);
    buf_close(&buf);
    if (!status && object.made_memory) { /* the memory's list says what it is there for */
        struct record_item item = {.position = position};
        memcpy(item.id, head->id, sizeof item.id);
        status = put_item(write, object.memory, &item);
    }
    return status;
}

enum status keep_put(struct store_write *write, const void *packed, size_t size, uint64_t branch,
                     uint64_t position)
{
    const unsigned char *at = packed, *end = at + size;
    enum status status = STATUS_OK;
    while (at < end && !status) {
        struct head head;
        memcpy(&head, at, sizeof head);
        at += sizeof head;
        if (head.is_object) {
            status = put_object(write, &head, at, branch, position);
        } else {
            struct record_item item = {.position = position, .bytes = at, .size = head.size};
            memcpy(item.id, head.id, sizeof item.id);
            status = put_item(write, head.owner, &item);
        }
        at += head.size;
    }
    return status;
}

/* Takes the last item off the tenant's list if it lies behind `position`; `id` is whose it was, ""
 * when there is none. A damaged one goes where all of them go. */
static enum status cut_last(struct store_write *write, const char *owner, const char *tenant,
                            uint64_t position, char id[LIMITS_ID_BYTES], bool *cut)
{
    struct list_walk walk;
    struct record_item item;
    unsigned char key[RECORD_ITEM_KEY_BYTES];
    size_t key_size = 0;
    id[0] = 0;
    *cut = false;
    enum status status = walk_begin(&walk, write->storage, write->txn, owner, false);
    if (status)
        return status;
    if (!walk.rc) {
        status = walk_read(&walk, &item);
        if (!status)
            memcpy(id, item.id, sizeof item.id);
        *cut = status ? !position : !position || item.position > position;
        status = *cut ? STATUS_OK : status;
        key_size = walk.key.mv_size;
        memcpy(key, walk.key.mv_data, key_size);
    }
    const enum status end = walk_end(&walk);
    status = status ? status : end;
    return status || !*cut ? status : delete_counted(write, STORE_ITEM, key, key_size, tenant);
}

/* Deletes the object `id` with its list, if the memory `owner` was made for it. */
static enum status delete_made(struct store_write *write, const char *owner, const char *id)
{
    struct record_object object;
    char item[LIMITS_ID_BYTES];
    enum status status = get_object(write->storage, write->txn, id, &object);
    if (status)
        return status == STATUS_NOT_FOUND ? STATUS_OK : status;
    if (!object.made_memory || strcmp(object.memory, owner) != 0)
        return STATUS_OK;
    for (bool cut = true; cut && !status;)
        status = cut_last(write, id, object.tenant, 0, item, &cut);
    return status ? status : delete_counted(write, STORE_OBJECT, id, strlen(id), object.tenant);
}

enum status keep_cut(struct store_write *write, const char *owner, uint64_t position)
{
    char tenant[LIMITS_ID_BYTES];
    enum status status = keep_tenant(write->storage, write->txn, owner, tenant);
    if (status)
        return status == STATUS_NOT_FOUND ? STATUS_OK : status;
    for (bool cut = true; cut && !status;) {
        char id[LIMITS_ID_BYTES];
        status = cut_last(write, owner, tenant, position, id, &cut);
        if (!status && cut && id[0])
            status = delete_made(write, owner, id);
    }
    return status;
}

static enum status delete_item(struct store_write *write, const char *owner, const char *id)
{
    unsigned char key[RECORD_ITEM_KEY_BYTES];
    char tenant[LIMITS_ID_BYTES];
    uint64_t number;
    enum status status = find_item(write->storage, write->txn, owner, id, &number);
    if (!status)
        status = keep_tenant(write->storage, write->txn, owner, tenant);
    return status ? status
                  : delete_counted(write, STORE_ITEM, key, record_item_key(key, owner, number),
                                   tenant);
}

enum status keep_delete_object(struct store_write *write, const char *id, bool with_memory)
{
    struct record_object object;
    struct list_walk walk;
    enum status status = get_object(write->storage, write->txn, id, &object);
    if (status)
        return status;
    status = keep_cut(write, id, 0);
    if (!status)
        status = delete_counted(write, STORE_OBJECT, id, strlen(id), object.tenant);
    if (status || !object.made_memory)
        return status;
    status = delete_item(write, object.memory, id);
    if (status == STATUS_NOT_FOUND) /* the memory is gone, or went back to before it */
        status = STATUS_OK;
    if (!status)
        status = walk_begin(&walk, write->storage, write->txn, object.memory, true);
    if (status)
        return status;
    const bool others = !walk.rc;
    status = walk_end(&walk);
    if (status || others || !with_memory)
        return status;
    status = memory_delete(write, object.memory);
    return status == STATUS_NOT_FOUND ? STATUS_OK : status;
}

/* ---- reads ---- */

/* Whether the place of the object is still one of its memory's past. */
static enum status is_reachable(const struct storage *storage, MDB_txn *txn,
                                const struct record_object *object, bool *reachable)
{
    struct record_memory memory;
    struct branch_link *links = NULL;
    size_t count = 0;
    *reachable = false;
    if (!object->branch)
        return STATUS_OK;
    enum status status = memory_get(storage, txn, object->memory, &memory);
    if (status)
        return status == STATUS_NOT_FOUND ? STATUS_OK : status;
    status = branch_lineage(storage, txn, memory.branch, &links, &count);
    for (size_t i = 0; i < count && !status; i++) {
        const uint64_t end = i ? links[i - 1].fork_position : memory.position;
        if (links[i].branch == object->branch)
            *reachable = object->position >= links[i].fork_position && object->position <= end;
    }
    free(links);
    return status;
}

static enum status copy_bytes(const void *bytes, size_t size, void **out)
{
    char *copy = malloc(size + 1);
    if (!copy)
        return STATUS_NO_MEMORY;
    if (size)
        memcpy(copy, bytes, size);
    copy[size] = 0;
    *out = copy;
    return STATUS_OK;
}

enum status storage_object_get(struct storage *storage, const char *id,
                               struct storage_object *object)
{
    struct record_object record;
    MDB_txn *txn;
    void *bytes = NULL;
    enum status status = store_read_begin(storage, &txn);
    if (status)
        return status;
    *object = (struct storage_object){0};
    status = get_object(storage, txn, id, &record);
    if (!status)
        status = is_reachable(storage, txn, &record, &object->reachable);
    if (!status)
        status = copy_bytes(record.bytes, record.size, &bytes);
    if (!status) {
        set_id(object->id, id);
        memcpy(object->memory, record.memory, sizeof object->memory);
        memcpy(object->tenant, record.tenant, sizeof object->tenant);
        object->created_at = record.created_at;
        object->position = record.position;
        object->made_memory = record.made_memory;
        object->bytes = bytes;
        object->size = record.size;
    }
    store_read_end(storage, txn);
    return status;
}

void storage_object_close(struct storage_object *object)
{
    free((void *)(uintptr_t)object->bytes);
    *object = (struct storage_object){0};
}

/* The next object behind `at`, which then is its id, or "" behind the last. */
static enum status next_object(MDB_cursor *cursor, char at[LIMITS_ID_BYTES], MDB_val *key,
                               MDB_val *value)
{
    const size_t size = strlen(at);
    *key = (MDB_val){size, at};
    int rc = mdb_cursor_get(cursor, key, value, size ? MDB_SET_RANGE : MDB_FIRST);
    if (!rc && key->mv_size == size && memcmp(key->mv_data, at, size) == 0)
        rc = mdb_cursor_get(cursor, key, value, MDB_NEXT);
    while (!rc && key->mv_size >= LIMITS_ID_BYTES) /* not written by us; `check` names it */
        rc = mdb_cursor_get(cursor, key, value, MDB_NEXT);
    memset(at, 0, LIMITS_ID_BYTES);
    if (!rc)
        memcpy(at, key->mv_data, key->mv_size);
    return store_status(rc);
}

enum status storage_object_left_over(struct storage *storage, int64_t age_s, size_t limit,
                                     char at[LIMITS_ID_BYTES], char (*ids)[LIMITS_ID_BYTES],
                                     size_t *count)
{
    const int64_t now = store_now(storage);
    MDB_cursor *cursor;
    MDB_val key, value;
    MDB_txn *txn;
    *count = 0;
    enum status status = store_cursor_open(storage, STORE_OBJECT, &txn, &cursor);
    if (status)
        return status;
    for (size_t i = 0; i < limit && !(status = next_object(cursor, at, &key, &value)); i++) {
        struct record_object object;
        bool reachable = true;
        if (record_object_decode(key.mv_data, key.mv_size, value.mv_data, value.mv_size, &object) ||
            now - object.created_at <= age_s)
            continue; /* a damaged one is left to `check` */
        status = is_reachable(storage, txn, &object, &reachable);
        if (status && status != STATUS_CORRUPT)
            break;
        if (!status && !reachable)
            memcpy(ids[(*count)++], at, LIMITS_ID_BYTES);
    }
    store_cursor_close(storage, txn, cursor);
    return status == STATUS_NOT_FOUND || status == STATUS_CORRUPT ? STATUS_OK : status;
}

static enum status take_item(const struct list_walk *walk, struct storage_item *out)
{
    struct record_item item;
    void *bytes;
    enum status status = walk_read(walk, &item);
    if (!status)
        status = copy_bytes(item.bytes, item.size, &bytes);
    if (status)
        return status;
    memcpy(out->id, item.id, sizeof out->id);
    out->bytes = bytes;
    out->size = item.size;
    out->position = item.position;
    return STATUS_OK;
}

/* Puts the walk at the item of that number. */
static void walk_to(struct list_walk *walk, uint64_t number)
{
    record_key(walk->wanted + walk->wanted_size - 8, number);
    walk->key = (MDB_val){walk->wanted_size, walk->wanted};
    walk->rc = mdb_cursor_get(walk->cursor, &walk->key, &walk->value, MDB_SET);
}

enum status storage_item_list(struct storage *storage, const char *owner, const char *after,
                              bool newest_first, size_t limit, struct storage_item *items,
                              size_t *count, bool *has_more)
{
    struct list_walk walk;
    uint64_t number = 0;
    MDB_txn *txn;
    *count = 0;
    *has_more = false;
    enum status status = store_read_begin(storage, &txn);
    if (status)
        return status;
    if (after)
        status = find_item(storage, txn, owner, after, &number);
    if (!status)
        status = walk_begin(&walk, storage, txn, owner, !newest_first);
    if (status)
        goto out;
    if (after) {
        walk_to(&walk, number);
        if (!walk.rc)
            walk_step(&walk, !newest_first);
    }
    for (; !walk.rc && !status && !*has_more; walk_step(&walk, !newest_first)) {
        if (*count == limit)
            *has_more = true;
        else if (!(status = take_item(&walk, &items[*count])))
            ++*count;
        if (*has_more || status)
            break;
    }
    const enum status end = walk_end(&walk);
    status = status ? status : end;
    if (status)
        storage_items_close(items, *count);
out:
    store_read_end(storage, txn);
    return status;
}

enum status storage_item_get(struct storage *storage, const char *owner, const char *id,
                             struct storage_item *item)
{
    struct list_walk walk;
    uint64_t number;
    MDB_txn *txn;
    enum status status = store_read_begin(storage, &txn);
    if (status)
        return status;
    status = find_item(storage, txn, owner, id, &number);
    if (!status)
        status = walk_begin(&walk, storage, txn, owner, true);
    if (!status) {
        walk_to(&walk, number);
        status = walk.rc ? store_status(walk.rc) : take_item(&walk, item);
        mdb_cursor_close(walk.cursor);
    }
    store_read_end(storage, txn);
    return status;
}

void storage_items_close(struct storage_item *items, size_t count)
{
    for (size_t i = 0; i < count; i++)
        free((void *)(uintptr_t)items[i].bytes);
}
