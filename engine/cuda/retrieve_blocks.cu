/* retrieve_blocks.cu - the scan over the landmarks for segments of many rows on Hopper (wgmma): 128
 * queries, two warpgroups with 64 each, by a block of landmarks at a time; a third warpgroup only
 * fetches. Scores go from registers through shared memory of their warp to the best of each row,
 * and never further. For bf16 and at most CUDA_SCAN_LIST picks, as retrieve_scan.cu. */
#include "engine/cuda/retrieve.cuh"
#include "engine/cuda/wgmma.cuh"

#define QUERIES (2 * WGMMA_ROWS)
#define LANDMARKS OPS_LANDMARK_BLOCK
#define GROUP WGMMA_GROUP
#define THREADS (3 * GROUP)
#define STAGES 3
#define STAGE ((QUERIES + LANDMARKS) * WGMMA_DEPTH) /* elements */
#define AHEAD 1 /* steps under way when the fetchers wait for one */
#define WARP_ROWS 16
#define PARTS 2          /* lists of a row */
#define RANKED 128       /* landmarks whose scores lie in shared memory at once */
#define SCORE_STRIDE 140 /* few conflicts for pairs in columns, none for fours in rows */

static_assert(LANDMARKS == WGMMA_COLUMNS, "a product has the landmarks of a block");

struct scan_blocks {
    struct scan_shape shape;
    const struct cuda_segment *segment;
    const bf16 *queries;
    struct cuda_candidate *candidates;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)

/* `rows` rows of a slab to shared memory, those from `count` on zeros. A warpgroup. */
template <uint32_t rows>
static __device__ __forceinline__ void fetch_rows(bf16 *to, const bf16 *from, uint32_t stride,
                                                  uint32_t count)
{
    constexpr uint32_t units = WGMMA_DEPTH / 8, step = GROUP / units;
    const uint32_t own = threadIdx.x % GROUP, unit = own % units;
#pragma unroll 8
    for (uint32_t row = own / units; row < rows; row += step)
        cuda_copy_async(to + cuda_swizzled<WGMMA_DEPTH>(row, unit * 8),
                        from + (size_t)(row < count ? row : 0) * stride + unit * 8, row < count);
}

/* What this thread copied can be read by wgmma. */
static __device__ __forceinline__ void hand_over(uint64_t *full)
{
    wgmma_hand_over();
    cuda_barrier_arrive(full);
}

/* The warpgroup that fetches: for each of the split's blocks the slabs of the depth, queries and
 * landmarks. */
static __device__ __forceinline__ void fetch_steps(const struct scan_blocks &p,
                                                   const struct cuda_segment &segment, uint32_t row,
                                                   uint32_t blocks, bf16 *stages, uint64_t *full,
                                                   uint64_t *empty)
{
    const struct scan_shape &s = p.shape;
    const uint32_t slabs = s.width / WGMMA_DEPTH, h = blockIdx.z;
    const bf16 *queries = p.queries + (size_t)(segment.row + row) * s.dim + (size_t)h * s.width;
    uint32_t step = 0;
    for (uint32_t i = 0; i < blocks; i++) {
        const uint32_t block = blockIdx.y + i * gridDim.y;
        const bf16 *marks = (const bf16 *)segment.blocks[block] + (size_t)h * s.width;
        const uint64_t left = segment.chunk_count - (uint64_t)block * LANDMARKS;
        for (uint32_t slab = 0; slab < slabs; slab++, step++) {
            const uint32_t slot = step % STAGES;
            bf16 *to = stages + slot * STAGE;
            cuda_barrier_wait(empty + slot, step / STAGES % 2 ^ 1);
            fetch_rows<QUERIES>(to, queries + slab * WGMMA_DEPTH, s.dim, segment.count - row);
            fetch_rows<LANDMARKS>(to + QUERIES * WGMMA_DEPTH, marks + slab * WGMMA_DEPTH, s.dim,
                                  left < LANDMARKS ? (uint32_t)left : LANDMARKS);
            cuda_copy_commit();
            if (step >= AHEAD) {
                cuda_copy_wait<AHEAD>();
                hand_over(full + (step - AHEAD) % STAGES);
            }
        }
    }
    cuda_copy_wait<0>();
    for (uint32_t i = step > AHEAD ? step - AHEAD : 0; i < step; i++)
        hand_over(full + i % STAGES);
}

/* Which of 32 scores are above `least`, a bit each. Looked for first and put into the lists then:
 * lanes find theirs at different places, and insert them together. */
static __device__ __forceinline__ uint32_t better_of(const float *scores, float least)
{
    uint32_t better = 0;
#pragma unroll
    for (uint32_t i = 0; i < 32; i += 4) {
        const float4 v = *reinterpret_cast<const float4 *>(scores + i);
        better |= (uint32_t)(v.x > least) << i | (uint32_t)(v.y > least) << (i + 1) |
                  (uint32_t)(v.z > least) << (i + 2) | (uint32_t)(v.w > least) << (i + 3);
    }
    return better;
}

/* A warp's scores of half a block, of which d has 8 j + 2 (lane % 4) + i % 2 at 4 j + i, to its
 * rows' lists: a lane has a row and half of the columns, `there` of which are visible. */
static __device__ __forceinline__ void rank(float *scores, const float *d, uint32_t chunk,
                                            uint64_t seen, struct scan_list *list)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, part = lane / WARP_ROWS;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < RANKED / 8; j++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            *reinterpret_cast<float2 *>(scores + (lane / 4 + half * 8) * SCORE_STRIDE + j * 8 +
                                        lane % 4 * 2) =
                float2{d[4 * j + 2 * half], d[4 * j + 2 * half + 1]};
    __syncwarp();
    const float *from = scores + lane % WARP_ROWS * SCORE_STRIDE + part * (RANKED / PARTS);
    chunk += part * (RANKED / PARTS);
    for (uint32_t i = 0; i < RANKED / PARTS; i += 32) {
        uint32_t better = better_of(from + i, list->scores[CUDA_SCAN_LIST - 1]);
        if (chunk + i + 32 > seen)
            better &= chunk + i < seen ? (1u << (uint32_t)(seen - chunk - i)) - 1 : 0;
        for (; better; better &= better - 1) {
            const uint32_t at = i + __ffs((int)better) - 1;
            if (from[at] > list->scores[CUDA_SCAN_LIST - 1])
                cuda_scan_insert(list, from[at], chunk + at);
        }
    }
}

static __device__ __forceinline__ void scan_steps(const struct scan_blocks &p, uint32_t blocks,
                                                  uint64_t seen, const bf16 *stages, uint64_t *full,
                                                  uint64_t *empty, float *scores,
                                                  struct scan_list *list)
{
    const uint32_t slabs = p.shape.width / WGMMA_DEPTH, group = threadIdx.x / GROUP;
    const bool first = threadIdx.x % GROUP == 0;
    uint32_t step = 0;
    for (uint32_t i = 0; i < blocks; i++) {
        float d[WGMMA_COLUMNS / 2];
        for (uint32_t slab = 0; slab < slabs; slab++, step++) {
            const uint32_t slot = step % STAGES;
            const bf16 *stage = stages + slot * STAGE;
            cuda_barrier_wait(full + slot, step / STAGES % 2);
            wgmma_step(d, stage + group * WGMMA_ROWS * WGMMA_DEPTH, stage + QUERIES * WGMMA_DEPTH,
                       !slab);
            if (slab) { /* the step before this one is done with its stage */
                wgmma_wait<1>();
                if (first)
                    cuda_barrier_arrive(empty + (step - 1) % STAGES);
            }
        }
        wgmma_wait<0>();
        if (first)
            cuda_barrier_arrive(empty + (step - 1) % STAGES);
        const uint32_t chunk = (blockIdx.y + i * gridDim.y) * LANDMARKS;
        rank(scores, d, chunk, seen, list);
        rank(scores, d + WGMMA_COLUMNS / 4, chunk + RANKED, seen, list);
    }
}

/* Every gridDim.y-th block of landmarks against QUERIES rows of a segment. Grid: tiles of rows, the
 * last ones (which see most) first, x splits x heads. */
static __global__ void __launch_bounds__(THREADS, 1) scan_blocks_rows(struct scan_blocks p)
{
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ uint64_t full[STAGES], empty[STAGES];
    const uint32_t base = (uint32_t)__cvta_generic_to_shared(shared);
    bf16 *stages = reinterpret_cast<bf16 *>(shared + (WGMMA_ATOM - base % WGMMA_ATOM) % WGMMA_ATOM);
    const struct scan_shape &s = p.shape;
    const struct cuda_segment segment = *p.segment;
    const uint32_t row = (gridDim.x - 1 - blockIdx.x) * QUERIES, h = blockIdx.z;
    const uint32_t row_count = min(segment.count - row, QUERIES);
    const uint64_t last = visible(s, segment.position + row + row_count - 1, segment.chunk_count);
    const uint32_t all = (uint32_t)((last + LANDMARKS - 1) / LANDMARKS);
    const uint32_t blocks = all > blockIdx.y ? (all - blockIdx.y - 1) / gridDim.y + 1 : 0;
    if (threadIdx.x < STAGES) {
        cuda_barrier_init(full + threadIdx.x, GROUP);
        cuda_barrier_init(empty + threadIdx.x, 2);
    }
    __syncthreads();
    if (threadIdx.x >= 2 * GROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        fetch_steps(p, segment, row, blocks, stages, full, empty);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const uint32_t own = warp * WARP_ROWS + lane % WARP_ROWS;
    float *scores =
        reinterpret_cast<float *>(stages + STAGES * STAGE) + warp * WARP_ROWS * SCORE_STRIDE;
    struct scan_list list;
    cuda_scan_clear(&list);
    scan_steps(p, blocks, visible(s, segment.position + row + own, segment.chunk_count), stages,
               full, empty, scores, &list);
    if (own < row_count)
        cuda_scan_store(p.candidates, s.heads, gridDim.y * PARTS, row + own, h,
                        blockIdx.y * PARTS + lane / WARP_ROWS, list);
}

#else

static __global__ void scan_blocks_rows(struct scan_blocks)
{
    __trap();
}

#endif

bool cuda_scan_blocks(struct ops_context *x, const struct cuda_segment *segment,
                      const struct ops_segment *host, uint32_t lists,
                      struct cuda_candidate *candidates)
{
    const size_t bytes =
        STAGES * STAGE * sizeof(bf16) + WGMMA_ATOM + QUERIES * SCORE_STRIDE * sizeof(float);
    if (!x->hopper)
        return false;
    const struct scan_blocks p = {scan_shape_of(&x->config), segment, (const bf16 *)x->query_narrow,
                                  candidates};
    CUDA_ALLOW_SHARED(x, scan_blocks_rows, bytes);
    CUDA_LAUNCH(x, scan_blocks_rows,
                dim3(cuda_ceil(host->count, QUERIES), lists / PARTS, p.shape.heads), dim3(THREADS),
                bytes, p);
    return true;
}
