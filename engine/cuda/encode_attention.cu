/* encode_attention.cu - the chunk encoder's attention on tensor cores, the norms of its heads and
 * their rotation on the way in: a block has one head of one chunk, whose positions all see each
 * other. For bf16, at most 80 positions and heads of 64 or 128; encode_chunks.cu has the plain form
 * of the same. */
#include "engine/cuda/device.cuh"
#include "engine/cuda/encode.cuh"

#define POSITIONS 80 /* in tiles of 16, a warp each */
#define WARPS (POSITIONS / 16)
#define LOG2_E 1.4426950408889634f

#define AHEAD 8 /* rows of a warp that are on their way together; a warp has 16 in all */

/* Rows of one head as a product left them, `stride` apart. */
struct head_rows {
    const float *from, *bias; /* bias NULL: none */
    size_t stride;
    const float *norm; /* NULL: neither normed nor rotated */
    float scale;
};

/* The rows with their bias, through their norm, rotated by their position (half-rotation layout,
 * theta 10,000) and times `scale`; rows from `count` on zeros. A lane owns whole pairs. */
template <int HD>
static __device__ __forceinline__ void load_head(bf16 *to, const struct head_rows &rows,
                                                 uint32_t count)
{
    constexpr int pairs = HD / 2 / CUDA_WARP;
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    float turn[pairs], left[pairs], right[pairs]; /* biases, of the halves of a row */
#pragma unroll
    for (int i = 0; i < pairs; i++) {
        const uint32_t column = lane + i * CUDA_WARP;
        turn[i] = powf(10000.0f, -(float)(2 * column) / (float)HD);
        left[i] = rows.bias ? rows.bias[column] : 0;
        right[i] = rows.bias ? rows.bias[HD / 2 + column] : 0;
    }
    for (uint32_t first = warp; first < POSITIONS; first += AHEAD * WARPS) {
        float a[AHEAD][pairs], b[AHEAD][pairs];
#pragma unroll
        for (int r = 0; r < AHEAD; r++)
#pragma unroll
            for (int i = 0; i < pairs; i++) {
                const uint32_t t = first + r * WARPS, column = lane + i * CUDA_WARP;
                const float *row = rows.from + t * rows.stride + column;
                a[r][i] = t < count ? row[0] + left[i] : 0;
                b[r][i] = t < count ? row[HD / 2] + right[i] : 0;
            }
#pragma unroll
        for (int r = 0; r < AHEAD; r++) {
            const uint32_t t = first + r * WARPS;
            float sum = 0;
#pragma unroll
            for (int i = 0; i < pairs; i++)
                sum = fmaf(a[r][i], a[r][i], fmaf(b[r][i], b[r][i], sum));
            const float level =
                rows.norm
                    ? rows.scale / sqrtf(cuda_warp_sum(sum) / (float)HD + MODEL_MEMORY_EPSILON)
                    : 1;
#pragma unroll
            for (int i = 0; i < pairs; i++) {
                const uint32_t column = lane + i * CUDA_WARP;
                float x = a[r][i], y = b[r][i];
                if (rows.norm) {
                    float sine, cosine;
                    sincosf((float)t * turn[i], &sine, &cosine);
                    x *= level * rows.norm[column];
                    y *= level * rows.norm[HD / 2 + column];
                    const float turned = x * cosine - y * sine;
                    y = y * cosine + x * sine;
                    x = turned;
                }
                cuda_store(to + cuda_swizzled<HD>(t, column), x);
                cuda_store(to + cuda_swizzled<HD>(t, HD / 2 + column), y);
            }
        }
    }
}

/* out = softmax(Q K^T / sqrt(hd)) V. Grid: chunks x heads. */
template <int HD>
static __global__ void __launch_bounds__(WARPS *CUDA_WARP)
    attend(struct encoder_heads s, struct encoder_inputs in, bf16 *out)
{
    CUDA_SHARED(bf16, queries);
    bf16 *keys = queries + POSITIONS * HD, *values = keys + POSITIONS * HD;
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const uint32_t h = blockIdx.y, n = s.positions, g = h / (s.heads / s.kv_heads);
    const size_t row = (size_t)blockIdx.x * n, wide = (size_t)s.heads * HD,
                 narrow = (size_t)s.kv_heads * HD;
    const struct head_rows q = {in.q + row * wide + h * HD, in.q_bias ? in.q_bias + h * HD : NULL,
                                wide, in.q_norm, LOG2_E / sqrtf((float)HD)};
    const struct head_rows k = {in.k + row * narrow + g * HD, in.k_bias ? in.k_bias + g * HD : NULL,
                                narrow, in.k_norm, 1};
    const struct head_rows v = {in.v + row * narrow + g * HD, in.v_bias ? in.v_bias + g * HD : NULL,
                                narrow, NULL, 1};
    load_head<HD>(queries, q, n);
    load_head<HD>(keys, k, n);
    load_head<HD>(values, v, n);
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
                   const struct encoder_inputs &in)
{
    const size_t bytes = 3 * POSITIONS * HD * sizeof(bf16);
    bf16 *out = (bf16 *)x->encoders[x->lane].y;
    CUDA_ALLOW_SHARED(x, attend<HD>, bytes);
    CUDA_LAUNCH(x, attend<HD>, dim3(count, s.heads), dim3(WARPS * CUDA_WARP), bytes, s, in, out);
}

bool cuda_encodes_tiles(const struct ops_context *x, const struct encoder_heads &s)
{
    return !x->wide && s.positions <= POSITIONS && (s.width == 64 || s.width == 128);
}

void cuda_encode_attention(struct ops_context *x, const struct encoder_heads &s, uint32_t count,
                           const struct encoder_inputs &in)
{
    if (s.width == 64)
        launch<64>(x, s, count, in);
    else
        launch<128>(x, s, count, in);
}
