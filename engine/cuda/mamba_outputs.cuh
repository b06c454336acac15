/* mamba_outputs.cuh - what both forms of a block's outputs share (mamba_tiles.cu by warps,
 * mamba_outputs.cu by warpgroups): a warp has 16 rows of the block, whose scores C B^T it holds as
 * tensor cores take them; head by head these decay and are multiplied by x.
 * Thread: device code. Owns nothing. Private to cuda/. */
#ifndef ENGINE_CUDA_MAMBA_OUTPUTS_CUH
#define ENGINE_CUDA_MAMBA_OUTPUTS_CUH

#include "engine/cuda/mamba_blocks.cuh"

#define TOKENS CUDA_BLOCK_TOKENS
#define WIDTH 64 /* of a head */
#define OUTPUT_THREADS 256
#define OUTPUT_HEADS 4 /* that share the scores of a block */
#define OUTPUT_TILES (TOKENS / 16)

static_assert(OUTPUT_THREADS / CUDA_WARP == OUTPUT_TILES, "a warp has 16 rows");

/* The heads of one group that a block of threads has. */
struct output_part {
    uint32_t group, first, heads;
};

/* How many there are of a group. */
static __host__ __device__ __forceinline__ uint32_t parts_of_group(const struct mamba_shape &s)
{
    return (s.heads / s.groups + OUTPUT_HEADS - 1) / OUTPUT_HEADS;
}

static __device__ __forceinline__ struct output_part part_at(const struct mamba_shape &s,
                                                             uint32_t index)
{
    const uint32_t each = s.heads / s.groups, parts = parts_of_group(s);
    const uint32_t from = index % parts * OUTPUT_HEADS, group = index / parts;
    return {group, group * each + from, min(each - from, (uint32_t)OUTPUT_HEADS)};
}

/* Of one head's columns: log2 of the decay up to each, its time step, and that times the decay from
 * it to the end of its 16 columns. */
struct columns {
    float decays[TOKENS], times[TOKENS], shares[TOKENS];
};

/* Those of `heads` heads from their [heads, TOKENS] of dt and decay. All threads. */
static __device__ __forceinline__ void load_columns(struct columns *columns, const float *dt,
                                                    const float *decay, uint32_t heads)
{
    for (uint32_t i = threadIdx.x; i < heads * TOKENS; i += OUTPUT_THREADS) {
        struct columns *own = columns + i / TOKENS;
        const uint32_t t = i % TOKENS;
        const float time = dt[i];
        own->times[t] = time;
        own->decays[t] = decay[i] * LOG2_E;
        own->shares[t] = time * cuda_exp2((decay[i | 15] - decay[i]) * LOG2_E);
    }
}

/* Two neighbours times a factor each. */
static __device__ __forceinline__ uint32_t scaled(uint32_t pair, float first, float second)
{
    return cuda_pack(cuda_first(pair) * first, cuda_second(pair) * second);
}

/* Two neighbouring scores of a row, decayed from their columns and times their time steps; columns
 * behind the row count nothing. */
static __device__ __forceinline__ uint32_t decayed(uint32_t scores, uint32_t row, float row_decay,
                                                   uint32_t column, const struct columns &own)
{
    const float first =
        column <= row
            ? cuda_first(scores) * cuda_exp2(row_decay - own.decays[column]) * own.times[column]
            : 0;
    const float second = column + 1 <= row
                             ? cuda_second(scores) * cuda_exp2(row_decay - own.decays[column + 1]) *
                                   own.times[column + 1]
                             : 0;
    return cuda_pack(first, second);
}

/* a = the decayed scores of a warp's rows and the 16 columns of tile `j`, none behind its own. The
 * columns of the warp's own rows decay one by one; those before them decay to their end, and from
 * there to the row. */
static __device__ __forceinline__ void decay_tile(const uint32_t scores[4], uint32_t j,
                                                  const struct columns &own, uint32_t a[4])
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const uint32_t top = warp * 16 + lane / 4, column = j * 16 + lane % 4 * 2;
    const float upper = own.decays[top], lower = own.decays[top + 8];
    if (j == warp) {
        a[0] = decayed(scores[0], top, upper, column, own);
        a[1] = decayed(scores[1], top + 8, lower, column, own);
        a[2] = decayed(scores[2], top, upper, column + 8, own);
        a[3] = decayed(scores[3], top + 8, lower, column + 8, own);
    } else {
        const float2 f = *reinterpret_cast<const float2 *>(own.shares + column);
        const float2 g = *reinterpret_cast<const float2 *>(own.shares + column + 8);
        const float end = own.decays[j * 16 + 15];
        const float up = cuda_exp2(upper - end), low = cuda_exp2(lower - end);
        a[0] = scaled(scores[0], up * f.x, up * f.y);
        a[1] = scaled(scores[1], low * f.x, low * f.y);
        a[2] = scaled(scores[2], up * g.x, up * g.y);
        a[3] = scaled(scores[3], low * g.x, low * g.y);
    }
}

/* Pairs of lanes change halves of what they hold of tiles p and p + 1: two neighbours of each as
 * products have them, or four of one as memory is read and written. */
static __device__ __forceinline__ uint2 change_halves(uint2 own)
{
    const bool odd = threadIdx.x % 2;
    const uint32_t other = __shfl_xor_sync(CUDA_ALL_LANES, odd ? own.x : own.y, 1);
    return odd ? uint2{other, own.y} : uint2{own.x, other};
}

/* Of which four a lane reads or writes then, behind the first of tiles p and p + 1. */
static __device__ __forceinline__ uint32_t four_of_lane(void)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP;
    return lane % 4 / 2 * 4 + lane % 2 * 8;
}

#endif
