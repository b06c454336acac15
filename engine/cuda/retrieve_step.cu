/* retrieve_step.cu - retrieval for single rows: a scan at the speed of memory, split over the
 * device, each warp with several landmarks on their way; then a merge. Scores are compared with
 * their chunks, a total order, so the picks do not depend on who scanned what. */
#include "engine/cuda/retrieve.cuh"

#define SCAN_WARPS 8
#define SCAN_AHEAD 4 /* landmarks that a warp reads together; divides OPS_LANDMARK_BLOCK */
#define MERGE_THREADS 256
#define SCAN_BLOCKS MERGE_THREADS /* of a row and head at most: the merge has a thread for each */

struct query_norm { /* both NULL without enable_lmk_norm */
    const float *q, *k;
};

/* A query's part of each lane: LOADS times 8 neighbours, scaled so that a score is a plain product;
 * and the same products. */
template <int LOADS> struct wide_scan {
    float q[LOADS][8];
    uint4 ahead[SCAN_AHEAD][LOADS];

    __device__ __forceinline__ void fetch(const bf16 *landmark, uint32_t dim, uint32_t lane)
    {
#pragma unroll
        for (int i = 0; i < SCAN_AHEAD; i++)
#pragma unroll
            for (int j = 0; j < LOADS; j++)
                ahead[i][j] =
                    cuda_stream16(landmark + (size_t)i * dim + (j * CUDA_WARP + lane) * 8);
    }
    __device__ __forceinline__ void prepare(const float *query, uint32_t width,
                                            const struct query_norm &norm, uint32_t lane)
    {
        float scale = 1 / sqrtf((float)width), sum = 0;
#pragma unroll
        for (int j = 0; j < LOADS; j++)
#pragma unroll
            for (int e = 0; e < 8; e++) {
                q[j][e] = query[(j * CUDA_WARP + lane) * 8 + e];
                sum = fmaf(q[j][e], q[j][e], sum);
            }
        if (norm.q)
            scale /= sqrtf(cuda_warp_sum(sum) / (float)width + MODEL_MEMORY_EPSILON);
#pragma unroll
        for (int j = 0; j < LOADS; j++)
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const uint32_t at = (j * CUDA_WARP + lane) * 8 + e;
                q[j][e] *= norm.q ? scale * norm.q[at] * norm.k[at] : scale;
            }
    }
    __device__ __forceinline__ void score(float out[SCAN_AHEAD])
    {
#pragma unroll
        for (int i = 0; i < SCAN_AHEAD; i++) {
            float sum = 0;
#pragma unroll
            for (int j = 0; j < LOADS; j++) {
                const uint32_t words[4] = {ahead[i][j].x, ahead[i][j].y, ahead[i][j].z,
                                           ahead[i][j].w};
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    sum = fmaf(q[j][2 * e], __uint_as_float(words[e] << 16), sum);
                    sum = fmaf(q[j][2 * e + 1], __uint_as_float(words[e] & 0xffff0000u), sum);
                }
            }
            out[i] = cuda_warp_sum(sum);
        }
    }
};

/* The same for any width and type, element by element; `dim` apart. */
template <typename T>
static __device__ __forceinline__ void score_plain(const float *query, const T *landmark,
                                                   uint32_t width, uint32_t dim, uint32_t count,
                                                   const struct query_norm &norm, float out[])
{
    const uint32_t lane = threadIdx.x % CUDA_WARP;
    float scale = 1 / sqrtf((float)width), square = 0;
    for (uint32_t e = lane; norm.q && e < width; e += CUDA_WARP)
        square = fmaf(query[e], query[e], square);
    if (norm.q)
        scale /= sqrtf(cuda_warp_sum(square) / (float)width + MODEL_MEMORY_EPSILON);
    for (uint32_t i = 0; i < SCAN_AHEAD; i++) {
        float sum = 0;
        for (uint32_t e = lane; i < count && e < width; e += CUDA_WARP) {
            const float q = query[e] * (norm.q ? scale * norm.q[e] * norm.k[e] : scale);
            sum = fmaf(q, cuda_float(landmark[(size_t)i * dim + e]), sum);
        }
        out[i] = cuda_warp_sum(sum);
    }
}

/* LOADS 0: plain. Grid: blocks of a row x rows x heads. */
template <typename T, int LOADS>
static __global__ void __launch_bounds__(SCAN_WARPS *CUDA_WARP)
    scan_rows(struct scan_shape s, const struct cuda_segment *segments, const struct scan_row *rows,
              const float *query, struct query_norm norm, struct cuda_candidate *candidates,
              bool early)
{
    CUDA_SHARED(struct cuda_candidate, lists); /* [SCAN_WARPS][topk] */
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const uint32_t h = blockIdx.z, stride = gridDim.x * SCAN_WARPS * SCAN_AHEAD;
    cuda_depend_release();
    if (!early)
        cuda_depend_wait();
    const struct scan_row at = cuda_row_of(rows, blockIdx.y);
    const struct cuda_segment segment = segments[at.segment];
    const uint64_t seen =
        visible(s, segment.position + (at.row - segment.row), segment.chunk_count);
    struct cuda_candidate *best = lists + (size_t)warp * s.topk, worst = no_candidate();
    for (uint32_t i = lane; i < s.topk; i += CUDA_WARP)
        best[i] = no_candidate();
    __syncwarp();
    const auto landmark = [&](uint64_t chunk) {
        return (const T *)segment.blocks[chunk / OPS_LANDMARK_BLOCK] +
               chunk % OPS_LANDMARK_BLOCK * s.dim + (size_t)h * s.width;
    };
    uint64_t chunk = (uint64_t)(blockIdx.x * SCAN_WARPS + warp) * SCAN_AHEAD;
    wide_scan<LOADS ? LOADS : 1> wide;
    if (LOADS && chunk < seen) /* a block of landmarks is whole, whatever is in it */
        wide.fetch((const bf16 *)(const void *)landmark(chunk), s.dim, lane);
    if (early)
        cuda_depend_wait();
    const float *own = query + (size_t)at.row * s.dim + (size_t)h * s.width;
    if (LOADS)
        wide.prepare(own, s.width, norm, lane);
    for (; chunk < seen; chunk += stride) {
        float scores[SCAN_AHEAD];
        if (LOADS) {
            wide.score(scores);
            if (chunk + stride < seen)
                wide.fetch((const bf16 *)(const void *)landmark(chunk + stride), s.dim, lane);
        } else {
            score_plain(own, landmark(chunk), s.width, s.dim, (uint32_t)(seen - chunk), norm,
                        scores);
        }
        cuda_keep_scores<SCAN_AHEAD>(best, s.topk, scores, chunk, seen, &worst);
    }
    __syncthreads();
    if (warp == 0)
        cuda_merge_warps<SCAN_WARPS>(
            lists, s.topk,
            candidates + (((size_t)blockIdx.y * s.heads + h) * gridDim.x + blockIdx.x) * s.topk);
}

/* The best of a row and head: a thread follows the list of each block. Grid: rows x heads. */
static __global__ void __launch_bounds__(MERGE_THREADS)
    merge_rows(uint32_t heads, uint32_t topk, uint32_t blocks, struct weighing w,
               const struct scan_row *rows, const struct cuda_candidate *candidates,
               uint64_t *chunks, float *shares)
{
    __shared__ struct cuda_candidate winners[MERGE_THREADS / CUDA_WARP], best[LIMITS_TOPK],
        ordered[LIMITS_TOPK];
    cuda_depend_release();
    cuda_depend_wait();
    const uint32_t found = cuda_merge_lists<MERGE_THREADS>(
        candidates + ((size_t)blockIdx.x * heads + blockIdx.y) * blocks * topk, topk, blocks,
        winners, best);
    const size_t row = (size_t)cuda_row_of(rows, blockIdx.x).row * heads + blockIdx.y;
    if (threadIdx.x / CUDA_WARP == 0)
        weigh(w, topk, found, best, ordered, chunks + row * topk, shares + row * topk);
}

/* Blocks of a row and head: together as many as the device holds at once. */
static uint32_t blocks_of(const struct ops_context *x, uint32_t row_count)
{
    const uint32_t all = row_count * x->config.retrieval_heads;
    const uint32_t blocks = cuda_ceil(2 * (uint32_t)x->multiprocessors, all ? all : 1);
    return blocks < SCAN_BLOCKS ? blocks : SCAN_BLOCKS;
}

size_t cuda_retrieve_room(const struct ops_context *x, uint32_t row_count)
{
    return (size_t)row_count * x->config.retrieval_heads * blocks_of(x, row_count) * cuda_kept(x);
}

void cuda_retrieve_rows(struct ops_context *x, const struct ops_retrieval_weights *weights,
                        const struct cuda_segment *segments, const struct scan_row *rows,
                        uint32_t row_count, struct cuda_candidate *candidates, uint64_t *chunks,
                        float *shares)
{
    const struct scan_shape s = scan_shape_of(&x->config);
    const uint32_t blocks = blocks_of(x, row_count);
    const dim3 grid(blocks, row_count, s.heads), block(SCAN_WARPS * CUDA_WARP);
    const size_t shared = sizeof *candidates * SCAN_WARPS * s.topk;
    const bool early = x->early && x->recording;
    if (x->fp8) {
        cuda_retrieve_codes(x, weights, segments, rows, row_count, blocks, false, candidates,
                            chunks, shares);
        return;
    }
    struct query_norm norm = {NULL, NULL};
    if (x->config.landmark_norm)
        norm = {(const float *)weights->q_norm.data, (const float *)weights->k_norm.data};
    if (x->wide)
        CUDA_LAUNCH_EARLY(x, (scan_rows<float, 0>), grid, block, shared, s, segments, rows,
                          x->query, norm, candidates, early);
    else if (s.width == 1024 && s.dim % 8 == 0)
        CUDA_LAUNCH_EARLY(x, (scan_rows<bf16, 4>), grid, block, shared, s, segments, rows, x->query,
                          norm, candidates, early);
    else if (s.width == 512)
        CUDA_LAUNCH_EARLY(x, (scan_rows<bf16, 2>), grid, block, shared, s, segments, rows, x->query,
                          norm, candidates, early);
    else if (s.width == 256)
        CUDA_LAUNCH_EARLY(x, (scan_rows<bf16, 1>), grid, block, shared, s, segments, rows, x->query,
                          norm, candidates, early);
    else
        CUDA_LAUNCH_EARLY(x, (scan_rows<bf16, 0>), grid, block, shared, s, segments, rows, x->query,
                          norm, candidates, early);
    const struct weighing w = {x->config.softmax_weights, weights->pos_decay};
    CUDA_LAUNCH_EARLY(x, merge_rows, dim3(row_count, s.heads), dim3(MERGE_THREADS), 0, s.heads,
                      s.topk, blocks, w, rows, candidates, chunks, shares);
}
