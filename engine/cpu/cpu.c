/* cpu.c - the CPU backend: choosing the kernels, its memory, its table. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/cpu/cpu.h"

/* The best kernels that this processor runs; RAMBAD_CPU names a lesser set, for tests. */
static const struct cpu_kernels *choose(void)
{
    const char *wanted = getenv("RAMBAD_CPU");
    const struct cpu_kernels *best = cpu_kernels_portable();
#ifdef __x86_64__
    __builtin_cpu_init();
    if (wanted && strcmp(wanted, best->name) == 0)
        return best;
    if (cpu_kernels_avx2() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        best = cpu_kernels_avx2();
    if (wanted && strcmp(wanted, best->name) == 0)
        return best;
    if (cpu_kernels_avx512() && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        best = cpu_kernels_avx512();
#else
    (void)wanted;
#endif
    return best;
}

static float *floats(size_t count, bool *failed)
{
    float *memory = aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64);
    if (memory)
        memset(memory, 0, count * sizeof(float));
    else
        *failed = true;
    return memory;
}

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* Floats that a worker may need at once, over all ops. */
static size_t worker_floats(const struct model_config *c, uint32_t max_rows)
{
    const size_t s = c->chunk_tokens, hd = c->head_dim, head = cpu_panels(c->mamba_head_dim);
    const size_t product = (size_t)CPU_TILE * CPU_DEPTH;
    const size_t scores = CPU_BLOCK * (size_t)c->state_size;
    const size_t ssd = CPU_BLOCK * CPU_BLOCK + head * CPU_BLOCK + 2 * head * c->state_size;
    const size_t scan = CPU_SCAN * ((size_t)max_rows + c->retrieval_dim / c->retrieval_heads);
    const size_t attend = c->heads * s;
    const size_t encoder = (s + 1) * (s + 1) + cpu_panels(s + 1) * hd + (s + 1) * cpu_panels(hd);
    const size_t most =
        larger(larger(larger(product, scores), larger(ssd, scan)), larger(attend, encoder));
    return (most + 15) / 16 * 16;
}

static size_t vector_floats(const struct model_config *c)
{
    const size_t mamba = c->hidden_size + (size_t)c->proj_size + c->hidden_size +
                         2 * (size_t)c->conv_size * (c->conv_kernel + 1u) + 3u * c->mamba_heads +
                         c->inner_size;
    const size_t encoder = 8 * (size_t)c->hidden_size + 4 * (size_t)c->head_dim;
    return larger(mamba, encoder) + 4 * (size_t)c->retrieval_dim;
}

static void cpu_close(struct ops_context *context)
{
    if (context->pool)
        pool_close(context->pool);
    float *all[] = {context->scratch,   context->vectors,    context->normed,    context->projected,
                    context->conv,      context->mixed,      context->dt,        context->scores,
                    context->encoder_x, context->encoder_y,  context->encoder_q, context->encoder_k,
                    context->encoder_v, context->encoder_up, context->rope};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
    free(context->picks);
    free(context->pick_counts);
    free(context);
}

static bool take_memory(struct ops_context *x, uint32_t threads)
{
    const struct model_config *c = &x->config;
    const size_t rows = x->max_rows, d = c->hidden_size;
    const size_t blocks = rows / CPU_BLOCK + 2; /* per segment rounded up: see mamba.c */
    const size_t encoded = (size_t)CPU_CHUNKS * (c->chunk_tokens + 1);
    bool failed = false;
    x->scratch_floats = worker_floats(c, x->max_rows);
    x->scratch = floats(threads * x->scratch_floats, &failed);
    x->vector_floats = vector_floats(c);
    x->vectors = floats(x->vector_floats, &failed);
    x->normed = floats(rows * larger(d, c->retrieval_dim), &failed);
    x->projected = floats(rows * c->proj_size, &failed);
    x->conv = floats(rows * c->conv_size, &failed);
    x->mixed = floats(rows * c->inner_size, &failed);
    x->dt = floats(rows * c->mamba_heads, &failed);
    x->scores = floats(blocks * c->state_groups * CPU_BLOCK * CPU_BLOCK, &failed);
    x->encoder_x = floats(encoded * d, &failed);
    x->encoder_y = floats(encoded * larger(d, c->retrieval_dim), &failed);
    x->encoder_q = floats(encoded * larger(d, c->encoder_mlp_size), &failed);
    x->encoder_k = floats(encoded * d, &failed);
    x->encoder_v = floats(encoded * d, &failed);
    x->encoder_up = floats(encoded * larger(d, c->encoder_mlp_size), &failed);
    x->rope = floats((size_t)(c->chunk_tokens + 1) * c->head_dim, &failed);
    x->picks = calloc((size_t)threads * rows * c->retrieval_heads * c->topk, sizeof *x->picks);
    x->pick_counts = calloc((size_t)threads * rows * c->retrieval_heads, sizeof *x->pick_counts);
    return !failed && x->picks && x->pick_counts;
}

static void fill_rope(struct ops_context *x)
{
    const uint32_t half = x->config.head_dim / 2, positions = x->config.chunk_tokens + 1;
    for (uint32_t t = 0; t < positions; t++)
        for (uint32_t i = 0; i < half; i++) {
            const float angle =
                (float)t * powf(10000.0f, -(float)(2 * i) / (float)x->config.head_dim);
            x->rope[t * half + i] = cosf(angle);
            x->rope[(positions + t) * half + i] = sinf(angle);
        }
}

static enum status cpu_open(const struct ops_options *options, struct ops_context **out,
                            struct error *err)
{
    struct ops_context *context = calloc(1, sizeof *context);
    if (!context)
        return error_set(err, STATUS_NO_MEMORY, "out of memory");
    context->config = *options->config;
    context->memory_dtype = options->memory_dtype;
    context->states_bf16 = options->states_bf16;
    context->max_rows = options->max_rows;
    context->kernels = choose();
    enum status status = pool_open(options->threads, &context->pool);
    if (!status && !take_memory(context, options->threads))
        status = STATUS_NO_MEMORY;
    if (status) {
        cpu_close(context);
        return error_set(err, status, "out of memory for the CPU backend");
    }
    fill_rope(context);
    snprintf(context->description, sizeof context->description, "cpu (%s, %u threads)",
             context->kernels->name, options->threads);
    *out = context;
    return STATUS_OK;
}

static const char *cpu_describe(const struct ops_context *context)
{
    return context->description;
}

static void *cpu_alloc(struct ops_context *context, size_t bytes)
{
    (void)context;
    void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (memory)
        memset(memory, 0, bytes);
    return memory;
}

static void cpu_release(struct ops_context *context, void *memory)
{
    (void)context;
    free(memory);
}

static void cpu_copy(struct ops_context *context, void *to, const void *from, size_t bytes)
{
    (void)context;
    memcpy(to, from, bytes);
}

const struct ops *ops_cpu(void)
{
    static const struct ops table = {
        .name = "cpu",
        .open = cpu_open,
        .close = cpu_close,
        .describe = cpu_describe,
        .alloc = cpu_alloc,
        .release = cpu_release,
        .alloc_host = cpu_alloc,
        .release_host = cpu_release,
        .copy = cpu_copy,
        .pack_state = cpu_pack_state,
        .unpack_state = cpu_unpack_state,
        .embed = cpu_embed,
        .mamba = cpu_mamba,
        .encode_chunks = cpu_encode_chunks,
        .retrieve = cpu_retrieve,
        .hsa_query = cpu_hsa_query,
        .hsa_attend = cpu_hsa_attend,
        .hsa_out = cpu_hsa_out,
        .logits = cpu_logits,
    };
    return &table;
}
