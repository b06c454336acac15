/* memory_file.c - see memory_file.h. */
#include "proto/memory_file.h"

#include <cjson/cJSON.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/base/hash.h"
#include "proto/json.h"

#define MAGIC 0x50424d52u /* "RMBP" */
#define COUNT_MAX ((uint64_t)1 << 53)

/* ---- the manifest ---- */

static void append_text(struct buf *out, const char *text)
{
    json_append_string(out, text, strlen(text));
}

void memory_file_write_manifest(struct buf *out, const struct memory_file_manifest *m)
{
    buf_append_format(out, "{\"format\":%u,\"model\":", m->format);
    append_text(out, m->model);
    buf_append_format(
        out,
        ",\"fingerprint\":\"%016" PRIx64 "\",\"chunk_tokens\":%u,\"kv_bytes\":%" PRIu64
        ",\"landmark_bytes\":%" PRIu64 ",\"token_count\":%" PRIu64,
        m->fingerprint, m->chunk_tokens, m->kv_bytes, m->landmark_bytes, m->token_count);
    buf_append_format(out,
                      ",\"text_bytes\":%" PRIu64 ",\"snapshot_bytes\":%" PRIu64
                      ",\"turn_count\":%" PRIu64 ",\"created_at\":%" PRId64 ",\"metadata\":%s}",
                      m->text_bytes, m->snapshot_bytes, m->turn_count, m->created_at, m->metadata);
}

static uint64_t read_count(struct json_fields *f, const char *name, uint64_t max)
{
    uint64_t value = UINT64_MAX;
    json_read_count(f, name, 0, max, &value);
    if (!f->status && value == UINT64_MAX)
        json_fail(f, STATUS_INVALID, name, "is missing");
    return value;
}

static void read_fields(struct json_fields *f, struct memory_file_manifest *m)
{
    char fingerprint[32] = "", *end;
    m->format = (uint32_t)read_count(f, "format", UINT32_MAX);
    if (f->status)
        return;
    if (m->format > MEMORY_FILE_FORMAT) { /* it may hold more than we know */
        f->status = error_set(f->err, STATUS_UNSUPPORTED,
                              "the file has format %u, which is newer than this program's (%d)",
                              m->format, MEMORY_FILE_FORMAT);
        return;
    }
    m->chunk_tokens = (uint32_t)read_count(f, "chunk_tokens", UINT32_MAX);
    m->kv_bytes = read_count(f, "kv_bytes", COUNT_MAX);
    m->landmark_bytes = read_count(f, "landmark_bytes", COUNT_MAX);
    m->token_count = read_count(f, "token_count", COUNT_MAX);
    m->text_bytes = read_count(f, "text_bytes", COUNT_MAX);
    m->snapshot_bytes = read_count(f, "snapshot_bytes", COUNT_MAX);
    m->turn_count = m->format < 2 ? 0 : read_count(f, "turn_count", COUNT_MAX);
    m->created_at = (int64_t)read_count(f, "created_at", COUNT_MAX);
    json_read_text(f, "model", m->model, sizeof m->model);
    json_read_text(f, "fingerprint", fingerprint, sizeof fingerprint);
    m->fingerprint = strtoull(fingerprint, &end, 16);
    if (!f->status && (*end || end != fingerprint + 16))
        json_fail(f, STATUS_INVALID, "fingerprint", "must be 16 hexadecimal digits");
    const cJSON *metadata = cJSON_GetObjectItemCaseSensitive(f->root, "metadata");
    if (!f->status && !cJSON_IsObject(metadata))
        json_fail(f, STATUS_INVALID, "metadata", "must be an object");
    if (f->status)
        return;
    m->metadata = cJSON_PrintUnformatted(metadata);
    if (!m->metadata)
        f->status = error_set(f->err, STATUS_NO_MEMORY, "out of memory");
}

enum status memory_file_read_manifest(const char *json, size_t size,
                                      struct memory_file_manifest *manifest, struct error *err)
{
    cJSON *root;
    *manifest = (struct memory_file_manifest){0};
    enum status status = json_parse_object(json, size, &root, err);
    if (!status) {
        struct json_fields f = {.root = root, .err = err};
        read_fields(&f, manifest);
        status = f.status;
        cJSON_Delete(root);
    }
    return status == STATUS_INVALID ? STATUS_CORRUPT : status;
}

uint64_t memory_file_batch(const struct memory_file_manifest *m)
{
    uint64_t most = m->chunk_tokens * sizeof(int32_t);
    most = m->kv_bytes > most ? m->kv_bytes : most;
    most = m->landmark_bytes > most ? m->landmark_bytes : most;
    return most < MEMORY_FILE_PART_BYTES ? MEMORY_FILE_PART_BYTES / most : 1;
}

void memory_file_manifest_close(struct memory_file_manifest *manifest)
{
    cJSON_free(manifest->metadata);
    manifest->metadata = NULL;
}

/* ---- parts: u32 magic, u32 kind, u64 number, first, count, bytes, checksum; little-endian ---- */

static void write_u64(unsigned char *p, uint64_t x)
{
    for (int i = 0; i < 8; i++)
        p[i] = (unsigned char)(x >> (8 * i));
}

static uint64_t read_u64(const unsigned char *p)
{
    uint64_t x = 0;
    for (int i = 0; i < 8; i++)
        x |= (uint64_t)p[i] << (8 * i);
    return x;
}

void memory_file_write_turn(unsigned char out[MEMORY_FILE_TURN_BYTES],
                            const struct memory_file_turn *turn)
{
    write_u64(out, turn->position);
    write_u64(out + 8, turn->text_bytes);
    write_u64(out + 16, (uint64_t)turn->created_at);
    memcpy(out + 24, turn->bookmark, sizeof turn->bookmark);
}

enum status memory_file_read_turn(const unsigned char *bytes, struct memory_file_turn *turn)
{
    turn->position = read_u64(bytes);
    turn->text_bytes = read_u64(bytes + 8);
    turn->created_at = (int64_t)read_u64(bytes + 16);
    memcpy(turn->bookmark, bytes + 24, sizeof turn->bookmark);
    const size_t length = strnlen(turn->bookmark, sizeof turn->bookmark);
    for (size_t i = length; i < sizeof turn->bookmark; i++) /* one text has one encoding */
        if (turn->bookmark[i])
            return STATUS_CORRUPT;
    return length < sizeof turn->bookmark && json_is_utf8(turn->bookmark, length) ? STATUS_OK
                                                                                  : STATUS_CORRUPT;
}

static void write_fields(unsigned char *out, const struct memory_file_part *part)
{
    write_u64(out, MAGIC | (uint64_t)part->kind << 32);
    write_u64(out + 8, part->number);
    write_u64(out + 16, part->first);
    write_u64(out + 24, part->count);
    write_u64(out + 32, part->bytes);
}

static uint64_t checksum(const unsigned char *header, const void *payload, uint64_t bytes,
                         uint64_t seed)
{
    return hash64(payload, (size_t)bytes, hash64(header, MEMORY_FILE_HEADER_BYTES - 8, seed));
}

void memory_file_write_header(unsigned char out[MEMORY_FILE_HEADER_BYTES],
                              struct memory_file_part *part, const void *payload, uint64_t seed)
{
    write_fields(out, part);
    part->checksum = checksum(out, payload, part->bytes, seed);
    write_u64(out + 40, part->checksum);
}

enum status memory_file_read_header(const unsigned char *bytes, struct memory_file_part *part)
{
    const uint64_t first = read_u64(bytes);
    if ((uint32_t)first != MAGIC || first >> 32 < MEMORY_FILE_MANIFEST ||
        first >> 32 > MEMORY_FILE_TURNS)
        return STATUS_CORRUPT;
    *part = (struct memory_file_part){.kind = (enum memory_file_kind)(first >> 32),
                                      .number = read_u64(bytes + 8),
                                      .first = read_u64(bytes + 16),
                                      .count = read_u64(bytes + 24),
                                      .bytes = read_u64(bytes + 32),
                                      .checksum = read_u64(bytes + 40)};
    return STATUS_OK;
}

enum status memory_file_check_part(const struct memory_file_part *part, const void *payload,
                                   uint64_t seed)
{
    unsigned char header[MEMORY_FILE_HEADER_BYTES];
    write_fields(header, part);
    return checksum(header, payload, part->bytes, seed) == part->checksum ? STATUS_OK
                                                                          : STATUS_CORRUPT;
}

void memory_file_name_part(const struct memory_file_part *part, char *out, size_t room)
{
    static const char *const names[] = {
        [MEMORY_FILE_MANIFEST] = "manifest",   [MEMORY_FILE_CHUNKS] = "chunks",
        [MEMORY_FILE_LANDMARKS] = "landmarks", [MEMORY_FILE_TOKENS] = "tokens",
        [MEMORY_FILE_SNAPSHOT] = "snapshot",   [MEMORY_FILE_END] = "end",
        [MEMORY_FILE_TURNS] = "turns"};
    if (part->count == 0)
        snprintf(out, room, "part %" PRIu64 " (%s)", part->number, names[part->kind]);
    else
        snprintf(out, room, "part %" PRIu64 " (%s %" PRIu64 " to %" PRIu64 ")", part->number,
                 names[part->kind], part->first, part->first + part->count - 1);
}
