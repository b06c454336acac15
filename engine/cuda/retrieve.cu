/* retrieve.cu - retrieval's entry, and long segments: the scan over the landmarks with a running
 * top-k: scores live in registers and never reach memory, on tensor cores where these can
 * (retrieve_scan.cu). Short ones: retrieve_step.cu. Every
 * scanner keeps its own best; a second kernel merges them, orders the picks and weighs them. Scores
 * are compared with their chunks (equal scores: the lower chunk), a total order, so the picks do
 * not depend on who scanned what. */
#include <stdlib.h>
#include <string.h>

#include "engine/cuda/retrieve.cuh"

#define SCAN_WARPS 8
#define SCAN_ROWS 8   /* rows of one segment that share a landmark as it is read */
#define SCANNERS 4096 /* warps over a whole call, about: enough to fill a large GPU */
#define MERGE_WARPS 4

/* Rows [row, row + count) of one segment. */
struct group {
    uint32_t segment, row, count;
};

/* Normalised and scaled queries, so that a score is a plain product. A warp a head. */
static __global__ void prepare_queries(float *q, bf16 *narrow, const float *q_norm,
                                       const float *k_norm, uint32_t width, size_t count)
{
    const size_t head = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / CUDA_WARP;
    const uint32_t lane = threadIdx.x % CUDA_WARP;
    if (head >= count)
        return;
    float *row = q + head * width, scale = 1 / sqrtf((float)width);
    if (q_norm) {
        float sum = 0;
        for (uint32_t i = lane; i < width; i += CUDA_WARP)
            sum = fmaf(row[i], row[i], sum);
        scale /= sqrtf(cuda_warp_sum(sum) / (float)width + MODEL_MEMORY_EPSILON);
    }
    for (uint32_t i = lane; i < width; i += CUDA_WARP) {
        const float value = row[i] * scale * (q_norm ? q_norm[i] * k_norm[i] : 1);
        row[i] = value;
        if (narrow)
            narrow[head * width + i] = cuda_bf16(value);
    }
}

/* A warp scores every `scanners`-th landmark for a group of rows and keeps the best of each row in
 * shared memory, in order. Grid: scanners / SCAN_WARPS x groups x heads. */
template <typename T>
static __global__ void __launch_bounds__(SCAN_WARPS *CUDA_WARP)
    scan(struct scan_shape s, const struct cuda_segment *segments, const struct group *groups,
         const float *q, struct cuda_candidate *candidates)
{
    CUDA_SHARED(struct cuda_candidate, shared);
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const uint32_t h = blockIdx.z, scanner = blockIdx.x * SCAN_WARPS + warp;
    const uint32_t scanners = gridDim.x * SCAN_WARPS;
    const struct group group = groups[blockIdx.y];
    const struct cuda_segment segment = segments[group.segment];
    struct cuda_candidate *best = shared + (size_t)warp * SCAN_ROWS * s.topk;
    for (uint32_t i = lane; i < SCAN_ROWS * s.topk; i += CUDA_WARP)
        best[i] = no_candidate();
    __syncwarp();
    const uint64_t position = segment.position + (group.row - segment.row);
    const uint64_t last = visible(s, position + group.count - 1, segment.chunk_count);
    /* What lane `r` needs for row r. */
    const uint64_t seen = visible(s, position + lane, segment.chunk_count);
    struct cuda_candidate *own = best + (lane < SCAN_ROWS ? lane : 0) * s.topk;
    const float *queries = q + (size_t)group.row * s.dim + (size_t)h * s.width;
    for (uint64_t chunk = scanner; chunk < last; chunk += scanners) {
        const T *landmark = (const T *)segment.blocks[chunk / OPS_LANDMARK_BLOCK] +
                            chunk % OPS_LANDMARK_BLOCK * s.dim + (size_t)h * s.width;
        float sums[SCAN_ROWS] = {};
        for (uint32_t i = lane; i < s.width; i += CUDA_WARP) {
            const float m = cuda_float(landmark[i]);
#pragma unroll
            for (uint32_t r = 0; r < SCAN_ROWS; r++)
                if (r < group.count)
                    sums[r] = fmaf(queries[(size_t)r * s.dim + i], m, sums[r]);
        }
        struct cuda_candidate found;
        found.chunk = (uint32_t)chunk;
        found.score = 0;
#pragma unroll
        for (uint32_t r = 0; r < SCAN_ROWS; r++) {
            const float sum = cuda_warp_sum(sums[r]);
            found.score = lane == r ? sum : found.score;
        }
        if (lane < group.count && chunk < seen && before(found, own[s.topk - 1]))
            cuda_insert(own, s.topk, found);
    }
    __syncwarp();
    for (uint32_t i = lane; i < group.count * s.topk; i += CUDA_WARP) {
        const size_t row = group.row + i / s.topk;
        candidates[((row * s.heads + h) * scanners + scanner) * s.topk + i % s.topk] = best[i];
    }
}

/* The best of one row and head among `count` candidates, newest first, with their weights. A warp.
 * Each round finds the best of those behind the one before it. */
static __global__ void __launch_bounds__(MERGE_WARPS *CUDA_WARP)
    merge(uint32_t topk, uint32_t count, size_t rows, struct weighing w,
          const struct cuda_candidate *candidates, uint64_t *chunks, float *weights)
{
    __shared__ struct cuda_candidate shared[MERGE_WARPS][LIMITS_TOPK];
    __shared__ struct cuda_candidate ordered[MERGE_WARPS][LIMITS_TOPK];
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const size_t row = (size_t)blockIdx.x * MERGE_WARPS + warp;
    if (row >= rows)
        return;
    const struct cuda_candidate *from = candidates + row * count;
    struct cuda_candidate last = no_candidate();
    uint32_t found = 0;
    for (; found < topk; found++) {
        struct cuda_candidate best = no_candidate();
        for (uint32_t i = lane; i < count; i += CUDA_WARP) {
            const struct cuda_candidate c = from[i];
            if (c.chunk != CUDA_NO_CHUNK && (found == 0 || before(last, c)) && before(c, best))
                best = c;
        }
        last = cuda_warp_best(best);
        if (last.chunk == CUDA_NO_CHUNK)
            break;
        if (lane == 0)
            shared[warp][found] = last;
    }
    __syncwarp();
    weigh(w, topk, found, shared[warp], ordered[warp], chunks + row * topk, weights + row * topk);
}

/* ---- the host's side ---- */

bool cuda_reserve_candidates(struct ops_context *x, size_t count)
{
    if (count <= x->candidate_capacity)
        return true;
    cuda_give(x, x->candidates);
    x->candidates = (struct cuda_candidate *)cuda_take(x, count * sizeof *x->candidates);
    x->candidate_capacity = x->candidates ? count : 0;
    if (!x->candidates)
        cuda_fail(x, STATUS_NO_MEMORY, "out of GPU memory for %zu candidates of retrieval", count);
    return x->candidates;
}

/* Landmark blocks as a device array, staged. */
const void *const *cuda_stage_blocks(struct ops_context *x, const struct ops_landmarks *landmarks)
{
    const uint64_t blocks = (landmarks->count + OPS_LANDMARK_BLOCK - 1) / OPS_LANDMARK_BLOCK;
    ASSERT(landmarks->count < CUDA_NO_CHUNK);
    return blocks ? (const void *const *)cuda_stage(x, landmarks->blocks,
                                                    blocks * sizeof *landmarks->blocks)
                  : NULL;
}

const void *const *cuda_stage_narrow(struct ops_context *x, const struct ops_landmarks *landmarks)
{
    const uint64_t blocks = (landmarks->count + OPS_LANDMARK_BLOCK - 1) / OPS_LANDMARK_BLOCK;
    return blocks && x->fp8 ? (const void *const *)cuda_stage(x, landmarks->narrow,
                                                              blocks * sizeof *landmarks->narrow)
                            : NULL;
}

/* Rows of each long segment in groups of SCAN_ROWS, staged; `*longest`: most visible chunks of a
 * row. */
static const struct group *stage_groups(struct ops_context *x, const struct ops_rows *rows,
                                        const struct ops_landmarks *landmarks, uint32_t *count,
                                        uint64_t *longest)
{
    const struct scan_shape s = scan_shape_of(&x->config);
    struct group *groups = (struct group *)malloc(sizeof *groups * (rows->row_count + 1));
    *count = 0;
    *longest = 0;
    if (!groups) {
        cuda_fail(x, STATUS_NO_MEMORY, "out of memory for a step's rows");
        return NULL;
    }
    for (uint32_t i = 0; i < rows->segment_count; i++) {
        const struct ops_segment *segment = &rows->segments[i];
        if (segment->count <= CUDA_FEW_ROWS)
            continue;
        const uint64_t seen =
            visible(s, segment->position + segment->count - 1, landmarks[i].count);
        *longest = seen > *longest ? seen : *longest;
        for (uint32_t t = 0; t < segment->count; t += SCAN_ROWS) {
            const uint32_t left = segment->count - t;
            groups[(*count)++] =
                (struct group){i, segment->row + t, left < SCAN_ROWS ? left : SCAN_ROWS};
        }
    }
    const struct group *staged =
        *count ? (const struct group *)cuda_stage(x, groups, sizeof *groups * *count) : NULL;
    free(groups);
    return staged;
}

void cuda_merge_rows(struct ops_context *x, const struct ops_retrieval_weights *w,
                     const struct cuda_candidate *candidates, size_t row, uint32_t row_count,
                     uint32_t count)
{
    const struct model_config *c = &x->config;
    const size_t heads = (size_t)row_count * c->retrieval_heads;
    const size_t first = row * c->retrieval_heads * c->topk;
    const struct weighing weighing = {c->softmax_weights, w->pos_decay};
    CUDA_LAUNCH(x, merge, dim3(cuda_ceil(heads, MERGE_WARPS)), dim3(MERGE_WARPS * CUDA_WARP), 0,
                c->topk, count, heads, weighing, candidates, x->pick_chunks + first,
                x->pick_weights + first);
}

/* Long segments on tensor cores. */
static void scan_segments(struct ops_context *x, const struct ops_retrieval_weights *w,
                          const struct ops_rows *rows, const struct ops_landmarks *landmarks,
                          const struct cuda_segment *segments)
{
    const struct scan_shape s = scan_shape_of(&x->config);
    for (uint32_t i = 0; i < rows->segment_count; i++) {
        const struct ops_segment *host = &rows->segments[i];
        if (host->count <= CUDA_FEW_ROWS)
            continue;
        if (x->fp8) {
            cuda_scan_codes(x, w, segments + i, host, &landmarks[i]);
            continue;
        }
        const uint64_t seen = visible(s, host->position + host->count - 1, landmarks[i].count);
        const uint32_t lists = cuda_scan_lists(x, host->count, seen);
        if (!cuda_reserve_candidates(x, (size_t)host->count * s.heads * lists * CUDA_SCAN_LIST))
            return;
        cuda_scan_rows(x, segments + i, host, lists, x->candidates);
        cuda_merge_rows(x, w, x->candidates, host->row, host->count, lists * CUDA_SCAN_LIST);
    }
}

/* Long segments plainly. */
static void scan_groups(struct ops_context *x, const struct ops_retrieval_weights *w,
                        const struct ops_rows *rows, const struct group *groups,
                        uint32_t group_count, uint64_t longest, const struct cuda_segment *segments)
{
    const struct scan_shape s = scan_shape_of(&x->config);
    /* As many scanners as fill the device, but none with less than a few landmarks. */
    uint32_t blocks = cuda_ceil(SCANNERS / SCAN_WARPS, (uint64_t)group_count * s.heads);
    const uint32_t useful = cuda_ceil(longest ? longest : 1, SCAN_WARPS * 4);
    blocks = blocks < useful ? blocks : useful;
    const uint32_t each = blocks * SCAN_WARPS * s.topk;
    if (!cuda_reserve_candidates(x, (size_t)rows->row_count * s.heads * each))
        return;
    const dim3 grid(blocks, group_count, s.heads), block(SCAN_WARPS * CUDA_WARP);
    const size_t shared = sizeof(struct cuda_candidate) * SCAN_WARPS * SCAN_ROWS * s.topk;
    if (x->wide)
        CUDA_LAUNCH(x, scan<float>, grid, block, shared, s, segments, groups, x->query,
                    x->candidates);
    else
        CUDA_LAUNCH(x, scan<bf16>, grid, block, shared, s, segments, groups, x->query,
                    x->candidates);
    for (uint32_t i = 0; i < rows->segment_count; i++) {
        const struct ops_segment *host = &rows->segments[i];
        if (host->count > CUDA_FEW_ROWS)
            cuda_merge_rows(x, w, x->candidates + (size_t)host->row * s.heads * each, host->row,
                            host->count, each);
    }
}

static void scan_long(struct ops_context *x, const struct ops_retrieval_weights *w,
                      const struct ops_rows *rows, const struct ops_landmarks *landmarks,
                      const struct cuda_segment *segments)
{
    const struct scan_shape s = scan_shape_of(&x->config);
    const float *q_norm = x->config.landmark_norm ? (const float *)w->q_norm.data : NULL;
    const float *k_norm = x->config.landmark_norm ? (const float *)w->k_norm.data : NULL;
    const size_t row_heads = (size_t)rows->row_count * s.heads;
    uint32_t group_count = 0;
    uint64_t longest = 0;
    const struct group *groups = stage_groups(x, rows, landmarks, &group_count, &longest);
    if (x->failed || !group_count)
        return;
    CUDA_LAUNCH(x, prepare_queries, dim3(cuda_ceil(row_heads, 8)), dim3(8 * CUDA_WARP), 0, x->query,
                (bf16 *)x->query_narrow, q_norm, k_norm, s.width, row_heads);
    if (cuda_scans_rows(x))
        scan_segments(x, w, rows, landmarks, segments);
    else
        scan_groups(x, w, rows, groups, group_count, longest, segments);
}

/* Whether a segment's rows are scanned each by itself: short ones, and where landmarks are in fp8
 * all that the scan on tensor cores does not cover. */
static bool is_short(const struct ops_context *x, const struct ops_segment *segment)
{
    return segment->count <= CUDA_FEW_ROWS || (x->fp8 && !cuda_scans_rows(x));
}

/* Rows of short segments, each by itself. */
static void scan_short(struct ops_context *x, const struct ops_retrieval_weights *w,
                       const struct ops_rows *rows, const struct cuda_segment *segments)
{
    struct scan_row *own = (struct scan_row *)malloc(sizeof *own * (rows->row_count + 1));
    uint32_t count = 0;
    if (!own) {
        cuda_fail(x, STATUS_NO_MEMORY, "out of memory for a step's rows");
        return;
    }
    for (uint32_t i = 0; i < rows->segment_count; i++)
        for (uint32_t t = 0; is_short(x, &rows->segments[i]) && t < rows->segments[i].count; t++)
            own[count++] = (struct scan_row){rows->segments[i].row + t, i};
    if (count && cuda_reserve_candidates(x, cuda_retrieve_room(x, count))) {
        const struct scan_row *staged =
            (const struct scan_row *)cuda_stage(x, own, sizeof *own * count);
        cuda_retrieve_rows(x, w, segments, staged, count, x->candidates, x->pick_chunks,
                           x->pick_weights);
    }
    free(own);
}

/* The call's segments with their landmarks on the device; NULL after a failure. */
static const struct cuda_segment *stage_segments(struct ops_context *x, const struct ops_rows *rows,
                                                 const struct ops_landmarks *landmarks)
{
    struct cuda_segment *own = cuda_segments(x, rows);
    for (uint32_t i = 0; own && i < rows->segment_count; i++) {
        own[i].chunk_count = landmarks[i].count;
        own[i].blocks = cuda_stage_blocks(x, &landmarks[i]);
        own[i].narrow = cuda_stage_narrow(x, &landmarks[i]);
    }
    const struct cuda_segment *staged =
        own ? (const struct cuda_segment *)cuda_stage(x, own, sizeof *own * rows->segment_count)
            : NULL;
    free(own);
    return staged;
}

extern "C" void cuda_retrieve(struct ops_context *x, const struct ops_retrieval_weights *w,
                              const struct ops_rows *rows, const struct ops_landmarks *landmarks,
                              const float *hidden, struct ops_picks *picks)
{
    const struct model_config *c = &x->config;
    const size_t count = (size_t)rows->row_count * c->retrieval_heads * c->topk;
    const struct cuda_input in = {hidden, &w->pre_norm, MODEL_MEMORY_EPSILON, NULL, false};
    if (x->recording) {
        cuda_step_flush(x);
        cuda_norm_linear(x, &in, &w->query, NULL, rows, x->query, false);
        cuda_step_retrieve(x, w, picks);
        return;
    }
    cuda_begin(x);
    cuda_norm_linear(x, &in, &w->query, NULL, rows, x->query, false);
    const struct cuda_segment *segments = stage_segments(x, rows, landmarks);
    if (segments) {
        scan_short(x, w, rows, segments);
        if (!x->fp8 || cuda_scans_rows(x))
            scan_long(x, w, rows, landmarks, segments);
    }
    cuda_mark_picks(x, rows, landmarks);
    cuda_copy_out(x, picks->chunks, x->pick_chunks, count * sizeof *picks->chunks);
    cuda_copy_out(x, picks->weights, x->pick_weights, count * sizeof *picks->weights);
    cuda_wait(x);
    if (x->failed) { /* nothing is read for picks that do not exist */
        memset(picks->chunks, 0, count * sizeof *picks->chunks);
        memset(picks->weights, 0, count * sizeof *picks->weights);
    }
}
