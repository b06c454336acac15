/* encode_chunks.c - a chunk's hidden states become its memory: keys, values, one landmark. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/ref/ref.h"

/* Rotary embedding of one head at `position`: half-rotation layout, theta 10,000. */
static void rotate(float *x, uint32_t width, uint32_t position)
{
    const uint32_t half = width / 2;
    for (uint32_t i = 0; i < half; i++) {
        const float angle = (float)position * powf(10000.0f, -(float)(2 * i) / (float)width);
        const float cosine = cosf(angle), sine = sinf(angle), a = x[i], b = x[half + i];
        x[i] = a * cosine - b * sine;
        x[half + i] = b * cosine + a * sine;
    }
}

/* Heads of one position: linear, per-head norm, rotation; norm NULL: neither (values). */
static void project(const struct model_config *c, const struct ops_tensor *weight,
                    const struct ops_tensor *bias, const struct ops_tensor *norm, const float *x,
                    uint32_t position, float *out)
{
    ref_linear(weight, bias, x, out);
    for (uint32_t h = 0; norm && h < weight->rows / c->head_dim; h++) {
        float *head = out + (size_t)h * c->head_dim;
        ref_rms_norm(head, norm, c->head_dim, MODEL_MEMORY_EPSILON, head);
        rotate(head, c->head_dim, position);
    }
}

/* x [n, d] += attention(norm(x)), every position seeing every other. */
static void attention(const struct model_config *c, const struct ops_encoder_layer *w, uint32_t n,
                      float *x)
{
    const uint32_t d = c->hidden_size, hd = c->head_dim, kv = c->encoder_kv_heads * hd;
    float *normed = ref_scratch(d), *q = ref_scratch((size_t)n * d),
          *k = ref_scratch((size_t)n * kv), *v = ref_scratch((size_t)n * kv),
          *scores = ref_scratch(n), *out = ref_scratch((size_t)n * d);
    for (uint32_t t = 0; t < n; t++) {
        ref_rms_norm(x + (size_t)t * d, &w->input_norm, d, MODEL_MEMORY_EPSILON, normed);
        project(c, &w->q, &w->q_bias, &w->q_norm, normed, t, q + (size_t)t * d);
        project(c, &w->k, &w->k_bias, &w->k_norm, normed, t, k + (size_t)t * kv);
        project(c, &w->v, &w->v_bias, NULL, normed, t, v + (size_t)t * kv);
    }
    for (uint32_t t = 0; t < n; t++) {
        for (uint32_t h = 0; h < c->heads; h++) {
            const uint32_t from = h / (c->heads / c->encoder_kv_heads) * hd;
            const float *query = q + (size_t)t * d + (size_t)h * hd;
            for (uint32_t u = 0; u < n; u++) {
                scores[u] = 0;
                for (uint32_t i = 0; i < hd; i++)
                    scores[u] += query[i] * k[(size_t)u * kv + from + i];
                scores[u] /= sqrtf((float)hd);
            }
            ref_softmax(scores, n, false);
            for (uint32_t u = 0; u < n; u++)
                for (uint32_t i = 0; i < hd; i++)
                    out[(size_t)t * d + (size_t)h * hd + i] +=
                        scores[u] * v[(size_t)u * kv + from + i];
        }
        ref_linear(&w->o, NULL, out + (size_t)t * d, normed);
        for (uint32_t i = 0; i < d; i++)
            x[(size_t)t * d + i] += normed[i];
    }
    free(normed);
    free(q);
    free(k);
    free(v);
    free(scores);
    free(out);
}

/* x [n, d] += down(SiLU(gate(y)) * up(y)), y = norm(x). */
static void mlp(const struct model_config *c, const struct ops_encoder_layer *w, uint32_t n,
                float *x)
{
    const uint32_t d = c->hidden_size, m = c->encoder_mlp_size;
    float *y = ref_scratch(d), *gate = ref_scratch(m), *up = ref_scratch(m);
    for (uint32_t t = 0; t < n; t++) {
        ref_rms_norm(x + (size_t)t * d, &w->post_norm, d, MODEL_MEMORY_EPSILON, y);
        ref_linear(&w->gate, NULL, y, gate);
        ref_linear(&w->up, NULL, y, up);
        for (uint32_t i = 0; i < m; i++)
            up[i] *= ref_silu(gate[i]);
        ref_linear(&w->down, NULL, up, y);
        for (uint32_t i = 0; i < d; i++)
            x[(size_t)t * d + i] += y[i];
    }
    free(y);
    free(gate);
    free(up);
}

/* x [S + 1, d]: the S encoded tokens, then the summary that the landmark is made of. */
static void encode(const struct model_config *c, const struct ops_chunking_weights *w, float *x)
{
    const uint32_t d = c->hidden_size, s = c->chunk_tokens;
    float *summary = x + (size_t)s * d;
    if (!c->encoder_layers) {
        memset(summary, 0, d * sizeof *summary);
        for (uint32_t t = 0; t < s; t++) {
            float *row = x + (size_t)t * d;
            ref_rms_norm(row, &w->norm, d, MODEL_MEMORY_EPSILON, row);
            for (uint32_t i = 0; i < d; i++)
                summary[i] += row[i] / (float)s;
        }
        return;
    }
    for (uint32_t i = 0; i < d; i++)
        summary[i] = ref_at(&w->cls, i);
    for (uint32_t t = 0; c->encoder_prenorm && t <= s; t++)
        ref_rms_norm(x + (size_t)t * d, &w->enc_prenorm, d, MODEL_MEMORY_EPSILON,
                     x + (size_t)t * d);
    for (uint32_t j = 0; j < c->encoder_layers; j++) {
        attention(c, &w->encoder[j], s + 1, x);
        mlp(c, &w->encoder[j], s + 1, x);
    }
    for (uint32_t t = 0; t <= s; t++)
        ref_rms_norm(x + (size_t)t * d, &w->encoder_norm, d, MODEL_MEMORY_EPSILON,
                     x + (size_t)t * d);
}

void ref_encode_chunks(struct ops_context *context, const struct ops_chunking_weights *weights,
                       uint32_t count, const float *const *chunks, void *const *kv,
                       void *const *landmarks)
{
    const struct model_config *c = &context->config;
    const uint32_t d = c->hidden_size, s = c->chunk_tokens, n = c->kv_heads * c->head_dim;
    const uint32_t width = c->retrieval_dim / c->retrieval_heads;
    float *x = ref_scratch((size_t)(s + 1) * d),
          *row = ref_scratch(n > c->retrieval_dim ? n : c->retrieval_dim);
    for (uint32_t chunk = 0; chunk < count; chunk++) {
        memcpy(x, chunks[chunk], (size_t)s * d * sizeof *x);
        encode(c, weights, x);
        for (uint32_t t = 0; t < s; t++) {
            ref_linear(&weights->proj_k, NULL, x + (size_t)t * d, row);
            for (uint32_t h = 0; c->qk_norm && h < c->kv_heads; h++)
                ref_rms_norm(row + (size_t)h * c->head_dim, &weights->k_norm, c->head_dim,
                             MODEL_MEMORY_EPSILON, row + (size_t)h * c->head_dim);
            for (uint32_t i = 0; i < n; i++)
                ref_store(kv[chunk], context->memory_dtype, (size_t)t * n + i, row[i]);
            ref_linear(&weights->proj_v, NULL, x + (size_t)t * d, row);
            for (uint32_t i = 0; i < n; i++)
                ref_store(kv[chunk], context->memory_dtype, (size_t)(s + t) * n + i, row[i]);
        }
        ref_linear(&weights->landmark, NULL, x + (size_t)s * d, row);
        for (uint32_t h = 0; c->landmark_norm && h < c->retrieval_heads; h++)
            ref_rms_norm(row + (size_t)h * width, NULL, width, MODEL_MEMORY_EPSILON,
                         row + (size_t)h * width);
        for (uint32_t i = 0; i < c->retrieval_dim; i++)
            ref_store(landmarks[chunk], context->memory_dtype, i, row[i]);
    }
    free(x);
    free(row);
}
