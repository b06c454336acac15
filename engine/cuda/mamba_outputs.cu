/* mamba_outputs.cu - y of a block's rows on Hopper, with the gate: what came before the block, what
 * it holds itself, and D x, times SiLU(z) and the norm's weight, whose scale is mamba_out.cu's.
 * Products go by warpgroups (wgmma) that have 64 rows each; both read a head's x and state from
 * the same tiles. The form for other GPUs is in mamba_tiles.cu. */
#include "engine/cuda/mamba_outputs.cuh"
#include "engine/cuda/wgmma.cuh"

#define SLAB WGMMA_DEPTH              /* columns of a tile */
#define GROUP_TILES (WGMMA_ROWS / 16) /* of 16 columns, that a warpgroup's rows span */
#define GROUP (WGMMA_ROWS * SLAB)     /* elements of a tile: a warpgroup's rows, or a state's */

static_assert(WIDTH == WGMMA_NARROW && TOKENS == 2 * WGMMA_ROWS, "two warpgroups have a block");

/* Where results go. */
struct results {
    bf16 *y;               /* [rows, inner] */
    const bf16 *projected; /* z in its first columns */
    const float *in_bias;  /* or NULL */
    const float *weight;   /* of the norm behind the gate */
    float *squares;        /* [rows, parts] */
};

/* What lies in shared memory, in tiles of SLAB columns; N is the state's depth. */
template <int N> struct room {
    static constexpr uint32_t state = TOKENS * SLAB;     /* behind a stage's x */
    static constexpr uint32_t stage = state + WIDTH * N; /* elements of a head's x and state */
    static constexpr size_t bytes = (TOKENS * N + 2 * stage) * sizeof(bf16) +
                                    OUTPUT_HEADS * sizeof(struct columns) + WGMMA_ATOM;
    bf16 *c, *stages; /* C's tiles; two heads' */
    struct columns *columns;

    __device__ __forceinline__ room(uint8_t *shared)
    {
        c = reinterpret_cast<bf16 *>(shared +
                                     (WGMMA_ATOM - (uintptr_t)shared % WGMMA_ATOM) % WGMMA_ATOM);
        stages = c + TOKENS * N;
        columns = reinterpret_cast<struct columns *>(stages + 2 * stage);
    }
    /* B's tiles, until the second head's x and state come. */
    __device__ __forceinline__ bf16 *b(void) const
    {
        return stages + stage;
    }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)

/* ROWS rows of `columns` elements from rows `stride` apart, as tiles; from `count` on zeros. */
template <int ROWS>
static __device__ __forceinline__ void fetch_tiles(bf16 *to, const bf16 *from, size_t stride,
                                                   uint32_t columns, uint32_t count)
{
    constexpr uint32_t units = SLAB / 8;
    for (uint32_t slab = 0; slab < columns; slab += SLAB, to += ROWS * SLAB)
#pragma unroll 1 /* registers are short */
        for (uint32_t i = threadIdx.x; i < ROWS * units; i += OUTPUT_THREADS) {
            const uint32_t row = i / units, unit = i % units * 8;
            cuda_copy_async(to + cuda_swizzled<SLAB>(row, unit),
                            from + (row < count ? row : 0) * stride + slab + unit, row < count);
        }
}

/* Scores C B^T of a warpgroup's rows and all columns up to the last of them, each warp's as tensor
 * cores take them. */
template <int N>
static __device__ __forceinline__ void group_scores(const bf16 *c, const bf16 *b, uint32_t group,
                                                    uint32_t scores[OUTPUT_TILES][4])
{
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        float d[WGMMA_NARROW / 2];
        if (half > group)
            break;
        wgmma_begin();
#pragma unroll
        for (int n = 0; n < N; n += SLAB)
            wgmma_narrow(d, c + n * TOKENS + group * GROUP, b + n * TOKENS + half * GROUP, !n);
        wgmma_end();
        wgmma_take(d);
#pragma unroll
        for (int i = 0; i < GROUP_TILES * 4; i++)
            scores[half * GROUP_TILES + i / 4][i % 4] = cuda_pack(d[2 * i], d[2 * i + 1]);
    }
}

/* acc += the decayed scores times x, what a warpgroup's rows have of half of the block's. */
static __device__ __forceinline__ void add_half(const uint32_t scores[OUTPUT_TILES][4],
                                                uint32_t half, const bf16 *x,
                                                const struct columns &own,
                                                float acc[WGMMA_NARROW / 2])
{
    const uint32_t warp = threadIdx.x / CUDA_WARP;
    uint32_t a[GROUP_TILES][4] = {};
#pragma unroll
    for (uint32_t j = 0; j < GROUP_TILES; j++)
        if (half * GROUP_TILES + j <= warp)
            decay_tile(scores[half * GROUP_TILES + j], half * GROUP_TILES + j, own, a[j]);
    wgmma_begin();
#pragma unroll
    for (uint32_t j = 0; j < GROUP_TILES; j++)
        wgmma_narrow_rows(acc, a[j], x + (half * GROUP_TILES + j) * 16 * SLAB);
    wgmma_end();
    wgmma_take(acc);
}

/* z of a warp's rows, one head, as memory is read. */
static __device__ __forceinline__ void load_gate(const struct mamba_shape &s,
                                                 const struct results &to, uint32_t row,
                                                 uint32_t end, uint32_t column,
                                                 uint2 gate[2][WIDTH / 16])
{
    const uint32_t own = row + threadIdx.x % CUDA_WARP / 4;
    const bf16 *from = to.projected + (size_t)own * s.proj + column + four_of_lane();
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int p = 0; p < WIDTH / 16; p++) {
            gate[half][p] = uint2{0, 0};
            if (own + half * 8 < end)
                gate[half][p] =
                    *reinterpret_cast<const uint2 *>(from + (size_t)half * 8 * s.proj + p * 16);
        }
}

/* y SiLU(z) of two neighbours, times the norm's weights; its square goes to `square`. */
static __device__ __forceinline__ uint32_t gated(float2 y, uint32_t z, float2 bias, float2 weight,
                                                 float *square)
{
    y.x *= cuda_silu_narrow(cuda_first(z) + bias.x);
    y.y *= cuda_silu_narrow(cuda_second(z) + bias.y);
    *square = fmaf(y.x, y.x, fmaf(y.y, y.y, *square));
    return cuda_pack(y.x * weight.x, y.y * weight.y);
}

/* acc + D x of a warp's rows from `row` on, up to `end`, gated; `column`: the head's first. */
static __device__ __forceinline__ void
write_gated(const struct mamba_shape &s, const struct results &to,
            const float acc[WGMMA_NARROW / 2], const uint2 gate[2][WIDTH / 16], const bf16 *xs,
            float through, uint32_t row, uint32_t end, uint32_t column, float squares[2])
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, top = threadIdx.x / CUDA_WARP * 16 + lane / 4;
    const uint32_t pair = lane % 4 * 2;
    bf16 *y = to.y + (size_t)(row + lane / 4) * s.inner + column + four_of_lane();
#pragma unroll
    for (int p = 0; p < WIDTH / 8; p += 2) {
        float2 weight[2], bias[2] = {};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t at = column + (p + i) * 8 + pair;
            weight[i] = *reinterpret_cast<const float2 *>(to.weight + at);
            if (to.in_bias)
                bias[i] = *reinterpret_cast<const float2 *>(to.in_bias + at);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint2 z = change_halves(gate[half][p / 2]);
            uint32_t out[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t in = *reinterpret_cast<const uint32_t *>(
                    xs + cuda_swizzled<SLAB>(top + half * 8, (p + i) * 8) + pair);
                const float *own = acc + (p + i) * 4 + half * 2;
                const float2 v = {fmaf(through, cuda_first(in), own[0]),
                                  fmaf(through, cuda_second(in), own[1])};
                out[i] = gated(v, i ? z.y : z.x, bias[i], weight[i], &squares[half]);
            }
            const uint2 four = change_halves(uint2{out[0], out[1]});
            if (row + lane / 4 + half * 8 < end)
                *reinterpret_cast<uint2 *>(y + (size_t)half * 8 * s.inner + p * 8) = four;
        }
    }
}

/* The sums of squares of a warp's rows over the block's heads, over the four lanes of a row. */
static __device__ __forceinline__ void write_squares(const struct results &to, uint32_t row,
                                                     uint32_t end, const float squares[2])
{
    const uint32_t lane = threadIdx.x % CUDA_WARP;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint32_t own = row + lane / 4 + half * 8;
        float sum = squares[half] + __shfl_xor_sync(CUDA_ALL_LANES, squares[half], 1);
        sum += __shfl_xor_sync(CUDA_ALL_LANES, sum, 2);
        if (lane % 4 == 0 && own < end)
            to.squares[(size_t)own * gridDim.y + blockIdx.y] = sum;
    }
}

/* OUTPUT_HEADS heads of one group. While a head is computed, the next one's x and state come. Grid:
 * blocks x parts of groups. */
template <int N>
static __global__ void __launch_bounds__(OUTPUT_THREADS, 2)
    gated_outputs(struct mamba_shape s, const struct block *blocks, const bf16 *conv,
                  const float *dt, const float *decay, const bf16 *states, const float *skip,
                  struct results to)
{
    CUDA_SHARED(uint8_t, shared);
    const room<N> room(shared);
    const struct block block = blocks[blockIdx.x];
    const struct output_part part = part_at(s, blockIdx.y);
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const uint32_t group = threadIdx.x / WGMMA_GROUP, top = warp * 16 + lane / 4;
    const bf16 *u = conv + (size_t)block.row * s.conv + part.first * WIDTH;
    const bf16 *b = conv + (size_t)block.row * s.conv + s.inner + (size_t)part.group * N;
    const size_t of_first = (size_t)blockIdx.x * s.heads + part.first;
    const auto fetch_x = [&](uint32_t i) {
        fetch_tiles<TOKENS>(room.stages + i % 2 * room.stage, u + i * WIDTH, s.conv, WIDTH,
                            block.count);
    };
    const auto fetch_state = [&](uint32_t i) {
        fetch_tiles<WIDTH>(room.stages + i % 2 * room.stage + room.state,
                           states + (of_first + i) * WIDTH * N, N, N, WIDTH);
    };
    fetch_tiles<TOKENS>(room.c, b + (size_t)s.groups * N, s.conv, N, block.count);
    fetch_tiles<TOKENS>(room.b(), b, s.conv, N, block.count);
    cuda_copy_commit();
    if (threadIdx.x < block.count) /* z, of all heads */
        cuda_bring_near(to.projected + (size_t)(block.row + threadIdx.x) * s.proj +
                            part.first * WIDTH,
                        part.heads * WIDTH * sizeof(bf16));
    fetch_x(0);
    load_columns(room.columns, dt + of_first * TOKENS, decay + of_first * TOKENS, part.heads);
    cuda_copy_commit();
    cuda_copy_wait<1>();
    wgmma_hand_over();
    __syncthreads();
    uint32_t scores[OUTPUT_TILES][4];
    group_scores<N>(room.c, room.b(), group, scores);
    __syncthreads();
    cuda_depend_wait();
    cuda_depend_release();
    fetch_state(0);
    cuda_copy_commit();
    const uint32_t row = block.row + warp * 16, end = block.row + block.count;
    float squares[2] = {};
    for (uint32_t i = 0; i < part.heads; i++) {
        const uint32_t column = (part.first + i) * WIDTH;
        uint2 gate[2][WIDTH / 16];
        load_gate(s, to, row, end, column, gate);
        if (i + 1 < part.heads) {
            fetch_x(i + 1);
            fetch_state(i + 1);
        }
        cuda_copy_commit();
        cuda_copy_wait<1>();
        wgmma_hand_over();
        __syncthreads();
        const bf16 *xs = room.stages + i % 2 * room.stage, *before = xs + room.state;
        const struct columns &own = room.columns[i];
        float acc[WGMMA_NARROW / 2];
        wgmma_begin();
#pragma unroll
        for (int n = 0; n < N; n += SLAB)
            wgmma_narrow(acc, room.c + n * TOKENS + group * GROUP, before + n * WIDTH, !n);
        wgmma_end();
        const float upper = cuda_exp2(own.decays[top]), lower = cuda_exp2(own.decays[top + 8]);
        wgmma_take(acc);
#pragma unroll
        for (int k = 0; k < WGMMA_NARROW / 2; k++)
            acc[k] *= k % 4 < 2 ? upper : lower;
        add_half(scores, 0, xs, own, acc);
        if (group)
            add_half(scores, 1, xs, own, acc);
        write_gated(s, to, acc, gate, xs, skip[part.first + i], row, end, column, squares);
        __syncthreads();
    }
    write_squares(to, row, end, squares);
}

#else

/* Code for 9.0 that may not use what 9.0 alone has: see mamba_out.cu. */
template <int N>
static __global__ void gated_outputs(struct mamba_shape, const struct block *, const bf16 *,
                                     const float *, const float *, const bf16 *, const float *,
                                     struct results)
{
    __trap();
}

#endif

template <int N>
static void launch(struct ops_context *x, const struct work *w, const struct results &to)
{
    const struct mamba_shape s = w->shape;
    CUDA_ALLOW_SHARED(x, gated_outputs<N>, room<N>::bytes);
    CUDA_LAUNCH_EARLY(x, gated_outputs<N>, dim3(w->block_count, cuda_output_parts(s)),
                      dim3(OUTPUT_THREADS), room<N>::bytes, s, w->blocks,
                      (const bf16 *)(const void *)x->conv, x->dt, x->decay,
                      (const bf16 *)(const void *)x->states, (const float *)w->weights->d.data, to);
}

void cuda_gated_outputs(struct ops_context *x, const struct work *w)
{
    struct results to = {};
    to.y = (bf16 *)x->mixed;
    to.projected = (const bf16 *)(const void *)x->projected;
    to.in_bias = (const float *)w->weights->in_proj_bias.data;
    to.weight = (const float *)w->weights->gate_norm.data;
    to.squares = x->scanned;
    if (w->shape.n == 128)
        launch<128>(x, w, to);
    else
        launch<64>(x, w, to);
}
