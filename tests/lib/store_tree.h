/* store_tree.h - memories and their forks, whose every byte follows from the branch that wrote it
 * and from its place, so that what is read back tells where it came from. Thread: the test's. Owns
 * nothing. What is not as it should be fails the running test. */
#ifndef TESTS_LIB_STORE_TREE_H
#define TESTS_LIB_STORE_TREE_H

#include "tests/lib/store_past.h"

#define STORE_TREE_CHUNK 8u
#define STORE_TREE_KV 600u /* two to a page, so runs of many sizes come up */
#define STORE_TREE_LANDMARK 40u
#define STORE_TREE_FINGERPRINT 0x1234abcdu

struct storage_options store_tree_options(const char *path);
struct storage *store_tree_open(const char *path);
/* The branch that the memory writes. */
uint64_t store_tree_branch(struct storage *storage, const char *id);
/* Chunks [from, end) of the branch; the first status that is not STATUS_OK. */
enum status store_tree_append(struct storage *storage, uint64_t branch, uint64_t from,
                              uint64_t end);
/* The tokens up to `position`, with a snapshot. */
enum status store_tree_commit(struct storage *storage, const char *id, uint64_t position);
/* Writes on to `position`: the chunks that become full, then the commit. */
void store_tree_write(struct storage *storage, const char *id, uint64_t position);

struct store_segment { /* tokens up to `end` were written by `branch` */
    uint64_t branch, end;
};
/* Everything a memory holds, against who wrote what: `segments`, oldest first. */
void store_tree_assert(struct storage *storage, const char *id,
                       const struct store_segment *segments, size_t count);

/* Until nothing that was deleted is left. */
void store_wait_collected(struct storage *storage);

#endif
