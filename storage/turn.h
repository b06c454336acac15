/* turn.h - what committed turns left behind: their place, their snapshot while it is kept, a
 * bookmark.
 * Thread: writing on the writer thread, inside its transaction; reading on any.
 * Owns nothing. Private to storage/.
 *
 * A turn belongs to the branch that wrote it, so a fork has its parent's turns up to where it
 * starts. A turn outlives its snapshot: tokens replayed from an earlier one lead back to it. */
#ifndef STORAGE_TURN_H
#define STORAGE_TURN_H

#include "storage/store.h"

/* The turns of a lineage, newest first. */
struct turn_walk {
    const struct storage *storage;
    MDB_txn *txn;
    uint64_t branch; /* of the turn that the last step found */
    uint64_t end;    /* the next one is at or before this */
    struct record_branch record;
};
/* From the turn at or before `end` on. STATUS_NOT_FOUND (no such branch), STATUS_CORRUPT. */
STATUS_CHECKED enum status turn_walk_begin(struct turn_walk *walk, const struct storage *storage,
                                           MDB_txn *txn, uint64_t branch, uint64_t end);
/* STATUS_NOT_FOUND at the end. */
STATUS_CHECKED enum status turn_walk_next(struct turn_walk *walk, uint64_t *position,
                                          struct record_turn *turn);

/* STATUS_NOT_FOUND, STATUS_CORRUPT. */
STATUS_CHECKED enum status turn_get(const struct storage *storage, MDB_txn *txn, uint64_t branch,
                                    uint64_t position, struct record_turn *turn);
/* Writes a turn; a snapshot it names has been given its reference by the caller. The one that stood
 * there gives its own back. The branch's record counts the space. */
STATUS_CHECKED enum status turn_put(struct store_write *write, uint64_t branch, uint64_t position,
                                    const struct record_turn *turn);
/* Takes the turn out, with its reference. */
STATUS_CHECKED enum status turn_remove(struct store_write *write, uint64_t branch,
                                       uint64_t position);
/* Drops snapshots of the memory's older turns beyond storage->keep_snapshots, bookmarked ones and
 * those on branches of other memories excepted. `all`: also behind turns that have none, where in
 * the normal course nothing is left to drop. */
STATUS_CHECKED enum status turn_retain(struct store_write *write, const char *id, uint64_t branch,
                                       uint64_t position, bool all);
/* Removes the turns past `end` from the back, at most about `*budget` records, which it lowers.
 * `*done`: none is left. */
STATUS_CHECKED enum status turn_cut(struct store_write *write, uint64_t branch, uint64_t end,
                                    size_t *budget, bool *done);

#endif
