/* memory.h - what the writer carries out: create, update, delete, commit, truncate, recover.
 * Thread: the writer thread, inside its transaction; memory_get on any.
 * Owns nothing. Private to storage/.
 *
 * Every function checks all it can before its first write, so that a refusal leaves the
 * transaction as it was; a failure after a write shows in store_write.mutations. */
#ifndef STORAGE_MEMORY_H
#define STORAGE_MEMORY_H

#include "storage/store.h"

/* The record; its metadata borrows from the transaction. STATUS_NOT_FOUND, STATUS_CORRUPT. */
STATUS_CHECKED enum status memory_get(const struct storage *storage, MDB_txn *txn, const char *id,
                                      struct record_memory *record);

STATUS_CHECKED enum status memory_create(struct store_write *write, const char *id,
                                         const char *from, bool ephemeral, const char *metadata,
                                         size_t metadata_size);
STATUS_CHECKED enum status memory_update(struct store_write *write, const char *id,
                                         const char *metadata, size_t metadata_size);
STATUS_CHECKED enum status memory_delete(struct store_write *write, const char *id);
STATUS_CHECKED enum status memory_commit(struct store_write *write,
                                         const struct storage_commit *commit);
STATUS_CHECKED enum status memory_truncate(struct store_write *write, const char *id);

/* At opening: drops ephemeral memories and what lies past committed positions, some memories a
 * transaction. A damaged memory is logged and left to `check`; it does not close the others. */
STATUS_CHECKED enum status memory_recover(struct storage *storage, struct error *err);

#endif
