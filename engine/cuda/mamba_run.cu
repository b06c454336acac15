/* mamba_run.cu - Mamba-2 blocks that follow each other, of a recorded step of one row, in one
 * kernel: small vectors pass from block to block of the grid while the weights of the layers to
 * come are on their way to shared memory.
 *
 * Each block of the grid has RUN_WIDTH of the inner width: their rows of x and z of in_proj, the
 * time step of their head, a share of B and C, their part of the states, and RUN_OUT rows of
 * out_proj. Three times a layer all blocks need what all of them made: the hidden state, B and C,
 * and the gated output. It travels in packets of 8 or 16 bytes that carry the number of the layer
 * and are written and read whole: a reader looks at the packet itself until its number is there,
 * and needs no barrier. A packet is written again only when all have read it: each of the three is
 * made from all of the one before it. A warp looks for what it will multiply itself, and begins when
 * that is there. What does not come in packets is looked for before them, and as near as it can be:
 * a look at global memory that others need too takes as long as a packet. So two warps beside those
 * that compute have the weights fetched and watch for them.
 * Sums run in the order of linear.cu and mamba_step.cu, to the bit. */
#include "engine/cuda/exchange.cuh"
#include "engine/cuda/mamba_run.cuh"

#define RUN_WARPS 8 /* that compute; linear.cu shares out depth among as many */
#define RUN_THREADS (RUN_WARPS * CUDA_WARP)
#define RUN_WATCHED (RUN_THREADS + CUDA_WARP) /* those, and the warp that watches */
#define RUN_BLOCK (RUN_WATCHED + CUDA_WARP)   /* and the one that fetches weights */
#define RUN_REGISTERS 112    /* of a thread: there is room for a block of linear_rows.cu beside */
#define RUN_PAD 32           /* elements behind a row in shared memory: off the banks */
#define RUN_DEPTH 32         /* of a product, that a warp takes at a time */
#define RUN_TURNS (1u << 24) /* looks for a packet that must come: seconds, then it is a fault */
/* Clocks before the first look for the gated output, of warps that step no states: looks delay what
 * is written where they look. */
#define RUN_PAUSE 900
#define TILE 8 /* weight rows of a product */
/* Weights come in pieces, few at a time: more under way stand in the queues of the L2 cache before
 * the packets that everybody waits for. */
#define RUN_PIECE 8192 /* bytes */
#define RUN_AHEAD 4    /* of them under way */
#define RUN_SLOTS 2    /* layers whose in_proj there is room for */
#define RUN_PIECES 24  /* of a layer's in_proj or out_proj at most */

/* What the state is stepped with: u and z of the block's rows, the time step and the decay. */
struct inputs {
    float u[RUN_WIDTH], z[RUN_WIDTH], time, decay;
};

/* What a layer has for a result of in_proj: of its column, or of the time step, and its bias. */
struct result_weights {
    struct taps<bf16> weights;
    float tail[TAPS - 1], conv_bias, bias, dt_bias, rate;
};

/* What it has for the block's rows of the states and of out_proj, and those rows' norm of the layer
 * behind it. */
struct alignas(16) row_weights {
    float gate[RUN_WIDTH], next_norm[RUN_OUT], out_bias[RUN_OUT], through;
};
static_assert(RUN_WIDTH + 2 * RUN_OUT == CUDA_WARP, "each has a lane that loads it");

/* Of a row's packets, in the order of their sum, and the norm's scales that come of them: of
 * in_proj and out_proj. Groups of a warp's lanes each; four lanes of each of eight fall on all
 * banks. */
struct squares {
    float of[2 * RUN_WARPS][CUDA_WARP + 4], scales[2];
};

struct barriers {
    uint64_t in_full[RUN_SLOTS][RUN_PIECES], out_full[RUN_PIECES]; /* of each piece */
    uint64_t in_ready, out_ready;                                  /* all of them */
    uint64_t in_free[RUN_SLOTS], state_full, state_free, out_free;
};

/* What a block has in shared memory, in bytes from its beginning; a kernel's argument, since
 * threads that are short of registers would work it out again and again. */
struct room {
    uint32_t in_rows, in_piece, out_piece; /* pieces: in rows of weights */
    uint32_t in, in_slot, out, state, row, sums, squares, columns, inputs, results, rows, layers,
        barriers, bytes;
};

/* Weight rows of a piece, of `all` of depth k. */
static uint32_t piece_rows(uint32_t all, uint32_t k)
{
    const uint32_t least = cuda_ceil(all, RUN_PIECES);
    const uint32_t rows = (uint32_t)(RUN_PIECE / (k * sizeof(bf16)));
    return rows > least ? rows : least;
}

static uint32_t tiles_of(const struct run &r)
{
    return cuda_ceil(2 * RUN_WIDTH + r.columns + 1, TILE);
}

static struct room room_of(const struct run &r)
{
    struct room m;
    uint32_t at = 0;
    const auto next = [&](size_t bytes) {
        const uint32_t from = at;
        at += (uint32_t)((bytes + 127) / 128 * 128);
        return from;
    };
    m.in_rows = 2 * RUN_WIDTH + r.columns + 1;
    m.in_piece = piece_rows(m.in_rows, r.d);
    m.out_piece = piece_rows(RUN_OUT, r.s.inner);
    m.in_slot = (uint32_t)sizeof(bf16) * m.in_rows * (r.d + RUN_PAD);
    m.in = next(RUN_SLOTS * m.in_slot);
    m.out = next(sizeof(bf16) * RUN_OUT * (r.s.inner + RUN_PAD));
    m.state = next(sizeof(float) * RUN_WIDTH * r.s.n);
    m.row = next(sizeof(bf16) * r.s.inner);
    m.sums = next(sizeof(float) * RUN_WARPS * tiles_of(r) * TILE);
    m.squares = next(sizeof(struct squares));
    m.columns = next(sizeof(float) * 2 * r.s.n);
    m.inputs = next(sizeof(struct inputs));
    m.results = next(sizeof(struct result_weights) * m.in_rows);
    m.rows = next(sizeof(struct row_weights) * 2);
    m.layers = next(sizeof(struct run_layer) * RUN_LAYERS);
    m.barriers = next(sizeof(struct barriers));
    m.bytes = at;
    return m;
}

/* Where packet `i` is sent, of which each block of the grid has P: what different blocks write does
 * not share a line of the cache, where one would wait for the other. */
template <int P> static __device__ __forceinline__ uint32_t packet_at(uint32_t i)
{
    return i / P * (uint32_t)(RUN_LINE / sizeof(uint4)) + i % P;
}

/* Column `i` of B and C likewise. */
static __device__ __forceinline__ uint32_t column_at(const struct run &r, uint32_t i)
{
    return i / r.columns * (uint32_t)(RUN_LINE / sizeof(uint2)) + i % r.columns;
}

/* Four elements of a row as a product takes them, with the sum of their squares before `w`. */
static __device__ __forceinline__ uint4 pack_four(const float4 v, const float4 w, uint32_t number)
{
    uint4 packet;
    packet.x = cuda_pack(v.x * w.x, v.y * w.y);
    packet.y = cuda_pack(v.z * w.z, v.w * w.w);
    packet.z = __float_as_uint(fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, v.x * v.x))));
    packet.w = number;
    return packet;
}

/* ---- the weights' way ---- */

static __device__ __forceinline__ uint32_t weight_row(const struct run &r, uint32_t i)
{
    const struct mamba_shape &s = r.s;
    if (i < RUN_WIDTH)
        return s.inner + blockIdx.x * RUN_WIDTH + i; /* x */
    if (i < 2 * RUN_WIDTH)
        return blockIdx.x * RUN_WIDTH + i - RUN_WIDTH; /* z */
    if (i < 2 * RUN_WIDTH + r.columns)
        return 2 * s.inner + blockIdx.x * r.columns + i - 2 * RUN_WIDTH; /* B, C */
    return s.inner + s.conv + blockIdx.x * RUN_WIDTH / s.width;          /* dt */
}

/* One lane of a warp, for all. */
static __device__ __forceinline__ void wait_for_warp(uint64_t *barrier, uint32_t parity)
{
    if (threadIdx.x % CUDA_WARP == 0)
        cuda_barrier_wait(barrier, parity);
    __syncwarp();
}

/* One warp: everything of layer after layer that products and states read, as soon as there is
 * room. */
static __device__ void fetch_layers(const struct run &r, const struct run_layer *layers,
                                    const struct room &m, unsigned char *memory, struct barriers *b)
{
    const float *ssm = NULL; /* the sequence's, known when the kernel in front has ended */
    const uint32_t lane = threadIdx.x % CUDA_WARP, inner = r.s.inner;
    const uint64_t policy = cuda_passing_policy();
    uint64_t *under_way[RUN_AHEAD] = {}; /* pieces, and the parities of their barriers */
    uint32_t parities[RUN_AHEAD] = {};
    /* Rows `from(i)` of `all` of depth k to `to`, piece by piece. */
    const auto fetch_rows = [&](uint64_t *full, bf16 *to, uint32_t all, uint32_t piece, uint32_t k,
                                uint32_t parity, const auto &from) {
        const uint32_t bytes = k * sizeof(bf16);
        for (uint32_t first = 0; first < all; first += piece, full++) {
            const uint32_t rows = all - first < piece ? all - first : piece;
            if (under_way[0])
                wait_for_warp(under_way[0], parities[0]);
#pragma unroll
            for (int i = 0; i + 1 < RUN_AHEAD; i++) {
                under_way[i] = under_way[i + 1];
                parities[i] = parities[i + 1];
            }
            under_way[RUN_AHEAD - 1] = full;
            parities[RUN_AHEAD - 1] = parity;
            if (lane == 0)
                cuda_barrier_expect(full, rows * bytes);
            __syncwarp();
            for (uint32_t i = first + lane; i < first + rows; i += CUDA_WARP)
                cuda_copy_passing(to + i * (k + RUN_PAD), from(i), bytes, full, policy);
        }
    };
    const auto fetch_in = [&](uint32_t l) {
        const uint32_t slot = l % RUN_SLOTS;
        fetch_rows(b->in_full[slot], reinterpret_cast<bf16 *>(memory + m.in + slot * m.in_slot),
                   m.in_rows, m.in_piece, r.d, l / RUN_SLOTS % 2,
                   [&](uint32_t i) { return layers[l].in_proj + (size_t)weight_row(r, i) * r.d; });
    };
    const auto fetch_out = [&](uint32_t l) {
        fetch_rows(b->out_full, reinterpret_cast<bf16 *>(memory + m.out), RUN_OUT, m.out_piece,
                   inner, l & 1, [&](uint32_t i) {
                       return layers[l].out_proj + (size_t)(blockIdx.x * RUN_OUT + i) * inner;
                   });
    };
    const auto fetch_state = [&](uint32_t l) {
        const uint32_t floats = RUN_WIDTH * r.s.n, bytes = floats * sizeof(float);
        if (lane)
            return;
        cuda_barrier_expect(&b->state_full, bytes);
        cuda_copy_bulk(memory + m.state, ssm + layers[l].ssm + (size_t)blockIdx.x * floats, bytes,
                       &b->state_full);
    };
    fetch_in(0);
    fetch_out(0);
    if (r.layer_count > 1)
        fetch_in(1);
    cuda_depend_wait();
    ssm = r.segment->ssm;
    fetch_state(0);
    for (uint32_t l = 1; l < r.layer_count; l++) {
        const uint32_t before = l - 1, parity = before & 1;
        wait_for_warp(&b->in_free[before % RUN_SLOTS], before / RUN_SLOTS % 2);
        if (l + 1 < r.layer_count)
            fetch_in(l + 1);
        wait_for_warp(&b->state_free, parity);
        fetch_state(l);
        wait_for_warp(&b->out_free, parity);
        fetch_out(l);
    }
}

/* ---- a layer ---- */

/* A thread's result of in_proj. */
struct own_result {
    uint32_t o, row;                /* in the block's, in in_proj; o is in_rows: none */
    struct result_weights *weights; /* in shared memory, the thread's own */
    float *tail;                    /* where the sequence has its column's */
};

/* Which one: warps do not divide over x, z, columns and the time step. */
static __device__ __forceinline__ uint32_t own_row(const struct run &r, uint32_t in_rows)
{
    const uint32_t kind = threadIdx.x / CUDA_WARP, lane = threadIdx.x % CUDA_WARP;
    if (kind < 2)
        return lane < RUN_WIDTH ? kind * RUN_WIDTH + lane : in_rows;
    if (kind == 2)
        return lane < r.columns ? 2 * RUN_WIDTH + lane : in_rows;
    return kind == 3 && lane == 0 ? in_rows - 1 : in_rows;
}

/* On its way, which nobody waits for before finish_own. `conv`: the sequence's. */
static __device__ __forceinline__ void load_own(const struct run &r, const struct run_layer &layer,
                                                float *conv, uint32_t in_rows,
                                                struct own_result *own)
{
    const struct mamba_shape &s = r.s;
    struct result_weights *to = own->weights;
    if (own->o >= in_rows)
        return;
    const uint32_t w = own->row;
    if (layer.in_bias)
        cuda_copy_word<4>(&to->bias, layer.in_bias + w);
    if (w >= s.inner + s.conv) {
        cuda_copy_word<4>(&to->dt_bias, layer.weights.dt_bias + (w - s.inner - s.conv));
        cuda_copy_word<4>(&to->rate, layer.weights.a_log + (w - s.inner - s.conv));
    } else if (w >= s.inner) {
        const uint32_t j = w - s.inner;
        own->tail = conv + layer.conv + j;
        cuda_copy_word<8>(&to->weights, layer.weights.conv + (size_t)j * TAPS);
        if (layer.weights.conv_bias)
            cuda_copy_word<4>(&to->conv_bias, layer.weights.conv_bias + j);
#pragma unroll
        for (int k = 0; k < TAPS - 1; k++)
            cuda_copy_word<4>(&to->tail[k], own->tail + (size_t)k * s.conv);
    }
    cuda_copy_commit();
}

/* The next value of the column, whose tail moves on. */
static __device__ __forceinline__ float convolve_own(const struct run &r, float value,
                                                     const struct own_result &own)
{
    struct column<bf16> column;
    column.weights = own.weights->weights;
    column.bias = own.weights->conv_bias;
#pragma unroll
    for (int k = 0; k < TAPS - 1; k++)
        column.tail[k] = own.weights->tail[k];
    const float next = convolve(&column, value);
#pragma unroll
    for (int k = 0; k < TAPS - 1; k++)
        own.tail[(size_t)k * r.s.conv] = column.tail[k];
    return next;
}

/* Products of the row with N tiles of 8 weight rows that lie in shared memory; those from `count`
 * on are not there. To the tensor cores the weights are the rows, two tiles at a time. */
template <int N>
static __device__ __forceinline__ void multiply(const bf16 *weights, const bf16 *row, uint32_t k,
                                                uint32_t count, float *sums)
{
    constexpr int pairs = (N + 1) / 2;
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const bf16 *from[N], *x = row + 8 * (lane % 4);
    float acc[pairs][4] = {};
#pragma unroll
    for (int n = 0; n < N; n++) {
        const uint32_t o = n * TILE + lane / 4;
        from[n] = weights + (o < count ? o : count - 1) * (k + RUN_PAD) + 8 * (lane % 4);
    }
#pragma unroll 4
    for (uint32_t at = warp * RUN_DEPTH; at < k; at += RUN_WARPS * RUN_DEPTH) {
        const uint4 v = *reinterpret_cast<const uint4 *>(x + at);
        const uint32_t low[2] = {v.x, v.y}, high[2] = {v.z, v.w};
#pragma unroll
        for (int p = 0; p < pairs; p++) {
            const uint4 a = *reinterpret_cast<const uint4 *>(from[2 * p] + at);
            uint4 b = {};
            if (2 * p + 1 < N)
                b = *reinterpret_cast<const uint4 *>(from[2 * p + 1] + at);
            const uint32_t left[4] = {a.x, b.x, a.y, b.y}, right[4] = {a.z, b.z, a.w, b.w};
            cuda_mma(acc[p], left, low);
            cuda_mma(acc[p], right, high);
        }
    }
    if (lane % 4 == 0) /* all columns are the same */
#pragma unroll
        for (int n = 0; n < N; n++)
            sums[(warp * N + n) * TILE + lane / 4] = acc[n / 2][n % 2 * 2];
}

/* Result `o` of all warps, in their order. */
template <int N> static __device__ __forceinline__ float sum_of(const float *sums, uint32_t o)
{
    float sum = 0;
#pragma unroll
    for (int w = 0; w < RUN_WARPS; w++)
        sum += sums[w * N * TILE + o];
    return sum;
}

/* ---- the warp that watches ---- */

/* A norm's scale, of E squares a thread: the sum of each warp's, as cuda_warp_sum has it, then that
 * of the warps. One warp. */
template <int E>
static __device__ __forceinline__ float norm_scale(const struct squares &squares, uint32_t k,
                                                   float epsilon)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = lane / 4;
    float v[CUDA_WARP / 4], sum = 0;
#pragma unroll
    for (int i = 0; i < CUDA_WARP / 4; i++) {
        v[i] = squares.of[warp][lane % 4 + 4 * i];
        if (E == 2)
            v[i] += squares.of[RUN_WARPS + warp][lane % 4 + 4 * i];
    }
#pragma unroll
    for (int step = CUDA_WARP / 8; step; step /= 2)
#pragma unroll
        for (int i = 0; i < step; i++)
            v[i] += v[i + step];
    v[0] += __shfl_xor_sync(CUDA_ALL_LANES, v[0], 2);
    v[0] += __shfl_xor_sync(CUDA_ALL_LANES, v[0], 1);
#pragma unroll
    for (int w = 0; w < RUN_WARPS; w++)
        sum += __shfl_sync(CUDA_ALL_LANES, v[0], 4 * w);
    return 1 / sqrtf(sum / (float)k + epsilon);
}

/* On its way, a layer ahead. */
static __device__ __forceinline__ void
load_rows(const struct run &r, const struct run_layer *layers, uint32_t l, struct row_weights *to)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, o = lane % RUN_OUT;
    const struct run_layer &layer = layers[l];
    if (l == r.layer_count)
        return;
    if (lane == 0)
        cuda_copy_word<4>(&to->through, layer.weights.skip + blockIdx.x * RUN_WIDTH / r.s.width);
    if (lane < RUN_WIDTH)
        cuda_copy_word<4>(&to->gate[lane], layer.gate_norm + blockIdx.x * RUN_WIDTH + lane);
    else if (lane >= RUN_WIDTH + RUN_OUT && layer.out_bias)
        cuda_copy_word<4>(&to->out_bias[o], layer.out_bias + blockIdx.x * RUN_OUT + o);
    else if (lane < RUN_WIDTH + RUN_OUT && l + 1 < r.layer_count)
        cuda_copy_word<4>(&to->next_norm[o], layers[l + 1].norm + blockIdx.x * RUN_OUT + o);
    cuda_copy_commit();
}

/* Until all pieces of `all` rows have come, each waited for by a lane; then all may know. */
static __device__ __forceinline__ void watch_pieces(uint64_t *full, uint32_t all, uint32_t piece,
                                                    uint32_t parity, uint64_t *ready)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP;
    if (lane * piece < all)
        cuda_barrier_wait(full + lane, parity);
    __syncwarp();
    if (lane == 0)
        cuda_barrier_arrive(ready);
}

/* What the others would wait for, of layer after layer: that weights have come, the norms' scales,
 * made while they multiply, what the layer to come has for the block's rows. */
static __device__ void watch_layers(const struct run &r, const struct run_layer *layers,
                                    const struct room &m, struct barriers *b,
                                    struct squares *squares, struct row_weights *rows)
{
    for (uint32_t l = 0; l < r.layer_count; l++) {
        watch_pieces(b->in_full[l % RUN_SLOTS], m.in_rows, m.in_piece, l / RUN_SLOTS % 2,
                     &b->in_ready);
        cuda_copy_wait<0>();
        cuda_meet<RUN_WATCHED, 2>();
        squares->scales[0] = norm_scale<1>(*squares, r.d, r.epsilon);
        cuda_meet<RUN_WATCHED, 3>();
        load_rows(r, layers, l + 1, &rows[(l + 1) % 2]);
        watch_pieces(b->out_full, RUN_OUT, m.out_piece, l & 1, &b->out_ready);
        cuda_meet<RUN_WATCHED, 2>();
        squares->scales[1] = norm_scale<2>(*squares, r.s.inner, r.epsilon);
        cuda_meet<RUN_WATCHED, 3>();
    }
}

/* ---- rows and columns ---- */

/* The packet of a row that a thread has, and with E two, that RUN_THREADS behind it: each warp has
 * those of the depth that it multiplies, and waits for no other. */
static __device__ __forceinline__ uint32_t own_packet(void)
{
    constexpr uint32_t part = RUN_DEPTH / 4;
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    return (lane / part * RUN_WARPS + warp) * part + lane % part;
}

static __device__ __forceinline__ void keep_packet(const uint4 packet, uint32_t i, uint32_t k,
                                                   bf16 *row, struct squares *squares)
{
    squares->of[i / CUDA_WARP][i % CUDA_WARP] = __uint_as_float(packet.z);
    if (4 * i < k)
        *reinterpret_cast<uint2 *>(row + 4 * i) = uint2{packet.x, packet.y};
}

/* A row of `k` that all blocks sent, four elements a packet, P packets a block, E a thread, all
 * looked for at once. */
template <int P, int E>
static __device__ __forceinline__ void
receive_row(const uint4 *packets, uint32_t k, uint32_t number, bf16 *row, struct squares *squares)
{
    const uint32_t first = own_packet();
    uint4 own[E];
    uint32_t turns = 0;
    bool there;
#pragma unroll
    for (int e = 0; e < E; e++)
        own[e] = uint4{0, 0, 0, number};
    do {
        there = true;
#pragma unroll
        for (int e = 0; e < E; e++)
            if (4 * (first + e * RUN_THREADS) < k)
                own[e] = cuda_look(packets + packet_at<P>(first + e * RUN_THREADS));
#pragma unroll
        for (int e = 0; e < E; e++)
            there &= own[e].w == number;
        if (++turns > RUN_TURNS)
            __trap();
    } while (!there);
#pragma unroll
    for (int e = 0; e < E; e++)
        keep_packet(own[e], first + e * RUN_THREADS, k, row, squares);
}

/* The row that the first layer begins with. */
static __device__ __forceinline__ void take_row(const struct run &r, const float *norm, bf16 *row,
                                                struct squares *squares)
{
    const uint32_t i = own_packet();
    uint4 packet = {};
    if (4 * i < r.d)
        packet = pack_four(*reinterpret_cast<const float4 *>(r.hidden + 4 * i),
                           *reinterpret_cast<const float4 *>(norm + 4 * i), 0);
    keep_packet(packet, i, r.d, row, squares);
}

/* Where the thread's column of B or C comes to; NULL: it has none. */
static __device__ __forceinline__ const uint2 *column_from(const struct run &r)
{
    const uint32_t n = r.s.n, t = threadIdx.x;
    const uint32_t head = blockIdx.x * RUN_WIDTH / r.s.width,
                   group = head / (r.s.heads / r.s.groups);
    const uint32_t i = t < n ? group * n + t : (r.s.groups + group) * n + t - n;
    return t < 2 * n ? r.columns_sent + column_at(r, i) : NULL;
}

static __device__ __forceinline__ void receive_column(const uint2 *from, uint32_t number,
                                                      float *columns)
{
    uint2 packet;
    uint32_t turns = 0;
    if (!from)
        return;
    do {
        packet = cuda_look(from);
        if (++turns > RUN_TURNS)
            __trap();
    } while (packet.y != number);
    columns[threadIdx.x] = __uint_as_float(packet.x);
}

/* A result of in_proj, before its bias: a column of B or C is sent, what others wait for, the
 * others become inputs. */
static __device__ __forceinline__ void finish_own(const struct run &r, uint32_t number, float sum,
                                                  float scale, const struct own_result &own,
                                                  struct inputs *in)
{
    const struct mamba_shape &s = r.s;
    const uint32_t columns = 2 * RUN_WIDTH, time = columns + r.columns;
    cuda_copy_wait<0>();
    const float value = fmaf(sum, scale, own.weights->bias);
    if (own.o < RUN_WIDTH) {
        in->u[own.o] = convolve_own(r, value, own);
    } else if (own.o < columns) {
        in->z[own.o - RUN_WIDTH] = cuda_silu(value);
    } else if (own.o < time) {
        const float next = convolve_own(r, value, own);
        cuda_send(r.columns_sent + blockIdx.x * (RUN_LINE / sizeof(uint2)) + own.o - columns,
                  uint2{__float_as_uint(next), number});
    } else {
        in->time = fminf(fmaxf(cuda_softplus(value + own.weights->dt_bias), s.dt_min), s.dt_max);
        in->decay = expf(in->time * -expf(own.weights->rate));
    }
}

#define RUN_STATES 4 /* rows of the state that a warp steps together: a packet */

/* Steps the warp's rows of the block's, from `first` on, sends their outputs, keeps the state in
 * `kept`, the layer's. */
template <int V>
static __device__ __forceinline__ void
step_states(const struct run &r, uint32_t first, const float *state, const float *columns,
            const struct inputs &in, const struct row_weights &weights, uint32_t number,
            float *kept)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, n = r.s.n;
    const uint32_t at = blockIdx.x * RUN_WIDTH + first;
    const float *b = columns + V * lane, *u = in.u + first, *z = in.z + first;
    const floats<V> bs = *reinterpret_cast<const floats<V> *>(b),
                    cs = *reinterpret_cast<const floats<V> *>(b + n);
    floats<V> h[RUN_STATES];
    float sums[RUN_STATES];
#pragma unroll
    for (int i = 0; i < RUN_STATES; i++) {
        h[i] = *reinterpret_cast<const floats<V> *>(state + (first + i) * n + V * lane);
        const float add = in.time * u[i];
        sums[i] = 0;
#pragma unroll
        for (int k = 0; k < V; k++) {
            h[i].v[k] = fmaf(in.decay, h[i].v[k], add * bs.v[k]);
            sums[i] = fmaf(h[i].v[k], cs.v[k], sums[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < RUN_STATES; i++)
        sums[i] = fmaf(weights.through, u[i], cuda_warp_sum(sums[i])) * z[i];
    if (lane == 0)
        cuda_send(r.gated_sent + packet_at<RUN_WIDTH / 4>(at / RUN_STATES),
                  pack_four(float4{sums[0], sums[1], sums[2], sums[3]},
                            *reinterpret_cast<const float4 *>(&weights.gate[first]), number));
    float *to = kept + (size_t)at * n + V * lane;
#pragma unroll
    for (int i = 0; i < RUN_STATES; i++)
        *reinterpret_cast<floats<V> *>(to + (size_t)i * n) = h[i];
}

#define INPUT_TILES (2 * RUN_WIDTH / TILE) /* x and z; after them B, C and the time step */

/* T: tiles of in_proj's rows; N is 32 V. Grid: parts of RUN_WIDTH. */
template <int T, int V>
static __global__ void __maxnreg__(RUN_REGISTERS)
    run_layers(const __grid_constant__ struct run r, const __grid_constant__ struct room m)
{
    CUDA_SHARED(unsigned char, memory);
    struct barriers *barriers = reinterpret_cast<struct barriers *>(memory + m.barriers);
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    if (threadIdx.x == 0)
        for (uint32_t i = 0; i < sizeof *barriers / sizeof(uint64_t); i++)
            cuda_barrier_init(reinterpret_cast<uint64_t *>(barriers) + i, 1);
    struct run_layer *layers = reinterpret_cast<struct run_layer *>(memory + m.layers);
    for (uint32_t i = threadIdx.x; i < r.layer_count * sizeof *layers / sizeof(uint64_t);
         i += blockDim.x)
        reinterpret_cast<uint64_t *>(layers)[i] = reinterpret_cast<const uint64_t *>(r.layers)[i];
    struct row_weights *rows = reinterpret_cast<struct row_weights *>(memory + m.rows);
    if (threadIdx.x < 2)
        rows[threadIdx.x] = {};
    cuda_barriers_ready();
    __syncthreads();
    cuda_depend_release();
    struct squares *squares = reinterpret_cast<struct squares *>(memory + m.squares);
    if (warp == RUN_WARPS) {
        load_rows(r, layers, 0, rows);
        watch_layers(r, layers, m, barriers, squares, rows);
        return;
    }
    if (warp > RUN_WARPS) {
        fetch_layers(r, layers, m, memory, barriers);
        return;
    }
    bf16 *row = reinterpret_cast<bf16 *>(memory + m.row);
    float *sums = reinterpret_cast<float *>(memory + m.sums),
          *shared_sums = sums + RUN_WARPS * INPUT_TILES * TILE,
          *columns = reinterpret_cast<float *>(memory + m.columns);
    struct inputs *in = reinterpret_cast<struct inputs *>(memory + m.inputs);
    const struct mamba_shape &s = r.s;
    const bool has_out = threadIdx.x < RUN_OUT, steps = warp < RUN_WIDTH / RUN_STATES;
    const uint32_t out_at = blockIdx.x * RUN_OUT + threadIdx.x % RUN_OUT;
    const uint32_t first = warp % (RUN_WIDTH / RUN_STATES) * RUN_STATES; /* of its rows */
    const uint2 *const from = column_from(r);
    struct own_result own = {};
    own.o = own_row(r, m.in_rows);
    own.row = weight_row(r, own.o);
    own.weights = reinterpret_cast<struct result_weights *>(memory + m.results) + own.o;
    if (own.o < m.in_rows)
        *own.weights = {};
    cuda_depend_wait();
    float *const ssm = r.segment->ssm, *const conv = r.segment->conv;
    load_own(r, layers[0], conv, m.in_rows, &own);
    const uint32_t serial = *reinterpret_cast<volatile uint32_t *>(r.serial);
    float x = has_out ? r.hidden[out_at] : 0;
    float *kept = r.kept ? *r.kept : NULL;
    for (uint32_t l = 0; l < r.layer_count; l++) {
        const uint32_t number = serial + l + 1;
        /* in_proj */
        const uint32_t slot = l % RUN_SLOTS;
        const bf16 *in_proj = reinterpret_cast<bf16 *>(memory + m.in + slot * m.in_slot);
        wait_for_warp(&barriers->in_ready, l & 1);
        if (l == 0)
            take_row(r, layers[0].norm, row, squares);
        else
            receive_row<RUN_OUT / 4, 1>(r.hidden_sent, r.d, number - 1, row, squares);
        cuda_arrive<RUN_WATCHED, 2>();
        __syncwarp();
        /* B and C first, which travel while x and z are made. */
        multiply<T - INPUT_TILES>(in_proj + INPUT_TILES * TILE * (r.d + RUN_PAD), row, r.d,
                                  m.in_rows - INPUT_TILES * TILE, shared_sums);
        cuda_meet<RUN_WATCHED, 3>();
        const float scale = squares->scales[0];
        if (own.o >= 2 * RUN_WIDTH && own.o < m.in_rows)
            finish_own(r, number, sum_of<T - INPUT_TILES>(shared_sums, own.o - 2 * RUN_WIDTH),
                       scale, own, in);
        __syncwarp();
        multiply<INPUT_TILES>(in_proj, row, r.d, 2 * RUN_WIDTH, sums);
        cuda_meet<RUN_THREADS>();
        if (threadIdx.x == 0)
            cuda_barrier_arrive(&barriers->in_free[slot]);
        if (own.o < 2 * RUN_WIDTH)
            finish_own(r, number, sum_of<INPUT_TILES>(sums, own.o), scale, own, in);
        /* The recurrence. */
        if (threadIdx.x == RUN_THREADS - 1) /* for all, who meet */
            cuda_barrier_wait(&barriers->state_full, l & 1);
        __syncwarp();
        receive_column(from, number, columns);
        cuda_meet<RUN_THREADS>();
        if (steps)
            step_states<V>(r, first, reinterpret_cast<float *>(memory + m.state), columns, *in,
                           rows[l % 2], number, ssm + layers[l].ssm);
        else
            cuda_pause(RUN_PAUSE);
        if (l + 1 < r.layer_count)
            load_own(r, layers[l + 1], conv, m.in_rows, &own);
        /* out_proj */
        wait_for_warp(&barriers->out_ready, l & 1);
        receive_row<RUN_WIDTH / 4, 2>(r.gated_sent, s.inner, number, row, squares);
        cuda_arrive<RUN_WATCHED, 2>();
        __syncwarp();
        multiply<1>(reinterpret_cast<bf16 *>(memory + m.out), row, s.inner, RUN_OUT, sums);
        cuda_meet<RUN_WATCHED, 3>();
        if (threadIdx.x == 0) {
            cuda_barrier_arrive(&barriers->state_free);
            cuda_barrier_arrive(&barriers->out_free);
        }
        if (warp == 0) {
            if (has_out)
                x = fmaf(sum_of<1>(sums, threadIdx.x), squares->scales[1],
                         rows[l % 2].out_bias[threadIdx.x] + x);
            float4 v;
            v.x = __shfl_sync(CUDA_ALL_LANES, x, lane & ~3u);
            v.y = __shfl_sync(CUDA_ALL_LANES, x, (lane & ~3u) + 1);
            v.z = __shfl_sync(CUDA_ALL_LANES, x, (lane & ~3u) + 2);
            v.w = __shfl_sync(CUDA_ALL_LANES, x, lane | 3u);
            if (has_out && l + 1 == r.layer_count) {
                r.hidden[out_at] = x;
                if (kept)
                    kept[out_at] = x;
            } else if (has_out && lane % 4 == 0) {
                cuda_send(
                    r.hidden_sent + packet_at<RUN_OUT / 4>(out_at / 4),
                    pack_four(
                        v, *reinterpret_cast<const float4 *>(&rows[l % 2].next_norm[threadIdx.x]),
                        number));
            }
        }
    }
    if (blockIdx.x == 0 && threadIdx.x == 0)
        *r.serial = serial + r.layer_count;
}

template <int T, int V> static void launch(struct ops_context *x, const struct run &r)
{
    const struct room m = room_of(r);
    CUDA_ALLOW_SHARED(x, (run_layers<T, V>), m.bytes);
    CUDA_LAUNCH_TOGETHER(x, (run_layers<T, V>), dim3(r.s.inner / RUN_WIDTH), dim3(RUN_BLOCK),
                         m.bytes, r, m);
}

template <int T> static void choose_width(struct ops_context *x, const struct run &r)
{
    r.s.n == 4 * CUDA_WARP ? launch<T, 4>(x, r) : launch<T, 2>(x, r);
}

void cuda_run_launch(struct ops_context *x, const struct run &r)
{
    tiles_of(r) == 5 ? choose_width<5>(x, r) : choose_width<6>(x, r);
}

void cuda_run_open(const struct ops_context *x, struct run *r)
{
    const uint32_t blocks = x->config.inner_size / RUN_WIDTH;
    struct mamba_shape &s = r->s;
    s = mamba_shape_of(&x->config);
    r->d = x->config.hidden_size;
    r->epsilon = x->config.norm_epsilon;
    const uint32_t columns = 2 * s.groups * s.n;
    if (x->wide || x->states_bf16 || !x->early || s.inner != 2 * r->d ||
        s.inner % (8 * RUN_WIDTH) || s.width % RUN_WIDTH || s.taps != TAPS ||
        (s.n != 4 * CUDA_WARP && s.n != 2 * CUDA_WARP) || blocks > (uint32_t)x->multiprocessors ||
        r->d > 4 * RUN_THREADS || columns % blocks)
        return;
    r->columns = columns / blocks;
    const uint32_t tiles = tiles_of(*r);
    r->covers = (tiles == 5 || tiles == 6) && room_of(*r).bytes <= x->shared_most;
}
