/* mamba_step.cuh - a step of the convolution, column by column: what the forms of a Mamba-2 block
 * that go token by token share (mamba_step.cu).
 * Thread: device code. Owns nothing. Private to cuda/. */
#ifndef ENGINE_CUDA_MAMBA_STEP_CUH
#define ENGINE_CUDA_MAMBA_STEP_CUH

#include "engine/cuda/device.cuh"
#include "engine/cuda/mamba.cuh"

#define TAPS 4 /* of the convolution, where the numbers are known */

template <typename T> struct step_weights {
    const T *conv;
    const float *conv_bias, *dt_bias, *a_log, *skip;
};

/* V neighbours at once: 2 or 4. */
template <int V> struct alignas(4 * V) floats {
    float v[V];
};

/* The weights of a column, as they are stored. */
template <typename T> struct alignas(TAPS * sizeof(T)) taps {
    T v[TAPS];
};

/* A column of xBC that a thread convolves: what it needs beside the rows. */
template <typename T> struct column {
    uint32_t j; /* s.conv: none */
    taps<T> weights;
    float bias, tail[TAPS - 1];
};

/* `tail`: of the segment, as it was before its first row. */
template <typename T>
static __device__ __forceinline__ struct column<T> load_column(const struct mamba_shape &s,
                                                               const struct step_weights<T> &w,
                                                               const float *tail, uint32_t j) {
    struct column<T> c = {
    };
    c.j = j;
    if (j == s.conv)
        return c;
    c.weights = *reinterpret_cast<const taps<T> *>(w.conv + (size_t)j * TAPS);
    c.bias = w.conv_bias ? w.conv_bias[j] : 0;
#pragma unroll
    for (int k = 0; k < TAPS - 1; k++)
        c.tail[k] = tail[(size_t)k * s.conv + j];
    return c;
}

/* Weights are not looked at before here, so that nobody waits for them where they are asked for. */
static __device__ __forceinline__ void
hold(taps<float> *)
{
}

static __device__ __forceinline__ void hold(taps<bf16> *t)
{
#ifdef __CUDACC__
    uint2 *words = reinterpret_cast<uint2 *>(t);
    asm volatile("" : "+r"(words->x), "+r"(words->y));
#else
    (void)t;
#endif
}

/* The next value of a column; its tail moves on. */
template <typename T>
static __device__ __forceinline__ float convolve(struct column<T> *c, float value)
{
    hold(&c->weights);
    float sum = c->bias;
#pragma unroll
    for (int k = 0; k < TAPS - 1; k++)
        sum = fmaf(cuda_float(c->weights.v[k]), c->tail[k], sum);
#pragma unroll
    for (int k = 0; k + 1 < TAPS - 1; k++)
        c->tail[k] = c->tail[k + 1];
    c->tail[TAPS - 2] = value;
    return cuda_silu(fmaf(cuda_float(c->weights.v[TAPS - 1]), value, sum));
}

/* ---- one token, a lane a row of a state ---- */

#define ROWS_TOGETHER 4 /* of a state, that a warp has in registers */

/* A row of a state [Hm P]: its column of x and its head's numbers. */
struct state_row {
    struct column<bf16> column;
    float dt_bias, rate, through;
};

/* What in_proj gives for it. */
struct row_inputs {
    float raw, x, z;
};

struct row_step {
    float u, time, decay;
};

static __device__ __forceinline__ struct state_row
load_state_row(const struct mamba_shape &s, const struct step_weights<bf16> &w, const float *tail,
               uint32_t p)
{
    const uint32_t head = p / s.width;
    struct state_row row;
    row.column = load_column(s, w, tail, p);
    row.dt_bias = w.dt_bias[head];
    row.rate = w.a_log[head];
    row.through = w.skip[head];
    return row;
}

/* projected(j): the row of in_proj. */
template <typename P>
static __device__ __forceinline__ struct row_inputs load_inputs(const struct mamba_shape &s,
                                                                const P &projected, uint32_t p)
{
    struct row_inputs in;
    in.raw = projected(s.inner + s.conv + p / s.width);
    in.x = projected(s.inner + p);
    in.z = projected(p);
    return in;
}

/* The row's tail moves on. */
static __device__ __forceinline__ struct row_step
begin_row(const struct mamba_shape &s, struct state_row *row, const struct row_inputs &in)
{
    struct row_step step;
    step.u = convolve(&row->column, in.x);
    step.time = fminf(fmaxf(cuda_softplus(in.raw + row->dt_bias), s.dt_min), s.dt_max);
    step.decay = expf(step.time * -expf(row->rate));
    return step;
}

/* A warp's `count` rows from `first` on, N = 32 V: `state` (shared memory) goes on by a token, to
 * `to`; lane i has `step` of the i-th row and gets its h C. columns: B of all groups, then C. */
template <int V>
static __device__ __forceinline__ float step_rows(const struct mamba_shape &s, uint32_t first,
                                                  uint32_t count, const float *state, float *to,
                                                  const struct row_step &step, const float *columns)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP;
    float own = 0;
    for (uint32_t from = 0; from < count; from += ROWS_TOGETHER) {
        float sums[ROWS_TOGETHER];
        floats<V> h[ROWS_TOGETHER];
#pragma unroll
        for (uint32_t r = 0; r < ROWS_TOGETHER; r++)
            h[r] = *reinterpret_cast<const floats<V> *>(
                state + (size_t)(from + r < count ? from + r : from) * s.n + V * lane);
#pragma unroll
        for (uint32_t r = 0; r < ROWS_TOGETHER; r++) {
            const uint32_t row = from + r < count ? from + r : from;
            const uint32_t group = (first + row) / s.width / (s.heads / s.groups);
            const float *b = columns + group * s.n + V * lane;
            const floats<V> bs = *reinterpret_cast<const floats<V> *>(b),
                            cs = *reinterpret_cast<const floats<V> *>(b + s.groups * s.n);
            const float decay = __shfl_sync(CUDA_ALL_LANES, step.decay, (int)row),
                        add = __shfl_sync(CUDA_ALL_LANES, step.time, (int)row) *
                              __shfl_sync(CUDA_ALL_LANES, step.u, (int)row);
            sums[r] = 0;
#pragma unroll
            for (int i = 0; i < V; i++) {
                h[r].v[i] = fmaf(decay, h[r].v[i], add * bs.v[i]);
                sums[r] = fmaf(h[r].v[i], cs.v[i], sums[r]);
            }
        }
#pragma unroll
        for (uint32_t r = 0; r < ROWS_TOGETHER; r++) {
            const float sum = cuda_warp_sum(sums[r]);
            own = lane == from + r ? sum : own;
            if (from + r < count)
                *reinterpret_cast<floats<V> *>(to + (size_t)(from + r) * s.n + V * lane) = h[r];
        }
    }
    return own;
}

#endif
