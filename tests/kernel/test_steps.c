/* Decoding on a device that records its steps (ops.h: step_begin): whatever runs beside a sequence,
 * whatever the budgets, recorded or op by op, it computes the same bits; and the token that the
 * device finds is the sampler's own. And a device that fails, at whatever launch or allocation,
 * ends the process with a clear word or refuses to open; it gives no token. Exits with 77 where
 * there is no GPU. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine/engine_private.h"
#include "proto/base/assert.h"
#include "tests/lib/chunk_ram.h"

#define SEQUENCES 5
#define TOKENS 18 /* of each: chunks are completed on the way */
#define PROMPT 70

struct sequence {
    struct engine_session *session;
    struct sampler *sampler;
    int32_t token;
    uint32_t done;
};

struct way { /* to run the same sequences */
    const char *name;
    bool plain, together, tight;
};

static int failures;

/* Which sequences take part in step `i`. */
static bool takes_part(const struct way *way, uint32_t i, uint32_t j)
{
    return way->together ? (i * 7 + j) % 4 != 0 : i % SEQUENCES == j;
}

static int32_t largest(const float *logits, uint32_t count)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < count; i++)
        if (logits[i] > logits[best])
            best = i;
    return (int32_t)best;
}

static void start(struct engine *engine, struct chunk_ram *ram, struct sequence *s, uint32_t j)
{
    const struct chunk_range range = {.branch = 1 + j};
    struct sampler_params greedy;
    struct error err;
    int32_t prompt[PROMPT];
    const uint32_t length = j ? 11 + 13 * j : PROMPT;
    for (uint32_t i = 0; i < length; i++)
        prompt[i] = (int32_t)((i * 37 + j * 101 + 11) % 251);
    sampler_params_default(&greedy);
    *s = (struct sequence){0};
    ASSERT(!engine_session_create(engine, &range, 1, NULL, 0, &s->session, &err));
    ASSERT(!sampler_create(&greedy, (int32_t)engine_get_info(engine)->config->vocab_size,
                           &s->sampler));
    struct engine_step_item item = {
        .session = s->session, .tokens = prompt, .token_count = length, .sampler = s->sampler};
    ASSERT(!engine_step(engine, &item, 1) && !item.status);
    chunk_ram_acknowledge(ram, engine);
    s->token = item.result.token;
}

/* One step of those that take part; logits[sequence][token] [V]. */
static void step(struct engine *engine, struct chunk_ram *ram, struct sequence *sequences,
                 const struct way *way, uint32_t i, float *logits)
{
    const uint32_t v = engine_get_info(engine)->config->vocab_size;
    struct engine_step_item items[SEQUENCES];
    struct sequence *running[SEQUENCES];
    uint32_t n = 0;
    for (uint32_t j = 0; j < SEQUENCES; j++) {
        struct sequence *s = &sequences[j];
        if (s->done == TOKENS || !takes_part(way, i, j))
            continue;
        items[n] = (struct engine_step_item){
            .session = s->session, .tokens = &s->token, .token_count = 1, .sampler = s->sampler};
        running[n++] = s;
    }
    ASSERT(!engine_step(engine, items, n));
    chunk_ram_acknowledge(ram, engine);
    for (uint32_t j = 0; j < n; j++) {
        struct sequence *s = running[j];
        ASSERT(!items[j].status);
        float *to = logits + ((size_t)(s - sequences) * TOKENS + s->done++) * v;
        memcpy(to, session_logits(s->session), v * sizeof *to);
        s->token = items[j].result.token;
        if (s->token != largest(to, v) && !failures++)
            printf("FAIL %s: token %d, the largest logit is that of %d\n", way->name, s->token,
                   largest(to, v));
    }
}

/* The logits of every sequence at every token; NULL: no GPU. */
static float *run(const char *model, enum engine_dtype dtype, const struct way *way)
{
    struct chunk_ram ram;
    struct engine *engine = NULL;
    struct error err = {0};
    struct ops table;
    chunk_ram_init(&ram);
    struct engine_options options = {.model_path = model,
                                     .backend = ENGINE_BACKEND_CUDA,
                                     .threads = 1,
                                     .host_memory_bytes = (size_t)64 << 20,
                                     .memory_dtype = dtype,
                                     .slice_tokens = 96,
                                     .io = chunk_ram_io(&ram)};
    enum status status = engine_open(&options, &engine, &err);
    if (way->tight && !status) { /* again, with the least that it takes */
        const struct engine_info *info = engine_get_info(engine);
        const size_t picks = info->config->retrieval_heads * info->config->topk;
        const size_t page = (info->kv_bytes + 255) / 256 * 256;
        options.device_memory_bytes = (picks > 16 ? picks : 16) * page;
        options.host_memory_bytes =
            (picks + 2 * ((options.slice_tokens + LIMITS_RUNNING) / info->config->chunk_tokens +
                          LIMITS_RUNNING + 1)) *
            info->kv_bytes;
        engine_close(engine);
        status = engine_open(&options, &engine, &err);
    }
    if (status == STATUS_UNSUPPORTED) {
        printf("SKIPPED: %s\n", err.message);
        exit(77);
    }
    if (status) {
        printf("FAIL cannot open %s: %s\n", model, err.message);
        exit(1);
    }
    chunk_ram_attach(&ram, engine);
    table = *engine->ops;
    if (way->plain)
        table.step_begin = NULL;
    engine->ops = &table;
    const size_t v = engine_get_info(engine)->config->vocab_size;
    float *logits = calloc((size_t)SEQUENCES * TOKENS * v, sizeof *logits);
    struct sequence sequences[SEQUENCES];
    ASSERT(logits);
    for (uint32_t j = 0; j < SEQUENCES; j++)
        start(engine, &ram, &sequences[j], j);
    for (uint32_t i = 0; i < SEQUENCES * TOKENS + 1; i++)
        step(engine, &ram, sequences, way, i, logits);
    for (uint32_t j = 0; j < SEQUENCES; j++) {
        ASSERT(sequences[j].done == TOKENS);
        engine_session_destroy(sequences[j].session);
        sampler_destroy(sequences[j].sampler);
    }
    struct engine_stats stats;
    engine_get_stats(engine, &stats);
    printf("%s, %s, %s: %llu device page hits, %llu misses\n", model,
           engine_get_info(engine)->backend, way->name, (unsigned long long)stats.device_page_hits,
           (unsigned long long)stats.device_page_misses);
    const uint64_t bytes = stats.device_page_misses * engine_get_info(engine)->kv_bytes;
    if (stats.device_copy_bytes != bytes || !stats.device_copy_ns != !bytes) {
        failures++;
        printf("FAIL %s, %s: %llu bytes copied to the device in %llu ns\n", model, way->name,
               (unsigned long long)stats.device_copy_bytes,
               (unsigned long long)stats.device_copy_ns);
    }
    engine_close(engine);
    chunk_ram_close(&ram);
    return logits;
}

static void compare(const char *model, enum engine_dtype dtype, size_t v)
{
    static const struct way ways[] = {
        {"together, recorded", false, true, false},
        {"together, op by op", true, true, false},
        {"together, recorded, least budgets", false, true, true},
        {"alone, recorded", false, false, false},
    };
    float *want = run(model, dtype, &ways[0]);
    for (size_t i = 1; i < sizeof ways / sizeof *ways; i++) {
        float *got = run(model, dtype, &ways[i]);
        size_t at = 0, all = (size_t)SEQUENCES * TOKENS * v;
        while (at < all && memcmp(&got[at], &want[at], sizeof *got) == 0)
            at++;
        if (at < all && ++failures)
            printf("FAIL %s, %s: logit %zu of sequence %zu, token %zu: %.9g, %s: %.9g\n", model,
                   ways[i].name, at % v, at / v / TOKENS, at / v % TOKENS, (double)got[at],
                   ways[0].name, (double)want[at]);
        free(got);
    }
    free(want);
}

/* What a process says in which a launch or an allocation fails, and how it ends. */
static void check_fault(const char *fault)
{
    int ends[2], status;
    char said[8192];
    size_t size = 0;
    fflush(stdout);
    ASSERT(!pipe(ends));
    const pid_t child = fork();
    ASSERT(child >= 0);
    if (!child) {
        static const struct way way = {"faulty", false, true, false};
        ASSERT(dup2(ends[1], STDERR_FILENO) >= 0 && dup2(ends[1], STDOUT_FILENO) >= 0);
        close(ends[0]);
        setenv("RAMBAD_CUDA_FAULT", fault, 1);
        run("tests/golden/encoder1-kv1-gqa-bf16", ENGINE_DTYPE_BF16, &way);
        exit(0);
    }
    close(ends[1]);
    for (ssize_t n; (n = read(ends[0], said + size, sizeof said - 1 - size)) > 0;)
        size += (size_t)n;
    said[size] = '\0';
    close(ends[0]);
    ASSERT(waitpid(child, &status, 0) == child);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77) {
        printf("%s", said);
        exit(77);
    }
    const bool broken = strstr(said, "\"engine_broken\"") && strstr(said, "the GPU failed in");
    const bool refused = strstr(said, "cannot open") && strstr(said, "memory");
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 1 || (!broken && !refused)) {
        failures++;
        printf("FAIL %s: status %d, said: %s\n", fault, status, said);
    } else {
        printf("%s: %s\n", fault, broken ? "broken, and said so" : "refused to open");
    }
}

int main(void)
{
    /* Launches of the prompts, of a part as it is recorded, of a replay; allocations of all. */
    static const char *const faults[] = {"launch:1",   "launch:30", "launch:120", "launch:220",
                                         "launch:240", "alloc:2",   "alloc:20",   "alloc:60"};
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        check_fault(faults[i]);
    compare("tests/golden/encoder1-kv1-gqa-bf16", ENGINE_DTYPE_BF16, 256);
    compare("tests/golden/noencoder-kv2-groups2-bias", ENGINE_DTYPE_FP32, 256);
    printf("%d failed\n", failures);
    return failures != 0;
}
