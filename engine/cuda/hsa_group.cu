/* hsa_group.cu - hierarchical sparse attention for many rows: neighbouring rows pick mostly the
 * same chunks, so a block takes a group of rows and brings each page that any of them picked to
 * shared memory once. Some warps merge the rows' picks and fetch, each of the others attends a row
 * of its own to the pages that this picked, in the order of its picks: the bits are those of a row
 * alone. */
#include "engine/cuda/hsa.cuh"
#include "engine/cuda/hsa_tile.cuh"

#define PICKS 8  /* of a row, at most */
#define SLOTS 16 /* pages in shared memory, at most */
#define FEEDERS 4
#define FED (HSA_TOKENS / FEEDERS) /* tokens of a page that a feeder brings */

/* What lies in shared memory: queries; for each slot its barriers, the rows that use it, and their
 * weights; pages. */
template <int HD> struct group_room {
    static constexpr uint32_t rows = 1024 / HD; /* a warp each: as registers allow */
    static constexpr uint32_t threads = (rows + FEEDERS) * CUDA_WARP;
    static constexpr uint32_t tile = HSA_TILE * HD, page = 2 * HSA_TOKENS * HD;
    bf16 queries[rows * tile];
    uint64_t full[SLOTS], empty[SLOTS];
    uint32_t users[SLOTS]; /* a bit a row; 0: nothing more comes */
    float shares[SLOTS][rows];
    bf16 pages[1]; /* [slots, page] */

    static constexpr size_t bytes(uint32_t slots)
    {
        static_assert(offsetof(group_room, pages) % 16 == 0, "what copies write is aligned");
        return offsetof(group_room, pages) + (size_t)slots * page * sizeof(bf16);
    }
};

/* The picks that a lane's row has not had yet, the next one first. */
struct picks {
    const bf16 *pages[PICKS]; /* NULL behind the last */
    float weights[PICKS];
};

static __device__ __forceinline__ void drop(struct picks *p, int first)
{
#pragma unroll
    for (int i = 0; i < PICKS - 1; i++)
        if (i >= first) {
            p->pages[i] = p->pages[i + 1];
            p->weights[i] = p->weights[i + 1];
        }
    p->pages[PICKS - 1] = NULL;
}

static __device__ __forceinline__ void load_picks(struct picks *p, const bf16 *const *pages,
                                                  const float *weights, uint32_t count)
{
#pragma unroll
    for (int j = 0; j < PICKS; j++) { /* all under way at once */
        p->pages[j] = (uint32_t)j < count ? pages[j] : NULL;
        p->weights[j] = (uint32_t)j < count ? weights[j] : 0;
    }
#pragma unroll
    for (int j = PICKS - 2; j >= 0; j--)
        if (!p->pages[j]) /* what is behind a pick that does not exist moves up */
            drop(p, j);
}

/* The page that comes next: one that some row has first and, if possible, no row has later, so that
 * all its users can use it at once. (Rows pick by falling chunks, so there is one; but only which
 * rows share a page hangs on that.) `last`: whose page came last, where the search begins. */
static __device__ __forceinline__ const bf16 *next_page(const struct picks &p, uint32_t alive,
                                                        uint32_t *last)
{
    uint32_t lane = alive >> *last & 1 ? *last : CUDA_WARP - 1 - __clz(alive);
    const bf16 *page = NULL;
    for (int i = 0; i < PICKS; i++) {
        page = reinterpret_cast<const bf16 *>(
            __shfl_sync(CUDA_ALL_LANES, reinterpret_cast<uintptr_t>(p.pages[0]), lane));
        bool later = false;
#pragma unroll
        for (int j = 1; j < PICKS; j++)
            later |= p.pages[j] == page;
        const uint32_t behind = __ballot_sync(CUDA_ALL_LANES, later);
        *last = lane;
        if (!behind)
            break;
        lane = CUDA_WARP - 1 - __clz(behind); /* what that row has first comes before */
    }
    return page;
}

/* A warp of those that merge and fetch; `pages` and `weights` of the group's first row and this kv
 * head, `apart` from row to row. Each of them merges all picks and brings its part of every page.
 */
template <int HD>
static __device__ __forceinline__ void
feed(struct group_room<HD> &room, uint32_t slots, const struct hsa_shape &s,
     const bf16 *const *pages, const float *weights, uint32_t row_count, uint32_t apart, uint32_t g)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, stride = s.kv_heads * HD;
    const uint32_t feeder = threadIdx.x / CUDA_WARP - room.rows;
    const size_t part = g * HD + (size_t)feeder * FED * stride;
    struct picks picks;
    load_picks(&picks, pages + (size_t)lane * apart, weights + (size_t)lane * apart,
               lane < row_count ? s.topk : 0);
    uint32_t last = 0, slot = 0, parity = 1; /* of a slot that nobody has used */
    for (uint32_t users = 1; users;) {
        const uint32_t alive = __ballot_sync(CUDA_ALL_LANES, picks.pages[0] != NULL);
        const bf16 *page = alive ? next_page(picks, alive, &last) : NULL;
        const bool mine = page && picks.pages[0] == page;
        users = __ballot_sync(CUDA_ALL_LANES, mine);
        cuda_barrier_wait(room.empty + slot, parity);
        if (page) {
            bf16 *to = room.pages + slot * room.page + feeder * FED * HD;
            hsa_fetch<HD, FED>(to, page + part, stride);
            hsa_fetch<HD, FED>(to + room.page / 2, page + part + (size_t)HSA_TOKENS * stride,
                               stride);
        }
        if (mine && feeder == 0)
            room.shares[slot][lane] = picks.weights[0];
        if (mine)
            drop(&picks, 0);
        if (lane == 0 && feeder == 0)
            room.users[slot] = users;
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

/* A row of a group. One warp. */
template <int HD>
static __device__ __forceinline__ void attend_own(struct group_room<HD> &room, uint32_t slots,
                                                  const struct hsa_shape &s, uint32_t row,
                                                  bool there, const float *q, float *o)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, in_tile = hsa_lane<HD>(true);
    const uint32_t heads = s.heads / s.kv_heads;
    bf16 *tile = room.queries + row * room.tile;
    if (there)
        store_queries<HD>(tile, q, heads, s.scale * HSA_LOG2_E);
    __syncwarp();
    const auto query = [&](int k, uint32_t a[4]) {
        cuda_load_matrices(a, hsa_at<HD>(tile, in_tile, 0, k * 16));
    };
    float acc[HD / 8][4] = {};
    uint32_t slot = 0, parity = 0;
    for (;;) {
        cuda_barrier_wait(room.full + slot, parity);
        const uint32_t users = room.users[slot];
        if (!users)
            break;
        const bf16 *keys = room.pages + slot * room.page, *values = keys + room.page / 2;
        if (users >> row & 1) {
            uint32_t shares[HSA_TOKENS / 16][4];
            hsa_weigh<HD>(query, keys, room.shares[slot][row], s.softmax1, shares);
#pragma unroll
            for (int k = 0; k < HSA_TOKENS / 16; k++)
#pragma unroll
                for (int n = 0; n < HD / 16; n++) {
                    uint32_t b[4];
                    cuda_load_transposed(b, hsa_at<HD>(values, in_tile, k * 16, n * 16));
                    cuda_mma(acc[2 * n], shares[k], b);
                    cuda_mma(acc[2 * n + 1], shares[k], b + 2);
                }
        }
        __syncwarp();
        if (lane == 0)
            cuda_barrier_arrive(room.empty + slot);
        slot = slot + 1 < slots ? slot + 1 : 0;
        parity ^= slot == 0;
    }
#pragma unroll
    for (int n = 0; n < HD / 8; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t head = lane / 4 + i * 8;
            if (there && head < heads)
                *reinterpret_cast<float2 *>(o + head * HD + n * 8 + lane % 4 * 2) =
                    float2{acc[n][2 * i], acc[n][2 * i + 1]};
        }
}

/* `each` rows a group. Grid: groups x kv heads. */
template <int HD>
static __global__ void __launch_bounds__(group_room<HD>::threads, 1)
    attend_group(struct hsa_shape s, uint32_t row_count, uint32_t each, uint32_t slots,
                 const float *q, const float *weights, const bf16 *const *pages, float *o)
{
    CUDA_SHARED(struct group_room<HD>, shared);
    struct group_room<HD> &room = *shared;
    const uint32_t g = blockIdx.y, first = blockIdx.x * each, there = min(row_count - first, each);
    if (threadIdx.x < slots) {
        cuda_barrier_init(room.full + threadIdx.x, 2 * FEEDERS * CUDA_WARP);
        cuda_barrier_init(room.empty + threadIdx.x, room.rows);
    }
    __syncthreads();
    cuda_depend_release();
    cuda_depend_wait();
    const uint32_t warp = threadIdx.x / CUDA_WARP;
    if (warp >= room.rows) {
        const size_t pick =
            ((size_t)first * s.retrieval_heads + (s.retrieval_heads == 1 ? 0 : g)) * s.topk;
        feed<HD>(room, slots, s, pages + pick, weights + pick, there, s.retrieval_heads * s.topk,
                 g);
    } else {
        const size_t head = (size_t)(first + warp) * s.heads + g * (s.heads / s.kv_heads);
        attend_own<HD>(room, slots, s, warp, warp < there, q + head * HD, o + head * HD);
    }
}

/* False: shared memory has no room for two pages beside the queries. */
template <int HD>
static bool launch(struct ops_context *x, const struct hsa_shape &s, uint32_t row_count,
                   const float *q, const float *weights, const void *const *pages, float *o)
{
    typedef group_room<HD> room;
    uint32_t slots = 0;
    while (slots < SLOTS && room::bytes(slots + 1) <= x->shared_most)
        slots++;
    if (slots < 2)
        return false;
    /* Rows of a group: as many as fill all multiprocessors the same number of times. */
    const uint64_t tiles = (uint64_t)row_count * s.kv_heads, all = (uint64_t)x->multiprocessors;
    const uint32_t each = cuda_ceil(tiles, all * cuda_ceil(tiles, all * room::rows));
    CUDA_ALLOW_SHARED(x, attend_group<HD>, room::bytes(slots));
    CUDA_LAUNCH_EARLY(x, attend_group<HD>, dim3(cuda_ceil(row_count, each), s.kv_heads),
                      dim3(room::threads), room::bytes(slots), s, row_count, each, slots, q,
                      weights, (const bf16 *const *)pages, o);
    return true;
}

bool cuda_attend_groups(struct ops_context *x, const struct hsa_shape &s, uint32_t row_count,
                        const float *q, const float *weights, const void *const *pages, float *o)
{
    const size_t tiles = (size_t)row_count * s.kv_heads;
    const size_t all = (size_t)x->multiprocessors;
    if (s.topk > PICKS || tiles < 4 * all) /* a block a row fills the device better */
        return false;
    return s.width == 128 ? launch<128>(x, s, row_count, q, weights, pages, o)
                          : launch<64>(x, s, row_count, q, weights, pages, o);
}
