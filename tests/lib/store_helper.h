/* store_helper.h - what the storage tests share: a temporary folder, writes that wait for their
 * answer, and chunks, tokens and snapshots whose bytes follow from their place.
 * Thread: the test's; answers come from the writer thread.
 * Owns nothing. */
#ifndef TESTS_LIB_STORE_HELPER_H
#define TESTS_LIB_STORE_HELPER_H

#include <pthread.h>
#include <stdbool.h>

#include "storage/storage.h"

/* A new empty folder's path, under TMPDIR; free it with store_helper_remove. */
char *store_helper_folder(void);
/* Deletes the folder with all in it and frees the path. */
void store_helper_remove(char *path);
/* A test whose *state is a folder of its own. */
#define STORE_TEST(name) \
    cmocka_unit_test_setup_teardown(name, store_helper_setup, store_helper_teardown)
int store_helper_setup(void **state);
int store_helper_teardown(void **state);

/* Opens a store, which must succeed. */
struct storage *store_open(const struct storage_options *options);
/* Drops the store's data, which is closed, from the page cache. */
void store_drop_cache(const char *path);
/* Flips a byte of every record of a memory, an object or an item whose key has one of these in it;
 * a daemon may have the store open. Returns how many there were. */
size_t store_damage(const char *path, const char *const *keys, size_t key_count);

/* Waits for one queued write. */
struct store_wait {
    pthread_mutex_t mutex;
    pthread_cond_t done;
    bool is_done;
    enum status status;
};
void store_wait_init(struct store_wait *wait);
void store_wait_cb(void *wait, enum status status);
/* The status of the write; `queued` is what the queueing call returned. Closes the waiter. */
enum status store_wait_finish(struct store_wait *wait, enum status queued);

/* The writes of storage.h, waited for. */
enum status store_create(struct storage *storage, const char *id, const char *from);
enum status store_create_ephemeral(struct storage *storage, const char *id, const char *from);
enum status store_fork_at(struct storage *storage, const char *id, const char *from, uint64_t at,
                          bool ephemeral);
enum status store_settle(struct storage *storage, const char *ephemeral, const char *id);
enum status store_replace(struct storage *storage, const char *ephemeral, const char *id);
enum status store_remove(struct storage *storage, const char *id);
enum status store_truncate(struct storage *storage, const char *id);
enum status store_append(struct storage *storage, uint64_t branch, uint64_t index, const void *kv,
                         const void *landmark);
enum status store_commit(struct storage *storage, const struct storage_commit *commit);

/* Bytes of item `index` of `stream` (a branch, a memory...): any change of place changes them. */
void store_fill(void *out, size_t size, uint64_t stream, uint64_t index);
int32_t store_token(uint64_t stream, uint64_t position);

#endif
