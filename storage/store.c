#include "storage/store.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "proto/base/assert.h"
#include "proto/base/log.h"
#include "proto/memory_file.h"
#include "storage/memory.h"
#include "storage/quota.h"
#include "storage/writer.h"

#define READERS 512
#define MAP_BYTES_LEAST ((size_t)1 << 20)
/* What a delete may need when nothing else fits: the pages on the way to its records and LMDB's
 * list of the pages it frees, for one bounded step. */
#define RESERVE_BYTES_MOST (16 * LIMITS_MIB)
#define RESERVE_FILE_BYTES (1 * LIMITS_MIB)
/* Sizes are 32 bits in records; far above any model's chunk. */
#define CHUNK_BYTES_MOST (64 * LIMITS_MIB)

static const char *const db_names[STORE_DB_COUNT] = {
    "meta",  "memory",   "branch", "child",   "collect", "kv",   "landmark",
    "token", "snapshot", "turn",   "receipt", "object",  "item", "expiry"};
static const char format_key[] = "format", counter_key[] = "counter";

enum status store_status(int rc)
{
    switch (rc) {
    case 0:
        return STATUS_OK;
    case MDB_NOTFOUND:
        return STATUS_NOT_FOUND;
    case MDB_MAP_FULL:
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
        return STATUS_DISK_FULL;
    case ENOMEM:
    case MDB_TXN_FULL:
        return STATUS_NO_MEMORY;
    case MDB_READERS_FULL:
        return STATUS_BUSY;
    case MDB_VERSION_MISMATCH:
        return STATUS_UNSUPPORTED;
    case MDB_CORRUPTED:
    case MDB_PAGE_NOTFOUND:
    case MDB_INVALID:
    case MDB_INCOMPATIBLE:
        return STATUS_CORRUPT;
    default:
        return STATUS_IO;
    }
}

void store_assert_writer(const struct storage *storage)
{
    ASSERT(pthread_equal(storage->writer_thread, pthread_self()));
}

/* ---- the time ---- */

static int64_t read_clock(void *context, bool monotonic)
{
    struct timespec now;
    (void)context;
    clock_gettime(monotonic ? CLOCK_MONOTONIC : CLOCK_REALTIME, &now);
    return (int64_t)now.tv_sec;
}

static void start_clock(struct storage *storage)
{
    expiry_clock_init(&storage->clock, storage->newest,
                      storage->clock_cb(storage->clock_context, false),
                      storage->clock_cb(storage->clock_context, true));
}

static int64_t tell_time(struct storage *storage, bool stamp)
{
    pthread_mutex_lock(&storage->clock_lock);
    const int64_t wall = storage->clock_cb(storage->clock_context, false);
    const int64_t now =
        expiry_clock_now(&storage->clock, wall, storage->clock_cb(storage->clock_context, true));
    pthread_mutex_unlock(&storage->clock_lock);
    return stamp && wall > now ? wall : now;
}

int64_t store_now(struct storage *storage)
{
    return tell_time(storage, false);
}

int64_t store_stamp(struct storage *storage)
{
    return tell_time(storage, true);
}

/* ---- write transactions ---- */

enum status store_write_begin(struct storage *storage, struct store_write *write)
{
    store_assert_writer(storage);
    *write = (struct store_write){.storage = storage};
    return store_status(mdb_txn_begin(storage->env, NULL, 0, &write->txn));
}

/* When the page that says which commit is the last could not be written, LMDB takes nothing more:
 * what is on disk can only be told by opening it again. */
static void end_if_broken(const struct storage *storage)
{
    MDB_txn *txn;
    int rc = mdb_txn_begin(storage->env, NULL, MDB_RDONLY, &txn);
    if (rc == 0)
        mdb_txn_abort(txn);
    if (rc != MDB_PANIC)
        return;
    log_event(LOG_ERROR, "storage_broken", "folder", LOG_STR, storage->path, "error", LOG_STR,
              "writing a commit failed half-way; look at the disk, then start again", NULL);
    _exit(1);
}

enum status store_write_commit(struct store_write *write)
{
    int rc = mdb_txn_commit(write->txn);
    write->txn = NULL;
    quota_end(write->storage, rc == 0);
    if (rc)
        end_if_broken(write->storage);
    return store_status(rc);
}

void store_write_abort(struct store_write *write)
{
    if (write->txn)
        mdb_txn_abort(write->txn);
    write->txn = NULL;
    quota_end(write->storage, false);
}

static enum status put(struct store_write *write, enum store_db db, const void *key,
                       size_t key_size, MDB_val *value, unsigned flags)
{
    MDB_val k = {key_size, (void *)(uintptr_t)key};
    store_assert_writer(write->storage);
    write->mutations++;
    return store_status(mdb_put(write->txn, write->storage->db[db], &k, value, flags));
}

enum status store_put(struct store_write *write, enum store_db db, const void *key, size_t key_size,
                      const void *value, size_t size)
{
    MDB_val v = {size, (void *)(uintptr_t)value};
    return put(write, db, key, key_size, &v, 0);
}

enum status store_put_room(struct store_write *write, enum store_db db, const void *key,
                           size_t key_size, size_t size, void **room)
{
    MDB_val v = {size, NULL};
    enum status status = put(write, db, key, key_size, &v, MDB_RESERVE);
    *room = v.mv_data;
    return status;
}

enum status store_delete(struct store_write *write, enum store_db db, const void *key,
                         size_t key_size)
{
    MDB_val k = {key_size, (void *)(uintptr_t)key};
    store_assert_writer(write->storage);
    int rc = mdb_del(write->txn, write->storage->db[db], &k, NULL);
    if (rc != MDB_NOTFOUND)
        write->mutations++;
    return store_status(rc);
}

/* ---- reads ---- */

enum status store_read_begin(struct storage *storage, MDB_txn **txn)
{
    pthread_rwlock_rdlock(&storage->map_lock);
    int rc = mdb_txn_begin(storage->env, NULL, MDB_RDONLY, txn);
    if (rc)
        pthread_rwlock_unlock(&storage->map_lock);
    return store_status(rc);
}

void store_read_end(struct storage *storage, MDB_txn *txn)
{
    mdb_txn_abort(txn);
    pthread_rwlock_unlock(&storage->map_lock);
}

enum status store_cursor_open(struct storage *storage, enum store_db db, MDB_txn **txn,
                              MDB_cursor **cursor)
{
    enum status status = store_read_begin(storage, txn);
    if (status)
        return status;
    status = store_status(mdb_cursor_open(*txn, storage->db[db], cursor));
    if (status)
        store_read_end(storage, *txn);
    return status;
}

void store_cursor_close(struct storage *storage, MDB_txn *txn, MDB_cursor *cursor)
{
    mdb_cursor_close(cursor);
    store_read_end(storage, txn);
}

enum status store_read_model(struct storage *storage, struct memory_file_manifest *manifest)
{
    struct record_meta meta;
    MDB_val value;
    MDB_txn *txn;
    enum status status = store_read_begin(storage, &txn);
    if (status)
        return status;
    status = store_get(storage, txn, STORE_META, format_key, sizeof format_key - 1, &value);
    if (!status)
        status = record_meta_decode(format_key, sizeof format_key - 1, value.mv_data, value.mv_size,
                                    &meta);
    store_read_end(storage, txn);
    if (status)
        return status;
    manifest->fingerprint = meta.fingerprint;
    manifest->chunk_tokens = meta.chunk_tokens;
    manifest->kv_bytes = meta.kv_bytes;
    manifest->landmark_bytes = meta.landmark_bytes;
    memcpy(manifest->model, meta.model_name, sizeof meta.model_name);
    return STATUS_OK;
}

enum status store_get(const struct storage *storage, MDB_txn *txn, enum store_db db,
                      const void *key, size_t key_size, MDB_val *value)
{
    MDB_val k = {key_size, (void *)(uintptr_t)key};
    return store_status(mdb_get(txn, storage->db[db], &k, value));
}

enum status store_get_counter(const struct storage *storage, MDB_txn *txn,
                              struct record_counter *counter)
{
    MDB_val value;
    enum status status =
        store_get(storage, txn, STORE_META, counter_key, sizeof counter_key - 1, &value);
    if (status)
        return status == STATUS_NOT_FOUND ? STATUS_CORRUPT : status;
    return record_counter_decode(counter_key, sizeof counter_key - 1, value.mv_data, value.mv_size,
                                 counter);
}

enum status store_put_counter(struct store_write *write, const struct record_counter *counter)
{
    struct buf buf;
    buf_init(&buf);
    record_counter_encode(&buf, counter_key, sizeof counter_key - 1, counter);
    enum status status =
        store_put(write, STORE_META, counter_key, sizeof counter_key - 1, buf.data, buf.size);
    buf_close(&buf);
    return status;
}

bool store_is_meta_key(const MDB_val *key)
{
    return (key->mv_size == sizeof format_key - 1 &&
            memcmp(key->mv_data, format_key, key->mv_size) == 0) ||
           (key->mv_size == sizeof counter_key - 1 &&
            memcmp(key->mv_data, counter_key, key->mv_size) == 0);
}

uint64_t store_count(const struct storage *storage, MDB_txn *txn, enum store_db db)
{
    MDB_stat stat;
    return mdb_stat(txn, storage->db[db], &stat) ? 0 : stat.ms_entries;
}

uint64_t store_space(const struct storage *storage, size_t key_size, size_t size)
{
    /* LMDB's own arithmetic: a node larger than half a page goes to pages of its own. */
    const size_t page_header = 16, node_header = 8;
    size_t largest_node = (((storage->page_bytes - page_header) / 2) & ~(size_t)1) - 2;
    if (node_header + key_size + size <= largest_node)
        return node_header + key_size + size;
    return (size + page_header + storage->page_bytes - 1) / storage->page_bytes *
           storage->page_bytes;
}

static void advise(const struct storage *storage, const void *bytes, size_t size, int advice)
{
    uintptr_t from = (uintptr_t)bytes & ~(uintptr_t)(storage->page_bytes - 1);
    uintptr_t end = (uintptr_t)bytes + size;
    (void)madvise((void *)from, end - from, advice);
}

void store_prefetch(const struct storage *storage, const void *bytes, size_t size)
{
    advise(storage, bytes, size, MADV_WILLNEED);
}

void store_populate(const struct storage *storage, const void *bytes, size_t size)
{
    advise(storage, bytes, size, MADV_POPULATE_READ); /* an older kernel refuses, and faults */
}

/* ---- the reserve ---- */

static void path_in(const struct storage *storage, const char *name, char *out, size_t size)
{
    int length = snprintf(out, size, "%s/%s", storage->path, name);
    ASSERT(length > 0 && (size_t)length < size);
}

static void resize_map(struct storage *storage, size_t bytes)
{
    pthread_rwlock_wrlock(&storage->map_lock);
    int rc = mdb_env_set_mapsize(storage->env, bytes);
    if (!rc) {
        pthread_rwlock_unlock(&storage->map_lock);
        return;
    }
    /* LMDB has let go of the old map, and has no other: nobody may read any more. */
    log_event(LOG_ERROR, "storage_map_resize", "folder", LOG_STR, storage->path, "error", LOG_STR,
              mdb_strerror(rc), NULL);
    _exit(1);
}

void store_reserve_release(struct storage *storage)
{
    char path[4096];
    store_assert_writer(storage);
    if (storage->reserve_released)
        return;
    storage->reserve_released = true;
    path_in(storage, "RESERVE", path, sizeof path);
    (void)unlink(path);
    resize_map(storage, storage->map_bytes);
}

/* The reserve of disk space is a file of its own: LMDB's file never gives pages back. */
static void create_reserve_file(const struct storage *storage)
{
    char path[4096];
    path_in(storage, "RESERVE", path, sizeof path);
    int fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    int rc = fd < 0 ? errno : posix_fallocate(fd, 0, (off_t)RESERVE_FILE_BYTES);
    if (fd >= 0)
        close(fd);
    if (rc) {
        (void)unlink(path);
        log_event(LOG_WARN, "storage_no_disk_reserve", "error", LOG_STR, strerror(rc), NULL);
    }
}

void store_reserve_restore(struct storage *storage)
{
    store_assert_writer(storage);
    if (!storage->reserve_released)
        return;
    storage->reserve_released = false;
    create_reserve_file(storage);
    resize_map(storage, storage->map_bytes - storage->reserve_bytes);
}

/* ---- opening ---- */

static enum status sync_folder(const char *path)
{
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return STATUS_IO;
    int rc = fsync(fd);
    close(fd);
    return rc ? STATUS_IO : STATUS_OK;
}

static enum status make_folder(const char *path, struct error *err)
{
    char parent[4096];
    if (mkdir(path, 0700) == 0) {
        /* The new folder's own entry must survive a crash as well as what is put into it. */
        snprintf(parent, sizeof parent, "%s/..", path);
        if (sync_folder(parent))
            return error_set(err, STATUS_IO, "cannot sync the folder above %s: %s", path,
                             strerror(errno));
        return STATUS_OK;
    }
    if (errno == EEXIST)
        return STATUS_OK;
    enum status status = errno == ENOENT ? STATUS_NOT_FOUND : store_status(errno);
    return error_set(err, status, "cannot create the folder %s: %s", path, strerror(errno));
}

/* One process a folder: LMDB itself would allow more, but the queue and recovery would not. */
static enum status lock_folder(struct storage *storage, struct error *err)
{
    char path[4096], pid[32] = "";
    path_in(storage, "LOCK", path, sizeof path);
    int fd = open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0)
        return error_set(err, store_status(errno), "cannot write in the folder %s: %s",
                         storage->path, strerror(errno));
    if (flock(fd, LOCK_EX | LOCK_NB)) {
        int error = errno;
        ssize_t size = read(fd, pid, sizeof pid - 1);
        pid[size > 0 ? size : 0] = 0;
        pid[strcspn(pid, "\n")] = 0;
        close(fd);
        if (error != EWOULDBLOCK)
            return error_set(err, STATUS_IO, "cannot lock %s: %s", path, strerror(error));
        return error_set(err, STATUS_CONFLICT, "the folder %s is in use by process %s",
                         storage->path, pid[0] ? pid : "(unknown)");
    }
    int length = snprintf(pid, sizeof pid, "%ld\n", (long)getpid());
    if (ftruncate(fd, 0) || pwrite(fd, pid, (size_t)length, 0) != length)
        log_event(LOG_WARN, "storage_lock_pid", "error", LOG_STR, strerror(errno), NULL);
    storage->lock_fd = fd;
    return STATUS_OK;
}

static enum status open_env(struct storage *storage, struct error *err)
{
    int dead = 0;
    unsigned flags = MDB_NOTLS | MDB_NORDAHEAD | (storage->read_only ? MDB_RDONLY : 0);
    int rc = mdb_env_create(&storage->env);
    if (!rc)
        rc = mdb_env_set_maxdbs(storage->env, STORE_DB_COUNT);
    if (!rc)
        rc = mdb_env_set_maxreaders(storage->env, READERS);
    if (!rc && !storage->read_only)
        rc = mdb_env_set_mapsize(storage->env, storage->map_bytes);
    if (!rc)
        rc = mdb_env_open(storage->env, storage->path, flags, 0600);
    if (rc == ENOENT)
        return error_set(err, STATUS_NOT_FOUND, "there is no store in %s", storage->path);
    if (rc)
        return error_set(err, store_status(rc), "cannot open the store in %s: %s", storage->path,
                         mdb_strerror(rc));
    /* Readers of a process that was killed would keep their pages for ever. */
    rc = mdb_reader_check(storage->env, &dead);
    if (rc)
        return error_set(err, store_status(rc), "cannot check the readers of %s: %s", storage->path,
                         mdb_strerror(rc));
    return STATUS_OK;
}

static enum status write_meta(struct store_write *write, const struct storage_options *options)
{
    struct record_meta meta = {.format = RECORD_FORMAT};
    struct record_counter counter = {.branch = 1, .snapshot = 1};
    meta.chunk_tokens = options->chunk_tokens;
    meta.kv_bytes = options->kv_bytes;
    meta.landmark_bytes = options->landmark_bytes;
    meta.fingerprint = options->model_fingerprint;
    snprintf(meta.model_name, sizeof meta.model_name, "%s",
             options->model_name ? options->model_name : "");
    struct buf buf;
    buf_init(&buf);
    record_meta_encode(&buf, format_key, sizeof format_key - 1, &meta);
    enum status status =
        store_put(write, STORE_META, format_key, sizeof format_key - 1, buf.data, buf.size);
    buf_close(&buf);
    return status ? status : store_put_counter(write, &counter);
}

static enum status check_meta(struct storage *storage, const struct storage_options *options,
                              const MDB_val *value, struct record_meta *out, struct error *err)
{
    struct record_meta meta;
    enum status status = record_meta_decode(format_key, sizeof format_key - 1, value->mv_data,
                                            value->mv_size, &meta);
    *out = meta;
    if (status == STATUS_UNSUPPORTED)
        return error_set(err, status,
                         "the store in %s has format %u, which is newer than this program's (%d)",
                         storage->path, meta.format, RECORD_FORMAT);
    if (status || meta.kv_bytes - 1 >= CHUNK_BYTES_MOST ||
        meta.landmark_bytes - 1 >= CHUNK_BYTES_MOST || meta.chunk_tokens == 0)
        return error_set(err, STATUS_CORRUPT, "the first record of the store in %s is damaged",
                         storage->path);
    if (options->kv_bytes) {
        if (meta.fingerprint != options->model_fingerprint)
            return error_set(
                err, STATUS_MISMATCH,
                "the memories in %s were made by the model %s (%016llx), not by %s (%016llx): "
                "start with that model's folder, or keep this one's in another data folder",
                storage->path, meta.model_name, (unsigned long long)meta.fingerprint,
                options->model_name ? options->model_name : "this one",
                (unsigned long long)options->model_fingerprint);
        if (meta.kv_bytes != options->kv_bytes || meta.landmark_bytes != options->landmark_bytes ||
            meta.chunk_tokens != options->chunk_tokens)
            return error_set(err, STATUS_MISMATCH,
                             "the memories in %s have chunks of %u tokens and %llu + %llu bytes",
                             storage->path, meta.chunk_tokens, (unsigned long long)meta.kv_bytes,
                             (unsigned long long)meta.landmark_bytes);
    }
    if ((storage->read_only || options->repair) && meta.format < RECORD_FORMAT)
        return error_set(err, STATUS_UNSUPPORTED,
                         "the store in %s has format %u; rambad serve brings it to format %d",
                         storage->path, meta.format, RECORD_FORMAT);
    storage->kv_bytes = (size_t)meta.kv_bytes;
    storage->landmark_bytes = (size_t)meta.landmark_bytes;
    storage->chunk_tokens = meta.chunk_tokens;
    return STATUS_OK;
}

static void name_marker(const struct storage *storage, uint32_t format, char *out, size_t size)
{
    char name[32];
    snprintf(name, sizeof name, "MIGRATED-FROM-%u", format);
    path_in(storage, name, out, size);
}

/* Says in the folder itself what is about to be done to it: which copies of it are of use to an
 * older program is told by their age. On disk before the migration is. */
static enum status put_marker(const struct storage *storage, uint32_t old)
{
    char path[4096], text[512], when[32];
    const time_t now = (time_t)storage->clock_cb(storage->clock_context, false);
    struct tm utc;
    strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
    const int size =
        snprintf(text, sizeof text,
                 "At %s rambad %s brought this store from format %u to format %d, in place.\n"
                 "Programs that know format %u alone refuse it from then on. To go back to one of "
                 "them, put a copy\nof this folder in its place that was made before that time. "
                 "This file may be deleted.\n",
                 when, RAMBAD_VERSION, old, RECORD_FORMAT, old);
    name_marker(storage, old, path, sizeof path);
    int fd = open(path, O_CREAT | O_WRONLY | O_TRUNC | O_CLOEXEC, 0600);
    bool good = fd >= 0 && write(fd, text, (size_t)size) == size && fsync(fd) == 0;
    const int error = errno;
    if (fd >= 0)
        close(fd);
    return good ? sync_folder(storage->path) : store_status(error);
}

static void drop_marker(const struct storage *storage, bool is_there, uint32_t old)
{
    char path[4096];
    name_marker(storage, old, path, sizeof path);
    if (is_there)
        (void)unlink(path);
}

/* Brings a store of an older format to ours, in the transaction that opened it. */
static enum status migrate(struct store_write *write, struct record_meta *meta)
{
    uint32_t old = meta->format;
    struct buf buf;
    enum status status = put_marker(write->storage, old);
    if (!status)
        status = memory_migrate(write, old); /* all else reads as it is */
    if (status)
        return status;
    meta->format = RECORD_FORMAT;
    buf_init(&buf);
    record_meta_encode(&buf, format_key, sizeof format_key - 1, meta);
    status = store_put(write, STORE_META, format_key, sizeof format_key - 1, buf.data, buf.size);
    buf_close(&buf);
    if (!status)
        log_event(LOG_INFO, "storage_migrated", "folder", LOG_STR, write->storage->path, "from",
                  LOG_INT, (int64_t)old, "to", LOG_INT, (int64_t)RECORD_FORMAT, NULL);
    return status;
}

/* There is a store to repair. */
static enum status find_store(const struct storage *storage, struct error *err)
{
    char place[4096];
    path_in(storage, "data.mdb", place, sizeof place);
    return access(place, F_OK)
               ? error_set(err, STATUS_NOT_FOUND, "there is no store in %s", storage->path)
               : STATUS_OK;
}

/* Makes a new store beside its place and moves it there when it is whole: whatever cuts this short,
 * the folder holds no store or a whole one. */
static enum status create_store(const struct storage *storage,
                                const struct storage_options *options, struct error *err)
{
    char place[4096], folder[4096], data[4096], lock[4096];
    path_in(storage, "data.mdb", place, sizeof place);
    if (access(place, F_OK) == 0)
        return STATUS_OK;
    path_in(storage, "NEW", folder, sizeof folder);
    path_in(storage, "NEW/data.mdb", data, sizeof data);
    path_in(storage, "NEW/lock.mdb", lock, sizeof lock);
    (void)unlink(data); /* of an earlier try */
    (void)unlink(lock);
    if (mkdir(folder, 0700) && errno != EEXIST)
        return error_set(err, store_status(errno), "cannot create the folder %s: %s", folder,
                         strerror(errno));
    struct storage made = *storage;
    struct store_write write = {.storage = &made};
    made.path = folder;
    enum status status = open_env(&made, err);
    if (!status) {
        int rc = mdb_txn_begin(made.env, NULL, 0, &write.txn);
        for (int i = 0; !rc && i < STORE_DB_COUNT; i++)
            rc = mdb_dbi_open(write.txn, db_names[i], MDB_CREATE, &made.db[i]);
        status = rc ? store_status(rc) : write_meta(&write, options);
        if (status)
            store_write_abort(&write);
        else
            status = store_write_commit(&write);
        if (!status)
            status = sync_folder(folder);
        if (!status && rename(data, place))
            status = store_status(errno);
        if (!status)
            status = sync_folder(storage->path);
        if (status)
            error_set(err, status, "cannot make a store in %s: %s", storage->path,
                      status_text(status));
    }
    if (made.env)
        mdb_env_close(made.env);
    (void)unlink(data);
    (void)unlink(lock);
    (void)rmdir(folder);
    return status;
}

/* Reads the first record, which says whether this is a store of ours. */
static enum status open_meta(const struct store_write *write, const struct storage_options *options,
                             struct record_meta *meta, struct error *err)
{
    struct storage *storage = write->storage;
    MDB_val value;
    enum status status =
        store_get(storage, write->txn, STORE_META, format_key, sizeof format_key - 1, &value);
    if (status)
        return error_set(err, STATUS_CORRUPT, "the first record of the store in %s is missing",
                         storage->path);
    return check_meta(storage, options, &value, meta, err);
}

/* Opens the sub-databases; a store of an older format lacks the newer ones. */
static enum status open_databases(struct storage *storage, const struct storage_options *options,
                                  struct error *err)
{
    struct store_write write = {.storage = storage};
    struct record_meta meta = {0};
    enum status status = STATUS_OK;
    unsigned flags = storage->read_only ? 0 : MDB_CREATE;
    int rc = mdb_txn_begin(storage->env, NULL, storage->read_only ? MDB_RDONLY : 0, &write.txn);
    for (int i = 0; !rc && !status && i < STORE_DB_COUNT; i++) {
        rc = mdb_dbi_open(write.txn, db_names[i], flags, &storage->db[i]);
        if (!rc && i == STORE_META)
            status = open_meta(&write, options, &meta, err);
    }
    if (rc) {
        store_write_abort(&write);
        /* An environment without our sub-databases is somebody else's file, or damaged. */
        status = rc == MDB_NOTFOUND ? STATUS_CORRUPT : store_status(rc);
        return error_set(err, status, "cannot open the tables of the store in %s: %s",
                         storage->path, mdb_strerror(rc));
    }
    const uint32_t format = meta.format;
    bool old = !status && format < RECORD_FORMAT;
    if (old) {
        status = migrate(&write, &meta);
        if (status)
            error_set(err, status, "cannot bring the store in %s to format %d: %s; it is as it was",
                      storage->path, RECORD_FORMAT, status_text(status));
    }
    if (status) {
        store_write_abort(&write);
        drop_marker(storage, old, format);
        return status;
    }
    /* Handles opened in a read transaction stay only when it is committed. */
    status = store_write_commit(&write);
    drop_marker(storage, old && status, format);
    return status ? error_set(err, status, "cannot write to the store in %s: %s", storage->path,
                              status_text(status))
                  : STATUS_OK;
}

static enum status check_options(const struct storage_options *options, struct error *err)
{
    if (!options->path || !options->path[0] || strlen(options->path) > 3000)
        return error_set(err, STATUS_INVALID, "the path of the store is empty or too long");
    if ((options->read_only || options->repair) && options->kv_bytes == 0)
        return STATUS_OK;
    if (options->kv_bytes - 1 >= CHUNK_BYTES_MOST ||
        options->landmark_bytes - 1 >= CHUNK_BYTES_MOST || options->chunk_tokens == 0)
        return error_set(err, STATUS_INVALID, "chunk sizes of %zu + %zu bytes and %u tokens",
                         options->kv_bytes, options->landmark_bytes, options->chunk_tokens);
    if (options->map_bytes && options->map_bytes < MAP_BYTES_LEAST)
        return error_set(err, STATUS_INVALID, "a store needs a map of at least %zu bytes",
                         MAP_BYTES_LEAST);
    return STATUS_OK;
}

static void release(struct storage *storage)
{
    if (storage->env)
        mdb_env_close(storage->env);
    if (storage->lock_fd >= 0)
        close(storage->lock_fd);
    quota_close(storage->quota);
    pthread_mutex_destroy(&storage->clock_lock);
    pthread_rwlock_destroy(&storage->map_lock);
    free(storage->path);
    free(storage);
}

static struct storage *allocate(const struct storage_options *options)
{
    struct storage *storage = calloc(1, sizeof *storage);
    char *path = strdup(options->path);
    if (!storage || !path) {
        free(storage);
        free(path);
        return NULL;
    }
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    storage->path = path;
    storage->lock_fd = -1;
    storage->read_only = options->read_only;
    storage->kv_bytes = options->kv_bytes;
    storage->landmark_bytes = options->landmark_bytes;
    storage->chunk_tokens = options->chunk_tokens;
    storage->map_bytes = options->map_bytes ? options->map_bytes : LIMITS_MAP_BYTES;
    storage->map_bytes -= storage->map_bytes % page;
    storage->reserve_bytes =
        storage->map_bytes / 8 < RESERVE_BYTES_MOST ? storage->map_bytes / 8 : RESERVE_BYTES_MOST;
    storage->reserve_bytes -= storage->reserve_bytes % page;
    storage->keep_snapshots =
        options->keep_snapshots ? options->keep_snapshots : LIMITS_KEEP_SNAPSHOTS;
    storage->linger_ns =
        (options->linger_ms ? options->linger_ms : LIMITS_LINGER_MS) * UINT64_C(1000000);
    storage->queue_bytes = options->queue_bytes ? options->queue_bytes : LIMITS_WRITER_QUEUE_BYTES;
    storage->memory_quota = options->memory_quota;
    storage->clock_cb = options->clock_cb ? options->clock_cb : read_clock;
    storage->clock_context = options->clock_context;
    start_clock(storage);
    storage->writer_thread = pthread_self();
    pthread_mutex_init(&storage->clock_lock, NULL);
    pthread_rwlock_init(&storage->map_lock, NULL);
    return storage;
}

enum status storage_open(const struct storage_options *options, struct storage **out,
                         struct error *err)
{
    enum status status = check_options(options, err);
    if (status)
        return status;
    struct storage *storage = allocate(options);
    if (!storage)
        return error_set(err, STATUS_NO_MEMORY, "out of memory");
    if (options->repair)
        status = find_store(storage, err);
    else if (!storage->read_only)
        status = make_folder(storage->path, err);
    if (!status && !storage->read_only)
        status = lock_folder(storage, err);
    if (!status && !storage->read_only && !options->repair)
        status = create_store(storage, options, err);
    if (!status)
        status = open_env(storage, err);
    if (!status) {
        MDB_stat stat;
        mdb_env_stat(storage->env, &stat);
        storage->page_bytes = stat.ms_psize;
        status = open_databases(storage, options, err);
    }
    if (!status && !storage->read_only && !options->repair) {
        /* Recovery frees more than it takes, and may use the reserve for it. */
        store_reserve_release(storage);
        status = memory_recover(storage, err);
        store_reserve_restore(storage);
        start_clock(storage);
        if (!status && quota_open(storage, &storage->quota))
            status =
                error_set(err, STATUS_IO, "cannot count what the store in %s holds", storage->path);
        if (!status)
            status = writer_start(storage, err);
    }
    if (status) {
        release(storage);
        return status;
    }
    *out = storage;
    return STATUS_OK;
}

void storage_close(struct storage *storage)
{
    if (!storage)
        return;
    if (storage->writer)
        writer_stop(storage);
    release(storage);
}

void storage_get_stats(struct storage *storage, struct storage_stats *stats)
{
    MDB_envinfo info;
    MDB_txn *txn;
    *stats = (struct storage_stats){0};
    if (store_read_begin(storage, &txn) == STATUS_OK) {
        stats->memories = store_count(storage, txn, STORE_MEMORY);
        stats->branches_to_collect = store_count(storage, txn, STORE_COLLECT);
        if (mdb_env_info(storage->env, &info) == 0)
            stats->map_used_bytes = (info.me_last_pgno + 1) * storage->page_bytes;
        store_read_end(storage, txn);
    }
    stats->map_bytes = storage->map_bytes;
    stats->chunks_read = atomic_load_explicit(&storage->chunks_read, memory_order_relaxed);
    stats->bytes_read = atomic_load_explicit(&storage->bytes_read, memory_order_relaxed);
    if (storage->writer)
        writer_get_stats(storage, stats);
}
