/* hsa_pages.cu - hierarchical sparse attention on tensor cores: the query heads that share a kv
 * head are the rows of one tile, pages stream through shared memory in halves (K, then V), each
 * picked chunk has its own softmax in registers, and its weight goes to the probabilities, so that
 * all picks add up in the same sums. For bf16, chunks of 64 and heads of 64 or 128; hsa.cu has the
 * plain form of the same. */
#include "engine/cuda/device.cuh"
#include "engine/cuda/hsa.cuh"

#define TOKENS 64
#define TILE 16 /* query heads of a tile */
#define LOG2_E 1.4426950408889634f

/* One half of a page, from rows `stride` apart; a group of copies of its own, an empty one when
 * there is no page. */
template <int HD>
static __device__ __forceinline__ void fetch(bf16 *to, const bf16 *from, uint32_t stride)
{
    constexpr uint32_t units = HD / 8;
    if (from)
#pragma unroll
        for (uint32_t k = 0; k < TOKENS * units / CUDA_WARP; k++) {
            const uint32_t i = k * CUDA_WARP + threadIdx.x % CUDA_WARP, row = i / units;
            cuda_copy_async(to + cuda_swizzled<HD>(row, i % units * 8),
                            from + (size_t)row * stride + i % units * 8);
        }
    cuda_copy_commit();
}

/* The tile's queries, scaled for exp2, as the tensor cores take them; rows without a head zeros. */
template <int HD>
static __device__ __forceinline__ void load_queries(const float *q, uint32_t heads, float scale,
                                                    uint32_t out[HD / 16][4])
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, top = lane / 4, pair = lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < HD / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t row = top + i % 2 * 8;
            float2 v = {0, 0};
            if (row < heads)
                v = *reinterpret_cast<const float2 *>(q + row * HD + k * 16 + i / 2 * 8 + pair);
            out[k][i] = cuda_pack(v.x * scale, v.y * scale);
        }
}

/* The largest, or the sum, of a row of a tile: over the four lanes that share it. */
static __device__ __forceinline__ float row_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(CUDA_ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(CUDA_ALL_LANES, x, 2));
}

static __device__ __forceinline__ float row_sum(float x)
{
    x += __shfl_xor_sync(CUDA_ALL_LANES, x, 1);
    return x + __shfl_xor_sync(CUDA_ALL_LANES, x, 2);
}

/* weight * softmax(q K^T), as the tensor cores take it. */
template <int HD>
static __device__ __forceinline__ void weigh_keys(const uint32_t q[HD / 16][4], const bf16 *keys,
                                                  float weight, bool softmax1,
                                                  uint32_t out[TOKENS / 16][4])
{
    float scores[TOKENS / 8][4] = {};
#pragma unroll
    for (int k = 0; k < HD / 16; k++)
#pragma unroll
        for (int n = 0; n < TOKENS / 16; n++) {
            uint32_t b[4];
            cuda_load_matrices(b, cuda_swizzled_row<HD>(keys, n * 16, k * 16, false));
            cuda_mma(scores[2 * n], q[k], b);
            cuda_mma(scores[2 * n + 1], q[k], b + 2);
        }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float top = softmax1 ? 0 : -INFINITY, sum = 0;
#pragma unroll
        for (int n = 0; n < TOKENS / 8; n++)
            top = fmaxf(top, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
        top = row_max(top);
#pragma unroll
        for (int n = 0; n < TOKENS / 8; n++)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; i++) {
                scores[n][i] = cuda_exp2(scores[n][i] - top);
                sum += scores[n][i];
            }
        sum = row_sum(sum) + (softmax1 ? cuda_exp2(-top) : 0);
        const float share = weight / sum;
#pragma unroll
        for (int n = 0; n < TOKENS / 8; n++)
            out[n / 2][n % 2 * 2 + half] =
                cuda_pack(scores[n][2 * half] * share, scores[n][2 * half + 1] * share);
    }
}

/* W warps share the picks of one row and kv head; each has room for U halves of pages, of which all
 * but one are on their way. `early`: pages may be fetched before the kernel in front has ended,
 * which does not write them. Grid: rows x kv heads. */
template <int HD, int W, int U>
static __global__ void __launch_bounds__(W *CUDA_WARP)
    attend_pages(struct hsa_shape s, const float *q, const float *weights, const bf16 *const *pages,
                 float *o, bool early)
{
    CUDA_SHARED(bf16, shared);
    constexpr uint32_t half = TOKENS * HD;
    cuda_depend_release();
    if (!early)
        cuda_depend_wait();
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const uint32_t g = blockIdx.y, heads = s.heads / s.kv_heads, stride = s.kv_heads * HD;
    const uint32_t r = s.retrieval_heads == 1 ? 0 : g;
    const size_t pick = ((size_t)blockIdx.x * s.retrieval_heads + r) * s.topk;
    const size_t at = ((size_t)blockIdx.x * s.heads + g * heads) * HD;
    bf16 *ring = shared + warp * U * half;
    const uint32_t picks = s.topk > warp ? (s.topk - warp - 1) / W + 1 : 0;
    const auto fetch_half = [&](uint32_t unit) {
        const bf16 *from = NULL;
        if (unit < 2 * picks) {
            const bf16 *page = pages[pick + warp + unit / 2 * W];
            if (page)
                from = page + g * HD + unit % 2 * (size_t)TOKENS * stride;
        }
        fetch<HD>(ring + unit % U * half, from, stride);
    };
#pragma unroll
    for (uint32_t unit = 0; unit < U - 1; unit++)
        fetch_half(unit);
    if (early)
        cuda_depend_wait();
    uint32_t queries[HD / 16][4];
    load_queries<HD>(q + at, heads, s.scale * LOG2_E, queries);
    float acc[HD / 8][4] = {};
    for (uint32_t i = 0; i < picks; i++) {
        const bool there = pages[pick + warp + i * W];
        uint32_t shares[TOKENS / 16][4];
        cuda_copy_wait<U - 2>();
        __syncwarp();
        fetch_half(2 * i + U - 1);
        if (there)
            weigh_keys<HD>(queries, ring + 2 * i % U * half, weights[pick + warp + i * W],
                           s.softmax1, shares);
        cuda_copy_wait<U - 2>();
        __syncwarp();
        fetch_half(2 * i + U);
        const bf16 *values = ring + (2 * i + 1) % U * half;
        if (there)
#pragma unroll
            for (int k = 0; k < TOKENS / 16; k++)
#pragma unroll
                for (int n = 0; n < HD / 16; n++) {
                    uint32_t b[4];
                    cuda_load_transposed(b, cuda_swizzled_row<HD>(values, k * 16, n * 16, true));
                    cuda_mma(acc[2 * n], shares[k], b);
                    cuda_mma(acc[2 * n + 1], shares[k], b + 2);
                }
    }
    if (W > 1) { /* the other warps' sums through shared memory, where nothing else lies now */
        cuda_copy_wait<0>();
        __syncthreads();
        float *sums = reinterpret_cast<float *>(shared);
        if (warp)
#pragma unroll
            for (int i = 0; i < HD / 2; i++)
                sums[((warp - 1) * HD / 2 + i) * CUDA_WARP + lane] = acc[i / 4][i % 4];
        __syncthreads();
        if (warp)
            return;
#pragma unroll
        for (int w = 0; w < W - 1; w++)
#pragma unroll
            for (int i = 0; i < HD / 2; i++)
                acc[i / 4][i % 4] += sums[(w * HD / 2 + i) * CUDA_WARP + lane];
    }
#pragma unroll
    for (int n = 0; n < HD / 8; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t row = lane / 4 + i * 8;
            if (row < heads)
                *reinterpret_cast<float2 *>(o + at + row * HD + n * 8 + lane % 4 * 2) =
                    float2{acc[n][2 * i], acc[n][2 * i + 1]};
        }
}

template <int HD, int W, int U> static constexpr size_t shared_of(void)
{
    return (size_t)W * U * TOKENS * HD * sizeof(bf16);
}

template <int HD, int W, int U>
static void launch(struct ops_context *x, const struct hsa_shape &s, uint32_t row_count,
                   const float *q, const float *weights, const void *const *pages, float *o)
{
    constexpr size_t bytes = shared_of<HD, W, U>();
    CUDA_ALLOW_SHARED(x, (attend_pages<HD, W, U>), bytes);
    CUDA_LAUNCH_EARLY(x, (attend_pages<HD, W, U>), dim3(row_count, s.kv_heads), dim3(W * CUDA_WARP),
                      bytes, s, q, weights, (const bf16 *const *)pages, o,
                      x->early && x->recording);
}

bool cuda_attend_pages(struct ops_context *x, const struct hsa_shape &s, uint32_t row_count,
                       const float *q, const float *weights, const void *const *pages, float *o)
{
    if (x->wide || s.tokens != TOKENS || s.heads / s.kv_heads > TILE ||
        (s.width != 64 && s.width != 128))
        return false;
    /* Where a multiprocessor has no more than one block, that block has all its memory. */
    const bool lone = row_count * s.kv_heads <= (uint32_t)x->multiprocessors;
    if (s.width == 64 && lone && shared_of<64, 2, 9>() <= x->shared_most)
        launch<64, 2, 9>(x, s, row_count, q, weights, pages, o);
    else if (s.width == 64)
        launch<64, 2, 3>(x, s, row_count, q, weights, pages, o);
    else if (lone && shared_of<128, 2, 6>() <= x->shared_most)
        launch<128, 2, 6>(x, s, row_count, q, weights, pages, o);
    else
        launch<128, 2, 3>(x, s, row_count, q, weights, pages, o);
    return true;
}
