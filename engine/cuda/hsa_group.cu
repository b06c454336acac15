/* hsa_group.cu - hierarchical sparse attention for many rows: neighbouring rows pick mostly the
 * same chunks, so a block takes a group of rows and brings each page that any of them picked to
 * shared memory once. Some warps merge the rows' picks into plans, one fetches the planned pages'
 * keys and one their values, each of the others attends a row of its own to the pages that this
 * picked, in the order of its picks: the bits are those of a row alone. Blocks go on from group to
 * group, and no warp waits for another's row to end.
 * What bounds it, for 65,536 rows of 16 heads of 64 on an H200: with picks as on text, the warps
 * that attend (0.55 ms; 0.54 where nothing is copied). With random picks, of which a group shares a
 * tenth, 1.05 ms, of which 0.91 stay without copies; copies of whole pages alone would take 0.8 ms
 * (9.1 TB/s out of the L2 cache). */
#include "engine/cuda/hsa.cuh"
#include "engine/cuda/hsa_copy.cuh"
#include "engine/cuda/hsa_tile.cuh"

#define PICKS 8    /* of a row, at most */
#define HALVES 23  /* keys, or values, of a page in shared memory, at most */
#define PLANNERS 2 /* warps that merge; each has a plan of its own */
#define PLANNED 8  /* pages of a plan that those who fetch learn of together */
#define FED 2      /* and those who attend; no more than there are slots of a kind */

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

/* What lies in shared memory: pages; queries; plans; barriers. */
template <int HD> struct group_room {
    static constexpr uint32_t rows = 1024 / HD; /* a warp each: as registers allow */
    static constexpr uint32_t tile = HSA_TILE * HD, half = HSA_TOKENS * HD;
    static constexpr uint32_t most = rows * PICKS; /* pages of a plan */
    bf16 queries[rows * tile];
    planned_page plans[PLANNERS][most];
    uint64_t planned[PLANNERS][most / PLANNED], fed[PLANNERS][most / FED], read[PLANNERS];
    uint64_t full[2][HALVES], empty[2][HALVES]; /* slots of keys, and of values */

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

/* A warp's one arrival, once all lanes have come here; or that of a thread that is alone. */
template <bool ALONE = false> static __device__ __forceinline__ void arrive_once(uint64_t *barrier)
{
    if (!ALONE)
        __syncwarp();
    if (ALONE || threadIdx.x % CUDA_WARP == 0)
        cuda_barrier_arrive(barrier);
}

/* A warp's one arrival that gives a slot back, once what the warp read of it has come: each of its
 * loads went into a lane's `got`. An arrival alone does not wait for loads under way, and tensor
 * copies, which then fill the slot, keep no order with them: on an H200 the last loads of a page
 * returned the next one, in one row of some 2,000. */
static __device__ __forceinline__ void arrive_having(uint64_t *barrier, float got)
{
    cuda_await(got);
    arrive_once(barrier);
}

/* An arrival for each of `count` rows, by as many lanes or by a thread that is alone. */
template <bool ALONE>
static __device__ __forceinline__ void arrive_for_others(uint64_t *barrier, uint32_t count)
{
    if constexpr (ALONE) {
        if (count)
            cuda_barrier_arrive(barrier, count);
    } else if (threadIdx.x % CUDA_WARP < count) {
        cuda_barrier_arrive(barrier);
    }
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

/* The warp that brings the keys, or the values, of what is planned. */
template <int HD, bool TENSOR>
static __device__ __forceinline__ void feed(struct group_room<HD> &room, bf16 *slots,
                                            const struct group_shape &s, const CUtensorMap *map,
                                            int half)
{
    if (TENSOR && threadIdx.x % CUDA_WARP) /* one thread is enough where the copy engine works */
        return;
    const uint32_t count = half == KEYS ? s.slots[KEYS] : s.slots[VALUES];
    struct turn turn = {0, 1}, plan = {0, 0}; /* of a slot that nobody has used; of plans */
    for (uint32_t item = blockIdx.x; item < s.groups * s.hsa.kv_heads;
         item += gridDim.x, go_on(&plan, 1, PLANNERS)) {
        const planned_page *pages = room.plans[plan.slot];
        uint64_t *fed = room.fed[plan.slot];
        uint32_t i = 0;
        for (; i < room.most; i++, go_on(&turn, 1, count)) {
            if (i % PLANNED == 0)
                cuda_barrier_wait(room.planned[plan.slot] + i / PLANNED, plan.parity);
            const planned_page next = pages[i];
            const uint32_t users = __popc(users_of(next));
            if (!users)
                break;
            cuda_barrier_wait(room.empty[half] + turn.slot, turn.parity);
            arrive_for_others<TENSOR>(room.empty[half] + turn.slot, room.rows - users);
            bring<HD, TENSOR>(s, map, half, item / s.groups, page_of(next),
                              slot_of<HD>(slots, s, half, turn.slot), room.full[half] + turn.slot);
            if (i % FED == FED - 1)
                arrive_once<TENSOR>(fed + i / FED);
        }
        for (i /= FED; i < room.most / FED; i++) /* there is no more, but each ends its phase */
            arrive_once<TENSOR>(fed + i);
        cuda_barrier_arrive(room.read + plan.slot);
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

/* Where a row's warp is in the two rings of slots. */
struct place {
    struct turn key, value;
};

static __device__ __forceinline__ void go_on(struct place *p, uint32_t by,
                                             const struct group_shape &s)
{
    go_on(&p->key, by, s.slots[KEYS]);
    go_on(&p->value, by, s.slots[VALUES]);
}

/* acc += weight * attention of the row to the page at `at`. One warp. */
template <int HD>
static __device__ __forceinline__ void
attend_page(struct group_room<HD> &room, bf16 *slots, const struct group_shape &s, uint32_t row,
            float weight, const struct place &at, float acc[HD / 8][4])
{
    const uint32_t in_tile = hsa_lane(true);
    const bf16 *tile = room.queries + row * room.tile;
    const bf16 *keys = slot_of<HD>(slots, s, KEYS, at.key.slot);
    const bf16 *values = slot_of<HD>(slots, s, VALUES, at.value.slot);
    const auto query = [&](int k, uint32_t a[4]) {
        cuda_load_matrices(a, hsa_at<HSA_TILE>(tile, in_tile, 0, k * 16));
    };
    uint32_t shares[HSA_TOKENS / 16][4];
    cuda_barrier_wait(room.full[KEYS] + at.key.slot, at.key.parity);
    hsa_weigh<HD>(
        query, keys, weight, s.hsa.softmax1,
        [&](float most) { arrive_having(room.empty[KEYS] + at.key.slot, most); }, shares);
    cuda_barrier_wait(room.full[VALUES] + at.value.slot, at.value.parity);
#pragma unroll
    for (int k = 0; k < HSA_TOKENS / 16; k++)
        hsa_multiply<HD>(acc, shares[k], values, in_tile, true, k * 16, 0);
    float got = 0;
#pragma unroll
    for (int n = 0; n < HD / 8; n++)
        got += acc[n][0];
    arrive_having(room.empty[VALUES] + at.value.slot, got);
}

/* A row of the group, its picks one by one; `weight`: of the lane's pick, `left`: a bit for each
 * pick. Slots of pages that a row does not use are filled anew without it, so that it cannot tell
 * from a slot whether its own page is on its way: `fed` says so. One warp. */
template <int HD>
static __device__ __forceinline__ void
attend_pages(struct group_room<HD> &room, bf16 *slots, const struct group_shape &s, uint32_t row,
             float weight, uint32_t left, struct turn plan, struct place *at, float acc[HD / 8][4])
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
            go_on(at, i - passed, s);
            passed = i;
            cuda_barrier_wait(room.fed[plan.slot] + (first + i) / FED, plan.parity);
            attend_page<HD>(room, slots, s, row, own, *at, acc);
        }
        go_on(at, there - passed, s);
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
    struct place place = {};
    struct turn plan = {};
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
        attend_pages<HD>(room, slots, s, row, weight, left, plan, &place, acc);
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

/* Set by one thread. */
template <int HD, bool TENSOR>
static __device__ __forceinline__ void set_barriers(struct group_room<HD> &room)
{
    for (int half = KEYS; half <= VALUES; half++)
        for (uint32_t i = 0; i < HALVES; i++) {
            cuda_barrier_init(room.full[half] + i, TENSOR ? 1 : 2 * CUDA_WARP);
            cuda_barrier_init(room.empty[half] + i, room.rows);
        }
    for (uint32_t i = 0; i < PLANNERS; i++) {
        cuda_barrier_init(room.read + i, room.rows * PLANNED + 2 * (TENSOR ? 1 : CUDA_WARP));
        for (uint32_t j = 0; j < room.most / PLANNED; j++)
            cuda_barrier_init(room.planned[i] + j, 1);
        for (uint32_t j = 0; j < room.most / FED; j++)
            cuda_barrier_init(room.fed[i] + j, 2);
    }
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
    if (threadIdx.x == 0)
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
    if (halves < 2 * (FED + 1))
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
