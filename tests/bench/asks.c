/* What a question costs that is asked of a memory of any length without writing to it: the fork of
 * its session, the question's tokens and those of the answer, and the end of the fork with the
 * pages that it made. The past is random chunks (tests/lib/noise_io.h), whose pages are in the
 * host's memory as far as there is room.
 *
 *   bench_asks [--model DIR] [--backend cpu|cuda] [--tokens N]... [--host-memory BYTES] [--asks N]
 *
 * Prints a line a length with medians in milliseconds. What forking and ending take should not
 * depend on the length. Exits with 77 without the backend. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/engine_private.h"
#include "proto/base/assert.h"
#include "tests/lib/noise_io.h"

#define QUESTION 70 /* tokens: the fork ends a chunk of its own */
#define ANSWER 8
#define LENGTHS_MAX 16
#define ASKS_MAX 1024
#define PIN_TOGETHER 512

enum phase { FORK, READ, TOKEN, END, PHASES };

static double times[PHASES][ASKS_MAX * ANSWER];
static size_t counts[PHASES];

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Notes what went by since `*from`. */
static void note(enum phase phase, double *from)
{
    const double at = now();
    times[phase][counts[phase]++] = at - *from;
    *from = at;
}

static int by_size(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median_ms(enum phase phase)
{
    qsort(times[phase], counts[phase], sizeof(double), by_size);
    return 1e3 * times[phase][counts[phase] / 2];
}

/* The pages of branch 1 come to the host's memory; when there is no room, the last ones stay. */
static void bring(struct engine *engine, uint64_t count)
{
    static uint64_t stamp = UINT64_MAX / 2; /* none of the model's */
    struct memory_page *pages[PIN_TOGETHER];
    for (uint64_t first = 0; first < count; first += PIN_TOGETHER) {
        const size_t n = count - first < PIN_TOGETHER ? (size_t)(count - first) : PIN_TOGETHER;
        bool added;
        stamp++;
        for (size_t i = 0; i < n; i++) {
            const struct chunk_key key = {1, first + i};
            pages[i] = memory_page_pin(&engine->memory, key, stamp, &added);
            ASSERT(pages[i]);
        }
        ASSERT(!memory_load(&engine->memory, &engine->io, pages, n));
        for (size_t i = 0; i < n; i++)
            memory_page_unpin(&engine->memory, pages[i]);
    }
}

static void step(struct engine *engine, struct engine_step_item *item)
{
    ASSERT(!engine_step(engine, item, 1) && !item->status);
}

static void ask(struct engine *engine, const struct engine_session *memory, uint64_t branch,
                struct sampler *sampler)
{
    const uint64_t first =
        engine_session_position(memory) / engine_get_info(engine)->config->chunk_tokens;
    int32_t tokens[QUESTION];
    struct engine_session *s;
    for (int32_t i = 0; i < QUESTION; i++)
        tokens[i] = i * 37 % 251;
    double from = now();
    ASSERT(!engine_session_fork(memory, branch, &s));
    note(FORK, &from);
    struct engine_step_item item = {
        .session = s, .tokens = tokens, .token_count = QUESTION, .sampler = sampler};
    step(engine, &item);
    note(READ, &from);
    for (int i = 0; i < ANSWER; i++) {
        int32_t token = item.result.token;
        item = (struct engine_step_item){
            .session = s, .tokens = &token, .token_count = 1, .sampler = sampler};
        step(engine, &item);
        note(TOKEN, &from);
    }
    engine_chunk_durable(engine, (struct chunk_key){branch, first}, STATUS_OK);
    from = now();
    engine_session_forget(s, 0);
    engine_session_destroy(s);
    note(END, &from);
}

static void measure(struct engine *engine, uint64_t tokens, uint64_t asks)
{
    const struct model_config *c = engine_get_info(engine)->config;
    struct sampler_params greedy;
    struct sampler *sampler;
    struct engine_session *memory;
    struct error err = {0};
    if (noise_io_session(engine, 1, tokens / c->chunk_tokens * c->chunk_tokens, &memory, &err)) {
        printf("%12llu tokens: LEFT OUT, %s\n", (unsigned long long)tokens, err.message);
        return;
    }
    bring(engine, tokens / c->chunk_tokens);
    sampler_params_default(&greedy);
    ASSERT(!sampler_create(&greedy, (int32_t)c->vocab_size, &sampler));
    memset(counts, 0, sizeof counts);
    for (uint64_t i = 0; i < asks + 2; i++) {
        ask(engine, memory, 2 + i, sampler);
        if (i == 1)
            memset(counts, 0, sizeof counts); /* the first ones warm up */
    }
    printf("%12llu tokens, %9zu pages: fork %8.3f, %d tokens read %9.3f, one %8.3f, end %8.3f ms\n",
           (unsigned long long)tokens, engine->memory.allocated, median_ms(FORK), QUESTION,
           median_ms(READ), median_ms(TOKEN), median_ms(END));
    fflush(stdout);
    sampler_destroy(sampler);
    engine_session_destroy(memory);
}

int main(int argc, char **argv)
{
    uint64_t lengths[LENGTHS_MAX] = {1 << 20}, asks = 20;
    size_t length_count = 0;
    struct noise_io past;
    struct engine *engine;
    struct error err = {0};
    struct engine_options options = {.model_path = "engine/models/ramba-20m",
                                     .host_memory_bytes = (size_t)1 << 30,
                                     .random_weights_seed = 1,
                                     .io = noise_io(&past)};
    for (int i = 1; i + 1 < argc; i += 2) {
        const char *value = argv[i + 1];
        if (strcmp(argv[i], "--model") == 0)
            options.model_path = value;
        else if (strcmp(argv[i], "--backend") == 0)
            options.backend = strcmp(value, "cuda") == 0 ? ENGINE_BACKEND_CUDA : ENGINE_BACKEND_CPU;
        else if (strcmp(argv[i], "--tokens") == 0 && length_count < LENGTHS_MAX)
            lengths[length_count++] = strtoull(value, NULL, 10);
        else if (strcmp(argv[i], "--host-memory") == 0)
            options.host_memory_bytes = strtoull(value, NULL, 10);
        else if (strcmp(argv[i], "--asks") == 0)
            asks = strtoull(value, NULL, 10);
    }
    ASSERT(asks && asks + 2 <= ASKS_MAX);
    noise_io_init(&past);
    const enum status status = engine_open(&options, &engine, &err);
    if (status) {
        printf("%s: %s\n", status == STATUS_UNSUPPORTED ? "SKIPPED" : "FAIL", err.message);
        noise_io_close(&past);
        return status == STATUS_UNSUPPORTED ? 77 : 1;
    }
    noise_io_attach(&past, engine);
    printf("%s, %s\n", options.model_path, engine_get_info(engine)->backend);
    for (size_t i = 0; i < length_count + !length_count; i++)
        measure(engine, lengths[i], asks);
    engine_close(engine);
    noise_io_close(&past);
    return 0;
}
