/* retrieve_rows.cuh - the scan over the landmarks for single rows, whatever landmarks are made of:
 * split over the device, each warp with several landmarks on their way. Scores are compared with
 * their chunks, a total order, so the picks do not depend on who scanned what.
 * Thread: the engine's. Owns nothing. Private to cuda/. */
#ifndef ENGINE_CUDA_RETRIEVE_ROWS_CUH
#define ENGINE_CUDA_RETRIEVE_ROWS_CUH

#include "engine/cuda/retrieve.cuh"

#define SCAN_WARPS 8
#define SCAN_AHEAD 4 /* landmarks that a warp reads together; divides OPS_LANDMARK_BLOCK */

/* What makes a score a plain product of a query and a landmark. */
struct query_norm {
    const float *q, *k; /* both NULL without enable_lmk_norm */
    bool done;          /* the query is scaled already */
};

static inline struct query_norm query_norm_of(const struct ops_context *x,
                                              const struct ops_retrieval_weights *w, bool done)
{
    struct query_norm out = {NULL, NULL, done};
    if (x->config.landmark_norm && !done) {
        out.q = (const float *)w->q_norm.data;
        out.k = (const float *)w->k_norm.data;
    }
    return out;
}

/* What every element is multiplied by, apart from the norms' weights; `square`: a lane's share of
 * the query's. A warp. */
static __device__ __forceinline__ float cuda_query_scale(const struct query_norm &norm,
                                                         float square, uint32_t width)
{
    if (norm.done)
        return 1;
    const float scale = 1 / sqrtf((float)width);
    return norm.q ? scale / sqrtf(cuda_warp_sum(square) / (float)width + MODEL_MEMORY_EPSILON)
                  : scale;
}

static __device__ __forceinline__ float cuda_scaled(const struct query_norm &norm, float query,
                                                    float scale, uint32_t i)
{
    return query * (norm.q ? scale * norm.q[i] * norm.k[i] : scale);
}

/* A query of any width, element by element: each lane has those CUDA_WARP apart. */
struct plain_query {
    const float *from;
    struct query_norm norm;
    uint32_t width;
    float scale;

    __device__ __forceinline__ void prepare(const float *query, uint32_t size,
                                            const struct query_norm &how)
    {
        float square = 0;
        for (uint32_t i = threadIdx.x % CUDA_WARP; how.q && i < size; i += CUDA_WARP)
            square = fmaf(query[i], query[i], square);
        from = query;
        norm = how;
        width = size;
        scale = cuda_query_scale(how, square, size);
    }
    __device__ __forceinline__ float at(uint32_t i) const
    {
        return cuda_scaled(norm, from[i], scale, i);
    }
};

/* A lane's part of a query, LOADS times EACH neighbours. */
template <int LOADS, int EACH> struct wide_query {
    float q[LOADS][EACH];

    static __device__ __forceinline__ uint32_t place(int load)
    {
        return (load * CUDA_WARP + threadIdx.x % CUDA_WARP) * EACH;
    }
    __device__ __forceinline__ void prepare(const float *query, uint32_t width,
                                            const struct query_norm &norm)
    {
        float square = 0;
#pragma unroll
        for (int j = 0; j < LOADS; j++)
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                q[j][e] = query[place(j) + e];
                square = fmaf(q[j][e], q[j][e], square);
            }
        const float scale = cuda_query_scale(norm, square, width);
#pragma unroll
        for (int j = 0; j < LOADS; j++)
#pragma unroll
            for (int e = 0; e < EACH; e++)
                q[j][e] = cuda_scaled(norm, q[j][e], scale, place(j) + e);
    }
};

/* The best `s.topk` of every block. LANDMARKS has a `query`, and of SCAN_AHEAD landmarks at a time
 * fetch(), which may run before the kernel in front has ended (it writes none), and score(). Grid:
 * blocks of a row x rows x heads. */
template <typename LANDMARKS>
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
    uint64_t chunk = (uint64_t)(blockIdx.x * SCAN_WARPS + warp) * SCAN_AHEAD;
    LANDMARKS landmarks;
    if (chunk < seen) /* a block of landmarks is whole, whatever is in it */
        landmarks.fetch(s, segment, chunk, h);
    if (early)
        cuda_depend_wait();
    landmarks.query.prepare(query + (size_t)at.row * s.dim + (size_t)h * s.width, s.width, norm);
    for (; chunk < seen; chunk += stride) {
        float scores[SCAN_AHEAD];
        landmarks.score(scores);
        if (chunk + stride < seen)
            landmarks.fetch(s, segment, chunk + stride, h);
        cuda_keep_scores<SCAN_AHEAD>(best, s.topk, scores, chunk, seen, &worst);
    }
    __syncthreads();
    if (warp == 0)
        cuda_merge_warps<SCAN_WARPS>(
            lists, s.topk,
            candidates + (((size_t)blockIdx.y * s.heads + h) * gridDim.x + blockIdx.x) * s.topk);
}

template <typename LANDMARKS>
static void launch_scan_rows(struct ops_context *x, const struct scan_shape &s,
                             const struct cuda_segment *segments, const struct scan_row *rows,
                             uint32_t row_count, uint32_t blocks, const struct query_norm &norm,
                             struct cuda_candidate *candidates)
{
    /* What is under way to a multiprocessor lies in its first cache, which is small as long as blocks
     * are there that want the most shared memory: see CUDA_SPARE_SHARED. */
    x->apart |= x->spares && row_count == 1;
    CUDA_LAUNCH_EARLY(x, scan_rows<LANDMARKS>, dim3(blocks, row_count, s.heads),
                      dim3(SCAN_WARPS * CUDA_WARP), sizeof *candidates * SCAN_WARPS * s.topk, s,
                      segments, rows, x->query, norm, candidates, x->early && x->recording);
}

#endif
