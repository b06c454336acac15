/* mamba_step.cu - a Mamba-2 block token by token, for segments of few rows: convolution, time
 * steps, recurrence and gate in one kernel, which reads and writes each state once. */
#include "engine/cuda/device.cuh"
#include "engine/cuda/mamba_step.cuh"

#define STEP_WARPS 8
#define STEP_THREADS (STEP_WARPS * CUDA_WARP)
#define WARP_ROWS 4                         /* of a state, that a warp holds in registers */
#define BLOCK_ROWS (STEP_WARPS * WARP_ROWS) /* of a head's P */

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

/* N is 32 V and the convolution has TAPS taps: the state is read and written once and lies in
 * registers, a lane has V neighbours of each row. V 0: whatever they are; S is float then. */
template <typename T, typename S, int V>
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
    using kept = typename kept_of<S, width>::type;
    kept before[WARP_ROWS];
    floats<width> state[WARP_ROWS];
    struct column<T> mine[own];
    S *rows = reinterpret_cast<S *>(at.segment.ssm) +
              ((size_t)at.head * s.width + at.first + warp * WARP_ROWS) * s.n;
    const uint32_t row_count =
        at.first + warp * WARP_ROWS < s.width ? s.width - at.first - warp * WARP_ROWS : 0;
    if constexpr (V != 0) {
#pragma unroll
        for (uint32_t r = 0; r < WARP_ROWS; r++)
            if (r < row_count)
                before[r] = *reinterpret_cast<const kept *>(rows + (size_t)r * s.n + V * lane);
#pragma unroll
        for (int i = 0; i < own; i++)
            mine[i] = load_column(s, w, at.segment.conv,
                                  column_of(s, at, threadIdx.x + i * STEP_THREADS));
    }
    const float rate = -expf(w.a_log[at.head]), through = w.skip[at.head],
                dt_bias = w.dt_bias[at.head];
    if (early)
        cuda_depend_wait();
    if constexpr (V != 0) {
#pragma unroll
        for (uint32_t r = 0; r < WARP_ROWS; r++)
            if (r < row_count)
                state[r] = widen_state(before[r]);
    }
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
            if constexpr (V != 0) {
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
    if constexpr (V != 0) {
#pragma unroll
        for (uint32_t r = 0; r < WARP_ROWS; r++)
            if (r < row_count)
                store_state(rows + (size_t)r * s.n + V * lane, state[r]);
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

/* ---- several segments of one row ----
 * in_proj has convolved its columns already, and out_proj is left its rows prepared: what is in
 * between reads and writes states and little else. A block has one head or two, a warp some rows of
 * each, a lane V neighbours of a row. */

#define SINGLE_WIDTH 64 /* P */
#define SINGLE_ROWS (SINGLE_WIDTH / STEP_WARPS)
#define SINGLE_BLOCKS 4 /* that a multiprocessor has at a time */

struct singles {
    struct mamba_shape s;
    const float *dt_bias, *a_log, *skip, *norm; /* the last of the gate, or NULL */
    const struct cuda_segment *segments;
    size_t ssm;
    const float *projected;
    bf16 *ready;    /* see cuda_prepared */
    float *squares; /* [rows, di / 4]: of four neighbours each */
    bool early;
};

/* Of SINGLE_ROWS numbers of each lane the sums over all lanes; lane i gets that of number i / 4.
 * Each is added up in the order of cuda_warp_sum. */
static __device__ __forceinline__ float sum_rows(const float sums[SINGLE_ROWS])
{
    const uint32_t lane = threadIdx.x % CUDA_WARP;
    float four[4], two[2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float kept = lane & 16 ? sums[i + 4] : sums[i],
                    sent = lane & 16 ? sums[i] : sums[i + 4];
        four[i] = kept + __shfl_xor_sync(CUDA_ALL_LANES, sent, 16);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float kept = lane & 8 ? four[i + 2] : four[i],
                    sent = lane & 8 ? four[i] : four[i + 2];
        two[i] = kept + __shfl_xor_sync(CUDA_ALL_LANES, sent, 8);
    }
    const float kept = lane & 4 ? two[1] : two[0], sent = lane & 4 ? two[0] : two[1];
    float sum = kept + __shfl_xor_sync(CUDA_ALL_LANES, sent, 4);
    sum += __shfl_xor_sync(CUDA_ALL_LANES, sum, 2);
    return sum + __shfl_xor_sync(CUDA_ALL_LANES, sum, 1);
}

/* Lane i has y of the warp's row i / 4, which becomes input of out_proj. */
static __device__ __forceinline__ void prepare_y(const struct singles &m, uint32_t segment,
                                                 uint32_t first, float y, float norm)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP;
    const float scaled = y * norm;
    float of[4], to[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int from = (int)(lane & 16) + 4 * i;
        of[i] = __shfl_sync(CUDA_ALL_LANES, y, from);
        to[i] = __shfl_sync(CUDA_ALL_LANES, scaled, from);
    }
    if (lane & 15)
        return;
    const size_t at = (size_t)segment * m.s.inner + first + lane / 4;
    *reinterpret_cast<uint2 *>(m.ready + at) =
        uint2{cuda_pack(to[0], to[1]), cuda_pack(to[2], to[3])};
    m.squares[at / 4] = fmaf(of[3], of[3], fmaf(of[2], of[2], fmaf(of[1], of[1], of[0] * of[0])));
}

/* A warp's part of a head, as it is before the step. */
template <typename S, int V> struct part {
    uint32_t head, first, own; /* row of the warp; that whose numbers the lane has */
    S *state;
    typename kept_of<S, V>::type before[SINGLE_ROWS];
    float rate, through, dt_bias, norm;
};

/* What nobody in front of the kernel writes. */
template <typename S, int V>
static __device__ __forceinline__ void load_part(const struct singles &m, uint32_t head,
                                                 struct part<S, V> *p)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP;
    p->head = head;
    p->first = head * SINGLE_WIDTH + threadIdx.x / CUDA_WARP * SINGLE_ROWS;
    p->own = p->first + lane / 4;
    p->state = reinterpret_cast<S *>(m.segments[blockIdx.y].ssm + m.ssm) +
               (size_t)p->first * m.s.n + V * lane;
#pragma unroll
    for (uint32_t r = 0; r < SINGLE_ROWS; r++)
        p->before[r] =
            *reinterpret_cast<const typename kept_of<S, V>::type *>(p->state + (size_t)r * m.s.n);
    p->rate = -expf(m.a_log[head]);
    p->through = m.skip[head];
    p->dt_bias = m.dt_bias[head];
    p->norm = m.norm ? m.norm[p->own] : 1;
}

template <typename S, int V>
static __device__ __forceinline__ void step_part(const struct singles &m,
                                                 const struct part<S, V> &p)
{
    const struct mamba_shape &s = m.s;
    const uint32_t lane = threadIdx.x % CUDA_WARP, segment = blockIdx.y;
    const float *row = m.projected + (size_t)segment * s.proj;
    const float *b = row + 2 * s.inner + p.head / (s.heads / s.groups) * s.n + V * lane;
    const float raw = row[s.inner + s.conv + p.head], u = row[s.inner + p.own], z = row[p.own];
    const floats<V> bs = *reinterpret_cast<const floats<V> *>(b),
                    cs = *reinterpret_cast<const floats<V> *>(b + s.groups * s.n);
    const float time = fminf(fmaxf(cuda_softplus(raw + p.dt_bias), s.dt_min), s.dt_max);
    const float decay = expf(time * p.rate);
    float sums[SINGLE_ROWS];
#pragma unroll
    for (uint32_t r = 0; r < SINGLE_ROWS; r++) {
        const float add = time * __shfl_sync(CUDA_ALL_LANES, u, (int)(4 * r));
        floats<V> h = widen_state(p.before[r]);
        sums[r] = 0;
#pragma unroll
        for (int i = 0; i < V; i++) {
            h.v[i] = fmaf(decay, h.v[i], add * bs.v[i]);
            sums[r] = fmaf(h.v[i], cs.v[i], sums[r]);
        }
        store_state(p.state + (size_t)r * s.n, h);
    }
    const float y = fmaf(p.through, u, sum_rows(sums)) * cuda_silu(z);
    prepare_y(m, segment, p.first, y, p.norm);
}

/* Heads of a block: as many as keep the same number of bytes on their way. */
template <typename S> constexpr uint32_t single_heads = sizeof(float) / sizeof(S);

/* N is 32 V. Grid: parts of the heads x segments. */
template <typename S, int V>
static __global__ void __launch_bounds__(STEP_THREADS, SINGLE_BLOCKS) step_singles(struct singles m)
{
    struct part<S, V> parts[single_heads<S>];
    const uint32_t first = blockIdx.x * single_heads<S>;
    cuda_depend_release();
    if (!m.early)
        cuda_depend_wait();
#pragma unroll
    for (uint32_t i = 0; i < single_heads<S>; i++)
        load_part(m, first + i, &parts[i]);
    if (m.early)
        cuda_depend_wait();
#pragma unroll
    for (uint32_t i = 0; i < single_heads<S>; i++)
        step_part(m, parts[i]);
}

template <typename S>
static void launch_singles(struct ops_context *x, const struct singles &m, uint32_t segment_count)
{
    const dim3 grid(m.s.heads / single_heads<S>, segment_count), block(STEP_THREADS);
    if (m.s.n == 4 * CUDA_WARP)
        CUDA_LAUNCH_EARLY(x, (step_singles<S, 4>), grid, block, 0, m);
    else
        CUDA_LAUNCH_EARLY(x, (step_singles<S, 2>), grid, block, 0, m);
}

bool cuda_mamba_takes_singles(const struct ops_context *x, const struct ops_rows *rows)
{
    const struct mamba_shape s = mamba_shape_of(&x->config);
    return !x->wide && rows->row_count > 1 && rows->row_count == rows->segment_count &&
           s.taps == TAPS && s.width == SINGLE_WIDTH && s.proj % 4 == 0 &&
           (s.n == 4 * CUDA_WARP || s.n == 2 * CUDA_WARP) && x->config.hidden_size % 32 == 0 &&
           (!x->states_bf16 || s.heads % single_heads<bf16> == 0);
}

struct cuda_soon cuda_mamba_soon(const struct ops_context *x, const struct cuda_segment *segments,
                                 uint32_t segment_count, size_t ssm)
{
    const uint32_t all = segment_count * x->config.mamba_heads,
                   first = SINGLE_BLOCKS * (uint32_t)x->multiprocessors;
    struct cuda_soon soon = {};
    soon.segments = segments;
    soon.ssm = ssm;
    soon.count = all < first ? all : first;
    soon.heads = x->config.mamba_heads;
    soon.head_words = x->config.mamba_head_dim * x->config.state_size / (x->states_bf16 ? 2 : 1);
    return soon;
}

struct cuda_convolution cuda_mamba_convolution(const struct ops_context *x,
                                               const struct ops_mamba_weights *weights,
                                               const struct cuda_segment *segments, size_t conv)
{
    struct cuda_convolution c = {};
    c.segments = segments;
    c.offset = conv;
    c.weights = weights->conv_weight.data;
    c.bias = (const float *)weights->conv_bias.data;
    c.first = x->config.inner_size;
    c.count = x->config.conv_size;
    c.early = x->early && x->recording;
    return c;
}

void cuda_mamba_singles(struct ops_context *x, const struct ops_mamba_weights *weights,
                        const struct cuda_segment *segments, uint32_t first_row,
                        uint32_t segment_count, size_t ssm)
{
    struct singles m = {};
    m.s = mamba_shape_of(&x->config);
    m.dt_bias = (const float *)weights->dt_bias.data;
    m.a_log = (const float *)weights->a_log.data;
    m.skip = (const float *)weights->d.data;
    m.norm = (const float *)weights->gate_norm.data;
    m.segments = segments;
    m.ssm = ssm;
    m.projected = x->projected + (size_t)first_row * m.s.proj;
    const struct cuda_prepared_rows prepared = cuda_prepared(x, m.s.inner);
    m.ready = (bf16 *)prepared.rows + (size_t)first_row * m.s.inner;
    m.squares = prepared.squares + (size_t)first_row * (m.s.inner / 4);
    m.early = x->early && x->recording;
    if (x->states_bf16)
        launch_singles<bf16>(x, m, segment_count);
    else
        launch_singles<float>(x, m, segment_count);
}

template <typename T, typename S>
static void launch_step(struct ops_context *x, const struct ops_mamba_weights *weights,
                        const struct cuda_segment *segments, uint32_t segment_count, size_t ssm,
                        size_t conv)
{
    const struct mamba_shape s = mamba_shape_of(&x->config);
    const struct step_weights<T> w = cuda_step_weights<T>(weights);
    const dim3 grid(s.heads * cuda_ceil(s.width, BLOCK_ROWS), segment_count), block(STEP_THREADS);
    const size_t shared = sizeof(float) * (BLOCK_ROWS + 2 * (size_t)s.n);
    const bool early = x->early && x->recording;
    if (s.taps == TAPS && s.n == 4 * CUDA_WARP)
        CUDA_LAUNCH_EARLY(x, (step<T, S, 4>), grid, block, shared, s, w, segments, ssm, conv,
                          x->projected, x->scanned, x->arrived, early);
    else if (s.taps == TAPS && s.n == 2 * CUDA_WARP)
        CUDA_LAUNCH_EARLY(x, (step<T, S, 2>), grid, block, shared, s, w, segments, ssm, conv,
                          x->projected, x->scanned, x->arrived, early);
    else
        CUDA_LAUNCH_EARLY(x, (step<T, float, 0>), grid, block, shared, s, w, segments, ssm, conv,
                          x->projected, x->scanned, x->arrived, early);
}

bool cuda_mamba_keeps_bf16(const struct model_config *c)
{
    return c->conv_kernel == TAPS &&
           (c->state_size == 4 * CUDA_WARP || c->state_size == 2 * CUDA_WARP);
}

void cuda_mamba_step(struct ops_context *x, const struct ops_mamba_weights *weights,
                     const struct cuda_segment *segments, uint32_t segment_count, size_t ssm,
                     size_t conv)
{
    if (x->wide && x->states_bf16)
        launch_step<float, bf16>(x, weights, segments, segment_count, ssm, conv);
    else if (x->wide)
        launch_step<float, float>(x, weights, segments, segment_count, ssm, conv);
    else if (x->states_bf16)
        launch_step<bf16, bf16>(x, weights, segments, segment_count, ssm, conv);
    else
        launch_step<bf16, float>(x, weights, segments, segment_count, ssm, conv);
}
