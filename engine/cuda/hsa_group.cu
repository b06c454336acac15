/* hsa_group.cu - hierarchical sparse attention for many rows: neighbouring rows pick mostly the
 * same chunks, so a block takes a group of rows and brings each page that any of them picked to
 * shared memory once. Some warps merge the rows' picks and fetch, each of the others attends a row
 * of its own to the pages that this picked, in the order of its picks: the bits are those of a row
 * alone. Blocks go on from group to group, and no warp waits for another's row to end.
 * What bounds it, for 65,536 rows of 16 heads of 64 on an H200: with picks as on text, the warps
 * that attend (0.57 ms; 0.54 where nothing is copied). With random picks, of which a group shares a
 * fifth, the warps that merge and fetch: 1.49 ms, of which 1.22 stay without attending and 1.25
 * without copies. Copies alone would take 1.2 ms by four warps (5.9 TB/s; 6.9 by eight), and 0.8 ms
 * as bulk copies of whole pages (9.1 TB/s); those of eight tokens each are no faster than four
 * warps. */
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
    uint32_t users[SLOTS]; /* a bit a row; 0: no more of this group */
    float shares[SLOTS][rows];
    bf16 pages[1]; /* [slots, page] */

    static constexpr size_t bytes(uint32_t slots)
    {
        static_assert(offsetof(group_room, pages) % 16 == 0, "what copies write is aligned");
        return offsetof(group_room, pages) + (size_t)slots * page * sizeof(bf16);
    }
};

struct group_shape {
    struct hsa_shape hsa;
    uint32_t row_count, each, groups, slots; /* rows in all, of a group; groups; pages at once */
};

/* A group of rows and a kv head, its `item`-th. */
struct group {
    uint32_t first, count, g;
};

static __device__ __forceinline__ struct group group_at(const struct group_shape &s, uint32_t item)
{
    struct group out;
    out.first = item % s.groups * s.each;
    out.count = min(s.row_count - out.first, s.each);
    out.g = item / s.groups;
    return out;
}

/* A slot of the ring after the other. */
struct turn {
    uint32_t slot, parity;
};

static __device__ __forceinline__ void go_on(struct turn *t, uint32_t slots)
{
    t->slot = t->slot + 1 < slots ? t->slot + 1 : 0;
    t->parity ^= t->slot == 0;
}

/* The picks that a lane's row has not had yet, the next one first. */
struct picks {
    const bf16 *pages[PICKS]; /* NULL behind the last */
    float weights[PICKS];
    uint32_t left; /* how many */
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
    p->left--;
}

static __device__ __forceinline__ void load_picks(struct picks *p, const bf16 *const *pages,
                                                  const float *weights, uint32_t count)
{
#pragma unroll
    for (int j = 0; j < PICKS; j++) { /* all under way at once */
        p->pages[j] = (uint32_t)j < count ? pages[j] : NULL;
        p->weights[j] = (uint32_t)j < count ? weights[j] : 0;
    }
    p->left = PICKS;
#pragma unroll
    for (int j = PICKS - 1; j >= 0; j--)
        if (!p->pages[j]) /* what is behind a pick that does not exist moves up */
            drop(p, j);
}

/* The page that comes next, NULL behind the last: what one of the rows with the most picks left has
 * first, so that rows go on side by side, whose warps then work at the same time. If a row has that
 * page later, what this row has first comes before, and so on, so that all users of a page can use
 * it at once. (Rows pick by falling chunks, so there is such a page; but only which rows share a
 * page hangs on that.) `most`: picks that a row has left, at most. */
static __device__ __forceinline__ const bf16 *next_page(const struct picks &p, uint32_t *most)
{
    uint32_t rows;
    while (!(rows = __ballot_sync(CUDA_ALL_LANES, p.left >= *most)))
        --*most;
    if (!*most)
        return NULL;
    const bf16 *page = NULL;
    for (int i = 0; i < PICKS && rows; i++) {
        page = reinterpret_cast<const bf16 *>(__shfl_sync(
            CUDA_ALL_LANES, reinterpret_cast<uintptr_t>(p.pages[0]), CUDA_WARP - 1 - __clz(rows)));
        bool later = false;
#pragma unroll
        for (int j = 1; j < PICKS; j++)
            later |= p.pages[j] == page;
        rows = __ballot_sync(CUDA_ALL_LANES, later);
    }
    return page;
}

/* A warp of those that merge and fetch. Each of them merges all picks and brings its part of every
 * page. */
template <int HD>
static __device__ __forceinline__ void feed(struct group_room<HD> &room,
                                            const struct group_shape &s, const bf16 *const *pages,
                                            const float *weights)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, feeder = threadIdx.x / CUDA_WARP - room.rows;
    const uint32_t heads = s.hsa.retrieval_heads, stride = s.hsa.kv_heads * HD;
    struct turn turn = {0, 1}; /* of a slot that nobody has used */
    for (uint32_t item = blockIdx.x; item < s.groups * s.hsa.kv_heads; item += gridDim.x) {
        const struct group group = group_at(s, item);
        const size_t row = group.first + lane, head = heads == 1 ? 0 : group.g;
        const size_t part = group.g * HD + (size_t)feeder * FED * stride;
        struct picks picks;
        load_picks(&picks, pages + (row * heads + head) * s.hsa.topk,
                   weights + (row * heads + head) * s.hsa.topk,
                   lane < group.count ? s.hsa.topk : 0);
        uint32_t most = PICKS;
        for (uint32_t users = 1; users; go_on(&turn, s.slots)) {
            const bf16 *page = next_page(picks, &most);
            const bool mine = page && picks.pages[0] == page;
            users = __ballot_sync(CUDA_ALL_LANES, mine);
            cuda_barrier_wait(room.empty + turn.slot, turn.parity);
            if (page) {
                bf16 *to = room.pages + turn.slot * room.page + feeder * FED * HD;
                hsa_fetch<HD, FED>(to, page + part, stride);
                hsa_fetch<HD, FED>(to + room.page / 2, page + part + (size_t)HSA_TOKENS * stride,
                                   stride);
            }
            if (mine && feeder == 0)
                room.shares[turn.slot][lane] = picks.weights[0];
            if (mine)
                drop(&picks, 0);
            if (lane == 0 && feeder == 0)
                room.users[turn.slot] = users;
            cuda_barrier_copied(room.full + turn.slot);
            cuda_barrier_arrive(room.full + turn.slot);
        }
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

/* A row of the group, its picks one by one. One warp. */
template <int HD>
static __device__ __forceinline__ void attend_pages(struct group_room<HD> &room,
                                                    const struct group_shape &s, uint32_t row,
                                                    struct turn *turn, float acc[HD / 8][4])
{
    const uint32_t in_tile = hsa_lane<HD>(true);
    const bf16 *tile = room.queries + row * room.tile;
    const auto query = [&](int k, uint32_t a[4]) {
        cuda_load_matrices(a, hsa_at<HD>(tile, in_tile, 0, k * 16));
    };
    for (uint32_t users = 1; users; go_on(turn, s.slots)) {
        cuda_barrier_wait(room.full + turn->slot, turn->parity);
        users = room.users[turn->slot];
        if (users >> row & 1) {
            const bf16 *keys = room.pages + turn->slot * room.page, *values = keys + room.page / 2;
            uint32_t shares[HSA_TOKENS / 16][4];
            hsa_weigh<HD>(query, keys, room.shares[turn->slot][row], s.hsa.softmax1, shares);
#pragma unroll
            for (int k = 0; k < HSA_TOKENS / 16; k++)
                hsa_multiply<HD, HD>(acc, shares[k], values, in_tile, true, k * 16, 0);
        }
        __syncwarp();
        if (threadIdx.x % CUDA_WARP == 0)
            cuda_barrier_arrive(room.empty + turn->slot);
    }
}

/* A warp of those that attend; it has the same row of every group. */
template <int HD>
static __device__ __forceinline__ void attend(struct group_room<HD> &room,
                                              const struct group_shape &s, const float *q, float *o)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, row = threadIdx.x / CUDA_WARP;
    const uint32_t heads = s.hsa.heads / s.hsa.kv_heads;
    struct turn turn = {0, 0};
    for (uint32_t item = blockIdx.x; item < s.groups * s.hsa.kv_heads; item += gridDim.x) {
        const struct group group = group_at(s, item);
        const bool there = row < group.count;
        const size_t at = ((group.first + row) * (size_t)s.hsa.heads + group.g * heads) * HD;
        if (there)
            store_queries<HD>(room.queries + row * room.tile, q + at, heads,
                              s.hsa.scale * HSA_LOG2_E);
        __syncwarp();
        float acc[HD / 8][4] = {};
        attend_pages<HD>(room, s, row, &turn, acc);
#pragma unroll
        for (int n = 0; n < HD / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t head = lane / 4 + i * 8;
                if (there && head < heads)
                    *reinterpret_cast<float2 *>(o + at + head * HD + n * 8 + lane % 4 * 2) =
                        float2{acc[n][2 * i], acc[n][2 * i + 1]};
            }
    }
}

/* Grid: blocks that share all groups of all kv heads. */
template <int HD>
static __global__ void __launch_bounds__(group_room<HD>::threads, 1)
    attend_groups(struct group_shape s, const float *q, const float *weights,
                  const bf16 *const *pages, float *o)
{
    CUDA_SHARED(struct group_room<HD>, shared);
    if (threadIdx.x < s.slots) {
        cuda_barrier_init(shared->full + threadIdx.x, 2 * FEEDERS * CUDA_WARP);
        cuda_barrier_init(shared->empty + threadIdx.x, shared->rows);
    }
    __syncthreads();
    cuda_depend_release();
    cuda_depend_wait();
    if (threadIdx.x / CUDA_WARP < shared->rows)
        attend<HD>(*shared, s, q, o);
    else
        feed<HD>(*shared, s, pages, weights);
}

/* False: shared memory has no room for two pages beside the queries. */
template <int HD>
static bool launch(struct ops_context *x, const struct hsa_shape &hsa, uint32_t row_count,
                   const float *q, const float *weights, const void *const *pages, float *o)
{
    typedef group_room<HD> room;
    const uint64_t tiles = (uint64_t)row_count * hsa.kv_heads, all = (uint64_t)x->multiprocessors;
    struct group_shape s;
    s.hsa = hsa;
    s.row_count = row_count;
    /* As many rows as keep all multiprocessors busy for the same time. */
    s.each = cuda_ceil(tiles, all * cuda_ceil(tiles, all * room::rows));
    s.groups = cuda_ceil(row_count, s.each);
    s.slots = 0;
    while (s.slots < SLOTS && room::bytes(s.slots + 1) <= x->shared_most)
        s.slots++;
    if (s.slots < 2)
        return false;
    const uint32_t blocks = min(s.groups * hsa.kv_heads, (uint32_t)all);
    CUDA_ALLOW_SHARED(x, attend_groups<HD>, room::bytes(s.slots));
    CUDA_LAUNCH_EARLY(x, attend_groups<HD>, dim3(blocks), dim3(room::threads), room::bytes(s.slots),
                      s, q, weights, (const bf16 *const *)pages, o);
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
