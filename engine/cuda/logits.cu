/* logits.cu - the two ends of the model: embeddings in, logits out. */
#include "engine/cuda/device.cuh"
#include "engine/cuda/ending.cuh"
#include "engine/cuda/exchange.cuh"

#define KEEP_BLOCKS 16 /* that share a row of logits */
#define KEEP_THREADS 256
#define KEEP_AHEAD 7  /* logits of a thread on their way at once */
#define TILE 8        /* weight rows that a warp has at a time */
#define TILE_DEPTH 32 /* that it takes at a step */
#define TILE_PAD 32   /* elements behind a row in shared memory: off the banks */
#define SHARES 8      /* of the depth, each with a sum of its own, as in linear_rows.cu */
#define ROW_WARPS 12  /* of the product of one row at most, where there is room for their tiles */

template <typename T>
static __global__ void gather_rows(const T *table, const int32_t *tokens, uint32_t d, float *out)
{
    cuda_depend_release();
    const T *from = table + (size_t)tokens[blockIdx.x] * d;
    for (uint32_t i = threadIdx.x; i < d; i += blockDim.x)
        out[(size_t)blockIdx.x * d + i] = cuda_float(from[i]);
}

extern "C" void cuda_embed(struct ops_context *x, const struct ops_tensor *table,
                           const int32_t *tokens, uint32_t row_count, float *out)
{
    if (x->recording) {
        cuda_step_embed(x, table, out);
        return;
    }
    cuda_begin(x);
    const int32_t *staged = (const int32_t *)cuda_stage(x, tokens, row_count * sizeof *tokens);
    if (x->wide)
        CUDA_LAUNCH(x, gather_rows<float>, dim3(row_count), dim3(256), 0,
                    (const float *)table->data, staged, table->cols, out);
    else
        CUDA_LAUNCH(x, gather_rows<bf16>, dim3(row_count), dim3(256), 0, (const bf16 *)table->data,
                    staged, table->cols, out);
}

/* ---- logits ---- */

/* A logit as the sampler sees it and its token, so that the largest number is the largest logit,
 * and of equal ones the lowest token. */
static __device__ __forceinline__ unsigned long long rank_of(float logit, uint32_t token)
{
    const float limit = 3.402823466e+38f;
    float value = logit > limit ? limit : logit;
    value = value >= -limit ? value + 0.0f : -INFINITY; /* minus zero equals zero; NaN is least */
    return (unsigned long long)cuda_order_of(value) << 32 | (0xffffffffu - token);
}

static __device__ __forceinline__ unsigned long long larger(unsigned long long a,
                                                            unsigned long long b)
{
    return a > b ? a : b;
}

/* A block has seen its share of a row of logits, `own` the largest rank of each thread: the last
 * one says which token's it is. All threads; `parts`: shared, one for each warp. */
static __device__ __forceinline__ bool find_largest(const struct cuda_kept_logits &kept,
                                                    uint32_t row, uint32_t blocks,
                                                    unsigned long long own,
                                                    unsigned long long *parts)
{
    for (int step = CUDA_WARP / 2; step; step /= 2)
        own = larger(own, __shfl_xor_sync(CUDA_ALL_LANES, own, step));
    if (threadIdx.x % CUDA_WARP == 0)
        parts[threadIdx.x / CUDA_WARP] = own;
    __syncthreads();
    if (threadIdx.x)
        return false;
    for (uint32_t i = 1; i < blockDim.x / CUDA_WARP; i++)
        own = larger(own, parts[i]);
    atomicMax(&kept.best[row], own);
    __threadfence();
    if (atomicAdd(&kept.arrived[row], 1u) + 1 < blocks)
        return false;
    __threadfence();
    kept.largest[row] = (int32_t)(0xffffffffu - (uint32_t)atomicMax(&kept.best[row], 0ull));
    kept.best[row] = 0;
    kept.arrived[row] = 0;
    return true;
}

/* Rows of logits go to their sequences, and the largest of each is found. Grid: KEEP_BLOCKS x
 * rows. */
static __global__ void __launch_bounds__(KEEP_THREADS)
    keep_logits(const float *logits, uint32_t vocabulary, struct cuda_kept_logits kept)
{
    __shared__ unsigned long long parts[KEEP_THREADS / CUDA_WARP];
    cuda_depend_release();
    cuda_depend_wait();
    constexpr uint32_t stride = KEEP_BLOCKS * KEEP_THREADS;
    const float *row = logits + (size_t)blockIdx.y * vocabulary;
    float *to = kept.to[blockIdx.y];
    unsigned long long own = 0;
    for (uint32_t from = blockIdx.x * KEEP_THREADS + threadIdx.x; from < vocabulary;
         from += KEEP_AHEAD * stride) {
        float ahead[KEEP_AHEAD];
#pragma unroll
        for (uint32_t a = 0; a < KEEP_AHEAD; a++)
            ahead[a] = from + a * stride < vocabulary ? row[from + a * stride] : 0;
#pragma unroll
        for (uint32_t a = 0; a < KEEP_AHEAD; a++) {
            const uint32_t i = from + a * stride;
            if (i >= vocabulary)
                break;
            to[i] = ahead[a];
            own = larger(own, rank_of(ahead[a], i));
        }
    }
    find_largest(kept, blockIdx.y, KEEP_BLOCKS, own, parts);
}

/* ---- of one row, at the speed of memory ---- */

struct row_product {
    const bf16 *weight; /* [n, k] */
    uint32_t n, k;
    const float *x, *norm; /* [k] */
    float epsilon;
    float *out; /* [n] */
};

static __host__ __device__ __forceinline__ size_t tile_bytes(uint32_t k)
{
    return sizeof(bf16) * TILE * (k + TILE_PAD);
}

/* The row as products take it, and the sums of its squares, one of each share, whichever warps
 * there are. */
static __device__ __forceinline__ void prepare_row(const struct row_product &f, bf16 *row,
                                                   float squares[SHARES])
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, warps = blockDim.x / CUDA_WARP;
    for (uint32_t share = threadIdx.x / CUDA_WARP; share < SHARES; share += warps) {
        float sum = 0;
        for (uint32_t i = 4 * (share * CUDA_WARP + lane); i < f.k; i += 4 * SHARES * CUDA_WARP) {
            const float4 v = *reinterpret_cast<const float4 *>(f.x + i),
                         w = *reinterpret_cast<const float4 *>(f.norm + i);
            *reinterpret_cast<uint2 *>(row + i) =
                uint2{cuda_pack(v.x * w.x, v.y * w.y), cuda_pack(v.z * w.z, v.w * w.w)};
            sum += fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, v.x * v.x)));
        }
        sum = cuda_warp_sum(sum);
        if (lane == 0)
            squares[share] = sum;
    }
}

/* The row by a tile of weights, without the norm's scale; of lanes below TILE / 2 two results. */
static __device__ __forceinline__ float2 multiply_tile(const bf16 *tile, const bf16 *row,
                                                       uint32_t k)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP;
    const bf16 *x = row + 8 * (lane % 4),
               *weights = tile + lane / 4 * (k + TILE_PAD) + 8 * (lane % 4);
    float acc[SHARES][4] = {};
    for (uint32_t first = 0; first < k; first += SHARES * TILE_DEPTH) {
#pragma unroll
        for (uint32_t share = 0; share < SHARES; share++) {
            const uint32_t at = first + share * TILE_DEPTH;
            if (at >= k)
                break;
            const uint4 v = *reinterpret_cast<const uint4 *>(x + at),
                        w = *reinterpret_cast<const uint4 *>(weights + at);
            const uint32_t left[4] = {v.x, 0, v.y, 0}, right[4] = {v.z, 0, v.w, 0};
            const uint32_t low[2] = {w.x, w.y}, high[2] = {w.z, w.w};
            cuda_mma(acc[share], left, low);
            cuda_mma(acc[share], right, high);
        }
    }
    float2 sum = {0, 0};
#pragma unroll
    for (uint32_t share = 0; share < SHARES; share++) {
        sum.x += acc[share][0];
        sum.y += acc[share][1];
    }
    return sum;
}

/* Logits of one row, which are kept too: each warp has a tile of weights on its way to shared
 * memory, a barrier for it, and nobody else to wait for. Numbers are those of linear_rows.cu, to
 * the bit. Grid: as many blocks as run at once. */
static __global__ void __launch_bounds__(ROW_WARPS *CUDA_WARP, 1)
    logits_of_row(struct row_product f, struct cuda_kept_logits kept, struct cuda_ending ending)
{
    CUDA_SHARED(bf16, memory);
    __shared__ uint64_t full[ROW_WARPS];
    __shared__ unsigned long long ranks[ROW_WARPS];
    __shared__ float squares[SHARES];
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const uint32_t tiles = (f.n + TILE - 1) / TILE, step = gridDim.x * (blockDim.x / CUDA_WARP);
    const uint64_t policy = cuda_passing_policy();
    bf16 *row = memory, *tile = row + f.k + warp * (tile_bytes(f.k) / sizeof(bf16));
    const auto fetch = [&](uint32_t t) {
        const uint32_t bytes = f.k * sizeof(bf16), o = t * TILE + lane;
        if (lane == 0)
            cuda_barrier_expect(&full[warp], TILE * bytes);
        __syncwarp();
        if (lane < TILE)
            cuda_copy_passing(tile + lane * (f.k + TILE_PAD),
                              f.weight + (size_t)(o < f.n ? o : f.n - 1) * f.k, bytes, &full[warp],
                              policy);
    };
    uint32_t at = warp * gridDim.x + blockIdx.x;
    if (lane == 0)
        cuda_barrier_init(&full[warp], 1);
    cuda_barriers_ready();
    __syncwarp();
    if (at < tiles)
        fetch(at);
    cuda_depend_release();
    cuda_depend_wait();
    float *to = kept.to[0];
    prepare_row(f, row, squares);
    __syncthreads();
    float square = 0;
#pragma unroll
    for (uint32_t i = 0; i < SHARES; i++)
        square += squares[i];
    const float scale = 1 / sqrtf(square / (float)f.k + f.epsilon);
    unsigned long long own = 0;
    for (uint32_t parity = 0; at < tiles; at += step, parity ^= 1) {
        cuda_barrier_wait(&full[warp], parity);
        const float2 sum = multiply_tile(tile, row, f.k);
        __syncwarp(); /* everyone has read */
        if (at + step < tiles)
            fetch(at + step);
#pragma unroll
        for (uint32_t i = 0; i < 2; i++) {
            const uint32_t o = at * TILE + 2 * lane + i;
            if (lane >= TILE / 2 || o >= f.n)
                continue;
            const float logit = fmaf(i ? sum.y : sum.x, scale, 0.0f);
            f.out[o] = logit;
            to[o] = logit;
            own = larger(own, rank_of(logit, o));
        }
    }
    if (find_largest(kept, 0, gridDim.x, own, ranks))
        cuda_tell_end(ending);
}

/* False: not covered. */
static bool launch_row(struct ops_context *x, const struct row_product &f)
{
    const size_t row = sizeof(bf16) * f.k, fixed = 1024 + row; /* and what is not dynamic */
    const size_t room = x->shared_most > fixed ? (x->shared_most - fixed) / tile_bytes(f.k) : 0;
    const uint32_t warps = room < ROW_WARPS ? (uint32_t)room : ROW_WARPS;
    if (x->wide || !x->early || f.k % TILE_DEPTH || !warps)
        return false;
    const size_t shared = row + warps * tile_bytes(f.k);
    const struct cuda_kept_logits kept = cuda_step_kept(x);
    const struct cuda_ending ending = cuda_step_ending(x);
    CUDA_ALLOW_SHARED(x, logits_of_row, shared);
    CUDA_LAUNCH_EARLY(x, logits_of_row, dim3((uint32_t)x->multiprocessors), dim3(warps * CUDA_WARP),
                      shared, f, kept, ending);
    return true;
}

extern "C" void cuda_logits(struct ops_context *x, const struct ops_tensor *norm,
                            const struct ops_tensor *head, const struct ops_rows *rows,
                            const float *hidden, float *logits)
{
    const float epsilon = x->config.norm_epsilon;
    cuda_step_flush(x);
    const struct row_product f = {(const bf16 *)head->data,  head->rows, head->cols, hidden,
                                  (const float *)norm->data, epsilon,    logits};
    if (x->recording && rows->row_count == 1 && launch_row(x, f))
        return;
    const struct cuda_input in = {hidden, norm, epsilon, NULL, false};
    cuda_norm_linear(x, &in, head, NULL, rows, logits, false);
    if (!x->recording)
        return;
    const struct cuda_kept_logits kept = cuda_step_kept(x);
    CUDA_LAUNCH_EARLY(x, keep_logits, dim3(KEEP_BLOCKS, kept.rows), dim3(KEEP_THREADS), 0, logits,
                      x->config.vocab_size, kept);
}
