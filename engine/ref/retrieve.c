/* retrieve.c - which chunks a token may read, and how much of each. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/ref/ref.h"

struct pick {
    uint64_t chunk;
    float score;
};

/* Chunks visible at `position`: c with position >= (c+1) S, or the slide-window form of it. */
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

/* Keeps the K best in order of score; equal scores keep the lower chunk, which came first. */
static void insert(struct pick *best, uint32_t *count, uint32_t k, struct pick pick)
{
    uint32_t at = *count;
    while (at && best[at - 1].score < pick.score)
        at--;
    if (at == k)
        return;
    const uint32_t kept = *count < k ? *count : k - 1;
    memmove(best + at + 1, best + at, (kept - at) * sizeof *best);
    best[at] = pick;
    *count = kept + 1;
}

static int newest_first(const void *a, const void *b)
{
    const uint64_t x = ((const struct pick *)a)->chunk, y = ((const struct pick *)b)->chunk;
    return (x < y) - (x > y);
}

/* weights[count] of picks ordered newest first: stick-breaking, or a softmax. */
static void weigh(const struct model_config *c, const struct ops_retrieval_weights *w,
                  const struct pick *best, uint32_t count, float *weights)
{
    if (c->softmax_weights) {
        for (uint32_t j = 0; j < count; j++)
            weights[j] = best[j].score + w->pos_decay * (float)j;
        ref_softmax(weights, count, false);
        return;
    }
    float spent = 0;
    for (uint32_t j = 0; j < count; j++) {
        spent += ref_softplus(best[j].score);
        weights[j] = expf(best[j].score - spent);
    }
}

void ref_retrieve(struct ops_context *context, const struct ops_retrieval_weights *weights,
                  const struct ops_rows *rows, const struct ops_landmarks *landmarks,
                  const float *x, struct ops_picks *picks)
{
    const struct model_config *c = &context->config;
    const uint32_t heads = c->retrieval_heads, width = c->retrieval_dim / heads, k = c->topk;
    float *y = ref_scratch(c->hidden_size), *q = ref_scratch(c->retrieval_dim);
    struct pick best[LIMITS_TOPK];
    for (uint32_t i = 0; i < rows->segment_count; i++) {
        const struct ops_segment *segment = &rows->segments[i];
        for (uint32_t t = 0; t < segment->count; t++) {
            const size_t row = segment->row + t;
            const uint64_t seen = visible(c, segment->position + t, landmarks[i].count);
            ref_rms_norm(x + row * c->hidden_size, &weights->pre_norm, c->hidden_size,
                         MODEL_MEMORY_EPSILON, y);
            ref_linear(&weights->query, NULL, y, q);
            for (uint32_t h = 0; h < heads; h++) {
                float *query = q + (size_t)h * width;
                if (c->landmark_norm) {
                    ref_rms_norm(query, &weights->q_norm, width, MODEL_MEMORY_EPSILON, query);
                    for (uint32_t e = 0; e < width; e++)
                        query[e] *= ref_at(&weights->k_norm, e);
                }
                uint32_t count = 0;
                for (uint64_t chunk = 0; chunk < seen; chunk++) {
                    const void *block = landmarks[i].blocks[chunk / OPS_LANDMARK_BLOCK];
                    const size_t from =
                        chunk % OPS_LANDMARK_BLOCK * c->retrieval_dim + (size_t)h * width;
                    float score = 0;
                    for (uint32_t e = 0; e < width; e++)
                        score += query[e] * ref_load(block, context->memory_dtype, from + e);
                    insert(best, &count, k, (struct pick){chunk, score / sqrtf((float)width)});
                }
                qsort(best, count, sizeof *best, newest_first);
                uint64_t *chunks = picks->chunks + (row * heads + h) * k;
                float *out = picks->weights + (row * heads + h) * k;
                memset(chunks, 0, k * sizeof *chunks);
                memset(out, 0, k * sizeof *out);
                for (uint32_t j = 0; j < count; j++)
                    chunks[j] = best[j].chunk;
                weigh(c, weights, best, count, out);
            }
        }
    }
    free(y);
    free(q);
}
