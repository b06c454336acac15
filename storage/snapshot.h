/* snapshot.h - snapshots in checksummed pieces, shared by reference between forks.
 * Thread: writing on the writer thread, inside its transaction; reading on any.
 * Owns nothing. Private to storage/. */
#ifndef STORAGE_SNAPSHOT_H
#define STORAGE_SNAPSHOT_H

#include "storage/store.h"

/* A new snapshot with so many references. `size` is at least 1. */
STATUS_CHECKED enum status snapshot_put(struct store_write *write, uint64_t branch,
                                        uint64_t position, const void *bytes, size_t size,
                                        uint64_t references, uint64_t *snapshot);
/* Puts a wrong count right. */
STATUS_CHECKED enum status snapshot_put_references(struct store_write *write, uint64_t snapshot,
                                                   uint64_t references);
STATUS_CHECKED enum status snapshot_reference(struct store_write *write, uint64_t snapshot);
/* Gives a reference back; with the last one the snapshot goes. */
STATUS_CHECKED enum status snapshot_release(struct store_write *write, uint64_t snapshot);

/* STATUS_NOT_FOUND, STATUS_CORRUPT. */
STATUS_CHECKED enum status snapshot_get(const struct storage *storage, MDB_txn *txn,
                                        uint64_t snapshot, struct record_snapshot *record);
/* Checks every piece and copies them to `out` (record->size bytes; NULL: only checks). */
STATUS_CHECKED enum status snapshot_read(const struct storage *storage, MDB_txn *txn,
                                         uint64_t snapshot, const struct record_snapshot *record,
                                         void *out);
/* For counting references: names in order, and how often one is among them. */
void snapshot_sort(uint64_t *snapshots, size_t count);
uint64_t snapshot_occurrences(const uint64_t *sorted, size_t count, uint64_t snapshot);

/* Disk space of its pieces. */
uint64_t snapshot_space(const struct storage *storage, const struct record_snapshot *record);

#endif
