/* Memories that leave a store as a file and come into another: whole, or not at all. */
#include <malloc.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include <cmocka.h>
#include <zstd.h>

#include "proto/base/hash.h"
#include "proto/memory_file.h"
#include "tests/lib/store_past.h"

#define VOCABULARY 65536u

static void export_to(struct storage *storage, const char *id, struct buf *out)
{
    struct storage_export *file;
    bool done = false;
    assert_int_equal(storage_export_open(storage, id, &file), STATUS_OK);
    while (!done)
        assert_int_equal(storage_export_next(file, out, &done), STATUS_OK);
    storage_export_close(file);
}

/* In pieces of at most `piece` bytes. */
static enum status import_from(struct storage *storage, const char *id, const char *data,
                               size_t size, size_t piece, struct error *err)
{
    struct storage_import *file;
    enum status status = storage_import_open(storage, VOCABULARY, STORE_PAST_SNAPSHOT, "t", &file);
    assert_int_equal(status, STATUS_OK);
    for (size_t at = 0; !status && at < size; at += piece)
        status = storage_import_feed(file, data + at, size - at < piece ? size - at : piece, err);
    if (!status)
        status = storage_import_finish(file, id, err);
    struct storage_memory memory;
    if (!status) {
        assert_int_equal(storage_memory_get(storage, id, &memory), STATUS_OK);
        assert_string_equal(memory.tenant, "t");
        storage_memory_close(&memory);
    }
    storage_import_close(file);
    return status;
}

/* A memory "a" of four turns over two branches. */
static struct store_past *make(struct storage *storage)
{
    struct store_past *past = calloc(1, sizeof *past);
    struct storage_memory_options options = {.id = "a", .from = "old", .metadata = "{\"k\":\"v\"}"};
    struct store_wait wait;
    strcpy(past->id, "old");
    assert_int_equal(store_create(storage, "old", NULL), STATUS_OK);
    store_past_write(storage, past, 60, 1, false);
    store_past_write(storage, past, 33, 1, false);
    strcpy(past->id, "a");
    store_wait_init(&wait);
    assert_int_equal(
        store_wait_finish(&wait, storage_memory_create(storage, &options, store_wait_cb, &wait)),
        STATUS_OK);
    store_past_write(storage, past, 40, 2, false);
    store_past_write(storage, past, 10, 2, false);
    return past;
}

static void test_round_trip(void **state)
{
    struct storage *storage = store_past_open(*state);
    struct store_past *past = make(storage);
    struct buf file, again;
    struct error err = {0};
    buf_init(&file);
    buf_init(&again);
    export_to(storage, "a", &file);
    /* Piece by piece or at once, it is the same memory, and the same file again. */
    for (size_t piece = 1; piece < file.size * 3; piece *= 3) {
        assert_int_equal(import_from(storage, "b", file.data, file.size, piece, &err), STATUS_OK);
        strcpy(past->id, "b");
        store_past_assert(storage, past);
        struct storage_memory memory;
        assert_int_equal(storage_memory_get(storage, "b", &memory), STATUS_OK);
        assert_string_equal(memory.metadata, "{\"k\":\"v\"}");
        storage_memory_close(&memory);
        assert_int_equal(store_remove(storage, "b"), STATUS_OK);
    }
    assert_int_equal(import_from(storage, "b", file.data, file.size, 1000, &err), STATUS_OK);
    /* It goes on, and is its own. */
    assert_int_equal(store_remove(storage, "a"), STATUS_OK);
    assert_int_equal(store_remove(storage, "old"), STATUS_OK);
    store_past_write(storage, past, 50, 3, false);
    store_past_assert(storage, past);
    assert_int_equal(import_from(storage, "b", file.data, file.size, 1000, &err), STATUS_CONFLICT);
    /* The shortest ones. */
    static const unsigned counts[] = {0, 1, 7, 8, 9, 16};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        struct store_past *small = calloc(1, sizeof *small);
        strcpy(small->id, "s");
        assert_int_equal(store_create(storage, "s", NULL), STATUS_OK);
        if (counts[i])
            store_past_write(storage, small, counts[i], 4, false);
        again.size = 0;
        export_to(storage, "s", &again);
        strcpy(small->id, "t");
        assert_int_equal(import_from(storage, "t", again.data, again.size, 64, &err), STATUS_OK);
        store_past_assert(storage, small);
        assert_int_equal(store_remove(storage, "s"), STATUS_OK);
        assert_int_equal(store_remove(storage, "t"), STATUS_OK);
        free(small);
    }
    assert_int_equal(storage_export_open(storage, "nobody", &(struct storage_export *){NULL}),
                     STATUS_NOT_FOUND);
    storage_close(storage);
    assert_int_equal(store_past_check(*state).memories, 1);
    buf_close(&file);
    buf_close(&again);
    free(past);
}

/* While it is exported the memory goes on, is rewound and deleted: the file does not change. */
static void test_view(void **state)
{
    struct storage *storage = store_past_open(*state);
    struct store_past *past = make(storage), *later = calloc(1, sizeof *later);
    struct buf file, calm;
    struct error err = {0};
    struct storage_export *out;
    bool done = false;
    buf_init(&file);
    buf_init(&calm);
    export_to(storage, "a", &calm);
    assert_int_equal(storage_export_open(storage, "a", &out), STATUS_OK);
    *later = *past;
    for (unsigned i = 0; !done; i++) {
        assert_int_equal(storage_export_next(out, &file, &done), STATUS_OK);
        if (i < 3)
            store_past_write(storage, later, 30, i, false);
        if (i == 3)
            assert_int_equal(store_remove(storage, "a"), STATUS_OK);
        if (i == 4)
            assert_int_equal(store_remove(storage, "old"), STATUS_OK);
    }
    storage_export_close(out);
    assert_int_equal(file.size, calm.size);
    assert_memory_equal(file.data, calm.data, file.size);
    strcpy(past->id, "b");
    assert_int_equal(import_from(storage, "b", file.data, file.size, 77, &err), STATUS_OK);
    store_past_assert(storage, past);
    storage_close(storage);
    assert_int_equal(store_past_check(*state).memories, 1);
    buf_close(&file);
    buf_close(&calm);
    free(past);
    free(later);
}

/* Every byte changed, and every length: refused with the part named, or (a bit that zstd does not
 * use) the same memory; never anything left. */
static void test_damage(void **state)
{
    struct storage *storage = store_past_open(*state);
    struct store_past *past = make(storage);
    struct buf file;
    unsigned harmless = 0;
    buf_init(&file);
    export_to(storage, "a", &file);
    strcpy(past->id, "b");
    /* In the order of a shuffled deck, so that a short run sees all of the file. */
    const size_t steps = getenv("RAMBAD_LONG") ? file.size : 400;
    uint64_t seed;
    assert_int_equal(getrandom(&seed, sizeof seed, 0), sizeof seed);
    print_message("seed %llu, %zu bytes\n", (unsigned long long)seed, file.size);
    for (size_t i = 0; i < steps; i++) {
        struct error err = {0};
        const uint64_t random = hash64(&i, sizeof i, seed);
        const size_t at = steps == file.size ? i : random % file.size;
        const char before = file.data[at];
        file.data[at] = (char)(before ^ (1 << (random >> 40) % 8));
        enum status status = import_from(storage, "b", file.data, file.size, 4096, &err);
        file.data[at] = before;
        if (status == STATUS_OK) {
            harmless++;
            store_past_assert(storage, past);
            assert_int_equal(store_remove(storage, "b"), STATUS_OK);
        } else {
            if (status != STATUS_CORRUPT || !strstr(err.message, "part "))
                fail_msg("byte %zu: %s: %s", at, status_text(status), err.message);
        }
        status = import_from(storage, "b", file.data, at, 4096, &err);
        if (status != STATUS_CORRUPT || !strstr(err.message, "part "))
            fail_msg("cut at %zu: %s: %s", at, status_text(status), err.message);
    }
    print_message("%u of %zu changes were harmless\n", harmless, steps);
    assert_true(harmless < steps / 20);
    struct error err = {0};
    buf_append(&file, file.data, 20);
    assert_int_equal(import_from(storage, "b", file.data, file.size, 4096, &err), STATUS_CORRUPT);
    storage_close(storage);
    store_past_check(*state);
    storage = store_past_open(*state); /* drops what a full queue may have left */
    storage_close(storage);
    assert_int_equal(store_past_check(*state).memories, 2);
    buf_close(&file);
    free(past);
}

/* ---- files that are well made, but not by us ---- */

struct frames {
    struct buf parts[64];
    size_t count;
};

/* The unpacked parts. */
static void take_apart(const struct buf *file, struct frames *frames)
{
    size_t at = 0;
    while (at < file->size) {
        size_t size = ZSTD_findFrameCompressedSize(file->data + at, file->size - at);
        struct buf *part = &frames->parts[frames->count++];
        buf_init(part);
        buf_reserve(part, 1 << 20);
        part->size = ZSTD_decompress(part->data, part->capacity, file->data + at, size);
        assert_false(ZSTD_isError(part->size));
        at += size;
    }
}

static void put_together(const struct frames *frames, struct buf *file)
{
    file->size = 0;
    for (size_t i = 0; i < frames->count; i++) {
        const struct buf *part = &frames->parts[i];
        buf_reserve(file, ZSTD_compressBound(part->size));
        file->size += ZSTD_compress(file->data + file->size, file->capacity - file->size,
                                    part->data, part->size, 1);
    }
}

/* A new payload with a right checksum. */
static void seal(struct buf *part, const char *payload, size_t size, uint64_t seed)
{
    struct memory_file_part header;
    assert_int_equal(memory_file_read_header((unsigned char *)part->data, &header), STATUS_OK);
    part->size = MEMORY_FILE_HEADER_BYTES;
    buf_append(part, payload, size);
    header.bytes = size;
    memory_file_write_header((unsigned char *)part->data, &header,
                             part->data + MEMORY_FILE_HEADER_BYTES, seed);
}

static void test_foreign(void **state)
{
    struct storage *storage = store_past_open(*state);
    struct store_past *past = make(storage);
    struct buf file, json;
    struct frames frames = {0}, other = {0};
    struct error err = {0};
    struct memory_file_part header;
    buf_init(&file);
    buf_init(&json);
    export_to(storage, "a", &file);
    take_apart(&file, &frames);
    file.size = 0;
    export_to(storage, "old", &file);
    take_apart(&file, &other);
    assert_int_equal(memory_file_read_header((unsigned char *)frames.parts[0].data, &header),
                     STATUS_OK);
    const uint64_t seed = header.checksum;

    /* Two parts in the other's place; a part of another file; a part twice; one left out. */
    struct buf kept = frames.parts[1];
    frames.parts[1] = frames.parts[2];
    frames.parts[2] = kept;
    put_together(&frames, &file);
    assert_int_equal(import_from(storage, "b", file.data, file.size, 4096, &err), STATUS_CORRUPT);
    frames.parts[2] = frames.parts[1];
    put_together(&frames, &file);
    assert_int_equal(import_from(storage, "b", file.data, file.size, 4096, &err), STATUS_CORRUPT);
    frames.parts[1] = kept;
    kept = frames.parts[frames.count - 2];
    frames.parts[frames.count - 2] = other.parts[other.count - 2];
    put_together(&frames, &file);
    assert_int_equal(import_from(storage, "b", file.data, file.size, 4096, &err), STATUS_CORRUPT);
    frames.parts[frames.count - 2] = kept;
    put_together(&frames, &file);
    assert_int_equal(import_from(storage, "b", file.data, file.size, 4096, &err), STATUS_OK);

    /* A token that is none, under a right checksum. */
    struct buf *tokens = &frames.parts[3];
    const int32_t bad[] = {-1, (int32_t)VOCABULARY};
    for (size_t i = 0; i < 2; i++) {
        buf_consume(&json, json.size);
        buf_append(&json, tokens->data + MEMORY_FILE_HEADER_BYTES,
                   tokens->size - MEMORY_FILE_HEADER_BYTES);
        memcpy(json.data + 8, &bad[i], sizeof bad[i]);
        seal(tokens, json.data, json.size, seed);
        put_together(&frames, &file);
        assert_int_equal(import_from(storage, "c", file.data, file.size, 4096, &err),
                         STATUS_CORRUPT);
        assert_non_null(strstr(err.message, "part 3 (tokens 0 to "));
    }

    /* Another model's, a newer format's, and one that is no manifest. */
    struct memory_file_manifest manifest;
    assert_int_equal(memory_file_read_manifest(frames.parts[0].data + MEMORY_FILE_HEADER_BYTES,
                                               frames.parts[0].size - MEMORY_FILE_HEADER_BYTES,
                                               &manifest, &err),
                     STATUS_OK);
    /* A snapshot that no session of this model has: memory is not taken for it. */
    manifest.snapshot_bytes = STORE_PAST_SNAPSHOT + 1;
    json.size = 0;
    memory_file_write_manifest(&json, &manifest);
    seal(&frames.parts[0], json.data, json.size, 0);
    put_together(&frames, &file);
    assert_int_equal(import_from(storage, "c", file.data, file.size, 4096, &err), STATUS_CORRUPT);
    assert_non_null(strstr(err.message, "part 0 (manifest)"));
    manifest.snapshot_bytes = STORE_PAST_SNAPSHOT;
    manifest.fingerprint++;
    strcpy(manifest.model, "somebody-else");
    json.size = 0;
    memory_file_write_manifest(&json, &manifest);
    seal(&frames.parts[0], json.data, json.size, 0);
    put_together(&frames, &file);
    assert_int_equal(import_from(storage, "c", file.data, file.size, 4096, &err), STATUS_MISMATCH);
    assert_non_null(strstr(err.message, "somebody-else"));
    manifest.format++;
    json.size = 0;
    memory_file_write_manifest(&json, &manifest);
    seal(&frames.parts[0], json.data, json.size, 0);
    put_together(&frames, &file);
    assert_int_equal(import_from(storage, "c", file.data, file.size, 4096, &err),
                     STATUS_UNSUPPORTED);
    seal(&frames.parts[0], "{\"format\":1}", 12, 0);
    put_together(&frames, &file);
    assert_int_equal(import_from(storage, "c", file.data, file.size, 4096, &err), STATUS_CORRUPT);
    /* A first part that says it is not the first: nothing is known of sizes yet. */
    header.number = 5;
    header.bytes = 0;
    memory_file_write_header((unsigned char *)frames.parts[0].data, &header,
                             frames.parts[0].data + MEMORY_FILE_HEADER_BYTES, 0);
    put_together(&frames, &file);
    assert_int_equal(import_from(storage, "c", file.data, file.size, 4096, &err), STATUS_CORRUPT);
    assert_int_equal(import_from(storage, "c", "hello, memory", 13, 4, &err), STATUS_CORRUPT);
    assert_int_equal(import_from(storage, "c", "", 0, 4, &err), STATUS_CORRUPT);

    memory_file_manifest_close(&manifest);
    for (size_t i = 0; i < 64; i++) {
        buf_close(&frames.parts[i]);
        buf_close(&other.parts[i]);
    }
    buf_close(&file);
    buf_close(&json);
    storage_close(storage);
    store_past_check(*state);
    free(past);
}

/* The file as a program of format 1 wrote it: the same without turns. */
static void make_old(struct frames *frames)
{
    struct memory_file_manifest manifest;
    struct memory_file_part header;
    struct error err = {0};
    struct buf json;
    uint64_t seed = 0;
    size_t kept = 0;
    buf_init(&json);
    assert_int_equal(memory_file_read_manifest(frames->parts[0].data + MEMORY_FILE_HEADER_BYTES,
                                               frames->parts[0].size - MEMORY_FILE_HEADER_BYTES,
                                               &manifest, &err),
                     STATUS_OK);
    assert_int_equal(manifest.format, MEMORY_FILE_FORMAT);
    manifest.format = 1;
    memory_file_write_manifest(&json, &manifest);
    char *count = strstr(json.data, ",\"turn_count\":4"); /* it is not read, were it there */
    assert_non_null(count);
    memset(count, ' ', 15);
    seal(&frames->parts[0], json.data, json.size, 0);
    for (size_t i = 0; i < frames->count; i++) {
        struct buf part = frames->parts[i];
        assert_int_equal(memory_file_read_header((unsigned char *)part.data, &header), STATUS_OK);
        if (header.kind == MEMORY_FILE_TURNS) {
            buf_close(&part);
            continue;
        }
        header.number = kept;
        memory_file_write_header((unsigned char *)part.data, &header,
                                 part.data + MEMORY_FILE_HEADER_BYTES, seed);
        seed = kept ? seed : header.checksum;
        frames->parts[kept++] = part;
    }
    assert_int_equal(kept, frames->count - 1);
    frames->count = kept;
    memory_file_manifest_close(&manifest);
    buf_close(&json);
}

/* The places of its past go along, with their names; snapshots but the last do not. */
static void test_turns(void **state)
{
    struct storage *storage = store_past_open(*state);
    struct store_past *past = make(storage);
    struct storage_turn *turns = calloc(2 * STORE_PAST_TOKENS, sizeof *turns);
    struct storage_turn *imported = turns + STORE_PAST_TOKENS;
    struct frames frames = {0};
    struct error err = {0};
    struct store_wait wait;
    struct buf file;
    buf_init(&file);
    store_wait_init(&wait);
    assert_int_equal(store_wait_finish(&wait, storage_turn_bookmark(storage, "a", 133, "here",
                                                                    store_wait_cb, &wait)),
                     STATUS_OK);
    store_wait_init(&wait);
    assert_int_equal(store_wait_finish(&wait, storage_turn_bookmark(storage, "a", 143, "last",
                                                                    store_wait_cb, &wait)),
                     STATUS_OK);
    export_to(storage, "a", &file);
    assert_int_equal(import_from(storage, "b", file.data, file.size, 4096, &err), STATUS_OK);
    const size_t count = store_past_turns(storage, "a", turns);
    assert_int_equal(count, 4);
    assert_int_equal(store_past_turns(storage, "b", imported), count);
    for (size_t i = 0; i < count; i++) {
        assert_int_equal(imported[i].position, turns[i].position);
        assert_int_equal(imported[i].text_bytes, turns[i].text_bytes);
        assert_int_equal(imported[i].created_at, turns[i].created_at);
        assert_string_equal(imported[i].bookmark, turns[i].bookmark);
        assert_int_equal(imported[i].has_snapshot, i == 0);
    }
    assert_string_equal(imported[0].bookmark, "last");
    assert_string_equal(imported[1].bookmark, "here");
    /* They can be gone back to, from the beginning at worst; and go along once more. */
    struct storage_memory_options options = {.id = "f", .from = "b", .at = 133};
    store_wait_init(&wait);
    assert_int_equal(
        store_wait_finish(&wait, storage_memory_create(storage, &options, store_wait_cb, &wait)),
        STATUS_OK);
    assert_int_equal(store_past_get(storage, "f").token_count, 0);
    struct buf again;
    buf_init(&again);
    export_to(storage, "b", &again);
    assert_int_equal(import_from(storage, "c", again.data, again.size, 4096, &err), STATUS_OK);
    assert_int_equal(store_past_turns(storage, "c", imported), count);
    assert_string_equal(imported[1].bookmark, "here");
    /* What an older program exported is a memory with one turn. */
    take_apart(&file, &frames);
    make_old(&frames);
    put_together(&frames, &file);
    assert_int_equal(import_from(storage, "d", file.data, file.size, 4096, &err), STATUS_OK);
    assert_int_equal(store_past_turns(storage, "d", imported), 1);
    strcpy(past->id, "d");
    store_past_assert(storage, past);
    for (size_t i = 0; i < frames.count; i++)
        buf_close(&frames.parts[i]);
    buf_close(&file);
    buf_close(&again);
    storage_close(storage);
    store_past_check(*state);
    free(turns);
    free(past);
}

/* Turns that cannot be, under a right checksum. */
static void test_bad_turns(void **state)
{
    struct storage *storage = store_past_open(*state);
    struct store_past *past = make(storage);
    struct error err = {0};
    struct buf file;
    buf_init(&file);
    export_to(storage, "a", &file);
    for (unsigned what = 0; what < 5; what++) {
        struct frames frames = {0};
        struct memory_file_part header;
        struct memory_file_turn turn;
        take_apart(&file, &frames);
        assert_int_equal(memory_file_read_header((unsigned char *)frames.parts[0].data, &header),
                         STATUS_OK);
        struct buf *part = &frames.parts[frames.count - 2];
        unsigned char *payload = (unsigned char *)part->data + MEMORY_FILE_HEADER_BYTES;
        const size_t size = part->size - MEMORY_FILE_HEADER_BYTES;
        char *copy = malloc(size);
        assert_int_equal(memory_file_read_turn(payload, &turn), STATUS_OK);
        assert_int_equal(turn.position, 143);
        turn.position = what == 0 ? 144 : what == 1 ? 0 : what == 2 ? 93 : 143;
        turn.text_bytes += what == 3;
        memory_file_write_turn(payload, &turn);
        if (what == 4)
            memset(payload + 24, 'x', LIMITS_BOOKMARK_BYTES);
        memcpy(copy, payload, size);
        seal(part, copy, size, header.checksum);
        free(copy);
        struct buf bad;
        buf_init(&bad);
        put_together(&frames, &bad);
        assert_int_equal(import_from(storage, "b", bad.data, bad.size, 999, &err), STATUS_CORRUPT);
        assert_non_null(strstr(err.message, "turns"));
        buf_close(&bad);
        for (size_t i = 0; i < frames.count; i++)
            buf_close(&frames.parts[i]);
    }
    buf_close(&file);
    storage_close(storage);
    store_past_check(*state);
    free(past);
}

/* ---- memory in use ---- */

#define LARGE_KV 16384u /* of a chunk: what lies in it cannot be packed */
#define LARGE_TOKENS 64u

static struct storage *open_large(const char *folder, const char *name)
{
    char path[1100];
    struct storage *storage;
    struct error err = {0};
    snprintf(path, sizeof path, "%s/%s", folder, name);
    const struct storage_options options = {.path = path,
                                            .kv_bytes = LARGE_KV,
                                            .landmark_bytes = 1024,
                                            .chunk_tokens = LARGE_TOKENS,
                                            .model_name = "large"};
    assert_int_equal(storage_open(&options, &storage, &err), STATUS_OK);
    return storage;
}

/* A memory "a" of so many chunks, some a turn. */
static void write_large(struct storage *storage, uint64_t chunks)
{
    static unsigned char kv[LARGE_KV], landmark[1024];
    static int32_t tokens[100 * LARGE_TOKENS];
    struct storage_memory memory;
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    assert_int_equal(storage_memory_get(storage, "a", &memory), STATUS_OK);
    storage_memory_close(&memory);
    for (uint64_t i = 0; i < chunks; i += 100) {
        for (uint64_t c = i; c < i + 100; c++) {
            store_fill(kv, sizeof kv, memory.branch, c);
            store_fill(landmark, sizeof landmark, ~memory.branch, c);
            assert_int_equal(storage_append(storage, memory.branch, c, kv, landmark, NULL, NULL),
                             STATUS_OK);
        }
        for (uint64_t t = 0; t < 100 * LARGE_TOKENS; t++)
            tokens[t] = store_token(1, i * LARGE_TOKENS + t);
        const struct storage_commit commit = {.id = "a",
                                              .position = (i + 100) * LARGE_TOKENS,
                                              .tokens = tokens,
                                              .token_count = 100 * LARGE_TOKENS,
                                              .text_bytes = i,
                                              .snapshot = "s",
                                              .snapshot_bytes = 1};
        assert_int_equal(store_commit(storage, &commit), STATUS_OK);
    }
}

static size_t allocated(void)
{
    const struct mallinfo2 now = mallinfo2();
    return now.uordblks + now.hblkhd;
}

/* The most memory that a move of so many chunks from one store to another has in use. */
static size_t move_large(const char *folder, const char *from, const char *to, uint64_t chunks,
                         uint64_t *file_bytes)
{
    struct storage *here = open_large(folder, from), *there = open_large(folder, to);
    struct storage_export *out;
    struct storage_import *in;
    struct storage_memory memory;
    struct error err = {0};
    struct buf part;
    bool done = false;
    size_t most = 0;
    write_large(here, chunks);
    malloc_trim(0);
    const size_t before = allocated();
    buf_init(&part);
    *file_bytes = 0;
    assert_int_equal(storage_export_open(here, "a", &out), STATUS_OK);
    assert_int_equal(storage_import_open(there, VOCABULARY, 1, NULL, &in), STATUS_OK);
    while (!done) {
        part.size = 0;
        assert_int_equal(storage_export_next(out, &part, &done), STATUS_OK);
        *file_bytes += part.size;
        assert_int_equal(storage_import_feed(in, part.data, part.size, &err), STATUS_OK);
        const size_t now = allocated();
        most = now > before && now - before > most ? now - before : most;
    }
    storage_export_close(out);
    assert_int_equal(storage_import_finish(in, "b", &err), STATUS_OK);
    storage_import_close(in);
    buf_close(&part);
    assert_int_equal(storage_memory_get(there, "b", &memory), STATUS_OK);
    assert_int_equal(memory.chunk_count, chunks);
    storage_memory_close(&memory);
    storage_close(here);
    storage_close(there);
    return most;
}

/* However long the memory is, a move takes a few parts of it at a time. */
static void test_bounded(void **state)
{
    uint64_t few, many;
    const size_t short_one = move_large(*state, "a", "b", 200, &few);
    const size_t long_one = move_large(*state, "c", "d", 4000, &many);
    print_message("%llu MB of file: %zu KB in use; %llu MB: %zu KB\n",
                  (unsigned long long)few >> 20, short_one >> 10, (unsigned long long)many >> 20,
                  long_one >> 10);
    assert_true(many > 15 * few);
    assert_true(long_one < short_one + 4 * LIMITS_MIB);
    assert_true(long_one < 24 * LIMITS_MIB);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        STORE_TEST(test_round_trip), STORE_TEST(test_view),  STORE_TEST(test_damage),
        STORE_TEST(test_foreign),    STORE_TEST(test_turns), STORE_TEST(test_bad_turns),
        STORE_TEST(test_bounded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
