/* retrieve.c - the scan over the landmarks with a streaming top-k: scores exist for one block of
 * landmarks at a time. Each worker keeps the best of the blocks it scanned; they are merged at the
 * end. Equal scores: the lower chunk wins, so the result does not depend on who scanned what. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/cpu/cpu.h"

struct retrieve {
    struct ops_context *context;
    const struct ops_retrieval_weights *weights;
    const struct ops_rows *rows;
    const struct ops_landmarks *landmarks;
    float *query; /* [rows, r] */
    const float *q_norm, *k_norm;
    struct ops_picks *picks;
    uint32_t segment;
};

static uint64_t visible(const struct model_config *c, uint64_t position, uint64_t count)
{
    uint64_t at = position;
    if (c->mask_slide_window) {
        const uint64_t hidden = c->slide_window - c->chunk_tokens;
        at = position > hidden ? position - hidden : 0;
    }
    at /= c->chunk_tokens;
    return at < count ? at : count;
}

/* Whether `a` goes before `b`: a higher score, or the same and an older chunk. */
static bool before(const struct cpu_pick *a, const struct cpu_pick *b)
{
    return a->score > b->score || (a->score == b->score && a->chunk < b->chunk);
}

static void insert(struct cpu_pick *best, uint32_t *count, uint32_t k, struct cpu_pick pick)
{
    uint32_t at = *count;
    while (at && before(&pick, &best[at - 1]))
        at--;
    if (at == k)
        return;
    const uint32_t kept = *count < k ? *count : k - 1;
    memmove(best + at + 1, best + at, (kept - at) * sizeof *best);
    best[at] = pick;
    *count = kept + 1;
}

/* Normalised and scaled queries, so that a score is a plain product. */
static void query_task(void *argument, uint32_t row, uint32_t worker)
{
    (void)worker;
    const struct retrieve *t = argument;
    const struct model_config *c = &t->context->config;
    const uint32_t width = c->retrieval_dim / c->retrieval_heads;
    const float scale = 1 / sqrtf((float)width);
    for (uint32_t h = 0; h < c->retrieval_heads; h++) {
        float *q = t->query + (size_t)row * c->retrieval_dim + (size_t)h * width;
        if (c->landmark_norm) {
            t->context->kernels->rms_norm(q, t->q_norm, width, MODEL_MEMORY_EPSILON, q);
            for (uint32_t e = 0; e < width; e++)
                q[e] *= t->k_norm[e];
        }
        for (uint32_t e = 0; e < width; e++)
            q[e] *= scale;
    }
}

/* Scores of `n` landmarks from `data` on against every row of the segment, for one head. */
static void score(const struct retrieve *t, const char *data, uint32_t n, uint32_t h, float *scores)
{
    const struct ops_context *x = t->context;
    const uint32_t r = x->config.retrieval_dim, width = r / x->config.retrieval_heads;
    const struct ops_segment *segment = &t->rows->segments[t->segment];
    const float *q = t->query + (size_t)segment->row * r + (size_t)h * width;
    if (segment->count <= CPU_FEW_ROWS) {
        x->kernels->skinny(data, x->memory_dtype, r, n, width, q, r, segment->count, scores, n,
                           false);
        return;
    }
    float *panels = scores + (size_t)CPU_SCAN * segment->count;
    x->kernels->pack_transposed(data, x->memory_dtype, r, n, width, panels);
    x->kernels->product(q, r, 1, panels, segment->count, n, width, 0, scores, n);
}

/* Landmarks [base, base + n), which begin at `data`, for one head. */
static void scan(const struct retrieve *t, const char *data, uint64_t base, uint32_t n, uint32_t h,
                 uint32_t worker)
{
    struct ops_context *x = t->context;
    const struct model_config *c = &x->config;
    const struct ops_segment *segment = &t->rows->segments[t->segment];
    const uint32_t k = c->topk;
    float *scores = cpu_scratch(x, worker);
    score(t, data, n, h, scores);
    for (uint32_t i = 0; i < segment->count; i++) {
        const size_t row =
            ((size_t)worker * x->max_rows + segment->row + i) * c->retrieval_heads + h;
        const uint64_t seen = visible(c, segment->position + i, t->landmarks[t->segment].count);
        const uint32_t end = seen <= base ? 0 : seen - base < n ? (uint32_t)(seen - base) : n;
        struct cpu_pick *best = x->picks + row * k;
        uint32_t *count = &x->pick_counts[row], at = 0;
        while (at < end) {
            /* A worker takes its blocks in order, so a later equal score never goes before. */
            if (*count == k)
                at = x->kernels->find_above(scores + (size_t)i * n, at, end, best[k - 1].score);
            if (at == end)
                break;
            insert(best, count, k, (struct cpu_pick){base + at, scores[(size_t)i * n + at]});
            at++;
        }
    }
}

/* One block of landmarks. */
static void scan_task(void *argument, uint32_t block, uint32_t worker)
{
    const struct retrieve *t = argument;
    const struct model_config *c = &t->context->config;
    const size_t element = t->context->memory_dtype == OPS_FP32 ? 4 : 2;
    const size_t width = c->retrieval_dim / c->retrieval_heads;
    const struct ops_landmarks *landmarks = &t->landmarks[t->segment];
    const char *data = landmarks->blocks[block];
    const uint64_t base = (uint64_t)block * OPS_LANDMARK_BLOCK, left = landmarks->count - base;
    const uint32_t count = left < OPS_LANDMARK_BLOCK ? (uint32_t)left : OPS_LANDMARK_BLOCK;
    for (uint32_t h = 0; h < c->retrieval_heads; h++)
        for (uint32_t at = 0; at < count; at += CPU_SCAN)
            scan(t, data + (at * c->retrieval_dim + h * width) * element, base + at,
                 count - at < CPU_SCAN ? count - at : CPU_SCAN, h, worker);
}

static int newest_first(const void *a, const void *b)
{
    const uint64_t x = ((const struct cpu_pick *)a)->chunk, y = ((const struct cpu_pick *)b)->chunk;
    return (x < y) - (x > y);
}

/* weights[count] of picks ordered newest first: stick-breaking, or a softmax. */
static void weigh(const struct ops_context *x, const struct ops_retrieval_weights *w,
                  const struct cpu_pick *best, uint32_t count, float *weights)
{
    if (x->config.softmax_weights) {
        for (uint32_t j = 0; j < count; j++)
            weights[j] = best[j].score + w->pos_decay * (float)j;
        if (count)
            x->kernels->softmax(weights, count, false);
        return;
    }
    float spent = 0;
    for (uint32_t j = 0; j < count; j++) {
        spent += cpu_softplus(best[j].score);
        weights[j] = expf(best[j].score - spent);
    }
}

/* What the workers found for one row, merged, ordered and weighed. */
static void merge_task(void *argument, uint32_t row, uint32_t worker)
{
    (void)worker;
    const struct retrieve *t = argument;
    const struct ops_context *x = t->context;
    const uint32_t heads = x->config.retrieval_heads, k = x->config.topk;
    for (uint32_t h = 0; h < heads; h++) {
        struct cpu_pick best[LIMITS_TOPK];
        uint32_t count = 0;
        for (uint32_t w = 0; w < pool_threads(x->pool); w++) {
            const size_t from = ((size_t)w * x->max_rows + row) * heads + h;
            for (uint32_t j = 0; j < x->pick_counts[from]; j++)
                insert(best, &count, k, x->picks[from * k + j]);
        }
        qsort(best, count, sizeof *best, newest_first);
        uint64_t *chunks = t->picks->chunks + ((size_t)row * heads + h) * k;
        float *weights = t->picks->weights + ((size_t)row * heads + h) * k;
        for (uint32_t j = 0; j < k; j++) {
            chunks[j] = j < count ? best[j].chunk : 0;
            weights[j] = 0;
        }
        weigh(x, t->weights, best, count, weights);
    }
}

void cpu_retrieve(struct ops_context *x, const struct ops_retrieval_weights *weights,
                  const struct ops_rows *rows, const struct ops_landmarks *landmarks,
                  const float *hidden, struct ops_picks *picks)
{
    const struct model_config *c = &x->config;
    cpu_begin(x);
    /* conv is free here, and at least as wide as the hidden state. */
    cpu_norm_rows(x, hidden, cpu_vector(x, &weights->pre_norm), c->hidden_size,
                  MODEL_MEMORY_EPSILON, rows->row_count, x->conv);
    cpu_linear(x, &weights->query, NULL, rows, x->conv, x->normed, false);
    struct retrieve t = {.context = x,
                         .weights = weights,
                         .rows = rows,
                         .landmarks = landmarks,
                         .query = x->normed,
                         .q_norm = cpu_vector(x, &weights->q_norm),
                         .k_norm = cpu_vector(x, &weights->k_norm),
                         .picks = picks};
    pool_run(x->pool, rows->row_count, query_task, &t);
    for (uint32_t w = 0; w < pool_threads(x->pool); w++)
        memset(x->pick_counts + (size_t)w * x->max_rows * c->retrieval_heads, 0,
               (size_t)rows->row_count * c->retrieval_heads * sizeof *x->pick_counts);
    for (t.segment = 0; t.segment < rows->segment_count; t.segment++) {
        const uint64_t blocks =
            (landmarks[t.segment].count + OPS_LANDMARK_BLOCK - 1) / OPS_LANDMARK_BLOCK;
        pool_run(x->pool, (uint32_t)blocks, scan_task, &t);
    }
    pool_run(x->pool, rows->row_count, merge_task, &t);
}
