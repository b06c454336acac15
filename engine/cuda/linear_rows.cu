/* linear_rows.cu - products of short segments on tensor cores.
 * Rows of short segments against a weight in bf16. Weight rows are columns of the tensor cores'
 * tiles, the rows themselves their rows. A block has 8 N weight rows; its warps share out the
 * depth, 32 at a time, and add up in the end, in an order that depends on nothing but the depth. A
 * lane takes 16 bytes of a row where the tensor cores would have it take four times 4: the columns
 * of both factors are permuted alike. The norm's scale goes to the sums: rows are rounded to bf16
 * after its weight and before its scale. */
#include "engine/cuda/linear_rows.cuh"
#include "engine/cuda/mamba_step.cuh"

#define FEW_WARPS FEW_SHARES
#define SHARED_OWN ((size_t)1 << 10)                   /* of these kernels' own arrays, at most */
#define SHARED_PLAIN (((size_t)48 << 10) - SHARED_OWN) /* beside them, if nothing was asked for */
#define TILE_ROWS 16                                   /* of a tile of x */
#define TILE_OUT 8                                     /* weight rows of a tile */
#define TILE_DEPTH 32                                  /* what a lane's 16 bytes reach to */
#define NORM_AHEAD 2  /* 16 bytes of a norm's weight that a thread has fetched before the rows */
#define SHARED_PAD 32 /* elements behind a row in shared memory: off the banks */

static __device__ __forceinline__ float4 load4(const float *from, uint32_t i)
{
    const float4 ones = {1, 1, 1, 1};
    return from ? *reinterpret_cast<const float4 *>(from + i) : ones;
}

/* Prepares four elements of a row; returns the sum of their squares. */
static __device__ __forceinline__ float prepare4(const float4 v, const float4 w, bf16 *to)
{
    uint2 packed;
    packed.x = cuda_pack(v.x * w.x, v.y * w.y);
    packed.y = cuda_pack(v.z * w.z, v.w * w.w);
    *reinterpret_cast<uint2 *>(to) = packed;
    return fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, v.x * v.x)));
}

static __device__ __forceinline__ float scale_of(const float *parts, const struct few &f)
{
    float sum = 0;
    for (uint32_t i = 0; i < FEW_WARPS; i++)
        sum += parts[i];
    return f.normed ? 1 / sqrtf(sum / (float)f.k + f.epsilon) : 1;
}

/* ready[row] and scales[row]. Grid: rows. */
static __global__ void __launch_bounds__(FEW_WARPS *CUDA_WARP) prepare_rows(struct few f)
{
    __shared__ float parts[FEW_WARPS];
    cuda_depend_release();
    cuda_depend_wait();
    const float *row = f.x + (size_t)blockIdx.x * f.k;
    float sum = 0;
    for (uint32_t i = 4 * threadIdx.x; i < f.k; i += 4 * FEW_WARPS * CUDA_WARP)
        sum += prepare4(load4(row, i), load4(f.norm, i), f.ready + (size_t)blockIdx.x * f.k + i);
    sum = cuda_warp_sum(sum);
    if (threadIdx.x % CUDA_WARP == 0)
        parts[threadIdx.x / CUDA_WARP] = sum;
    __syncthreads();
    if (threadIdx.x == 0)
        f.scales[blockIdx.x] = scale_of(parts, f);
}

/* `count` rows from `first` on, R at most, into shared memory; parts[row] [FEW_WARPS]: their
 * squares. */
template <int R>
static __device__ __forceinline__ void prepare_shared(const struct few &f, uint32_t first,
                                                      uint32_t count, const float4 norm[NORM_AHEAD],
                                                      bf16 *rows, float (*parts)[FEW_WARPS])
{
    constexpr uint32_t stride = 4 * FEW_WARPS * CUDA_WARP;
    float sums[R] = {};
    for (uint32_t from = 4 * threadIdx.x; from < f.k; from += NORM_AHEAD * stride) {
#pragma unroll
        for (uint32_t a = 0; a < NORM_AHEAD; a++) {
            const uint32_t i = from + a * stride;
            if (i >= f.k)
                break;
            const float4 w = i < NORM_AHEAD * stride ? norm[a] : load4(f.norm, i);
            float4 v[R]; /* all on their way at once */
#pragma unroll
            for (uint32_t r = 0; r < R; r++)
                if (r < count)
                    v[r] = load4(f.x + (size_t)(first + r) * f.k, i);
#pragma unroll
            for (uint32_t r = 0; r < R; r++)
                if (r < count)
                    sums[r] += prepare4(v[r], w, rows + r * (f.k + SHARED_PAD) + i);
        }
    }
#pragma unroll
    for (uint32_t r = 0; r < R; r++) {
        if (r >= count)
            break;
        const float sum = cuda_warp_sum(sums[r]);
        if (threadIdx.x % CUDA_WARP == 0)
            parts[r][threadIdx.x / CUDA_WARP] = sum;
    }
}

#define RESULTS(n) ((n)*4 * CUDA_WARP) /* of a tile of rows and n of weight rows */

/* A thread's `j`-th result of a tile: where it lies in shared memory, its row and weight row. */
template <int N> struct result {
    uint32_t at, row, o;

    __device__ __forceinline__ result(uint32_t j, uint32_t top, uint32_t first)
    {
        at = threadIdx.x + j * FEW_WARPS * CUDA_WARP;
        const uint32_t e = at / CUDA_WARP % 4, n = at / CUDA_WARP / 4, lane = at % CUDA_WARP;
        row = top + e / 2 * 8 + lane / 4;
        o = first + n * TILE_OUT + lane % 4 * 2 + e % 2;
    }
    __device__ __forceinline__ bool exists(const struct few &f) const
    {
        return at < RESULTS(N) && row < f.row_count && o < f.n;
    }
};

/* What a lane takes of a tile of the block's rows at a step of depth: of the upper eight and of the
 * lower ones, of which there are none unless R is more. `count`: how many rows there are. */
template <int R>
static __device__ __forceinline__ void load_shared(const struct few &f, const bf16 *shared,
                                                   uint32_t count, uint32_t column, uint4 out[2])
{
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        const uint32_t row = 8 * i + threadIdx.x % CUDA_WARP / 4;
        out[i] = 8 * i < R ? *reinterpret_cast<const uint4 *>(
                                 shared + (row < count ? row : 0) * (f.k + SHARED_PAD) + column)
                           : uint4{0, 0, 0, 0};
    }
}

/* One row, which every block prepares by itself: N tiles of weight rows, AHEAD steps of depth on
 * their way. What nobody writes is fetched before the kernel in front
 * has ended, what is added to, before the products. Grid: weight rows. */
template <int N, int AHEAD>
static __global__ void __launch_bounds__(FEW_WARPS *CUDA_WARP, 2) product_of_few(struct few f)
{
    CUDA_SHARED(float, sums); /* [FEW_WARPS][N * 4][CUDA_WARP]; behind them the rows */
    __shared__ float parts[1][FEW_WARPS];
    constexpr uint32_t threads = FEW_WARPS * CUDA_WARP, results = N * 4 * CUDA_WARP,
                       own = (results + threads - 1) / threads;
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const uint32_t first = blockIdx.x * N * TILE_OUT, depth = f.k / TILE_DEPTH;
    bf16 *rows = reinterpret_cast<bf16 *>(sums + FEW_WARPS * results);
    const bf16 *weight[N];
#pragma unroll
    for (int n = 0; n < N; n++) {
        const uint32_t o = first + n * TILE_OUT + lane / 4;
        weight[n] = f.weight + (size_t)(o < f.n ? o : f.n - 1) * f.k + 8 * (lane % 4);
    }
    uint4 ahead[AHEAD][N];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
#pragma unroll
        for (int n = 0; n < N; n++)
            if (warp + i * FEW_WARPS < depth)
                ahead[i][n] = cuda_stream16(weight[n] + (warp + i * FEW_WARPS) * TILE_DEPTH);
    float4 norm[NORM_AHEAD];
#pragma unroll
    for (uint32_t a = 0; a < NORM_AHEAD; a++)
        if (4 * (threadIdx.x + a * threads) < f.k)
            norm[a] = load4(f.norm, 4 * (threadIdx.x + a * threads));
    cuda_depend_release();
    cuda_depend_wait();
    prepare_shared<1>(f, 0, 1, norm, rows, parts);
    __syncthreads();
    for (uint32_t top = 0; top < f.row_count; top += TILE_ROWS) {
        float base[own]; /* what the thread's results are added to */
#pragma unroll
        for (uint32_t j = 0; j < own; j++) {
            const result<N> r(j, top, first);
            base[j] = 0;
            if (r.exists(f))
                base[j] =
                    (f.bias ? f.bias[r.o] : 0) + (f.add ? f.out[(size_t)r.row * f.n + r.o] : 0);
        }
        float acc[N][4] = {};
        for (uint32_t from = warp; from < depth; from += AHEAD * FEW_WARPS) {
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const uint32_t at = from + i * FEW_WARPS;
                if (at >= depth)
                    break;
                uint4 x[2];
                load_shared<1>(f, rows, 1, at * TILE_DEPTH + 8 * (lane % 4), x);
                const uint32_t left[4] = {x[0].x, x[1].x, x[0].y, x[1].y},
                               right[4] = {x[0].z, x[1].z, x[0].w, x[1].w};
                /* Behind the last step the first one of the next tile. */
                const uint32_t next =
                    at + AHEAD * FEW_WARPS < depth ? at + AHEAD * FEW_WARPS : warp + i * FEW_WARPS;
#pragma unroll
                for (int n = 0; n < N; n++) {
                    const uint32_t low[2] = {ahead[i][n].x, ahead[i][n].y},
                                   high[2] = {ahead[i][n].z, ahead[i][n].w};
                    cuda_mma(acc[n], left, low);
                    cuda_mma(acc[n], right, high);
                    if (next != at)
                        ahead[i][n] = cuda_stream16(weight[n] + next * TILE_DEPTH);
                }
            }
        }
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                sums[(warp * N * 4 + n * 4 + e) * CUDA_WARP + lane] = acc[n][e];
        __syncthreads();
#pragma unroll
        for (uint32_t j = 0; j < own; j++) {
            const result<N> r(j, top, first);
            if (!r.exists(f))
                continue;
            float sum = 0;
            for (uint32_t w = 0; w < FEW_WARPS; w++)
                sum += sums[w * results + r.at];
            /* One rounding, in every form of this kernel: rows do not differ by who is beside. */
            f.out[(size_t)r.row * f.n + r.o] = fmaf(sum, scale_of(parts[r.row], f), base[j]);
        }
    }
}

/* ---- more rows, prepared before ---- */

/* While this kernel computes, memory is free for what comes behind it. */
static __device__ __forceinline__ void fetch_soon(const struct cuda_soon &s)
{
    for (uint32_t head = blockIdx.y * gridDim.x + blockIdx.x; head < s.count;
         head += gridDim.x * gridDim.y) {
        const float *from =
            s.segments[head / s.heads].ssm + s.ssm + (size_t)(head % s.heads) * s.head_words;
        for (uint32_t at = 32 * threadIdx.x; at < s.head_words; at += 32 * blockDim.x)
            cuda_prefetch(from + at);
    }
}

/* A block's part of the product: M tiles of rows, N of weight rows. */
template <int M, int N> struct share {
    static constexpr int rows = M * TILE_ROWS, columns = N * TILE_OUT;
    static constexpr uint32_t results = M * N * 4 * CUDA_WARP; /* that each warp has a share of */
    /* Pairs of neighbours, and of these a thread's. */
    static constexpr int pairs = (M * N * 2 + FEW_WARPS - 1) / FEW_WARPS;
    /* Bytes of shared memory: of the weights, then of the warps' shares. */
    static __host__ __device__ size_t front(uint32_t k)
    {
        const size_t steps = (k / TILE_DEPTH + FEW_WARPS - 1) / FEW_WARPS;
        const size_t weights = steps * N * FEW_WARPS * CUDA_WARP * sizeof(uint4);
        const size_t sums = sizeof(float) * FEW_WARPS * results;
        return weights > sums ? weights : sums;
    }
    /* And of what the convolution needs: tails, then its weights and its bias. */
    static constexpr size_t tails = sizeof(float) * (TAPS - 1) * rows * columns;
    static constexpr size_t conv = tails + (sizeof(taps<bf16>) + sizeof(float)) * columns;
};

/* Where a thread's `j`-th pair lies. */
template <int M, int N> struct neighbours {
    uint32_t at, row, o; /* in the warps' shares, in out; of the first of the two */
    bool there;

    __device__ __forceinline__ neighbours(const struct few &f, int j)
    {
        const uint32_t lane = threadIdx.x % CUDA_WARP;
        const uint32_t unit = threadIdx.x / CUDA_WARP + j * FEW_WARPS;
        at = unit * 2 * CUDA_WARP + lane;
        row = blockIdx.y * M * TILE_ROWS + unit / 2 / N * TILE_ROWS + unit % 2 * 8 + lane / 4;
        o = (blockIdx.x * N + unit / 2 % N) * TILE_OUT + lane % 4 * 2;
        there = unit < 2 * M * N && row < f.row_count && o < f.n;
    }
};

/* What a thread's results are added to. */
template <int M, int N>
static __device__ __forceinline__ void load_base(const struct few &f,
                                                 float2 base[share<M, N>::pairs])
{
#pragma unroll
    for (int j = 0; j < share<M, N>::pairs; j++) {
        const neighbours<M, N> p(f, j);
        const bool second = p.o + 1 < f.n;
        base[j] = float2{0, 0};
        if (p.there && f.bias)
            base[j] = float2{f.bias[p.o], second ? f.bias[p.o + 1] : 0};
        if (p.there && f.add) {
            const float *to = f.out + (size_t)p.row * f.n + p.o;
            base[j].x += to[0];
            base[j].y += second ? to[1] : 0;
        }
    }
}

/* Two neighbours of a row become input of the next product; a lane's other two are its neighbour's.
 * All lanes of a warp are here; `there`: the lane has some. */
static __device__ __forceinline__ void leave_prepared(const struct few &f, uint32_t row, uint32_t o,
                                                      bool there, const float own[2],
                                                      const float2 norm)
{
    const float first = fmaf(own[1], own[1], own[0] * own[0]);
    const float before = __shfl_xor_sync(CUDA_ALL_LANES, first, 1);
    if (!there)
        return;
    *reinterpret_cast<uint32_t *>(f.next.ready + (size_t)row * f.n + o) =
        cuda_pack(own[0] * norm.x, own[1] * norm.y);
    if (o % 4)
        f.next.squares[((size_t)row * f.n + o) / 4] =
            fmaf(own[1], own[1], fmaf(own[0], own[0], before));
}

/* The weights of the next norm for a thread's results. */
template <int N>
static __device__ __forceinline__ void load_next(const struct few &f,
                                                 float2 norm[share<1, N>::pairs])
{
#pragma unroll
    for (int j = 0; j < share<1, N>::pairs; j++) {
        const neighbours<1, N> p(f, j);
        norm[j] = float2{0, 0};
        if (f.next.ready && p.there)
            norm[j] = *reinterpret_cast<const float2 *>(f.next.norm + p.o);
    }
}

/* Whether columns of the block are convolved. */
template <int N> static __device__ __forceinline__ bool convolves(const struct few &f)
{
    const struct cuda_convolution &c = f.conv;
    const uint32_t first = blockIdx.x * N * TILE_OUT;
    return c.count && first + N * TILE_OUT > c.first && first < c.first + c.count;
}

/* The weights and the bias of those columns come to shared memory, four at a time. */
template <int M, int N>
static __device__ __forceinline__ void fetch_taps(const struct few &f, float *tails)
{
    const struct cuda_convolution &c = f.conv;
    constexpr uint32_t columns = N * TILE_OUT;
    taps<bf16> *weights = reinterpret_cast<taps<bf16> *>(tails + share<M, N>::tails / 4);
    float *bias = reinterpret_cast<float *>(weights + columns);
    const uint32_t at = 4 * threadIdx.x, o = blockIdx.x * columns + at;
    if (!convolves<N>(f) || at >= columns || o < c.first || o >= c.first + c.count)
        return;
    const taps<bf16> *from = (const taps<bf16> *)c.weights + (o - c.first);
    cuda_copy_async(weights + at, from);
    cuda_copy_async(weights + at + 2, from + 2);
    if (c.bias)
        cuda_copy_async(bias + at, c.bias + (o - c.first));
}

/* And their tails. */
template <int M, int N>
static __device__ __forceinline__ void fetch_tails(const struct few &f, float *tails)
{
    const struct cuda_convolution &c = f.conv;
    constexpr uint32_t columns = N * TILE_OUT, quads = columns / 4;
    const uint32_t top = blockIdx.y * M * TILE_ROWS, first = blockIdx.x * columns;
    if (!convolves<N>(f))
        return;
    for (uint32_t i = threadIdx.x; i < M * TILE_ROWS * quads; i += FEW_WARPS * CUDA_WARP) {
        const uint32_t row = top + i / quads, o = first + i % quads * 4;
        if (row >= f.row_count || o < c.first || o >= c.first + c.count)
            continue;
        const float *from = c.segments[row].conv + c.offset + (o - c.first);
#pragma unroll
        for (uint32_t k = 0; k < TAPS - 1; k++)
            cuda_copy_async(tails + k * M * TILE_ROWS * columns + i * 4,
                            from + (size_t)k * c.count);
    }
}

/* Two neighbours of a row go through the convolution; their tails move on. */
template <int M, int N>
static __device__ __forceinline__ void convolve_pair(const struct few &f, const neighbours<M, N> &p,
                                                     const float *tails, float sums[2])
{
    const struct cuda_convolution &c = f.conv;
    constexpr uint32_t columns = N * TILE_OUT, rows = M * TILE_ROWS;
    const uint32_t j = p.o - blockIdx.x * columns, at = (p.row - blockIdx.y * rows) * columns + j;
    float *to = c.segments[p.row].conv + c.offset + (p.o - c.first);
    const taps<bf16> *weights =
        reinterpret_cast<const taps<bf16> *>(tails + share<M, N>::tails / 4);
    const float *bias = reinterpret_cast<const float *>(weights + columns);
    struct column<bf16> column[2];
#pragma unroll
    for (uint32_t e = 0; e < 2; e++) {
        column[e].weights = weights[j + e];
        column[e].bias = c.bias ? bias[j + e] : 0;
#pragma unroll
        for (uint32_t k = 0; k < TAPS - 1; k++)
            column[e].tail[k] = tails[k * rows * columns + at + e];
    }
#pragma unroll
    for (uint32_t e = 0; e < 2; e++)
        sums[e] = convolve(&column[e], sums[e]);
#pragma unroll
    for (uint32_t k = 0; k < TAPS - 1; k++)
        *reinterpret_cast<float2 *>(to + (size_t)k * c.count) =
            float2{column[0].tail[k], column[1].tail[k]};
}

/* How many rows the block has of those from its first one on. */
template <int M> static __device__ __forceinline__ uint32_t block_rows(const struct few &f)
{
    return min(f.row_count - blockIdx.y * M * TILE_ROWS, (uint32_t)(M * TILE_ROWS));
}

/* A lane's part of the block's rows at a step of depth: of an upper row and a lower one of each
 * tile. OWN: they lie in shared memory, at most so many. */
template <int M, int OWN>
static __device__ __forceinline__ void load_rows(const struct few &f, const bf16 *shared,
                                                 uint32_t at, uint4 out[M][2])
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, column = at * TILE_DEPTH + 8 * (lane % 4);
    if constexpr (OWN) {
        load_shared<OWN>(f, shared, block_rows<M>(f), column, out[0]);
    } else {
        const uint32_t top = blockIdx.y * M * TILE_ROWS;
#pragma unroll
        for (uint32_t i = 0; i < 2 * M; i++) {
            const uint32_t row = top + i * 8 + lane / 4;
            out[i / 2][i % 2] = *reinterpret_cast<const uint4 *>(
                f.ready + (size_t)(row < f.row_count ? row : top) * f.k + column);
        }
    }
}

/* The scales of the block's rows, of whose neighbours the squares were summed up by fours, added up
 * in the order of prepare_rows: there each thread has every 256th of them. A warp a row. */
template <int M>
static __device__ __forceinline__ void scale_rows(const struct few &f, float *scales)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, count = block_rows<M>(f), fours = f.k / 4;
    for (uint32_t row = threadIdx.x / CUDA_WARP; row < count; row += FEW_WARPS) {
        const float *squares = f.squares + (size_t)(blockIdx.y * M * TILE_ROWS + row) * fours;
        float sums[FEW_WARPS] = {};
        for (uint32_t from = 0; from < fours; from += FEW_WARPS * CUDA_WARP)
#pragma unroll
            for (uint32_t w = 0; w < FEW_WARPS; w++) {
                const uint32_t i = from + w * CUDA_WARP + lane;
                sums[w] += i < fours ? squares[i] : 0;
            }
#pragma unroll
        for (uint32_t w = 0; w < FEW_WARPS; w++)
            sums[w] = cuda_warp_sum(sums[w]);
        if (lane == 0)
            scales[row] = scale_of(sums, f);
    }
}

/* A block has all depth of M tiles of rows and N of weight rows: the weights come to shared memory
 * before the kernel in front has ended, each where the lane that needs it finds it, then the rows
 * to registers, AHEAD steps on their way. OWN: the block prepares its rows by itself, at most so
 * many, and M is 1. Grid: weight rows x rows. */
template <int M, int N, int AHEAD, int OWN>
static __global__ void __launch_bounds__(FEW_WARPS *CUDA_WARP, M == 4 ? 1 : 2)
    product_of_many(struct few f)
{
    using shape = share<M, N>;
    CUDA_SHARED(unsigned char, memory); /* the weights, then sums; behind them tails, rows */
    __shared__ float squares[OWN ? OWN : 1][FEW_WARPS], own_scales[M * TILE_ROWS];
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const uint32_t depth = f.k / TILE_DEPTH;
    uint4 *weights = reinterpret_cast<uint4 *>(memory) + threadIdx.x;
    float *sums = reinterpret_cast<float *>(memory);
    float *tails = reinterpret_cast<float *>(memory + shape::front(f.k));
    bf16 *rows = reinterpret_cast<bf16 *>(reinterpret_cast<unsigned char *>(tails) +
                                          (f.conv.count ? shape::conv : 0));
    for (uint32_t at = warp, i = 0; at < depth; at += FEW_WARPS)
#pragma unroll
        for (int n = 0; n < N; n++, i++) {
            const uint32_t o = (blockIdx.x * N + n) * TILE_OUT + lane / 4;
            cuda_copy_async(weights + i * FEW_WARPS * CUDA_WARP,
                            f.weight + (size_t)(o < f.n ? o : f.n - 1) * f.k + at * TILE_DEPTH +
                                8 * (lane % 4));
        }
    fetch_taps<M, N>(f, tails);
    if (f.conv.early)
        fetch_tails<M, N>(f, tails);
    cuda_copy_commit();
    float4 norm[NORM_AHEAD];
    if (OWN)
#pragma unroll
        for (uint32_t a = 0; a < NORM_AHEAD; a++)
            if (4 * (threadIdx.x + a * FEW_WARPS * CUDA_WARP) < f.k)
                norm[a] = load4(f.norm, 4 * (threadIdx.x + a * FEW_WARPS * CUDA_WARP));
    constexpr bool leaves = M == 1 && !OWN;
    float2 next_norm[shape::pairs];
    if constexpr (leaves)
        load_next<N>(f, next_norm);
    cuda_depend_release();
    fetch_soon(f.soon);
    cuda_depend_wait();
    if (!f.conv.early)
        fetch_tails<M, N>(f, tails);
    cuda_copy_commit();
    if constexpr (OWN != 0) {
        prepare_shared<OWN>(f, blockIdx.y * TILE_ROWS, block_rows<M>(f), norm, rows, squares);
        __syncthreads();
    }
    uint4 x[AHEAD][M][2];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (warp + i * FEW_WARPS < depth)
            load_rows<M, OWN>(f, rows, warp + i * FEW_WARPS, x[i]);
    float2 base[shape::pairs];
    if (shape::pairs < 3)
        load_base<M, N>(f, base);
    if (!OWN && f.squares)
        scale_rows<M>(f, own_scales);
    cuda_copy_wait<0>();
    float acc[M][N][4] = {};
    for (uint32_t from = 0; warp + from * FEW_WARPS < depth; from += AHEAD)
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const uint32_t step = from + i, next = warp + (step + AHEAD) * FEW_WARPS;
            if (warp + step * FEW_WARPS >= depth)
                break;
#pragma unroll
            for (int n = 0; n < N; n++) {
                const uint4 w = weights[(step * N + n) * FEW_WARPS * CUDA_WARP];
                const uint32_t low[2] = {w.x, w.y}, high[2] = {w.z, w.w};
#pragma unroll
                for (int m = 0; m < M; m++) {
                    const uint4 upper = x[i][m][0], lower = x[i][m][1];
                    const uint32_t left[4] = {upper.x, lower.x, upper.y, lower.y},
                                   right[4] = {upper.z, lower.z, upper.w, lower.w};
                    cuda_mma(acc[m][n], left, low);
                    cuda_mma(acc[m][n], right, high);
                }
            }
            if (next < depth)
                load_rows<M, OWN>(f, rows, next, x[i]);
        }
    if (shape::pairs >= 3) /* too many to be held that long */
        load_base<M, N>(f, base);
    float scales[shape::pairs] = {};
#pragma unroll
    for (int j = 0; j < shape::pairs; j++) {
        const neighbours<M, N> p(f, j);
        if (!p.there)
            continue;
        if (OWN)
            scales[j] = scale_of(squares[p.row - blockIdx.y * M * TILE_ROWS], f);
        else if (!f.squares)
            scales[j] = f.scales[p.row];
    }
    __syncthreads(); /* the weights are read, the tails are there, and the scales */
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                sums[((warp * M + m) * N + n) * 4 * CUDA_WARP + e * CUDA_WARP + lane] =
                    acc[m][n][e];
    __syncthreads();
#pragma unroll
    for (int j = 0; j < shape::pairs; j++) {
        const neighbours<M, N> p(f, j);
        float own[2] = {};
#pragma unroll
        for (uint32_t w = 0; p.there && w < FEW_WARPS; w++) {
            own[0] += sums[w * shape::results + p.at];
            own[1] += sums[w * shape::results + p.at + CUDA_WARP];
        }
        if (!OWN && f.squares && p.there)
            scales[j] = own_scales[p.row - blockIdx.y * M * TILE_ROWS];
        /* One rounding, in every form of these kernels: rows do not differ by who is beside. */
        own[0] = fmaf(own[0], scales[j], base[j].x);
        own[1] = fmaf(own[1], scales[j], base[j].y);
        if (leaves && f.next.ready)
            leave_prepared(f, p.row, p.o, p.there, own, next_norm[j]);
        if (!p.there)
            continue;
        if (p.o >= f.conv.first && p.o < f.conv.first + f.conv.count)
            convolve_pair(f, p, tails, own);
        float *to = f.out + (size_t)p.row * f.n + p.o;
        if (f.n % 2 == 0) {
            *reinterpret_cast<float2 *>(to) = float2{own[0], own[1]};
        } else {
            to[0] = own[0];
            if (p.o + 1 < f.n)
                to[1] = own[1];
        }
    }
}

template <int N, int AHEAD> static void launch_one_row(struct ops_context *x, const struct few &f)
{
    const size_t shared =
        sizeof(float) * FEW_WARPS * RESULTS(N) + sizeof(bf16) * f.row_count * (f.k + SHARED_PAD);
    if (shared > SHARED_PLAIN)
        CUDA_ALLOW_SHARED(x, (product_of_few<N, AHEAD>), shared);
    if (x->spares)
        CUDA_SPARE_SHARED(x, (product_of_few<N, AHEAD>));
    CUDA_LAUNCH_EARLY(x, (product_of_few<N, AHEAD>), dim3(cuda_ceil(f.n, N * TILE_OUT)),
                      dim3(FEW_WARPS * CUDA_WARP), shared, f);
}

template <int M, int N, int OWN> static size_t shared_of(const struct few &f)
{
    const uint32_t own = f.row_count > OWN ? OWN : f.row_count;
    return share<M, N>::front(f.k) + (f.conv.count ? share<M, N>::conv : 0) +
           sizeof(bf16) * own * (f.k + SHARED_PAD);
}

/* False: it does not fit. */
template <int M, int N, int OWN> static bool launch_many(struct ops_context *x, const struct few &f)
{
    constexpr int ahead = N < 9 || M == 1 ? 4 : 2;
    const size_t shared = shared_of<M, N, OWN>(f);
    if (shared + SHARED_OWN > x->shared_most)
        return false;
    static_assert(CUDA_LEFT_ROWS <= TILE_ROWS, "of one tile");
    ASSERT(!f.next.ready || (M == 1 && !OWN));
    if (shared > SHARED_PLAIN)
        CUDA_ALLOW_SHARED(x, (product_of_many<M, N, ahead, OWN>), shared);
    CUDA_LAUNCH_EARLY(x, (product_of_many<M, N, ahead, OWN>),
                      dim3(cuda_ceil(f.n, N * TILE_OUT), cuda_ceil(f.row_count, M * TILE_ROWS)),
                      dim3(FEW_WARPS * CUDA_WARP), shared, f);
    return true;
}

/* With the first of N weight rows a block that leaves all blocks a multiprocessor of their own. */
template <int M, int OWN, int... N>
static bool launch_at_once(struct ops_context *x, const struct few &f)
{
    const uint32_t tops = cuda_ceil(f.row_count, M * TILE_ROWS);
    return ((tops * cuda_ceil(f.n, N * TILE_OUT) <= (uint32_t)x->multiprocessors &&
             launch_many<M, N, OWN>(x, f)) ||
            ...);
}

/* With the first of N that fits. */
template <int M, int OWN, int... N>
static bool launch_any(struct ops_context *x, const struct few &f)
{
    return (launch_many<M, N, OWN>(x, f) || ...);
}

bool cuda_takes_rows(const struct ops_context *x, uint32_t k)
{
    return k % TILE_DEPTH == 0 && share<1, 1>::front(k) <= x->shared_most / 2;
}

/* Each block reads its rows once the kernel in front has ended, its weights before: few rows and
 * many weight rows a block are best, as long as all blocks run at once, and have room beside those
 * of the kernel in front. */
static bool launch_prepared(struct ops_context *x, const struct few &f)
{
    if (f.row_count <= TILE_ROWS)
        return launch_at_once<1, 0, 1, 2, 5>(x, f) || launch_any<1, 0, 5, 2, 1>(x, f);
    if (launch_at_once<1, 0, 1, 2>(x, f) || launch_at_once<2, 0, 1, 2, 4, 5>(x, f) ||
        launch_at_once<4, 0, 1, 2, 5, 9>(x, f))
        return true;
    return f.row_count <= 2 * TILE_ROWS ? launch_any<2, 0, 5, 2, 1>(x, f)
                                        : launch_any<4, 0, 9, 5, 2, 1>(x, f);
}

static void multiply_several(struct ops_context *x, const struct few &f)
{
    bool done;
    if (!f.squares && f.row_count <= 8)
        done = launch_at_once<1, 8, 1, 2, 5>(x, f) || launch_any<1, 8, 5, 2, 1>(x, f);
    else
        done = !f.squares && launch_at_once<1, TILE_ROWS, 1, 2, 5>(x, f);
    if (!done && !f.squares)
        CUDA_LAUNCH_EARLY(x, prepare_rows, dim3(f.row_count), dim3(FEW_WARPS * CUDA_WARP), 0, f);
    done = done || cuda_multiply_wide(x, f) || launch_prepared(x, f);
    ASSERT(done); /* see cuda_takes_rows */
}

void cuda_multiply_rows(struct ops_context *x, const struct few &f)
{
    if (f.row_count > 1)
        multiply_several(x, f);
    else if (f.n >= 128 * 4 * TILE_OUT)
        launch_one_row<4, 4>(x, f);
    else if (f.n >= 128 * 2 * TILE_OUT)
        launch_one_row<2, 8>(x, f);
    else
        launch_one_row<1, 8>(x, f);
}
