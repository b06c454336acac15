/* retrieve.cuh - what the forms of retrieval share: which chunks a row sees, which of two is the
 * better pick, what picks weigh.
 * Thread: the engine's. Owns nothing. Private to cuda/. */
#ifndef ENGINE_CUDA_RETRIEVE_CUH
#define ENGINE_CUDA_RETRIEVE_CUH

#include "engine/cuda/cuda.h"
#include "engine/cuda/device.cuh"

struct scan_shape {
    uint32_t heads, width, topk, dim, tokens; /* Hr, r / Hr, K, r, S */
    uint64_t hidden;                          /* positions that mask_slide_window takes off */
};

static inline struct scan_shape scan_shape_of(const struct model_config *c)
{
    struct scan_shape s;
    s.heads = c->retrieval_heads;
    s.width = c->retrieval_dim / c->retrieval_heads;
    s.topk = c->topk;
    s.dim = c->retrieval_dim;
    s.tokens = c->chunk_tokens;
    s.hidden = c->mask_slide_window ? c->slide_window - c->chunk_tokens : 0;
    return s;
}

/* Chunks of `count` that a row at `position` sees. */
static __host__ __device__ __forceinline__ uint64_t visible(const struct scan_shape &s,
                                                            uint64_t position, uint64_t count)
{
    const uint64_t seen = (position > s.hidden ? position - s.hidden : 0) / s.tokens;
    return seen < count ? seen : count;
}

/* A total order: equal scores go by the chunk. */
static __device__ __forceinline__ bool before(const struct cuda_candidate &a,
                                              const struct cuda_candidate &b)
{
    return a.score > b.score || (a.score == b.score && a.chunk < b.chunk);
}

static __device__ __forceinline__ struct cuda_candidate no_candidate(void)
{
    struct cuda_candidate none;
    none.score = -INFINITY;
    none.chunk = CUDA_NO_CHUNK;
    return none;
}

struct weighing {
    bool softmax;
    float pos_decay;
};

/* The `found` best, best first, become picks, newest first, with their weights. One warp; both
 * arrays in shared memory. */
static __device__ __forceinline__ void weigh(const struct weighing &w, uint32_t topk,
                                             uint32_t found, const struct cuda_candidate *best,
                                             struct cuda_candidate *ordered, uint64_t *chunks,
                                             float *out)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP;
    for (uint32_t i = lane; i < found; i += CUDA_WARP) {
        uint32_t newer = 0;
        for (uint32_t j = 0; j < found; j++)
            newer += best[j].chunk > best[i].chunk;
        ordered[newer] = best[i];
    }
    __syncwarp();
    for (uint32_t i = lane; i < topk; i += CUDA_WARP)
        chunks[i] = i < found ? ordered[i].chunk : 0;
    if (lane)
        return;
    float spent = 0, top = -INFINITY, shares[LIMITS_TOPK];
    if (w.softmax) {
        for (uint32_t j = 0; j < found; j++)
            top = fmaxf(top, ordered[j].score + w.pos_decay * (float)j);
        for (uint32_t j = 0; j < found; j++) {
            shares[j] = expf(ordered[j].score + w.pos_decay * (float)j - top);
            spent += shares[j];
        }
        for (uint32_t j = 0; j < found; j++)
            shares[j] /= spent;
    } else {
        for (uint32_t j = 0; j < found; j++) {
            spent += cuda_softplus(ordered[j].score);
            shares[j] = expf(ordered[j].score - spent);
        }
    }
    for (uint32_t j = 0; j < topk; j++)
        out[j] = j < found ? shares[j] : 0;
}

/* A row of a short segment. */
struct scan_row {
    uint32_t row, segment;
};

/* Picks of `row_count` rows, each by itself, from x->query as the product left it. `rows` NULL:
 * row i is all of segment i. */
void cuda_retrieve_rows(struct ops_context *context, const struct ops_retrieval_weights *weights,
                        const struct cuda_segment *segments, const struct scan_row *rows,
                        uint32_t row_count, struct cuda_candidate *candidates, uint64_t *chunks,
                        float *shares);
/* How many candidates that takes room for. */
size_t cuda_retrieve_room(const struct ops_context *context, uint32_t row_count);

/* ---- retrieve.cu ---- */

/* The best of each row's and head's `count` candidates become the picks of the rows from `row` on.
 */
void cuda_merge_rows(struct ops_context *context, const struct ops_retrieval_weights *weights,
                     const struct cuda_candidate *candidates, size_t row, uint32_t row_count,
                     uint32_t count);

/* ---- retrieve_scan.cu ---- */

#define CUDA_SCAN_LIST 8
/* The scan of long segments on tensor cores covers this form. */
bool cuda_scans_rows(const struct ops_context *context);
/* How many lists of CUDA_SCAN_LIST candidates each row and head of a long segment gets, whose rows
 * see at most `seen` chunks. */
uint32_t cuda_scan_lists(const struct ops_context *context, uint32_t row_count, uint64_t seen);
/* The best of every list, for each row of one segment (on the device, as `host` says), from
 * x->query_narrow to candidates [rows, Hr, lists, CUDA_SCAN_LIST], the segment's first row first.
 */
void cuda_scan_rows(struct ops_context *context, const struct cuda_segment *segment,
                    const struct ops_segment *host, uint32_t lists,
                    struct cuda_candidate *candidates);

#endif
