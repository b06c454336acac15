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

template <typename T>
static inline struct step_weights<T> cuda_step_weights(const struct ops_mamba_weights *weights) {
    struct step_weights<T> w;
    w.conv = (const T *)weights->conv_weight.data;
    w.conv_bias = (const float *)weights->conv_bias.data;
    w.dt_bias = (const float *)weights->dt_bias.data;
    w.a_log = (const float *)weights->a_log.data;
    w.skip = (const float *)weights->d.data;
    return w;
}

/* V neighbours at once: 2 or 4. */
template <int V> struct alignas(4 * V) floats {
    float v[V];
};

/* The same in bf16, two a word. */
template <int V> struct alignas(2 * V) words {
    uint32_t v[V / 2];
};

/* V neighbours of a state of S as they are kept; and as numbers, and back, rounded to nearest. What
 * is loaded is not looked at before it is widened, so that nobody waits for it earlier. */
template <typename S, int V> struct kept_of {
    using type = floats<V>;
};
template <int V> struct kept_of<bf16, V> {
    using type = words<V>;
};

template <int V>
static __device__ __forceinline__ struct floats<V> widen_state(const struct floats<V> &kept) {
    return kept;
}

template <int V>
static __device__ __forceinline__ struct floats<V> widen_state(const struct words<V> &kept) {
    struct floats<V> out;
#pragma unroll
    for (int i = 0; i < V / 2; i++) {
        out.v[2 * i] = cuda_first(kept.v[i]);
        out.v[2 * i + 1] = cuda_second(kept.v[i]);
    }
    return out;
}

template <int V>
static __device__ __forceinline__ void store_state(float *to, const struct floats<V> &state)
{
    *reinterpret_cast<floats<V> *>(to) = state;
}

template <int V>
static __device__ __forceinline__ void store_state(bf16 *to, const struct floats<V> &state)
{
    struct words<V> kept;
#pragma unroll
    for (int i = 0; i < V / 2; i++)
        kept.v[i] = cuda_pack(state.v[2 * i], state.v[2 * i + 1]);
    *reinterpret_cast<words<V> *>(to) = kept;
}

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

#endif
