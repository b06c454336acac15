/* fuzz_record.c - any bytes as a record of the store: decoding must not fault, and what it accepts
 * must encode to the same bytes again.
 *
 * Input: one byte of choice, one of key size, the key, the value. Random bytes never carry a right
 * checksum, so the low bit of the choice has the harness write it, and what lies behind the
 * checksum is reached. */
#include <stdlib.h>
#include <string.h>

#include "proto/base/assert.h"
#include "proto/base/buf.h"
#include "proto/base/hash.h"
#include "storage/record.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct input {
    const unsigned char *key;
    size_t key_size;
    unsigned char *value; /* a copy of its own, so that reading past its end is seen */
    size_t size;
};

static void same(const struct input *in, const struct buf *again)
{
    ASSERT(again->size == in->size && memcmp(again->data, in->value, in->size) == 0);
}

static void try_small(const struct input *in, enum record_kind kind)
{
    const void *key = in->key, *value = in->value;
    size_t key_size = in->key_size, size = in->size;
    struct record_meta meta;
    struct record_counter counter;
    struct record_memory memory;
    struct record_branch branch;
    struct record_snapshot snapshot;
    struct record_turn turn;
    struct buf again;
    buf_init(&again);
    if (kind == RECORD_META && !record_meta_decode(key, key_size, value, size, &meta))
        record_meta_encode(&again, key, key_size, &meta);
    if (kind == RECORD_COUNTER && !record_counter_decode(key, key_size, value, size, &counter))
        record_counter_encode(&again, key, key_size, &counter);
    if (kind == RECORD_MEMORY && !record_memory_decode(key, key_size, value, size, &memory))
        record_memory_encode(&again, key, key_size, &memory);
    if (kind == RECORD_BRANCH && !record_branch_decode(key, key_size, value, size, &branch))
        record_branch_encode(&again, key, key_size, &branch);
    if (kind == RECORD_SNAPSHOT && !record_snapshot_decode(key, key_size, value, size, &snapshot))
        record_snapshot_encode(&again, key, key_size, &snapshot);
    struct record_receipt receipt;
    if (kind == RECORD_RECEIPT && !record_receipt_decode(key, key_size, value, size, &receipt))
        record_receipt_encode(&again, key, key_size, &receipt);
    struct record_object object;
    if (kind == RECORD_OBJECT && !record_object_decode(key, key_size, value, size, &object))
        record_object_encode(&again, key, key_size, &object);
    struct record_item item;
    if (kind == RECORD_ITEM && !record_item_decode(key, key_size, value, size, &item))
        record_item_encode(&again, key, key_size, &item);
    if (kind == RECORD_TURN && !record_turn_decode(key, key_size, value, size, &turn))
        record_turn_encode(&again, key, key_size, &turn);
    if (again.size > 0)
        same(in, &again);
    buf_close(&again);
}

static void try_piece(const struct input *in)
{
    const void *bytes;
    if (record_piece_decode(in->key, in->key_size, in->value, in->size, &bytes))
        return;
    unsigned char *again = malloc(in->size);
    ASSERT(again);
    record_piece_encode(again, in->key, in->key_size, bytes, in->size - RECORD_PIECE_HEADER_BYTES);
    ASSERT(memcmp(again, in->value, in->size) == 0);
    free(again);
}

static uint32_t read_u32(const unsigned char *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* Cuts or fills the value to the size that its header asks for, and seals it. */
static void seal_run(struct input *in, enum record_kind kind)
{
    if (in->key_size != RECORD_PAIR_KEY_BYTES || in->size < RECORD_RUN_HEADER_BYTES)
        return;
    struct record_run run = {.kind = kind,
                             .branch = record_key_read(in->key),
                             .first = record_key_read(in->key + 8),
                             .count = read_u32(in->value + 4) % 300 + 1,
                             .item_bytes = read_u32(in->value + 8) % 300 + 1,
                             .group = read_u32(in->value + 12) % 300 + 1};
    size_t want = record_run_bytes(run.count, run.item_bytes, run.group);
    unsigned char *value = calloc(1, want);
    ASSERT(value);
    memcpy(value, in->value, in->size < want ? in->size : want);
    free(in->value);
    in->value = value;
    in->size = want;
    record_run_seal(value, &run);
}

static void try_run(struct input *in, enum record_kind kind, bool sealed)
{
    struct record_run run;
    if (record_run_decode(kind, in->key, in->key_size, in->value, in->size, &run))
        return;
    bool intact = record_run_all_intact(&run);
    for (uint32_t i = 0; i < run.count; i++)
        if (intact)
            ASSERT(record_run_intact(&run, i));
    if (sealed)
        ASSERT(intact);
    if (!intact)
        return;
    unsigned char *again = malloc(in->size);
    ASSERT(again);
    memcpy(again, in->value, in->size);
    memset(again, 0xff, RECORD_RUN_HEADER_BYTES); /* sealing must write every byte of it */
    record_run_seal(again, &run);
    ASSERT(memcmp(again, in->value, in->size) == 0);
    /* A flipped bit of an item is noticed by the group that holds it, and by no other. */
    if (sealed) {
        uint32_t hurt = run.count / 2;
        memcpy(again, in->value, in->size);
        record_run_item(again, &run, hurt)[run.item_bytes / 2] ^= 1;
        ASSERT(!record_run_decode(kind, in->key, in->key_size, again, in->size, &run));
        for (uint32_t i = 0; i < run.count; i++)
            ASSERT(record_run_intact(&run, i) == (i / run.group != hurt / run.group));
    }
    free(again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2 || data[1] % 64 > size - 2)
        return 0;
    bool sealed = data[0] & 1;
    enum record_kind kind = (enum record_kind)((data[0] >> 1) % RECORD_ITEM + 1);
    struct input in = {.key_size = data[1] % 64, .key = data + 2};
    in.size = size - 2 - in.key_size;
    in.value = malloc(in.size + 1);
    ASSERT(in.value);
    memcpy(in.value, data + 2 + in.key_size, in.size);
    bool is_run = kind == RECORD_KV || kind == RECORD_LANDMARK || kind == RECORD_TOKEN;
    if (sealed && is_run) {
        seal_run(&in, kind);
    } else if (sealed && kind == RECORD_PIECE && in.size >= RECORD_PIECE_HEADER_BYTES) {
        unsigned char *whole = malloc(in.size);
        ASSERT(whole);
        record_piece_encode(whole, in.key, in.key_size, in.value + RECORD_PIECE_HEADER_BYTES,
                            in.size - RECORD_PIECE_HEADER_BYTES);
        free(in.value);
        in.value = whole;
    } else if (sealed && in.size >= 12) {
        in.value[0] = (unsigned char)kind;
        in.value[1] = 1;
        in.value[2] = in.value[3] = 0;
        uint64_t sum = hash64(in.value, in.size - 8, hash64(in.key, in.key_size, in.key_size));
        for (int i = 0; i < 8; i++)
            in.value[in.size - 8 + (size_t)i] = (unsigned char)(sum >> (8 * i));
    }
    if (is_run)
        try_run(&in, kind,
                sealed && in.key_size == RECORD_PAIR_KEY_BYTES &&
                    in.size >= RECORD_RUN_HEADER_BYTES);
    else if (kind == RECORD_PIECE)
        try_piece(&in);
    else
        try_small(&in, kind);
    free(in.value);
    return 0;
}
