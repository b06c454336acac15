/* writer.h - the one writer thread: a bounded queue, group commit, collection when idle.
 * Thread: start and stop on the opener's; the queueing calls of storage.h on any.
 * Owns the thread, the queue and what is queued. Private to storage/. */
#ifndef STORAGE_WRITER_H
#define STORAGE_WRITER_H

#include "storage/store.h"

STATUS_CHECKED enum status writer_start(struct storage *storage, struct error *err);
/* Carries out what is queued, runs the callbacks, ends the thread. */
void writer_stop(struct storage *storage);
/* Turns without snapshots for an ephemeral memory that is being imported: places of its own at or
 * before its position, else STATUS_INVALID. Copied. Queued as the writes of storage.h are. */
STATUS_CHECKED enum status writer_put_turns(struct storage *storage, const char *id,
                                            const struct storage_turn *turns, size_t count,
                                            storage_done_cb done_cb, void *context);
void writer_get_stats(const struct storage *storage, struct storage_stats *stats);

#endif
