/* ref.c - the reference backend: its table, its memory, its helpers. */
#include "engine/ref/ref.h"

#include <math.h>
#include <stdlib.h>

#include "proto/base/assert.h"

float *ref_scratch(size_t count)
{
    float *memory = calloc(count ? count : 1, sizeof *memory);
    ASSERT(memory);
    return memory;
}

void ref_linear(const struct ops_tensor *weight, const struct ops_tensor *bias, const float *x,
                float *out)
{
    for (uint32_t i = 0; i < weight->rows; i++) {
        float sum = 0;
        for (uint32_t j = 0; j < weight->cols; j++)
            sum += ref_at(weight, (size_t)i * weight->cols + j) * x[j];
        out[i] = bias && bias->data ? sum + ref_at(bias, i) : sum;
    }
}

void ref_rms_norm(const float *x, const struct ops_tensor *weight, size_t n, float epsilon,
                  float *out)
{
    float sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += x[i] * x[i];
    const float scale = 1 / sqrtf(sum / (float)n + epsilon);
    for (size_t i = 0; i < n; i++)
        out[i] = x[i] * scale * (weight && weight->data ? ref_at(weight, i) : 1);
}

float ref_silu(float x)
{
    return x / (1 + expf(-x));
}

float ref_softplus(float x)
{
    return x > 20 ? x : log1pf(expf(x));
}

void ref_softmax(float *x, size_t n, bool extra)
{
    float top = extra ? 0 : -INFINITY, sum = 0;
    for (size_t i = 0; i < n; i++)
        top = fmaxf(top, x[i]);
    for (size_t i = 0; i < n; i++)
        sum += x[i] = expf(x[i] - top);
    if (extra)
        sum += expf(-top);
    for (size_t i = 0; i < n; i++)
        x[i] /= sum;
}

static enum status ref_open(const struct ops_options *options, struct ops_context **out,
                            struct error *err)
{
    struct ops_context *context = calloc(1, sizeof *context);
    if (!context)
        return error_set(err, STATUS_NO_MEMORY, "out of memory");
    context->config = *options->config;
    context->memory_dtype = options->memory_dtype;
    context->states_bf16 = options->states_bf16;
    *out = context;
    return STATUS_OK;
}

static void ref_close(struct ops_context *context)
{
    free(context);
}

static const char *ref_describe(const struct ops_context *context)
{
    (void)context;
    return "ref (plain, one thread)";
}

static void *ref_alloc(struct ops_context *context, size_t bytes)
{
    (void)context;
    void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (memory)
        memset(memory, 0, bytes);
    return memory;
}

static void ref_release(struct ops_context *context, void *memory)
{
    (void)context;
    free(memory);
}

static void ref_copy(struct ops_context *context, void *to, const void *from, size_t bytes)
{
    (void)context;
    memcpy(to, from, bytes);
}

const struct ops *ops_ref(void)
{
    static const struct ops table = {
        .name = "ref",
        .open = ref_open,
        .close = ref_close,
        .describe = ref_describe,
        .alloc = ref_alloc,
        .release = ref_release,
        .alloc_host = ref_alloc,
        .release_host = ref_release,
        .copy = ref_copy,
        .pack_state = ref_pack_state,
        .unpack_state = ref_unpack_state,
        .embed = ref_embed,
        .mamba = ref_mamba,
        .encode_chunks = ref_encode_chunks,
        .retrieve = ref_retrieve,
        .hsa_query = ref_hsa_query,
        .hsa_attend = ref_hsa_attend,
        .hsa_out = ref_hsa_out,
        .logits = ref_logits,
    };
    return &table;
}
