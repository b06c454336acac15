/* ref.h - what the files of ref/ share: plain fp32 helpers, written to be read.
 * Thread: the engine's. Owns nothing. Private to ref/. */
#ifndef ENGINE_REF_REF_H
#define ENGINE_REF_REF_H

#include "engine/bf16.h"
#include "engine/ops.h"
#include "proto/limits.h"

struct ops_context {
    struct model_config config;
    enum ops_dtype memory_dtype;
    bool states_bf16;
};

/* Element `i` of a tensor, or of memory of a dtype. */
static inline float ref_at(const struct ops_tensor *tensor, size_t i)
{
    return tensor->dtype == OPS_FP32 ? ((const float *)tensor->data)[i]
                                     : bf16_to_float(((const uint16_t *)tensor->data)[i]);
}

static inline float ref_load(const void *memory, enum ops_dtype dtype, size_t i)
{
    return dtype == OPS_FP32 ? ((const float *)memory)[i]
                             : bf16_to_float(((const uint16_t *)memory)[i]);
}

static inline void ref_store(void *memory, enum ops_dtype dtype, size_t i, float x)
{
    if (dtype == OPS_FP32)
        ((float *)memory)[i] = x;
    else
        ((uint16_t *)memory)[i] = bf16_from_float(x);
}

/* Zeroed scratch; running out of it is fatal here, as ref/ is for tests. */
float *ref_scratch(size_t count);
/* out[n] = W x + bias; bias->data NULL: none. */
void ref_linear(const struct ops_tensor *weight, const struct ops_tensor *bias, const float *x,
                float *out);
/* out[n] = x / rms(x) * weight; weight NULL or without data: 1. May be in place. */
void ref_rms_norm(const float *x, const struct ops_tensor *weight, size_t n, float epsilon,
                  float *out);
float ref_silu(float x);
float ref_softplus(float x);
/* In place over n scores; `extra`: one more exp(0) in the denominator (softmax1). */
void ref_softmax(float *x, size_t n, bool extra);

void ref_pack_state(struct ops_context *context, float *state, size_t count, void *packed);
void ref_unpack_state(struct ops_context *context, const void *packed, size_t count, float *state);
void ref_embed(struct ops_context *context, const struct ops_tensor *table, const int32_t *tokens,
               uint32_t row_count, float *out);
void ref_mamba(struct ops_context *context, const struct ops_mamba_weights *weights,
               const struct ops_rows *rows, const struct ops_mamba_state *states, float *x);
void ref_encode_chunks(struct ops_context *context, const struct ops_chunking_weights *weights,
                       uint32_t count, const float *const *chunks, void *const *kv,
                       void *const *landmarks);
void ref_retrieve(struct ops_context *context, const struct ops_retrieval_weights *weights,
                  const struct ops_rows *rows, const struct ops_landmarks *landmarks,
                  const float *x, struct ops_picks *picks);
void ref_hsa_query(struct ops_context *context, const struct ops_hsa_weights *weights,
                   const struct ops_rows *rows, const float *x, float *q);
void ref_hsa_attend(struct ops_context *context, uint32_t row_count, const float *q,
                    const float *weights, const void *const *pages, float *o);
void ref_hsa_out(struct ops_context *context, const struct ops_hsa_weights *weights,
                 const struct ops_rows *rows, const float *o, float *x);
void ref_logits(struct ops_context *context, const struct ops_tensor *norm,
                const struct ops_tensor *head, const struct ops_rows *rows, const float *x,
                float *logits);

#endif
