/* hsa.c - hierarchical sparse attention: each picked chunk its own softmax, then their mix. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/ref/ref.h"

void ref_hsa_query(struct ops_context *context, const struct ops_hsa_weights *weights,
                   const struct ops_rows *rows, const float *x, float *q)
{
    const struct model_config *c = &context->config;
    const uint32_t d = c->hidden_size;
    float *y = ref_scratch(d);
    for (uint32_t row = 0; row < rows->row_count; row++) {
        ref_rms_norm(x + (size_t)row * d, &weights->pre_norm, d, MODEL_MEMORY_EPSILON, y);
        ref_linear(&weights->query, NULL, y, q + (size_t)row * d);
        for (uint32_t h = 0; c->qk_norm && h < c->heads; h++) {
            float *head = q + (size_t)row * d + (size_t)h * c->head_dim;
            ref_rms_norm(head, &weights->q_norm, c->head_dim, MODEL_MEMORY_EPSILON, head);
        }
    }
    free(y);
}

/* out[hd] += weight * softmax(q K^T / sqrt(hd)) V over one page, for kv head `g`. */
static void attend_page(const struct ops_context *context, const float *q, const void *page,
                        uint32_t g, float weight, float *scores, float *out)
{
    const struct model_config *c = &context->config;
    const uint32_t s = c->chunk_tokens, hd = c->head_dim, n = c->kv_heads * hd;
    for (uint32_t t = 0; t < s; t++) {
        scores[t] = 0;
        for (uint32_t i = 0; i < hd; i++)
            scores[t] += q[i] * ref_load(page, context->memory_dtype, (size_t)t * n + g * hd + i);
        scores[t] /= sqrtf((float)hd);
    }
    ref_softmax(scores, s, c->softmax1);
    for (uint32_t t = 0; t < s; t++)
        for (uint32_t i = 0; i < hd; i++)
            out[i] += weight * scores[t] *
                      ref_load(page, context->memory_dtype, (size_t)(s + t) * n + g * hd + i);
}

void ref_hsa_attend(struct ops_context *context, uint32_t row_count, const float *q,
                    const float *weights, const void *const *pages, float *o)
{
    const struct model_config *c = &context->config;
    float *scores = ref_scratch(c->chunk_tokens);
    memset(o, 0, (size_t)row_count * c->hidden_size * sizeof *o);
    for (uint32_t row = 0; row < row_count; row++) {
        for (uint32_t h = 0; h < c->heads; h++) {
            const uint32_t g = h / (c->heads / c->kv_heads);
            const uint32_t r = c->retrieval_heads == 1 ? 0 : g;
            const size_t at = (size_t)row * c->hidden_size + (size_t)h * c->head_dim;
            for (uint32_t j = 0; j < c->topk; j++) {
                const size_t pick = ((size_t)row * c->retrieval_heads + r) * c->topk + j;
                if (pages[pick])
                    attend_page(context, q + at, pages[pick], g, weights[pick], scores, o + at);
            }
        }
    }
    free(scores);
}

void ref_hsa_out(struct ops_context *context, const struct ops_hsa_weights *weights,
                 const struct ops_rows *rows, const float *o, float *x)
{
    const uint32_t d = context->config.hidden_size;
    float *y = ref_scratch(d);
    for (uint32_t row = 0; row < rows->row_count; row++) {
        ref_linear(&weights->out, NULL, o + (size_t)row * d, y);
        for (uint32_t i = 0; i < d; i++)
            x[(size_t)row * d + i] += y[i];
    }
    free(y);
}
