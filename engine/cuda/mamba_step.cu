/* mamba_step.cu - a Mamba-2 block token by token, for segments of few rows: convolution, time
 * steps, recurrence and gate in one kernel, which reads and writes each state once. */
#include "engine/cuda/device.cuh"
#include "engine/cuda/mamba.cuh"

#define STEP_WARPS 8
#define STEP_THREADS (STEP_WARPS * CUDA_WARP)
#define WARP_ROWS 4                         /* of a state, that a warp holds in registers */
#define BLOCK_ROWS (STEP_WARPS * WARP_ROWS) /* of a head's P */
#define TAPS 4                              /* of the convolution, where the numbers are known */

template <typename T> struct step_weights {
    const T *conv;
    const float *conv_bias, *dt_bias, *a_log, *skip;
};

/* A block's place: one head of one segment, BLOCK_ROWS rows of its state. */
struct place {
    struct cuda_segment segment;
    uint32_t head, group, first; /* first row of P */
};

static __device__ __forceinline__ struct place find_place(const struct mamba_shape &s,
                                                          const struct cuda_segment *segments,
                                                          size_t ssm, size_t conv)
{
    const uint32_t tiles = (s.width + BLOCK_ROWS - 1) / BLOCK_ROWS;
    struct place at;
    at.segment = segments[blockIdx.y];
    at.segment.ssm += ssm;
    at.segment.conv += conv;
    at.head = blockIdx.x / tiles;
    at.group = at.head / (s.heads / s.groups);
    at.first = blockIdx.x % tiles * BLOCK_ROWS;
    return at;
}

/* The column of xBC that the block keeps as its `i`-th: rows of x, then B, then C; s.conv: none. */
static __device__ __forceinline__ uint32_t column_of(const struct mamba_shape &s,
                                                     const struct place &at, uint32_t i)
{
    if (i < BLOCK_ROWS)
        return at.first + i < s.width ? at.head * s.width + at.first + i : s.conv;
    i -= BLOCK_ROWS;
    const uint32_t b = s.inner + at.group * s.n;
    return i < s.n ? b + i : i < 2 * s.n ? b + s.groups * s.n + i - s.n : s.conv;
}

/* What column `j` had `back` rows before row `t` of the segment. */
static __device__ __forceinline__ float past(const struct mamba_shape &s, const struct place &at,
                                             const float *projected, uint32_t j, uint32_t t,
                                             uint32_t back)
{
    if (back <= t)
        return projected[(size_t)(at.segment.row + t - back) * s.proj + s.inner + j];
    return at.segment.conv[(size_t)(s.taps - 1 + t - back) * s.conv + j];
}

/* The last rows of column `j` become its tail. */
static __device__ __forceinline__ void
keep_tail(const struct mamba_shape &s, const struct place &at, const float *projected, uint32_t j)
{
    const uint32_t keep = s.taps - 1;
    for (uint32_t i = 0; i < keep; i++)
        at.segment.conv[(size_t)i * s.conv + j] =
            past(s, at, projected, j, at.segment.count - 1, keep - 1 - i);
}

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

template <typename T>
static __device__ __forceinline__ struct column<T> load_column(const struct mamba_shape &s,
                                                               const struct step_weights<T> &w,
                                                               const struct place &at, uint32_t i) {
    struct column<T> c = {
    };
    c.j = column_of(s, at, i);
    if (c.j == s.conv)
        return c;
    c.weights = *reinterpret_cast<const taps<T> *>(w.conv + (size_t)c.j * TAPS);
    c.bias = w.conv_bias ? w.conv_bias[c.j] : 0;
#pragma unroll
    for (int k = 0; k < TAPS - 1; k++)
        c.tail[k] = at.segment.conv[(size_t)k * s.conv + c.j];
    return c;
}

/* The next value of a column; its tail moves on. */
template <typename T>
static __device__ __forceinline__ float convolve(struct column<T> *c, float value)
{
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

/* N is 32 V and the convolution has TAPS taps: the state is read and written once and lies in
 * registers, a lane has V neighbours of each row. V 0: whatever they are. */
template <typename T, int V>
static __global__ void __launch_bounds__(STEP_THREADS, 3)
    step(struct mamba_shape s, struct step_weights<T> w, const struct cuda_segment *segments,
         size_t ssm, size_t conv, const float *projected, float *y, uint32_t *arrived, bool early)
{
    CUDA_SHARED(float, columns); /* [BLOCK_ROWS + 2 N]: x, B, C of the row under way */
    __shared__ bool last;
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    constexpr int width = V ? V : 1;
    constexpr int own = (BLOCK_ROWS + 2 * CUDA_WARP * width + STEP_THREADS - 1) / STEP_THREADS;
    cuda_depend_release();
    if (!early)
        cuda_depend_wait();
    const struct place at = find_place(s, segments, ssm, conv);
    if (at.segment.count > CUDA_FEW_ROWS) {
        cuda_depend_wait();
        return;
    }
    floats<width> state[WARP_ROWS];
    struct column<T> mine[own];
    float *rows = at.segment.ssm + ((size_t)at.head * s.width + at.first + warp * WARP_ROWS) * s.n;
    const uint32_t row_count =
        at.first + warp * WARP_ROWS < s.width ? s.width - at.first - warp * WARP_ROWS : 0;
    if (V) {
#pragma unroll
        for (uint32_t r = 0; r < WARP_ROWS; r++)
            if (r < row_count)
                state[r] =
                    *reinterpret_cast<const floats<width> *>(rows + (size_t)r * s.n + width * lane);
#pragma unroll
        for (int i = 0; i < own; i++)
            mine[i] = load_column(s, w, at, threadIdx.x + i * STEP_THREADS);
    }
    const float rate = -expf(w.a_log[at.head]), through = w.skip[at.head],
                dt_bias = w.dt_bias[at.head];
    if (early)
        cuda_depend_wait();
    for (uint32_t t = 0; t < at.segment.count; t++) {
        const size_t row = at.segment.row + t;
        const float raw = projected[row * s.proj + s.inner + s.conv + at.head];
        const uint32_t p = at.head * s.width + at.first + warp * WARP_ROWS + lane;
        const bool writes = lane < WARP_ROWS && lane < row_count;
        const float z = writes ? projected[row * s.proj + p] : 0;
        if (V) {
#pragma unroll
            for (int i = 0; i < own; i++)
                if (mine[i].j < s.conv)
                    columns[threadIdx.x + i * STEP_THREADS] =
                        convolve(&mine[i], projected[row * s.proj + s.inner + mine[i].j]);
        } else {
            for (uint32_t c = threadIdx.x; c < BLOCK_ROWS + 2 * s.n; c += STEP_THREADS) {
                const uint32_t j = column_of(s, at, c);
                float sum = j < s.conv && w.conv_bias ? w.conv_bias[j] : 0;
                for (uint32_t k = 0; j < s.conv && k < s.taps; k++)
                    sum = fmaf(cuda_float(w.conv[(size_t)j * s.taps + k]),
                               past(s, at, projected, j, t, s.taps - 1 - k), sum);
                columns[c] = cuda_silu(sum);
            }
        }
        __syncthreads();
        if (threadIdx.x == 0 && t + 1 == at.segment.count) /* B and C were read here */
            last = atomicAdd(&arrived[blockIdx.y], 1u) + 1 == gridDim.x;
        const float time = fminf(fmaxf(cuda_softplus(raw + dt_bias), s.dt_min), s.dt_max);
        const float decay = expf(time * rate);
        const float *b = columns + BLOCK_ROWS, *c = b + s.n;
        float own_y = 0;
#pragma unroll
        for (uint32_t r = 0; r < WARP_ROWS; r++) {
            if (r >= row_count)
                break;
            const float u = columns[warp * WARP_ROWS + r], add = time * u;
            float sum = 0;
            if (V) {
                const floats<width> bs = *reinterpret_cast<const floats<width> *>(b + width * lane);
                const floats<width> cs = *reinterpret_cast<const floats<width> *>(c + width * lane);
#pragma unroll
                for (int i = 0; i < width; i++) {
                    state[r].v[i] = fmaf(decay, state[r].v[i], add * bs.v[i]);
                    sum = fmaf(state[r].v[i], cs.v[i], sum);
                }
            } else {
                for (uint32_t i = lane; i < s.n; i += CUDA_WARP) {
                    float *element = rows + (size_t)r * s.n + i;
                    *element = fmaf(decay, *element, add * b[i]);
                    sum = fmaf(*element, c[i], sum);
                }
            }
            sum = fmaf(through, u, cuda_warp_sum(sum));
            own_y = lane == r ? sum : own_y;
        }
        if (writes)
            y[row * s.inner + p] = own_y * cuda_silu(z);
        if (t + 1 < at.segment.count)
            __syncthreads();
    }
    if (V) {
#pragma unroll
        for (uint32_t r = 0; r < WARP_ROWS; r++)
            if (r < row_count)
                *reinterpret_cast<floats<width> *>(rows + (size_t)r * s.n + width * lane) =
                    state[r];
    }
    /* Columns of x belong to this block alone; those of B and C to whoever read them last. */
    if (V && threadIdx.x < BLOCK_ROWS && mine[0].j < s.conv) {
#pragma unroll
        for (int k = 0; k < TAPS - 1; k++)
            at.segment.conv[(size_t)k * s.conv + mine[0].j] = mine[0].tail[k];
    } else if (!V && threadIdx.x < BLOCK_ROWS && column_of(s, at, threadIdx.x) < s.conv) {
        keep_tail(s, at, projected, column_of(s, at, threadIdx.x));
    }
    __syncthreads();
    if (!last)
        return;
    for (uint32_t j = s.inner + threadIdx.x; j < s.conv; j += STEP_THREADS)
        keep_tail(s, at, projected, j);
    if (threadIdx.x == 0)
        arrived[blockIdx.y] = 0;
}

template <typename T>
static void launch_step(struct ops_context *x, const struct ops_mamba_weights *weights,
                        const struct cuda_segment *segments, uint32_t segment_count, size_t ssm,
                        size_t conv)
{
    const struct mamba_shape s = mamba_shape_of(&x->config);
    struct step_weights<T> w;
    w.conv = (const T *)weights->conv_weight.data;
    w.conv_bias = (const float *)weights->conv_bias.data;
    w.dt_bias = (const float *)weights->dt_bias.data;
    w.a_log = (const float *)weights->a_log.data;
    w.skip = (const float *)weights->d.data;
    const dim3 grid(s.heads * cuda_ceil(s.width, BLOCK_ROWS), segment_count), block(STEP_THREADS);
    const size_t shared = sizeof(float) * (BLOCK_ROWS + 2 * (size_t)s.n);
    const bool early = x->early && x->recording;
    if (s.taps == TAPS && s.n == 4 * CUDA_WARP)
        CUDA_LAUNCH_EARLY(x, (step<T, 4>), grid, block, shared, s, w, segments, ssm, conv,
                          x->projected, x->scanned, x->arrived, early);
    else if (s.taps == TAPS && s.n == 2 * CUDA_WARP)
        CUDA_LAUNCH_EARLY(x, (step<T, 2>), grid, block, shared, s, w, segments, ssm, conv,
                          x->projected, x->scanned, x->arrived, early);
    else
        CUDA_LAUNCH_EARLY(x, (step<T, 0>), grid, block, shared, s, w, segments, ssm, conv,
                          x->projected, x->scanned, x->arrived, early);
}

void cuda_mamba_step(struct ops_context *x, const struct ops_mamba_weights *weights,
                     const struct cuda_segment *segments, uint32_t segment_count, size_t ssm,
                     size_t conv)
{
    if (x->wide)
        launch_step<float>(x, weights, segments, segment_count, ssm, conv);
    else
        launch_step<bf16>(x, weights, segments, segment_count, ssm, conv);
}
