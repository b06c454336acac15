/* Taking up a long memory again: from opening the store to the first token, and where that goes.
 *
 *   bench_resume MODEL_FOLDER FOLDER [TOKENS]
 *
 * The model may be a config.json alone (then its weights are random); FOLDER is made and must not
 * exist. The past is random chunks of the model's shape, as a text of TOKENS (a million) would
 * leave; the state is that of a slice of text, rounded as a turn's end. Done at a quarter of the
 * length and at the whole, each time in an engine that has no page yet: cold, with the store's file
 * dropped from the page cache, and warm, the best of some. Opening the model is told apart: a
 * server does it once. A step of decoding that finds its pages is the measure of the first one. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/bf16.h"
#include "engine/engine.h"
#include "proto/base/assert.h"
#include "tests/lib/daemon.h"
#include "tests/lib/store_helper.h"

#define BLOCK_CHUNKS 64u
#define IN_FLIGHT 4u
#define WARM 3u
#define TABLE_NUMBERS ((size_t)1 << 20)
#define SNAPSHOT_POSITION 16 /* in a snapshot's header: see session.c */

/* ---- the engine, whose chunks are read from the store ---- */

static enum status read_chunks(void *context, const struct chunk_read *reads, size_t count)
{
    struct storage *storage = *(struct storage **)context;
    struct storage_read *wanted = calloc(count, sizeof *wanted);
    ASSERT(wanted);
    for (size_t i = 0; i < count; i++)
        wanted[i] = (struct storage_read){
            .branch = reads[i].key.branch, .index = reads[i].key.index, .kv = reads[i].kv};
    const enum status status = storage_read_chunks(storage, wanted, count);
    free(wanted);
    return status;
}

static enum status read_landmarks(void *context, uint64_t branch, uint64_t first, uint64_t count,
                                  void *out)
{
    return storage_read_landmarks(*(struct storage **)context, branch, first, count, out);
}

/* The slice that makes the state ends chunks of its own; nobody asks for them again. */
static size_t append_room(void *context)
{
    (void)context;
    return SIZE_MAX;
}

static enum status append(void *context, struct chunk_key key, const void *kv, const void *landmark)
{
    (void)context, (void)key, (void)kv, (void)landmark;
    return STATUS_OK;
}

static struct engine *open_engine(const char *model, struct storage **storage, double *seconds)
{
    const struct engine_options options = {
        .model_path = model,
        .backend = ENGINE_BACKEND_CPU,
        .host_memory_bytes = (size_t)512 << 20,
        .random_weights_seed = 1,
        .io = {storage, append_room, append, read_chunks, read_landmarks}};
    struct engine *engine;
    struct error err = {0};
    const double began = daemon_now();
    if (engine_open(&options, &engine, &err)) {
        fprintf(stderr, "%s\n", err.message);
        exit(1);
    }
    *seconds = daemon_now() - began;
    return engine;
}

static void step(struct engine *engine, struct engine_session *session, const int32_t *tokens,
                 uint32_t count)
{
    struct engine_step_item item = {
        .session = session, .tokens = tokens, .token_count = count, .want_logits = true};
    ASSERT(!engine_step(engine, &item, 1) && !item.status);
}

/* ---- the store ---- */

static struct storage *open_store(const char *path, const struct engine_info *info)
{
    const struct storage_options options = {.path = path,
                                            .kv_bytes = info->kv_bytes,
                                            .landmark_bytes = info->landmark_bytes,
                                            .chunk_tokens = info->config->chunk_tokens,
                                            .model_fingerprint = info->fingerprint,
                                            .model_name = "bench"};
    return store_open(&options);
}

/* A snapshot at `position` with the state of a slice. */
static char *snapshot_at(struct engine *engine, uint64_t position, size_t *size)
{
    const struct engine_info *info = engine_get_info(engine);
    const struct chunk_range range = {.branch = 1};
    struct engine_session *session;
    struct error err = {0};
    const uint32_t count = info->slice_tokens;
    int32_t *tokens = calloc(count, sizeof *tokens);
    ASSERT(tokens && !engine_session_create(engine, &range, 1, NULL, 0, &session, &err));
    for (uint32_t i = 0; i < count; i++)
        tokens[i] = (int32_t)(i * 7919u % info->config->vocab_size);
    step(engine, session, tokens, count);
    for (uint64_t i = 0; i < count / info->config->chunk_tokens; i++)
        engine_chunk_durable(engine, (struct chunk_key){1, i}, STATUS_OK);
    engine_session_round(session);
    *size = engine_session_snapshot_bytes(session);
    char *snapshot = malloc(*size);
    ASSERT(snapshot && count % info->config->chunk_tokens == 0);
    engine_session_snapshot(session, snapshot);
    memcpy(snapshot + SNAPSHOT_POSITION, &position, sizeof position);
    engine_session_destroy(session);
    free(tokens);
    return snapshot;
}

struct past {
    struct storage *storage;
    uint64_t branch, position;
    uint16_t *table; /* bf16, [-1, 1) */
};

static void fill_table(struct past *past)
{
    past->table = malloc(TABLE_NUMBERS * sizeof *past->table);
    ASSERT(past->table);
    uint64_t state = 1;
    for (size_t i = 0; i < TABLE_NUMBERS; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        past->table[i] = bf16_from_float((float)((double)(state >> 11) / 4503599627370496.0 - 1));
    }
}

/* Chunks up to `position`, of random numbers; the last commit has the snapshot. */
static void grow(struct past *past, const struct engine_info *info, uint64_t position,
                 const char *snapshot, size_t size)
{
    const uint32_t chunk = info->config->chunk_tokens;
    const size_t room = TABLE_NUMBERS - info->kv_bytes / 2;
    int32_t *ids = calloc((size_t)BLOCK_CHUNKS * chunk, sizeof *ids);
    struct store_wait waits[IN_FLIGHT];
    unsigned queued = 0, done = 0;
    ASSERT(ids);
    while (past->position < position) {
        for (uint64_t i = 0; i < BLOCK_CHUNKS; i++) {
            const uint64_t index = past->position / chunk + i;
            const uint16_t *numbers = past->table + index * 7919u % room;
            ASSERT(
                !storage_append(past->storage, past->branch, index, numbers, numbers, NULL, NULL));
        }
        past->position += (uint64_t)BLOCK_CHUNKS * chunk;
        const bool last = past->position == position;
        const struct storage_commit turn = {.id = "m",
                                            .position = past->position,
                                            .tokens = ids,
                                            .token_count = (size_t)BLOCK_CHUNKS * chunk,
                                            .text_bytes = past->position * 4,
                                            .snapshot = last ? snapshot : "",
                                            .snapshot_bytes = last ? size : 1,
                                            .goes_on = !last};
        if (queued - done == IN_FLIGHT)
            ASSERT(!store_wait_finish(&waits[done++ % IN_FLIGHT], STATUS_OK));
        store_wait_init(&waits[queued % IN_FLIGHT]);
        ASSERT(!storage_commit(past->storage, &turn, store_wait_cb, &waits[queued++ % IN_FLIGHT]));
    }
    while (done < queued)
        ASSERT(!store_wait_finish(&waits[done++ % IN_FLIGHT], STATUS_OK));
    free(ids);
}

/* ---- what is measured ---- */

struct resumed {
    double open, snapshot, session, first, next, all;
};

static struct resumed resume(const char *model, const char *folder, bool cold)
{
    struct storage *storage = NULL;
    double opened;
    struct engine *engine = open_engine(model, &storage, &opened);
    const struct engine_info *info = engine_get_info(engine);
    if (cold)
        store_drop_cache(folder);
    const double t0 = daemon_now();
    storage = open_store(folder, info);
    const double t1 = daemon_now();
    struct storage_range *ranges;
    size_t count, size;
    void *snapshot;
    uint64_t position;
    ASSERT(!storage_lineage(storage, "m", &ranges, &count) && count == 1);
    ASSERT(!storage_snapshot(storage, "m", &snapshot, &size, &position));
    const double t2 = daemon_now();
    const struct chunk_range range = {.branch = ranges[0].branch, .first = ranges[0].first};
    struct engine_session *session;
    struct error err = {0};
    ASSERT(!engine_session_create(engine, &range, 1, snapshot, size, &session, &err));
    const double t3 = daemon_now();
    const int32_t token = 1;
    step(engine, session, &token, 1);
    const double t4 = daemon_now();
    step(engine, session, &token, 1);
    const double t5 = daemon_now();
    engine_session_destroy(session);
    engine_close(engine);
    free(ranges);
    free(snapshot);
    storage_close(storage);
    return (struct resumed){t1 - t0, t2 - t1, t3 - t2, t4 - t3, t5 - t4, t4 - t0};
}

static void print_resume(const char *how, uint64_t tokens, const struct resumed *r)
{
    printf("%llu tokens, %s: %.1f ms to the first token: open %.1f, snapshot %.1f, state and "
           "landmarks %.1f, step %.1f; the step behind it %.1f\n",
           (unsigned long long)tokens, how, r->all * 1e3, r->open * 1e3, r->snapshot * 1e3,
           r->session * 1e3, r->first * 1e3, r->next * 1e3);
}

static void measure(const char *model, const char *folder, uint64_t tokens)
{
    const struct resumed cold = resume(model, folder, true);
    struct resumed warm = resume(model, folder, false);
    for (unsigned i = 1; i < WARM; i++) {
        const struct resumed again = resume(model, folder, false);
        warm = again.all < warm.all ? again : warm;
    }
    print_resume("cold", tokens, &cold);
    print_resume("warm", tokens, &warm);
}

int main(int argc, char **argv)
{
    const uint64_t block = (uint64_t)BLOCK_CHUNKS * 64;
    const uint64_t tokens = (argc > 3 ? strtoull(argv[3], NULL, 10) : 1u << 20) / block * block;
    if (argc < 3 || tokens < 4 * block || mkdir(argv[2], 0700)) {
        fprintf(stderr, "bench_resume MODEL_FOLDER FOLDER [TOKENS]: FOLDER is made and must not "
                        "exist; at least 16384 tokens\n");
        return 2;
    }
    struct past past = {0};
    double opened;
    fill_table(&past);
    static const unsigned parts[] = {4, 1}; /* a quarter, then the whole */
    for (unsigned i = 0; i < 2; i++) {
        struct engine *engine = open_engine(argv[1], &past.storage, &opened);
        const struct engine_info *info = engine_get_info(engine);
        ASSERT(info->config->chunk_tokens == 64);
        past.storage = open_store(argv[2], info);
        if (i == 0) {
            printf("opening the model: %.0f ms\n", opened * 1e3);
            struct storage_memory memory;
            ASSERT(!store_create(past.storage, "m", NULL));
            ASSERT(!storage_memory_get(past.storage, "m", &memory));
            past.branch = memory.branch;
            storage_memory_close(&memory);
        }
        const uint64_t position = tokens / parts[i] / block * block;
        size_t size;
        char *snapshot = snapshot_at(engine, position, &size);
        grow(&past, info, position, snapshot, size);
        free(snapshot);
        engine_close(engine);
        storage_close(past.storage);
        past.storage = NULL;
        measure(argv[1], argv[2], position);
    }
    free(past.table);
    char *path = strdup(argv[2]);
    ASSERT(path);
    store_helper_remove(path);
    return 0;
}
