/* mamba_blocks.cuh - what the chunked (SSD) form's files share: blocks of rows, the convolution,
 * and the tensor cores' kernels of mamba_tiles.cu.
 * Thread: the engine's. Owns nothing. Private to cuda/. */
#ifndef ENGINE_CUDA_MAMBA_BLOCKS_CUH
#define ENGINE_CUDA_MAMBA_BLOCKS_CUH

#include "engine/cuda/device.cuh"
#include "engine/cuda/mamba.cuh"

#define LOG2_E 1.4426950408889634f

/* A block: at most `tokens` rows of one segment. */
struct block {
    uint32_t row, count, segment;
};

/* The blocks [first, first + count) of a long segment. */
struct run {
    uint32_t segment, first, count;
};

/* What the kernels of one group of blocks need. */
struct work {
    struct mamba_shape shape;
    const struct ops_mamba_weights *weights;
    const struct cuda_segment *segments;
    const struct block *blocks; /* on the device, like the runs */
    const struct run *runs;
    uint32_t block_count, run_count, tokens;
    bool mma;   /* mamba_tiles.cu's kernels */
    bool gated; /* and Hopper's of mamba_outputs.cu and mamba_out.cu */
};

/* What comes in, and what goes with it. */
template <typename T> struct inputs {
    const T *projected;   /* without in_proj's bias: */
    const float *in_bias; /* or NULL */
    const T *weight;      /* [conv, taps] */
    const float *bias;    /* or NULL */
    const float *dt_bias, *a_log;
};

template <typename T>
static inline struct inputs<T> inputs_of(const struct ops_context *x,
                                         const struct ops_mamba_weights *w) {
    return {(const T *)(const void *)x->projected, (const float *)w->in_proj_bias.data,
            (const T *)w->conv_weight.data,        (const float *)w->conv_bias.data,
            (const float *)w->dt_bias.data,        (const float *)w->a_log.data};
}

/* `V` neighbours as floats. */
template <int V, typename T>
static __device__ __forceinline__ void load(const T *from, float *out)
{
    if constexpr (V * sizeof(T) == 16) {
        cuda_load16(from, out);
    } else if constexpr (V * sizeof(T) == 8) {
        const uint2 v = *reinterpret_cast<const uint2 *>(from);
        out[0] = cuda_first(v.x);
        out[1] = cuda_second(v.x);
        out[2] = cuda_first(v.y);
        out[3] = cuda_second(v.y);
    } else {
        out[0] = cuda_float(*from);
    }
}

template <int V, typename T> static __device__ __forceinline__ void store(T *to, const float *x)
{
    if constexpr (V * sizeof(T) == 16 && sizeof(T) == 4) {
        *reinterpret_cast<float4 *>(to) = float4{x[0], x[1], x[2], x[3]};
    } else if constexpr (V * sizeof(T) == 16) {
        *reinterpret_cast<uint4 *>(to) = uint4{cuda_pack(x[0], x[1]), cuda_pack(x[2], x[3]),
                                               cuda_pack(x[4], x[5]), cuda_pack(x[6], x[7])};
    } else if constexpr (V * sizeof(T) == 8) {
        *reinterpret_cast<uint2 *>(to) = uint2{cuda_pack(x[0], x[1]), cuda_pack(x[2], x[3])};
    } else {
        cuda_store(to, x[0]);
    }
}

/* V neighbours from column `j` of xBC on, `back` rows before row `row` of its segment. */
template <int V, typename T>
static __device__ __forceinline__ void
load_column(const struct mamba_shape &s, const struct inputs<T> &in,
            const struct cuda_segment *segment, uint32_t row, uint32_t back, uint32_t j, float *out)
{
    const uint32_t at = row - segment->row;
    if (back <= at) {
        load<V>(in.projected + (size_t)(row - back) * s.proj + s.inner + j, out);
#pragma unroll
        for (int v = 0; v < V; v++)
            out[v] += in.in_bias ? in.in_bias[s.inner + j + v] : 0;
    } else {
#pragma unroll
        for (int v = 0; v < V; v++)
            out[v] = segment->conv[(size_t)(s.taps - 1 + at - back) * s.conv + j + v];
    }
}

/* The time step of a block's row, one head; 0 behind its rows. */
template <typename T>
static __device__ __forceinline__ float time_step(const struct mamba_shape &s,
                                                  const struct inputs<T> &in,
                                                  const struct block &block, uint32_t h, uint32_t t)
{
    if (t >= block.count)
        return 0;
    const uint32_t column = s.inner + s.conv + h;
    const float bias = in.dt_bias[h] + (in.in_bias ? in.in_bias[column] : 0);
    const float from = cuda_float(in.projected[(size_t)(block.row + t) * s.proj + column]);
    return fminf(fmaxf(cuda_softplus(from + bias), s.dt_min), s.dt_max);
}

/* The sum over the warp's lanes up to this one. */
static __device__ __forceinline__ float sum_up_to(float x)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP;
#pragma unroll
    for (uint32_t far = 1; far < CUDA_WARP; far *= 2) {
        const float other = __shfl_sync(CUDA_ALL_LANES, x, lane >= far ? lane - far : lane);
        x += lane >= far ? other : 0;
    }
    return x;
}

/* ---- mamba_tiles.cu: bf16 ---- */

/* Heads of this form go through tensor cores. */
bool cuda_mamba_tiles(const struct mamba_shape &shape);
/* The convolution, to x->conv; x->dt and decay; what each block adds to the state, to x->states. */
void cuda_block_states(struct ops_context *context, const struct work *work);
/* y of each block's rows from x->conv, dt, decay, and the states before it. To x->scanned; or,
 * `gated`, times SiLU(z) and the norm's weight to x->mixed, its scale yet to come: sums of squares
 * [rows, cuda_output_parts] in x->scanned. */
void cuda_block_outputs(struct ops_context *context, const struct work *work);
/* How many sums of squares a row has. */
uint32_t cuda_output_parts(const struct mamba_shape &shape);

/* ---- mamba_outputs.cu ---- */

/* cuda_block_outputs, gated: Hopper's form. */
void cuda_gated_outputs(struct ops_context *context, const struct work *work);

/* ---- mamba_out.cu ---- */

/* out [count, columns] += row scale * x W^T (+ bias). */
struct scaled_rows {
    float *out;
    const float *bias;    /* or NULL */
    const float *squares; /* [count, parts] */
    uint32_t count, columns, depth, parts;
    float epsilon; /* the scale is 1 / sqrt(sum of squares / depth + epsilon) */
};

/* The device has what that takes, and the shape is one for it. */
bool cuda_adds_scaled(const struct ops_context *context);
/* weight [columns, depth] and x [count, depth] in bf16. */
void cuda_add_scaled(struct ops_context *context, const void *weight, const void *x,
                     const struct scaled_rows &rows);

#endif
