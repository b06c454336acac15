/* session.c - see session.h and engine.h. */
#include "engine/session.h"

#include <stdlib.h>
#include <string.h>

#include "engine/bf16.h"
#include "engine/engine_private.h"
#include "engine/packed.h"
#include "engine/ref/ref.h"
#include "proto/base/assert.h"

#define SNAPSHOT_MAGIC 0x31534d52u /* "RMS1" */

enum snapshot_version { SNAPSHOT_FULL = 1, SNAPSHOT_PACKED = 2, SNAPSHOT_BF16 = 3 };

/* Little-endian, as every machine that we build for is; then state, partial chunk, logits. */
struct snapshot_header {
    uint32_t magic, version;
    uint64_t fingerprint, position;
    uint32_t has_logits, reserved;
};

static size_t landmark_block_bytes(const struct engine *engine)
{
    return engine->info.landmark_bytes * OPS_LANDMARK_BLOCK;
}

static size_t partial_rows(const struct engine_session *session)
{
    return (size_t)(session->position % session->engine->config.chunk_tokens);
}

uint64_t session_branch_of(const struct engine_session *session, uint64_t index, uint64_t *end)
{
    size_t low = 0, high = session->range_count; /* the last range with first <= index */
    while (high - low > 1) {
        const size_t middle = low + (high - low) / 2;
        if (session->ranges[middle].first <= index)
            low = middle;
        else
            high = middle;
    }
    *end = high < session->range_count ? session->ranges[high].first : UINT64_MAX;
    return session->ranges[low].branch;
}

const float *session_logits(struct engine_session *session)
{
    const struct engine *engine = session->engine;
    if (session->away)
        engine->ops->copy(engine->context, session->logits, session->step_logits,
                          engine->config.vocab_size * sizeof(float));
    session->away = false;
    return session->logits;
}

static void set_block(struct engine_session *session, size_t at, struct memory_landmarks *block)
{
    session->blocks[at] = block;
    session->block_data[at] = block->data;
    session->narrow_data[at] = block->narrow;
}

/* Room for one block more in the session's arrays. */
static enum status reserve_block(struct engine_session *session)
{
    if (session->block_count == session->block_capacity) {
        const size_t capacity = session->block_capacity ? session->block_capacity * 2 : 8;
        struct memory_landmarks **blocks =
            realloc(session->blocks, capacity * sizeof *session->blocks);
        if (!blocks)
            return STATUS_NO_MEMORY;
        session->blocks = blocks;
        const void **data = realloc(session->block_data, capacity * sizeof *session->block_data);
        if (!data)
            return STATUS_NO_MEMORY;
        session->block_data = data;
        data = realloc(session->narrow_data, capacity * sizeof *session->narrow_data);
        if (!data)
            return STATUS_NO_MEMORY;
        session->narrow_data = data;
        session->block_capacity = capacity;
    }
    return STATUS_OK;
}

static enum status add_block(struct engine_session *session)
{
    struct engine *engine = session->engine;
    const enum status status = reserve_block(session);
    if (status)
        return status;
    struct memory_landmarks *block = memory_landmarks_take(&engine->memory);
    if (!block) {
        engine_must_work(engine);
        return STATUS_NO_MEMORY;
    }
    set_block(session, session->block_count++, block);
    return STATUS_OK;
}

void session_landmarks_written(struct engine_session *session, uint64_t first, uint64_t count)
{
    const struct engine *engine = session->engine;
    for (uint64_t end = first + count, next; engine->memory.narrow_bytes && first < end;
         first = next) {
        const struct memory_landmarks *block = session->blocks[first / OPS_LANDMARK_BLOCK];
        next = (first / OPS_LANDMARK_BLOCK + 1) * OPS_LANDMARK_BLOCK;
        next = next < end ? next : end;
        engine->ops->narrow_landmarks(engine->context, block->data,
                                      (uint32_t)(first % OPS_LANDMARK_BLOCK),
                                      (uint32_t)(next - first), block->narrow);
    }
}

enum status session_add_landmark(struct engine_session *session, void **landmark)
{
    if (session->chunk_count == session->block_count * (uint64_t)OPS_LANDMARK_BLOCK) {
        const enum status status = add_block(session);
        if (status)
            return status;
    }
    const uint64_t at = session->chunk_count++;
    *landmark = (char *)session->blocks[at / OPS_LANDMARK_BLOCK]->data +
                at % OPS_LANDMARK_BLOCK * session->engine->info.landmark_bytes;
    return STATUS_OK;
}

/* An empty session with its memory; destroyed with engine_session_destroy. */
static struct engine_session *make(struct engine *engine, const struct chunk_range *ranges,
                                   size_t range_count)
{
    const struct model_config *c = &engine->config;
    struct engine_session *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    s->engine = engine;
    list_push_back(&engine->sessions, &s->node);
    s->ranges = calloc(range_count, sizeof *s->ranges);
    s->state = engine->ops->alloc(engine->context, engine->state_bytes);
    s->layers = calloc(c->mamba_count, sizeof *s->layers);
    s->partial =
        engine->ops->alloc(engine->context, sizeof *s->partial * c->chunk_tokens * c->hidden_size);
    s->logits = calloc(c->vocab_size, sizeof *s->logits);
    if (engine->ops->step_begin)
        s->step_logits = engine->ops->alloc(engine->context, c->vocab_size * sizeof(float));
    const size_t picks = (size_t)c->group_count * c->retrieval_heads * c->topk;
    if (engine->ops->prefetch)
        s->last_picks = malloc(picks * sizeof *s->last_picks);
    for (size_t i = 0; s->last_picks && i < picks; i++)
        s->last_picks[i] = SESSION_NO_PICK;
    if (!s->ranges || !s->state || !s->layers || !s->partial || !s->logits ||
        (engine->ops->step_begin && !s->step_logits) || (engine->ops->prefetch && !s->last_picks)) {
        engine_must_work(engine); /* what a broken device lacks is not a request's failure */
        engine_session_destroy(s);
        return NULL;
    }
    memcpy(s->ranges, ranges, range_count * sizeof *ranges);
    s->range_count = range_count;
    float *at = s->state;
    for (uint32_t i = 0; i < c->mamba_count; i++) {
        s->layers[i].ssm = at;
        at += engine_ssm_bytes(engine, engine->states_bf16) / sizeof *at;
        s->layers[i].conv = at;
        at += engine_conv_numbers(engine);
    }
    return s;
}

/* ---- snapshots ---- */

static enum snapshot_version version_of(const struct engine_session *session)
{
    return session->engine->states_bf16 ? SNAPSHOT_BF16
           : session->rounded           ? SNAPSHOT_PACKED
                                        : SNAPSHOT_FULL;
}

/* Of the state in a snapshot, whatever the engine's own are. */
static size_t state_bytes(const struct engine *engine, enum snapshot_version version)
{
    return version == SNAPSHOT_PACKED ? packed_bytes(engine->state_numbers)
                                      : engine_state_bytes(engine, version == SNAPSHOT_BF16);
}

static size_t snapshot_bytes(const struct engine_session *session, enum snapshot_version version)
{
    const struct model_config *c = &session->engine->config;
    return sizeof(struct snapshot_header) + state_bytes(session->engine, version) +
           sizeof(float) *
               (partial_rows(session) * c->hidden_size + (session->has_logits ? c->vocab_size : 0));
}

/* Copies a block's unused rest from or to a snapshot, moving the cursor on. */
static void take(const struct engine *engine, void *to, const char **from, size_t bytes)
{
    engine->ops->copy(engine->context, to, *from, bytes);
    *from += bytes;
}

/* The same with a packed state. */
static void take_packed(struct engine_session *s, const char **from)
{
    struct engine *engine = s->engine;
    take(engine, engine->packed, from, packed_bytes(engine->state_numbers));
    engine->ops->unpack_state(engine->context, engine->packed, engine->state_numbers, s->state);
    engine->packed_of = s;
}

/* One of the other type, as an engine with that option left it: host memory, of no alignment. */
static enum status take_other(struct engine_session *s, enum snapshot_version version,
                              const char **from)
{
    const struct engine *engine = s->engine;
    const bool bf16 = engine->states_bf16;
    const size_t conv = engine_conv_numbers(engine) * sizeof(float);
    float *other = malloc(engine->state_numbers * sizeof *other);
    char *state = malloc(engine->state_bytes);
    if (!other || !state) {
        free(other);
        free(state);
        return STATUS_NO_MEMORY;
    }
    if (version == SNAPSHOT_PACKED)
        ref_unpack_state(NULL, *from, engine->state_numbers, other);
    else
        memcpy(other, *from, state_bytes(engine, version));
    const char *at = (const char *)other;
    char *to = state;
    for (uint32_t layer = 0; layer < engine->config.mamba_count; layer++) {
        for (size_t i = 0; i < engine_ssm_numbers(engine); i++) {
            if (bf16)
                ((uint16_t *)(void *)to)[i] = bf16_from_float(((const float *)(const void *)at)[i]);
            else
                ((float *)(void *)to)[i] = bf16_to_float(((const uint16_t *)(const void *)at)[i]);
        }
        to += engine_ssm_bytes(engine, bf16);
        at += engine_ssm_bytes(engine, !bf16);
        memcpy(to, at, conv);
        to += conv;
        at += conv;
    }
    engine->ops->copy(engine->context, s->state, state, engine->state_bytes);
    *from += state_bytes(engine, version);
    free(other);
    free(state);
    return STATUS_OK;
}

static enum status restore(struct engine_session *s, const void *snapshot, size_t size,
                           struct error *err)
{
    struct engine *engine = s->engine;
    const struct model_config *c = &engine->config;
    struct snapshot_header header;
    if (size < sizeof header)
        return error_set(err, STATUS_CORRUPT, "the snapshot is cut off");
    memcpy(&header, snapshot, sizeof header);
    if (header.magic != SNAPSHOT_MAGIC || header.version < SNAPSHOT_FULL ||
        header.version > SNAPSHOT_BF16)
        return error_set(err, STATUS_CORRUPT, "not a snapshot of this version");
    if (header.fingerprint != engine->info.fingerprint)
        return error_set(err, STATUS_MISMATCH,
                         "the snapshot was made by another model (%016llx, this is %016llx)",
                         (unsigned long long)header.fingerprint,
                         (unsigned long long)engine->info.fingerprint);
    s->position = header.position;
    s->has_logits = header.has_logits != 0;
    const enum snapshot_version version = header.version;
    if (size != snapshot_bytes(s, version))
        return error_set(err, STATUS_CORRUPT, "the snapshot has the wrong size");
    const char *from = (const char *)snapshot + sizeof header;
    enum status status = STATUS_OK;
    if (engine->states_bf16 != (version == SNAPSHOT_BF16))
        status = take_other(s, version, &from);
    else if (version == SNAPSHOT_PACKED)
        take_packed(s, &from);
    else
        take(engine, s->state, &from, engine->state_bytes);
    if (status)
        return error_set(err, status, "out of memory for a snapshot");
    s->rounded = engine->states_bf16 || version == SNAPSHOT_PACKED;
    take(engine, s->partial, &from, partial_rows(s) * c->hidden_size * sizeof *s->partial);
    if (s->has_logits)
        memcpy(s->logits, from, c->vocab_size * sizeof *s->logits);
    return STATUS_OK;
}

/* Reads the landmarks of every chunk before the position, block by block; `host` holds one. */
static enum status read_landmarks(struct engine_session *s, void *host)
{
    const struct engine *engine = s->engine;
    const uint64_t total = s->position / engine->config.chunk_tokens;
    while (s->chunk_count < total) {
        const uint64_t at = s->chunk_count;
        const uint64_t block_end = (at / OPS_LANDMARK_BLOCK + 1) * OPS_LANDMARK_BLOCK;
        uint64_t end;
        const uint64_t branch = session_branch_of(s, at, &end);
        end = end < total ? end : total;
        end = end < block_end ? end : block_end;
        void *to;
        enum status status = session_add_landmark(s, &to);
        if (!status)
            status = engine->io.read_landmarks(engine->io.context, branch, at, end - at, host);
        if (status)
            return status;
        engine->ops->copy(engine->context, to, host, (end - at) * engine->info.landmark_bytes);
        session_landmarks_written(s, at, end - at);
        s->chunk_count = end;
    }
    return STATUS_OK;
}

enum status engine_session_create(struct engine *engine, const struct chunk_range *ranges,
                                  size_t range_count, const void *snapshot, size_t snapshot_bytes,
                                  struct engine_session **out, struct error *err)
{
    ASSERT(range_count);
    struct engine_session *s = make(engine, ranges, range_count);
    if (!s)
        return error_set(err, STATUS_NO_MEMORY, "out of memory for a session");
    enum status status = STATUS_OK;
    if (snapshot)
        status = restore(s, snapshot, snapshot_bytes, err);
    if (!status) {
        void *host = malloc(landmark_block_bytes(engine));
        status = host ? read_landmarks(s, host) : STATUS_NO_MEMORY;
        free(host);
        if (status)
            error_set(err, status, "the memory's landmarks cannot be read: %s",
                      status_text(status));
    }
    engine_must_work(engine);
    if (status)
        engine_session_destroy(s);
    else
        *out = s;
    return status;
}

enum status engine_session_fork(const struct engine_session *session, uint64_t branch,
                                struct engine_session **out)
{
    struct engine *engine = session->engine;
    const struct model_config *c = &engine->config;
    struct chunk_range *ranges = calloc(session->range_count + 1, sizeof *ranges);
    if (!ranges)
        return STATUS_NO_MEMORY;
    memcpy(ranges, session->ranges, session->range_count * sizeof *ranges);
    ranges[session->range_count] =
        (struct chunk_range){.branch = branch, .first = session->chunk_count};
    struct engine_session *s = make(engine, ranges, session->range_count + 1);
    free(ranges);
    if (!s)
        return STATUS_NO_MEMORY;
    s->position = session->position;
    s->failed = session->failed;
    s->rounded = session->rounded;
    engine->ops->copy(engine->context, s->state, session->state, engine->state_bytes);
    engine->ops->copy(engine->context, s->partial, session->partial,
                      partial_rows(session) * c->hidden_size * sizeof *s->partial);
    s->has_logits = session->has_logits;
    engine->ops->copy(engine->context, s->logits,
                      session->away ? session->step_logits : session->logits,
                      c->vocab_size * sizeof *s->logits);
    /* Full blocks never change again and are shared; the last one is still written to. */
    for (size_t i = 0; i < session->block_count; i++) {
        const bool full = (i + 1) * (uint64_t)OPS_LANDMARK_BLOCK <= session->chunk_count;
        if (full ? reserve_block(s) : add_block(s)) {
            engine_session_destroy(s);
            return STATUS_NO_MEMORY;
        }
        if (full) {
            set_block(s, s->block_count++, session->blocks[i]);
            s->blocks[i]->references++;
        } else {
            engine->ops->copy(engine->context, s->blocks[i]->data, session->blocks[i]->data,
                              landmark_block_bytes(engine));
            if (s->blocks[i]->narrow)
                engine->ops->copy(engine->context, s->blocks[i]->narrow, session->blocks[i]->narrow,
                                  engine->memory.narrow_bytes);
        }
    }
    s->chunk_count = session->chunk_count;
    engine_must_work(engine);
    *out = s;
    return STATUS_OK;
}

void engine_session_destroy(struct engine_session *session)
{
    struct engine *engine = session->engine;
    if (engine->packed_of == session)
        engine->packed_of = NULL;
    list_remove(&session->node);
    for (size_t i = 0; i < session->block_count; i++)
        memory_landmarks_drop(&engine->memory, session->blocks[i]);
    free(session->blocks);
    free(session->block_data);
    free(session->narrow_data);
    free(session->ranges);
    free(session->layers);
    free(session->logits);
    free(session->last_picks);
    if (session->state)
        engine->ops->release(engine->context, session->state);
    if (session->partial)
        engine->ops->release(engine->context, session->partial);
    if (session->step_logits)
        engine->ops->release(engine->context, session->step_logits);
    free(session);
}

void engine_session_forget(struct engine_session *session, uint64_t first)
{
    const struct chunk_range *own = &session->ranges[session->range_count - 1];
    const uint64_t from = first > own->first ? first : own->first;
    for (uint64_t i = from; i < session->chunk_count; i++)
        memory_forget(&session->engine->memory, (struct chunk_key){own->branch, i});
}

uint64_t engine_session_position(const struct engine_session *session)
{
    return session->position;
}

static size_t session_bytes(const struct engine *engine, size_t block_count)
{
    const struct model_config *c = &engine->config;
    return sizeof(struct engine_session) + engine->state_bytes +
           sizeof(float) * (c->vocab_size + (size_t)c->chunk_tokens * c->hidden_size) +
           block_count * (landmark_block_bytes(engine) + engine->memory.narrow_bytes);
}

size_t engine_session_bytes(const struct engine_session *session)
{
    return session_bytes(session->engine, session->block_count);
}

size_t engine_session_bytes_at(const struct engine *engine, uint64_t tokens)
{
    const uint64_t chunks = tokens / engine->config.chunk_tokens;
    return session_bytes(engine, (size_t)((chunks + OPS_LANDMARK_BLOCK - 1) / OPS_LANDMARK_BLOCK));
}

bool engine_session_has_logits(const struct engine_session *session)
{
    return session->has_logits;
}

/* Rounds the state, or packs what is rounded, which stays as it is. */
static void pack(const struct engine_session *session)
{
    struct engine *engine = session->engine;
    if (!session->rounded || engine->packed_of != session)
        engine->ops->pack_state(engine->context, session->state, engine->state_numbers,
                                engine->packed);
    engine->packed_of = session;
}

void engine_session_round(struct engine_session *session)
{
    if (!session->rounded && !session->engine->states_bf16)
        pack(session);
    session->rounded = true;
}

bool engine_session_is_rounded(const struct engine_session *session)
{
    return session->rounded;
}

size_t engine_session_snapshot_bytes(const struct engine_session *session)
{
    return snapshot_bytes(session, version_of(session));
}

size_t engine_snapshot_bytes_most(const struct engine *engine)
{
    const struct model_config *c = &engine->config;
    return sizeof(struct snapshot_header) +
           sizeof(float) *
               (engine->state_numbers + (size_t)c->chunk_tokens * c->hidden_size + c->vocab_size);
}

void engine_session_snapshot(const struct engine_session *session, void *out)
{
    const struct engine *engine = session->engine;
    const struct model_config *c = &engine->config;
    const enum snapshot_version version = version_of(session);
    const struct snapshot_header header = {.magic = SNAPSHOT_MAGIC,
                                           .version = version,
                                           .fingerprint = engine->info.fingerprint,
                                           .position = session->position,
                                           .has_logits = session->has_logits};
    char *to = out;
    memcpy(to, &header, sizeof header);
    to += sizeof header;
    const bool packed = version == SNAPSHOT_PACKED;
    if (packed)
        pack(session);
    size_t bytes = state_bytes(engine, version);
    engine->ops->copy(engine->context, to, packed ? engine->packed : session->state, bytes);
    to += bytes;
    bytes = partial_rows(session) * c->hidden_size * sizeof(float);
    engine->ops->copy(engine->context, to, session->partial, bytes);
    to += bytes;
    if (session->has_logits)
        engine->ops->copy(engine->context, to,
                          session->away ? session->step_logits : session->logits,
                          c->vocab_size * sizeof(float));
    engine_must_work(engine);
}
