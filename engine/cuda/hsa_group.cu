/* hsa_group.cu - hierarchical sparse attention for many rows: neighbouring rows pick mostly the
 * same chunks, so a block takes a group of rows and brings each page that any of them picked to
 * shared memory once. One warp merges the rows' picks and fetches, the others attend their own rows
 * to the pages that these picked, in the order of their picks: the bits are those of a row alone.
 */
#include "engine/cuda/hsa.cuh"
#include "engine/cuda/hsa_tile.cuh"

#define PICKS 8 /* of a row, at most */

/* What lies in shared memory: queries, pages, then for each slot its barriers, the rows that use
 * it, and their weights. */
template <int HD, int ROWS> struct room {
    static constexpr uint32_t tile = HSA_TILE * HD, page = 2 * HSA_TOKENS * HD;
    bf16 *queries, *pages;
    uint64_t *full, *empty;
    uint32_t *users; /* a bit a row; 0: nothing more comes */
    float *shares;   /* [slots, ROWS] */

    __device__ __forceinline__ room(bf16 *shared, uint32_t slots)
    {
        queries = shared;
        pages = queries + ROWS * tile;
        full = reinterpret_cast<uint64_t *>(pages + slots * page);
        empty = full + slots;
        users = reinterpret_cast<uint32_t *>(empty + slots);
        shares = reinterpret_cast<float *>(users + slots);
    }

    static constexpr size_t bytes(uint32_t slots)
    {
        return sizeof(bf16) * (ROWS * tile + (size_t)slots * page) +
               (size_t)slots * (2 * sizeof(uint64_t) + sizeof(uint32_t) + ROWS * sizeof(float));
    }
};

/* The picks that a lane's row has not had yet, the next one first. */
struct picks {
    const bf16 *pages[PICKS]; /* NULL behind the last */
    float weights[PICKS];
};

static __device__ __forceinline__ void load_picks(struct picks *p, const bf16 *const *pages,
                                                  const float *weights, uint32_t count)
{
#pragma unroll
    for (int j = 0; j < PICKS; j++) {
        p->pages[j] = NULL;
        p->weights[j] = 0;
    }
#pragma unroll
    for (int j = PICKS - 1; j >= 0; j--) {
        const bf16 *page = (uint32_t)j < count ? pages[j] : NULL;
        if (!page)
            continue;
#pragma unroll
        for (int i = PICKS - 1; i > 0; i--) {
            p->pages[i] = p->pages[i - 1];
            p->weights[i] = p->weights[i - 1];
        }
        p->pages[0] = page;
        p->weights[0] = weights[j];
    }
}

static __device__ __forceinline__ void drop_first(struct picks *p)
{
#pragma unroll
    for (int i = 0; i < PICKS - 1; i++) {
        p->pages[i] = p->pages[i + 1];
        p->weights[i] = p->weights[i + 1];
    }
    p->pages[PICKS - 1] = NULL;
}

/* The page that comes next: one that some row has first and, if possible, no row has later, so that
 * all its users can use it at once. (Rows pick by falling chunks, so there is one; but only which
 * rows share a page hangs on that.) */
static __device__ __forceinline__ const bf16 *next_page(const struct picks &p, uint32_t alive)
{
    uint32_t lane = CUDA_WARP - 1 - __clz(alive);
    const bf16 *page = NULL;
    for (int i = 0; i < PICKS; i++) {
        page = reinterpret_cast<const bf16 *>(
            __shfl_sync(CUDA_ALL_LANES, reinterpret_cast<uintptr_t>(p.pages[0]), lane));
        bool later = false;
#pragma unroll
        for (int j = 1; j < PICKS; j++)
            later |= p.pages[j] == page;
        const uint32_t behind = __ballot_sync(CUDA_ALL_LANES, later);
        if (!behind)
            break;
        lane = CUDA_WARP - 1 - __clz(behind); /* what that row has first comes before */
    }
    return page;
}

/* The warp that merges and fetches; `pages` and `weights` of the group's first row and this kv
 * head, `apart` from row to row. */
template <int HD, int ROWS>
static __device__ __forceinline__ void
feed(const struct room<HD, ROWS> &room, uint32_t slots, const struct hsa_shape &s,
     const bf16 *const *pages, const float *weights, uint32_t row_count, uint32_t apart, uint32_t g)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, stride = s.kv_heads * HD;
    struct picks picks;
    load_picks(&picks, pages + (size_t)lane * apart, weights + (size_t)lane * apart,
               lane < row_count ? s.topk : 0);
    uint32_t slot = 0, parity = 1; /* of a slot that nobody has used */
    for (uint32_t users = 1; users;) {
        const uint32_t alive = __ballot_sync(CUDA_ALL_LANES, picks.pages[0] != NULL);
        const bf16 *page = alive ? next_page(picks, alive) : NULL;
        const bool mine = page && picks.pages[0] == page;
        users = __ballot_sync(CUDA_ALL_LANES, mine);
        cuda_barrier_wait(room.empty + slot, parity);
        if (mine) {
            room.shares[slot * ROWS + lane] = picks.weights[0];
            drop_first(&picks);
        }
        if (lane == 0)
            room.users[slot] = users;
        if (page) {
            bf16 *to = room.pages + slot * room.page;
            hsa_fetch<HD>(to, page + g * HD, stride);
            hsa_fetch<HD>(to + room.page / 2, page + g * HD + (size_t)HSA_TOKENS * stride, stride);
        }
        cuda_barrier_copied(room.full + slot);
        cuda_barrier_arrive(room.full + slot);
        slot = slot + 1 < slots ? slot + 1 : 0;
        parity ^= slot == 0;
    }
}

/* A row's queries for one kv head, scaled for exp2; rows without a head zeros. One warp. */
template <int HD>
static __device__ __forceinline__ void store_queries(bf16 *to, const float *q, uint32_t heads,
                                                     float scale)
{
#pragma unroll
    for (uint32_t k = 0; k < HSA_TILE * HD / 4 / CUDA_WARP; k++) {
        const uint32_t i = (k * CUDA_WARP + threadIdx.x % CUDA_WARP) * 4, head = i / HD;
        float4 v = {0, 0, 0, 0};
        if (head < heads)
            v = *reinterpret_cast<const float4 *>(q + i);
        const uint2 words = {cuda_pack(v.x * scale, v.y * scale),
                             cuda_pack(v.z * scale, v.w * scale)};
        *reinterpret_cast<uint2 *>(to + cuda_swizzled<HD>(head, i % HD)) = words;
    }
}

/* W warps with T rows each, and one that feeds them. Grid: groups of W T rows x kv heads. */
template <int HD, int W, int T, int BLOCKS>
static __global__ void __launch_bounds__((W + 1) * CUDA_WARP, BLOCKS)
    attend_group(struct hsa_shape s, uint32_t row_count, uint32_t slots, const float *q,
                 const float *weights, const bf16 *const *pages, float *o)
{
    CUDA_SHARED(bf16, shared);
    constexpr uint32_t rows = W * T;
    const room<HD, rows> room(shared, slots);
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const uint32_t g = blockIdx.y, heads = s.heads / s.kv_heads, first = blockIdx.x * rows;
    const uint32_t there = min(row_count - first, rows);
    if (threadIdx.x < slots) {
        cuda_barrier_init(room.full + threadIdx.x, 2 * CUDA_WARP);
        cuda_barrier_init(room.empty + threadIdx.x, W);
    }
    __syncthreads();
    cuda_depend_release();
    cuda_depend_wait();
    if (warp == W) {
        const size_t pick =
            ((size_t)first * s.retrieval_heads + (s.retrieval_heads == 1 ? 0 : g)) * s.topk;
        feed<HD, rows>(room, slots, s, pages + pick, weights + pick, there,
                       s.retrieval_heads * s.topk, g);
        return;
    }
    const size_t apart = (size_t)s.heads * HD, at = first * apart + (size_t)g * heads * HD;
#pragma unroll
    for (uint32_t t = 0; t < T; t++)
        if (warp * T + t < there)
            store_queries<HD>(room.queries + (warp * T + t) * room.tile,
                              q + at + (warp * T + t) * apart, heads, s.scale * HSA_LOG2_E);
    __syncwarp();
    const uint32_t in_tile = hsa_lane<HD>(true);
    float acc[T][HD / 8][4] = {};
    uint32_t slot = 0, parity = 0;
    for (;;) {
        cuda_barrier_wait(room.full + slot, parity);
        const uint32_t users = room.users[slot];
        if (!users)
            break;
        const bf16 *keys = room.pages + slot * room.page, *values = keys + room.page / 2;
#pragma unroll
        for (uint32_t t = 0; t < T; t++) {
            if (!(users >> (warp * T + t) & 1))
                continue;
            const bf16 *tile = room.queries + (warp * T + t) * room.tile;
            const auto query = [&](int k, uint32_t a[4]) {
                cuda_load_matrices(a, hsa_at<HD>(tile, in_tile, 0, k * 16));
            };
            uint32_t shares[HSA_TOKENS / 16][4];
            hsa_weigh<HD>(query, keys, room.shares[slot * rows + warp * T + t], s.softmax1, shares);
#pragma unroll
            for (int k = 0; k < HSA_TOKENS / 16; k++)
#pragma unroll
                for (int n = 0; n < HD / 16; n++) {
                    uint32_t b[4];
                    cuda_load_transposed(b, hsa_at<HD>(values, in_tile, k * 16, n * 16));
                    cuda_mma(acc[t][2 * n], shares[k], b);
                    cuda_mma(acc[t][2 * n + 1], shares[k], b + 2);
                }
        }
        __syncwarp();
        if (lane == 0)
            cuda_barrier_arrive(room.empty + slot);
        slot = slot + 1 < slots ? slot + 1 : 0;
        parity ^= slot == 0;
    }
#pragma unroll
    for (uint32_t t = 0; t < T; t++)
#pragma unroll
        for (int n = 0; n < HD / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t row = warp * T + t, head = lane / 4 + i * 8;
                if (row < there && head < heads)
                    *reinterpret_cast<float2 *>(o + at + row * apart + head * HD + n * 8 +
                                                lane % 4 * 2) =
                        float2{acc[t][n][2 * i], acc[t][n][2 * i + 1]};
            }
}

/* False: shared memory has no room for two pages beside the queries. */
template <int HD, int W, int T, int BLOCKS>
static bool launch(struct ops_context *x, const struct hsa_shape &s, uint32_t row_count,
                   const float *q, const float *weights, const void *const *pages, float *o)
{
    typedef room<HD, W * T> room;
    const size_t between = (BLOCKS - 1) * 1024; /* the system's part of every block but one */
    uint32_t slots = 0;
    while (slots < W * T * PICKS + 1 && BLOCKS * room::bytes(slots + 1) + between <= x->shared_most)
        slots++;
    if (slots < 2)
        return false;
    CUDA_ALLOW_SHARED(x, (attend_group<HD, W, T, BLOCKS>), room::bytes(slots));
    CUDA_LAUNCH_EARLY(x, (attend_group<HD, W, T, BLOCKS>),
                      dim3(cuda_ceil(row_count, W * T), s.kv_heads), dim3((W + 1) * CUDA_WARP),
                      room::bytes(slots), s, row_count, slots, q, weights,
                      (const bf16 *const *)pages, o);
    return true;
}

bool cuda_attend_groups(struct ops_context *x, const struct hsa_shape &s, uint32_t row_count,
                        const float *q, const float *weights, const void *const *pages, float *o)
{
    const size_t tiles = (size_t)row_count * s.kv_heads;
    const size_t all = (size_t)x->multiprocessors;
    if (s.topk > PICKS || tiles < 4 * all) /* a block a row fills the device better */
        return false;
    if (s.width == 128)
        return launch<128, 8, 1, 1>(x, s, row_count, q, weights, pages, o);
    return launch<64, 8, 1, 2>(x, s, row_count, q, weights, pages, o);
}
