/* retrieve_scan.cu - the scan over the landmarks for segments of many rows: a product on tensor
 * cores, 128 queries by 128 landmarks at a time, whose scores go through shared memory to the best
 * of each row, kept in registers, and never further. For bf16 and at most CUDA_SCAN_LIST picks.
 * Hopper has a form of its own: retrieve_blocks.cu. */
#include "engine/cuda/retrieve.cuh"

#define QUERIES 128
#define LANDMARKS 128
#define SLAB 64 /* of the depth, at a time */
#define STAGES 4
#define THREADS 256
#define WARPS_ACROSS 4 /* of 8: each has 64 queries by 32 landmarks */
#define WARP_QUERIES 64
#define WARP_LANDMARKS 32
#define SCORED (LANDMARKS / 2) /* landmarks whose scores lie in shared memory at once */
#define SCORE_STRIDE (SCORED + 1)
#define LEAST_SPLITS 4
#define PARTS (THREADS / QUERIES) /* threads of a row, each with a list of its own */

/* 128 rows of a slab, `stride` elements apart; rows from `count` on zeros. */
static __device__ __forceinline__ void fetch(bf16 *to, const bf16 *from, uint32_t stride,
                                             uint32_t count)
{
#pragma unroll
    for (uint32_t k = 0; k < QUERIES * SLAB / 8 / THREADS; k++) {
        const uint32_t i = k * THREADS + threadIdx.x, row = i / (SLAB / 8), unit = i % (SLAB / 8);
        cuda_copy_async(to + cuda_swizzled<SLAB>(row, unit * 8),
                        from + (size_t)(row < count ? row : 0) * stride + unit * 8, row < count);
    }
}

/* acc += queries landmarks^T over a slab, the warp's part. */
static __device__ __forceinline__ void multiply(const bf16 *queries, const bf16 *landmarks,
                                                float acc[4][4][4])
{
    const uint32_t warp = threadIdx.x / CUDA_WARP;
    const uint32_t top = warp / WARPS_ACROSS * WARP_QUERIES;
    const uint32_t left = warp % WARPS_ACROSS * WARP_LANDMARKS;
#pragma unroll
    for (int k = 0; k < SLAB; k += 16) {
        uint32_t a[4][4], b[2][4];
#pragma unroll
        for (int m = 0; m < 4; m++)
            cuda_load_matrices(a[m], cuda_swizzled_row<SLAB>(queries, top + m * 16, k, true));
#pragma unroll
        for (int n = 0; n < 2; n++)
            cuda_load_matrices(b[n], cuda_swizzled_row<SLAB>(landmarks, left + n * 16, k, false));
#pragma unroll
        for (int m = 0; m < 4; m++)
#pragma unroll
            for (int n = 0; n < 4; n++)
                cuda_mma(acc[m][n], a[m], b[n / 2] + n % 2 * 2);
    }
}

/* The tile's scores, one half of the landmarks after the other, to each row's lists. */
static __device__ __forceinline__ void rank(float *scores, const float acc[4][4][4], uint32_t first,
                                            uint64_t seen, struct scan_list *list)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const uint32_t top = warp / WARPS_ACROSS * WARP_QUERIES + lane / 4;
    const uint32_t left = warp % WARPS_ACROSS * WARP_LANDMARKS, own = threadIdx.x / QUERIES;
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        __syncthreads();
        if (left / SCORED == half)
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int n = 0; n < 4; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        scores[(top + m * 16 + i / 2 * 8) * SCORE_STRIDE + left % SCORED + n * 8 +
                               lane % 4 * 2 + i % 2] = acc[m][n][i];
        __syncthreads();
        const float *from = scores + threadIdx.x % QUERIES * SCORE_STRIDE + own * (SCORED / PARTS);
        const uint32_t chunk = first + half * SCORED + own * (SCORED / PARTS);
        const uint32_t there = chunk < seen ? (uint32_t)(seen - chunk) : 0;
#pragma unroll 8
        for (uint32_t i = 0; i < SCORED / PARTS; i++)
            if (i < there && from[i] > list->scores[CUDA_SCAN_LIST - 1])
                cuda_scan_insert(list, from[i], chunk + i);
    }
}

/* Every gridDim.y-th tile of landmarks against QUERIES rows of a segment. Grid: tiles of rows x
 * splits x heads. */
static __global__ void __launch_bounds__(THREADS)
    scan_rows(struct scan_shape s, const struct cuda_segment *segments, const bf16 *q,
              struct cuda_candidate *candidates)
{
    CUDA_SHARED(bf16, stages);
    float *scores = reinterpret_cast<float *>(stages + STAGES * (QUERIES + LANDMARKS) * SLAB);
    const struct cuda_segment segment = *segments;
    const uint32_t row = blockIdx.x * QUERIES, h = blockIdx.z, own = threadIdx.x % QUERIES;
    const uint32_t row_count = min(segment.count - row, QUERIES), slabs = s.width / SLAB;
    const uint64_t seen = visible(s, segment.position + row + own, segment.chunk_count);
    const uint64_t last = visible(s, segment.position + row + row_count - 1, segment.chunk_count);
    const uint32_t tiles = (uint32_t)((last + LANDMARKS - 1) / LANDMARKS);
    const uint32_t mine = tiles > blockIdx.y ? (tiles - blockIdx.y - 1) / gridDim.y + 1 : 0;
    const uint32_t steps = mine * slabs;
    const bf16 *queries = q + (size_t)(segment.row + row) * s.dim + (size_t)h * s.width;
    const auto fetch_step = [&](uint32_t step) {
        if (step < steps) {
            const uint32_t first = (blockIdx.y + step / slabs * gridDim.y) * LANDMARKS;
            const uint32_t column = step % slabs * SLAB;
            const uint64_t left = segment.chunk_count - first;
            bf16 *to = stages + step % STAGES * (QUERIES + LANDMARKS) * SLAB;
            const bf16 *block = (const bf16 *)segment.blocks[first / OPS_LANDMARK_BLOCK];
            fetch(to, queries + column, s.dim, row_count);
            fetch(to + QUERIES * SLAB,
                  block + (size_t)(first % OPS_LANDMARK_BLOCK) * s.dim + (size_t)h * s.width +
                      column,
                  s.dim, left < LANDMARKS ? (uint32_t)left : LANDMARKS);
        }
        cuda_copy_commit();
    };
    struct scan_list list;
    cuda_scan_clear(&list);
    for (uint32_t step = 0; step < STAGES - 1; step++)
        fetch_step(step);
    for (uint32_t tile = 0; tile < mine; tile++) {
        float acc[4][4][4] = {};
        for (uint32_t slab = 0; slab < slabs; slab++) {
            const uint32_t step = tile * slabs + slab;
            cuda_copy_wait<STAGES - 2>();
            __syncthreads();
            fetch_step(step + STAGES - 1);
            const bf16 *stage = stages + step % STAGES * (QUERIES + LANDMARKS) * SLAB;
            multiply(stage, stage + QUERIES * SLAB, acc);
        }
        rank(scores, acc, (blockIdx.y + tile * gridDim.y) * LANDMARKS, seen, &list);
    }
    if (own >= row_count)
        return;
    cuda_scan_store(candidates, s.heads, gridDim.y * PARTS, row + own, h,
                    blockIdx.y * PARTS + threadIdx.x / QUERIES, list);
}

bool cuda_scans_rows(const struct ops_context *x)
{
    const struct scan_shape s = scan_shape_of(&x->config);
    return !x->wide && s.width % SLAB == 0 && s.topk <= CUDA_SCAN_LIST;
}

uint32_t cuda_scan_lists(const struct ops_context *x, uint32_t row_count, uint64_t seen)
{
    const uint32_t blocks = cuda_ceil(row_count, QUERIES) * x->config.retrieval_heads;
    const uint32_t tiles = cuda_ceil(seen ? seen : 1, LANDMARKS);
    const uint32_t most = (uint32_t)x->multiprocessors / blocks;
    uint32_t splits = LEAST_SPLITS; /* by powers of two: what grows seldom is seldom asked for */
    while (splits < tiles && splits < most)
        splits *= 2;
    splits = splits < most ? splits : most;
    return PARTS * (splits ? splits : 1);
}

void cuda_scan_rows(struct ops_context *x, const struct cuda_segment *segment,
                    const struct ops_segment *host, uint32_t lists,
                    struct cuda_candidate *candidates)
{
    const struct scan_shape s = scan_shape_of(&x->config);
    if (cuda_scan_blocks(x, segment, host, lists, candidates))
        return;
    const size_t bytes = STAGES * (QUERIES + LANDMARKS) * SLAB * sizeof(bf16) +
                         QUERIES * SCORE_STRIDE * sizeof(float);
    CUDA_ALLOW_SHARED(x, scan_rows, bytes);
    CUDA_LAUNCH(x, scan_rows, dim3(cuda_ceil(host->count, QUERIES), lists / PARTS, s.heads),
                dim3(THREADS), bytes, s, segment, (const bf16 *)x->query_narrow, candidates);
}
