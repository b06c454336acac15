/* retrieve_fp8.cu - landmarks twice: in fp8 on the device, where every one is scanned, and as they
 * are in the host's memory, where the best few of each row are read and scored again. Picks and
 * their weights come from those second scores, so the coarse ones only decide who is looked at.
 *
 * A block's twin: the codes [OPS_LANDMARK_BLOCK, r], then the scales [OPS_LANDMARK_BLOCK, Hr],
 * powers of two, so that bf16 holds every value of the twin exactly. Codes are e4m3: sign, four
 * bits of exponent (7 is 2^0), three of fraction, no infinities. */
#include <stdlib.h>

#include "engine/cuda/retrieve_rows.cuh"

#define RESCORE_THREADS 256
#define KEEP_WARPS 4
#define CODE_MOST 448.0f    /* the largest value of e4m3 */
#define EXPANDED_BLOCKS 64u /* that become bf16 together for the scan of long segments */
#define KEPT_LEAST 16
#define KEPT_MOST (2 * LIMITS_TOPK)

/* ---- codes ---- */

/* The nearest code of |x| <= CODE_MOST, to even. */
static __device__ __forceinline__ uint8_t encode(float x)
{
    const uint32_t sign = __float_as_uint(x) >> 24 & 0x80;
    const uint32_t bits = __float_as_uint(x) & 0x7fffffffu;
    const float size = __uint_as_float(bits);
    if (size < 0.015625f) /* 2^-6: below, steps of 2^-9; eight of them make the first normal code */
        return (uint8_t)(sign | (uint32_t)rintf(size * 512));
    const uint32_t rounded = bits + 0x7ffffu + (bits >> 20 & 1);
    const uint32_t code = (rounded >> 20) - ((127 - 7) << 3);
    return (uint8_t)(sign | (code < 0x7e ? code : 0x7e));
}

/* Two halves of a word as floats, 2^8 times too small when they are codes moved into place: a
 * code's bits are those of a half with the exponent's bias 8 lower. */
static __device__ __forceinline__ void halves(uint32_t pair, float out[2])
{
#ifdef __CUDACC__
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(out[0]), "=f"(out[1])
        : "r"(pair));
#else
    for (int i = 0; i < 2; i++) {
        const uint32_t bits = pair >> 16 * i & 0xffff, exponent = bits >> 10 & 31;
        const float size = exponent ? ldexpf((float)((bits & 0x3ff) | 0x400), (int)exponent - 25)
                                    : ldexpf((float)(bits & 0x3ff), -24);
        out[i] = bits >> 15 ? -size : size;
    }
#endif
}

#define CODE_SCALE 256.0f

/* Four codes, CODE_SCALE times too small. */
static __device__ __forceinline__ void decode(uint32_t word, float out[4])
{
    float even[2], odd[2];
    const uint32_t moved = word << 8;
    halves((moved & 0x80008000u) | (moved & 0x7f007f00u) >> 1, even);
    halves((word & 0x80008000u) | (word & 0x7f007f00u) >> 1, odd);
    out[0] = even[0];
    out[1] = odd[0];
    out[2] = even[1];
    out[3] = odd[1];
}

static __host__ __device__ __forceinline__ size_t code_bytes(uint32_t dim)
{
    return (size_t)OPS_LANDMARK_BLOCK * dim;
}

static __device__ __forceinline__ const float *scales_of(const void *twin, uint32_t dim)
{
    return (const float *)((const char *)twin + code_bytes(dim));
}

/* One head of one landmark, from the `first` of a block on. A warp. Grid: landmarks x heads. */
static __global__ void __launch_bounds__(CUDA_WARP)
    narrow_landmarks(const bf16 *block, uint32_t first, uint32_t dim, uint32_t width, void *twin)
{
    const uint32_t at = first + blockIdx.x;
    const size_t begin = (size_t)at * dim + (size_t)blockIdx.y * width;
    float most = 0;
    for (uint32_t i = threadIdx.x; i < width; i += CUDA_WARP)
        most = fmaxf(most, fabsf(cuda_float(block[begin + i])));
    most = cuda_warp_max(most);
    int exponent = 0;
    if (most > 0 && most <= 3.402823466e+38f) {
        frexpf(most / CODE_MOST, &exponent); /* 2^exponent is at least what it is given */
        exponent = exponent < -100 ? -100 : exponent;
    }
    const float down = ldexpf(1, -exponent);
    for (uint32_t i = threadIdx.x; i < width; i += CUDA_WARP)
        ((uint8_t *)twin)[begin + i] = encode(cuda_float(block[begin + i]) * down);
    if (threadIdx.x == 0)
        ((float *)((char *)twin + code_bytes(dim)))[(size_t)at * gridDim.y + blockIdx.y] =
            ldexpf(1, exponent);
}

/* Blocks as bf16 for the scan of long segments. Grid: landmarks x heads. */
static __global__ void __launch_bounds__(128)
    expand_landmarks(const void *const *twins, uint32_t dim, uint32_t width, uint16_t *out)
{
    const uint32_t block = blockIdx.x / OPS_LANDMARK_BLOCK, at = blockIdx.x % OPS_LANDMARK_BLOCK;
    const size_t begin = (size_t)at * dim + (size_t)blockIdx.y * width;
    const uint8_t *codes = (const uint8_t *)twins[block] + begin;
    const float scale =
        scales_of(twins[block], dim)[(size_t)at * gridDim.y + blockIdx.y] * CODE_SCALE;
    bf16 *to = (bf16 *)out + (size_t)block * OPS_LANDMARK_BLOCK * dim + begin;
    for (uint32_t i = threadIdx.x; i < width; i += 128) {
        float value[4];
        decode(codes[i], value);
        cuda_store(to + i, value[0] * scale);
    }
}

/* ---- single rows ---- */

/* SCAN_AHEAD landmarks of a block's twin. */
struct codes {
    const uint8_t *codes;
    const float *scales;
    uint32_t dim, heads; /* from a landmark to the next */
};

static __device__ __forceinline__ struct codes codes_of(const struct scan_shape &s,
                                                        const struct cuda_segment &segment,
                                                        uint64_t chunk, uint32_t head)
{
    const void *twin = segment.narrow[chunk / OPS_LANDMARK_BLOCK];
    const uint64_t at = chunk % OPS_LANDMARK_BLOCK;
    struct codes out;
    out.codes = (const uint8_t *)twin + at * s.dim + (size_t)head * s.width;
    out.scales = scales_of(twin, s.dim) + at * s.heads + head;
    out.dim = s.dim;
    out.heads = s.heads;
    return out;
}

/* Of LOADS * 4 WORDS * CUDA_WARP elements. */
template <int WORDS, int LOADS> struct wide_codes {
    struct wide_query<LOADS, 4 * WORDS> query;
    uint32_t ahead[SCAN_AHEAD][LOADS][WORDS];
    float scales[SCAN_AHEAD];

    __device__ __forceinline__ void fetch(const struct scan_shape &s,
                                          const struct cuda_segment &segment, uint64_t chunk,
                                          uint32_t head)
    {
        const struct codes c = codes_of(s, segment, chunk, head);
#pragma unroll
        for (int i = 0; i < SCAN_AHEAD; i++) {
#pragma unroll
            for (int j = 0; j < LOADS; j++) {
                const uint8_t *from = c.codes + (size_t)i * c.dim + query.place(j);
                if (WORDS == 4) {
                    const uint4 v = cuda_stream16(from);
                    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                    for (int w = 0; w < WORDS; w++)
                        ahead[i][j][w] = words[w];
                } else {
                    const uint2 v = *reinterpret_cast<const uint2 *>(from);
                    ahead[i][j][0] = v.x;
                    ahead[i][j][WORDS - 1] = v.y;
                }
            }
            scales[i] = c.scales[i * c.heads];
        }
    }
    __device__ __forceinline__ void score(float out[SCAN_AHEAD]) const
    {
#pragma unroll
        for (int i = 0; i < SCAN_AHEAD; i++) {
            float sum = 0;
#pragma unroll
            for (int j = 0; j < LOADS; j++)
#pragma unroll
                for (int w = 0; w < WORDS; w++) {
                    float m[4];
                    decode(ahead[i][j][w], m);
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        sum = fmaf(query.q[j][4 * w + e], m[e], sum);
                }
            out[i] = cuda_warp_sum(sum) * scales[i];
        }
    }
};

/* Of any width. */
struct plain_codes {
    struct plain_query query;
    struct codes from;

    __device__ __forceinline__ void fetch(const struct scan_shape &s,
                                          const struct cuda_segment &segment, uint64_t chunk,
                                          uint32_t head)
    {
        from = codes_of(s, segment, chunk, head);
    }
    __device__ __forceinline__ void score(float out[SCAN_AHEAD]) const
    {
        for (uint32_t i = 0; i < SCAN_AHEAD; i++) {
            float sum = 0;
            for (uint32_t e = threadIdx.x % CUDA_WARP; e < query.width; e += CUDA_WARP) {
                float m[4];
                decode(from.codes[(size_t)i * from.dim + e], m);
                sum = fmaf(query.at(e), m[0], sum);
            }
            out[i] = cuda_warp_sum(sum) * from.scales[i * from.heads];
        }
    }
};

/* ---- the second scores ---- */

/* Of one landmark of the host, in the order of sums that retrieve_step.cu has. A warp. */
static __device__ __forceinline__ float score_again(const struct plain_query &query,
                                                    const bf16 *landmark)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP;
    float sum = 0;
    if (query.width % (8 * CUDA_WARP) == 0) {
        for (uint32_t i = lane * 8; i < query.width; i += 8 * CUDA_WARP) {
            float m[8];
            cuda_load16(landmark + i, m);
#pragma unroll
            for (uint32_t e = 0; e < 8; e++)
                sum = fmaf(query.at(i + e), m[e], sum);
        }
    } else {
        for (uint32_t i = lane; i < query.width; i += CUDA_WARP)
            sum = fmaf(query.at(i), cuda_float(landmark[i]), sum);
    }
    return cuda_warp_sum(sum);
}

/* Of each row and head: the best of `lists` lists of `kept`, scored again, become picks. A list
 * belongs to a thread. Grid: rows x heads. */
static __global__ void __launch_bounds__(RESCORE_THREADS)
    rescore_rows(struct scan_shape s, uint32_t kept, uint32_t lists, struct weighing w,
                 const struct cuda_segment *segments, const struct scan_row *rows,
                 const float *query, struct query_norm norm,
                 const struct cuda_candidate *candidates, uint64_t *chunks, float *shares)
{
    __shared__ struct cuda_candidate winners[RESCORE_THREADS / CUDA_WARP], best[KEPT_MOST],
        again[LIMITS_TOPK], ordered[LIMITS_TOPK];
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const uint32_t h = blockIdx.y;
    cuda_depend_release();
    cuda_depend_wait();
    const struct scan_row at = cuda_row_of(rows, blockIdx.x);
    const struct cuda_segment *segment = &segments[at.segment];
    const uint32_t found = cuda_merge_lists<RESCORE_THREADS>(
        candidates + ((size_t)blockIdx.x * s.heads + h) * lists * kept, kept, lists, winners, best);
    struct plain_query own;
    own.prepare(query + (size_t)at.row * s.dim + (size_t)h * s.width, s.width, norm);
    for (uint32_t i = warp; i < found; i += RESCORE_THREADS / CUDA_WARP) {
        const uint32_t chunk = best[i].chunk;
        const bf16 *landmark = (const bf16 *)segment->blocks[chunk / OPS_LANDMARK_BLOCK] +
                               chunk % OPS_LANDMARK_BLOCK * s.dim + (size_t)h * s.width;
        const float score = score_again(own, landmark);
        if (lane == 0)
            best[i].score = score;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < found; i += RESCORE_THREADS) {
        uint32_t better = 0;
        for (uint32_t j = 0; j < found; j++)
            better += before(best[j], best[i]);
        if (better < s.topk)
            again[better] = best[i];
    }
    __syncthreads();
    const size_t row = (size_t)at.row * s.heads + h;
    if (warp == 0)
        weigh(w, s.topk, found < s.topk ? found : s.topk, again, ordered, chunks + row * s.topk,
              shares + row * s.topk);
}

/* ---- the host's side ---- */

uint32_t cuda_kept(const struct ops_context *x)
{
    const uint32_t topk = x->config.topk, kept = 2 * topk > KEPT_LEAST ? 2 * topk : KEPT_LEAST;
    return x->fp8 ? kept : topk;
}

/* scan_shape whose lists are as long as what is kept. */
static struct scan_shape kept_shape(const struct ops_context *x)
{
    struct scan_shape s = scan_shape_of(&x->config);
    s.topk = cuda_kept(x);
    return s;
}

static void rescore(struct ops_context *x, const struct ops_retrieval_weights *w,
                    const struct cuda_segment *segments, const struct scan_row *rows,
                    uint32_t row_count, uint32_t lists, bool done,
                    const struct cuda_candidate *candidates, uint64_t *chunks, float *shares)
{
    const struct scan_shape s = scan_shape_of(&x->config);
    const struct weighing weighing = {x->config.softmax_weights, w->pos_decay};
    CUDA_LAUNCH_EARLY(x, rescore_rows, dim3(row_count, s.heads), dim3(RESCORE_THREADS), 0, s,
                      cuda_kept(x), lists, weighing, segments, rows, x->query,
                      query_norm_of(x, w, done), candidates, chunks, shares);
}

void cuda_retrieve_codes(struct ops_context *x, const struct ops_retrieval_weights *w,
                         const struct cuda_segment *segments, const struct scan_row *rows,
                         uint32_t row_count, uint32_t blocks, struct cuda_candidate *candidates,
                         uint64_t *chunks, float *shares)
{
    const struct scan_shape s = kept_shape(x);
    const auto scan = s.width == 1024 && s.dim % 16 == 0 ? launch_scan_rows<wide_codes<4, 2>>
                      : s.width == 512                   ? launch_scan_rows<wide_codes<4, 1>>
                      : s.width == 256                   ? launch_scan_rows<wide_codes<2, 1>>
                                                         : launch_scan_rows<plain_codes>;
    ASSERT(blocks <= RESCORE_THREADS);
    scan(x, s, segments, rows, row_count, blocks, query_norm_of(x, w, false), candidates);
    rescore(x, w, segments, rows, row_count, blocks, false, candidates, chunks, shares);
}

/* ---- long segments: block after block becomes bf16, for the scan on tensor cores ---- */

/* The best of a row's and head's `count` new candidates, whose chunks are `offset` further, and of
 * those kept so far. A warp each. */
static __global__ void __launch_bounds__(KEEP_WARPS *CUDA_WARP)
    keep_best(const struct cuda_candidate *candidates, uint32_t count, uint32_t offset,
              uint32_t keep, size_t row_heads, bool fresh, struct cuda_candidate *kept)
{
    __shared__ struct cuda_candidate shared[KEEP_WARPS][KEPT_MOST];
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const size_t at = (size_t)blockIdx.x * KEEP_WARPS + warp;
    if (at >= row_heads)
        return;
    struct cuda_candidate last = no_candidate();
    for (uint32_t i = 0; i < keep; i++) {
        struct cuda_candidate best = no_candidate();
        for (uint32_t j = lane; j < count + (fresh ? 0 : keep); j += CUDA_WARP) {
            struct cuda_candidate c =
                j < count ? candidates[at * count + j] : kept[at * keep + j - count];
            if (c.chunk == CUDA_NO_CHUNK)
                continue;
            c.chunk += j < count ? offset : 0;
            if ((i == 0 || before(last, c)) && before(c, best))
                best = c;
        }
        last = cuda_warp_best(best);
        if (lane == 0)
            shared[warp][i] = last;
        if (last.chunk == CUDA_NO_CHUNK) {
            for (i += 1 + lane; i < keep; i += CUDA_WARP)
                shared[warp][i] = last;
            break;
        }
    }
    __syncwarp();
    for (uint32_t i = lane; i < keep; i += CUDA_WARP)
        kept[at * keep + i] = shared[warp][i];
}

static size_t expanded_blocks(const struct ops_context *x)
{
    return EXPANDED_BLOCKS +
           cuda_ceil(x->max_rows / x->config.chunk_tokens + 2, OPS_LANDMARK_BLOCK);
}

/* Chunks [first, end) of a segment that sees all of them. */
static void scan_part(struct ops_context *x, const struct ops_segment *host,
                      const struct ops_landmarks *landmarks, uint64_t first, uint64_t end)
{
    const struct scan_shape s = scan_shape_of(&x->config);
    const size_t block_elements = (size_t)OPS_LANDMARK_BLOCK * s.dim, most = expanded_blocks(x);
    const uint32_t blocks = cuda_ceil(end - first, OPS_LANDMARK_BLOCK);
    const void *table[2 * EXPANDED_BLOCKS];
    ASSERT(blocks <= most && most <= 2 * EXPANDED_BLOCKS && first % OPS_LANDMARK_BLOCK == 0);
    for (uint32_t i = 0; i < most; i++)
        table[i] = x->expanded + i * block_elements;
    struct cuda_segment part = {};
    part.position = host->position - first * s.tokens;
    part.row = host->row;
    part.count = host->count;
    part.chunk_count = end - first;
    part.blocks = (const void *const *)cuda_stage(x, table, most * sizeof *table);
    const struct cuda_segment *staged =
        (const struct cuda_segment *)cuda_stage(x, &part, sizeof part);
    const void *const *twins = (const void *const *)cuda_stage(
        x, landmarks->narrow + first / OPS_LANDMARK_BLOCK, blocks * sizeof *landmarks->narrow);
    const uint32_t lists = cuda_scan_lists(x, host->count, end - first);
    const size_t row_heads = (size_t)host->count * s.heads;
    if (!cuda_reserve_candidates(x, row_heads * lists * CUDA_SCAN_LIST))
        return;
    CUDA_LAUNCH(x, expand_landmarks, dim3(blocks * OPS_LANDMARK_BLOCK, s.heads), dim3(128), 0,
                twins, s.dim, s.width, x->expanded);
    cuda_scan_rows(x, staged, host, lists, x->candidates);
    CUDA_LAUNCH(x, keep_best, dim3(cuda_ceil(row_heads, KEEP_WARPS)), dim3(KEEP_WARPS * CUDA_WARP),
                0, x->candidates, lists * CUDA_SCAN_LIST, (uint32_t)first, cuda_kept(x), row_heads,
                first == 0, x->kept);
}

void cuda_scan_codes(struct ops_context *x, const struct ops_retrieval_weights *w,
                     const struct cuda_segment *segment, const struct ops_segment *host,
                     const struct ops_landmarks *landmarks)
{
    const struct scan_shape s = scan_shape_of(&x->config);
    const uint64_t seen = visible(s, host->position + host->count - 1, landmarks->count);
    const uint64_t step = EXPANDED_BLOCKS * OPS_LANDMARK_BLOCK;
    const uint64_t most = expanded_blocks(x) * OPS_LANDMARK_BLOCK;
    /* Every part begins before the segment does, so that all of its rows are behind that. */
    for (uint64_t first = 0, end = 0; end < seen || first == 0; first = end) {
        end = seen - first <= most ? seen : first + step;
        scan_part(x, host, landmarks, first, end);
        if (end == seen)
            break;
    }
    struct scan_row *own = (struct scan_row *)malloc(sizeof *own * host->count);
    if (!own) {
        cuda_fail(x, STATUS_NO_MEMORY, "out of memory for a step's rows");
        return;
    }
    for (uint32_t i = 0; i < host->count; i++)
        own[i] = (struct scan_row){host->row + i, 0};
    const struct scan_row *rows =
        (const struct scan_row *)cuda_stage(x, own, sizeof *own * host->count);
    free(own);
    rescore(x, w, segment, rows, host->count, 1, true, x->kept, x->pick_chunks, x->pick_weights);
}

/* ---- the twins ---- */

size_t cuda_narrow_bytes(const struct ops_context *x)
{
    return code_bytes(x->config.retrieval_dim) +
           (size_t)OPS_LANDMARK_BLOCK * x->config.retrieval_heads * sizeof(float);
}

extern "C" void cuda_narrow_landmarks(struct ops_context *x, const void *block, uint32_t first,
                                      uint32_t count, void *twin)
{
    const struct scan_shape s = scan_shape_of(&x->config);
    CUDA_LAUNCH(x, narrow_landmarks, dim3(count, s.heads), dim3(CUDA_WARP), 0, (const bf16 *)block,
                first, s.dim, s.width, twin);
}

bool cuda_codes_open(struct ops_context *x)
{
    if (!x->fp8)
        return true;
    const struct scan_shape s = scan_shape_of(&x->config);
    const size_t kept = (size_t)x->max_rows * s.heads * cuda_kept(x);
    x->expanded = (uint16_t *)cuda_take(x, expanded_blocks(x) * OPS_LANDMARK_BLOCK * s.dim *
                                               sizeof *x->expanded);
    x->kept = (struct cuda_candidate *)cuda_take(x, kept * sizeof *x->kept);
    return x->expanded && x->kept;
}

void cuda_codes_close(struct ops_context *x)
{
    if (x->expanded)
        cudaFree(x->expanded);
    if (x->kept)
        cudaFree(x->kept);
}
