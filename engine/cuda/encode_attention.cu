/* encode_attention.cu - the chunk encoder's attention on tensor cores, the norms of its heads and
 * their rotation on the way in: a block has one head of one chunk, whose positions all see each
 * other. For bf16, at most 80 positions and heads of 64 or 128; encode_chunks.cu has the plain form
 * of the same. */
#include "engine/cuda/device.cuh"
#include "engine/cuda/encode.cuh"

#define POSITIONS 80 /* in tiles of 16, a warp each */
#define WARPS (POSITIONS / 16)
#define LOG2_E 1.4426950408889634f

/* Rows `stride` apart, each through its norm, rotated by its position (half-rotation layout, theta
 * 10,000) and times `scale`; rows from `count` on zeros. A lane owns whole pairs. `norm` NULL: the
 * rows as they are. */
template <int HD>
static __device__ __forceinline__ void load_head(bf16 *to, const float *from, size_t stride,
                                                 uint32_t count, const float *norm, float scale)
{
    constexpr int pairs = HD / 2 / CUDA_WARP;
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    float turn[pairs];
#pragma unroll
    for (int i = 0; i < pairs; i++)
        turn[i] = powf(10000.0f, -(float)(2 * (lane + i * CUDA_WARP)) / (float)HD);
    for (uint32_t t = warp; t < POSITIONS; t += WARPS) {
        float a[pairs], b[pairs], sum = 0;
#pragma unroll
        for (int i = 0; i < pairs; i++) {
            const uint32_t column = lane + i * CUDA_WARP;
            a[i] = t < count ? from[t * stride + column] : 0;
            b[i] = t < count ? from[t * stride + HD / 2 + column] : 0;
            sum = fmaf(a[i], a[i], fmaf(b[i], b[i], sum));
        }
        const float level =
            norm ? scale / sqrtf(cuda_warp_sum(sum) / (float)HD + MODEL_MEMORY_EPSILON) : 1;
#pragma unroll
        for (int i = 0; i < pairs; i++) {
            const uint32_t column = lane + i * CUDA_WARP;
            if (norm) {
                float sine, cosine;
                sincosf((float)t * turn[i], &sine, &cosine);
                const float x = a[i] * level * norm[column];
                const float y = b[i] * level * norm[HD / 2 + column];
                a[i] = x * cosine - y * sine;
                b[i] = y * cosine + x * sine;
            }
            cuda_store(to + cuda_swizzled<HD>(t, column), a[i]);
            cuda_store(to + cuda_swizzled<HD>(t, HD / 2 + column), b[i]);
        }
    }
}

/* out = softmax(Q K^T / sqrt(hd)) V. Grid: chunks x heads. */
template <int HD>
static __global__ void __launch_bounds__(WARPS *CUDA_WARP)
    attend(struct encoder_heads s, const float *q, const float *k, const float *v,
           const float *q_norm, const float *k_norm, bf16 *out)
{
    CUDA_SHARED(bf16, queries);
    bf16 *keys = queries + POSITIONS * HD, *values = keys + POSITIONS * HD;
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const uint32_t h = blockIdx.y, n = s.positions, g = h / (s.heads / s.kv_heads);
    const size_t row = (size_t)blockIdx.x * n, wide = (size_t)s.heads * HD,
                 narrow = (size_t)s.kv_heads * HD;
    load_head<HD>(queries, q + row * wide + h * HD, wide, n, q_norm, LOG2_E / sqrtf((float)HD));
    load_head<HD>(keys, k + row * narrow + g * HD, narrow, n, k_norm, 1);
    load_head<HD>(values, v + row * narrow + g * HD, narrow, n, NULL, 1);
    __syncthreads();
    float scores[POSITIONS / 8][4] = {}, acc[HD / 8][4] = {};
#pragma unroll
    for (int c = 0; c < HD; c += 16) {
        uint32_t a[4], b[4];
        cuda_load_matrices(a, cuda_swizzled_row<HD>(queries, warp * 16, c, true));
#pragma unroll
        for (int u = 0; u < POSITIONS / 16; u++) {
            cuda_load_matrices(b, cuda_swizzled_row<HD>(keys, u * 16, c, false));
            cuda_mma(scores[2 * u], a, b);
            cuda_mma(scores[2 * u + 1], a, b + 2);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float top = -INFINITY, sum = 0;
#pragma unroll
        for (int u = 0; u < POSITIONS / 8; u++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (u * 8 + lane % 4 * 2 + i >= n)
                    scores[u][2 * half + i] = -INFINITY;
                top = fmaxf(top, scores[u][2 * half + i]);
            }
        top = fmaxf(top, __shfl_xor_sync(CUDA_ALL_LANES, top, 1));
        top = fmaxf(top, __shfl_xor_sync(CUDA_ALL_LANES, top, 2));
#pragma unroll
        for (int u = 0; u < POSITIONS / 8; u++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                scores[u][2 * half + i] = cuda_exp2(scores[u][2 * half + i] - top);
                sum += scores[u][2 * half + i];
            }
        sum += __shfl_xor_sync(CUDA_ALL_LANES, sum, 1);
        sum += __shfl_xor_sync(CUDA_ALL_LANES, sum, 2);
#pragma unroll
        for (int u = 0; u < POSITIONS / 8; u++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                scores[u][2 * half + i] /= sum;
    }
#pragma unroll
    for (int u = 0; u < POSITIONS / 16; u++) {
        const float *left = scores[2 * u], *right = scores[2 * u + 1];
        const uint32_t a[4] = {cuda_pack(left[0], left[1]), cuda_pack(left[2], left[3]),
                               cuda_pack(right[0], right[1]), cuda_pack(right[2], right[3])};
#pragma unroll
        for (int c = 0; c < HD / 16; c++) {
            uint32_t b[4];
            cuda_load_transposed(b, cuda_swizzled_row<HD>(values, u * 16, c * 16, true));
            cuda_mma(acc[2 * c], a, b);
            cuda_mma(acc[2 * c + 1], a, b + 2);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint32_t t = warp * 16 + lane / 4 + half * 8;
        bf16 *to = out + (row + t) * wide + h * HD + lane % 4 * 2;
        if (t >= n)
            continue;
#pragma unroll
        for (int c = 0; c < HD / 8; c++)
            *reinterpret_cast<uint32_t *>(to + c * 8) =
                cuda_pack(acc[c][2 * half], acc[c][2 * half + 1]);
    }
}

template <int HD>
static void launch(struct ops_context *x, const struct encoder_heads &s, uint32_t count,
                   const float *q_norm, const float *k_norm)
{
    const size_t bytes = 3 * POSITIONS * HD * sizeof(bf16);
    CUDA_ALLOW_SHARED(x, attend<HD>, bytes);
    CUDA_LAUNCH(x, attend<HD>, dim3(count, s.heads), dim3(WARPS * CUDA_WARP), bytes, s,
                x->encoder_q, x->encoder_k, x->encoder_v, q_norm, k_norm, (bf16 *)x->encoder_y);
}

bool cuda_encode_attention(struct ops_context *x, const struct encoder_heads &s, uint32_t count,
                           const float *q_norm, const float *k_norm)
{
    if (x->wide || s.positions > POSITIONS || (s.width != 64 && s.width != 128))
        return false;
    if (s.width == 64)
        launch<64>(x, s, count, q_norm, k_norm);
    else
        launch<128>(x, s, count, q_norm, k_norm);
    return true;
}
