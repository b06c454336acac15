/* hsa_group.cu - hierarchical sparse attention for many rows: neighbouring rows pick mostly the
 * same chunks, so a block takes a group of rows and brings each page that any of them picked to
 * shared memory once. Some warps merge the rows' picks into plans, one fetches the planned pages'
 * keys and one their values, each of the others attends a row of its own to the pages that this
 * picked, in the order of its picks: the bits are those of a row alone. Blocks go on from group to
 * group, and no warp waits for another's row to end.
 * What bounds it, for 65,536 rows of 16 heads of 64 on an H200: with picks as on text, the warps
 * that attend (0.55 ms; the same where nothing is copied). With random picks, of which a group
 * shares a tenth, 0.81 ms, of which 0.63 stay without copies. */
#include "engine/cuda/hsa.cuh"
#include "engine/cuda/hsa_copy.cuh"
#include "engine/cuda/hsa_tile.cuh"

#define PICKS 8    /* of a row, at most */
#define HALVES 23  /* keys, or values, of a page in shared memory, at most */
#define PLANNERS 2 /* warps that merge; each has a plan of its own */
#define PLANNED 8  /* pages of a plan that others learn of together */

/* A plan's next page: its address / 16, and above that the rows that use it, a bit a row; 0: no
 * more of this group. */
typedef uint64_t planned_page;
#define PLAN_SHIFT 48

static __device__ __forceinline__ uint32_t users_of(planned_page p)
{
    return (uint32_t)(p >> PLAN_SHIFT);
}

static __device__ __forceinline__ const bf16 *page_of(planned_page p)
{
    return reinterpret_cast<const bf16 *>((p & (((uint64_t)1 << PLAN_SHIFT) - 1)) * 16);
}

/* What lies in shared memory: pages; queries; plans; where pages are. Pages are numbered one after
 * the other over all plans, modulo `ring`. */
template <int HD> struct group_room {
    static constexpr uint32_t rows = 1024 / HD; /* a warp each: as registers allow */
    static constexpr uint32_t tile = HSA_TILE * HD, half = HSA_TOKENS * HD;
    static constexpr uint32_t most = rows * PICKS; /* pages of a plan */
    static constexpr uint32_t ring = PLANNERS * most;
    bf16 queries[rows * tile];
    planned_page plans[PLANNERS][most];
    uint64_t planned[PLANNERS][most / PLANNED], read[PLANNERS];
    uint64_t full[2][ring];      /* a page's keys, and its values, have come */
    uint8_t where[2][ring];      /* to this slot */
    uint32_t done[2][CUDA_WARP]; /* of a slot: a bit for each row, turned once it has read */

    static constexpr size_t bytes(uint32_t halves)
    {
        static_assert(rows <= 16, "a plan has 16 bits for rows");
        return (size_t)halves * half * sizeof(bf16) + sizeof(group_room);
    }
};

struct group_shape {
    struct hsa_shape hsa;
    uint32_t row_count, each, groups; /* rows in all, of a group; groups */
    uint32_t slots[2];                /* for keys, for values */
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

/* Where the picks of a row begin. */
static __device__ __forceinline__ size_t picks_of(const struct hsa_shape &s, size_t row, uint32_t g)
{
    return (row * s.retrieval_heads + (s.retrieval_heads == 1 ? 0 : g)) * s.topk;
}

/* One of `count` slots after the other. */
struct turn {
    uint32_t slot, parity;
};

static __device__ __forceinline__ void go_on(struct turn *t, uint32_t by, uint32_t count)
{
    for (t->slot += by; t->slot >= count; t->slot -= count)
        t->parity ^= 1;
}

enum half { KEYS, VALUES };

template <int HD>
static __device__ __forceinline__ bf16 *slot_of(bf16 *slots, const struct group_shape &s, int half,
                                                uint32_t slot)
{
    return slots + ((half == VALUES ? s.slots[KEYS] : 0) + slot) * group_room<HD>::half;
}

/* A warp's one arrival, once all lanes have come here. */
static __device__ __forceinline__ void arrive_once(uint64_t *barrier)
{
    __syncwarp();
    if (threadIdx.x % CUDA_WARP == 0)
        cuda_barrier_arrive(barrier);
}

/* The warp of `row` gives a slot back, once what it read there has come: `got` is made of its last
 * loads, and those before went into products in front of it. Nothing else waits for loads under
 * way, and tensor copies, which then fill the slot, keep no order with them: on an H200 the last
 * loads of a page returned the next one, in one row of some 2,000. */
static __device__ __forceinline__ void give_back(uint32_t *done, uint32_t row, uint32_t got)
{
    cuda_await(got);
    if (threadIdx.x % CUDA_WARP == 0)
        atomicXor(done, 1u << row);
}

/* The picks that a lane's row has not had yet, the next one first. */
struct picks {
    const bf16 *pages[PICKS]; /* NULL behind the last */
    uint32_t left;            /* how many */
};

static __device__ __forceinline__ void drop(struct picks *p, int first)
{
#pragma unroll
    for (int i = 0; i < PICKS - 1; i++)
        if (i >= first)
            p->pages[i] = p->pages[i + 1];
    p->pages[PICKS - 1] = NULL;
    p->left--;
}

static __device__ __forceinline__ void load_picks(struct picks *p, const bf16 *const *pages,
                                                  uint32_t count)
{
#pragma unroll
    for (int j = 0; j < PICKS; j++) /* all under way at once */
        p->pages[j] = (uint32_t)j < count ? pages[j] : NULL;
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

/* A warp of those that merge the picks of a group's rows, a lane each, while pages of the groups
 * before are fetched: the `planner`-th of every PLANNERS groups. */
template <int HD>
static __device__ __forceinline__ void plan_groups(struct group_room<HD> &room,
                                                   const struct group_shape &s,
                                                   const bf16 *const *pages, uint32_t planner)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP;
    uint32_t parity = 1; /* of a plan that nobody has made */
    for (uint32_t item = blockIdx.x + planner * gridDim.x; item < s.groups * s.hsa.kv_heads;
         item += PLANNERS * gridDim.x, parity ^= 1) {
        const struct group group = group_at(s, item);
        struct picks picks;
        load_picks(&picks, pages + picks_of(s.hsa, group.first + lane, group.g),
                   lane < group.count ? s.hsa.topk : 0);
        cuda_barrier_wait(room.read + planner, parity);
        uint32_t most = PICKS;
        for (uint32_t i = 0; i < room.most; i++) {
            const bf16 *page = next_page(picks, &most);
            const bool mine = page && picks.pages[0] == page;
            const uint32_t users = __ballot_sync(CUDA_ALL_LANES, mine);
            if (lane == 0)
                room.plans[planner][i] =
                    (uint64_t)users << PLAN_SHIFT | reinterpret_cast<uintptr_t>(page) / 16;
            if (mine)
                drop(&picks, 0);
            if (i % PLANNED == PLANNED - 1)
                arrive_once(room.planned[planner] + i / PLANNED);
        }
    }
}

/* Keys, or values, of a page on their way to a slot. One thread with tensor copies, or one warp. */
template <int HD, bool TENSOR>
static __device__ __forceinline__ void bring(const struct group_shape &s, const CUtensorMap *map,
                                             int half, uint32_t g, const bf16 *page, bf16 *to,
                                             uint64_t *full)
{
    if constexpr (TENSOR) {
        cuda_before_copies();
        cuda_barrier_expect(full, group_room<HD>::half * sizeof(bf16));
        hsa_fetch_half(to, map, g * (HD / HSA_BLOCK), half * HSA_TOKENS, page, full);
    } else {
        const uint32_t stride = s.hsa.kv_heads * HD;
        hsa_fetch<HD>(to, page + g * HD + (size_t)half * HSA_TOKENS * stride, stride);
        cuda_barrier_copied(full);
        cuda_barrier_arrive(full);
    }
}

/* The slots that are free, of `count`: a bit for each, at least one. `done`: a lane's own, whose
 * page all users have read once it is `expected`. */
static __device__ __forceinline__ uint32_t wait_for_slots(const volatile uint32_t *done,
                                                          uint32_t expected, uint32_t count)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP;
    uint32_t free;
    while (!(free = __ballot_sync(CUDA_ALL_LANES, lane < count && *done == expected)))
        continue;
    return free;
}

/* The warp that brings the keys, or the values, of what is planned, to whichever slots are free: a
 * lane has the slot of its number. A thread that sends for one page after the other takes 0.3 us
 * each, which bounds random picks, so that all free slots are filled together. */
template <int HD, bool TENSOR>
static __device__ __forceinline__ void feed(struct group_room<HD> &room, bf16 *slots,
                                            const struct group_shape &s, const CUtensorMap *map,
                                            int half)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP;
    const uint32_t count = half == KEYS ? s.slots[KEYS] : s.slots[VALUES];
    uint32_t *done = room.done[half] + lane;
    uint32_t expected = 0, number = 0; /* of the next page */
    struct turn plan = {};
    for (uint32_t item = blockIdx.x; item < s.groups * s.hsa.kv_heads;
         item += gridDim.x, go_on(&plan, 1, PLANNERS)) {
        const uint32_t g = item / s.groups;
        uint32_t there = PLANNED;
        for (uint32_t first = 0; first < room.most && there == PLANNED; first += PLANNED) {
            cuda_barrier_wait(room.planned[plan.slot] + first / PLANNED, plan.parity);
            planned_page pages = 0;
            if (lane < PLANNED)
                pages = room.plans[plan.slot][first + lane];
            there = __popc(__ballot_sync(CUDA_ALL_LANES, users_of(pages) != 0));
            for (uint32_t i = 0, more; i < there; i += more) {
                const uint32_t free = wait_for_slots(done, expected, count);
                more = min(__popc(free), there - i);
                const uint32_t mine = __popc(free & ((1u << lane) - 1)); /* of these */
                const planned_page next = __shfl_sync(CUDA_ALL_LANES, pages, i + mine);
                const uint32_t at = (number + i + mine) % room.ring;
                const bool takes = free >> lane & 1 && mine < more;
                if (takes) {
                    expected ^= users_of(next);
                    room.where[half][at] = (uint8_t)lane;
                }
                if constexpr (TENSOR) {
                    if (takes)
                        bring<HD, true>(s, map, half, g, page_of(next),
                                        slot_of<HD>(slots, s, half, lane), room.full[half] + at);
                } else {
                    uint32_t left = __ballot_sync(CUDA_ALL_LANES, takes);
                    for (; left; left &= left - 1) {
                        const uint32_t slot = __ffs(left) - 1;
                        bring<HD, false>(s, map, half, g,
                                         page_of(__shfl_sync(CUDA_ALL_LANES, next, slot)),
                                         slot_of<HD>(slots, s, half, slot),
                                         room.full[half] + __shfl_sync(CUDA_ALL_LANES, at, slot));
                    }
                }
            }
            number += there;
        }
        arrive_once(room.read + plan.slot);
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
        *reinterpret_cast<uint2 *>(to + hsa_place<HSA_TILE>(head, i % HD)) = words;
    }
}

/* acc += weight * attention of the row to the page `at`. One warp. */
template <int HD>
static __device__ __forceinline__ void
attend_page(struct group_room<HD> &room, bf16 *slots, const struct group_shape &s, uint32_t row,
            float weight, const struct turn &at, float acc[HD / 8][4])
{
    const uint32_t in_tile = hsa_lane(true);
    const bf16 *tile = room.queries + row * room.tile;
    const auto query = [&](int k, uint32_t a[4]) {
        cuda_load_matrices(a, hsa_at<HSA_TILE>(tile, in_tile, 0, k * 16));
    };
    uint32_t shares[HSA_TOKENS / 16][4], got;
    cuda_barrier_wait(room.full[KEYS] + at.slot, at.parity);
    const uint32_t key = room.where[KEYS][at.slot];
    hsa_weigh<HD>(
        query, slot_of<HD>(slots, s, KEYS, key), weight, s.hsa.softmax1,
        [&](uint32_t keys) { give_back(room.done[KEYS] + key, row, keys); }, shares);
    cuda_barrier_wait(room.full[VALUES] + at.slot, at.parity);
    const uint32_t value = room.where[VALUES][at.slot];
    const bf16 *values = slot_of<HD>(slots, s, VALUES, value);
#pragma unroll
    for (int k = 0; k < HSA_TOKENS / 16; k++)
        got = hsa_multiply<HD>(acc, shares[k], values, in_tile, true, k * 16, 0);
    give_back(room.done[VALUES] + value, row, got);
}

/* A row of the group, its picks one by one; `weight`: of the lane's pick, `left`: a bit for each
 * pick; `at`: where the plan begins, then behind it. One warp. */
template <int HD>
static __device__ __forceinline__ void
attend_pages(struct group_room<HD> &room, bf16 *slots, const struct group_shape &s, uint32_t row,
             float weight, uint32_t left, struct turn plan, struct turn *at, float acc[HD / 8][4])
{
    const uint32_t lane = threadIdx.x % CUDA_WARP;
    uint32_t there = PLANNED;
    for (uint32_t first = 0; first < room.most && there == PLANNED; first += PLANNED) {
        cuda_barrier_wait(room.planned[plan.slot] + first / PLANNED, plan.parity);
        uint32_t users = 0, passed = 0;
        if (lane < PLANNED)
            users = users_of(room.plans[plan.slot][first + lane]);
        there = __popc(__ballot_sync(CUDA_ALL_LANES, users != 0));
        uint32_t mine = __ballot_sync(CUDA_ALL_LANES, users >> row & 1);
        for (; mine; mine &= mine - 1, left &= left - 1) {
            const uint32_t i = __ffs(mine) - 1;
            const float own = __shfl_sync(CUDA_ALL_LANES, weight, __ffs(left) - 1);
            go_on(at, i - passed, room.ring);
            passed = i;
            attend_page<HD>(room, slots, s, row, own, *at, acc);
        }
        go_on(at, there - passed, room.ring);
    }
    if (lane < PLANNED)
        cuda_barrier_arrive(room.read + plan.slot);
}

/* A warp of those that attend; it has the same row of every group. */
template <int HD>
static __device__ __forceinline__ void
attend(struct group_room<HD> &room, bf16 *slots, const struct group_shape &s, const float *q,
       const float *weights, const bf16 *const *pages, float *o)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, row = threadIdx.x / CUDA_WARP;
    const uint32_t heads = s.hsa.heads / s.hsa.kv_heads;
    struct turn page = {}, plan = {};
    for (uint32_t item = blockIdx.x; item < s.groups * s.hsa.kv_heads;
         item += gridDim.x, go_on(&plan, 1, PLANNERS)) {
        const struct group group = group_at(s, item);
        const bool there = row < group.count;
        const size_t at = ((group.first + row) * (size_t)s.hsa.heads + group.g * heads) * HD;
        float weight = 0;
        bool picked = false;
        if (there && lane < s.hsa.topk) {
            const size_t pick = picks_of(s.hsa, group.first + row, group.g) + lane;
            weight = weights[pick];
            picked = pages[pick] != NULL;
        }
        const uint32_t left = __ballot_sync(CUDA_ALL_LANES, picked);
        if (there)
            store_queries<HD>(room.queries + row * room.tile, q + at, heads,
                              s.hsa.scale * HSA_LOG2_E);
        __syncwarp();
        float acc[HD / 8][4] = {};
        attend_pages<HD>(room, slots, s, row, weight, left, plan, &page, acc);
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

template <int HD>
static constexpr uint32_t threads_of = (group_room<HD>::rows + PLANNERS + 2) * CUDA_WARP;

/* Where nothing is planned yet. All threads, of which there are more than pages in the ring. */
template <int HD, bool TENSOR>
static __device__ __forceinline__ void set_barriers(struct group_room<HD> &room)
{
    const uint32_t i = threadIdx.x;
    static_assert(threads_of<HD> >= group_room<HD>::ring, "a thread sets up a page's barriers");
    if (i < room.ring)
        for (int half = KEYS; half <= VALUES; half++)
            cuda_barrier_init(room.full[half] + i, TENSOR ? 1 : 2 * CUDA_WARP);
    if (i < room.ring / PLANNED)
        cuda_barrier_init(&room.planned[0][0] + i, 1);
    if (i < PLANNERS)
        cuda_barrier_init(room.read + i, room.rows * PLANNED + 2);
    if (i < CUDA_WARP)
        room.done[KEYS][i] = room.done[VALUES][i] = 0;
    cuda_barriers_ready();
}

/* Grid: blocks that share all groups of all kv heads. */
template <int HD, bool TENSOR>
static __global__ void __launch_bounds__(threads_of<HD>, 1)
    attend_groups(const __grid_constant__ CUtensorMap map, struct group_shape s, const float *q,
                  const float *weights, const bf16 *const *pages, float *o)
{
    CUDA_SHARED_TILES(bf16, slots);
    typedef group_room<HD> room_type;
    room_type &room =
        *reinterpret_cast<room_type *>(slots + (s.slots[KEYS] + s.slots[VALUES]) * room_type::half);
    set_barriers<HD, TENSOR>(room);
    __syncthreads();
    cuda_depend_release();
    cuda_depend_wait();
    const uint32_t warp = threadIdx.x / CUDA_WARP;
    if (warp < room.rows) {
        if (HD == 64) /* sixteen warps that attend, four others: 96 registers each at first */
            cuda_more_registers<104>();
        attend<HD>(room, slots, s, q, weights, pages, o);
        return;
    }
    if (HD == 64)
        cuda_fewer_registers<64>();
    if (warp < room.rows + PLANNERS)
        plan_groups<HD>(room, s, pages, warp - room.rows);
    else
        feed<HD, TENSOR>(room, slots, s, &map, warp - room.rows - PLANNERS);
}

/* False: shared memory has no room for enough pages beside the queries. */
template <int HD, bool TENSOR>
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
    uint32_t halves = 0;
    while (halves < HALVES && room::bytes(halves + 1) <= x->shared_most)
        halves++;
    if (halves < 4)
        return false;
    s.slots[KEYS] = halves / 2 - 1; /* they are read sooner than values */
    s.slots[VALUES] = halves - s.slots[KEYS];
    CUtensorMap map = {};
    if (TENSOR && !hsa_map_pages(x, hsa.kv_heads * HD, HD / HSA_BLOCK, &map))
        return false;
    const uint32_t blocks = min(s.groups * hsa.kv_heads, (uint32_t)all);
    CUDA_ALLOW_SHARED(x, (attend_groups<HD, TENSOR>), room::bytes(halves));
    CUDA_LAUNCH_EARLY(x, (attend_groups<HD, TENSOR>), dim3(blocks), dim3(threads_of<HD>),
                      room::bytes(halves), map, s, q, weights, (const bf16 *const *)pages, o);
    return true;
}

bool cuda_attend_groups(struct ops_context *x, const struct hsa_shape &s, uint32_t row_count,
                        const float *q, const float *weights, const void *const *pages, float *o)
{
    const size_t tiles = (size_t)row_count * s.kv_heads;
    const size_t all = (size_t)x->multiprocessors;
    if (s.topk > PICKS || tiles < 4 * all) /* a block a row fills the device better */
        return false;
    if (hsa_maps_pages(x))
        return s.width == 128 ? launch<128, true>(x, s, row_count, q, weights, pages, o)
                              : launch<64, true>(x, s, row_count, q, weights, pages, o);
    return s.width == 128 ? launch<128, false>(x, s, row_count, q, weights, pages, o)
                          : launch<64, false>(x, s, row_count, q, weights, pages, o);
}
