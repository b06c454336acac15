/* engine.c - see engine.h: opening a model, stepping a batch. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/engine_private.h"
#include "engine/packed.h"
#include "proto/base/assert.h"
#include "proto/base/hash.h"
#include "proto/base/log.h"

static enum status read_config(const char *folder, struct model_config *config, struct error *err)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/config.json", folder);
    FILE *file = fopen(path, "rbe");
    if (!file)
        return error_set(err, errno == ENOENT ? STATUS_NOT_FOUND : STATUS_IO,
                         "%s: %s; a model folder holds config.json, model.safetensors and "
                         "tokenizer.json",
                         path, strerror(errno));
    char text[65536];
    const size_t size = fread(text, 1, sizeof text, file);
    const bool whole = feof(file) && !ferror(file);
    fclose(file);
    if (!whole)
        return error_set(err, STATUS_INVALID, "%s: unreadable or over 64 KiB", path);
    return model_config_parse(text, size, config, err);
}

/* The CUDA backend's table; NULL where this build has none. */
static const struct ops *cuda_table(void)
{
#ifdef RAMBAD_CUDA
    return ops_cuda();
#else
    return NULL;
#endif
}

/* Rows of a step: a slice of each of few sequences, or one of each. */
static uint32_t max_rows(const struct engine *engine)
{
    return engine->info.slice_tokens + engine->info.running_max;
}

static enum status open_ops(struct engine *engine, const struct engine_options *options,
                            const struct ops *table, uint32_t slice, struct error *err)
{
    uint32_t threads = options->threads;
    if (!threads) {
        const long online = sysconf(_SC_NPROCESSORS_ONLN);
        threads = online > 0 ? (uint32_t)online : 1;
    }
    engine->info.slice_tokens = options->slice_tokens ? options->slice_tokens : slice;
    const struct ops_options ops = {.config = &engine->config,
                                    .threads = threads,
                                    .max_rows = max_rows(engine),
                                    .memory_dtype = engine->memory_dtype,
                                    .device_memory_bytes = options->device_memory_bytes,
                                    .landmarks_fp8 = options->landmarks_fp8,
                                    .states_bf16 = options->states_bf16};
    engine->ops = table;
    return table->open(&ops, &engine->context, err);
}

static enum status open_backend(struct engine *engine, const struct engine_options *options,
                                struct error *err)
{
    const enum engine_backend backend = options->backend;
    if (cuda_table() && (backend == ENGINE_BACKEND_CUDA || backend == ENGINE_BACKEND_AUTO)) {
        const enum status status =
            open_ops(engine, options, cuda_table(), LIMITS_SLICE_TOKENS_GPU, err);
        if (status != STATUS_UNSUPPORTED || backend == ENGINE_BACKEND_CUDA)
            return status;
        log_event(LOG_INFO, "cuda_unused", "reason", LOG_STR, err ? err->message : NULL, NULL);
    } else if (backend == ENGINE_BACKEND_CUDA) {
        return error_set(err, STATUS_UNSUPPORTED,
                         "this build has no CUDA backend; use --backend cpu");
    }
    if (options->landmarks_fp8)
        return error_set(err, STATUS_UNSUPPORTED, "landmarks in fp8 need the CUDA backend");
    return open_ops(engine, options, backend == ENGINE_BACKEND_REF ? ops_ref() : ops_cpu(),
                    LIMITS_SLICE_TOKENS, err);
}

/* Takes the weights to the backend's own memory, where it has some. */
static enum status place_weights(struct engine *engine, struct error *err)
{
    return engine->ops->place ? weights_place(&engine->weights, &engine->config, engine->context,
                                              err, engine->ops->place)
                              : STATUS_OK;
}

static enum status open_tokenizer(struct engine *engine, const struct engine_options *options,
                                  struct error *err)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/tokenizer.json", options->model_path);
    const enum status status = tokenizer_open(path, &engine->tokenizer, err);
    if (status == STATUS_NOT_FOUND && options->random_weights_seed)
        return STATUS_OK; /* a shape to measure, with no words to say */
    if (status)
        return status;
    if (tokenizer_vocab_size(engine->tokenizer) > (int32_t)engine->config.vocab_size)
        return error_set(err, STATUS_INVALID,
                         "tokenizer.json has %d tokens, config.json's vocab_size is %u",
                         tokenizer_vocab_size(engine->tokenizer), engine->config.vocab_size);
    return STATUS_OK;
}

static void fill_info(struct engine *engine, const struct engine_options *options)
{
    const struct model_config *c = &engine->config;
    struct engine_info *info = &engine->info;
    const size_t element = engine->memory_dtype == OPS_FP32 ? 4 : 2;
    const char *path = options->model_path;
    size_t end = strlen(path);
    while (end > 1 && path[end - 1] == '/')
        end--;
    size_t begin = end;
    while (begin && path[begin - 1] != '/')
        begin--;
    snprintf(engine->model_name, sizeof engine->model_name, "%.*s", (int)(end - begin),
             path + begin);
    info->config = c;
    info->model_name = engine->model_name;
    info->fingerprint = hash64(c, sizeof *c, engine->weights.hash + element);
    info->kv_bytes = (size_t)2 * c->chunk_tokens * c->kv_heads * c->head_dim * element;
    info->landmark_bytes = c->retrieval_dim * element;
    info->weight_bytes = engine->weights.bytes;
    info->running_max = options->running_max ? options->running_max : LIMITS_RUNNING;
    info->head_count = c->retrieval_heads;
    info->group_count = c->group_count;
    engine->states_bf16 = options->states_bf16;
    engine->state_numbers =
        c->mamba_count * (engine_ssm_numbers(engine) + engine_conv_numbers(engine));
    engine->state_bytes = engine_state_bytes(engine, engine->states_bf16);
}

static enum status open_pages(struct engine *engine, const struct engine_options *options,
                              struct error *err)
{
    const struct model_config *c = &engine->config;
    /* One row's picks, and what a step may complete twice over: while it waits for the disk. */
    const size_t least = (size_t)c->retrieval_heads * c->topk +
                         2 * (max_rows(engine) / c->chunk_tokens + engine->info.running_max + 1);
    const size_t budget = options->host_memory_bytes, pages = budget / engine->info.kv_bytes;
    if (pages < least)
        return error_set(err, STATUS_INVALID,
                         "the host memory budget of %zu bytes is too small: this model needs at "
                         "least %zu (%zu pages of %zu bytes)",
                         budget, least * engine->info.kv_bytes, least, engine->info.kv_bytes);
    const enum status status =
        memory_open(&engine->memory, engine->ops, engine->context, engine->info.kv_bytes, pages,
                    engine->info.landmark_bytes * OPS_LANDMARK_BLOCK,
                    options->landmarks_fp8 ? engine->ops->narrow_bytes(engine->context) : 0);
    return status ? error_set(err, status, "out of memory for the page table") : STATUS_OK;
}

enum status engine_open(const struct engine_options *options, struct engine **out,
                        struct error *err)
{
    struct engine *engine = calloc(1, sizeof *engine);
    if (!engine)
        return error_set(err, STATUS_NO_MEMORY, "out of memory");
    list_init(&engine->sessions);
    pthread_mutex_init(&engine->stats_lock, NULL);
    engine->io = options->io;
    engine->memory_dtype = options->memory_dtype == ENGINE_DTYPE_FP32 ? OPS_FP32 : OPS_BF16;
    enum status status = read_config(options->model_path, &engine->config, err);
    if (!status)
        status = weights_open(options->model_path, &engine->config, options->random_weights_seed,
                              &engine->weights, err);
    if (!status)
        status = open_tokenizer(engine, options, err);
    if (status)
        goto out;
    fill_info(engine, options);
    status = open_backend(engine, options, err);
    if (status)
        goto out;
    engine->info.backend = engine->ops->describe(engine->context);
    status = place_weights(engine, err);
    if (status)
        goto out;
    status = open_pages(engine, options, err);
    if (!status) {
        status = model_create(engine, max_rows(engine), &engine->model);
        if (status)
            error_set(err, status, "out of memory for activations");
    }
    if (!status && !engine->states_bf16) {
        engine->packed = engine->ops->alloc(engine->context, packed_bytes(engine->state_numbers));
        if (!engine->packed)
            status = error_set(err, STATUS_NO_MEMORY, "out of memory for snapshots");
    }
out:
    if (status)
        engine_close(engine);
    else
        *out = engine;
    return status;
}

void engine_close(struct engine *engine)
{
    ASSERT(list_empty(&engine->sessions));
    if (engine->context) {
        model_destroy(engine, engine->model);
        if (engine->memory.table)
            memory_close(&engine->memory);
        if (engine->packed)
            engine->ops->release(engine->context, engine->packed);
        engine->ops->close(engine->context);
    }
    if (engine->tokenizer)
        tokenizer_close(engine->tokenizer);
    if (engine->weights.mapped)
        weights_close(&engine->weights);
    pthread_mutex_destroy(&engine->stats_lock);
    free(engine->running);
    free(engine->noted);
    free(engine->picks);
    free(engine);
}

void engine_set_io(struct engine *engine, const struct chunk_io *io)
{
    ASSERT(list_empty(&engine->sessions));
    engine->io = *io;
}

const struct engine_info *engine_get_info(const struct engine *engine)
{
    return &engine->info;
}

const struct tokenizer *engine_tokenizer(const struct engine *engine)
{
    return engine->tokenizer;
}

/* ---- the step ---- */

/* What a step's chunks find room in. */
struct room {
    size_t io, pages, chunks;
};

/* Whether the item's chunks will find room; counts what it takes. */
static enum status admit(const struct engine *engine, const struct engine_session *session,
                         uint32_t token_count, struct room *room)
{
    const uint64_t s = engine->config.chunk_tokens;
    const size_t chunks = (size_t)((session->position % s + token_count) / s);
    const size_t row = (size_t)engine->config.retrieval_heads * engine->config.topk;
    if (session->failed)
        return session->failed;
    if (chunks > room->io || chunks + row > room->pages || chunks > room->chunks)
        return STATUS_BUSY;
    room->io -= chunks;
    room->pages -= chunks;
    room->chunks -= chunks;
    return STATUS_OK;
}

static void publish_stats(struct engine *engine)
{
    struct engine_stats *s = &engine->counted;
    s->page_hits = engine->memory.hits;
    s->page_misses = engine->memory.misses;
    s->pages_expected = engine->memory.expected;
    s->pages_expected_hits = engine->memory.expected_hits;
    s->page_evictions = engine->memory.evictions;
    s->page_read_bytes = engine->memory.read_bytes;
    s->page_read_ns = engine->memory.read_ns;
    s->pages_resident = engine->memory.allocated;
    s->pages_pinned = engine->memory.pinned;
    s->page_capacity = engine->memory.capacity;
    s->landmark_bytes = engine->memory.landmark_bytes;
    if (engine->ops->page_stats) {
        const struct ops_page_stats device = engine->ops->page_stats(engine->context);
        s->device_page_capacity = device.capacity;
        s->device_pages = device.resident;
        s->device_page_hits = device.hits;
        s->device_page_misses = device.misses;
        s->device_copy_bytes = (device.misses + device.predicted) * engine->memory.kv_bytes;
        s->device_copy_ns = device.copy_ns;
        s->device_pages_expected = device.predicted;
        s->device_pages_expected_hits = device.predicted_hits;
    }
    pthread_mutex_lock(&engine->stats_lock);
    engine->stats = *s;
    pthread_mutex_unlock(&engine->stats_lock);
}

void engine_must_work(const struct engine *engine)
{
    struct error err;
    if (!engine->ops->check || !engine->ops->check(engine->context, &err))
        return;
    log_event(LOG_ERROR, "engine_broken", "message", LOG_STR, err.message, "action", LOG_STR,
              "the daemon ends here; start it again: memories come back from disk", NULL);
    _exit(EXIT_FAILURE);
}

static void sample(struct engine_step_item *item)
{
    if (item->status || !item->sampler)
        return;
    if (item->session->drawn)
        sampler_accept(item->sampler, item->session->token, &item->result);
    else if (item->session->away && sampler_takes_largest(item->sampler))
        sampler_accept(item->sampler, item->session->largest, &item->result);
    else
        sampler_sample(item->sampler, session_logits(item->session), &item->result);
    item->session->drawn = false;
}

enum status engine_step(struct engine *engine, struct engine_step_item *items, size_t count)
{
    size_t rows = 0;
    for (size_t i = 0; i < count; i++)
        rows += items[i].token_count;
    if (rows > (size_t)engine->info.slice_tokens + engine->info.running_max)
        return STATUS_INVALID;
    if (count > engine->running_capacity) {
        struct model_item *grown = realloc(engine->running, count * sizeof *grown);
        if (!grown)
            return STATUS_NO_MEMORY;
        engine->running = grown;
        engine->running_capacity = count;
    }
    struct model_item *running = engine->running;
    struct room room = {.io = engine->io.append_room(engine->io.context),
                        .pages = memory_room(&engine->memory),
                        .chunks = model_chunk_room(engine->model)};
    uint32_t n = 0;
    engine->pick_count = 0;
    for (size_t i = 0; i < count; i++) {
        struct engine_step_item *item = &items[i];
        item->picks = NULL;
        item->pick_count = 0;
        item->status = admit(engine, item->session, item->token_count, &room);
        if (item->status)
            continue;
        if (!item->token_count) {
            ASSERT(item->session->has_logits);
            continue;
        }
        for (uint32_t j = 0; j < n; j++)
            ASSERT(running[j].session != item->session);
        running[n++] = (struct model_item){.session = item->session, .step = item};
    }
    if (n)
        model_forward(engine, running, n);
    engine_must_work(engine);
    for (uint32_t i = 0; i < n; i++) {
        struct engine_step_item *item = running[i].step;
        item->status = running[i].status;
        item->picks = engine->picks ? engine->picks + running[i].pick_first : NULL;
        item->pick_count = (uint32_t)running[i].pick_count;
        if (item->token_count == 1)
            engine->counted.tokens_decoded++;
        else
            engine->counted.tokens_prefilled += item->token_count;
    }
    for (size_t i = 0; i < count; i++)
        sample(&items[i]);
    engine_must_work(engine); /* logits may have come from the backend */
    publish_stats(engine);
    return STATUS_OK;
}

void engine_chunk_durable(struct engine *engine, struct chunk_key key, enum status status)
{
    memory_durable(&engine->memory, key, status != STATUS_OK);
    for (struct list *node = engine->sessions.next; status && node != &engine->sessions;
         node = node->next) {
        struct engine_session *session = LIST_ENTRY(node, struct engine_session, node);
        for (size_t i = 0; i < session->range_count; i++)
            if (session->ranges[i].branch == key.branch && !session->failed)
                session->failed = status;
    }
}

void engine_get_stats(const struct engine *engine, struct engine_stats *stats)
{
    struct engine *unlocked = (struct engine *)(uintptr_t)engine; /* the lock is not its state */
    pthread_mutex_lock(&unlocked->stats_lock);
    *stats = engine->stats;
    pthread_mutex_unlock(&unlocked->stats_lock);
}
