/* fuzz_import.c - files of memories that are whole but for what the input changes in them, into a
 * store: what is whole comes in and can be read, anything else is refused by name and leaves
 * nothing.
 *
 * Input: how many tokens and bytes of snapshot there are, and how the file is cut; then, for each
 * part, whether and how it is changed. Behind the last byte nothing is. Every checksum is made
 * right again, or changed parts would all end there. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zstd.h>

#include "proto/base/assert.h"
#include "proto/memory_file.h"
#include "storage/storage.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define CHUNK 4
#define KV 24
#define LANDMARK 8
#define VOCABULARY 100
#define SNAPSHOT_MOST 1024
#define FINGERPRINT 0x1234u

static struct storage *storage;
static char folder[64];

static void remove_folder(void)
{
    char command[96];
    storage_close(storage);
    snprintf(command, sizeof command, "rm -rf %s", folder);
    (void)!system(command);
}

static void open_store(void)
{
    struct error err = {0};
    strcpy(folder, "/dev/shm/fuzz_import.XXXXXX"); /* a disk's syncs take their time */
    if (!mkdtemp(folder)) {
        strcpy(folder, "/tmp/fuzz_import.XXXXXX");
        ASSERT(mkdtemp(folder));
    }
    const struct storage_options options = {.path = folder,
                                            .kv_bytes = KV,
                                            .landmark_bytes = LANDMARK,
                                            .chunk_tokens = CHUNK,
                                            .model_fingerprint = FINGERPRINT,
                                            .model_name = "fuzz",
                                            .map_bytes = (size_t)64 << 20,
                                            .linger_ms = 1};
    ASSERT(!storage_open(&options, &storage, &err));
    atexit(remove_folder);
}

struct maker {
    const uint8_t *data;
    size_t size, at;
    struct buf file;
    uint64_t number, seed;
    bool changed;
};

static uint8_t draw(struct maker *m)
{
    return m->at < m->size ? m->data[m->at++] : 0;
}

static uint64_t odd_number(struct maker *m)
{
    static const uint64_t some[] = {
        0, 1, 2, 63, 64, 65, 1 << 20, UINT32_MAX, INT64_MAX, UINT64_MAX, UINT64_MAX - 3};
    const uint8_t kind = draw(m);
    return kind < 128 ? some[kind % (sizeof some / sizeof *some)] : kind - 128u;
}

/* One zstd frame, or the bytes of one in a way that zstd does not write. */
static void add_frame(struct maker *m, const struct buf *part)
{
    const size_t room = ZSTD_compressBound(part->size);
    buf_reserve(&m->file, room);
    const size_t n = ZSTD_compress(m->file.data + m->file.size, room, part->data, part->size, 1);
    ASSERT(!ZSTD_isError(n));
    const uint8_t how = draw(m);
    if (how == 255) {
        m->file.data[m->file.size + draw(m) % n] ^= (char)(1 << draw(m) % 8);
        m->changed = true;
    }
    m->file.size += how == 254 ? n / 2 : n;
    m->changed = m->changed || how == 254;
}

/* A part, as it should be or changed; its payload has room for one byte more. */
static void add_part(struct maker *m, struct memory_file_part part, char *payload)
{
    const uint8_t how = draw(m);
    struct buf bytes;
    unsigned char header[MEMORY_FILE_HEADER_BYTES];
    part.number = m->number++;
    const struct memory_file_part whole = part;
    if (how == 1)
        part.kind = (enum memory_file_kind)(draw(m) % 9);
    else if (how == 2)
        part.number = odd_number(m);
    else if (how == 3)
        part.first = odd_number(m);
    else if (how == 4)
        part.count = odd_number(m);
    else if (how == 5)
        part.bytes = part.bytes ? part.bytes - 1 : 1;
    else if (how == 6)
        part.bytes++;
    else if (how == 7 && part.bytes)
        payload[draw(m) % part.bytes] ^= (char)draw(m);
    m->changed = m->changed || (how && how < 11); /* a payload may have stayed as it was */
    memory_file_write_header(header, &part, payload, m->seed);
    if (whole.kind == MEMORY_FILE_MANIFEST)
        m->seed = part.checksum;
    if (how == 8)
        header[draw(m) % sizeof header] ^= 1;
    buf_init(&bytes);
    buf_append(&bytes, header, sizeof header);
    if (part.bytes)
        buf_append(&bytes, payload, (size_t)part.bytes);
    for (unsigned i = 0; i < (how == 9 ? 0u : how == 10 ? 2u : 1u); i++)
        add_frame(m, &bytes);
    buf_close(&bytes);
}

/* Turns of a memory of so many tokens: its last few positions. */
static uint64_t turns_of(uint64_t tokens)
{
    return tokens < 3 ? tokens : 3;
}

static void add_turns(struct maker *m, uint64_t tokens)
{
    char payload[3 * MEMORY_FILE_TURN_BYTES + 1];
    const uint64_t count = turns_of(tokens);
    for (uint64_t i = 0; i < count; i++) {
        const struct memory_file_turn turn = {tokens - i, 5 - i, 1, "b"};
        memory_file_write_turn((unsigned char *)payload + i * MEMORY_FILE_TURN_BYTES, &turn);
    }
    if (count)
        add_part(m,
                 (struct memory_file_part){.kind = MEMORY_FILE_TURNS,
                                           .count = count,
                                           .bytes = count * MEMORY_FILE_TURN_BYTES},
                 payload);
}

static void add_manifest(struct maker *m, uint64_t tokens, uint64_t snapshot)
{
    struct buf json;
    char metadata[] = "{\"name\":\"x\"}";
    struct memory_file_manifest manifest = {.format = MEMORY_FILE_FORMAT,
                                            .chunk_tokens = CHUNK,
                                            .fingerprint = FINGERPRINT,
                                            .model = "fuzz",
                                            .kv_bytes = KV,
                                            .landmark_bytes = LANDMARK,
                                            .token_count = tokens,
                                            .text_bytes = 5,
                                            .snapshot_bytes = snapshot,
                                            .turn_count = turns_of(tokens),
                                            .created_at = 1,
                                            .metadata = metadata};
    const uint8_t how = draw(m);
    uint64_t *const fields[] = {&manifest.fingerprint,    &manifest.kv_bytes,
                                &manifest.landmark_bytes, &manifest.token_count,
                                &manifest.snapshot_bytes, &manifest.text_bytes,
                                &manifest.turn_count};
    if (how && how < 8)
        *fields[how - 1] = odd_number(m) % ((uint64_t)1 << 53);
    else if (how == 8)
        manifest.format = draw(m);
    m->changed = m->changed || (how && how < 9);
    buf_init(&json);
    memory_file_write_manifest(&json, &manifest);
    buf_append(&json, "", 1);
    add_part(m, (struct memory_file_part){.kind = MEMORY_FILE_MANIFEST, .bytes = json.size - 1},
             json.data);
    buf_close(&json);
}

/* The parts of a memory of so many tokens, some chunks to a part. */
static void add_body(struct maker *m, uint64_t tokens, uint64_t snapshot)
{
    char payload[64 * KV + 1], ids[256 * sizeof(int32_t) + 1];
    for (uint64_t chunk = 0; chunk < tokens / CHUNK;) {
        const uint64_t left = tokens / CHUNK - chunk, wanted = 1 + draw(m) % 5;
        const uint64_t n = wanted < left ? wanted : left;
        memset(payload, 'k', sizeof payload);
        memset(ids, 0, sizeof ids);
        for (uint64_t i = 0; i < n * CHUNK; i++)
            ids[i * sizeof(int32_t)] = (char)((chunk * CHUNK + i) % VOCABULARY);
        add_part(m,
                 (struct memory_file_part){
                     .kind = MEMORY_FILE_CHUNKS, .first = chunk, .count = n, .bytes = n * KV},
                 payload);
        add_part(
            m,
            (struct memory_file_part){
                .kind = MEMORY_FILE_LANDMARKS, .first = chunk, .count = n, .bytes = n * LANDMARK},
            payload);
        add_part(m,
                 (struct memory_file_part){.kind = MEMORY_FILE_TOKENS,
                                           .first = chunk * CHUNK,
                                           .count = n * CHUNK,
                                           .bytes = n * CHUNK * sizeof(int32_t)},
                 ids);
        chunk += n;
    }
    const uint64_t rest = tokens % CHUNK;
    memset(ids, 0, sizeof ids);
    for (uint64_t i = 0; i < rest; i++)
        ids[i * sizeof(int32_t)] = (char)((tokens - rest + i) % VOCABULARY);
    if (rest)
        add_part(m,
                 (struct memory_file_part){.kind = MEMORY_FILE_TOKENS,
                                           .first = tokens - rest,
                                           .count = rest,
                                           .bytes = rest * sizeof(int32_t)},
                 ids);
    for (uint64_t at = 0; tokens && at < snapshot;) {
        const uint64_t left = snapshot - at, wanted = 1 + draw(m);
        const uint64_t n = wanted < left ? wanted : left;
        memset(payload, 's', sizeof payload);
        add_part(m,
                 (struct memory_file_part){
                     .kind = MEMORY_FILE_SNAPSHOT, .first = at, .count = n, .bytes = n},
                 payload);
        at += n;
    }
    add_turns(m, tokens);
    add_part(m, (struct memory_file_part){.kind = MEMORY_FILE_END}, payload);
}

static void check_memory(uint64_t tokens, bool changed)
{
    struct storage_memory memory;
    int32_t ids[512];
    ASSERT(!storage_memory_get(storage, "mem_0", &memory));
    ASSERT(changed || memory.token_count == tokens);
    ASSERT(memory.token_count <= sizeof ids / sizeof *ids && !memory.ephemeral);
    ASSERT(!storage_read_tokens(storage, "mem_0", 0, (size_t)memory.token_count, ids));
    for (uint64_t i = 0; i < memory.token_count; i++)
        ASSERT(ids[i] >= 0 && ids[i] < VOCABULARY && (changed || ids[i] == (int)i % VOCABULARY));
    for (uint64_t i = 0; i < memory.chunk_count; i++) {
        char kv[KV];
        const struct storage_read read = {.branch = memory.branch, .index = i, .kv = kv};
        ASSERT(!storage_read_chunks(storage, &read, 1));
    }
    storage_memory_close(&memory);
    ASSERT(!storage_memory_delete(storage, "mem_0", NULL, NULL));
}

static void import(struct maker *m, uint64_t tokens, size_t piece)
{
    struct storage_import *file;
    struct error err = {0};
    enum status status = STATUS_OK;
    ASSERT(!storage_import_open(storage, VOCABULARY, SNAPSHOT_MOST, NULL, &file));
    for (size_t at = 0; at < m->file.size && !status; at += piece) {
        const size_t left = m->file.size - at, n = piece < left ? piece : left;
        char *exact = malloc(n); /* reading past the end is seen */
        ASSERT(exact);
        memcpy(exact, m->file.data + at, n);
        status = storage_import_feed(file, exact, n, &err);
        free(exact);
    }
    if (!status)
        status = storage_import_finish(file, "mem_0", &err);
    storage_import_close(file);
    ASSERT(status == STATUS_OK || status == STATUS_MISMATCH || status == STATUS_CORRUPT ||
           status == STATUS_UNSUPPORTED);
    ASSERT((status != STATUS_OK) == (err.message[0] != 0));
    ASSERT(!status || m->changed);
    if (!status)
        check_memory(tokens, m->changed);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct maker m = {.data = data, .size = size};
    if (!storage)
        open_store();
    buf_init(&m.file);
    const uint64_t tokens = draw(&m) % 60, snapshot = tokens ? 1 + draw(&m) * 3u : 0;
    const size_t piece = 1 + draw(&m) * 16u;
    add_manifest(&m, tokens, snapshot);
    add_body(&m, tokens, snapshot);
    import(&m, tokens, piece);
    buf_close(&m.file);
    return 0;
}
