#include "tests/lib/store_helper.h"

#include <fcntl.h>
#include <ftw.h>
#include <lmdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "proto/base/assert.h"
#include "proto/base/hash.h"

char *store_helper_folder(void)
{
    const char *base = getenv("TMPDIR");
    char path[1024];
    snprintf(path, sizeof path, "%s/rambad-store-XXXXXX", base && base[0] ? base : "/tmp");
    char *made = mkdtemp(path);
    ASSERT(made);
    return strdup(made);
}

static int remove_one(const char *path, const struct stat *stat, int flag, struct FTW *ftw)
{
    (void)stat, (void)flag, (void)ftw;
    return remove(path);
}

void store_helper_remove(char *path)
{
    nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    free(path);
}

int store_helper_setup(void **state)
{
    *state = store_helper_folder();
    return 0;
}

int store_helper_teardown(void **state)
{
    store_helper_remove(*state);
    return 0;
}

struct storage *store_open(const struct storage_options *options)
{
    struct storage *storage = NULL;
    struct error err = {0};
    const enum status status = storage_open(options, &storage, &err);
    if (status)
        fprintf(stderr, "storage_open: %s: %s\n", status_text(status), err.message);
    ASSERT(!status);
    return storage;
}

void store_drop_cache(const char *path)
{
    char file[1024];
    snprintf(file, sizeof file, "%s/data.mdb", path);
    const int fd = open(file, O_RDONLY | O_CLOEXEC);
    ASSERT(fd >= 0 && fdatasync(fd) == 0);
    ASSERT(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0);
    close(fd);
}

/* Flips the last byte of the record under the cursor. */
static void damage_record(MDB_cursor *cursor, MDB_val *key, MDB_val *value)
{
    unsigned char *copy = malloc(value->mv_size);
    ASSERT(copy);
    memcpy(copy, value->mv_data, value->mv_size);
    copy[value->mv_size - 1] ^= 1;
    value->mv_data = copy;
    ASSERT(mdb_cursor_put(cursor, key, value, MDB_CURRENT) == 0);
    free(copy);
}

size_t store_damage(const char *path, const char *const *keys, size_t key_count)
{
    static const char *const names[] = {"memory", "object", "item"};
    MDB_env *env;
    MDB_txn *txn;
    size_t hits = 0;
    ASSERT(mdb_env_create(&env) == 0 && mdb_env_set_maxdbs(env, 32) == 0);
    ASSERT(mdb_env_open(env, path, 0, 0600) == 0 && mdb_txn_begin(env, NULL, 0, &txn) == 0);
    for (size_t n = 0; n < sizeof names / sizeof *names; n++) {
        MDB_dbi dbi;
        MDB_cursor *cursor;
        MDB_val key, value;
        ASSERT(mdb_dbi_open(txn, names[n], 0, &dbi) == 0);
        ASSERT(mdb_cursor_open(txn, dbi, &cursor) == 0);
        while (mdb_cursor_get(cursor, &key, &value, MDB_NEXT) == 0)
            for (size_t i = 0; i < key_count; i++) {
                if (!memmem(key.mv_data, key.mv_size, keys[i], strlen(keys[i])))
                    continue;
                damage_record(cursor, &key, &value);
                hits++;
            }
        mdb_cursor_close(cursor);
    }
    ASSERT(mdb_txn_commit(txn) == 0);
    mdb_env_close(env);
    return hits;
}

void store_wait_init(struct store_wait *wait)
{
    pthread_mutex_init(&wait->mutex, NULL);
    pthread_cond_init(&wait->done, NULL);
    wait->is_done = false;
    wait->status = STATUS_OK;
}

void store_wait_cb(void *context, enum status status)
{
    struct store_wait *wait = context;
    pthread_mutex_lock(&wait->mutex);
    ASSERT(!wait->is_done); /* exactly once */
    wait->status = status;
    wait->is_done = true;
    pthread_cond_signal(&wait->done);
    pthread_mutex_unlock(&wait->mutex);
}

enum status store_wait_finish(struct store_wait *wait, enum status queued)
{
    enum status status = queued;
    if (queued == STATUS_OK) {
        pthread_mutex_lock(&wait->mutex);
        while (!wait->is_done)
            pthread_cond_wait(&wait->done, &wait->mutex);
        status = wait->status;
        pthread_mutex_unlock(&wait->mutex);
    }
    pthread_cond_destroy(&wait->done);
    pthread_mutex_destroy(&wait->mutex);
    return status;
}

enum status store_fork_at(struct storage *storage, const char *id, const char *from, uint64_t at,
                          bool ephemeral)
{
    struct storage_memory_options options = {
        .id = id, .from = from, .at = at, .ephemeral = ephemeral};
    struct store_wait wait;
    store_wait_init(&wait);
    return store_wait_finish(&wait, storage_memory_create(storage, &options, store_wait_cb, &wait));
}

enum status store_create(struct storage *storage, const char *id, const char *from)
{
    return store_fork_at(storage, id, from, 0, false);
}

enum status store_create_ephemeral(struct storage *storage, const char *id, const char *from)
{
    return store_fork_at(storage, id, from, 0, true);
}

enum status store_settle(struct storage *storage, const char *ephemeral, const char *id)
{
    struct store_wait wait;
    store_wait_init(&wait);
    return store_wait_finish(&wait,
                             storage_memory_settle(storage, ephemeral, id, store_wait_cb, &wait));
}

enum status store_replace(struct storage *storage, const char *ephemeral, const char *id)
{
    struct store_wait wait;
    store_wait_init(&wait);
    return store_wait_finish(
        &wait, storage_memory_replace(storage, ephemeral, id, 0, NULL, store_wait_cb, &wait));
}

enum status store_remove(struct storage *storage, const char *id)
{
    struct store_wait wait;
    store_wait_init(&wait);
    return store_wait_finish(&wait, storage_memory_delete(storage, id, store_wait_cb, &wait));
}

enum status store_truncate(struct storage *storage, const char *id)
{
    struct store_wait wait;
    store_wait_init(&wait);
    return store_wait_finish(&wait, storage_truncate(storage, id, store_wait_cb, &wait));
}

enum status store_append(struct storage *storage, uint64_t branch, uint64_t index, const void *kv,
                         const void *landmark)
{
    struct store_wait wait;
    store_wait_init(&wait);
    return store_wait_finish(
        &wait, storage_append(storage, branch, index, kv, landmark, store_wait_cb, &wait));
}

enum status store_commit(struct storage *storage, const struct storage_commit *commit)
{
    struct store_wait wait;
    store_wait_init(&wait);
    return store_wait_finish(&wait, storage_commit(storage, commit, store_wait_cb, &wait));
}

void store_fill(void *out, size_t size, uint64_t stream, uint64_t index)
{
    unsigned char *p = out;
    uint64_t x = hash64(&index, sizeof index, stream * 2 + 1);
    for (size_t i = 0; i < size; i += 8) {
        /* xorshift: cheap, and no two places share a word */
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        memcpy(p + i, &x, size - i < 8 ? size - i : 8);
    }
}

int32_t store_token(uint64_t stream, uint64_t position)
{
    return (int32_t)(hash64(&position, sizeof position, stream) & 0xffff);
}
