#include "storage/snapshot.h"

#include <stdlib.h>
#include <string.h>

#include "proto/base/assert.h"

/* A piece, its header and LMDB's page header are 256 pages of 4 KiB, the size of a full run, so
 * that what one frees the other can use: LMDB needs the pages of a value in a row. */
#define PIECE_BYTES ((uint32_t)(LIMITS_MIB - 16 - RECORD_PIECE_HEADER_BYTES))

static uint64_t piece_count(const struct record_snapshot *record)
{
    return (record->size - 1) / record->piece_bytes + 1;
}

static size_t piece_size(const struct record_snapshot *record, uint64_t number)
{
    uint64_t from = (number - 1) * record->piece_bytes;
    uint64_t left = record->size - from;
    return (size_t)(left < record->piece_bytes ? left : record->piece_bytes);
}

static enum status put_record(struct store_write *write, uint64_t snapshot,
                              const struct record_snapshot *record)
{
    unsigned char key[RECORD_PIECE_KEY_BYTES];
    struct buf buf;
    buf_init(&buf);
    record_piece_key(key, snapshot, 0);
    record_snapshot_encode(&buf, key, sizeof key, record);
    enum status status = store_put(write, STORE_SNAPSHOT, key, sizeof key, buf.data, buf.size);
    buf_close(&buf);
    return status;
}

enum status snapshot_get(const struct storage *storage, MDB_txn *txn, uint64_t snapshot,
                         struct record_snapshot *record)
{
    unsigned char key[RECORD_PIECE_KEY_BYTES];
    MDB_val value;
    record_piece_key(key, snapshot, 0);
    enum status status = store_get(storage, txn, STORE_SNAPSHOT, key, sizeof key, &value);
    if (!status)
        status = record_snapshot_decode(key, sizeof key, value.mv_data, value.mv_size, record);
    if (!status && piece_count(record) >= UINT32_MAX)
        status = STATUS_CORRUPT;
    return status;
}

enum status snapshot_put(struct store_write *write, uint64_t branch, uint64_t position,
                         const void *bytes, size_t size, uint64_t references, uint64_t *snapshot)
{
    struct record_counter counter;
    struct record_snapshot record = {
        .references = references, .branch = branch, .position = position};
    ASSERT(size > 0);
    record.size = size;
    record.piece_bytes = PIECE_BYTES;
    enum status status = store_get_counter(write->storage, write->txn, &counter);
    if (status)
        return status;
    *snapshot = counter.snapshot++;
    status = store_put_counter(write, &counter);
    if (!status)
        status = put_record(write, *snapshot, &record);
    const unsigned char *from = bytes;
    for (uint64_t n = 1; !status && n <= piece_count(&record); n++) {
        unsigned char key[RECORD_PIECE_KEY_BYTES];
        void *room;
        size_t part = piece_size(&record, n);
        record_piece_key(key, *snapshot, (uint32_t)n);
        status = store_put_room(write, STORE_SNAPSHOT, key, sizeof key,
                                RECORD_PIECE_HEADER_BYTES + part, &room);
        if (!status)
            record_piece_encode(room, key, sizeof key, from, part);
        from += part;
    }
    return status;
}

enum status snapshot_put_references(struct store_write *write, uint64_t snapshot,
                                    uint64_t references)
{
    struct record_snapshot record;
    enum status status = snapshot_get(write->storage, write->txn, snapshot, &record);
    if (status)
        return STATUS_CORRUPT;
    record.references = references;
    return put_record(write, snapshot, &record);
}

enum status snapshot_reference(struct store_write *write, uint64_t snapshot)
{
    struct record_snapshot record;
    enum status status = snapshot_get(write->storage, write->txn, snapshot, &record);
    if (status)
        return STATUS_CORRUPT;
    record.references++;
    return put_record(write, snapshot, &record);
}

enum status snapshot_release(struct store_write *write, uint64_t snapshot)
{
    struct record_snapshot record;
    enum status status = snapshot_get(write->storage, write->txn, snapshot, &record);
    if (status)
        return STATUS_CORRUPT;
    if (record.references > 1) {
        record.references--;
        return put_record(write, snapshot, &record);
    }
    for (uint64_t n = 0; n <= piece_count(&record); n++) {
        unsigned char key[RECORD_PIECE_KEY_BYTES];
        record_piece_key(key, snapshot, (uint32_t)n);
        status = store_delete(write, STORE_SNAPSHOT, key, sizeof key);
        if (status && status != STATUS_NOT_FOUND) /* a lost piece is no reason to keep the rest */
            return status;
    }
    return STATUS_OK;
}

/* Piece `n` as it lies in the store. */
static enum status find_piece(const struct storage *storage, MDB_txn *txn, uint64_t snapshot,
                              uint64_t n, MDB_val *value)
{
    unsigned char key[RECORD_PIECE_KEY_BYTES];
    record_piece_key(key, snapshot, (uint32_t)n);
    enum status status = store_get(storage, txn, STORE_SNAPSHOT, key, sizeof key, value);
    return status == STATUS_NOT_FOUND ? STATUS_CORRUPT : status;
}

enum status snapshot_read(const struct storage *storage, MDB_txn *txn, uint64_t snapshot,
                          const struct record_snapshot *record, void *out)
{
    unsigned char *to = out;
    MDB_val value;
    for (uint64_t n = 1; n <= piece_count(record); n++) {
        enum status status = find_piece(storage, txn, snapshot, n, &value);
        if (status)
            return status;
        store_prefetch(storage, value.mv_data, value.mv_size);
    }
    for (uint64_t n = 1; n <= piece_count(record); n++) {
        unsigned char key[RECORD_PIECE_KEY_BYTES];
        const void *bytes;
        size_t size = piece_size(record, n);
        enum status status = find_piece(storage, txn, snapshot, n, &value);
        if (status)
            return status;
        store_populate(storage, value.mv_data, value.mv_size);
        record_piece_key(key, snapshot, (uint32_t)n);
        status = record_piece_decode(key, sizeof key, value.mv_data, value.mv_size, &bytes);
        if (status || value.mv_size != RECORD_PIECE_HEADER_BYTES + size)
            return STATUS_CORRUPT;
        if (to) {
            memcpy(to, bytes, size);
            to += size;
        }
    }
    return STATUS_OK;
}

uint64_t snapshot_space(const struct storage *storage, const struct record_snapshot *record)
{
    uint64_t full = piece_count(record) - 1;
    return full * store_space(storage, RECORD_PIECE_KEY_BYTES,
                              RECORD_PIECE_HEADER_BYTES + record->piece_bytes) +
           store_space(storage, RECORD_PIECE_KEY_BYTES,
                       RECORD_PIECE_HEADER_BYTES + piece_size(record, piece_count(record)));
}

static int compare(const void *a, const void *b)
{
    uint64_t x, y;
    memcpy(&x, a, sizeof x);
    memcpy(&y, b, sizeof y);
    return x < y ? -1 : x > y;
}

void snapshot_sort(uint64_t *snapshots, size_t count)
{
    if (count)
        qsort(snapshots, count, sizeof *snapshots, compare);
}

uint64_t snapshot_occurrences(const uint64_t *sorted, size_t count, uint64_t snapshot)
{
    size_t low = 0, high = count;
    uint64_t found = 0;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (sorted[middle] < snapshot)
            low = middle + 1;
        else
            high = middle;
    }
    for (; low < count && sorted[low] == snapshot; low++)
        found++;
    return found;
}
