#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "proto/memory_file.h"
#include "storage/gather.h"
#include "storage/store.h"

/* A memory's bytes are near random: more effort would find little more. */
#define ZSTD_LEVEL 1
#define WINDOW_LOG 20
#define TURNS_AT_ONCE 256

struct storage_export {
    struct storage *storage;
    struct gather gather;
    char fork[LIMITS_ID_BYTES]; /* an ephemeral fork, so that all it shares stays as it is */
    bool has_fork;
    struct memory_file_manifest manifest;
    struct storage_range *ranges;
    size_t range_count;
    ZSTD_CCtx *zstd;
    struct buf part; /* header and payload */
    uint64_t number, seed;
    enum memory_file_kind next;
    uint64_t chunk, batch, batch_chunks; /* next chunk; most chunks of a part; of this batch */
    void *snapshot;
    uint64_t snapshot_done;
    struct storage_turn *turns; /* newest first, as they were when it was opened */
    uint64_t turns_done;
};

/* The newest of the memory's turns; what becomes of them later does not show. */
static enum status read_turns(struct storage_export *file)
{
    uint64_t *count = &file->manifest.turn_count, from = UINT64_MAX;
    enum status status = STATUS_OK;
    for (bool more = true; more && !status && *count < LIMITS_EXPORT_TURNS;) {
        size_t got = 0;
        struct storage_turn *turns =
            realloc(file->turns, ((size_t)*count + TURNS_AT_ONCE) * sizeof *turns);
        if (!turns)
            return STATUS_NO_MEMORY;
        file->turns = turns;
        status = storage_turn_list(file->storage, file->fork, from, TURNS_AT_ONCE, turns + *count,
                                   &got, &more);
        *count += status ? 0 : got;
        more = more && got > 0;
        if (more)
            from = turns[*count - 1].position - 1;
    }
    return status;
}

static enum status open_fork(struct storage_export *file, const char *id)
{
    struct storage_memory memory, fork;
    struct storage_memory_options options = {.id = file->fork, .from = id, .ephemeral = true};
    enum status status = storage_memory_get(file->storage, id, &memory);
    if (status)
        return status;
    file->manifest.metadata = memory.metadata; /* taken */
    file->manifest.created_at = memory.created_at;
    gather_new_id(file->fork);
    status = gather_create(&file->gather, file->storage, &options);
    if (status)
        return status;
    file->has_fork = true;
    status = storage_memory_get(file->storage, file->fork, &fork);
    if (status)
        return status;
    storage_memory_close(&fork);
    file->manifest.token_count = fork.token_count;
    file->manifest.text_bytes = fork.text_bytes;
    file->manifest.snapshot_bytes = fork.snapshot_bytes;
    status = read_turns(file);
    return status ? status
                  : storage_lineage(file->storage, file->fork, &file->ranges, &file->range_count);
}

enum status storage_export_open(struct storage *storage, const char *id,
                                struct storage_export **out)
{
    struct storage_export *file = calloc(1, sizeof *file);
    if (!file)
        return STATUS_NO_MEMORY;
    file->storage = storage;
    gather_init(&file->gather);
    buf_init(&file->part);
    file->next = MEMORY_FILE_MANIFEST;
    file->manifest.format = MEMORY_FILE_FORMAT;
    enum status status = store_read_model(storage, &file->manifest);
    if (!status)
        status = open_fork(file, id);
    file->zstd = ZSTD_createCCtx();
    if (!status &&
        (!file->zstd ||
         ZSTD_isError(ZSTD_CCtx_setParameter(file->zstd, ZSTD_c_compressionLevel, ZSTD_LEVEL)) ||
         ZSTD_isError(ZSTD_CCtx_setParameter(file->zstd, ZSTD_c_windowLog, WINDOW_LOG)) ||
         ZSTD_isError(ZSTD_CCtx_setParameter(file->zstd, ZSTD_c_contentSizeFlag, 0)) ||
         ZSTD_isError(ZSTD_CCtx_setParameter(file->zstd, ZSTD_c_checksumFlag, 1))))
        status = STATUS_NO_MEMORY;
    file->batch = memory_file_batch(&file->manifest);
    if (status) {
        storage_export_close(file);
        return status;
    }
    *out = file;
    return STATUS_OK;
}

void storage_export_close(struct storage_export *file)
{
    if (file->has_fork)
        (void)!storage_memory_delete(file->storage, file->fork, NULL, NULL);
    memory_file_manifest_close(&file->manifest);
    ZSTD_freeCCtx(file->zstd);
    buf_close(&file->part);
    free(file->ranges);
    free(file->snapshot);
    free(file->turns);
    gather_close(&file->gather);
    free(file);
}

/* Room for a payload behind the header. */
static char *payload(struct storage_export *file, size_t bytes)
{
    file->part.size = 0;
    buf_reserve(&file->part, MEMORY_FILE_HEADER_BYTES + bytes);
    file->part.size = MEMORY_FILE_HEADER_BYTES + bytes;
    return file->part.data + MEMORY_FILE_HEADER_BYTES;
}

/* The range that holds a chunk, and how many of `count` from there on it holds too. */
static uint64_t branch_of(const struct storage_export *file, uint64_t chunk, uint64_t *count)
{
    size_t low = 0, high = file->range_count; /* the last range with first <= chunk */
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (file->ranges[middle].first <= chunk)
            low = middle;
        else
            high = middle;
    }
    if (low + 1 < file->range_count && file->ranges[low + 1].first - chunk < *count)
        *count = file->ranges[low + 1].first - chunk;
    return file->ranges[low].branch;
}

static enum status read_chunks(struct storage_export *file, uint64_t count, char *out)
{
    struct storage_read *reads = calloc((size_t)count, sizeof *reads);
    if (!reads)
        return STATUS_NO_MEMORY;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t one = 1;
        reads[i] = (struct storage_read){.branch = branch_of(file, file->chunk + i, &one),
                                         .index = file->chunk + i,
                                         .kv = out + i * file->manifest.kv_bytes};
    }
    enum status status = storage_read_chunks(file->storage, reads, (size_t)count);
    free(reads);
    return status;
}

static enum status read_landmarks(struct storage_export *file, uint64_t count, char *out)
{
    enum status status = STATUS_OK;
    for (uint64_t done = 0; !status && done < count;) {
        uint64_t n = count - done, branch = branch_of(file, file->chunk + done, &n);
        status = storage_read_landmarks(file->storage, branch, file->chunk + done, n,
                                        out + done * file->manifest.landmark_bytes);
        done += n;
    }
    return status;
}

/* Chunks, landmarks and tokens of the same stretch follow each other; the last tokens have no
 * chunk. */
static enum status next_stretch(struct storage_export *file, struct memory_file_part *part)
{
    const struct memory_file_manifest *m = &file->manifest;
    uint64_t left = m->token_count / m->chunk_tokens - file->chunk;
    enum status status = STATUS_OK;
    part->kind = file->next;
    part->first = file->chunk;
    if (file->next == MEMORY_FILE_CHUNKS) {
        part->count = file->batch_chunks = left < file->batch ? left : file->batch;
        status = read_chunks(file, part->count, payload(file, part->count * m->kv_bytes));
        file->next = MEMORY_FILE_LANDMARKS;
    } else if (file->next == MEMORY_FILE_LANDMARKS) {
        part->count = file->batch_chunks;
        status = read_landmarks(file, part->count, payload(file, part->count * m->landmark_bytes));
        file->next = MEMORY_FILE_TOKENS;
    } else {
        part->first = file->chunk * m->chunk_tokens;
        part->count = file->batch_chunks ? file->batch_chunks * m->chunk_tokens
                                         : m->token_count - part->first;
        void *out = payload(file, part->count * sizeof(int32_t));
        status =
            storage_read_marked(file->storage, file->fork, part->first, (size_t)part->count, out);
        file->chunk += file->batch_chunks;
        file->batch_chunks = 0;
        uint64_t end = part->first + part->count;
        file->next = file->chunk < m->token_count / m->chunk_tokens ? MEMORY_FILE_CHUNKS
                     : end < m->token_count                         ? MEMORY_FILE_TOKENS
                                                                    : MEMORY_FILE_SNAPSHOT;
    }
    return status;
}

static enum status next_snapshot(struct storage_export *file, struct memory_file_part *part)
{
    const uint64_t bytes = file->manifest.snapshot_bytes;
    if (!file->snapshot) {
        size_t size;
        uint64_t position;
        enum status status =
            storage_snapshot(file->storage, file->fork, &file->snapshot, &size, &position);
        if (status)
            return status == STATUS_NOT_FOUND ? STATUS_CORRUPT : status;
        if (size != bytes || position != file->manifest.token_count)
            return STATUS_CORRUPT;
    }
    part->kind = MEMORY_FILE_SNAPSHOT;
    part->first = file->snapshot_done;
    part->count =
        bytes - part->first < MEMORY_FILE_PART_BYTES ? bytes - part->first : MEMORY_FILE_PART_BYTES;
    memcpy(payload(file, (size_t)part->count), (char *)file->snapshot + part->first,
           (size_t)part->count);
    file->snapshot_done += part->count;
    if (file->snapshot_done == bytes)
        file->next = file->manifest.turn_count ? MEMORY_FILE_TURNS : MEMORY_FILE_END;
    return STATUS_OK;
}

static void next_turns(struct storage_export *file, struct memory_file_part *part)
{
    const uint64_t left = file->manifest.turn_count - file->turns_done;
    part->kind = MEMORY_FILE_TURNS;
    part->first = file->turns_done;
    part->count = left < MEMORY_FILE_PART_TURNS ? left : MEMORY_FILE_PART_TURNS;
    char *out = payload(file, (size_t)part->count * MEMORY_FILE_TURN_BYTES);
    for (uint64_t i = 0; i < part->count; i++) {
        const struct storage_turn *turn = &file->turns[file->turns_done + i];
        struct memory_file_turn written = {turn->position, turn->text_bytes, turn->created_at, ""};
        memcpy(written.bookmark, turn->bookmark, sizeof written.bookmark);
        memory_file_write_turn((unsigned char *)out + i * MEMORY_FILE_TURN_BYTES, &written);
    }
    file->turns_done += part->count;
    if (file->turns_done == file->manifest.turn_count)
        file->next = MEMORY_FILE_END;
}

static enum status next_part(struct storage_export *file, struct memory_file_part *part)
{
    const struct memory_file_manifest *m = &file->manifest;
    struct buf json;
    switch (file->next) {
    case MEMORY_FILE_MANIFEST:
        buf_init(&json);
        memory_file_write_manifest(&json, m);
        memcpy(payload(file, json.size), json.data, json.size);
        buf_close(&json);
        part->kind = MEMORY_FILE_MANIFEST;
        file->next = m->token_count >= m->chunk_tokens ? MEMORY_FILE_CHUNKS
                     : m->token_count                  ? MEMORY_FILE_TOKENS
                     : m->snapshot_bytes               ? MEMORY_FILE_SNAPSHOT
                                                       : MEMORY_FILE_END;
        return STATUS_OK;
    case MEMORY_FILE_CHUNKS:
    case MEMORY_FILE_LANDMARKS:
    case MEMORY_FILE_TOKENS:
        return next_stretch(file, part);
    case MEMORY_FILE_SNAPSHOT:
        return next_snapshot(file, part);
    case MEMORY_FILE_TURNS:
        next_turns(file, part);
        return STATUS_OK;
    case MEMORY_FILE_END:
        payload(file, 0);
        part->kind = MEMORY_FILE_END;
        return STATUS_OK;
    }
    return STATUS_INTERNAL;
}

enum status storage_export_next(struct storage_export *file, struct buf *out, bool *done)
{
    struct memory_file_part part = {.number = file->number};
    enum status status = next_part(file, &part);
    if (status)
        return status;
    part.bytes = file->part.size - MEMORY_FILE_HEADER_BYTES;
    memory_file_write_header((unsigned char *)file->part.data, &part,
                             file->part.data + MEMORY_FILE_HEADER_BYTES, file->seed);
    if (file->number++ == 0)
        file->seed = part.checksum;
    buf_reserve(out, ZSTD_compressBound(file->part.size));
    size_t size = ZSTD_compress2(file->zstd, out->data + out->size, out->capacity - out->size,
                                 file->part.data, file->part.size);
    if (ZSTD_isError(size))
        return STATUS_NO_MEMORY;
    out->size += size;
    *done = part.kind == MEMORY_FILE_END;
    return STATUS_OK;
}
