/* hsa_pages.cu - hierarchical sparse attention on tensor cores (hsa_tile.cuh): which form rows
 * take, and the form for few rows, a block each, whose warps share first the picks, then the
 * columns. Many rows: hsa_group.cu; hsa.cu has the plain form.
 * What bounds a row alone: it brings 4 S hd bytes a pick to shared memory, whoever else picked the
 * same, so the L2 cache's rate, of which this takes 7.4 TB/s on an H200 whatever rows pick. */
#include "engine/cuda/hsa.cuh"
#include "engine/cuda/hsa_tile.cuh"

/* The tile's queries, as hsa_weigh asks for them; rows without a head zeros. */
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

/* acc += probabilities (as hsa_weigh leaves them, a lane's four words together) V, the COLUMNS from
 * `column` on. One warp. */
template <int COLUMNS>
static __device__ __forceinline__ void add_values(const uint4 *shares, const bf16 *values,
                                                  uint32_t column, float acc[COLUMNS / 8][4])
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, at = hsa_lane(true);
    uint32_t b[4];
#pragma unroll
    for (int k = 0; k < HSA_TOKENS / 16; k++) {
        const uint4 words = shares[k * CUDA_WARP + lane];
        const uint32_t a[4] = {words.x, words.y, words.z, words.w};
        if constexpr (COLUMNS == 8) { /* two steps of k at once */
            if (k % 2 == 0)
                cuda_load_transposed(b, values + hsa_place<HSA_TOKENS>(k * 16 + lane, column));
            cuda_mma(acc[0], a, b + k % 2 * 2);
        } else {
            hsa_multiply<COLUMNS>(acc, a, values, at, true, k * 16, column);
        }
    }
}

/* A row and kv head by W warps, W picks at a time: each warp weighs the keys of one, then adds up
 * its columns of all. `early`: pages may be fetched before the kernel in front has ended, which
 * does not write them. Grid: rows x kv heads. */
template <int HD, int W>
static __global__ void __launch_bounds__(W *CUDA_WARP)
    attend_row(struct hsa_shape s, const float *q, const float *weights, const bf16 *const *pages,
               float *o, bool early)
{
    CUDA_SHARED(bf16, shared);
    constexpr uint32_t half = HSA_TOKENS * HD, columns = HD / W;
    uint4 *shares = reinterpret_cast<uint4 *>(shared + W * 2 * half);
    constexpr uint32_t share_words = HSA_TOKENS / 16 * CUDA_WARP;
    cuda_depend_release();
    if (!early)
        cuda_depend_wait();
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const uint32_t g = blockIdx.y, heads = s.heads / s.kv_heads, stride = s.kv_heads * HD;
    const uint32_t r = s.retrieval_heads == 1 ? 0 : g;
    const size_t pick = ((size_t)blockIdx.x * s.retrieval_heads + r) * s.topk;
    const size_t at = ((size_t)blockIdx.x * s.heads + g * heads) * HD;
    bf16 *keys = shared + warp * 2 * half, *values = keys + half;
    const auto fetch_pick = [&](uint32_t j) {
        const bf16 *page = j < s.topk ? pages[pick + j] : NULL;
        if (page)
            hsa_fetch<HD>(keys, page + g * HD, stride);
        cuda_copy_commit();
        if (page)
            hsa_fetch<HD>(values, page + g * HD + (size_t)HSA_TOKENS * stride, stride);
        cuda_copy_commit();
        return page != NULL;
    };
    bool there = fetch_pick(warp);
    if (early)
        cuda_depend_wait();
    uint32_t queries[HD / 16][4];
    load_queries<HD>(q + at, heads, s.scale * HSA_LOG2_E, queries);
    const auto query = [&](int k, uint32_t a[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            a[i] = queries[k][i];
    };
    float acc[columns / 8][4] = {};
    for (uint32_t first = 0; first < s.topk; first += W) {
        cuda_copy_wait<1>();
        __syncwarp();
        if (there) {
            uint32_t own[HSA_TOKENS / 16][4];
            hsa_weigh<HD>(
                query, keys, weights[pick + first + warp], s.softmax1, [](uint32_t) {}, own);
#pragma unroll
            for (int k = 0; k < HSA_TOKENS / 16; k++)
                shares[warp * share_words + k * CUDA_WARP + lane] =
                    uint4{own[k][0], own[k][1], own[k][2], own[k][3]};
        }
        cuda_copy_wait<0>();
        __syncthreads();
        for (uint32_t j = 0; j < W && first + j < s.topk; j++)
            if (pages[pick + first + j])
                add_values<columns>(shares + j * share_words, shared + (2 * j + 1) * half,
                                    warp * columns, acc);
        if (first + W < s.topk) {
            __syncthreads(); /* everyone has read */
            there = fetch_pick(first + W + warp);
        }
    }
#pragma unroll
    for (int n = 0; n < (int)columns / 8; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t row = lane / 4 + i * 8;
            if (row < heads)
                *reinterpret_cast<float2 *>(o + at + row * HD + warp * columns + n * 8 +
                                            lane % 4 * 2) =
                    float2{acc[n][2 * i], acc[n][2 * i + 1]};
        }
}

template <int HD, int W> static constexpr size_t shared_of(void)
{
    return (size_t)W * (2 * HSA_TOKENS * HD + HSA_TILE * HSA_TOKENS) * sizeof(bf16);
}

template <int HD, int W>
static void launch(struct ops_context *x, const struct hsa_shape &s, uint32_t row_count,
                   const float *q, const float *weights, const void *const *pages, float *o)
{
    constexpr size_t bytes = shared_of<HD, W>();
    CUDA_ALLOW_SHARED(x, (attend_row<HD, W>), bytes);
    CUDA_LAUNCH_EARLY(x, (attend_row<HD, W>), dim3(row_count, s.kv_heads), dim3(W * CUDA_WARP),
                      bytes, s, q, weights, (const bf16 *const *)pages, o,
                      x->early && x->recording);
}

bool cuda_attend_pages(struct ops_context *x, const struct hsa_shape &s, uint32_t row_count,
                       const float *q, const float *weights, const void *const *pages, float *o)
{
    if (x->wide || s.tokens != HSA_TOKENS || s.heads / s.kv_heads > HSA_TILE ||
        (s.width != 64 && s.width != 128))
        return false;
    if (cuda_attend_groups(x, s, row_count, q, weights, pages, o))
        return true;
    /* Where a multiprocessor has no more than one block, that block has all its memory. */
    const bool lone = row_count * s.kv_heads <= (uint32_t)x->multiprocessors;
    if (s.width == 64 && lone && shared_of<64, 8>() <= x->shared_most)
        launch<64, 8>(x, s, row_count, q, weights, pages, o);
    else if (s.width == 64)
        launch<64, 4>(x, s, row_count, q, weights, pages, o);
    else if (lone && shared_of<128, 4>() <= x->shared_most)
        launch<128, 4>(x, s, row_count, q, weights, pages, o);
    else
        launch<128, 2>(x, s, row_count, q, weights, pages, o);
    return true;
}
