/* What a memory of a million tokens takes: a session's landmarks and every page of its past made
 * resident, by the growth of this process, against what the model's shape says.
 *   bench_memory MODEL_FOLDER [TOKENS]     (the folder may hold config.json alone)
 * Prints bytes a token; fails when they exceed the shape's by more than a tenth. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/engine_private.h"
#include "proto/base/assert.h"
#include "tests/lib/chunk_ram.h"

/* A past that comes through chunk_io: every chunk's bytes are its index, repeated. */
static enum status read_chunks(void *context, const struct chunk_read *reads, size_t count)
{
    const struct engine *engine = *(struct engine **)context;
    for (size_t i = 0; i < count; i++)
        memset(reads[i].kv, (int)(reads[i].key.index & 127), engine->info.kv_bytes);
    return STATUS_OK;
}

static enum status read_landmarks(void *context, uint64_t branch, uint64_t first, uint64_t count,
                                  void *out)
{
    const struct engine *engine = *(struct engine **)context;
    (void)branch;
    memset(out, (int)(first & 127), count * engine->info.landmark_bytes);
    return STATUS_OK;
}

static double resident_bytes(void)
{
    unsigned long pages = 0;
    FILE *file = fopen("/proc/self/statm", "re");
    ASSERT(file && fscanf(file, "%*u %lu", &pages) == 1);
    fclose(file);
    return (double)pages * (double)sysconf(_SC_PAGESIZE);
}

static struct engine_session *open_session(struct engine *engine, uint64_t position)
{
    const struct chunk_range range = {.branch = 1};
    struct engine_session *session, *placed;
    struct error err = {0};
    ASSERT(!engine_session_create(engine, &range, 1, NULL, 0, &session, &err));
    session->position = position; /* so that its snapshot is of a session this far on */
    const size_t size = engine_session_snapshot_bytes(session);
    void *snapshot = malloc(size);
    ASSERT(snapshot);
    engine_session_snapshot(session, snapshot);
    ASSERT(!engine_session_create(engine, &range, 1, snapshot, size, &placed, &err));
    free(snapshot);
    engine_session_destroy(session);
    return placed;
}

/* Reads every chunk of the past, as a top-k that named it would. */
static void read_all(struct engine *engine, uint64_t chunks)
{
    for (uint64_t i = 0; i < chunks; i++) {
        bool added;
        struct memory_page *page =
            memory_page_pin(&engine->memory, (struct chunk_key){1, i}, i + 1, &added);
        ASSERT(page && !memory_load(&engine->memory, &engine->io, &page, 1));
        memory_page_unpin(&engine->memory, page);
    }
    ASSERT(engine->memory.evictions == 0 && engine->memory.misses == chunks);
}

int main(int argc, char **argv)
{
    const uint64_t asked = argc > 2 ? strtoull(argv[2], NULL, 10) : 1u << 20;
    struct engine *engine = NULL;
    struct error err = {0};
    struct chunk_ram ram;
    if (argc < 2) {
        fprintf(stderr, "bench_memory MODEL_FOLDER [TOKENS]\n");
        return 2;
    }
    chunk_ram_init(&ram);
    struct chunk_io io = chunk_ram_io(&ram);
    io.context = &engine;
    io.read = read_chunks;
    io.read_landmarks = read_landmarks;
    struct engine_options options = {.model_path = argv[1],
                                     .backend = ENGINE_BACKEND_CPU,
                                     .threads = 1,
                                     .host_memory_bytes = (size_t)1 << 30,
                                     .random_weights_seed = 1,
                                     .io = io};
    if (engine_open(&options, &engine, &err)) {
        fprintf(stderr, "bench_memory: %s\n", err.message);
        return 1;
    }
    /* Again with a budget of as many pages as the past has, and those that a step needs. */
    options.host_memory_bytes = (asked / engine_get_info(engine)->config->chunk_tokens + 512) *
                                engine_get_info(engine)->kv_bytes;
    engine_close(engine);
    ASSERT(!engine_open(&options, &engine, &err));
    const struct engine_info *info = engine_get_info(engine);
    const uint64_t chunks = asked / info->config->chunk_tokens;
    const double tokens = (double)(chunks * info->config->chunk_tokens);
    const double before = resident_bytes();
    struct engine_session *empty = open_session(engine, 0);
    const double state = resident_bytes() - before;
    engine_session_destroy(empty);
    struct engine_session *session = open_session(engine, chunks * info->config->chunk_tokens);
    read_all(engine, chunks);
    const double grown = (resident_bytes() - before - state) / tokens;
    const double shape =
        (double)(info->kv_bytes + info->landmark_bytes) / info->config->chunk_tokens;
    printf("memory %s: %.0f tokens take %.1f resident bytes a token, the shape's are %.0f "
           "(%+.1f%%); beside them %.1f MB of state, whatever the length\n",
           info->model_name, tokens, grown, shape, 100 * (grown / shape - 1), state / 1e6);
    const bool within = grown <= 1.1 * shape;
    engine_session_destroy(session);
    engine_close(engine);
    chunk_ram_close(&ram);
    return within ? 0 : 1;
}
