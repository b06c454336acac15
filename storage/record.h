/* record.h - the bytes of every record on disk: keys, headers, checksums; encode and decode.
 * Thread: any (pure functions). Owns nothing; decoded views borrow the bytes they came from.
 * Decoding trusts nothing: every size is checked before it is used, every byte is under a checksum. */
#ifndef STORAGE_RECORD_H
#define STORAGE_RECORD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/base/buf.h"
#include "proto/limits.h"
#include "proto/status.h"

/* Format of the folder. A reader refuses a higher one; a change of any layout below raises it. */
/* 1 knew no turns, 2 no tenants, 3 no receipts, 4 no objects and items, 5 no ends of memories and
 * no tenants of branches, 6 no marks on tokens; all are migrated. */
#define RECORD_FORMAT 7

enum record_kind {
    RECORD_KV = 1,
    RECORD_LANDMARK,
    RECORD_TOKEN,
    RECORD_META,
    RECORD_COUNTER,
    RECORD_MEMORY,
    RECORD_BRANCH,
    RECORD_SNAPSHOT,
    RECORD_PIECE,
    RECORD_TURN,
    RECORD_RECEIPT,
    RECORD_OBJECT,
    RECORD_ITEM
};

/* All integers in values are little-endian. Integers in keys are big-endian, so that LMDB's order
 * of bytes is the order of numbers. */
#define RECORD_PAIR_KEY_BYTES 16
void record_key(unsigned char key[8], uint64_t a);
void record_pair_key(unsigned char key[RECORD_PAIR_KEY_BYTES], uint64_t a, uint64_t b);
uint64_t record_key_read(const unsigned char key[8]);

/* ---- runs: consecutive items of one branch in one record ----
 * Key: branch, index of the first item. Value:
 *   u8 kind, u8 version, u16 zero, u32 count, u32 item_bytes, u32 group
 *   u64 checksum of key, the fields above and the checksums below
 *   u64 checksums[ceil(count / group)], each of `group` items, seeded with kind, branch, index
 *   items[count][item_bytes]
 * A chunk is a group of its own, so that reading one touches only its pages; tokens are too small
 * for that and share one checksum a run. */
#define RECORD_RUN_HEADER_BYTES 24
#define RECORD_RUN_ITEMS 65536 /* most items of a run: keeps every product of sizes small */

struct record_run {
    enum record_kind kind;
    uint64_t branch, first;
    uint32_t count, item_bytes, group;
    const unsigned char *checksums; /* borrowed */
    const unsigned char *items;     /* borrowed */
};

/* Bytes of the value. count, item_bytes and group are at least 1. */
size_t record_run_bytes(uint32_t count, uint32_t item_bytes, uint32_t group);
/* Where item `index` (counted from the run's first) belongs inside `value`. */
unsigned char *record_run_item(void *value, const struct record_run *run, uint32_t index);
/* Writes header and checksums of a value whose items are in place already. run->checksums and
 * run->items are ignored. */
void record_run_seal(void *value, const struct record_run *run);
/* STATUS_CORRUPT unless key, sizes and the header's checksum are right. Does not read the items. */
STATUS_CHECKED enum status record_run_decode(enum record_kind kind, const void *key,
                                             size_t key_size, const void *value, size_t size,
                                             struct record_run *run);
/* Whether the group that holds item `index` (counted from the run's first) is as it was written. */
bool record_run_intact(const struct record_run *run, uint32_t index);
/* Whether all items are. */
bool record_run_all_intact(const struct record_run *run);

/* ---- small records: u8 kind, u8 version, u16 zero, fields, u64 checksum seeded with the key ---- */

struct record_meta {
    uint32_t format;
    uint32_t chunk_tokens;
    uint64_t kv_bytes, landmark_bytes, fingerprint;
    char model_name[128];
};

struct record_counter { /* the next names to give; names are never used twice */
    uint64_t branch, snapshot;
};

#define RECORD_METADATA_BYTES ((size_t)128 << 10) /* 16 pairs of 576 characters, all escaped */

struct record_memory {
    uint64_t branch;
    uint64_t position; /* committed, in tokens */
    uint64_t text_bytes;
    uint64_t snapshot; /* 0: none yet */
    int64_t created_at;
    bool ephemeral;
    /* Over so many seconds after it was made, or last used; 0: never, and none of it in the record.
     */
    int64_t expires_s, active_at;
    bool expires_from_use;
    char parent[LIMITS_ID_BYTES];
    char tenant[LIMITS_ID_BYTES]; /* whose it is; "": nobody's, and not in the record */
    const char *metadata; /* not terminated; decoded: borrowed from the value */
    size_t metadata_size;
};

struct record_branch {
    uint64_t parent;        /* 0: none */
    uint64_t fork_position; /* where it leaves its parent, in tokens */
    uint64_t chunk_end;     /* chunks [fork_position / S, chunk_end) are here */
    uint64_t token_end;     /* tokens [fork_position, token_end) are here */
    uint64_t bytes;         /* disk space of its runs and of the snapshots its turns name */
    uint32_t depth;         /* number of branches above it */
    char owner[LIMITS_ID_BYTES]; /* the memory that writes it; "" once that is deleted */
    char tenant[LIMITS_ID_BYTES]; /* whose disk space it is; "": nobody's, and not in the record */
};

struct record_snapshot {
    uint64_t references; /* memories that stand at it, and its turn */
    uint64_t branch, position;
    uint64_t size;
    uint32_t piece_bytes; /* size of all pieces but the last */
};

/* What a committed turn left. Key: branch, position, as a run's. */
struct record_turn {
    uint64_t snapshot; /* 0: dropped */
    uint64_t text_bytes;
    int64_t created_at;
    char bookmark[LIMITS_BOOKMARK_BYTES]; /* "" for none */
};

/* What was answered to a write. Key: its name. */
struct record_receipt {
    int64_t created_at;
    const unsigned char *bytes; /* decoded: borrowed from the value */
    size_t size;
};

/* What a caller keeps by a name. Key: its id. */
struct record_object {
    int64_t created_at;
    uint64_t branch, position; /* of the turn it belongs to; branch 0: of none */
    bool made_memory;          /* that memory is there for such objects alone */
    char memory[LIMITS_ID_BYTES];
    char tenant[LIMITS_ID_BYTES];
    const unsigned char *bytes; /* decoded: borrowed from the value */
    size_t size;
};

/* An entry of a list. Key: the id of whose list it is, a NUL, its number (8 bytes). */
#define RECORD_ITEM_KEY_BYTES (LIMITS_ID_BYTES + 8)
struct record_item {
    uint64_t position; /* of the memory whose list it is, behind the item; 0: it has none */
    char id[LIMITS_ID_BYTES];
    const unsigned char *bytes; /* decoded: borrowed from the value */
    size_t size;
};
/* Returns the size of the key. */
size_t record_item_key(unsigned char key[RECORD_ITEM_KEY_BYTES], const char *owner,
                       uint64_t number);

void record_meta_encode(struct buf *out, const void *key, size_t key_size,
                        const struct record_meta *meta);
STATUS_CHECKED enum status record_meta_decode(const void *key, size_t key_size, const void *value,
                                              size_t size, struct record_meta *meta);
void record_counter_encode(struct buf *out, const void *key, size_t key_size,
                           const struct record_counter *counter);
STATUS_CHECKED enum status record_counter_decode(const void *key, size_t key_size,
                                                 const void *value, size_t size,
                                                 struct record_counter *counter);
void record_memory_encode(struct buf *out, const void *key, size_t key_size,
                          const struct record_memory *memory);
STATUS_CHECKED enum status record_memory_decode(const void *key, size_t key_size,
                                                const void *value, size_t size,
                                                struct record_memory *memory);
void record_branch_encode(struct buf *out, const void *key, size_t key_size,
                          const struct record_branch *branch);
STATUS_CHECKED enum status record_branch_decode(const void *key, size_t key_size,
                                                const void *value, size_t size,
                                                struct record_branch *branch);
void record_snapshot_encode(struct buf *out, const void *key, size_t key_size,
                            const struct record_snapshot *snapshot);
STATUS_CHECKED enum status record_snapshot_decode(const void *key, size_t key_size,
                                                  const void *value, size_t size,
                                                  struct record_snapshot *snapshot);
void record_turn_encode(struct buf *out, const void *key, size_t key_size,
                        const struct record_turn *turn);
STATUS_CHECKED enum status record_turn_decode(const void *key, size_t key_size, const void *value,
                                              size_t size, struct record_turn *turn);

void record_receipt_encode(struct buf *out, const void *key, size_t key_size,
                           const struct record_receipt *receipt);
STATUS_CHECKED enum status record_receipt_decode(const void *key, size_t key_size,
                                                 const void *value, size_t size,
                                                 struct record_receipt *receipt);

void record_object_encode(struct buf *out, const void *key, size_t key_size,
                          const struct record_object *object);
STATUS_CHECKED enum status record_object_decode(const void *key, size_t key_size,
                                                const void *value, size_t size,
                                                struct record_object *object);
/* Whose the object is, by the beginning of its record alone: what follows is not read, and nothing
 * compared with the checksum. */
STATUS_CHECKED enum status record_object_tenant(const void *value, size_t size,
                                                char tenant[LIMITS_ID_BYTES]);
void record_item_encode(struct buf *out, const void *key, size_t key_size,
                        const struct record_item *item);
STATUS_CHECKED enum status record_item_decode(const void *key, size_t key_size, const void *value,
                                              size_t size, struct record_item *item);

/* ---- pieces: the bytes of a snapshot, behind the same small header and a checksum ----
 * Key: snapshot (8 bytes), number from 1 (4 bytes); number 0 is the record_snapshot. */
#define RECORD_PIECE_KEY_BYTES 12
#define RECORD_PIECE_HEADER_BYTES 12
void record_piece_key(unsigned char key[RECORD_PIECE_KEY_BYTES], uint64_t snapshot,
                      uint32_t number);
/* Writes header and bytes to `out`, RECORD_PIECE_HEADER_BYTES + size long. */
void record_piece_encode(void *out, const void *key, size_t key_size, const void *bytes,
                         size_t size);
/* `*bytes` borrows from value and holds size - RECORD_PIECE_HEADER_BYTES bytes. */
STATUS_CHECKED enum status record_piece_decode(const void *key, size_t key_size, const void *value,
                                               size_t size, const void **bytes);

#endif
