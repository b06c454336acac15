/* retrieve_step.cu - retrieval for single rows: the scan of retrieve_rows.cuh over landmarks as
 * they are, at the speed of memory, then a merge. In fp8: retrieve_fp8.cu. */
#include "engine/cuda/ending.cuh"
#include "engine/cuda/retrieve_rows.cuh"

#define MERGE_THREADS 256
#define SCAN_BLOCKS MERGE_THREADS /* of a row and head at most: the merge has a thread for each */

template <typename T>
static __device__ __forceinline__ const T *landmark_of(const struct scan_shape &s,
                                                       const struct cuda_segment &segment,
                                                       uint64_t chunk, uint32_t head)
{
    return (const T *)segment.blocks[chunk / OPS_LANDMARK_BLOCK] +
           chunk % OPS_LANDMARK_BLOCK * s.dim + (size_t)head * s.width;
}

/* Of LOADS * 8 * CUDA_WARP elements of bf16. */
template <int LOADS> struct wide_landmarks {
    struct wide_query<LOADS, 8> query;
    uint4 ahead[SCAN_AHEAD][LOADS];

    __device__ __forceinline__ void fetch(const struct scan_shape &s,
                                          const struct cuda_segment &segment, uint64_t chunk,
                                          uint32_t head)
    {
        const bf16 *from = landmark_of<bf16>(s, segment, chunk, head);
#pragma unroll
        for (int i = 0; i < SCAN_AHEAD; i++)
#pragma unroll
            for (int j = 0; j < LOADS; j++)
                ahead[i][j] = cuda_stream16(from + (size_t)i * s.dim + query.place(j));
    }
    __device__ __forceinline__ void score(float out[SCAN_AHEAD]) const
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
                    sum = fmaf(query.q[j][2 * e], cuda_first(words[e]), sum);
                    sum = fmaf(query.q[j][2 * e + 1], cuda_second(words[e]), sum);
                }
            }
            out[i] = cuda_warp_sum(sum);
        }
    }
};

/* Of any width and type. */
template <typename T> struct plain_landmarks {
    struct plain_query query;
    const T *from;
    uint32_t dim;

    __device__ __forceinline__ void fetch(const struct scan_shape &s,
                                          const struct cuda_segment &segment, uint64_t chunk,
                                          uint32_t head)
    {
        from = landmark_of<T>(s, segment, chunk, head);
        dim = s.dim;
    }
    __device__ __forceinline__ void score(float out[SCAN_AHEAD]) const
    {
        for (uint32_t i = 0; i < SCAN_AHEAD; i++) {
            float sum = 0;
            for (uint32_t e = threadIdx.x % CUDA_WARP; e < query.width; e += CUDA_WARP)
                sum = fmaf(query.at(e), cuda_float(from[(size_t)i * dim + e]), sum);
            out[i] = cuda_warp_sum(sum);
        }
    }
};

/* The best of a row and head: a thread follows the list of each block. Grid: rows x heads. */
static __global__ void __launch_bounds__(MERGE_THREADS)
    merge_rows(uint32_t heads, uint32_t topk, uint32_t blocks, struct weighing w,
               const struct scan_row *rows, const struct cuda_candidate *candidates,
               uint64_t *chunks, float *shares, struct cuda_ending ending)
{
    __shared__ struct cuda_candidate winners[MERGE_THREADS / CUDA_WARP], best[LIMITS_TOPK],
        ordered[LIMITS_TOPK];
    cuda_depend_release();
    cuda_depend_wait();
    const uint32_t found = cuda_merge_lists<MERGE_THREADS>(
        candidates + ((size_t)blockIdx.x * heads + blockIdx.y) * blocks * topk, topk, blocks,
        winners, best);
    const size_t row = (size_t)cuda_row_of(rows, blockIdx.x).row * heads + blockIdx.y;
    if (threadIdx.x / CUDA_WARP)
        return;
    weigh(w, topk, found, best, ordered, chunks + row * topk, shares + row * topk);
    __syncwarp();
    if (threadIdx.x == 0)
        cuda_tell_end(ending);
}

/* Blocks of a row and head: some two a multiprocessor together, which evens out rows of different
 * lengths; a row alone has one on each, which is all that a multiprocessor holds of the widest
 * form, whose loads under way are as many as memory needs. */
static uint32_t blocks_of(const struct ops_context *x, uint32_t row_count)
{
    const uint32_t all = row_count * x->config.retrieval_heads;
    const uint32_t most = (uint32_t)x->multiprocessors;
    const uint32_t blocks = all == 1 && !x->fp8 ? most : cuda_ceil(2 * most, all ? all : 1);
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
    if (x->fp8) {
        cuda_retrieve_codes(x, weights, segments, rows, row_count, blocks, candidates, chunks,
                            shares);
        return;
    }
    const struct query_norm norm = query_norm_of(x, weights, false);
    const auto scan = x->wide                             ? launch_scan_rows<plain_landmarks<float>>
                      : s.width == 1024 && s.dim % 8 == 0 ? launch_scan_rows<wide_landmarks<4>>
                      : s.width == 512                    ? launch_scan_rows<wide_landmarks<2>>
                      : s.width == 256                    ? launch_scan_rows<wide_landmarks<1>>
                                                          : launch_scan_rows<plain_landmarks<bf16>>;
    scan(x, s, segments, rows, row_count, blocks, norm, candidates);
    const struct weighing w = {x->config.softmax_weights, weights->pos_decay};
    const bool alone = x->recording && row_count * s.heads == 1;
    const struct cuda_ending ending = alone ? cuda_step_ending(x) : cuda_ending{NULL, NULL};
    CUDA_LAUNCH_EARLY(x, merge_rows, dim3(row_count, s.heads), dim3(MERGE_THREADS), 0, s.heads,
                      s.topk, blocks, w, rows, candidates, chunks, shares, ending);
}
