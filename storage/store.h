/* store.h - the LMDB environment behind storage.h, and the few calls the rest of the room makes.
 * Thread: the writing calls on the writer thread alone (asserted), the reading ones on any.
 * Owns the environment, its sub-databases, the lock on the folder and the reserve for deletes.
 * Private to storage/. */
#ifndef STORAGE_STORE_H
#define STORAGE_STORE_H

#include <lmdb.h>
#include <pthread.h>
#include <stdatomic.h>

#include "storage/expiry.h"
#include "storage/record.h"
#include "storage/storage.h"

enum store_db {
    STORE_META,     /* "format", "counter" */
    STORE_MEMORY,   /* id -> record_memory */
    STORE_BRANCH,   /* branch -> record_branch; its order is the order of creation */
    STORE_CHILD,    /* parent, fork position, child -> nothing: which part children reach */
    STORE_COLLECT,  /* branch -> nothing: branches with something left to free */
    STORE_KV,       /* runs of chunks */
    STORE_LANDMARK, /* runs of landmarks */
    STORE_TOKEN,    /* runs of token ids */
    STORE_SNAPSHOT, /* snapshot, piece number -> record_snapshot, pieces */
    STORE_TURN,     /* branch, position -> record_turn */
    STORE_RECEIPT,  /* name -> record_receipt */
    STORE_OBJECT,   /* id -> record_object */
    STORE_ITEM,     /* owner, number -> record_item */
    STORE_EXPIRY,   /* end, id -> nothing: which memory is over when */
    STORE_DB_COUNT
};

#define STORE_CHILD_KEY_BYTES 24

struct quota;
struct writer;
struct memory_file_manifest;

struct storage {
    char *path;
    MDB_env *env;
    MDB_dbi db[STORE_DB_COUNT];
    size_t kv_bytes, landmark_bytes;
    uint32_t chunk_tokens;
    size_t page_bytes;
    size_t map_bytes, reserve_bytes;
    size_t queue_bytes;
    uint32_t keep_snapshots;
    uint64_t linger_ns;
    uint64_t memory_quota;
    struct quota *quota; /* NULL while it is being opened, and where nothing is written */
    int64_t (*clock_cb)(void *context, bool monotonic);
    void *clock_context;
    pthread_mutex_t clock_lock;
    struct expiry_clock clock; /* under the lock */
    int64_t newest;            /* the latest time that a memory has written down, at opening */
    bool reserve_released;     /* writer thread */
    bool read_only;
    int lock_fd; /* -1: none */
    /* Held shared by every read transaction, exclusively while the map is resized. */
    pthread_rwlock_t map_lock;
    pthread_t writer_thread; /* while opening: the opener */
    struct writer *writer;
    atomic_uint_fast64_t chunks_read, bytes_read;
};

/* An LMDB or errno code as ours. */
enum status store_status(int rc);

/* The time by which is judged what is over: see expiry.h. */
int64_t store_now(struct storage *storage);
/* The time to write down: the later of that and the wall clock's. */
int64_t store_stamp(struct storage *storage);

/* ---- a write transaction, on the writer thread ---- */

struct store_write {
    struct storage *storage;
    MDB_txn *txn;
    uint64_t mutations; /* puts and deletes tried; when it moved, a failure must abort the whole */
};

STATUS_CHECKED enum status store_write_begin(struct storage *storage, struct store_write *write);
/* Ends the transaction either way. */
STATUS_CHECKED enum status store_write_commit(struct store_write *write);
void store_write_abort(struct store_write *write);

STATUS_CHECKED enum status store_put(struct store_write *write, enum store_db db, const void *key,
                                     size_t key_size, const void *value, size_t size);
/* Room for a value, to be filled before the next call on this transaction. */
STATUS_CHECKED enum status store_put_room(struct store_write *write, enum store_db db,
                                          const void *key, size_t key_size, size_t size,
                                          void **room);
/* STATUS_NOT_FOUND when there is none. */
STATUS_CHECKED enum status store_delete(struct store_write *write, enum store_db db,
                                        const void *key, size_t key_size);

/* Asks the kernel for the pages of a value, so that a batch of reads waits once and not page by
 * page: the map is opened without read-ahead, which would fetch neighbours nobody asked for. */
void store_prefetch(const struct storage *storage, const void *bytes, size_t size);
/* Maps the pages of a long value at once, before they are read one behind the other. */
void store_populate(const struct storage *storage, const void *bytes, size_t size);

/* The reserve lets deletes go through when the map or the disk is full: releasing it raises the
 * map to its full size and removes the reserve file; restoring undoes both. Writer thread, with no
 * transaction open. */
void store_reserve_release(struct storage *storage);
void store_reserve_restore(struct storage *storage);

/* ---- reading, in either kind of transaction ---- */

/* What the store's first record says of the model: fingerprint, name, sizes. */
STATUS_CHECKED enum status store_read_model(struct storage *storage,
                                            struct memory_file_manifest *manifest);
STATUS_CHECKED enum status store_read_begin(struct storage *storage, MDB_txn **txn);
void store_read_end(struct storage *storage, MDB_txn *txn);
/* A read transaction with a cursor over one of the tables, and the end of both. */
STATUS_CHECKED enum status store_cursor_open(struct storage *storage, enum store_db db,
                                             MDB_txn **txn, MDB_cursor **cursor);
void store_cursor_close(struct storage *storage, MDB_txn *txn, MDB_cursor *cursor);

/* `value` lives until the next write of the transaction or its end. STATUS_NOT_FOUND. */
STATUS_CHECKED enum status store_get(const struct storage *storage, MDB_txn *txn, enum store_db db,
                                     const void *key, size_t key_size, MDB_val *value);
STATUS_CHECKED enum status store_get_counter(const struct storage *storage, MDB_txn *txn,
                                             struct record_counter *counter);
STATUS_CHECKED enum status store_put_counter(struct store_write *write,
                                             const struct record_counter *counter);
/* Whether STORE_META has an entry of that name. */
bool store_is_meta_key(const MDB_val *key);
/* Number of entries of a sub-database. */
uint64_t store_count(const struct storage *storage, MDB_txn *txn, enum store_db db);
/* Disk space that a value takes: whole pages once it is too large for a leaf. */
uint64_t store_space(const struct storage *storage, size_t key_size, size_t size);

void store_assert_writer(const struct storage *storage);

#endif
