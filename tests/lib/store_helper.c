#include "tests/lib/store_helper.h"

#include <fcntl.h>
#include <ftw.h>
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
