/* mamba_blocks.cu - long segments of a Mamba-2 block, in blocks of the chunked (SSD) form, where
 * all but a scan over the blocks is matrix products (Dao and Gu, "Transformers are SSMs", section
 * 6). What lies between the projections is as wide as inputs of products are; sums, decays and the
 * state that goes on from block to block are fp32. Heads of 64 with a state of 64 or 128 go through
 * tensor cores when bf16; every other form, and fp32, through plain tiles, the same steps one by
 * one. */
#include <stdlib.h>

#include "engine/cuda/mamba_blocks.cuh"

/* ---- convolution and time steps ---- */

#define CONV_ROWS 16
#define CONV_THREADS 128
#define CONV_WARPS (CONV_THREADS / CUDA_WARP)

/* Rows [row, end) with TAPS taps, which are read once, as is each row. */
template <int TAPS, int V, typename T>
static __device__ __forceinline__ void
convolve_fixed(const struct mamba_shape &s, const struct inputs<T> &in,
               const struct cuda_segment *segment, uint32_t row, uint32_t end, uint32_t j,
               T *__restrict__ conv)
{
    float weight[TAPS][V], bias[V], window[TAPS][V];
#pragma unroll
    for (int v = 0; v < V; v++) {
        bias[v] = in.bias ? in.bias[j + v] : 0;
#pragma unroll
        for (int i = 0; i < TAPS; i++)
            weight[i][v] = cuda_float(in.weight[(size_t)(j + v) * TAPS + i]);
    }
#pragma unroll
    for (int i = 0; i < TAPS - 1; i++)
        load_column<V>(s, in, segment, row, TAPS - 1 - i, j, window[i]);
#pragma unroll 4
    for (; row < end; row++) {
        float sum[V];
        load_column<V>(s, in, segment, row, 0, j, window[TAPS - 1]);
#pragma unroll
        for (int v = 0; v < V; v++) {
            sum[v] = bias[v];
#pragma unroll
            for (int i = 0; i < TAPS; i++)
                sum[v] = fmaf(weight[i][v], window[i][v], sum[v]);
            sum[v] = cuda_silu(sum[v]);
#pragma unroll
            for (int i = 0; i < TAPS - 1; i++)
                window[i][v] = window[i + 1][v];
        }
        store<V>(conv + (size_t)row * s.conv + j, sum);
    }
}

/* The same with any number of taps. */
template <int V, typename T>
static __device__ __forceinline__ void
convolve_any(const struct mamba_shape &s, const struct inputs<T> &in,
             const struct cuda_segment *segment, uint32_t row, uint32_t end, uint32_t j, T *conv)
{
    for (; row < end; row++) {
        float sum[V], column[V];
#pragma unroll
        for (int v = 0; v < V; v++)
            sum[v] = in.bias ? in.bias[j + v] : 0;
        for (uint32_t i = 0; i < s.taps; i++) {
            load_column<V>(s, in, segment, row, s.taps - 1 - i, j, column);
#pragma unroll
            for (int v = 0; v < V; v++)
                sum[v] =
                    fmaf(cuda_float(in.weight[(size_t)(j + v) * s.taps + i]), column[v], sum[v]);
        }
#pragma unroll
        for (int v = 0; v < V; v++)
            sum[v] = cuda_silu(sum[v]);
        store<V>(conv + (size_t)row * s.conv + j, sum);
    }
}

/* dt and decay [tokens] of one block and head: time steps, zeros behind the block's rows; log decay
 * from the block's start, the row's own included. A warp. */
template <typename T>
static __device__ __forceinline__ void
time_steps(const struct mamba_shape &s, const struct inputs<T> &in, const struct block &block,
           uint32_t tokens, uint32_t h, float *dt, float *decay)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP;
    const float rate = -expf(in.a_log[h]);
    float before = 0;
    for (uint32_t t = lane; t < tokens; t += CUDA_WARP) {
        const float step = time_step(s, in, block, h, t), sum = before + sum_up_to(step);
        dt[t] = step;
        decay[t] = sum * rate;
        before = __shfl_sync(CUDA_ALL_LANES, sum, CUDA_WARP - 1);
    }
}

/* conv[j] = SiLU(sum_i w[j][i] xBC[t - taps + 1 + i][j] + bias), rows before the segment from its
 * tail, V neighbours a thread; and, by the blocks behind `tiles`, dt and decay [blocks, Hm,
 * tokens]. Grid: blocks x tiles of columns, then of heads x slices of CONV_ROWS rows. */
template <typename T, int V>
static __global__ void __launch_bounds__(CONV_THREADS)
    convolve(struct mamba_shape s, struct inputs<T> in, const struct block *blocks,
             const struct cuda_segment *segments, uint32_t tiles, uint32_t tokens, T *conv,
             float *dt, float *decay)
{
    cuda_depend_release();
    cuda_depend_wait();
    const struct block block = blocks[blockIdx.x];
    const struct cuda_segment *segment = &segments[block.segment];
    if (blockIdx.y >= tiles) {
        const uint32_t h = (blockIdx.y - tiles) * CONV_WARPS + threadIdx.x / CUDA_WARP;
        const size_t at = ((size_t)blockIdx.x * s.heads + h) * tokens;
        if (blockIdx.z == 0 && h < s.heads)
            time_steps(s, in, block, tokens, h, dt + at, decay + at);
        return;
    }
    const uint32_t j = (blockIdx.y * CONV_THREADS + threadIdx.x) * V;
    const uint32_t row = block.row + blockIdx.z * CONV_ROWS;
    const uint32_t end = block.row + min((blockIdx.z + 1) * CONV_ROWS, block.count);
    if (j >= s.conv || row >= end)
        return;
    if (s.taps == 4)
        convolve_fixed<4, V>(s, in, segment, row, end, j, conv);
    else
        convolve_any<V>(s, in, segment, row, end, j, conv);
}

/* ---- plain tiles ---- */

#define TILE 64 /* rows and columns of a product's tile */
#define TILE_DEPTH 32
#define TILE_STRIDE 68 /* of a tile's rows in shared memory: aligned for float4, off the banks */
#define TILE_THREADS 256

/* acc[4][4] of each thread += sum over depth of a(k, m) b(k, n), for the 64 x 64 tile; thread
 * (ty, tx) has rows 4 ty.. and columns 4 tx... `a_by_depth`: neighbours in k lie together in
 * memory, so that is how they are read. */
template <bool a_by_depth, bool b_by_depth, typename A, typename B>
static __device__ __forceinline__ void tile_product(float *as, float *bs, uint32_t depth, A a, B b,
                                                    float acc[4][4])
{
    const uint32_t tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    for (uint32_t from = 0; from < depth; from += TILE_DEPTH) {
        for (uint32_t i = threadIdx.x; i < TILE_DEPTH * TILE; i += TILE_THREADS) {
            const uint32_t ka = a_by_depth ? i % TILE_DEPTH : i / TILE;
            const uint32_t m = a_by_depth ? i / TILE_DEPTH : i % TILE;
            const uint32_t kb = b_by_depth ? i % TILE_DEPTH : i / TILE;
            const uint32_t n = b_by_depth ? i / TILE_DEPTH : i % TILE;
            as[ka * TILE_STRIDE + m] = from + ka < depth ? a(from + ka, m) : 0;
            bs[kb * TILE_STRIDE + n] = from + kb < depth ? b(from + kb, n) : 0;
        }
        __syncthreads();
#pragma unroll 8
        for (uint32_t k = 0; k < TILE_DEPTH; k++) {
            float av[4], bv[4];
            cuda_load16(as + k * TILE_STRIDE + 4 * ty, av);
            cuda_load16(bs + k * TILE_STRIDE + 4 * tx, bv);
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    acc[i][j] = fmaf(av[i], bv[j], acc[i][j]);
        }
        __syncthreads();
    }
}

/* states[block, h] [P, N] = what the block alone adds to the state. Grid: blocks x heads x tiles.
 */
template <typename T>
static __global__ void __launch_bounds__(TILE_THREADS)
    block_states(struct mamba_shape s, const struct block *blocks, const T *conv, const float *dt,
                 const float *decay, float *states)
{
    __shared__ __align__(16) float as[TILE_DEPTH * TILE_STRIDE], bs[TILE_DEPTH * TILE_STRIDE];
    __shared__ float factor[TILE];
    const struct block block = blocks[blockIdx.x];
    const uint32_t h = blockIdx.y, group = h / (s.heads / s.groups);
    const uint32_t tiles = (s.n + TILE - 1) / TILE;
    const uint32_t p0 = blockIdx.z / tiles * TILE, n0 = blockIdx.z % tiles * TILE;
    if (threadIdx.x < TILE) {
        const size_t from = ((size_t)blockIdx.x * s.heads + h) * TILE, at = from + threadIdx.x;
        factor[threadIdx.x] = dt[at] * expf(decay[from + TILE - 1] - decay[at]);
    }
    __syncthreads();
    const T *u = conv + (size_t)block.row * s.conv + h * s.width;
    const T *b = conv + (size_t)block.row * s.conv + s.inner + (size_t)group * s.n;
    float acc[4][4] = {};
    tile_product<false, false>(
        as, bs, block.count,
        [&](uint32_t k, uint32_t m) {
            return p0 + m < s.width ? cuda_float(u[(size_t)k * s.conv + p0 + m]) * factor[k] : 0;
        },
        [&](uint32_t k, uint32_t n) {
            return n0 + n < s.n ? cuda_float(b[(size_t)k * s.conv + n0 + n]) : 0;
        },
        acc);
    float *out = states + ((size_t)blockIdx.x * s.heads + h) * s.width * s.n;
    for (uint32_t i = 0; i < 4; i++)
        for (uint32_t j = 0; j < 4; j++) {
            const uint32_t p = p0 + threadIdx.x / 16 * 4 + i, n = n0 + threadIdx.x % 16 * 4 + j;
            if (p < s.width && n < s.n)
                out[(size_t)p * s.n + n] = acc[i][j];
        }
}

/* y of a block's rows, one head: what came before the block, what it holds itself, and D x. Grid:
 * blocks x heads x tiles of P. */
template <typename T>
static __global__ void __launch_bounds__(TILE_THREADS)
    block_outputs(struct mamba_shape s, const struct block *blocks, const T *conv, const float *dt,
                  const float *decay, const float *states, const float *skip, T *y)
{
    __shared__ __align__(16) float as[TILE_DEPTH * TILE_STRIDE], bs[TILE_DEPTH * TILE_STRIDE];
    __shared__ float scores[TILE * TILE_STRIDE]; /* [column][row] */
    __shared__ float times[TILE], decays[TILE];
    const struct block block = blocks[blockIdx.x];
    const uint32_t h = blockIdx.y, group = h / (s.heads / s.groups), p0 = blockIdx.z * TILE;
    const uint32_t tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    if (threadIdx.x < TILE) {
        const size_t at = ((size_t)blockIdx.x * s.heads + h) * TILE + threadIdx.x;
        times[threadIdx.x] = dt[at];
        decays[threadIdx.x] = decay[at];
    }
    __syncthreads();
    const T *u = conv + (size_t)block.row * s.conv + h * s.width;
    const T *b = conv + (size_t)block.row * s.conv + s.inner + (size_t)group * s.n;
    const T *c = b + (size_t)s.groups * s.n;
    float acc[4][4] = {};
    tile_product<true, true>(
        as, bs, s.n,
        [&](uint32_t k, uint32_t m) {
            return m < block.count ? cuda_float(c[(size_t)m * s.conv + k]) : 0;
        },
        [&](uint32_t k, uint32_t n) {
            return n < block.count ? cuda_float(b[(size_t)n * s.conv + k]) : 0;
        },
        acc);
    for (uint32_t i = 0; i < 4; i++)
        for (uint32_t j = 0; j < 4; j++) {
            const uint32_t row = 4 * ty + i, column = 4 * tx + j;
            scores[column * TILE_STRIDE + row] =
                column <= row ? acc[i][j] * expf(decays[row] - decays[column]) * times[column] : 0;
            acc[i][j] = 0;
        }
    __syncthreads();
    const float *before = states + ((size_t)blockIdx.x * s.heads + h) * s.width * s.n;
    tile_product<true, true>(
        as, bs, s.n,
        [&](uint32_t k, uint32_t m) {
            return m < block.count ? cuda_float(c[(size_t)m * s.conv + k]) * expf(decays[m]) : 0;
        },
        [&](uint32_t k, uint32_t n) {
            return p0 + n < s.width ? before[(size_t)(p0 + n) * s.n + k] : 0;
        },
        acc);
    tile_product<false, false>(
        as, bs, block.count, [&](uint32_t k, uint32_t m) { return scores[k * TILE_STRIDE + m]; },
        [&](uint32_t k, uint32_t n) {
            return p0 + n < s.width ? cuda_float(u[(size_t)k * s.conv + p0 + n]) : 0;
        },
        acc);
    for (uint32_t i = 0; i < 4; i++)
        for (uint32_t j = 0; j < 4; j++) {
            const uint32_t row = 4 * ty + i, p = p0 + 4 * tx + j;
            if (row < block.count && p < s.width)
                cuda_store(y + (size_t)(block.row + row) * s.inner + h * s.width + p,
                           fmaf(skip[h], cuda_float(u[(size_t)row * s.conv + p]), acc[i][j]));
        }
}

/* ---- from block to block ---- */

#define CARRY_AHEAD 8
#define CARRY_THREADS 256

/* The last rows of xBC's column `j` become the tail's. */
template <typename T>
static __device__ __forceinline__ void keep_tail(const struct mamba_shape &s,
                                                 const struct cuda_segment *segment,
                                                 const struct inputs<T> &in, uint32_t j)
{
    const uint32_t keep = s.taps - 1;
    const uint32_t fresh = segment->count < keep ? segment->count : keep;
    const size_t end = (size_t)segment->row + segment->count;
    float *tail = segment->conv + j;
    for (uint32_t i = 0; i + fresh < keep; i++)
        tail[(size_t)i * s.conv] = tail[(size_t)(i + fresh) * s.conv];
    for (uint32_t i = keep - fresh; i < keep; i++)
        tail[(size_t)i * s.conv] =
            cuda_float(in.projected[(end - keep + i) * s.proj + s.inner + j]) +
            (in.in_bias ? in.in_bias[s.inner + j] : 0);
}

/* Turns what each block adds into the state before it, and leaves the state behind the last one, as
 * K; V neighbours a thread; and the tail, a column a thread. Grid: tiles of a state x runs. */
template <typename K, typename S, int V, typename T>
static __global__ void __launch_bounds__(CARRY_THREADS)
    carry_states(struct mamba_shape s, struct inputs<T> in, const struct run *runs, uint32_t tokens,
                 const struct cuda_segment *segments, const float *decay, S *states)
{
    const size_t elements = (size_t)s.heads * s.width * s.n;
    const size_t e = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    const struct run run = runs[blockIdx.y];
    const uint32_t h = (uint32_t)(e / ((size_t)s.width * s.n));
    K *kept = reinterpret_cast<K *>(segments[run.segment].ssm) + e;
    float state[V];
    if (e < elements)
        load<V>(kept, state);
    cuda_depend_wait();
    cuda_depend_release(); /* what conv holds is there for the kernel behind this one */
    for (uint32_t j = blockIdx.x * blockDim.x + threadIdx.x; j < s.conv;
         j += gridDim.x * blockDim.x)
        keep_tail(s, segments + run.segment, in, j);
    if (e >= elements)
        return;
    for (uint32_t first = run.first; first < run.first + run.count; first += CARRY_AHEAD) {
        float added[CARRY_AHEAD][V], left[CARRY_AHEAD];
#pragma unroll
        for (uint32_t k = 0; k < CARRY_AHEAD;
             k++) { /* all on their way before the first is needed */
            const uint32_t i = min(first + k, run.first + run.count - 1);
            load<V>(states + (size_t)i * elements + e, added[k]);
            left[k] = decay[((size_t)i * s.heads + h) * tokens + tokens - 1];
        }
#pragma unroll
        for (uint32_t k = 0; k < CARRY_AHEAD; k++) {
            if (first + k >= run.first + run.count)
                break;
            store<V>(states + (size_t)(first + k) * elements + e, state);
#pragma unroll
            for (int v = 0; v < V; v++)
                state[v] = fmaf(expf(left[k]), state[v], added[k][v]);
        }
    }
    store<V>(kept, state);
}

/* ---- the gate ---- */

#define GATE_THREADS 256

/* out = RMSNorm(y * SiLU(z)), V neighbours a thread. Grid: rows. */
template <typename T, int V>
static __global__ void __launch_bounds__(GATE_THREADS)
    gate_norm(struct mamba_shape s, const T *projected, const float *in_bias, const T *y,
              const float *weight, float epsilon, T *out)
{
    CUDA_SHARED(float, gated);
    cuda_depend_release();
    cuda_depend_wait();
    const T *z = projected + (size_t)blockIdx.x * s.proj;
    const T *row = y + (size_t)blockIdx.x * s.inner;
    float sum = 0;
    for (uint32_t i = threadIdx.x * V; i < s.inner; i += GATE_THREADS * V) {
        float own[V], gate[V];
        load<V>(row + i, own);
        load<V>(z + i, gate);
#pragma unroll
        for (int v = 0; v < V; v++) {
            const float value = own[v] * cuda_silu(gate[v] + (in_bias ? in_bias[i + v] : 0));
            gated[i + v] = value; /* read by this thread alone */
            sum = fmaf(value, value, sum);
        }
    }
    const float scale = 1 / sqrtf(cuda_block_sum(sum) / (float)s.inner + epsilon);
    for (uint32_t i = threadIdx.x * V; i < s.inner; i += GATE_THREADS * V) {
        float value[V];
#pragma unroll
        for (int v = 0; v < V; v++)
            value[v] = gated[i + v] * scale * weight[i + v];
        store<V>(out + (size_t)blockIdx.x * s.inner + i, value);
    }
}

/* ---- the host's side ---- */

/* The blocks of as many long segments from `*next` on as fit the scratch; returns how many blocks,
 * and their segments as runs. */
static uint32_t cut_blocks(const struct ops_rows *rows, uint32_t tokens, uint32_t capacity,
                           uint32_t *next, struct block *blocks, struct run *runs,
                           uint32_t *run_count)
{
    uint32_t count = 0;
    *run_count = 0;
    for (; *next < rows->segment_count; ++*next) {
        const struct ops_segment *segment = &rows->segments[*next];
        if (segment->count <= CUDA_FEW_ROWS)
            continue;
        const uint32_t n = cuda_ceil(segment->count, tokens);
        ASSERT(n <= capacity);
        if (count + n > capacity)
            break;
        runs[(*run_count)++] = (struct run){*next, count, n};
        for (uint32_t i = 0; i < n; i++) {
            const uint32_t left = segment->count - i * tokens;
            blocks[count++] =
                (struct block){segment->row + i * tokens, left < tokens ? left : tokens, *next};
        }
    }
    return count;
}

template <typename S, int V, typename T>
static void carry(struct ops_context *x, const struct work *w)
{
    const struct mamba_shape s = w->shape;
    const dim3 grid(cuda_ceil((uint64_t)s.heads * s.width * s.n / V, CARRY_THREADS), w->run_count),
        block(CARRY_THREADS);
    if (x->states_bf16)
        CUDA_LAUNCH_EARLY(x, (carry_states<bf16, S, V, T>), grid, block, 0, s,
                          inputs_of<T>(x, w->weights), w->runs, w->tokens, w->segments, x->decay,
                          (S *)(void *)x->states);
    else
        CUDA_LAUNCH_EARLY(x, (carry_states<float, S, V, T>), grid, block, 0, s,
                          inputs_of<T>(x, w->weights), w->runs, w->tokens, w->segments, x->decay,
                          (S *)(void *)x->states);
}

template <typename T> static void scan_tiles(struct ops_context *x, const struct work *w)
{
    const struct mamba_shape s = w->shape;
    const T *conv = (const T *)(const void *)x->conv;
    const uint32_t p_tiles = cuda_ceil(s.width, TILE), n_tiles = cuda_ceil(s.n, TILE);
    CUDA_LAUNCH(x, block_states<T>, dim3(w->block_count, s.heads, p_tiles * n_tiles),
                dim3(TILE_THREADS), 0, s, w->blocks, conv, x->dt, x->decay, x->states);
    carry<float, 1, T>(x, w);
    CUDA_LAUNCH(x, block_outputs<T>, dim3(w->block_count, s.heads, p_tiles), dim3(TILE_THREADS), 0,
                s, w->blocks, conv, x->dt, x->decay, x->states, (const float *)w->weights->d.data,
                (T *)(void *)x->scanned);
}

/* V: how many neighbours of a row may be read at once, everywhere. */
template <typename T, int V> static void run_group(struct ops_context *x, const struct work *w)
{
    const struct mamba_shape s = w->shape;
    const uint32_t tiles = cuda_ceil(s.conv, CONV_THREADS * V);
    if (w->mma) {
        cuda_block_states(x, w);
        carry<bf16, 4, bf16>(x, w);
        cuda_block_outputs(x, w);
        return;
    }
    CUDA_LAUNCH_EARLY(x, (convolve<T, V>),
                      dim3(w->block_count, tiles + cuda_ceil(s.heads, CONV_WARPS),
                           cuda_ceil(w->tokens, CONV_ROWS)),
                      dim3(CONV_THREADS), 0, s, inputs_of<T>(x, w->weights), w->blocks, w->segments,
                      tiles, w->tokens, (T *)(void *)x->conv, x->dt, x->decay);
    scan_tiles<T>(x, w);
}

/* One segment's outputs. */
template <typename T, int V>
static void norm_segment(struct ops_context *x, const struct work *w, size_t row, uint32_t count)
{
    const struct mamba_shape s = w->shape;
    const struct ops_mamba_weights *weights = w->weights;
    CUDA_LAUNCH_EARLY(
        x, (gate_norm<T, V>), dim3(count), dim3(GATE_THREADS), s.inner * sizeof(float), s,
        (const T *)(const void *)x->projected + row * s.proj,
        (const float *)weights->in_proj_bias.data,
        (const T *)(const void *)x->scanned + row * s.inner, (const float *)weights->gate_norm.data,
        x->config.norm_epsilon, (T *)x->mixed + row * s.inner);
}

static void project_segment(struct ops_context *x, const struct work *w, size_t row, uint32_t count,
                            float *hidden)
{
    const struct mamba_shape s = w->shape;
    struct scaled_rows rows = {};
    rows.out = hidden + row * x->config.hidden_size;
    rows.bias = (const float *)w->weights->out_proj_bias.data;
    rows.parts = cuda_output_parts(s);
    rows.squares = x->scanned + row * rows.parts;
    rows.count = count;
    rows.columns = x->config.hidden_size;
    rows.depth = s.inner;
    rows.epsilon = x->config.norm_epsilon;
    cuda_add_scaled(x, w->weights->out_proj.data, (const bf16 *)x->mixed + row * s.inner, rows);
}

template <typename T, int V, int G>
static void run_segments(struct ops_context *x, struct work *w, const struct ops_rows *rows,
                         float *hidden)
{
    const uint32_t capacity = x->max_rows / w->tokens + LIMITS_RUNNING;
    struct block *blocks = (struct block *)malloc(sizeof *blocks * capacity);
    struct run *runs = (struct run *)malloc(sizeof *runs * capacity);
    if (!blocks || !runs)
        cuda_fail(x, STATUS_NO_MEMORY, "out of memory for a step's blocks");
    for (uint32_t next = 0; !x->failed && next < rows->segment_count;) {
        const uint32_t first = next;
        w->block_count = cut_blocks(rows, w->tokens, capacity, &next, blocks, runs, &w->run_count);
        w->blocks = (const struct block *)cuda_stage(x, blocks, sizeof *blocks * w->block_count);
        w->runs = (const struct run *)cuda_stage(x, runs, sizeof *runs * w->run_count);
        run_group<T, V>(x, w);
        for (uint32_t i = first; i < next; i++) {
            const struct ops_segment *segment = &rows->segments[i];
            if (segment->count <= CUDA_FEW_ROWS)
                continue;
            if (w->gated)
                project_segment(x, w, segment->row, segment->count, hidden);
            else
                norm_segment<T, G>(x, w, segment->row, segment->count);
        }
    }
    free(blocks);
    free(runs);
}

bool cuda_mamba_blocks(struct ops_context *x, const struct ops_mamba_weights *weights,
                       const struct ops_rows *rows, const struct cuda_segment *segments,
                       float *hidden)
{
    struct work w = {};
    w.shape = mamba_shape_of(&x->config);
    w.weights = weights;
    w.segments = segments;
    const struct mamba_shape s = w.shape;
    w.mma = !x->wide && cuda_mamba_tiles(s);
    w.gated = w.mma && cuda_adds_scaled(x);
    w.tokens = w.mma ? CUDA_BLOCK_TOKENS : TILE;
    for (uint32_t i = 0; i < rows->segment_count; i++)
        if (rows->segments[i].count > CUDA_FEW_ROWS)
            cuda_linear_narrow(x, &weights->in_proj, &rows->segments[i], x->normed, x->projected);
    if (x->wide)
        run_segments<float, 1, 1>(x, &w, rows, hidden);
    else if (s.proj % 8 == 0 && s.conv % 8 == 0 && s.inner % 8 == 0)
        run_segments<bf16, 4, 8>(x, &w, rows, hidden);
    else
        run_segments<bf16, 1, 1>(x, &w, rows, hidden);
    return w.gated;
}
