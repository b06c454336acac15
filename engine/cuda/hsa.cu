/* hsa.cu - hierarchical sparse attention: each picked chunk its own softmax, then their mix. */
#include <stdlib.h>

#include "engine/cuda/device.cuh"
#include "engine/cuda/hsa.cuh"

#define ATTEND_WARPS 4

/* Heads of `width` elements, each divided by its root mean square and scaled. A warp a head. */
static __global__ void norm_heads(float *x, const float *weight, uint32_t width, size_t count)
{
    const size_t head = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / CUDA_WARP;
    const uint32_t lane = threadIdx.x % CUDA_WARP;
    if (head >= count)
        return;
    float *row = x + head * width, sum = 0;
    for (uint32_t i = lane; i < width; i += CUDA_WARP)
        sum = fmaf(row[i], row[i], sum);
    const float scale = 1 / sqrtf(cuda_warp_sum(sum) / (float)width + MODEL_MEMORY_EPSILON);
    for (uint32_t i = lane; i < width; i += CUDA_WARP)
        row[i] *= scale * weight[i];
}

extern "C" void cuda_hsa_query(struct ops_context *x, const struct ops_hsa_weights *w,
                               const struct ops_rows *rows, const float *hidden, float *q)
{
    const struct model_config *c = &x->config;
    const size_t heads = (size_t)rows->row_count * c->heads;
    cuda_step_flush(x);
    const struct cuda_input in = {hidden, &w->pre_norm, MODEL_MEMORY_EPSILON, NULL, false};
    cuda_norm_linear(x, &in, &w->query, NULL, rows, q, false);
    if (c->qk_norm)
        CUDA_LAUNCH(x, norm_heads, dim3(cuda_ceil(heads, 8)), dim3(8 * CUDA_WARP), 0, q,
                    (const float *)w->q_norm.data, c->head_dim, heads);
}

/* One row's query heads of one kv head, a warp each. Scores of a page lie in the warp's shared
 * memory; the sums over picks lie in `o` itself, where each element is one lane's own. Grid: rows x
 * kv heads. */
template <typename T>
static __global__ void __launch_bounds__(ATTEND_WARPS *CUDA_WARP)
    attend(struct hsa_shape s, const float *q, const float *weights, const T *const *pages,
           float *o)
{
    CUDA_SHARED(float, shared);
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const uint32_t g = blockIdx.y, heads = s.heads / s.kv_heads, n = s.kv_heads * s.width;
    const uint32_t r = s.retrieval_heads == 1 ? 0 : g;
    const size_t pick = ((size_t)blockIdx.x * s.retrieval_heads + r) * s.topk;
    float *scores = shared + warp * s.tokens;
    for (uint32_t h = warp; h < heads; h += ATTEND_WARPS) {
        const size_t at = ((size_t)blockIdx.x * s.heads + g * heads + h) * s.width;
        for (uint32_t i = lane; i < s.width; i += CUDA_WARP)
            o[at + i] = 0;
        for (uint32_t j = 0; j < s.topk; j++) {
            if (!pages[pick + j])
                continue;
            const T *keys = pages[pick + j] + g * s.width, *values = keys + (size_t)s.tokens * n;
            float top = s.softmax1 ? 0 : -INFINITY, sum = 0;
            for (uint32_t t = lane; t < s.tokens; t += CUDA_WARP) {
                float score = 0;
                for (uint32_t i = 0; i < s.width; i++)
                    score = fmaf(q[at + i], cuda_float(keys[(size_t)t * n + i]), score);
                score *= s.scale;
                scores[t] = score;
                top = fmaxf(top, score);
            }
            top = cuda_warp_max(top);
            for (uint32_t t = lane; t < s.tokens; t += CUDA_WARP) {
                scores[t] = expf(scores[t] - top);
                sum += scores[t];
            }
            sum = cuda_warp_sum(sum); /* and every lane's scores are written */
            if (s.softmax1)
                sum += expf(-top);
            __syncwarp();
            const float share = weights[pick + j] / sum;
            for (uint32_t i = lane; i < s.width; i += CUDA_WARP) {
                float value = 0;
                for (uint32_t t = 0; t < s.tokens; t++)
                    value = fmaf(scores[t], cuda_float(values[(size_t)t * n + i]), value);
                o[at + i] = fmaf(share, value, o[at + i]);
            }
            __syncwarp();
        }
    }
}

static void launch_attend(struct ops_context *x, uint32_t row_count, const float *q,
                          const float *weights, const void *const *pages, float *o)
{
    const struct model_config *c = &x->config;
    struct hsa_shape s;
    s.heads = c->heads;
    s.kv_heads = c->kv_heads;
    s.retrieval_heads = c->retrieval_heads;
    s.topk = c->topk;
    s.tokens = c->chunk_tokens;
    s.width = c->head_dim;
    s.scale = 1 / sqrtf((float)c->head_dim);
    s.softmax1 = c->softmax1;
    if (cuda_attend_pages(x, s, row_count, q, weights, pages, o))
        return;
    const dim3 grid(row_count, c->kv_heads), block(ATTEND_WARPS * CUDA_WARP);
    const size_t shared = (size_t)ATTEND_WARPS * c->chunk_tokens * sizeof(float);
    if (x->wide)
        CUDA_LAUNCH(x, attend<float>, grid, block, shared, s, q, weights,
                    (const float *const *)pages, o);
    else
        CUDA_LAUNCH(x, attend<bf16>, grid, block, shared, s, q, weights, (const bf16 *const *)pages,
                    o);
}

/* Device pages of as many rows from `first` on as the pool holds at once; returns how many. */
static uint32_t take_rows(struct ops_context *x, uint32_t first, uint32_t row_count,
                          const void *const *pages, const void **device)
{
    const size_t picks = (size_t)x->config.retrieval_heads * x->config.topk;
    cuda_pages_begin(x);
    const size_t taken =
        cuda_pages_take(x, pages + first * picks, (row_count - first) * picks, device);
    cuda_pages_end(x);
    const uint32_t count = x->failed ? 0 : (uint32_t)(taken / picks);
    ASSERT(count || x->failed); /* one row always fits: see cuda_pages_open */
    return count;
}

extern "C" void cuda_hsa_attend(struct ops_context *x, uint32_t row_count, const float *q,
                                const float *weights, const void *const *pages, float *o)
{
    const struct model_config *c = &x->config;
    const size_t picks = (size_t)c->retrieval_heads * c->topk, d = c->hidden_size;
    if (x->recording) {
        const float *shares;
        const void *const *own;
        cuda_step_pages(x, &shares, &own);
        launch_attend(x, row_count, q, shares, own, o);
        return;
    }
    if (!pages) {
        launch_attend(x, row_count, q, x->pick_weights, cuda_picked_pages(x, row_count), o);
        cuda_pages_settle(x);
        return;
    }
    cuda_begin(x);
    const void **device = (const void **)malloc(sizeof *device * picks * (row_count + 1));
    if (!device)
        cuda_fail(x, STATUS_NO_MEMORY, "out of memory for a step's pages");
    for (uint32_t first = 0; first < row_count && !x->failed;) {
        const uint32_t count = take_rows(x, first, row_count, pages, device);
        const void *const *staged =
            (const void *const *)cuda_stage(x, device, sizeof *device * picks * count);
        const float *shares =
            (const float *)cuda_stage(x, weights + first * picks, sizeof *weights * picks * count);
        launch_attend(x, count, q + first * d, shares, staged, o + first * d);
        first += count;
    }
    free(device);
    cuda_pages_settle(x); /* the caller may change its pages from here on */
}

extern "C" void cuda_hsa_out(struct ops_context *x, const struct ops_hsa_weights *w,
                             const struct ops_rows *rows, const float *o, float *hidden)
{
    const struct cuda_input in = {o, NULL, 0, NULL, false};
    cuda_norm_linear(x, &in, &w->out, NULL, rows, hidden, true);
}
