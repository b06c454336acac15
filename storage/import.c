#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "proto/memory_file.h"
#include "storage/gather.h"
#include "storage/store.h"
#include "storage/writer.h"

#define WINDOW_LOG_MOST 21 /* bounds what unpacking takes; an export uses less */
#define UNPACK_BYTES ((size_t)128 << 10)

struct storage_import {
    struct storage *storage;
    struct gather gather;
    uint32_t vocabulary;
    char memory[LIMITS_ID_BYTES]; /* ephemeral until the end */
    char tenant[LIMITS_ID_BYTES];
    bool has_memory, ended;
    uint64_t branch;
    struct memory_file_manifest ours, manifest;
    ZSTD_DStream *zstd;
    bool inside; /* a frame has begun and not ended */
    struct buf part;
    struct memory_file_part header, last; /* of the part that comes in; of the last whole one */
    bool has_header;
    uint64_t number, seed;
    enum memory_file_kind next;
    uint64_t chunk, chunks; /* next chunk; how many of the stretch have come as K/V */
    uint64_t position;      /* committed */
    struct buf kv, rest;    /* K/V that wait for their landmarks; the last tokens */
    char *snapshot;
    uint64_t snapshot_done, snapshot_most;
    uint64_t turns_done, turn_before; /* the next lies before it */
};

/* ---- messages ---- */

static enum status damaged(const struct storage_import *file, const char *what, struct error *err)
{
    char name[96];
    if (file->has_header) {
        memory_file_name_part(&file->header, name, sizeof name);
        return error_set(err, STATUS_CORRUPT, "%s of the file %s; nothing was imported", name,
                         what);
    }
    if (file->number == 0)
        return error_set(err, STATUS_CORRUPT,
                         "part 0 (manifest) of the file %s; nothing was imported", what);
    memory_file_name_part(&file->last, name, sizeof name);
    return error_set(err, STATUS_CORRUPT,
                     "part %llu of the file, behind %s, %s; nothing was imported",
                     (unsigned long long)file->number, name, what);
}

static enum status failed(enum status status, struct error *err)
{
    return error_set(err, status, "the memory could not be stored: %s; nothing was imported",
                     status_text(status));
}

/* ---- parts ---- */

static enum status take_manifest(struct storage_import *file, const char *payload,
                                 struct error *err)
{
    struct memory_file_manifest *m = &file->manifest;
    struct error why = {0};
    const struct memory_file_manifest *ours = &file->ours;
    enum status status = memory_file_read_manifest(payload, (size_t)file->header.bytes, m, &why);
    if (status == STATUS_CORRUPT)
        return damaged(file, why.message, err);
    if (status) {
        *err = why;
        return status;
    }
    if (m->fingerprint != ours->fingerprint || m->kv_bytes != ours->kv_bytes ||
        m->landmark_bytes != ours->landmark_bytes || m->chunk_tokens != ours->chunk_tokens)
        return error_set(err, STATUS_MISMATCH,
                         "the file's manifest says that the model %s (%016llx) made it; this "
                         "server runs %s (%016llx)",
                         m->model, (unsigned long long)m->fingerprint, ours->model,
                         (unsigned long long)ours->fingerprint);
    if ((m->token_count > 0) != (m->snapshot_bytes > 0) || m->turn_count > LIMITS_EXPORT_TURNS ||
        m->turn_count > m->token_count || m->snapshot_bytes > file->snapshot_most)
        return damaged(file, "has sizes that do not fit", err);
    struct storage_memory_options options = {
        .id = file->memory, .metadata = m->metadata, .tenant = file->tenant, .ephemeral = true};
    gather_new_id(file->memory);
    status = gather_create(&file->gather, file->storage, &options);
    if (status)
        return failed(status, err);
    file->has_memory = true;
    struct storage_memory memory;
    status = storage_memory_get(file->storage, file->memory, &memory);
    if (status)
        return failed(status, err);
    file->branch = memory.branch;
    storage_memory_close(&memory);
    file->next = m->token_count >= m->chunk_tokens ? MEMORY_FILE_CHUNKS
                 : m->token_count                  ? MEMORY_FILE_TOKENS
                                                   : MEMORY_FILE_END;
    return STATUS_OK;
}

/* Queues the stretch's chunks, now that both halves of them are here. */
static enum status take_landmarks(struct storage_import *file, const char *landmarks,
                                  struct error *err)
{
    const struct memory_file_manifest *m = &file->manifest;
    for (uint64_t i = 0; i < file->chunks; i++) {
        enum status status;
        do {
            gather_expect(&file->gather);
            status = storage_append(file->storage, file->branch, file->chunk + i,
                                    file->kv.data + i * m->kv_bytes,
                                    landmarks + i * m->landmark_bytes, gather_cb, &file->gather);
        } while (status && gather_refused(&file->gather, status));
        if (status) {
            status = gather_wait(&file->gather);
            return failed(status, err);
        }
    }
    file->next = MEMORY_FILE_TOKENS; /* whose commit waits for these too */
    return STATUS_OK;
}

static enum status commit(struct storage_import *file, const char *tokens, uint64_t count,
                          const void *snapshot, size_t snapshot_bytes, struct error *err)
{
    struct storage_commit write = {.id = file->memory,
                                   .position = file->position + count,
                                   .tokens = (const int32_t *)(const void *)tokens,
                                   .token_count = (size_t)count,
                                   .text_bytes = file->manifest.text_bytes,
                                   .snapshot = snapshot,
                                   .snapshot_bytes = snapshot_bytes};
    enum status status = gather_commit(&file->gather, file->storage, &write);
    file->position += count;
    return status ? failed(status, err) : STATUS_OK;
}

static enum status take_tokens(struct storage_import *file, const char *payload, struct error *err)
{
    const struct memory_file_manifest *m = &file->manifest;
    const uint64_t count = file->header.count, chunk_end = m->token_count / m->chunk_tokens;
    for (uint64_t i = 0; i < count; i++) {
        int32_t token;
        memcpy(&token, payload + i * sizeof token, sizeof token);
        token &= ~STORAGE_TOKEN_MARK;
        if (token < 0 || (uint32_t)token >= file->vocabulary)
            return damaged(file, "has tokens that the model does not know", err);
    }
    if (!file->chunks) { /* the last ones, committed with the snapshot */
        buf_append(&file->rest, payload, (size_t)file->header.bytes);
        file->next = MEMORY_FILE_SNAPSHOT;
        return STATUS_OK;
    }
    file->chunk += file->chunks;
    file->chunks = 0;
    file->next = file->chunk < chunk_end            ? MEMORY_FILE_CHUNKS
                 : m->token_count % m->chunk_tokens ? MEMORY_FILE_TOKENS
                                                    : MEMORY_FILE_SNAPSHOT;
    /* A stretch at a time, so that no more than one waits in memory; what stands for a snapshot
     * meanwhile is never read. */
    return commit(file, payload, count, "", 1, err);
}

static enum status take_snapshot(struct storage_import *file, const char *payload,
                                 struct error *err)
{
    const struct memory_file_manifest *m = &file->manifest;
    if (!file->snapshot)
        file->snapshot = malloc((size_t)m->snapshot_bytes);
    if (!file->snapshot)
        return failed(STATUS_NO_MEMORY, err);
    memcpy(file->snapshot + file->snapshot_done, payload, (size_t)file->header.bytes);
    file->snapshot_done += file->header.bytes;
    if (file->snapshot_done < m->snapshot_bytes)
        return STATUS_OK;
    file->next = m->turn_count ? MEMORY_FILE_TURNS : MEMORY_FILE_END;
    file->turn_before = m->token_count + 1;
    return commit(file, file->rest.data, file->rest.size / sizeof(int32_t), file->snapshot,
                  (size_t)m->snapshot_bytes, err);
}

/* The places of its past, from the last to the first. */
static enum status take_turns(struct storage_import *file, const char *payload, struct error *err)
{
    const size_t count = (size_t)file->header.count;
    struct storage_turn *turns = calloc(count, sizeof *turns);
    enum status status = turns ? STATUS_OK : STATUS_NO_MEMORY;
    for (size_t i = 0; i < count && !status; i++) {
        struct memory_file_turn turn;
        status = memory_file_read_turn((const unsigned char *)payload + i * MEMORY_FILE_TURN_BYTES,
                                       &turn);
        if (status || turn.position == 0 || turn.position >= file->turn_before ||
            turn.text_bytes > file->manifest.text_bytes) {
            free(turns);
            return damaged(file, "has turns that cannot be", err);
        }
        turns[i] = (struct storage_turn){.position = turn.position,
                                         .text_bytes = turn.text_bytes,
                                         .created_at = turn.created_at};
        memcpy(turns[i].bookmark, turn.bookmark, sizeof turns[i].bookmark);
        file->turn_before = turn.position;
    }
    if (!status)
        do {
            gather_expect(&file->gather);
            status = writer_put_turns(file->storage, file->memory, turns, count, gather_cb,
                                      &file->gather);
        } while (status && gather_refused(&file->gather, status));
    free(turns);
    const enum status waited = gather_wait(&file->gather);
    status = status ? status : waited;
    file->turns_done += count;
    if (file->turns_done == file->manifest.turn_count)
        file->next = MEMORY_FILE_END;
    return status ? failed(status, err) : STATUS_OK;
}

/* Whether the header announces what must come next, in a size that can be. */
static bool is_expected(const struct storage_import *file)
{
    const struct memory_file_part *p = &file->header;
    const struct memory_file_manifest *m = &file->manifest;
    if (p->kind != file->next || p->number != file->number)
        return false;
    const uint64_t chunk_end = file->number ? m->token_count / m->chunk_tokens : 0;
    switch (p->kind) {
    case MEMORY_FILE_MANIFEST:
        return p->first == 0 && p->count == 0 && p->bytes <= MEMORY_FILE_MANIFEST_BYTES;
    case MEMORY_FILE_CHUNKS:
        return p->first == file->chunk && p->count > 0 && p->count <= chunk_end - file->chunk &&
               p->count <= memory_file_batch(m) && p->bytes == p->count * m->kv_bytes;
    case MEMORY_FILE_LANDMARKS:
        return p->first == file->chunk && p->count == file->chunks &&
               p->bytes == p->count * m->landmark_bytes;
    case MEMORY_FILE_TOKENS:
        return p->first == file->position && p->bytes == p->count * sizeof(int32_t) &&
               p->count == (file->chunks ? file->chunks * m->chunk_tokens
                                         : m->token_count - file->position);
    case MEMORY_FILE_SNAPSHOT:
        return p->first == file->snapshot_done && p->count > 0 && p->bytes == p->count &&
               p->bytes <= MEMORY_FILE_PART_BYTES &&
               p->bytes <= m->snapshot_bytes - file->snapshot_done;
    case MEMORY_FILE_TURNS:
        return p->first == file->turns_done && p->count > 0 && p->count <= MEMORY_FILE_PART_TURNS &&
               p->count <= m->turn_count - file->turns_done &&
               p->bytes == p->count * MEMORY_FILE_TURN_BYTES;
    case MEMORY_FILE_END:
        return p->first == 0 && p->count == 0 && p->bytes == 0;
    }
    return false;
}

static enum status take_part(struct storage_import *file, struct error *err)
{
    const char *payload = file->part.data + MEMORY_FILE_HEADER_BYTES;
    enum status status = STATUS_OK;
    if (memory_file_check_part(&file->header, payload, file->seed))
        return damaged(file, "is damaged: its checksum is wrong", err);
    switch (file->header.kind) {
    case MEMORY_FILE_MANIFEST:
        file->seed = file->header.checksum;
        status = take_manifest(file, payload, err);
        break;
    case MEMORY_FILE_CHUNKS:
        file->chunks = file->header.count;
        file->kv.size = 0;
        buf_append(&file->kv, payload, (size_t)file->header.bytes);
        file->next = MEMORY_FILE_LANDMARKS;
        break;
    case MEMORY_FILE_LANDMARKS:
        status = take_landmarks(file, payload, err);
        break;
    case MEMORY_FILE_TOKENS:
        status = take_tokens(file, payload, err);
        break;
    case MEMORY_FILE_SNAPSHOT:
        status = take_snapshot(file, payload, err);
        break;
    case MEMORY_FILE_TURNS:
        status = take_turns(file, payload, err);
        break;
    case MEMORY_FILE_END:
        file->ended = true;
        break;
    }
    file->last = file->header;
    file->number++;
    file->has_header = false;
    file->part.size = 0;
    return status;
}

/* Unpacked bytes, as they come. */
static enum status take_bytes(struct storage_import *file, const char *data, size_t size,
                              struct error *err)
{
    while (size > 0) {
        if (file->ended)
            return error_set(err, STATUS_CORRUPT,
                             "the file goes on behind its end; nothing was imported");
        size_t want = MEMORY_FILE_HEADER_BYTES;
        if (file->has_header)
            want += (size_t)file->header.bytes;
        size_t n = want - file->part.size < size ? want - file->part.size : size;
        buf_append(&file->part, data, n);
        data += n;
        size -= n;
        if (!file->has_header && file->part.size == MEMORY_FILE_HEADER_BYTES) {
            if (memory_file_read_header((unsigned char *)file->part.data, &file->header))
                return damaged(file, "is not the beginning of one", err);
            if (!is_expected(file))
                return damaged(file, "has a header that is not the one of this part", err);
            file->has_header = true;
            want += (size_t)file->header.bytes;
        }
        if (file->has_header && file->part.size == want) {
            enum status status = take_part(file, err);
            if (status)
                return status;
        }
    }
    return STATUS_OK;
}

enum status storage_import_feed(struct storage_import *file, const void *data, size_t size,
                                struct error *err)
{
    ZSTD_inBuffer in = {data, size, 0};
    char *unpacked = malloc(UNPACK_BYTES);
    enum status status = unpacked ? STATUS_OK : failed(STATUS_NO_MEMORY, err);
    bool more = false; /* the last call filled its output: there may be more without any input */
    while (!status && (in.pos < in.size || more)) {
        ZSTD_outBuffer out = {unpacked, UNPACK_BYTES, 0};
        size_t left = ZSTD_decompressStream(file->zstd, &out, &in);
        if (ZSTD_isError(left)) {
            status = damaged(file, "is damaged: it cannot be unpacked", err);
            break;
        }
        more = out.pos == out.size;
        file->inside = left > 0;
        status = take_bytes(file, unpacked, out.pos, err);
    }
    free(unpacked);
    return status;
}

enum status storage_import_finish(struct storage_import *file, const char *id, struct error *err)
{
    if (!file->ended || file->inside)
        return damaged(file, "is missing or not whole: the file was cut", err);
    const enum status status = gather_settle(&file->gather, file->storage, file->memory, id);
    file->has_memory = status != STATUS_OK;
    if (status == STATUS_CONFLICT)
        return error_set(err, status, "there is a memory %s already", id);
    return status ? failed(status, err) : STATUS_OK;
}

enum status storage_import_open(struct storage *storage, uint32_t vocabulary, size_t snapshot_bytes,
                                const char *tenant, struct storage_import **out)
{
    if (tenant && strlen(tenant) >= LIMITS_ID_BYTES)
        return STATUS_INVALID;
    struct storage_import *file = calloc(1, sizeof *file);
    if (!file)
        return STATUS_NO_MEMORY;
    file->storage = storage;
    file->vocabulary = vocabulary;
    file->snapshot_most = snapshot_bytes;
    if (tenant)
        memcpy(file->tenant, tenant, strlen(tenant) + 1);
    file->next = MEMORY_FILE_MANIFEST;
    gather_init(&file->gather);
    buf_init(&file->part);
    buf_init(&file->kv);
    buf_init(&file->rest);
    enum status status = store_read_model(storage, &file->ours);
    file->zstd = ZSTD_createDStream();
    if (!status && (!file->zstd || ZSTD_isError(ZSTD_DCtx_setParameter(
                                       file->zstd, ZSTD_d_windowLogMax, WINDOW_LOG_MOST))))
        status = STATUS_NO_MEMORY;
    if (status) {
        storage_import_close(file);
        return status;
    }
    *out = file;
    return STATUS_OK;
}

void storage_import_close(struct storage_import *file)
{
    (void)!gather_wait(&file->gather); /* chunks whose tokens never came */
    if (file->has_memory)
        (void)!storage_memory_delete(file->storage, file->memory, NULL, NULL);
    memory_file_manifest_close(&file->manifest);
    ZSTD_freeDStream(file->zstd);
    buf_close(&file->part);
    buf_close(&file->kv);
    buf_close(&file->rest);
    free(file->snapshot);
    gather_close(&file->gather);
    free(file);
}
