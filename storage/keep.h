/* keep.h - what a caller keeps beside its memories: objects by name, and lists of items.
 * Thread: keep_pack on any; the rest on the writer thread, inside its transaction.
 * Owns nothing. Private to storage/. */
#ifndef STORAGE_KEEP_H
#define STORAGE_KEEP_H

#include "storage/store.h"

/* As one run of bytes, for the writer's queue. */
void keep_pack(const struct storage_keep *keep, struct buf *out);
/* For whom the list of an object or a memory counts; "" for nobody. STATUS_NOT_FOUND: there is no
 * such owner. */
STATUS_CHECKED enum status keep_tenant(const struct storage *storage, MDB_txn *txn,
                                       const char *owner, char tenant[LIMITS_ID_BYTES]);
/* Disk space of the items in the list of `owner`: a walk over them. */
STATUS_CHECKED enum status keep_list_bytes(const struct storage *storage, MDB_txn *txn,
                                           const char *owner, uint64_t *bytes);
/* Writes what was packed. `branch` and `position`: of the turn it is written with; 0: none.
 * STATUS_KEY_QUOTA, STATUS_MEMORY_QUOTA: there is no room for what is new; what takes the place of
 * an older object may. */
STATUS_CHECKED enum status keep_put(struct store_write *write, const void *packed, size_t size,
                                    uint64_t branch, uint64_t position);
/* The object and its list; `with_memory`: and the memory that was made for it, when no other of its
 * kind is left. */
STATUS_CHECKED enum status keep_delete_object(struct store_write *write, const char *id,
                                              bool with_memory);
/* The items of the list that lie behind `position` go, and the objects that the memory was made
 * for: it went back to there, or, at 0, will be gone. Before the record of `owner` is. */
STATUS_CHECKED enum status keep_cut(struct store_write *write, const char *owner,
                                    uint64_t position);

#endif
