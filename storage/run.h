/* run.h - runs of items in a sub-database: append (packing what is small), find, cut.
 * Thread: writing on the writer thread, inside its transaction; finding on any.
 * Owns nothing. Private to storage/. */
#ifndef STORAGE_RUN_H
#define STORAGE_RUN_H

#include "storage/store.h"

/* How the items of one sub-database are packed. */
struct run_shape {
    enum store_db db;
    enum record_kind kind;
    uint32_t item_bytes;
    uint32_t group;     /* items under one checksum */
    uint32_t max_count; /* items of one run */
    size_t merge_bytes; /* a last run smaller than this is rewritten together with what follows */
};
struct run_shape run_shape_of(const struct storage *storage, enum store_db db);

/* Items to append: an array of pointers, or (pointers NULL) one contiguous array. Borrowed. */
struct run_source {
    const void *const *pointers;
    const void *flat;
};

/* Appends `count` items from index `first`, which must be the end of what the branch has. Adds to
 * `*space` what it takes on disk. */
STATUS_CHECKED enum status run_append(struct store_write *write, const struct run_shape *shape,
                                      uint64_t branch, uint64_t first,
                                      const struct run_source *source, size_t count,
                                      uint64_t *space);
/* Drops items from index `end` on, from the back, at most `*budget` records, which it lowers; when
 * none is left over there may be more to do. Subtracts from `*space`. `*left_end` is the end of
 * what is left (`floor` when nothing is). STATUS_CORRUPT when the run to be shortened is damaged. */
STATUS_CHECKED enum status run_cut(struct store_write *write, const struct run_shape *shape,
                                   uint64_t branch, uint64_t end, uint64_t floor, size_t *budget,
                                   uint64_t *space, uint64_t *left_end);
/* The run that holds item `index`; borrows from the transaction. Header checked, items not.
 * STATUS_NOT_FOUND, STATUS_CORRUPT. */
STATUS_CHECKED enum status run_find(MDB_cursor *cursor, const struct run_shape *shape,
                                    uint64_t branch, uint64_t index, struct record_run *run);

#endif
