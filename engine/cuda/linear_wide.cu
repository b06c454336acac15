/* linear_wide.cu - products of the rows of many short segments with very many weight rows: logits.
 * The sums are those of linear_rows.cu, to the bit: there eight warps share out the depth and their
 * shares are added up in the end; here one warp goes through these shares one after the other. So a
 * block has a tile of both, through which depth comes in a pipeline of shared memory. */
#include "engine/cuda/linear_rows.cuh"

#define WIDE_WARPS 8
#define WIDE_THREADS (WIDE_WARPS * CUDA_WARP)
#define WIDE_ROWS 128 /* of a block's tile, of both factors */
#define WIDE_STEPS 2  /* of depth in a stage */
#define WIDE_STAGES 5
#define WARPS_ACROSS 4                                        /* next to each other, of a tile */
#define WARP_M (WIDE_ROWS / 16 / (WIDE_WARPS / WARPS_ACROSS)) /* a warp's tiles of 16 rows */
#define WARP_N (WIDE_ROWS / 8 / WARPS_ACROSS)                 /* and of 8 weight rows */
#define STEP_DEPTH 32 /* four times 16 bytes of a row: see linear_rows.cu */

/* Depth of WIDE_STEPS steps: a row's four parts lie together, off the banks of others. */
struct stage {
    uint4 x[WIDE_STEPS][WIDE_ROWS][4], w[WIDE_STEPS][WIDE_ROWS][4];
};

struct sums {
    float v[WARP_M][WARP_N][4];
};

/* Where the steps of the `i`-th stage of a tile begin: stages go through the shares of depth that
 * the warps of linear_rows.cu have, one after the other. */
static __device__ __forceinline__ uint32_t step_of(const struct few &f, uint32_t i, uint32_t step)
{
    const uint32_t shares = f.k / STEP_DEPTH / FEW_SHARES / WIDE_STEPS; /* stages of each */
    return i / shares + (i % shares * WIDE_STEPS + step) * FEW_SHARES;
}

static __device__ __forceinline__ void fetch_stage(const struct few &f, uint32_t tile, uint32_t i,
                                                   struct stage *to)
{
    const uint32_t top = blockIdx.y * WIDE_ROWS, first = tile * WIDE_ROWS;
#pragma unroll
    for (uint32_t j = 0; j < WIDE_STEPS * WIDE_ROWS * 4 / WIDE_THREADS; j++) {
        const uint32_t at = threadIdx.x + j * WIDE_THREADS, part = at % 4, row = at / 4 % WIDE_ROWS,
                       step = at / 4 / WIDE_ROWS;
        const size_t column = (size_t)step_of(f, i, step) * STEP_DEPTH + 8 * part;
        const uint32_t r = min(top + row, f.row_count - 1), o = min(first + row, f.n - 1);
        cuda_copy_async(&to->x[step][row][part], f.ready + (size_t)r * f.k + column);
        cuda_copy_async(&to->w[step][row][part], f.weight + (size_t)o * f.k + column);
    }
}

static __device__ __forceinline__ void multiply_stage(const struct stage *s, struct sums *acc)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const uint32_t top = warp / WARPS_ACROSS * WARP_M * 16 + lane / 4,
                   first = warp % WARPS_ACROSS * WARP_N * 8 + lane / 4;
#pragma unroll
    for (int step = 0; step < WIDE_STEPS; step++) {
        uint4 w[WARP_N];
#pragma unroll
        for (int n = 0; n < WARP_N; n++)
            w[n] = s->w[step][first + 8 * n][lane % 4];
#pragma unroll
        for (int m = 0; m < WARP_M; m++) {
            const uint4 upper = s->x[step][top + 16 * m][lane % 4],
                        lower = s->x[step][top + 16 * m + 8][lane % 4];
            const uint32_t left[4] = {upper.x, lower.x, upper.y, lower.y},
                           right[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
            for (int n = 0; n < WARP_N; n++) {
                const uint32_t low[2] = {w[n].x, w[n].y}, high[2] = {w[n].z, w[n].w};
                cuda_mma(acc->v[m][n], left, low);
                cuda_mma(acc->v[m][n], right, high);
            }
        }
    }
}

/* The share is done: it goes to the others'. */
static __device__ __forceinline__ void add_share(struct sums *acc, struct sums *all)
{
#pragma unroll
    for (int m = 0; m < WARP_M; m++)
#pragma unroll
        for (int n = 0; n < WARP_N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                all->v[m][n][e] += acc->v[m][n][e];
                acc->v[m][n][e] = 0;
            }
}

static __device__ __forceinline__ void store_tile(const struct few &f, uint32_t tile,
                                                  struct sums *all)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const uint32_t first = tile * WIDE_ROWS + warp % WARPS_ACROSS * WARP_N * 8 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2 * WARP_M; i++) {
        const uint32_t row =
            blockIdx.y * WIDE_ROWS + (warp / WARPS_ACROSS * WARP_M * 2 + i) * 8 + lane / 4;
        const float scale = row < f.row_count ? f.scales[row] : 0;
#pragma unroll
        for (int n = 0; n < WARP_N; n++) {
            const uint32_t o = first + 8 * n;
            float *sums = &all->v[i / 2][n][i % 2 * 2];
            float *to = f.out + (size_t)row * f.n + o;
            const float2 pair = {fmaf(sums[0], scale, 0.0f), fmaf(sums[1], scale, 0.0f)};
            sums[0] = sums[1] = 0;
            if (row >= f.row_count || o >= f.n)
                continue;
            if (f.n % 2 == 0) {
                *reinterpret_cast<float2 *>(to) = pair;
            } else {
                to[0] = pair.x;
                if (o + 1 < f.n)
                    to[1] = pair.y;
            }
        }
    }
}

/* Grid: as many blocks as run at once, each with every so many-th tile of weight rows; x tiles of
 * rows. */
static __global__ void __launch_bounds__(WIDE_THREADS, 1) product_of_tiles(struct few f)
{
    CUDA_SHARED(struct stage, stages); /* [WIDE_STAGES] */
    const uint32_t tiles = (f.n + WIDE_ROWS - 1) / WIDE_ROWS;
    const uint32_t depth = f.k / STEP_DEPTH / WIDE_STEPS; /* stages of a tile */
    const uint32_t count = (tiles - blockIdx.x + gridDim.x - 1) / gridDim.x * depth;
    const uint32_t row = blockIdx.x * WIDE_ROWS + threadIdx.x;
    if (threadIdx.x < WIDE_ROWS && row < f.n)
        cuda_bring_near(f.weight + (size_t)row * f.k, f.k * sizeof(bf16));
    cuda_depend_release();
    cuda_depend_wait();
#pragma unroll
    for (uint32_t i = 0; i < WIDE_STAGES - 1; i++) {
        if (i < count)
            fetch_stage(f, blockIdx.x + i / depth * gridDim.x, i % depth, &stages[i]);
        cuda_copy_commit();
    }
    struct sums acc = {}, all = {};
    for (uint32_t i = 0; i < count; i++) {
        const uint32_t tile = blockIdx.x + i / depth * gridDim.x, next = i + WIDE_STAGES - 1;
        cuda_copy_wait<WIDE_STAGES - 2>();
        __syncthreads(); /* the stage is there, and all have left the one before it */
        if (next < count)
            fetch_stage(f, blockIdx.x + next / depth * gridDim.x, next % depth,
                        &stages[next % WIDE_STAGES]);
        cuda_copy_commit();
        const uint32_t soon = (tile + gridDim.x) * WIDE_ROWS + threadIdx.x;
        if (i % depth == 0 && threadIdx.x < WIDE_ROWS && soon < f.n)
            cuda_bring_near(f.weight + (size_t)soon * f.k, f.k * sizeof(bf16));
        multiply_stage(&stages[i % WIDE_STAGES], &acc);
        if ((i + 1) % (depth / FEW_SHARES) == 0)
            add_share(&acc, &all);
        if ((i + 1) % depth == 0)
            store_tile(f, tile, &all);
    }
}

bool cuda_multiply_wide(struct ops_context *x, const struct few &f)
{
    const uint32_t tiles = cuda_ceil(f.n, WIDE_ROWS), most = (uint32_t)x->multiprocessors;
    const size_t shared = WIDE_STAGES * sizeof(struct stage);
    if (f.row_count <= WIDE_ROWS / 4 || tiles < most ||
        f.k % (STEP_DEPTH * FEW_SHARES * WIDE_STEPS) || f.squares || f.bias || f.add ||
        f.conv.count || shared > x->shared_most)
        return false;
    CUDA_ALLOW_SHARED(x, product_of_tiles, shared);
    CUDA_LAUNCH_EARLY(x, product_of_tiles, dim3(most, cuda_ceil(f.row_count, WIDE_ROWS)),
                      dim3(WIDE_THREADS), shared, f);
    return true;
}
