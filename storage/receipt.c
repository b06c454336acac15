#include "storage/receipt.h"

#include <stdlib.h>
#include <string.h>

/* Looked at behind each one that is written. Names are as good as random, so the hand passes over
 * all of them evenly, and at most one in so many is old. */
#define SWEEP 8

static bool is_old(struct storage *storage, const struct record_receipt *receipt)
{
    return store_now(storage) - receipt->created_at > LIMITS_RECEIPT_S;
}

/* The name of the first old one among the next after `name`; false: none of them is. */
static enum status find_old(struct store_write *write, const unsigned char *name,
                            unsigned char old[LIMITS_RECEIPT_NAME_BYTES], bool *found)
{
    MDB_cursor *cursor;
    MDB_val key = {LIMITS_RECEIPT_NAME_BYTES, (void *)(uintptr_t)name}, value;
    *found = false;
    int rc = mdb_cursor_open(write->txn, write->storage->db[STORE_RECEIPT], &cursor);
    if (rc)
        return store_status(rc);
    rc = mdb_cursor_get(cursor, &key, &value, MDB_SET_RANGE);
    for (int i = 0; i < SWEEP && !rc && !*found; i++) {
        struct record_receipt receipt;
        rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT);
        if (rc == MDB_NOTFOUND)
            rc = mdb_cursor_get(cursor, &key, &value, MDB_FIRST);
        /* A damaged one stays for `check` to name. */
        *found = !rc &&
                 !record_receipt_decode(key.mv_data, key.mv_size, value.mv_data, value.mv_size,
                                        &receipt) &&
                 is_old(write->storage, &receipt);
        if (*found)
            memcpy(old, key.mv_data, LIMITS_RECEIPT_NAME_BYTES);
    }
    mdb_cursor_close(cursor);
    return rc == MDB_NOTFOUND ? STATUS_OK : store_status(rc);
}

enum status receipt_put(struct store_write *write, const struct storage_receipt *receipt)
{
    const struct record_receipt record = {
        .created_at = store_stamp(write->storage), .bytes = receipt->bytes, .size = receipt->size};
    unsigned char old[LIMITS_RECEIPT_NAME_BYTES];
    bool found = true;
    struct buf buf;
    buf_init(&buf);
    record_receipt_encode(&buf, receipt->name, sizeof receipt->name, &record);
    enum status status =
        store_put(write, STORE_RECEIPT, receipt->name, sizeof receipt->name, buf.data, buf.size);
    buf_close(&buf);
    for (int i = 0; i < SWEEP && !status && found; i++) {
        status = find_old(write, receipt->name, old, &found);
        if (!status && found)
            status = store_delete(write, STORE_RECEIPT, old, sizeof old);
    }
    return status;
}

enum status storage_receipt_get(struct storage *storage, const unsigned char *name, void **bytes,
                                size_t *size)
{
    struct record_receipt receipt;
    MDB_val value;
    MDB_txn *txn;
    enum status status = store_read_begin(storage, &txn);
    if (status)
        return status;
    status = store_get(storage, txn, STORE_RECEIPT, name, LIMITS_RECEIPT_NAME_BYTES, &value);
    if (!status)
        status = record_receipt_decode(name, LIMITS_RECEIPT_NAME_BYTES, value.mv_data,
                                       value.mv_size, &receipt);
    if (!status && is_old(storage, &receipt))
        status = STATUS_NOT_FOUND;
    char *copy = status ? NULL : malloc(receipt.size + 1);
    if (!status && !copy)
        status = STATUS_NO_MEMORY;
    if (!status) {
        memcpy(copy, receipt.bytes, receipt.size);
        copy[receipt.size] = 0;
        *bytes = copy;
        *size = receipt.size;
    }
    store_read_end(storage, txn);
    return status;
}
