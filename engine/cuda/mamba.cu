/* mamba.cu - one Mamba-2 block. A segment of few rows goes token by token; longer ones in blocks of
 * the chunked (SSD) form, where all but a scan over the blocks is matrix products (Dao and Gu,
 * "Transformers are SSMs", section 6). Both carry the state forward in fp32. */
#include <stdlib.h>

#include "engine/cuda/cuda.h"
#include "engine/cuda/device.cuh"

/* Sizes that the kernels of a block share. */
struct mamba_shape {
    uint32_t heads, width, n, groups; /* Hm, P, N, G */
    uint32_t inner, conv, proj, taps;
    float dt_min, dt_max;
};

/* A block of the chunked form: at most CUDA_BLOCK_TOKENS rows of one segment. */
struct block {
    uint32_t row, count, segment;
};

/* The blocks [first, first + count) of a long segment. */
struct run {
    uint32_t segment, first, count;
};

static struct mamba_shape shape_of(const struct model_config *c)
{
    struct mamba_shape s;
    s.heads = c->mamba_heads;
    s.width = c->mamba_head_dim;
    s.n = c->state_size;
    s.groups = c->state_groups;
    s.inner = c->inner_size;
    s.conv = c->conv_size;
    s.proj = c->proj_size;
    s.taps = c->conv_kernel;
    s.dt_min = c->dt_min;
    s.dt_max = c->dt_max;
    return s;
}

/* ---- convolution ---- */

/* conv[j] = SiLU(sum_i w[j][i] xBC[t - taps + 1 + i][j] + bias), columns before the segment from
 * its tail; behind the columns, the time steps of the heads. Grid: rows x tiles of columns. */
template <typename T>
static __global__ void convolve(struct mamba_shape s, const struct cuda_segment *segments,
                                const uint32_t *row_segment, const float *projected,
                                const T *weight, const float *bias, const float *dt_bias,
                                float *conv, float *dt)
{
    const uint32_t row = blockIdx.x, j = blockIdx.y * blockDim.x + threadIdx.x;
    const float *column = projected + (size_t)row * s.proj + s.inner + j;
    if (j < s.conv) {
        const struct cuda_segment *segment = &segments[row_segment[row]];
        const uint32_t at = row - segment->row;
        float sum = bias ? bias[j] : 0;
        for (uint32_t i = 0; i < s.taps; i++) {
            const uint32_t back = s.taps - 1 - i;
            const float in = back <= at
                                 ? *(column - (size_t)back * s.proj)
                                 : segment->conv[(size_t)(s.taps - 1 + at - back) * s.conv + j];
            sum = fmaf(cuda_float(weight[(size_t)j * s.taps + i]), in, sum);
        }
        conv[(size_t)row * s.conv + j] = cuda_silu(sum);
    } else if (j < s.conv + s.heads) {
        const uint32_t h = j - s.conv;
        const float step = cuda_softplus(*column + dt_bias[h]);
        dt[(size_t)row * s.heads + h] = fminf(fmaxf(step, s.dt_min), s.dt_max);
    }
}

/* The last columns of xBC become the tail. Grid: tiles of columns x segments. */
static __global__ void keep_tails(struct mamba_shape s, const struct cuda_segment *segments,
                                  const float *projected)
{
    const uint32_t j = blockIdx.x * blockDim.x + threadIdx.x, keep = s.taps - 1;
    const struct cuda_segment *segment = &segments[blockIdx.y];
    if (j >= s.conv)
        return;
    float *tail = segment->conv + j;
    const uint32_t fresh = segment->count < keep ? segment->count : keep;
    for (uint32_t i = 0; i + fresh < keep; i++)
        tail[(size_t)i * s.conv] = tail[(size_t)(i + fresh) * s.conv];
    for (uint32_t i = keep - fresh; i < keep; i++)
        tail[(size_t)i * s.conv] =
            projected[(size_t)(segment->row + segment->count - keep + i) * s.proj + s.inner + j];
}

/* ---- token by token ---- */

#define STEP_WARPS 8

/* One head of one short segment: a warp has every STEP_WARPS-th row of the state. Grid: heads x
 * segments. */
static __global__ void __launch_bounds__(STEP_WARPS *CUDA_WARP)
    step(struct mamba_shape s, const struct cuda_segment *segments, const float *conv,
         const float *dt, const float *a_log, const float *skip, float *y)
{
    const uint32_t h = blockIdx.x, group = h / (s.heads / s.groups);
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const struct cuda_segment *segment = &segments[blockIdx.y];
    if (segment->count > CUDA_FEW_ROWS)
        return;
    const float rate = -expf(a_log[h]), through = skip[h];
    for (uint32_t p = warp; p < s.width; p += STEP_WARPS) {
        float *state = segment->ssm + ((size_t)h * s.width + p) * s.n;
        for (uint32_t row = segment->row; row < segment->row + segment->count; row++) {
            const float *b = conv + (size_t)row * s.conv + s.inner + (size_t)group * s.n;
            const float *c = b + (size_t)s.groups * s.n;
            const float u = conv[(size_t)row * s.conv + h * s.width + p];
            const float time = dt[(size_t)row * s.heads + h], decay = expf(time * rate);
            float sum = 0;
            for (uint32_t i = lane; i < s.n; i += CUDA_WARP) {
                const float next = fmaf(decay, state[i], time * u * b[i]);
                state[i] = next;
                sum = fmaf(next, c[i], sum);
            }
            sum = cuda_warp_sum(sum);
            if (lane == 0)
                y[(size_t)row * s.inner + h * s.width + p] = fmaf(through, u, sum);
        }
    }
}

/* ---- blocks ---- */

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

/* Log decay from each block's start, its own row included. */
static __global__ void accumulate_decay(struct mamba_shape s, const struct block *blocks,
                                        uint32_t block_count, const float *dt, const float *a_log,
                                        float *decay)
{
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= block_count * s.heads)
        return;
    const struct block b = blocks[i / s.heads];
    const uint32_t h = i % s.heads;
    const float rate = -expf(a_log[h]);
    float sum = 0;
    for (uint32_t row = b.row; row < b.row + b.count; row++) {
        sum = fmaf(dt[(size_t)row * s.heads + h], rate, sum);
        decay[(size_t)row * s.heads + h] = sum;
    }
}

/* states[block, h] [P, N] = what the block alone adds to the state. Grid: blocks x heads x tiles.
 */
static __global__ void __launch_bounds__(TILE_THREADS)
    block_states(struct mamba_shape s, const struct block *blocks, const float *conv,
                 const float *dt, const float *decay, float *states)
{
    __shared__ __align__(16) float as[TILE_DEPTH * TILE_STRIDE], bs[TILE_DEPTH * TILE_STRIDE];
    __shared__ float factor[CUDA_BLOCK_TOKENS];
    const struct block block = blocks[blockIdx.x];
    const uint32_t h = blockIdx.y, group = h / (s.heads / s.groups);
    const uint32_t tiles = (s.n + TILE - 1) / TILE;
    const uint32_t p0 = blockIdx.z / tiles * TILE, n0 = blockIdx.z % tiles * TILE;
    if (threadIdx.x < block.count) {
        const size_t at = (size_t)(block.row + threadIdx.x) * s.heads + h;
        const float last = decay[(size_t)(block.row + block.count - 1) * s.heads + h];
        factor[threadIdx.x] = dt[at] * expf(last - decay[at]);
    }
    __syncthreads();
    const float *u = conv + (size_t)block.row * s.conv + h * s.width;
    const float *b = conv + (size_t)block.row * s.conv + s.inner + (size_t)group * s.n;
    float acc[4][4] = {};
    tile_product<false, false>(
        as, bs, block.count,
        [&](uint32_t k, uint32_t m) {
            return p0 + m < s.width ? u[(size_t)k * s.conv + p0 + m] * factor[k] : 0;
        },
        [&](uint32_t k, uint32_t n) { return n0 + n < s.n ? b[(size_t)k * s.conv + n0 + n] : 0; },
        acc);
    float *out = states + ((size_t)blockIdx.x * s.heads + h) * s.width * s.n;
    for (uint32_t i = 0; i < 4; i++)
        for (uint32_t j = 0; j < 4; j++) {
            const uint32_t p = p0 + threadIdx.x / 16 * 4 + i, n = n0 + threadIdx.x % 16 * 4 + j;
            if (p < s.width && n < s.n)
                out[(size_t)p * s.n + n] = acc[i][j];
        }
}

/* Turns what each block adds into the state before it, and leaves the state behind the last one.
 * Grid: tiles of a state x long segments. */
static __global__ void carry_states(struct mamba_shape s, const struct run *runs,
                                    const struct block *blocks, const struct cuda_segment *segments,
                                    const float *decay, float *states)
{
    const size_t elements = (size_t)s.heads * s.width * s.n;
    const size_t e = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= elements)
        return;
    const struct run run = runs[blockIdx.y];
    const uint32_t h = (uint32_t)(e / ((size_t)s.width * s.n));
    float *kept = segments[run.segment].ssm + e, state = *kept;
    for (uint32_t i = run.first; i < run.first + run.count; i++) {
        float *own = states + (size_t)i * elements + e;
        const float added = *own;
        const uint32_t last = blocks[i].row + blocks[i].count - 1;
        *own = state;
        state = fmaf(expf(decay[(size_t)last * s.heads + h]), state, added);
    }
    *kept = state;
}

/* y of a block's rows, one head: what came before the block, what it holds itself, and D x. Grid:
 * blocks x heads x tiles of P. */
static __global__ void __launch_bounds__(TILE_THREADS)
    block_outputs(struct mamba_shape s, const struct block *blocks, const float *conv,
                  const float *dt, const float *decay, const float *states, const float *skip,
                  float *y)
{
    __shared__ __align__(16) float as[TILE_DEPTH * TILE_STRIDE], bs[TILE_DEPTH * TILE_STRIDE];
    __shared__ float scores[CUDA_BLOCK_TOKENS * TILE_STRIDE]; /* [column][row] */
    __shared__ float times[CUDA_BLOCK_TOKENS], decays[CUDA_BLOCK_TOKENS];
    const struct block block = blocks[blockIdx.x];
    const uint32_t h = blockIdx.y, group = h / (s.heads / s.groups), p0 = blockIdx.z * TILE;
    const uint32_t tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    if (threadIdx.x < CUDA_BLOCK_TOKENS) {
        const bool there = threadIdx.x < block.count;
        const size_t at = (size_t)(block.row + threadIdx.x) * s.heads + h;
        times[threadIdx.x] = there ? dt[at] : 0;
        decays[threadIdx.x] = there ? decay[at] : 0;
    }
    __syncthreads();
    const float *u = conv + (size_t)block.row * s.conv + h * s.width;
    const float *b = conv + (size_t)block.row * s.conv + s.inner + (size_t)group * s.n;
    const float *c = b + (size_t)s.groups * s.n;
    float acc[4][4] = {};
    tile_product<true, true>(
        as, bs, s.n,
        [&](uint32_t k, uint32_t m) { return m < block.count ? c[(size_t)m * s.conv + k] : 0; },
        [&](uint32_t k, uint32_t n) { return n < block.count ? b[(size_t)n * s.conv + k] : 0; },
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
            return m < block.count ? c[(size_t)m * s.conv + k] * expf(decays[m]) : 0;
        },
        [&](uint32_t k, uint32_t n) {
            return p0 + n < s.width ? before[(size_t)(p0 + n) * s.n + k] : 0;
        },
        acc);
    tile_product<false, false>(
        as, bs, block.count, [&](uint32_t k, uint32_t m) { return scores[k * TILE_STRIDE + m]; },
        [&](uint32_t k, uint32_t n) {
            return p0 + n < s.width ? u[(size_t)k * s.conv + p0 + n] : 0;
        },
        acc);
    for (uint32_t i = 0; i < 4; i++)
        for (uint32_t j = 0; j < 4; j++) {
            const uint32_t row = 4 * ty + i, p = p0 + 4 * tx + j;
            if (row < block.count && p < s.width)
                y[(size_t)(block.row + row) * s.inner + h * s.width + p] =
                    fmaf(skip[h], u[(size_t)row * s.conv + p], acc[i][j]);
        }
}

/* The blocks of as many long segments from `*next` on as fit the scratch; returns how many blocks,
 * and their segments as runs. */
static uint32_t cut_blocks(const struct ops_rows *rows, uint32_t capacity, uint32_t *next,
                           struct block *blocks, struct run *runs, uint32_t *run_count)
{
    uint32_t count = 0;
    *run_count = 0;
    for (; *next < rows->segment_count; ++*next) {
        const struct ops_segment *segment = &rows->segments[*next];
        if (segment->count <= CUDA_FEW_ROWS)
            continue;
        const uint32_t n = cuda_ceil(segment->count, CUDA_BLOCK_TOKENS);
        ASSERT(n <= capacity);
        if (count + n > capacity)
            break;
        runs[(*run_count)++] = (struct run){*next, count, n};
        for (uint32_t i = 0; i < n; i++) {
            const uint32_t left = segment->count - i * CUDA_BLOCK_TOKENS;
            blocks[count++] =
                (struct block){segment->row + i * CUDA_BLOCK_TOKENS,
                               left < CUDA_BLOCK_TOKENS ? left : CUDA_BLOCK_TOKENS, *next};
        }
    }
    return count;
}

static void run_blocks(struct ops_context *x, const struct ops_mamba_weights *w,
                       const struct ops_rows *rows, const struct cuda_segment *segments)
{
    const struct mamba_shape s = shape_of(&x->config);
    const float *a_log = (const float *)w->a_log.data, *skip = (const float *)w->d.data;
    const uint32_t p_tiles = cuda_ceil(s.width, TILE), n_tiles = cuda_ceil(s.n, TILE);
    struct block *blocks = (struct block *)malloc(sizeof *blocks * x->block_capacity);
    struct run *runs = (struct run *)malloc(sizeof *runs * x->block_capacity);
    if (!blocks || !runs)
        cuda_fail(x, STATUS_NO_MEMORY, "out of memory for a step's blocks");
    for (uint32_t next = 0; !x->failed && next < rows->segment_count;) {
        uint32_t run_count;
        const uint32_t count = cut_blocks(rows, x->block_capacity, &next, blocks, runs, &run_count);
        if (!count)
            break;
        const struct block *b = (const struct block *)cuda_stage(x, blocks, sizeof *b * count);
        const struct run *r = (const struct run *)cuda_stage(x, runs, sizeof *r * run_count);
        CUDA_LAUNCH(x, accumulate_decay, dim3(cuda_ceil((uint64_t)count * s.heads, 128)), dim3(128),
                    0, s, b, count, x->dt, a_log, x->decay);
        CUDA_LAUNCH(x, block_states, dim3(count, s.heads, p_tiles * n_tiles), dim3(TILE_THREADS), 0,
                    s, b, x->conv, x->dt, x->decay, x->states);
        CUDA_LAUNCH(x, carry_states,
                    dim3(cuda_ceil((uint64_t)s.heads * s.width * s.n, 256), run_count), dim3(256),
                    0, s, r, b, segments, x->decay, x->states);
        CUDA_LAUNCH(x, block_outputs, dim3(count, s.heads, p_tiles), dim3(TILE_THREADS), 0, s, b,
                    x->conv, x->dt, x->decay, x->states, skip, x->scanned);
    }
    free(blocks);
    free(runs);
}

/* ---- the gate ---- */

#define GATE_THREADS 256

/* out = RMSNorm(y * SiLU(z)). Grid: rows. */
template <typename T>
static __global__ void __launch_bounds__(GATE_THREADS)
    gate_norm(struct mamba_shape s, const float *projected, float *y, const float *weight,
              float epsilon, T *out)
{
    const float *z = projected + (size_t)blockIdx.x * s.proj;
    float *row = y + (size_t)blockIdx.x * s.inner;
    float sum = 0;
    for (uint32_t i = threadIdx.x; i < s.inner; i += GATE_THREADS) {
        const float gated = row[i] * cuda_silu(z[i]);
        row[i] = gated;
        sum = fmaf(gated, gated, sum);
    }
    const float scale = 1 / sqrtf(cuda_block_sum(sum) / (float)s.inner + epsilon);
    for (uint32_t i = threadIdx.x; i < s.inner; i += GATE_THREADS)
        cuda_store(out + (size_t)blockIdx.x * s.inner + i, row[i] * scale * weight[i]);
}

template <typename T>
static void run_layer(struct ops_context *x, const struct ops_mamba_weights *w,
                      const struct ops_rows *rows, const struct cuda_segment *segments,
                      const uint32_t *row_segment)
{
    const struct mamba_shape s = shape_of(&x->config);
    CUDA_LAUNCH(x, convolve<T>, dim3(rows->row_count, cuda_ceil(s.conv + s.heads, 256)), dim3(256),
                0, s, segments, row_segment, x->projected, (const T *)w->conv_weight.data,
                (const float *)w->conv_bias.data, (const float *)w->dt_bias.data, x->conv, x->dt);
    CUDA_LAUNCH(x, keep_tails, dim3(cuda_ceil(s.conv, 256), rows->segment_count), dim3(256), 0, s,
                segments, x->projected);
    run_blocks(x, w, rows, segments);
    CUDA_LAUNCH(x, step, dim3(s.heads, rows->segment_count), dim3(STEP_WARPS * CUDA_WARP), 0, s,
                segments, x->conv, x->dt, (const float *)w->a_log.data, (const float *)w->d.data,
                x->scanned);
    CUDA_LAUNCH(x, gate_norm<T>, dim3(rows->row_count), dim3(GATE_THREADS), 0, s, x->projected,
                x->scanned, (const float *)w->gate_norm.data, x->config.norm_epsilon,
                (T *)x->mixed);
}

extern "C" void cuda_mamba(struct ops_context *x, const struct ops_mamba_weights *w,
                           const struct ops_rows *rows, const struct ops_mamba_state *states,
                           float *hidden)
{
    const struct model_config *c = &x->config;
    const struct cuda_segment *segments;
    const uint32_t *row_segment;
    cuda_begin(x);
    struct cuda_segment *own = cuda_segments(x, rows);
    for (uint32_t i = 0; own && i < rows->segment_count; i++) {
        own[i].ssm = states[i].ssm;
        own[i].conv = states[i].conv;
        own[i].position = 0; /* unused here, and so the table is the same in the next step */
    }
    if (own && cuda_stage_rows(x, rows, own, &segments, &row_segment)) {
        cuda_norm(x, hidden, &w->norm, c->hidden_size, c->norm_epsilon, rows->row_count, x->normed);
        cuda_linear(x, &w->in_proj, &w->in_proj_bias, rows, x->normed, x->projected, false);
        if (x->wide)
            run_layer<float>(x, w, rows, segments, row_segment);
        else
            run_layer<bf16>(x, w, rows, segments, row_segment);
        cuda_linear(x, &w->out_proj, &w->out_proj_bias, rows, x->mixed, hidden, true);
    }
    free(own);
}
