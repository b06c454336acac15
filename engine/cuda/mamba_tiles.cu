/* mamba_tiles.cu - the chunked (SSD) form on tensor cores: bf16, heads of 64, a state of 64 or 128,
 * blocks of CUDA_BLOCK_TOKENS rows. Each kernel starts, where it may, before the one in front of it
 * has ended, with what the one before that has left. Hopper's last one is in mamba_outputs.cu. */
#include "engine/cuda/mamba_outputs.cuh"

#define TAPS 4
#define PAD 8 /* elements behind a row in shared memory: eight rows fall on all banks */
#define CONV_THREADS 128
#define CONV_ROWS 4 /* of B and C, that a thread convolves */
#define STATE_THREADS 256
#define UNIT 4                                        /* columns of x, and */
#define STRIP (TOKENS * WIDTH / UNIT / STATE_THREADS) /* rows that a thread convolves */

/* `count` rows of `columns` elements from rows `stride` apart; rows behind them zeros. */
static __device__ __forceinline__ void copy_rows(bf16 *to, const bf16 *from, size_t stride,
                                                 uint32_t columns, uint32_t count, uint32_t rows)
{
    const uint32_t units = columns / 8;
    for (uint32_t i = threadIdx.x; i < rows * units; i += blockDim.x) {
        const uint32_t row = i / units, unit = i % units;
        cuda_copy_async(to + row * (columns + PAD) + unit * 8,
                        from + (row < count ? row : 0) * stride + unit * 8, row < count);
    }
}

/* ---- the convolution ---- */

/* Of V columns of xBC. */
template <int V> struct taps {
    float weight[V * TAPS], bias[V];
};

template <int V>
static __device__ __forceinline__ void load_taps(const struct inputs<bf16> &in, uint32_t j,
                                                 struct taps<V> &taps)
{
#pragma unroll
    for (int i = 0; i < V * TAPS; i += 8)
        cuda_load16(in.weight + (size_t)j * TAPS + i, taps.weight + i);
#pragma unroll
    for (int v = 0; v < V; v++)
        taps.bias[v] = in.bias ? in.bias[j + v] : 0;
}

/* V columns of xBC, the block's rows [first, first + ROWS): `load_row` gives a row, `store_row`
 * takes what becomes of it, zeros from `end` on; `window`: the TAPS - 1 rows before. */
template <int ROWS, int V, typename L, typename S>
static __device__ __forceinline__ void convolve_rows(const struct taps<V> &taps, uint32_t first,
                                                     uint32_t end, float window[TAPS][V],
                                                     L load_row, S store_row)
{
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float sum[V];
        load_row(first + r, window[(TAPS - 1 + r) % TAPS]);
#pragma unroll
        for (int v = 0; v < V; v++) {
            sum[v] = taps.bias[v];
#pragma unroll
            for (int i = 0; i < TAPS; i++)
                sum[v] = fmaf(taps.weight[v * TAPS + i], window[(r + i) % TAPS][v], sum[v]);
            sum[v] = first + r < end ? cuda_silu_narrow(sum[v]) : 0;
        }
        store_row(r, sum);
    }
}

/* in_proj's bias of V columns of xBC. */
template <int V>
static __device__ __forceinline__ void
add_in_bias(const struct mamba_shape &s, const struct inputs<bf16> &in, uint32_t j, float *to)
{
    if (in.in_bias)
#pragma unroll
        for (int v = 0; v < V; v++)
            to[v] += in.in_bias[s.inner + j + v];
}

/* B and C of conv, CONV_ROWS rows of 8 columns a thread. Grid: blocks x parts of them. */
static __global__ void __launch_bounds__(CONV_THREADS)
    convolve_shared(struct mamba_shape s, struct inputs<bf16> in, const struct block *blocks,
                    const struct cuda_segment *segments, bf16 *conv)
{
    cuda_depend_wait();
    cuda_depend_release(); /* what projected holds is there for the kernel behind this one */
    const struct block block = blocks[blockIdx.x];
    const uint32_t units = (s.conv - s.inner) / 8, i = blockIdx.y * CONV_THREADS + threadIdx.x;
    const uint32_t first = i / units * CONV_ROWS, j = s.inner + i % units * 8;
    if (first >= block.count)
        return;
    float window[TAPS][8];
    struct taps<8> taps;
    load_taps(in, j, taps);
    uint4 out[CONV_ROWS];
    const bf16 *from = in.projected + (size_t)block.row * s.proj + s.inner + j;
    const auto load_row = [&](uint32_t row, float *to) {
        cuda_load16(from + (size_t)(row < block.count ? row : 0) * s.proj, to);
        add_in_bias<8>(s, in, j, to);
    };
#pragma unroll
    for (int k = 0; k < TAPS - 1; k++)
        if (first)
            load_row(first - TAPS + 1 + k, window[k]);
        else
            load_column<8>(s, in, segments + block.segment, block.row, TAPS - 1 - k, j, window[k]);
    convolve_rows<CONV_ROWS, 8>(
        taps, first, block.count, window, load_row,
        [&](int r, const float *sum) { store<8>(reinterpret_cast<bf16 *>(&out[r]), sum); });
#pragma unroll
    for (uint32_t r = 0; r < CONV_ROWS; r++)
        if (first + r < block.count)
            *reinterpret_cast<uint4 *>(conv + (size_t)(block.row + first + r) * s.conv + j) =
                out[r];
}

/* ---- what a block adds to the state ---- */

/* states[block, h] [P, N] = what the block alone adds to the state: sum over rows of (x dt decay)
 * outer B; on the way x of conv, dt and decay. A warp has 16 of P and half of N. Grid: blocks x
 * heads. */
template <int N>
static __global__ void __launch_bounds__(STATE_THREADS, 4)
    block_states_mma(struct mamba_shape s, struct inputs<bf16> in, const struct block *blocks,
                     const struct cuda_segment *segments, float *dt, float *decay, bf16 *conv,
                     bf16 *states)
{
    CUDA_SHARED(bf16, bs);
    bf16 *xs = bs + TOKENS * (N + PAD);
    /* What is left of each row's input at the block's end. */
    float *factors = reinterpret_cast<float *>(xs + TOKENS * (WIDTH + PAD));
    float *totals = factors + TOKENS; /* of the time steps of 32 rows each */
    const struct block block = blocks[blockIdx.x];
    const uint32_t h = blockIdx.y, group = h / (s.heads / s.groups), t = threadIdx.x;
    const uint32_t rows = (block.count + 15) / 16 * 16;
    const uint32_t unit = t % (WIDTH / UNIT) * UNIT, first = t / (WIDTH / UNIT) * STRIP;
    const uint32_t j = h * WIDTH + unit;
    bf16 *raw = bs; /* x before the convolution, and then B */
    copy_rows(raw, in.projected + (size_t)block.row * s.proj + s.inner + h * WIDTH, s.proj, WIDTH,
              block.count, TOKENS);
    cuda_copy_commit();
    float step = 0, until = 0, window[TAPS][UNIT];
    if (t < TOKENS) {
        step = time_step(s, in, block, h, t);
        until = sum_up_to(step);
        if (t % CUDA_WARP == CUDA_WARP - 1)
            totals[t / CUDA_WARP] = until;
    }
    struct taps<UNIT> taps;
    load_taps(in, j, taps);
    if (first == 0)
#pragma unroll
        for (int k = 0; k < TAPS - 1; k++)
            load_column<UNIT>(s, in, segments + block.segment, block.row, TAPS - 1 - k, j,
                              window[k]);
    cuda_copy_wait<0>();
    __syncthreads();
    if (t < TOKENS) {
        const size_t at = ((size_t)blockIdx.x * s.heads + h) * TOKENS + t;
        const float rate = -expf(in.a_log[h]);
        float all = 0;
#pragma unroll
        for (uint32_t w = 0; w < TOKENS / CUDA_WARP; w++) {
            until += w < t / CUDA_WARP ? totals[w] : 0;
            all += totals[w];
        }
        dt[at] = step;
        decay[at] = until * rate;
        factors[t] = step * cuda_exp2((all - until) * rate * LOG2_E);
    }
    __syncthreads();
    const auto load_row = [&](uint32_t row, float *to) {
        load<UNIT>(raw + row * (WIDTH + PAD) + unit, to);
        add_in_bias<UNIT>(s, in, j, to);
    };
    if (first)
#pragma unroll
        for (int k = 0; k < TAPS - 1; k++)
            load_row(first - TAPS + 1 + k, window[k]);
    bf16 *kept = conv + (size_t)(block.row + first) * s.conv + j;
    convolve_rows<STRIP, UNIT>(
        taps, first, block.count, window, load_row, [&](int r, const float *sum) {
            const uint2 x = {cuda_pack(sum[0], sum[1]), cuda_pack(sum[2], sum[3])};
            const float factor = factors[first + r];
            *reinterpret_cast<uint2 *>(xs + (first + r) * (WIDTH + PAD) + unit) =
                uint2{scaled(x.x, factor, factor), scaled(x.y, factor, factor)};
            if (first + r < block.count)
                *reinterpret_cast<uint2 *>(kept + (size_t)r * s.conv) = x;
        });
    __syncthreads();
    cuda_depend_wait();
    cuda_depend_release();
    copy_rows(bs, conv + (size_t)block.row * s.conv + s.inner + (size_t)group * N, s.conv, N,
              block.count, rows);
    cuda_copy_commit();
    cuda_copy_wait<0>();
    __syncthreads();
    const uint32_t lane = t % CUDA_WARP, top = t / CUDA_WARP / 2 * 16;
    const uint32_t left = t / CUDA_WARP % 2 * (N / 2);
    float acc[N / 16][4] = {};
    for (uint32_t k = 0; k < rows; k += 16) {
        uint32_t a[4], b[4];
        cuda_load_transposed(a, cuda_matrix_row(xs + k * (WIDTH + PAD) + top, WIDTH + PAD, false));
#pragma unroll
        for (int n = 0; n < N / 32; n++) {
            cuda_load_transposed(
                b, cuda_matrix_row(bs + k * (N + PAD) + left + n * 16, N + PAD, true));
            cuda_mma(acc[2 * n], a, b);
            cuda_mma(acc[2 * n + 1], a, b + 2);
        }
    }
    __syncthreads(); /* B's place becomes the state's, to be written in whole rows */
#pragma unroll
    for (int n = 0; n < N / 16; n++) {
        bf16 *to = bs + (top + lane / 4) * (N + PAD) + left + n * 8 + lane % 4 * 2;
        *reinterpret_cast<uint32_t *>(to) = cuda_pack(acc[n][0], acc[n][1]);
        *reinterpret_cast<uint32_t *>(to + 8 * (N + PAD)) = cuda_pack(acc[n][2], acc[n][3]);
    }
    __syncthreads();
    bf16 *out = states + ((size_t)blockIdx.x * s.heads + h) * WIDTH * N;
#pragma unroll
    for (uint32_t i = t; i < WIDTH * N / 8; i += STATE_THREADS)
        *reinterpret_cast<uint4 *>(out + i * 8) =
            *reinterpret_cast<const uint4 *>(bs + i / (N / 8) * (N + PAD) + i % (N / 8) * 8);
}

/* ---- y of a block's rows ---- */

/* Scores C B^T of a warp's 16 rows and all columns up to theirs, as the tensor cores take them. */
template <int N>
static __device__ __forceinline__ void block_scores(const bf16 *cs, const bf16 *bs, uint32_t warp,
                                                    uint32_t scores[TOKENS / 16][4])
{
#pragma unroll
    for (int j = 0; j < TOKENS / 16; j++) {
        if (j > (int)warp)
            continue;
        float left[4] = {}, right[4] = {};
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            uint32_t a[4], b[4];
            cuda_load_matrices(a, cuda_matrix_row(cs + warp * 16 * (N + PAD) + n, N + PAD, true));
            cuda_load_matrices(b, cuda_matrix_row(bs + j * 16 * (N + PAD) + n, N + PAD, false));
            cuda_mma(left, a, b);
            cuda_mma(right, a, b + 2);
        }
        scores[j][0] = cuda_pack(left[0], left[1]);
        scores[j][1] = cuda_pack(left[2], left[3]);
        scores[j][2] = cuda_pack(right[0], right[1]);
        scores[j][3] = cuda_pack(right[2], right[3]);
    }
}

/* acc += exp(decay) C S^T: what a warp's rows have of the state before the block. */
template <int N>
static __device__ __forceinline__ void add_before(const bf16 *cs, const bf16 *ss, uint32_t warp,
                                                  float upper_left, float lower_left,
                                                  float acc[WIDTH / 8][4])
{
#pragma unroll
    for (int n = 0; n < N; n += 16) {
        uint32_t a[4], k[4];
        cuda_load_matrices(a, cuda_matrix_row(cs + warp * 16 * (N + PAD) + n, N + PAD, true));
#pragma unroll
        for (int p = 0; p < WIDTH / 16; p++) {
            cuda_load_matrices(k, cuda_matrix_row(ss + p * 16 * (N + PAD) + n, N + PAD, false));
            cuda_mma(acc[2 * p], a, k);
            cuda_mma(acc[2 * p + 1], a, k + 2);
        }
    }
#pragma unroll
    for (int p = 0; p < WIDTH / 8; p++) {
        acc[p][0] *= upper_left;
        acc[p][1] *= upper_left;
        acc[p][2] *= lower_left;
        acc[p][3] *= lower_left;
    }
}

/* acc += the decayed scores times x: what they have of the block's own rows. */
static __device__ __forceinline__ void add_own(const uint32_t scores[TOKENS / 16][4],
                                               const bf16 *xs, const struct columns &own,
                                               float acc[WIDTH / 8][4])
{
    const uint32_t warp = threadIdx.x / CUDA_WARP;
#pragma unroll
    for (int j = 0; j < TOKENS / 16; j++) {
        if (j > (int)warp)
            continue;
        uint32_t k[4], a[4];
        decay_tile(scores[j], j, own, a);
#pragma unroll
        for (int p = 0; p < WIDTH / 16; p++) {
            cuda_load_transposed(
                k, cuda_matrix_row(xs + j * 16 * (WIDTH + PAD) + p * 16, WIDTH + PAD, true));
            cuda_mma(acc[2 * p], a, k);
            cuda_mma(acc[2 * p + 1], a, k + 2);
        }
    }
}

/* y = acc + D x of a warp's rows from `row` on, up to `end`; `column`: the head's first. */
static __device__ __forceinline__ void write_rows(const struct mamba_shape &s, bf16 *y,
                                                  const float acc[WIDTH / 8][4], const bf16 *xs,
                                                  float through, uint32_t row, uint32_t end,
                                                  uint32_t column)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint32_t own = lane / 4 + half * 8;
        const bf16 *x = xs + (warp * 16 + own) * (WIDTH + PAD) + lane % 4 * 2;
        bf16 *to = y + (size_t)(row + own) * s.inner + column + four_of_lane();
#pragma unroll
        for (int p = 0; p < WIDTH / 8; p += 2) {
            uint32_t out[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t in = *reinterpret_cast<const uint32_t *>(x + (p + i) * 8);
                out[i] = cuda_pack(fmaf(through, cuda_first(in), acc[p + i][2 * half]),
                                   fmaf(through, cuda_second(in), acc[p + i][2 * half + 1]));
            }
            const uint2 four = change_halves(uint2{out[0], out[1]});
            if (row + own < end)
                *reinterpret_cast<uint2 *>(to + p * 8) = four;
        }
    }
}

/* Of a head's x and state in shared memory; no less than of a block's B. */
static __host__ __device__ constexpr uint32_t stage_elements(uint32_t n)
{
    return TOKENS * (WIDTH + PAD) + WIDTH * (n + PAD);
}

/* y of a block's rows, OUTPUT_HEADS heads of one group: what came before the block, what it holds
 * itself, and D x. A warp has 16 rows. While a head is computed, the next one's x and state come;
 * at first B lies where those of the second will. Grid: blocks x parts of groups. */
template <int N>
static __global__ void __launch_bounds__(OUTPUT_THREADS, 2)
    block_outputs_mma(struct mamba_shape s, const struct block *blocks, const bf16 *conv,
                      const float *dt, const float *decay, const bf16 *states, const float *skip,
                      bf16 *y)
{
    constexpr uint32_t stage = stage_elements(N);
    CUDA_SHARED(bf16, stages);
    bf16 *cs = stages + 2 * stage, *bs = stages + stage;
    struct columns *columns = reinterpret_cast<struct columns *>(cs + TOKENS * (N + PAD));
    const struct block block = blocks[blockIdx.x];
    const struct output_part part = part_at(s, blockIdx.y);
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const uint32_t rows = (block.count + 15) / 16 * 16, top = warp * 16 + lane / 4;
    const bf16 *u = conv + (size_t)block.row * s.conv, *b = u + s.inner + (size_t)part.group * N;
    const size_t of_first = (size_t)blockIdx.x * s.heads + part.first;
    const bool busy = warp * 16 < rows;
    const auto fetch_x = [&](uint32_t i) {
        copy_rows(stages + i % 2 * stage, u + (part.first + i) * WIDTH, s.conv, WIDTH, block.count,
                  rows);
    };
    const auto fetch_state = [&](uint32_t i) {
        copy_rows(stages + i % 2 * stage + TOKENS * (WIDTH + PAD),
                  states + (of_first + i) * WIDTH * N, N, N, WIDTH, WIDTH);
    };
    copy_rows(cs, b + (size_t)s.groups * N, s.conv, N, block.count, rows);
    copy_rows(bs, b, s.conv, N, block.count, rows);
    cuda_copy_commit();
    fetch_x(0);
    load_columns(columns, dt + of_first * TOKENS, decay + of_first * TOKENS, part.heads);
    cuda_copy_commit();
    cuda_copy_wait<1>();
    __syncthreads();
    uint32_t scores[TOKENS / 16][4];
    if (busy)
        block_scores<N>(cs, bs, warp, scores);
    __syncthreads();
    cuda_depend_wait();
    cuda_depend_release();
    fetch_state(0);
    cuda_copy_commit();
    const uint32_t row = block.row + warp * 16, end = block.row + block.count;
    for (uint32_t i = 0; i < part.heads; i++) {
        if (i + 1 < part.heads) {
            fetch_x(i + 1);
            fetch_state(i + 1);
        }
        cuda_copy_commit();
        cuda_copy_wait<1>();
        __syncthreads();
        const bf16 *xs = stages + i % 2 * stage;
        const struct columns &own = columns[i];
        if (busy) {
            float acc[WIDTH / 8][4] = {};
            add_before<N>(cs, xs + TOKENS * (WIDTH + PAD), warp, cuda_exp2(own.decays[top]),
                          cuda_exp2(own.decays[top + 8]), acc);
            add_own(scores, xs, own, acc);
            write_rows(s, y, acc, xs, skip[part.first + i], row, end, (part.first + i) * WIDTH);
        }
        __syncthreads();
    }
}

/* ---- the host's side ---- */

bool cuda_mamba_tiles(const struct mamba_shape &s)
{
    return s.proj % 8 == 0 && s.conv % 8 == 0 && s.inner % 8 == 0 && s.width == WIDTH &&
           s.taps == TAPS && (s.n == 64 || s.n == 128);
}

template <int N> static void launch_states(struct ops_context *x, const struct work *w)
{
    const struct mamba_shape s = w->shape;
    const struct inputs<bf16> in = inputs_of<bf16>(x, w->weights);
    bf16 *conv = (bf16 *)(void *)x->conv;
    const size_t bytes = TOKENS * ((N + PAD) + (WIDTH + PAD)) * sizeof(bf16) +
                         (TOKENS + TOKENS / CUDA_WARP) * sizeof(float);
    const uint32_t threads = (s.conv - s.inner) / 8 * (TOKENS / CONV_ROWS);
    CUDA_LAUNCH_EARLY(x, convolve_shared, dim3(w->block_count, cuda_ceil(threads, CONV_THREADS)),
                      dim3(CONV_THREADS), 0, s, in, w->blocks, w->segments, conv);
    CUDA_ALLOW_SHARED(x, block_states_mma<N>, bytes);
    CUDA_LAUNCH_EARLY(x, block_states_mma<N>, dim3(w->block_count, s.heads), dim3(STATE_THREADS),
                      bytes, s, in, w->blocks, w->segments, x->dt, x->decay, conv,
                      (bf16 *)(void *)x->states);
}

uint32_t cuda_output_parts(const struct mamba_shape &s)
{
    return parts_of_group(s) * s.groups;
}

template <int N> static void launch_outputs(struct ops_context *x, const struct work *w)
{
    const struct mamba_shape s = w->shape;
    const size_t bytes = (2 * stage_elements(N) + TOKENS * (N + PAD)) * sizeof(bf16) +
                         OUTPUT_HEADS * sizeof(struct columns);
    CUDA_ALLOW_SHARED(x, block_outputs_mma<N>, bytes);
    CUDA_LAUNCH_EARLY(x, block_outputs_mma<N>, dim3(w->block_count, cuda_output_parts(s)),
                      dim3(OUTPUT_THREADS), bytes, s, w->blocks,
                      (const bf16 *)(const void *)x->conv, x->dt, x->decay,
                      (const bf16 *)(const void *)x->states, (const float *)w->weights->d.data,
                      (bf16 *)(void *)x->scanned);
}

void cuda_block_states(struct ops_context *x, const struct work *w)
{
    if (w->shape.n == 128)
        launch_states<128>(x, w);
    else
        launch_states<64>(x, w);
}

void cuda_block_outputs(struct ops_context *x, const struct work *w)
{
    if (w->gated)
        cuda_gated_outputs(x, w);
    else if (w->shape.n == 128)
        launch_outputs<128>(x, w);
    else
        launch_outputs<64>(x, w);
}
