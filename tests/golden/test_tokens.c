/* The GPU's greedy tokens against the CPU's: ten prompts, 256 tokens each. In fp32 the first that
 * differs must be a tie: its logit, by the CPU, within what fp32 sums in another order make of
 * logits (1e-4 of the largest, as in test_engine.c). From there on the GPU is told the CPU's
 * tokens, so that every position counts. In bf16 what differs is counted and shown. Exits with 77
 * without a GPU. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/engine_private.h"
#include "proto/base/assert.h"
#include "tests/lib/chunk_ram.h"

#define TOKENS 256
#define TOLERANCE 1e-4

static const char *const prompts[] = {
    "The pass key is 48213. Remember it. The grass is green. The sky is blue. The pass key is",
    "It was the best of times, it was the worst of times, it was the age of wisdom,",
    "Question: Who lives in the blue house? Answer:",
    "Anna's telephone number is 555-0187. Ben's telephone number is 555-0114. Anna's number is",
    "Call me Ishmael. Some years ago, never mind how long precisely,",
    "1 2 3 4 5 6 7 8 9 10 11 12",
    "Once upon a time there was a little girl who lived in a village near the forest.",
    "VAR X = 71. VAR Y = X. VAR Z = Y. The variables with the value 71 are",
    "\"Good morning,\" said the old man, and",
    "In the beginning",
};
#define PROMPTS (sizeof prompts / sizeof *prompts)

struct bed {
    struct chunk_ram ram;
    struct engine *engine;
    struct engine_session *session;
};

static void bed_open(struct bed *bed, enum engine_backend backend, enum engine_dtype dtype)
{
    struct error err = {0};
    chunk_ram_init(&bed->ram);
    const struct engine_options options = {.model_path = "engine/models/ramba-20m",
                                           .backend = backend,
                                           .host_memory_bytes = (size_t)256 << 20,
                                           .memory_dtype = dtype,
                                           .io = chunk_ram_io(&bed->ram)};
    const enum status status = engine_open(&options, &bed->engine, &err);
    if (status) {
        printf("%s: %s\n", status == STATUS_UNSUPPORTED ? "SKIPPED" : "FAIL", err.message);
        exit(status == STATUS_UNSUPPORTED ? 77 : 1);
    }
    chunk_ram_attach(&bed->ram, bed->engine);
}

static void bed_close(struct bed *bed)
{
    engine_close(bed->engine);
    chunk_ram_close(&bed->ram);
}

/* Takes the tokens and returns the logits behind them, borrowed until the next step. */
static const float *step(struct bed *bed, const int32_t *tokens, uint32_t count)
{
    struct engine_step_item item = {
        .session = bed->session, .tokens = tokens, .token_count = count, .want_logits = true};
    ASSERT(!engine_step(bed->engine, &item, 1) && !item.status);
    chunk_ram_acknowledge(&bed->ram, bed->engine);
    return session_logits(bed->session);
}

static int32_t largest(const float *logits, uint32_t count)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < count; i++)
        if (logits[i] > logits[best])
            best = i;
    return (int32_t)best;
}

struct tally {
    size_t tokens, different, unexplained;
    double worst_gap; /* of a token that differs, relative to the largest logit */
};

static void compare(struct bed *cpu, struct bed *gpu, uint32_t prompt, double allowed,
                    struct tally *t)
{
    const uint32_t v = engine_get_info(cpu->engine)->config->vocab_size;
    const struct chunk_range range = {.branch = 1 + prompt};
    struct tokenizer_tokens text = {0};
    struct error err;
    ASSERT(!tokenizer_encode(engine_tokenizer(cpu->engine), prompts[prompt],
                             strlen(prompts[prompt]), false, &text));
    ASSERT(!engine_session_create(cpu->engine, &range, 1, NULL, 0, &cpu->session, &err));
    ASSERT(!engine_session_create(gpu->engine, &range, 1, NULL, 0, &gpu->session, &err));
    const float *want = step(cpu, text.ids, (uint32_t)text.count);
    const float *got = step(gpu, text.ids, (uint32_t)text.count);
    for (uint32_t i = 0; i < TOKENS; i++) {
        const int32_t token = largest(want, v), other = largest(got, v);
        double most = 0;
        for (uint32_t j = 0; j < v; j++)
            most = fmax(most, fabs((double)want[j]));
        const double gap = ((double)want[token] - (double)want[other]) / most;
        t->tokens++;
        if (token != other) {
            t->different++;
            t->unexplained += !(gap <= allowed);
            t->worst_gap = fmax(t->worst_gap, gap);
            printf("  prompt %u, token %u: CPU %d, GPU %d, %.1e of the largest logit apart\n",
                   prompt, i, token, other, gap);
        }
        want = step(cpu, &token, 1);
        got = step(gpu, &token, 1);
    }
    engine_session_destroy(cpu->session);
    engine_session_destroy(gpu->session);
    tokenizer_tokens_close(&text);
}

static size_t compare_all(enum engine_dtype dtype, double allowed)
{
    struct bed gpu = {0}, cpu = {0};
    struct tally t = {0};
    bed_open(&gpu, ENGINE_BACKEND_CUDA, dtype);
    bed_open(&cpu, ENGINE_BACKEND_CPU, dtype);
    for (uint32_t i = 0; i < PROMPTS; i++)
        compare(&cpu, &gpu, i, allowed, &t);
    printf("%s against %s: %zu of %zu tokens differ, by at most %.1e of the largest logit, %zu by "
           "more than allowed\n",
           engine_get_info(gpu.engine)->backend, engine_get_info(cpu.engine)->backend, t.different,
           t.tokens, t.worst_gap, t.unexplained);
    bed_close(&gpu);
    bed_close(&cpu);
    return t.unexplained;
}

int main(void)
{
    const size_t wrong = compare_all(ENGINE_DTYPE_FP32, TOLERANCE);
    compare_all(ENGINE_DTYPE_BF16, INFINITY);
    return wrong != 0;
}
