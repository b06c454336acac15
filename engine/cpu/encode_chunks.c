/* encode_chunks.c - hidden states of whole chunks become their memory. CPU_CHUNKS of them go
 * through each product together, every chunk a segment of its own. */
#include <math.h>
#include <string.h>

#include "engine/bf16.h"
#include "engine/cpu/cpu.h"

struct encode {
    struct ops_context *context;
    const struct ops_encoder_layer *layer;
    const float *q_norm, *k_norm;
    uint32_t rows; /* of all chunks: count * (S + 1) */
    float scale;
};

/* Rotary embedding of one head at a position: half-rotation layout. */
static void rotate(const struct ops_context *x, float *head, uint32_t position)
{
    const uint32_t half = x->config.head_dim / 2;
    const float *cosine = x->rope + (size_t)position * half;
    const float *sine = cosine + (size_t)(x->config.chunk_tokens + 1) * half;
    for (uint32_t i = 0; i < half; i++) {
        const float a = head[i], b = head[half + i];
        head[i] = a * cosine[i] - b * sine[i];
        head[half + i] = b * cosine[i] + a * sine[i];
    }
}

static void heads_task(void *argument, uint32_t row, uint32_t worker)
{
    (void)worker;
    const struct encode *t = argument;
    const struct ops_context *x = t->context;
    const struct model_config *c = &x->config;
    const uint32_t position = row % (c->chunk_tokens + 1), hd = c->head_dim;
    for (uint32_t h = 0; h < c->heads; h++) {
        float *q = x->encoder_q + (size_t)row * c->hidden_size + (size_t)h * hd;
        x->kernels->rms_norm(q, t->q_norm, hd, MODEL_MEMORY_EPSILON, q);
        rotate(x, q, position);
        for (uint32_t i = 0; i < hd; i++)
            q[i] *= t->scale;
    }
    for (uint32_t h = 0; h < c->encoder_kv_heads; h++) {
        float *k = x->encoder_k + ((size_t)row * c->encoder_kv_heads + h) * hd;
        x->kernels->rms_norm(k, t->k_norm, hd, MODEL_MEMORY_EPSILON, k);
        rotate(x, k, position);
    }
}

/* One head of one chunk: softmax(Q K^T / sqrt(hd)) V into encoder_y. */
static void attention_task(void *argument, uint32_t index, uint32_t worker)
{
    const struct encode *t = argument;
    const struct ops_context *x = t->context;
    const struct model_config *c = &x->config;
    const uint32_t h = index % c->heads, n = c->chunk_tokens + 1, hd = c->head_dim;
    const size_t row = (size_t)(index / c->heads) * n, d = c->hidden_size;
    const size_t kv = (size_t)c->encoder_kv_heads * hd;
    const size_t from = row * kv + (size_t)(h / (c->heads / c->encoder_kv_heads)) * hd;
    float *p = cpu_scratch(x, worker);
    float *keys = p + (size_t)n * n, *values = keys + cpu_panels(n) * hd;
    x->kernels->pack_transposed(x->encoder_k + from, OPS_FP32, kv, n, hd, keys);
    x->kernels->pack(x->encoder_v + from, kv, NULL, n, hd, values);
    x->kernels->product(x->encoder_q + row * d + (size_t)h * hd, d, 1, keys, n, n, hd, 0, p, n);
    for (uint32_t i = 0; i < n; i++)
        x->kernels->softmax(p + (size_t)i * n, n, false);
    x->kernels->product(p, n, 1, values, n, hd, n, 0, x->encoder_y + row * d + (size_t)h * hd, d);
}

static void gate_task(void *argument, uint32_t row, uint32_t worker)
{
    (void)worker;
    const struct encode *t = argument;
    const struct ops_context *x = t->context;
    const size_t m = x->config.encoder_mlp_size;
    x->kernels->silu_multiply(x->encoder_up + row * m, x->encoder_q + row * m, (uint32_t)m);
}

static void encoder_layer(struct ops_context *x, const struct ops_encoder_layer *w,
                          const struct ops_rows *rows)
{
    const struct model_config *c = &x->config;
    const uint32_t d = c->hidden_size;
    cpu_begin(x);
    struct encode t = {.context = x,
                       .layer = w,
                       .q_norm = cpu_vector(x, &w->q_norm),
                       .k_norm = cpu_vector(x, &w->k_norm),
                       .scale = 1 / sqrtf((float)c->head_dim)};
    cpu_norm_rows(x, x->encoder_x, cpu_vector(x, &w->input_norm), d, MODEL_MEMORY_EPSILON,
                  rows->row_count, x->encoder_y);
    cpu_linear(x, &w->q, cpu_vector(x, &w->q_bias), rows, x->encoder_y, x->encoder_q, false);
    cpu_linear(x, &w->k, cpu_vector(x, &w->k_bias), rows, x->encoder_y, x->encoder_k, false);
    cpu_linear(x, &w->v, cpu_vector(x, &w->v_bias), rows, x->encoder_y, x->encoder_v, false);
    pool_run(x->pool, rows->row_count, heads_task, &t);
    pool_run(x->pool, rows->segment_count * c->heads, attention_task, &t);
    cpu_linear(x, &w->o, NULL, rows, x->encoder_y, x->encoder_x, true);
    cpu_norm_rows(x, x->encoder_x, cpu_vector(x, &w->post_norm), d, MODEL_MEMORY_EPSILON,
                  rows->row_count, x->encoder_y);
    cpu_linear(x, &w->gate, NULL, rows, x->encoder_y, x->encoder_q, false);
    cpu_linear(x, &w->up, NULL, rows, x->encoder_y, x->encoder_up, false);
    pool_run(x->pool, rows->row_count, gate_task, &t);
    cpu_linear(x, &w->down, NULL, rows, x->encoder_up, x->encoder_x, true);
}

/* encoder_x: each chunk's S rows and a row for its summary, before and after. */
static void encode(struct ops_context *x, const struct ops_chunking_weights *w,
                   const struct ops_rows *rows)
{
    const struct model_config *c = &x->config;
    const uint32_t d = c->hidden_size, s = c->chunk_tokens;
    cpu_begin(x);
    if (!c->encoder_layers) {
        cpu_norm_rows(x, x->encoder_x, cpu_vector(x, &w->norm), d, MODEL_MEMORY_EPSILON,
                      rows->row_count, x->encoder_x);
        for (uint32_t i = 0; i < rows->segment_count; i++) {
            const float *from = x->encoder_x + (size_t)i * (s + 1) * d;
            float *summary = x->encoder_x + ((size_t)i * (s + 1) + s) * d;
            memset(summary, 0, d * sizeof *summary);
            for (uint32_t j = 0; j < s; j++)
                x->kernels->add_scaled(summary, from + (size_t)j * d, 1 / (float)s, d);
        }
        return;
    }
    const float *cls = cpu_vector(x, &w->cls);
    for (uint32_t i = 0; i < rows->segment_count; i++)
        memcpy(x->encoder_x + ((size_t)i * (s + 1) + s) * d, cls, d * sizeof *cls);
    if (c->encoder_prenorm)
        cpu_norm_rows(x, x->encoder_x, cpu_vector(x, &w->enc_prenorm), d, MODEL_MEMORY_EPSILON,
                      rows->row_count, x->encoder_x);
    for (uint32_t j = 0; j < c->encoder_layers; j++)
        encoder_layer(x, &w->encoder[j], rows);
    cpu_begin(x);
    cpu_norm_rows(x, x->encoder_x, cpu_vector(x, &w->encoder_norm), d, MODEL_MEMORY_EPSILON,
                  rows->row_count, x->encoder_x);
}

static void store(const struct ops_context *x, void *to, size_t at, const float *from, size_t n)
{
    if (x->memory_dtype == OPS_FP32) {
        memcpy((float *)to + at, from, n * sizeof *from);
        return;
    }
    uint16_t *out = (uint16_t *)to + at;
    for (size_t i = 0; i < n; i++)
        out[i] = bf16_from_float(from[i]);
}

/* Keys, values and landmarks of the encoded chunks into their pages. */
static void write_memory(struct ops_context *x, const struct ops_chunking_weights *w,
                         const struct ops_rows *rows, void *const *kv, void *const *landmarks)
{
    const struct model_config *c = &x->config;
    const uint32_t s = c->chunk_tokens, n = c->kv_heads * c->head_dim;
    const uint32_t width = c->retrieval_dim / c->retrieval_heads;
    cpu_begin(x);
    const float *k_norm = cpu_vector(x, &w->k_norm);
    /* Keys and values of the summary's row are computed along and left out. */
    cpu_linear(x, &w->proj_k, NULL, rows, x->encoder_x, x->encoder_k, false);
    cpu_linear(x, &w->proj_v, NULL, rows, x->encoder_x, x->encoder_v, false);
    struct ops_segment single[CPU_CHUNKS];
    for (uint32_t i = 0; i < rows->segment_count; i++) {
        const size_t row = (size_t)i * (s + 1);
        for (size_t h = 0; k_norm && h < (size_t)s * c->kv_heads; h++) {
            float *head = x->encoder_k + row * n + h * c->head_dim;
            x->kernels->rms_norm(head, k_norm, c->head_dim, MODEL_MEMORY_EPSILON, head);
        }
        store(x, kv[i], 0, x->encoder_k + row * n, (size_t)s * n);
        store(x, kv[i], (size_t)s * n, x->encoder_v + row * n, (size_t)s * n);
        memcpy(x->encoder_q + (size_t)i * c->hidden_size, x->encoder_x + (row + s) * c->hidden_size,
               c->hidden_size * sizeof(float));
        single[i] = (struct ops_segment){.row = i, .count = 1};
    }
    const struct ops_rows summaries = {single, rows->segment_count, rows->segment_count};
    cpu_linear(x, &w->landmark, NULL, &summaries, x->encoder_q, x->encoder_y, false);
    for (uint32_t i = 0; i < rows->segment_count; i++) {
        float *m = x->encoder_y + (size_t)i * c->retrieval_dim;
        for (uint32_t h = 0; c->landmark_norm && h < c->retrieval_heads; h++)
            x->kernels->rms_norm(m + (size_t)h * width, NULL, width, MODEL_MEMORY_EPSILON,
                                 m + (size_t)h * width);
        store(x, landmarks[i], 0, m, c->retrieval_dim);
    }
}

void cpu_encode_chunks(struct ops_context *x, const struct ops_chunking_weights *weights,
                       uint32_t count, const float *const *chunks, void *const *kv,
                       void *const *landmarks)
{
    const struct model_config *c = &x->config;
    const uint32_t s = c->chunk_tokens, d = c->hidden_size;
    for (uint32_t first = 0; first < count; first += CPU_CHUNKS) {
        const uint32_t n = count - first < CPU_CHUNKS ? count - first : CPU_CHUNKS;
        struct ops_segment segments[CPU_CHUNKS];
        for (uint32_t i = 0; i < n; i++) {
            segments[i] = (struct ops_segment){.row = i * (s + 1), .count = s + 1};
            memcpy(x->encoder_x + (size_t)i * (s + 1) * d, chunks[first + i],
                   (size_t)s * d * sizeof(float));
        }
        const struct ops_rows rows = {segments, n, n * (s + 1)};
        encode(x, weights, &rows);
        write_memory(x, weights, &rows, kv + first, landmarks + first);
    }
}
