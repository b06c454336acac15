/* cpu.h - what the files of cpu/ share: the context, weights as floats, the matrix product.
 * Thread: the engine's; tasks of a pool_run on any worker. Private to cpu/. */
#ifndef ENGINE_CPU_CPU_H
#define ENGINE_CPU_CPU_H

#include "engine/cpu/kernels.h"
#include "engine/cpu/pool.h"
#include "engine/ops.h"
#include "proto/limits.h"

#define CPU_BLOCK 64   /* tokens of a block of the chunked (SSD) form */
#define CPU_FEW_ROWS 8 /* up to here a segment's rows go through the skinny product */
#define CPU_TILE 64    /* outputs of one task of a product; whole panels */
#define CPU_DEPTH 512  /* of what is multiplied at a time, so that a packed tile stays in cache */
#define CPU_SCAN 64    /* landmarks scored at a time; whole panels, within a landmark block */
#define CPU_CHUNKS 4   /* chunks encoded together */

struct ops_context {
    struct model_config config;
    enum ops_dtype memory_dtype;
    bool states_bf16;
    uint32_t max_rows;
    struct pool *pool;
    const struct cpu_kernels *kernels;
    char description[96];
    float *scratch; /* [threads, scratch_floats]: each worker's own */
    size_t scratch_floats;
    float *vectors; /* small weights of the op under way, as floats */
    size_t vector_floats, vector_used;
    /* Activations of the op under way, [max_rows or encoder rows, ...]. */
    float *normed, *projected, *conv, *mixed, *dt, *scores;
    float *encoder_x, *encoder_y, *encoder_q, *encoder_k, *encoder_v, *encoder_up;
    float *rope;            /* [S + 1, hd / 2] cosines, then as many sines */
    struct cpu_pick *picks; /* [threads, max_rows, Hr, K] */
    uint32_t *pick_counts;  /* [threads, max_rows, Hr] */
};

struct cpu_pick {
    uint64_t chunk;
    float score;
};

/* n rounded up to whole panels of any kernels: floats in a row of packed columns. */
static inline size_t cpu_panels(size_t n)
{
    return (n + 31) / 32 * 32;
}

static inline float *cpu_scratch(const struct ops_context *context, uint32_t worker)
{
    return context->scratch + (size_t)worker * context->scratch_floats;
}

/* Forgets the vectors of the op before. */
static inline void cpu_begin(struct ops_context *context)
{
    context->vector_used = 0;
}
/* A small tensor as floats: itself, or a copy that lives until cpu_begin. NULL when absent. */
const float *cpu_vector(struct ops_context *context, const struct ops_tensor *tensor);

/* out [rows, W.rows] = x [rows, W.cols] W^T + bias, or += with `add`. Segments of few rows share
 * each weight as it is read; longer ones are multiplied by packed tiles of it. */
void cpu_linear(struct ops_context *context, const struct ops_tensor *weight, const float *bias,
                const struct ops_rows *rows, const float *x, float *out, bool add);
/* out[row] = RMSNorm(x[row]) of n elements, row_count rows; in place allowed. */
void cpu_norm_rows(struct ops_context *context, const float *x, const float *weight, uint32_t n,
                   float epsilon, uint32_t row_count, float *out);
float cpu_softplus(float x);

void cpu_pack_state(struct ops_context *context, float *state, size_t count, void *packed);
void cpu_unpack_state(struct ops_context *context, const void *packed, size_t count, float *state);
void cpu_embed(struct ops_context *context, const struct ops_tensor *table, const int32_t *tokens,
               uint32_t row_count, float *out);
void cpu_mamba(struct ops_context *context, const struct ops_mamba_weights *weights,
               const struct ops_rows *rows, const struct ops_mamba_state *states, float *x);
void cpu_encode_chunks(struct ops_context *context, const struct ops_chunking_weights *weights,
                       uint32_t count, const float *const *chunks, void *const *kv,
                       void *const *landmarks);
void cpu_retrieve(struct ops_context *context, const struct ops_retrieval_weights *weights,
                  const struct ops_rows *rows, const struct ops_landmarks *landmarks,
                  const float *x, struct ops_picks *picks);
void cpu_hsa_query(struct ops_context *context, const struct ops_hsa_weights *weights,
                   const struct ops_rows *rows, const float *x, float *q);
void cpu_hsa_attend(struct ops_context *context, uint32_t row_count, const float *q,
                    const float *weights, const void *const *pages, float *o);
void cpu_hsa_out(struct ops_context *context, const struct ops_hsa_weights *weights,
                 const struct ops_rows *rows, const float *o, float *x);
void cpu_logits(struct ops_context *context, const struct ops_tensor *norm,
                const struct ops_tensor *head, const struct ops_rows *rows, const float *x,
                float *logits);

#endif
