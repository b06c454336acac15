/* hsa_tile.cuh - sparse attention of one row and kv head over one page, on tensor cores: the query
 * heads that share the kv head are the rows of a tile. A page has a softmax of its own, whose
 * probabilities its weight goes to, so that all picks add up in the same sums, in the order of the
 * picks: whoever does that by these functions gets the same bits.
 * For bf16, chunks of HSA_TOKENS, heads of 64 or 128. Thread: device code. Private to cuda/. */
#ifndef ENGINE_CUDA_HSA_TILE_CUH
#define ENGINE_CUDA_HSA_TILE_CUH

#include "engine/cuda/device.cuh"

#define HSA_TOKENS 64
#define HSA_TILE 16  /* query heads of a tile */
#define HSA_BLOCK 64 /* columns of a block: see hsa_place */
#define HSA_LOG2_E 1.4426950408889634f

/* Where an element lies in shared memory of a tile of ROWS rows: in blocks of HSA_BLOCK columns,
 * one behind the other, whose rows of 128 bytes are swizzled: as tensor copies leave them. */
template <int ROWS>
static __device__ __forceinline__ uint32_t hsa_place(uint32_t row, uint32_t column)
{
    return column / HSA_BLOCK * ROWS * HSA_BLOCK +
           cuda_swizzled<HSA_BLOCK>(row, column % HSA_BLOCK);
}

/* K or V of a page, whose rows lie `stride` apart, on their way to a tile. One warp. */
template <int HD>
static __device__ __forceinline__ void hsa_fetch(bf16 *to, const bf16 *from, uint32_t stride)
{
    constexpr uint32_t units = HD / 8, rows = CUDA_WARP / units; /* at once */
    const uint32_t lane = threadIdx.x % CUDA_WARP, row = lane / units;
    from += (size_t)row * stride + lane % units * 8;
#pragma unroll 4
    for (uint32_t k = 0; k < HSA_TOKENS; k += rows, from += rows * stride)
        cuda_copy_async(to + hsa_place<HSA_TOKENS>(k + row, lane % units * 8), from);
}

/* A lane's place in a tile, whose 16 x 16 elements at (0, 0) four matrices make: see
 * cuda_swizzled_row. Those at (row, column), multiples of 16: hsa_at. */
static __device__ __forceinline__ uint32_t hsa_lane(bool by_rows)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, inner = lane % 8;
    const uint32_t second = lane / 8 % 2, third = lane / 16;
    return cuda_swizzled<HSA_BLOCK>(inner + (by_rows ? second : third) * 8,
                                    (by_rows ? third : second) * 8);
}

template <int ROWS>
static __device__ __forceinline__ const bf16 *hsa_at(const bf16 *tile, uint32_t lane, uint32_t row,
                                                     uint32_t column)
{
    return tile + column / HSA_BLOCK * ROWS * HSA_BLOCK + (lane ^ column % HSA_BLOCK) +
           row * HSA_BLOCK;
}

/* acc += a b^T (keys, by columns) or a b (values, by rows) over 16 of the depth, b from (row,
 * column) of a page's tile on; acc: its columns by eights. What is read is under way at once; the
 * result is there once all of it has come (see cuda_await). */
template <int COLUMNS>
static __device__ __forceinline__ uint32_t hsa_multiply(float (*acc)[4], const uint32_t a[4],
                                                        const bf16 *tile, uint32_t lane,
                                                        bool values, uint32_t row, uint32_t column)
{
    uint32_t b[COLUMNS / 16][4], got = 0;
#pragma unroll
    for (int n = 0; n < COLUMNS / 16; n++)
        if (values)
            cuda_load_transposed(b[n], hsa_at<HSA_TOKENS>(tile, lane, row, column + n * 16));
        else
            cuda_load_matrices(b[n], hsa_at<HSA_TOKENS>(tile, lane, row + n * 16, column));
#pragma unroll
    for (int n = 0; n < COLUMNS / 16; n++) {
        cuda_mma(acc[2 * n], a, b[n]);
        cuda_mma(acc[2 * n + 1], a, b[n] + 2);
        got |= b[n][0];
    }
    return got;
}

/* weight * softmax(q K^T), as the tensor cores take it. query(k, a): the tile's columns from 16 k
 * on, scaled for exp2, as cuda_mma's a; read(got): all keys are on their way, and have come once
 * `got` is there. One warp, of which four lanes share a row; a lane has numbers of two, i / 2 of
 * scores[n][i]. */
template <int HD, typename Q, typename R>
static __device__ __forceinline__ void hsa_weigh(const Q &query, const bf16 *keys, float weight,
                                                 bool softmax1, const R &read,
                                                 uint32_t out[HSA_TOKENS / 16][4])
{
    const uint32_t lane = hsa_lane(false);
    float scores[HSA_TOKENS / 8][4] = {};
    uint32_t got;
#pragma unroll
    for (int k = 0; k < HD / 16; k++) {
        uint32_t a[4];
        query(k, a);
        got = hsa_multiply<HSA_TOKENS>(scores, a, keys, lane, false, 0, k * 16);
    }
    read(got);
    const float none = softmax1 ? 0 : -INFINITY; /* the score of what is not there */
    float top[2] = {none, none}, sums[4] = {}, share[2];
#pragma unroll
    for (int n = 0; n < HSA_TOKENS / 8; n++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            top[half] = fmaxf(top[half], fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
#pragma unroll
    for (int step = 1; step < 4; step *= 2)
#pragma unroll
        for (int half = 0; half < 2; half++)
            top[half] = fmaxf(top[half], __shfl_xor_sync(CUDA_ALL_LANES, top[half], step));
#pragma unroll
    for (int n = 0; n < HSA_TOKENS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            scores[n][i] = cuda_exp2(scores[n][i] - top[i / 2]);
            sums[i] += scores[n][i];
        }
#pragma unroll
    for (int half = 0; half < 2; half++)
        sums[half] = sums[2 * half] + sums[2 * half + 1];
#pragma unroll
    for (int step = 1; step < 4; step *= 2)
#pragma unroll
        for (int half = 0; half < 2; half++)
            sums[half] += __shfl_xor_sync(CUDA_ALL_LANES, sums[half], step);
#pragma unroll
    for (int half = 0; half < 2; half++)
        share[half] = weight * cuda_reciprocal(sums[half] + cuda_exp2(none - top[half]));
#pragma unroll
    for (int n = 0; n < HSA_TOKENS / 8; n++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            out[n / 2][n % 2 * 2 + half] =
                cuda_pack(scores[n][2 * half] * share[half], scores[n][2 * half + 1] * share[half]);
}

#endif
