/* memory.h - what the writer carries out: create, update, delete, commit, truncate, settle, turns,
 * recover.
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

/* Writes the record, whose metadata must not borrow from the transaction. */
STATUS_CHECKED enum status memory_put(struct store_write *write, const char *id,
                                      const struct record_memory *record);
/* `options`: with a tenant, "" for none; its metadata is `metadata`, of so many bytes. */
STATUS_CHECKED enum status memory_create(struct store_write *write,
                                         const struct storage_memory_options *options,
                                         const char *metadata, size_t metadata_size);
/* NULL: stays as it is. */
STATUS_CHECKED enum status memory_update(struct store_write *write, const char *id,
                                         const char *metadata, size_t metadata_size,
                                         const struct storage_expires *expires);
STATUS_CHECKED enum status memory_delete(struct store_write *write, const char *id);
/* The same if it is over; else STATUS_CONFLICT. */
STATUS_CHECKED enum status memory_expire(struct store_write *write, const char *id);
STATUS_CHECKED enum status memory_commit(struct store_write *write,
                                         const struct storage_commit *commit);
STATUS_CHECKED enum status memory_truncate(struct store_write *write, const char *id);
/* The ephemeral memory becomes `id`, or takes its place when it `replaces` it. */
STATUS_CHECKED enum status memory_settle(struct store_write *write, const char *ephemeral,
                                         const char *id, bool replaces);
/* Bookmarks a turn of the memory's own; "" takes the bookmark back. */
STATUS_CHECKED enum status memory_bookmark(struct store_write *write, const char *id,
                                           uint64_t position, const char *bookmark);
/* Deletes a turn of the memory's own, not the one it stands at. */
STATUS_CHECKED enum status memory_delete_turn(struct store_write *write, const char *id,
                                              uint64_t position);
/* Turns without snapshots for an ephemeral memory, all of its own; else STATUS_INVALID. */
STATUS_CHECKED enum status memory_put_turns(struct store_write *write, const char *id,
                                            const struct storage_turn *turns, size_t count);

/* At opening: drops ephemeral memories and what lies past committed positions, some memories a
 * transaction. A damaged memory is logged and left to `check`; it does not close the others. */
STATUS_CHECKED enum status memory_recover(struct storage *storage, struct error *err);
/* What a store of an older format lacks of its memories: turns (before 2), whose their branches'
 * disk space is (before 6); in one transaction. */
STATUS_CHECKED enum status memory_migrate(struct store_write *write, uint32_t format);

#endif
