#include "storage/record.h"

#include <string.h>

#include "proto/base/assert.h"
#include "proto/base/hash.h"

#define VERSION 1
#define MEMORY_EPHEMERAL 1u /* flags of a memory */
#define MEMORY_TENANT 2u
#define MEMORY_EXPIRES 4u
#define MEMORY_EXPIRES_FROM_USE 8u
#define MEMORY_FLAGS 15u
#define SMALL_HEADER_BYTES 4
#define CHECKSUM_BYTES 8

/* ---- integers ---- */

static void write_u32(unsigned char *p, uint32_t x)
{
    for (int i = 0; i < 4; i++)
        p[i] = (unsigned char)(x >> (8 * i));
}

static void write_u64(unsigned char *p, uint64_t x)
{
    for (int i = 0; i < 8; i++)
        p[i] = (unsigned char)(x >> (8 * i));
}

static uint32_t read_u32(const unsigned char *p)
{
    uint32_t x = 0;
    for (int i = 0; i < 4; i++)
        x |= (uint32_t)p[i] << (8 * i);
    return x;
}

static uint64_t read_u64(const unsigned char *p)
{
    return read_u32(p) | (uint64_t)read_u32(p + 4) << 32;
}

void record_key(unsigned char key[8], uint64_t a)
{
    for (int i = 0; i < 8; i++)
        key[i] = (unsigned char)(a >> (56 - 8 * i));
}

void record_pair_key(unsigned char key[RECORD_PAIR_KEY_BYTES], uint64_t a, uint64_t b)
{
    record_key(key, a);
    record_key(key + 8, b);
}

uint64_t record_key_read(const unsigned char key[8])
{
    uint64_t x = 0;
    for (int i = 0; i < 8; i++)
        x = x << 8 | key[i];
    return x;
}

void record_piece_key(unsigned char key[RECORD_PIECE_KEY_BYTES], uint64_t snapshot, uint32_t number)
{
    record_key(key, snapshot);
    for (int i = 0; i < 4; i++)
        key[8 + i] = (unsigned char)(number >> (24 - 8 * i));
}

/* ---- runs ---- */

static uint32_t group_count(const struct record_run *run)
{
    return (run->count - 1) / run->group + 1;
}

/* The seed says what the bytes are and where they belong: bytes of another place never match. */
static uint64_t group_checksum(const struct record_run *run, const unsigned char *items,
                               uint32_t group_index)
{
    unsigned char place[24];
    uint64_t from = (uint64_t)group_index * run->group;
    uint64_t end = from + run->group < run->count ? from + run->group : run->count;
    write_u64(place, (uint64_t)run->kind);
    write_u64(place + 8, run->branch);
    write_u64(place + 16, run->first + from);
    return hash64(items + from * run->item_bytes, (size_t)((end - from) * run->item_bytes),
                  hash64(place, sizeof place, (uint64_t)run->item_bytes));
}

static uint64_t run_checksum(const struct record_run *run, const unsigned char *value)
{
    unsigned char key[RECORD_PAIR_KEY_BYTES];
    record_pair_key(key, run->branch, run->first);
    uint64_t seed = hash64(value, 16, hash64(key, sizeof key, 0));
    return hash64(value + RECORD_RUN_HEADER_BYTES, (size_t)group_count(run) * CHECKSUM_BYTES, seed);
}

size_t record_run_bytes(uint32_t count, uint32_t item_bytes, uint32_t group)
{
    ASSERT(count > 0 && count <= RECORD_RUN_ITEMS && item_bytes > 0 && group > 0);
    return RECORD_RUN_HEADER_BYTES + (size_t)((count - 1) / group + 1) * CHECKSUM_BYTES +
           (size_t)count * item_bytes;
}

unsigned char *record_run_item(void *value, const struct record_run *run, uint32_t index)
{
    return (unsigned char *)value + RECORD_RUN_HEADER_BYTES +
           (size_t)group_count(run) * CHECKSUM_BYTES + (size_t)index * run->item_bytes;
}

void record_run_seal(void *value, const struct record_run *run)
{
    unsigned char *p = value;
    memset(p, 0, RECORD_RUN_HEADER_BYTES);
    p[0] = (unsigned char)run->kind;
    p[1] = VERSION;
    write_u32(p + 4, run->count);
    write_u32(p + 8, run->item_bytes);
    write_u32(p + 12, run->group);
    const unsigned char *items = record_run_item(value, run, 0);
    for (uint32_t g = 0; g < group_count(run); g++)
        write_u64(p + RECORD_RUN_HEADER_BYTES + (size_t)g * CHECKSUM_BYTES,
                  group_checksum(run, items, g));
    write_u64(p + 16, run_checksum(run, p));
}

enum status record_run_decode(enum record_kind kind, const void *key, size_t key_size,
                              const void *value, size_t size, struct record_run *run)
{
    const unsigned char *k = key, *p = value;
    if (key_size != RECORD_PAIR_KEY_BYTES || size < RECORD_RUN_HEADER_BYTES)
        return STATUS_CORRUPT;
    if (p[0] != (unsigned char)kind || p[1] != VERSION || p[2] || p[3])
        return STATUS_CORRUPT;
    run->kind = kind;
    run->branch = record_key_read(k);
    run->first = record_key_read(k + 8);
    run->count = read_u32(p + 4);
    run->item_bytes = read_u32(p + 8);
    run->group = read_u32(p + 12);
    if (run->count == 0 || run->count > RECORD_RUN_ITEMS || run->item_bytes == 0 ||
        run->group == 0 || run->first > UINT64_MAX - run->count)
        return STATUS_CORRUPT;
    if (size != record_run_bytes(run->count, run->item_bytes, run->group))
        return STATUS_CORRUPT;
    if (read_u64(p + 16) != run_checksum(run, p))
        return STATUS_CORRUPT;
    run->checksums = p + RECORD_RUN_HEADER_BYTES;
    run->items = run->checksums + (size_t)group_count(run) * CHECKSUM_BYTES;
    return STATUS_OK;
}

bool record_run_intact(const struct record_run *run, uint32_t index)
{
    ASSERT(index < run->count);
    uint32_t g = index / run->group;
    return group_checksum(run, run->items, g) ==
           read_u64(run->checksums + (size_t)g * CHECKSUM_BYTES);
}

bool record_run_all_intact(const struct record_run *run)
{
    for (uint64_t i = 0; i < run->count; i += run->group)
        if (!record_run_intact(run, (uint32_t)i))
            return false;
    return true;
}

/* ---- small records ---- */

static uint64_t small_checksum(const void *key, size_t key_size, const void *bytes, size_t size)
{
    return hash64(bytes, size, hash64(key, key_size, key_size));
}

static void put_u32(struct buf *out, uint32_t x)
{
    unsigned char bytes[4];
    write_u32(bytes, x);
    buf_append(out, bytes, sizeof bytes);
}

static void put_u64(struct buf *out, uint64_t x)
{
    unsigned char bytes[8];
    write_u64(bytes, x);
    buf_append(out, bytes, sizeof bytes);
}

/* Text in a field of fixed width; what follows the terminating NUL is zero. */
static void put_text(struct buf *out, const char *text, size_t width)
{
    size_t length = strlen(text);
    ASSERT(length < width);
    buf_append(out, text, length);
    buf_reserve(out, width - length);
    memset(out->data + out->size, 0, width - length);
    out->size += width - length;
}

static void small_begin(struct buf *out, enum record_kind kind)
{
    const unsigned char header[SMALL_HEADER_BYTES] = {(unsigned char)kind, VERSION, 0, 0};
    out->size = 0;
    buf_append(out, header, sizeof header);
}

static void small_end(struct buf *out, const void *key, size_t key_size)
{
    put_u64(out, small_checksum(key, key_size, out->data, out->size));
}

/* A reader that remembers that it ran over, so that a decoder checks once, at its end. */
struct cursor {
    const unsigned char *at, *end;
    bool bad;
};

static enum status small_open(struct cursor *in, enum record_kind kind, const void *key,
                              size_t key_size, const void *value, size_t size)
{
    const unsigned char *p = value;
    if (size < SMALL_HEADER_BYTES + CHECKSUM_BYTES)
        return STATUS_CORRUPT;
    if (p[0] != (unsigned char)kind || p[1] != VERSION || p[2] || p[3])
        return STATUS_CORRUPT;
    if (read_u64(p + size - CHECKSUM_BYTES) !=
        small_checksum(key, key_size, p, size - CHECKSUM_BYTES))
        return STATUS_CORRUPT;
    in->at = p + SMALL_HEADER_BYTES;
    in->end = p + size - CHECKSUM_BYTES;
    in->bad = false;
    return STATUS_OK;
}

static const unsigned char *take(struct cursor *in, size_t size)
{
    if (in->bad || (size_t)(in->end - in->at) < size) {
        in->bad = true;
        return NULL;
    }
    in->at += size;
    return in->at - size;
}

static uint32_t take_u32(struct cursor *in)
{
    const unsigned char *p = take(in, 4);
    return p ? read_u32(p) : 0;
}

static uint64_t take_u64(struct cursor *in)
{
    const unsigned char *p = take(in, 8);
    return p ? read_u64(p) : 0;
}

static void take_text(struct cursor *in, char *out, size_t width)
{
    const unsigned char *p = take(in, width);
    out[0] = 0;
    if (!p)
        return;
    size_t length = strnlen((const char *)p, width);
    /* One text has one encoding: at least one NUL, and nothing but NULs behind it. */
    for (size_t i = length; i < width; i++)
        in->bad |= p[i] != 0;
    if (length == width)
        in->bad = true;
    else
        memcpy(out, p, width);
}

static enum status small_close(const struct cursor *in)
{
    return in->bad || in->at != in->end ? STATUS_CORRUPT : STATUS_OK;
}

void record_meta_encode(struct buf *out, const void *key, size_t key_size,
                        const struct record_meta *meta)
{
    small_begin(out, RECORD_META);
    put_u32(out, meta->format);
    put_u32(out, meta->chunk_tokens);
    put_u64(out, meta->kv_bytes);
    put_u64(out, meta->landmark_bytes);
    put_u64(out, meta->fingerprint);
    put_text(out, meta->model_name, sizeof meta->model_name);
    small_end(out, key, key_size);
}

enum status record_meta_decode(const void *key, size_t key_size, const void *value, size_t size,
                               struct record_meta *meta)
{
    struct cursor in;
    if (small_open(&in, RECORD_META, key, key_size, value, size))
        return STATUS_CORRUPT;
    meta->format = take_u32(&in);
    if (in.bad)
        return STATUS_CORRUPT;
    /* A newer format may hold more than we know; its number alone says to refuse. */
    if (meta->format > RECORD_FORMAT)
        return STATUS_UNSUPPORTED;
    meta->chunk_tokens = take_u32(&in);
    meta->kv_bytes = take_u64(&in);
    meta->landmark_bytes = take_u64(&in);
    meta->fingerprint = take_u64(&in);
    take_text(&in, meta->model_name, sizeof meta->model_name);
    return small_close(&in);
}

void record_counter_encode(struct buf *out, const void *key, size_t key_size,
                           const struct record_counter *counter)
{
    small_begin(out, RECORD_COUNTER);
    put_u64(out, counter->branch);
    put_u64(out, counter->snapshot);
    small_end(out, key, key_size);
}

enum status record_counter_decode(const void *key, size_t key_size, const void *value, size_t size,
                                  struct record_counter *counter)
{
    struct cursor in;
    if (small_open(&in, RECORD_COUNTER, key, key_size, value, size))
        return STATUS_CORRUPT;
    counter->branch = take_u64(&in);
    counter->snapshot = take_u64(&in);
    return small_close(&in);
}

void record_memory_encode(struct buf *out, const void *key, size_t key_size,
                          const struct record_memory *memory)
{
    ASSERT(memory->metadata_size <= RECORD_METADATA_BYTES);
    small_begin(out, RECORD_MEMORY);
    put_u64(out, memory->branch);
    put_u64(out, memory->position);
    put_u64(out, memory->text_bytes);
    put_u64(out, memory->snapshot);
    put_u64(out, (uint64_t)memory->created_at);
    put_u32(out, (memory->ephemeral ? MEMORY_EPHEMERAL : 0) |
                     (memory->tenant[0] ? MEMORY_TENANT : 0) |
                     (memory->expires_s ? MEMORY_EXPIRES : 0) |
                     (memory->expires_s && memory->expires_from_use ? MEMORY_EXPIRES_FROM_USE : 0));
    if (memory->expires_s) {
        put_u64(out, (uint64_t)memory->expires_s);
        put_u64(out, (uint64_t)memory->active_at);
    }
    put_text(out, memory->parent, sizeof memory->parent);
    if (memory->tenant[0])
        put_text(out, memory->tenant, sizeof memory->tenant);
    put_u32(out, (uint32_t)memory->metadata_size);
    buf_append(out, memory->metadata, memory->metadata_size);
    small_end(out, key, key_size);
}

enum status record_memory_decode(const void *key, size_t key_size, const void *value, size_t size,
                                 struct record_memory *memory)
{
    struct cursor in;
    if (key_size == 0 || key_size >= LIMITS_ID_BYTES ||
        small_open(&in, RECORD_MEMORY, key, key_size, value, size))
        return STATUS_CORRUPT;
    memory->branch = take_u64(&in);
    memory->position = take_u64(&in);
    memory->text_bytes = take_u64(&in);
    memory->snapshot = take_u64(&in);
    memory->created_at = (int64_t)take_u64(&in);
    uint32_t flags = take_u32(&in);
    memory->ephemeral = (flags & MEMORY_EPHEMERAL) != 0;
    memory->expires_from_use = (flags & MEMORY_EXPIRES_FROM_USE) != 0;
    memory->expires_s = memory->active_at = 0;
    if (flags & MEMORY_EXPIRES) {
        memory->expires_s = (int64_t)take_u64(&in);
        memory->active_at = (int64_t)take_u64(&in);
        in.bad |= memory->expires_s <= 0;
    } else {
        in.bad |= memory->expires_from_use;
    }
    take_text(&in, memory->parent, sizeof memory->parent);
    memory->tenant[0] = 0;
    if (flags & MEMORY_TENANT) {
        take_text(&in, memory->tenant, sizeof memory->tenant);
        in.bad |= !memory->tenant[0];
    }
    memory->metadata_size = take_u32(&in);
    memory->metadata = (const char *)take(&in, memory->metadata_size);
    if (flags > MEMORY_FLAGS || memory->metadata_size > RECORD_METADATA_BYTES)
        return STATUS_CORRUPT;
    return small_close(&in);
}

void record_branch_encode(struct buf *out, const void *key, size_t key_size,
                          const struct record_branch *branch)
{
    small_begin(out, RECORD_BRANCH);
    put_u64(out, branch->parent);
    put_u64(out, branch->fork_position);
    put_u64(out, branch->chunk_end);
    put_u64(out, branch->token_end);
    put_u64(out, branch->bytes);
    put_u32(out, branch->depth);
    put_text(out, branch->owner, sizeof branch->owner);
    if (branch->tenant[0])
        put_text(out, branch->tenant, sizeof branch->tenant);
    small_end(out, key, key_size);
}

enum status record_branch_decode(const void *key, size_t key_size, const void *value, size_t size,
                                 struct record_branch *branch)
{
    struct cursor in;
    if (key_size != 8 || small_open(&in, RECORD_BRANCH, key, key_size, value, size))
        return STATUS_CORRUPT;
    branch->parent = take_u64(&in);
    branch->fork_position = take_u64(&in);
    branch->chunk_end = take_u64(&in);
    branch->token_end = take_u64(&in);
    branch->bytes = take_u64(&in);
    branch->depth = take_u32(&in);
    take_text(&in, branch->owner, sizeof branch->owner);
    branch->tenant[0] = 0;
    if (in.at != in.end) {
        take_text(&in, branch->tenant, sizeof branch->tenant);
        in.bad |= !branch->tenant[0];
    }
    return small_close(&in);
}

void record_snapshot_encode(struct buf *out, const void *key, size_t key_size,
                            const struct record_snapshot *snapshot)
{
    small_begin(out, RECORD_SNAPSHOT);
    put_u64(out, snapshot->references);
    put_u64(out, snapshot->branch);
    put_u64(out, snapshot->position);
    put_u64(out, snapshot->size);
    put_u32(out, snapshot->piece_bytes);
    small_end(out, key, key_size);
}

enum status record_snapshot_decode(const void *key, size_t key_size, const void *value, size_t size,
                                   struct record_snapshot *snapshot)
{
    struct cursor in;
    if (key_size != RECORD_PIECE_KEY_BYTES ||
        small_open(&in, RECORD_SNAPSHOT, key, key_size, value, size))
        return STATUS_CORRUPT;
    snapshot->references = take_u64(&in);
    snapshot->branch = take_u64(&in);
    snapshot->position = take_u64(&in);
    snapshot->size = take_u64(&in);
    snapshot->piece_bytes = take_u32(&in);
    if (snapshot->piece_bytes == 0 || snapshot->size == 0)
        return STATUS_CORRUPT;
    return small_close(&in);
}

void record_turn_encode(struct buf *out, const void *key, size_t key_size,
                        const struct record_turn *turn)
{
    small_begin(out, RECORD_TURN);
    put_u64(out, turn->snapshot);
    put_u64(out, turn->text_bytes);
    put_u64(out, (uint64_t)turn->created_at);
    put_text(out, turn->bookmark, sizeof turn->bookmark);
    small_end(out, key, key_size);
}

enum status record_turn_decode(const void *key, size_t key_size, const void *value, size_t size,
                               struct record_turn *turn)
{
    struct cursor in;
    if (key_size != RECORD_PAIR_KEY_BYTES ||
        small_open(&in, RECORD_TURN, key, key_size, value, size))
        return STATUS_CORRUPT;
    turn->snapshot = take_u64(&in);
    turn->text_bytes = take_u64(&in);
    turn->created_at = (int64_t)take_u64(&in);
    take_text(&in, turn->bookmark, sizeof turn->bookmark);
    return small_close(&in);
}

void record_receipt_encode(struct buf *out, const void *key, size_t key_size,
                           const struct record_receipt *receipt)
{
    small_begin(out, RECORD_RECEIPT);
    put_u64(out, (uint64_t)receipt->created_at);
    put_u32(out, (uint32_t)receipt->size);
    buf_append(out, receipt->bytes, receipt->size);
    small_end(out, key, key_size);
}

enum status record_receipt_decode(const void *key, size_t key_size, const void *value, size_t size,
                                  struct record_receipt *receipt)
{
    struct cursor in;
    if (key_size != LIMITS_RECEIPT_NAME_BYTES ||
        small_open(&in, RECORD_RECEIPT, key, key_size, value, size))
        return STATUS_CORRUPT;
    receipt->created_at = (int64_t)take_u64(&in);
    receipt->size = take_u32(&in);
    receipt->bytes = take(&in, receipt->size);
    return small_close(&in);
}

void record_object_encode(struct buf *out, const void *key, size_t key_size,
                          const struct record_object *object)
{
    small_begin(out, RECORD_OBJECT);
    put_u64(out, (uint64_t)object->created_at);
    put_u64(out, object->branch);
    put_u64(out, object->position);
    put_u32(out, object->made_memory);
    put_text(out, object->memory, sizeof object->memory);
    put_text(out, object->tenant, sizeof object->tenant);
    put_u32(out, (uint32_t)object->size);
    buf_append(out, object->bytes, object->size);
    small_end(out, key, key_size);
}

/* What stands before its bytes. Returns what the record says of made_memory. */
static uint32_t take_object_head(struct cursor *in, struct record_object *object)
{
    object->created_at = (int64_t)take_u64(in);
    object->branch = take_u64(in);
    object->position = take_u64(in);
    const uint32_t made = take_u32(in);
    object->made_memory = made != 0;
    take_text(in, object->memory, sizeof object->memory);
    take_text(in, object->tenant, sizeof object->tenant);
    return made;
}

enum status record_object_decode(const void *key, size_t key_size, const void *value, size_t size,
                                 struct record_object *object)
{
    struct cursor in;
    if (key_size == 0 || key_size >= LIMITS_ID_BYTES ||
        small_open(&in, RECORD_OBJECT, key, key_size, value, size))
        return STATUS_CORRUPT;
    const uint32_t made = take_object_head(&in, object);
    object->size = take_u32(&in);
    object->bytes = take(&in, object->size);
    if (made > 1 || (object->branch && !object->memory[0]))
        return STATUS_CORRUPT;
    return small_close(&in);
}

enum status record_object_tenant(const void *value, size_t size, char tenant[LIMITS_ID_BYTES])
{
    const unsigned char *p = value;
    struct record_object object;
    struct cursor in = {.at = p + SMALL_HEADER_BYTES, .end = p + size};
    if (size < SMALL_HEADER_BYTES || p[0] != RECORD_OBJECT || p[1] != VERSION)
        return STATUS_CORRUPT;
    (void)take_object_head(&in, &object);
    if (in.bad)
        return STATUS_CORRUPT;
    memcpy(tenant, object.tenant, sizeof object.tenant);
    return STATUS_OK;
}

size_t record_item_key(unsigned char key[RECORD_ITEM_KEY_BYTES], const char *owner, uint64_t number)
{
    const size_t size = strlen(owner) + 1;
    memcpy(key, owner, size);
    record_key(key + size, number);
    return size + 8;
}

void record_item_encode(struct buf *out, const void *key, size_t key_size,
                        const struct record_item *item)
{
    small_begin(out, RECORD_ITEM);
    put_u64(out, item->position);
    put_text(out, item->id, sizeof item->id);
    put_u32(out, (uint32_t)item->size);
    buf_append(out, item->bytes, item->size);
    small_end(out, key, key_size);
}

enum status record_item_decode(const void *key, size_t key_size, const void *value, size_t size,
                               struct record_item *item)
{
    struct cursor in;
    const unsigned char *name = key;
    if (key_size < 10 || key_size > RECORD_ITEM_KEY_BYTES ||
        memchr(name, 0, key_size) != name + key_size - 9 ||
        small_open(&in, RECORD_ITEM, key, key_size, value, size))
        return STATUS_CORRUPT;
    item->position = take_u64(&in);
    take_text(&in, item->id, sizeof item->id);
    item->size = take_u32(&in);
    item->bytes = take(&in, item->size);
    if (!item->id[0])
        return STATUS_CORRUPT;
    return small_close(&in);
}

/* ---- pieces ---- */

void record_piece_encode(void *out, const void *key, size_t key_size, const void *bytes,
                         size_t size)
{
    unsigned char *p = out;
    const unsigned char header[SMALL_HEADER_BYTES] = {RECORD_PIECE, VERSION, 0, 0};
    memcpy(p, header, sizeof header);
    memcpy(p + RECORD_PIECE_HEADER_BYTES, bytes, size);
    write_u64(p + SMALL_HEADER_BYTES, small_checksum(key, key_size, bytes, size));
}

enum status record_piece_decode(const void *key, size_t key_size, const void *value, size_t size,
                                const void **bytes)
{
    const unsigned char *p = value;
    if (key_size != RECORD_PIECE_KEY_BYTES || size < RECORD_PIECE_HEADER_BYTES)
        return STATUS_CORRUPT;
    if (p[0] != RECORD_PIECE || p[1] != VERSION || p[2] || p[3])
        return STATUS_CORRUPT;
    p += RECORD_PIECE_HEADER_BYTES;
    size -= RECORD_PIECE_HEADER_BYTES;
    if (read_u64(p - CHECKSUM_BYTES) != small_checksum(key, key_size, p, size))
        return STATUS_CORRUPT;
    *bytes = p;
    return STATUS_OK;
}
