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

/* The best of the lanes' candidates, whose scores are numbers. */
static __device__ __forceinline__ struct cuda_candidate cuda_warp_best(struct cuda_candidate best)
{
    const uint32_t order = cuda_order_of(best.score + 0.0f); /* minus zero equals zero */
    const uint32_t top = __reduce_max_sync(CUDA_ALL_LANES, order);
    best.chunk = __reduce_min_sync(CUDA_ALL_LANES, order == top ? best.chunk : CUDA_NO_CHUNK);
    best.score = __uint_as_float(top >> 31 ? top & 0x7fffffffu : ~top);
    return best;
}

/* Puts a candidate into a list of `length` in order, where it is better than the last one. */
static __device__ __forceinline__ void cuda_insert(struct cuda_candidate *list, uint32_t length,
                                                   const struct cuda_candidate &found)
{
    uint32_t at = length - 1;
    for (; at && before(found, list[at - 1]); at--)
        list[at] = list[at - 1];
    list[at] = found;
}

/* Scores of `N` chunks from `chunk` on, of those below `seen`, the same in all lanes, to a warp's
 * list in shared memory, whose last one is `worst`. */
template <int N>
static __device__ __forceinline__ void cuda_keep_scores(struct cuda_candidate *list,
                                                        uint32_t length, const float scores[N],
                                                        uint64_t chunk, uint64_t seen,
                                                        struct cuda_candidate *worst)
{
#pragma unroll
    for (uint32_t i = 0; i < N; i++) {
        struct cuda_candidate found;
        found.score = scores[i];
        found.chunk = (uint32_t)(chunk + i);
        if (chunk + i >= seen || !before(found, *worst))
            continue;
        if (threadIdx.x % CUDA_WARP == 0)
            cuda_insert(list, length, found);
        __syncwarp();
        *worst = list[length - 1];
        __syncwarp();
    }
}

/* The best of a block's WARPS, in order: lane w follows the list of warp w. One warp. */
template <int WARPS>
static __device__ __forceinline__ void cuda_merge_warps(const struct cuda_candidate *lists,
                                                        uint32_t length, struct cuda_candidate *out)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP;
    uint32_t at = 0;
    for (uint32_t i = 0; i < length; i++) {
        const struct cuda_candidate own =
            lane < WARPS && at < length ? lists[lane * length + at] : no_candidate();
        const struct cuda_candidate best = cuda_warp_best(own);
        at += best.chunk == own.chunk;
        if (lane == 0)
            out[i] = best;
        if (best.chunk == CUDA_NO_CHUNK) { /* nothing but these */
            for (i += 1 + lane; i < length; i += CUDA_WARP)
                out[i] = best;
            break;
        }
    }
}

/* The best of `lists` lists of `length`, in order, into `best` (shared memory); returns how many
 * there are. A thread of THREADS follows each list; `winners`: shared, one for each warp. */
template <int THREADS>
static __device__ __forceinline__ uint32_t cuda_merge_lists(const struct cuda_candidate *candidates,
                                                            uint32_t length, uint32_t lists,
                                                            struct cuda_candidate *winners,
                                                            struct cuda_candidate *best)
{
    const struct cuda_candidate *list = candidates + (size_t)threadIdx.x * length;
    const auto load = [&](uint32_t i) {
        return threadIdx.x < lists && i < length ? list[i] : no_candidate();
    };
    uint32_t at = 1, found = 0;
    struct cuda_candidate own = load(0), next = load(1); /* nobody waits for what comes up */
    for (; found < length; found++) {
        const struct cuda_candidate mine = cuda_warp_best(own);
        if (threadIdx.x % CUDA_WARP == 0)
            winners[threadIdx.x / CUDA_WARP] = mine;
        __syncthreads();
        struct cuda_candidate top = winners[0];
        for (uint32_t i = 1; i < THREADS / CUDA_WARP; i++)
            if (before(winners[i], top))
                top = winners[i];
        __syncthreads();
        if (top.chunk == CUDA_NO_CHUNK)
            break;
        if (threadIdx.x == 0)
            best[found] = top;
        if (own.chunk == top.chunk) {
            own = next;
            next = load(++at);
        }
    }
    __syncthreads();
    return found;
}

#define CUDA_SCAN_LIST 8

/* The best that a thread has seen, best first. It sees chunks in order, so of equal scores the one
 * that came first stays in front. */
struct scan_list {
    float scores[CUDA_SCAN_LIST];
    uint32_t chunks[CUDA_SCAN_LIST];
};

static __device__ __forceinline__ void cuda_scan_insert(struct scan_list *list, float score,
                                                        uint32_t chunk)
{
    list->scores[CUDA_SCAN_LIST - 1] = score;
    list->chunks[CUDA_SCAN_LIST - 1] = chunk;
#pragma unroll
    for (int i = CUDA_SCAN_LIST - 1; i > 0; i--) {
        const bool up = list->scores[i] > list->scores[i - 1];
        const float s = list->scores[i], t = list->scores[i - 1];
        const uint32_t c = list->chunks[i], d = list->chunks[i - 1];
        list->scores[i] = up ? t : s;
        list->scores[i - 1] = up ? s : t;
        list->chunks[i] = up ? d : c;
        list->chunks[i - 1] = up ? c : d;
    }
}

static __device__ __forceinline__ void cuda_scan_clear(struct scan_list *list)
{
#pragma unroll
    for (int i = 0; i < CUDA_SCAN_LIST; i++) {
        list->scores[i] = -INFINITY;
        list->chunks[i] = CUDA_NO_CHUNK;
    }
}

/* To its place among candidates [rows, heads, lists, CUDA_SCAN_LIST]. */
static __device__ __forceinline__ void cuda_scan_store(struct cuda_candidate *candidates,
                                                       uint32_t heads, uint32_t lists, size_t row,
                                                       uint32_t head, uint32_t at,
                                                       const struct scan_list &list)
{
    struct cuda_candidate *out =
        candidates + ((row * heads + head) * lists + at) * CUDA_SCAN_LIST;
#pragma unroll
    for (int i = 0; i < CUDA_SCAN_LIST; i++) {
        out[i].score = list.scores[i];
        out[i].chunk = list.chunks[i];
    }
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
    float spent = 0, top = -INFINITY, scores[LIMITS_TOPK / CUDA_WARP],
          shares[LIMITS_TOPK / CUDA_WARP];
#pragma unroll
    for (uint32_t k = 0; k < LIMITS_TOPK / CUDA_WARP; k++) {
        const uint32_t i = k * CUDA_WARP + lane;
        scores[k] = i < found ? ordered[i].score : -INFINITY;
        if (w.softmax)
            scores[k] += w.pos_decay * (float)i;
        top = fmaxf(top, scores[k]);
    }
    top = cuda_warp_max(top);
#pragma unroll
    for (uint32_t k = 0; k < LIMITS_TOPK / CUDA_WARP; k++) {
        const float own = w.softmax ? expf(scores[k] - top) : cuda_softplus(scores[k]);
        shares[k] = own;
        for (uint32_t j = 0; j < CUDA_WARP && k * CUDA_WARP + j < found; j++) {
            spent += __shfl_sync(CUDA_ALL_LANES, own, j);
            if (!w.softmax && lane == j)
                shares[k] = expf(scores[k] - spent);
        }
    }
#pragma unroll
    for (uint32_t k = 0; k < LIMITS_TOPK / CUDA_WARP; k++) {
        const uint32_t i = k * CUDA_WARP + lane;
        if (i >= topk)
            break;
        chunks[i] = i < found ? ordered[i].chunk : 0;
        out[i] = i >= found ? 0 : w.softmax ? shares[k] / spent : shares[k];
    }
}

/* A row of a short segment. */
struct scan_row {
    uint32_t row, segment;
};

static __device__ __forceinline__ struct scan_row cuda_row_of(const struct scan_row *rows,
                                                              uint32_t i)
{
    struct scan_row row;
    row.row = row.segment = i;
    return rows ? rows[i] : row;
}

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

/* Room for the candidates of a call in x->candidates. */
bool cuda_reserve_candidates(struct ops_context *context, size_t count);

/* ---- retrieve_fp8.cu ---- */

/* How many candidates of a row and head are looked at again; topk where landmarks are bf16. */
uint32_t cuda_kept(const struct ops_context *context);
/* cuda_retrieve_rows with landmarks in fp8, whose scan goes by `blocks` a row. */
void cuda_retrieve_codes(struct ops_context *context, const struct ops_retrieval_weights *weights,
                         const struct cuda_segment *segments, const struct scan_row *rows,
                         uint32_t row_count, uint32_t blocks, struct cuda_candidate *candidates,
                         uint64_t *chunks, float *shares);
/* Picks of a long segment with landmarks in fp8, into x->pick_chunks and _weights. */
void cuda_scan_codes(struct ops_context *context, const struct ops_retrieval_weights *weights,
                     const struct cuda_segment *segment, const struct ops_segment *host,
                     const struct ops_landmarks *landmarks);
bool cuda_codes_open(struct ops_context *context);
void cuda_codes_close(struct ops_context *context);

/* ---- retrieve_scan.cu ---- */

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

/* ---- retrieve_blocks.cu ---- */

/* cuda_scan_rows on Hopper; `lists` is even. False: not covered, nothing was done; the answer does
 * not depend on the rows. */
bool cuda_scan_blocks(struct ops_context *context, const struct cuda_segment *segment,
                      const struct ops_segment *host, uint32_t lists,
                      struct cuda_candidate *candidates);

#endif
