/* storage.h - durable memories in one LMDB environment: branches of immutable chunks (K/V,
 * landmarks), token ids, snapshots.
 * Thread: writes are queued from any thread and carried out, in order, by the one writer thread
 * with group commit; reads run on the calling thread in short transactions and copy out.
 * Owns the environment, the lock on its folder and the writer thread.
 *
 * The model of the data. A *branch* is a run of positions written by one memory; it may start
 * inside a parent branch (a fork), whose earlier chunks and tokens it shares without copying. A
 * *memory* names a branch and a committed position in it, with a snapshot (the recurrent state and
 * everything else the engine needs) at exactly that position. The snapshot decides: what a branch
 * holds past the committed position is not part of the memory and is dropped at opening; a missing
 * chunk before it is corruption.
 *
 * Every commit of a memory that is not ephemeral is a *turn*, a place in its past: its history is
 * its turns and those of the branches it starts in. The last `keep_snapshots` turns and bookmarked
 * ones keep their snapshot and can be forked for nothing; to any other place the tokens lead from
 * the nearest snapshot before it. */
#ifndef STORAGE_STORAGE_H
#define STORAGE_STORAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/base/buf.h"
#include "proto/limits.h"
#include "proto/status.h"

struct storage;

struct storage_options {
    const char *path;            /* folder, created (0700) when missing; copied */
    size_t kv_bytes;             /* K/V bytes of one chunk */
    size_t landmark_bytes;       /* landmark bytes of one chunk */
    uint32_t chunk_tokens;       /* S */
    uint64_t model_fingerprint;  /* another model's folder is refused: STATUS_MISMATCH */
    const char *model_name;      /* for the message of that refusal; copied */
    size_t map_bytes;            /* 0: LIMITS_MAP_BYTES; the most the file may grow to */
    size_t queue_bytes;          /* 0: LIMITS_WRITER_QUEUE_BYTES */
    uint32_t linger_ms;          /* 0: LIMITS_LINGER_MS; how long appends alone wait for more */
    uint32_t keep_snapshots;     /* of each memory's last turns; 0: LIMITS_KEEP_SNAPSHOTS */
    uint64_t memory_quota;       /* the most bytes_on_disk of one memory; 0: no limit */
    /* Seconds since 1970, or of a clock that is never set; NULL: the system's. */
    int64_t (*clock_cb)(void *context, bool monotonic);
    void *clock_context;
    bool repair;                 /* for `repair`: writable, but recovers nothing, starts no writer
                                    and takes sizes and model as they are */
    bool read_only;              /* for `check`; takes no lock and starts no writer; with kv_bytes 0
                                    sizes and model are taken as they are */
};

/* Opens or creates. A second process on the same folder gets STATUS_CONFLICT with a message that
 * names the folder and the holder's pid. Recovers: drops ephemeral memories and what lies past
 * committed positions. STATUS_IO, STATUS_CORRUPT, STATUS_MISMATCH, STATUS_UNSUPPORTED (a newer
 * format), STATUS_DISK_FULL. */
STATUS_CHECKED enum status storage_open(const struct storage_options *options,
                                        struct storage **out, struct error *err);
/* Carries out everything queued, runs its callbacks, then stops the writer and closes. */
void storage_close(struct storage *storage);

/* ---- writes: queued, in order, each answered exactly once on the writer thread ---- */

/* Runs after the commit (status STATUS_OK) or the failure, always on the writer thread, so never
 * from inside the queueing call (but perhaps before that has returned to its thread); never when
 * the queueing call returned anything but STATUS_OK. May be NULL. May queue further writes.
 * A queueing call returns STATUS_BUSY when the queue is full (room comes with a callback; a write
 * larger than the whole queue is taken when the queue is empty, a storage_memory_delete without a
 * callback always), STATUS_CLOSED once storage_close has begun or when the store is read only,
 * STATUS_INVALID for an id that is empty or too long, STATUS_TOO_LARGE for metadata beyond 128 KiB,
 * STATUS_NO_MEMORY. */
typedef void (*storage_done_cb)(void *context, enum status status);

/* What to answer to whoever asks again for a write that was carried out: on disk in the same commit
 * as the write, in place of an older one of its name, for LIMITS_RECEIPT_S. */
struct storage_receipt {
    unsigned char name[LIMITS_RECEIPT_NAME_BYTES]; /* a good hash, or sweeping is uneven */
    const void *bytes;
    size_t size;
};

/* What a caller keeps by a name of its own: bytes, and where in a memory's past they belong. */
struct storage_object {
    char id[LIMITS_ID_BYTES];     /* unique among objects */
    char tenant[LIMITS_ID_BYTES]; /* whose it is, for the caller to ask for; "": nobody's */
    char memory[LIMITS_ID_BYTES]; /* "": of none */
    bool made_memory;             /* that memory was made for such objects: it may go with the last
                                     of them */
    int64_t created_at;           /* seconds since 1970 */
    const void *bytes;
    size_t size;
    /* Read alone: the place behind the turn that it was written with, and whether that is still in
     * the memory's past: the memory was not deleted, nor taken back to before it. */
    uint64_t position;
    bool reachable;
};
struct storage_item {
    char id[LIMITS_ID_BYTES]; /* unique in its list */
    const void *bytes;
    size_t size;
    uint64_t position; /* read alone: behind the turn that it was written with; 0: with none */
};
/* Items are appended to the list of `owner`: an object's id, or a memory's, whose list goes with it
 * and is cut when the memory goes back to before an item. The objects that a memory was made for go
 * in the same way. */
struct storage_list {
    const char *owner;
    const struct storage_item *items;
    size_t count;
};
struct storage_keep {
    const struct storage_object *object; /* takes the place of an older one of its id; NULL: none */
    struct storage_list lists[2];
};

/* A memory is over so many seconds after it was made, or was last committed to, forked or replaced.
 * Nothing happens to it by itself: see storage_expired. */
struct storage_expires {
    int64_t seconds; /* 0: never */
    bool from_use;
};

struct storage_memory_options {
    const char *id;       /* caller's choice, unique, shorter than LIMITS_ID_BYTES */
    const char *from;     /* NULL: empty; else fork that memory */
    uint64_t at;          /* 0: at its committed position; else at its last snapshot before or at
                             this position, at the beginning when there is none */
    const char *metadata; /* JSON object text, stored as it is; NULL: "{}" */
    const char *tenant;   /* whose it is, for the caller to ask for; NULL: nobody's. A settled
                             memory stays whose the one it takes the place of was */
    const struct storage_receipt *receipt; /* NULL: none */
    struct storage_expires expires; /* of an ephemeral one: once it is settled as a new one */
    bool ephemeral;       /* not listed, dropped at the next opening */
};

/* Creates an empty memory, or a fork that shares all of `from` by reference. Copied. The callback
 * gets STATUS_CONFLICT (id taken), STATUS_NOT_FOUND (no `from`), STATUS_INVALID (`at` lies behind
 * the committed position), STATUS_TOO_LARGE (more than LIMITS_LINEAGE forks above each other),
 * STATUS_KEY_QUOTA (no room for its metadata), STATUS_DISK_FULL, STATUS_IO. */
STATUS_CHECKED enum status storage_memory_create(struct storage *storage,
                                                 const struct storage_memory_options *options,
                                                 storage_done_cb done_cb, void *context);
/* Replaces what is given: metadata, when it is over (then counted from now); NULL: as it is. */
STATUS_CHECKED enum status storage_memory_update(struct storage *storage, const char *id,
                                                 const char *metadata,
                                                 const struct storage_expires *expires,
                                                 storage_done_cb done_cb, void *context);
/* Deletes the memory; chunks no other memory reaches are freed in bounded steps behind it. */
STATUS_CHECKED enum status storage_memory_delete(struct storage *storage, const char *id,
                                                 storage_done_cb done_cb, void *context);
/* The same, if it is over: STATUS_CONFLICT when it is not (any longer). */
STATUS_CHECKED enum status storage_memory_expire(struct storage *storage, const char *id,
                                                 storage_done_cb done_cb, void *context);

/* Appends chunk `index` to `branch`; kv and landmark are copied. Indexes of a branch come in
 * order without holes. After a failure every further append or commit of that branch fails with
 * it (a full disk or quota, else STATUS_IO) until storage_truncate, so a later commit can never
 * cover a lost chunk. Waits for others, or a commit, up to linger_ms. STATUS_BUSY: the queue is
 * full. */
STATUS_CHECKED enum status storage_append(struct storage *storage, uint64_t branch,
                                          uint64_t index, const void *kv, const void *landmark,
                                          storage_done_cb done_cb, void *context);
/* Appends that would be accepted now. */
size_t storage_append_room(struct storage *storage);
/* The same as an append, for the one thread that has asked storage_append_room just before, and for no
 * more than it was told: what others have queued since does not turn it away. */
STATUS_CHECKED enum status storage_append_promised(struct storage *storage, uint64_t branch,
                                                   uint64_t index, const void *kv,
                                                   const void *landmark,
                                                   storage_done_cb done_cb, void *context);

/* On a token of a commit: behind it the caller did more to its state than to read the token, and
 * whoever reads the tokens again to get to the same state has to do that there, too. Kept with the
 * token; only storage_read_marked gives it back. */
#define STORAGE_TOKEN_MARK ((int32_t)1 << 30)

struct storage_commit {
    const char *id;
    uint64_t position;       /* committed position after this, in tokens of the whole sequence */
    const int32_t *tokens;   /* the tokens [position - token_count, position); they extend the */
    size_t token_count;      /* last committed position exactly, else STATUS_CONFLICT; with marks */
    uint64_t text_bytes;     /* bytes of text appended to the memory so far, in all */
    const void *snapshot;    /* replaces the memory's snapshot */
    size_t snapshot_bytes;   /* at least 1 */
    bool takes_snapshot;     /* it is malloced, and not copied but taken when this succeeds */
    const struct storage_receipt *receipt; /* NULL: none */
    const struct storage_keep *keep;       /* NULL: nothing; its object is of this turn */
    bool settles; /* the memory was ephemeral, and is so no longer */
    bool goes_on; /* with the turn of the last commit, whose place in the history this takes */
};

/* Makes the memory's new position durable together with everything queued before it. Copied, but
 * for a snapshot that is taken.
 * The callback gets STATUS_CONFLICT as said above, STATUS_INVALID when a chunk before `position`
 * was never appended, STATUS_NOT_FOUND, STATUS_DISK_FULL, STATUS_MEMORY_QUOTA, STATUS_KEY_QUOTA
 * (as an append does), STATUS_IO. A commit that fails also
 * fails what follows on its branch until storage_truncate. */
STATUS_CHECKED enum status storage_commit(struct storage *storage,
                                          const struct storage_commit *commit,
                                          storage_done_cb done_cb, void *context);
/* Drops the chunks of the memory's own branch past its committed position (a turn was aborted)
 * and lifts a failure. Queue order applies, so it is called before the branch is written again. */
STATUS_CHECKED enum status storage_truncate(struct storage *storage, const char *id,
                                            storage_done_cb done_cb, void *context);

/* The ephemeral memory becomes memory `id`. The callback gets STATUS_NOT_FOUND, STATUS_INVALID (it is
 * not ephemeral), STATUS_CONFLICT (id taken), STATUS_DISK_FULL, STATUS_IO. */
STATUS_CHECKED enum status storage_memory_settle(struct storage *storage, const char *ephemeral,
                                                 const char *id, storage_done_cb done_cb,
                                                 void *context);
/* The ephemeral memory takes the place of memory `id`, which keeps its metadata and loses its own
 * branch as by a delete. How a memory is rewound: make an ephemeral fork at an earlier position, write
 * to it what leads to the place wanted, replace the memory by it. Of the list of `id` goes what lies
 * behind the new end, or, with `keep`, behind `position`, and what `keep` holds comes in its place: all
 * at once. How a part of a memory's past is told anew. Answers as storage_memory_settle, but
 * STATUS_NOT_FOUND: there is no `id` (any longer). */
STATUS_CHECKED enum status storage_memory_replace(struct storage *storage, const char *ephemeral,
                                                  const char *id, uint64_t position,
                                                  const struct storage_keep *keep,
                                                  storage_done_cb done_cb, void *context);
/* Names a turn, so that its snapshot stays; NULL takes the name back. The callback gets
 * STATUS_NOT_FOUND (no such memory or turn), STATUS_CONFLICT (another memory's turn, or its snapshot
 * is gone). STATUS_INVALID: LIMITS_BOOKMARK_BYTES or longer. */
STATUS_CHECKED enum status storage_turn_bookmark(struct storage *storage, const char *id,
                                                 uint64_t position, const char *bookmark,
                                                 storage_done_cb done_cb, void *context);
/* Forgets a turn and its snapshot; what it said stays. STATUS_CONFLICT: another memory's turn, or
 * the one that the memory stands at. */
STATUS_CHECKED enum status storage_turn_delete(struct storage *storage, const char *id,
                                               uint64_t position, storage_done_cb done_cb,
                                               void *context);

/* Keeps an object, and items, with no turn. Copied. */
STATUS_CHECKED enum status storage_put(struct storage *storage, const struct storage_keep *keep,
                                       storage_done_cb done_cb, void *context);
/* Deletes the object and its list; `with_memory`: and the memory that was made for it, when it is
 * the last such object. STATUS_NOT_FOUND. */
STATUS_CHECKED enum status storage_object_delete(struct storage *storage, const char *id,
                                                 bool with_memory, storage_done_cb done_cb,
                                                 void *context);
/* ---- quotas ---- */

struct storage_quota {
    const char *tenant;
    uint64_t bytes; /* the most disk space of what the tenant's memories wrote, objects and items */
};
/* These, and no others, are limited from now on. Any thread. STATUS_NO_MEMORY. */
STATUS_CHECKED enum status storage_set_quotas(struct storage *storage,
                                              const struct storage_quota *quotas, size_t count);
struct storage_usage {
    uint64_t bytes; /* of what the tenant's memories wrote, objects and items, on disk */
    uint64_t key_quota, memory_quota; /* 0: no limit */
};
void storage_get_quota(struct storage *storage, const char *tenant, struct storage_usage *usage);

/* ---- reads: any thread, committed data only ---- */

/* Memories that are over, those first that are so longest, after the one named `after` (NULL: from
 * the start): at most `limit`. Whoever knows that nobody uses one deletes it with
 * storage_memory_expire. */
STATUS_CHECKED enum status storage_expired(struct storage *storage, const char *after, size_t limit,
                                           char (*ids)[LIMITS_ID_BYTES], size_t *count);

struct storage_memory {
    char id[LIMITS_ID_BYTES];
    char parent[LIMITS_ID_BYTES]; /* "" for none */
    char tenant[LIMITS_ID_BYTES]; /* "" for nobody's */
    uint64_t branch;
    int64_t created_at; /* seconds since 1970 */
    uint64_t token_count, chunk_count, text_bytes;
    uint64_t bytes_on_disk; /* of its own branch, snapshots included, and of its items; what it
                               shares counts for the owner */
    size_t snapshot_bytes;  /* 0 while the memory is empty */
    struct storage_expires expires;
    int64_t expires_at; /* 0: never */
    bool ephemeral;
    char *metadata; /* JSON text; free with storage_memory_close */
};

STATUS_CHECKED enum status storage_memory_get(struct storage *storage, const char *id,
                                              struct storage_memory *memory);
void storage_memory_close(struct storage_memory *memory);
/* The tenant's memories (NULL: everybody's) that are not ephemeral, newest first, after the one
 * named `after` (NULL: from the start): at most `limit` into `memories`; `*has_more` says whether
 * there are others. A damaged one is logged and left out. An `after` that is none of them is
 * STATUS_NOT_FOUND. */
STATUS_CHECKED enum status storage_memory_list(struct storage *storage, const char *tenant,
                                               const char *after, size_t limit,
                                               struct storage_memory *memories, size_t *count,
                                               bool *has_more);
/* The receipt of that name: malloced for the caller, with a NUL behind it. STATUS_NOT_FOUND (none,
 * or too old), STATUS_CORRUPT. */
STATUS_CHECKED enum status storage_receipt_get(struct storage *storage, const unsigned char *name,
                                               void **bytes, size_t *size);

/* STATUS_NOT_FOUND, STATUS_CORRUPT. `bytes` is malloced, with a NUL behind it: storage_object_close. */
STATUS_CHECKED enum status storage_object_get(struct storage *storage, const char *id,
                                              struct storage_object *object);
void storage_object_close(struct storage_object *object);
/* Objects that nothing goes on from any more (their memory was deleted, is over or went back to
 * before them, or they never had one) and that were made more than `age_s` ago. Looks at `limit`
 * objects behind the one that `at` names ("": from the start), has room for as many in `ids`, and
 * leaves in `at` where to look next. Whoever knows that nobody uses one deletes it. */
STATUS_CHECKED enum status storage_object_left_over(struct storage *storage, int64_t age_s,
                                                    size_t limit, char at[LIMITS_ID_BYTES],
                                                    char (*ids)[LIMITS_ID_BYTES], size_t *count);
/* At most `limit` items of the list, in order or the newest first, behind the one named `after`
 * (NULL: from the start; STATUS_NOT_FOUND when it is not in the list); `*has_more`: there are
 * others. A list that does not exist is empty. Their bytes are malloced, with a NUL behind them:
 * storage_items_close. */
STATUS_CHECKED enum status storage_item_list(struct storage *storage, const char *owner,
                                             const char *after, bool newest_first, size_t limit,
                                             struct storage_item *items, size_t *count,
                                             bool *has_more);
STATUS_CHECKED enum status storage_item_get(struct storage *storage, const char *owner,
                                            const char *id, struct storage_item *item);
void storage_items_close(struct storage_item *items, size_t count);

struct storage_turn {
    uint64_t position, text_bytes;
    int64_t created_at;
    bool has_snapshot;
    char bookmark[LIMITS_BOOKMARK_BYTES]; /* "" for none */
};
/* The memory's turns at or before `from` (UINT64_MAX: all), newest first: at most `limit`;
 * `*has_more` says whether there are others. STATUS_NOT_FOUND, STATUS_CORRUPT. */
STATUS_CHECKED enum status storage_turn_list(struct storage *storage, const char *id,
                                             uint64_t from, size_t limit,
                                             struct storage_turn *turns, size_t *count,
                                             bool *has_more);
struct storage_range { /* the shape of the engine's chunk_range */
    uint64_t branch;
    uint64_t first;
};
/* Which branch holds which chunks, oldest first, the memory's own branch last. At most
 * LIMITS_LINEAGE; `ranges` is malloced for the caller. */
STATUS_CHECKED enum status storage_lineage(struct storage *storage, const char *id,
                                           struct storage_range **ranges, size_t *count);
/* The snapshot, malloced for the caller, and the position it stands at. STATUS_NOT_FOUND while the
 * memory is empty; STATUS_CORRUPT when its checksum is wrong. */
STATUS_CHECKED enum status storage_snapshot(struct storage *storage, const char *id,
                                            void **snapshot, size_t *size, uint64_t *position);

struct storage_read {
    uint64_t branch, index;
    void *kv; /* out: kv_bytes */
};
/* A batch of K/V reads in one transaction. STATUS_CORRUPT: one is missing or damaged. */
STATUS_CHECKED enum status storage_read_chunks(struct storage *storage,
                                               const struct storage_read *reads, size_t count);
STATUS_CHECKED enum status storage_read_landmarks(struct storage *storage, uint64_t branch,
                                                  uint64_t first, uint64_t count, void *out);
/* Tokens [from, from + count) of a memory's sequence, across its forks; all before the committed
 * position, else STATUS_INVALID. */
STATUS_CHECKED enum status storage_read_tokens(struct storage *storage, const char *id,
                                               uint64_t from, size_t count, int32_t *tokens);
/* The same, as they were committed: with STORAGE_TOKEN_MARK where it was set. */
STATUS_CHECKED enum status storage_read_marked(struct storage *storage, const char *id,
                                               uint64_t from, size_t count, int32_t *tokens);

struct storage_stats {
    uint64_t memories, map_used_bytes, map_bytes, queue_bytes, queue_items;
    uint64_t commits, chunks_written, chunks_read, bytes_read;
    uint64_t commit_ns; /* total time inside commits, for an average */
    uint64_t commit_ns_histogram[24]; /* bucket i: commits that took < 2^i * 64 us */
    uint64_t branches_to_collect;     /* deleted, not all of it freed yet */
};
void storage_get_stats(struct storage *storage, struct storage_stats *stats);

/* ---- prefixes: what requests that name no memory have said, kept to go on from ----
 * A memory whose id begins with STORAGE_PREFIX is one. It is like any other and in no list of
 * memories, and keeps the snapshots of its last LIMITS_PREFIX_SNAPSHOTS turns. */
#define STORAGE_PREFIX "prefix_"
bool storage_is_prefix(const char *id);
/* The ids of all of them, malloced for the caller. */
STATUS_CHECKED enum status storage_prefix_list(struct storage *storage,
                                               char (**ids)[LIMITS_ID_BYTES], size_t *count);

/* ---- moving: a memory as one file (proto/memory_file.h), piece by piece ----
 * On any thread but the writer's, one call at a time; the calls wait for the disk. Memory in use is
 * a few parts and one snapshot, whatever the length. */

struct storage_export;
/* The memory as it stands now; what becomes of it afterwards does not show in the file.
 * STATUS_NOT_FOUND, STATUS_DISK_FULL, STATUS_IO, STATUS_CORRUPT, STATUS_NO_MEMORY. */
STATUS_CHECKED enum status storage_export_open(struct storage *storage, const char *id,
                                               struct storage_export **out);
/* Appends the next part to `out`, at most about 1 MiB; `*done` with the last one. */
STATUS_CHECKED enum status storage_export_next(struct storage_export *file, struct buf *out,
                                               bool *done);
void storage_export_close(struct storage_export *file);

struct storage_import;
/* `vocabulary`: how many tokens the model knows. `snapshot_bytes`: of its largest snapshot, so that
 * no file has more memory taken for one. `tenant`: whose the memory will be, NULL: nobody's; copied.
 * STATUS_INVALID: one that is too long. STATUS_DISK_FULL, STATUS_IO, STATUS_NO_MEMORY. */
STATUS_CHECKED enum status storage_import_open(struct storage *storage, uint32_t vocabulary,
                                               size_t snapshot_bytes, const char *tenant,
                                               struct storage_import **out);
/* The file's next bytes, as they come. STATUS_MISMATCH (another model's), STATUS_CORRUPT (altered),
 * STATUS_UNSUPPORTED (a newer format) say in `err` which part; also STATUS_DISK_FULL, STATUS_IO,
 * STATUS_NO_MEMORY. After a failure only storage_import_close may follow. */
STATUS_CHECKED enum status storage_import_feed(struct storage_import *file, const void *data,
                                               size_t size, struct error *err);
/* The file is over: its memory is there under `id` from now on. STATUS_CORRUPT: it was cut.
 * STATUS_CONFLICT: there is an `id`. */
STATUS_CHECKED enum status storage_import_finish(struct storage_import *file, const char *id,
                                                 struct error *err);
/* Without a finish nothing is left of what was fed. */
void storage_import_close(struct storage_import *file);

/* ---- offline ---- */

struct storage_check_report {
    uint64_t memories, branches, chunks, tokens, turns, snapshots, bytes;
    uint64_t problems;
};
/* Verifies every record of the folder: checksums, no holes before committed positions, references,
 * nothing unreachable. Calls problem_cb (NULL: nobody) for each thing wrong. Not in a process that
 * has the folder open already; another process may, but its file grows while this reads.
 * STATUS_OK when it could be read, however many problems it found. STATUS_NOT_FOUND (no store),
 * STATUS_UNSUPPORTED, STATUS_CORRUPT (not even its first record), STATUS_IO, STATUS_NO_MEMORY. */
STATUS_CHECKED enum status storage_check(const char *path,
                                         void (*problem_cb)(void *context, const char *message),
                                         void *context, struct storage_check_report *report,
                                         struct error *err);

/* Makes a store whole that `check` finds wrong: each memory goes back to its last place whose
 * snapshot, chunks and tokens are whole, what nothing reaches is dropped, counts are taken anew.
 * Calls change_cb (NULL: nobody) for each thing it does, and does them, all in one transaction,
 * only when `carry_out`; else it only tells. No other process may have the folder open:
 * STATUS_CONFLICT. STATUS_CORRUPT: not even the first record is whole; STATUS_NOT_FOUND,
 * STATUS_UNSUPPORTED (an older format), STATUS_DISK_FULL, STATUS_IO, STATUS_NO_MEMORY. A failure
 * leaves the store as it was. */
STATUS_CHECKED enum status storage_repair(const char *path, bool carry_out,
                                          void (*change_cb)(void *context, const char *message),
                                          void *context, uint64_t *changes, struct error *err);

#endif
