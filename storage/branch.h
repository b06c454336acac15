/* branch.h - the tree of branches: records, which part children reach, lineage, collection.
 * Thread: writing on the writer thread, inside its transaction; reading on any.
 * Owns nothing. Private to storage/.
 *
 * A branch lives while a memory owns it or another branch starts inside it. A branch without an
 * owner keeps what its children reach, up to the farthest position one of them starts at; the rest
 * is freed by branch_collect, a bounded step at a time. */
#ifndef STORAGE_BRANCH_H
#define STORAGE_BRANCH_H

#include "storage/store.h"

/* STATUS_NOT_FOUND, STATUS_CORRUPT. */
STATUS_CHECKED enum status branch_get(const struct storage *storage, MDB_txn *txn, uint64_t branch,
                                      struct record_branch *record);
STATUS_CHECKED enum status branch_put(struct store_write *write, uint64_t branch,
                                      const struct record_branch *record);
/* First chunk that belongs to the branch and not to its parent. */
uint64_t branch_first_chunk(const struct storage *storage, const struct record_branch *record);

/* A new branch owned by `owner`, starting at `position` of `parent` (0: at nothing). The record of
 * the parent is the nearest one that really holds that position, so lineages stay short.
 * STATUS_TOO_LARGE: LIMITS_LINEAGE branches already lie above it. */
STATUS_CHECKED enum status branch_create(struct store_write *write, uint64_t parent,
                                         uint64_t position, const char *owner, const char *tenant,
                                         uint64_t *branch);
/* Appends consecutive chunks, the first of them `record->chunk_end`; updates the record. */
STATUS_CHECKED enum status branch_append_chunks(struct store_write *write, uint64_t branch,
                                                struct record_branch *record,
                                                const void *const *kvs,
                                                const void *const *landmarks, size_t count);
/* Appends tokens from `record->token_end` on; updates the record. */
STATUS_CHECKED enum status branch_append_tokens(struct store_write *write, uint64_t branch,
                                                struct record_branch *record,
                                                const int32_t *tokens, size_t count);
/* Drops chunks and tokens past `position`; updates the record. */
STATUS_CHECKED enum status branch_truncate(struct store_write *write, uint64_t branch,
                                           struct record_branch *record, uint64_t position);
/* The owner is gone: what nobody reaches will be collected. */
STATUS_CHECKED enum status branch_disown(struct store_write *write, uint64_t branch);
/* Frees at most about `budget` records of what nobody reaches. `*more` says whether to come again. */
STATUS_CHECKED enum status branch_collect(struct store_write *write, size_t budget, bool *more);

/* The farthest position at which a child starts; 0 when there is no child (`*any` false). */
STATUS_CHECKED enum status branch_children(const struct storage *storage, MDB_txn *txn,
                                           uint64_t branch, bool *any, uint64_t *position);

/* One step up a lineage: tokens [fork_position, end) of the sequence are the branch's. */
struct branch_link {
    uint64_t branch;
    uint64_t fork_position;
};
/* From `branch` up to the one with no parent, malloced. Depth is bounded by LIMITS_LINEAGE. */
STATUS_CHECKED enum status branch_lineage(const struct storage *storage, MDB_txn *txn,
                                          uint64_t branch, struct branch_link **links,
                                          size_t *count);

#endif
