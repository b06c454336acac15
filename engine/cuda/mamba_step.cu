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
            mine[i] = load_column(s, w, at.segment.conv,
                                  column_of(s, at, threadIdx.x + i * STEP_THREADS));
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
static struct step_weights<T> weights_of(const struct ops_mamba_weights *weights) {
    struct step_weights<T> w;
    w.conv = (const T *)weights->conv_weight.data;
    w.conv_bias = (const float *)weights->conv_bias.data;
    w.dt_bias = (const float *)weights->dt_bias.data;
    w.a_log = (const float *)weights->a_log.data;
    w.skip = (const float *)weights->d.data;
    return w;
}

/* ---- many segments of one row ----
 * Heads of states stream through shared memory, some always on their way; a block goes through its
 * share of all heads in order, so that it seldom begins another segment, whose B and C all its
 * warps need. */

#define STAGES 3

struct many {
    struct mamba_shape s;
    struct step_weights<bf16> w;
    const struct cuda_segment *segments;
    uint32_t segment_count;
    size_t ssm, conv;
    const float *projected;
    float *y;
    uint32_t *arrived;
    bool early;
};

/* A warp's rows of one head. */
struct head_rows {
    uint32_t segment, first; /* row of [Hm P] */
};

static __device__ __forceinline__ struct head_rows find_rows(const struct many &m, uint32_t item)
{
    struct head_rows at;
    at.segment = item / m.s.heads;
    at.first = item % m.s.heads * m.s.width + threadIdx.x / CUDA_WARP * (m.s.width / STEP_WARPS);
    return at;
}

/* Blocks that have heads of the segment. */
static __device__ __forceinline__ uint32_t readers_of(const struct many &m, uint32_t segment)
{
    const uint64_t all = (uint64_t)m.segment_count * m.s.heads;
    const uint64_t first = (uint64_t)segment * m.s.heads, last = first + m.s.heads - 1;
    return (uint32_t)(((last + 1) * gridDim.x - 1) / all - ((first + 1) * gridDim.x - 1) / all + 1);
}

/* A thread's column of B or C in a segment, and its newest value. */
struct bc_column {
    struct column<bf16> column;
    float value;
};

static __device__ __forceinline__ void load_bc(const struct many &m, uint32_t segment,
                                               struct column<bf16> *out)
{
    out->j = m.s.conv;
    if (threadIdx.x < 2 * m.s.groups * m.s.n && segment < m.segment_count)
        *out = load_column(m.s, m.w, m.segments[segment].conv + m.conv, m.s.inner + threadIdx.x);
}

static __device__ __forceinline__ float load_bc_value(const struct many &m, uint32_t segment,
                                                      const struct column<bf16> &c)
{
    return c.j < m.s.conv ? m.projected[(size_t)segment * m.s.proj + m.s.inner + c.j] : 0;
}

/* B and C of a segment for the block's warps; *last: no other block will read their tails. */
static __device__ __forceinline__ void begin_segment(const struct many &m, uint32_t segment,
                                                     struct bc_column *bc, float *columns,
                                                     bool *last)
{
    if (bc->column.j < m.s.conv)
        columns[threadIdx.x] = convolve(&bc->column, bc->value);
    __syncthreads();
    if (threadIdx.x == 0)
        *last = atomicAdd(&m.arrived[segment], 1u) + 1 == readers_of(m, segment);
}

/* The block has done with the segment. */
static __device__ __forceinline__ void end_segment(const struct many &m, uint32_t segment,
                                                   const struct bc_column &bc, const bool *last)
{
    __syncthreads();
    if (!*last)
        return;
    if (bc.column.j < m.s.conv)
#pragma unroll
        for (int k = 0; k < TAPS - 1; k++)
            m.segments[segment].conv[m.conv + (size_t)k * m.s.conv + bc.column.j] =
                bc.column.tail[k];
    if (threadIdx.x == 0)
        m.arrived[segment] = 0;
}

/* N is 32 V. Grid: at most as many blocks as heads of all segments. */
template <int V> static __global__ void __launch_bounds__(STEP_THREADS, 2) step_many(struct many m)
{
    CUDA_SHARED(float, memory); /* [STAGES][P][N]; behind them B and C of all groups */
    __shared__ bool last;
    const struct mamba_shape &s = m.s;
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const uint32_t rows = s.width / STEP_WARPS, strip = rows * s.n;
    float *columns = memory + STAGES * (size_t)s.width * s.n;
    const auto stage = [&](uint32_t i) {
        return memory + i % STAGES * (size_t)s.width * s.n + warp * strip;
    };
    cuda_depend_release();
    if (!m.early)
        cuda_depend_wait();
    const struct span share = share_of(m.segment_count * s.heads, gridDim.x, blockIdx.x);
    const auto inputs_of = [&](const struct head_rows &at) {
        const float *projected = m.projected + (size_t)at.segment * s.proj;
        return load_inputs(
            s, [=](uint32_t j) { return projected[j]; }, at.first + lane);
    };
    const auto state_of = [&](const struct head_rows &at) {
        return m.segments[at.segment].ssm + m.ssm + (size_t)at.first * s.n;
    };
    const auto fetch = [&](uint32_t i) {
        if (i < share.count) {
            const float *from = state_of(find_rows(m, share.first + i));
            for (uint32_t e = 4 * lane; e < strip; e += 4 * CUDA_WARP)
                cuda_copy_async(stage(i) + e, from + e);
        }
        cuda_copy_commit();
    };
#pragma unroll
    for (uint32_t i = 0; i < STAGES - 1; i++)
        fetch(i);
    struct head_rows at = find_rows(m, share.first);
    struct bc_column bc, next_bc;
    struct state_row row = {};
    struct row_inputs in = {};
    load_bc(m, at.segment, &bc.column);
    load_bc(m, at.segment + 1, &next_bc.column);
    if (lane < rows)
        row = load_state_row(s, m.w, m.segments[at.segment].conv + m.conv, at.first + lane);
    if (m.early)
        cuda_depend_wait();
    bc.value = load_bc_value(m, at.segment, bc.column);
    next_bc.value = load_bc_value(m, at.segment + 1, next_bc.column);
    if (lane < rows)
        in = inputs_of(at);
    begin_segment(m, at.segment, &bc, columns, &last);
    for (uint32_t i = 0; i < share.count; i++) {
        const struct head_rows next = find_rows(m, share.first + i + 1);
        struct state_row next_row = {};
        struct row_inputs next_in = {};
        if (i + 1 < share.count && lane < rows) {
            next_row =
                load_state_row(s, m.w, m.segments[next.segment].conv + m.conv, next.first + lane);
            next_in = inputs_of(next);
        }
        struct row_step step = {};
        if (lane < rows)
            step = begin_row(s, &row, in);
        cuda_copy_wait<STAGES - 2>();
        __syncwarp();
        fetch(i + STAGES - 1);
        const float sum = step_rows<V>(s, at.first, rows, stage(i), state_of(at), step, columns);
        if (lane < rows) {
            m.y[(size_t)at.segment * s.inner + at.first + lane] =
                fmaf(row.through, step.u, sum) * cuda_silu(in.z);
#pragma unroll
            for (int k = 0; k < TAPS - 1; k++)
                m.segments[at.segment].conv[m.conv + (size_t)k * s.conv + row.column.j] =
                    row.column.tail[k];
        }
        if (i + 1 < share.count && next.segment != at.segment) {
            end_segment(m, at.segment, bc, &last);
            bc = next_bc;
            load_bc(m, next.segment + 1, &next_bc.column);
            next_bc.value = load_bc_value(m, next.segment + 1, next_bc.column);
            __syncthreads(); /* `last` is read */
            begin_segment(m, next.segment, &bc, columns, &last);
        }
        at = i + 1 < share.count ? next : at;
        row = next_row;
        in = next_in;
    }
    end_segment(m, at.segment, bc, &last);
}

static uint32_t blocks_of(const struct ops_context *x, uint32_t segment_count)
{
    const uint32_t heads = segment_count * x->config.mamba_heads,
                   room = 2 * (uint32_t)x->multiprocessors;
    return heads < room ? heads : room;
}

template <int V> static void launch_many(struct ops_context *x, const struct many &m, size_t shared)
{
    CUDA_ALLOW_SHARED(x, step_many<V>, shared);
    CUDA_LAUNCH_EARLY(x, step_many<V>, dim3(blocks_of(x, m.segment_count)), dim3(STEP_THREADS),
                      shared, m);
}

struct cuda_soon cuda_mamba_soon(const struct ops_context *x, const struct cuda_segment *segments,
                                 uint32_t segment_count, size_t ssm)
{
    struct cuda_soon soon = {};
    soon.segments = segments;
    soon.ssm = ssm;
    soon.segment_count = segment_count;
    soon.heads = x->config.mamba_heads;
    soon.head_floats = x->config.mamba_head_dim * x->config.state_size;
    soon.blocks = blocks_of(x, segment_count);
    return soon;
}

/* False: such shapes are not covered. */
static bool launch_singles(struct ops_context *x, const struct ops_mamba_weights *weights,
                           const struct cuda_segment *segments, uint32_t segment_count, size_t ssm,
                           size_t conv)
{
    struct many m = {};
    m.s = mamba_shape_of(&x->config);
    m.w = weights_of<bf16>(weights);
    m.segments = segments;
    m.segment_count = segment_count;
    m.ssm = ssm;
    m.conv = conv;
    m.projected = x->projected;
    m.y = x->scanned;
    m.arrived = x->arrived;
    m.early = x->early && x->recording;
    const size_t shared =
        sizeof(float) * (STAGES * (size_t)m.s.width * m.s.n + 2 * (size_t)m.s.groups * m.s.n);
    if (m.s.taps != TAPS || m.s.width % STEP_WARPS || m.s.width / STEP_WARPS > CUDA_WARP ||
        2 * m.s.groups * m.s.n > STEP_THREADS || shared > (size_t)112 << 10)
        return false;
    if (m.s.n == 4 * CUDA_WARP)
        launch_many<4>(x, m, shared);
    else if (m.s.n == 2 * CUDA_WARP)
        launch_many<2>(x, m, shared);
    else
        return false;
    return true;
}

template <typename T>
static void launch_step(struct ops_context *x, const struct ops_mamba_weights *weights,
                        const struct cuda_segment *segments, uint32_t segment_count, size_t ssm,
                        size_t conv)
{
    const struct mamba_shape s = mamba_shape_of(&x->config);
    const struct step_weights<T> w = weights_of<T>(weights);
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
                     const struct cuda_segment *segments, uint32_t segment_count, bool single,
                     size_t ssm, size_t conv)
{
    if (single && segment_count > CUDA_FEW_ROWS && !x->wide &&
        launch_singles(x, weights, segments, segment_count, ssm, conv))
        return;
    if (x->wide)
        launch_step<float>(x, weights, segments, segment_count, ssm, conv);
    else
        launch_step<bf16>(x, weights, segments, segment_count, ssm, conv);
}
