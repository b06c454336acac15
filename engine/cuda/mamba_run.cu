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
 * made from all of the one before it. Sums run in the order of linear.cu and mamba_step.cu, to the
 * bit. */
#include "engine/cuda/exchange.cuh"
#include "engine/cuda/mamba_run.cuh"

#define RUN_WARPS 8 /* that compute; linear.cu shares out depth among as many */
#define RUN_THREADS (RUN_WARPS * CUDA_WARP)
#define RUN_PAD 32           /* elements behind a row in shared memory: off the banks */
#define RUN_DEPTH 32         /* of a product, that a warp takes at a time */
#define RUN_TURNS (1u << 24) /* looks for a packet that must come: seconds, then it is a fault */
#define TILE 8               /* weight rows of a product */
/* Weights come in pieces, one after the other: more under way stand in the queues of the L2 cache
 * before the packets that everybody waits for. */
#define RUN_PIECE 16384 /* bytes */
#define RUN_PIECES 24   /* of a layer's in_proj or out_proj at most */

/* What the state is stepped with: u and z of the block's rows, the time step and the decay. */
struct inputs {
    float u[RUN_WIDTH], z[RUN_WIDTH], time, decay;
};

struct barriers {
    uint64_t in_full[RUN_PIECES], out_full[RUN_PIECES]; /* of each piece */
    uint64_t in_free, state_full, state_free, out_free;
};

/* What a block has in shared memory. */
struct room {
    uint32_t in_rows, in_piece, out_piece; /* pieces: in rows of weights */
    size_t in, out, state, row, sums, parts, columns, inputs, barriers, bytes;
};

/* Weight rows of a piece, of `all` of depth k. */
static __host__ __device__ __forceinline__ uint32_t piece_rows(uint32_t all, uint32_t k)
{
    const uint32_t least = (all + RUN_PIECES - 1) / RUN_PIECES;
    const uint32_t rows = (uint32_t)(RUN_PIECE / (k * sizeof(bf16)));
    return rows > least ? rows : least;
}

static __host__ __device__ __forceinline__ struct room room_of(const struct run &r, uint32_t tiles)
{
    struct room m;
    size_t at = 0;
    const auto next = [&](size_t bytes) {
        const size_t from = at;
        at += (bytes + 127) / 128 * 128;
        return from;
    };
    m.in_rows = 2 * RUN_WIDTH + r.columns + 1;
    m.in_piece = piece_rows(m.in_rows, r.d);
    m.out_piece = piece_rows(RUN_OUT, r.s.inner);
    m.in = next(sizeof(bf16) * m.in_rows * (r.d + RUN_PAD));
    m.out = next(sizeof(bf16) * RUN_OUT * (r.s.inner + RUN_PAD));
    m.state = next(sizeof(float) * RUN_WIDTH * r.s.n);
    m.row = next(sizeof(bf16) * r.s.inner);
    m.sums = next(sizeof(float) * RUN_WARPS * tiles * TILE);
    m.parts = next(sizeof(float) * 2 * RUN_WARPS);
    m.columns = next(sizeof(float) * 2 * r.s.n);
    m.inputs = next(sizeof(struct inputs));
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

/* Until all pieces of `all` rows have come. */
static __device__ __forceinline__ void wait_pieces(uint64_t *full, uint32_t all, uint32_t piece,
                                                   uint32_t parity)
{
    for (uint32_t first = 0; first < all; first += piece)
        cuda_barrier_wait(full++, parity);
}

/* One warp: everything of layer after layer that products and states read, as soon as there is
 * room. */
static __device__ void fetch_layers(const struct run &r, const struct room &m,
                                    unsigned char *memory, struct barriers *b)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, inner = r.s.inner;
    const uint64_t policy = cuda_passing_policy();
    uint64_t *last = NULL; /* the piece under way */
    uint32_t last_parity = 0;
    /* Rows `from(i)` of `all` of depth k to `to`, piece by piece. */
    const auto fetch_rows = [&](uint64_t *full, bf16 *to, uint32_t all, uint32_t piece, uint32_t k,
                                uint32_t parity, const auto &from) {
        const uint32_t bytes = k * sizeof(bf16);
        for (uint32_t first = 0; first < all; first += piece, full++) {
            const uint32_t rows = all - first < piece ? all - first : piece;
            if (last)
                cuda_barrier_wait(last, last_parity);
            last = full;
            last_parity = parity;
            if (lane == 0)
                cuda_barrier_expect(full, rows * bytes);
            __syncwarp();
            for (uint32_t i = first + lane; i < first + rows; i += CUDA_WARP)
                cuda_copy_passing(to + i * (k + RUN_PAD), from(i), bytes, full, policy);
        }
    };
    const auto fetch_in = [&](uint32_t l) {
        fetch_rows(
            b->in_full, reinterpret_cast<bf16 *>(memory + m.in), m.in_rows, m.in_piece, r.d, l & 1,
            [&](uint32_t i) { return r.layers[l].in_proj + (size_t)weight_row(r, i) * r.d; });
    };
    const auto fetch_out = [&](uint32_t l) {
        fetch_rows(b->out_full, reinterpret_cast<bf16 *>(memory + m.out), RUN_OUT, m.out_piece,
                   inner, l & 1, [&](uint32_t i) {
                       return r.layers[l].out_proj + (size_t)(blockIdx.x * RUN_OUT + i) * inner;
                   });
    };
    const auto fetch_state = [&](uint32_t l) {
        const uint32_t floats = RUN_WIDTH * r.s.n, bytes = floats * sizeof(float);
        if (lane)
            return;
        cuda_barrier_expect(&b->state_full, bytes);
        cuda_copy_bulk(memory + m.state,
                       r.segment->ssm + r.layers[l].ssm + (size_t)blockIdx.x * floats, bytes,
                       &b->state_full);
    };
    fetch_in(0);
    fetch_state(0);
    fetch_out(0);
    for (uint32_t l = 1; l < r.layer_count; l++) {
        const uint32_t parity = (l - 1) & 1;
        cuda_barrier_wait(&b->in_free, parity);
        fetch_in(l);
        cuda_barrier_wait(&b->state_free, parity);
        fetch_state(l);
        cuda_barrier_wait(&b->out_free, parity);
        fetch_out(l);
    }
}

/* ---- a layer ---- */

/* What a thread needs for its result of in_proj. */
struct own_result {
    uint32_t o; /* as weight_row has it; in_rows and more: none */
    struct column<bf16> column;
    float bias, dt_bias, rate;
};

static __device__ __forceinline__ void load_own(const struct run &r, uint32_t in_rows, uint32_t l,
                                                struct own_result *own)
{
    const struct mamba_shape &s = r.s;
    const struct run_layer &layer = r.layers[l];
    if (own->o >= in_rows)
        return;
    const uint32_t w = weight_row(r, own->o);
    own->bias = layer.in_bias ? layer.in_bias[w] : 0;
    if (w >= s.inner + s.conv) {
        own->dt_bias = layer.weights.dt_bias[w - s.inner - s.conv];
        own->rate = layer.weights.a_log[w - s.inner - s.conv];
    } else if (w >= s.inner) {
        own->column = load_column(s, layer.weights, r.segment->conv + layer.conv, w - s.inner);
    }
}

static __device__ __forceinline__ void keep_column(const struct run &r, uint32_t l,
                                                   const struct own_result &own)
{
#pragma unroll
    for (int k = 0; k < TAPS - 1; k++)
        r.segment->conv[r.layers[l].conv + (size_t)k * r.s.conv + own.column.j] =
            own.column.tail[k];
}

/* Products of the row with N tiles of 8 weight rows that lie in shared memory; those from `count`
 * on are not there. */
template <int N>
static __device__ __forceinline__ void multiply(const bf16 *weights, const bf16 *row, uint32_t k,
                                                uint32_t count, float *sums)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    const bf16 *from[N], *x = row + 8 * (lane % 4);
    float acc[N][4] = {};
#pragma unroll
    for (int n = 0; n < N; n++) {
        const uint32_t o = n * TILE + lane / 4;
        from[n] = weights + (o < count ? o : count - 1) * (k + RUN_PAD) + 8 * (lane % 4);
    }
#pragma unroll 4
    for (uint32_t at = warp * RUN_DEPTH; at < k; at += RUN_WARPS * RUN_DEPTH) {
        const uint4 v = *reinterpret_cast<const uint4 *>(x + at);
        const uint32_t left[4] = {v.x, 0, v.y, 0}, right[4] = {v.z, 0, v.w, 0};
#pragma unroll
        for (int n = 0; n < N; n++) {
            const uint4 w = *reinterpret_cast<const uint4 *>(from[n] + at);
            const uint32_t low[2] = {w.x, w.y}, high[2] = {w.z, w.w};
            cuda_mma(acc[n], left, low);
            cuda_mma(acc[n], right, high);
        }
    }
    if (lane < TILE / 2)
#pragma unroll
        for (int n = 0; n < N; n++)
            *reinterpret_cast<float2 *>(sums + (warp * N + n) * TILE + 2 * lane) =
                float2{acc[n][0], acc[n][1]};
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

static __device__ __forceinline__ float norm_scale(const float *parts, uint32_t k, float epsilon)
{
    float sum = 0;
#pragma unroll
    for (int w = 0; w < RUN_WARPS; w++)
        sum += parts[w];
    return 1 / sqrtf(sum / (float)k + epsilon);
}

/* A row of `k` that all blocks sent, four elements a packet, P packets a block; at most two a
 * thread, both looked for at once. */
template <int P>
static __device__ __forceinline__ void receive_row(const uint4 *packets, uint32_t k,
                                                   uint32_t number, bf16 *row, float *parts)
{
    const uint32_t i = threadIdx.x, second = i + RUN_THREADS;
    const bool one = 4 * i < k, two = 4 * second < k;
    uint4 a = {0, 0, 0, number}, b = {0, 0, 0, number};
    uint32_t turns = 0;
    do {
        if (one)
            a = cuda_look(packets + packet_at<P>(i));
        if (two)
            b = cuda_look(packets + packet_at<P>(second));
        if (++turns > RUN_TURNS)
            __trap();
    } while (a.w != number || b.w != number);
    if (one)
        *reinterpret_cast<uint2 *>(row + 4 * i) = uint2{a.x, a.y};
    if (two)
        *reinterpret_cast<uint2 *>(row + 4 * second) = uint2{b.x, b.y};
    const float sum = cuda_warp_sum(__uint_as_float(a.z) + __uint_as_float(b.z));
    if (threadIdx.x % CUDA_WARP == 0)
        parts[threadIdx.x / CUDA_WARP] = sum;
}

static __device__ __forceinline__ void receive_columns(const struct run &r, uint32_t number,
                                                       float *columns)
{
    const uint32_t n = r.s.n, t = threadIdx.x;
    const uint32_t head = blockIdx.x * RUN_WIDTH / r.s.width,
                   group = head / (r.s.heads / r.s.groups);
    if (t >= 2 * n)
        return;
    const uint2 *from =
        r.columns_sent + column_at(r, t < n ? group * n + t : (r.s.groups + group) * n + t - n);
    uint2 packet;
    uint32_t turns = 0;
    do {
        packet = cuda_look(from);
        if (++turns > RUN_TURNS)
            __trap();
    } while (packet.y != number);
    columns[t] = __uint_as_float(packet.x);
}

/* A result of in_proj: a column of B or C is sent, what others wait for, the others become inputs.
 */
static __device__ __forceinline__ void finish_own(const struct run &r, uint32_t l, uint32_t number,
                                                  float value, struct own_result *own,
                                                  struct inputs *in)
{
    const struct mamba_shape &s = r.s;
    const uint32_t columns = 2 * RUN_WIDTH, time = columns + r.columns;
    if (own->o < RUN_WIDTH || (own->o >= columns && own->o < time)) {
        const float next = convolve(&own->column, value);
        if (own->o < RUN_WIDTH)
            in->u[own->o] = next;
        else
            cuda_send(r.columns_sent + column_at(r, blockIdx.x * r.columns + own->o - columns),
                      uint2{__float_as_uint(next), number});
        keep_column(r, l, *own);
    } else if (own->o < columns) {
        in->z[own->o - RUN_WIDTH] = cuda_silu(value);
    } else {
        in->time = fminf(fmaxf(cuda_softplus(value + own->dt_bias), s.dt_min), s.dt_max);
        in->decay = expf(in->time * -expf(own->rate));
    }
}

#define RUN_STATES 4 /* rows of the state that a warp steps together: a packet */

/* Steps the warp's rows of the block's, from `first` on, sends their outputs, keeps the state. */
template <int V>
static __device__ __forceinline__ void step_states(const struct run &r, uint32_t l, uint32_t first,
                                                   const float *state, const float *columns,
                                                   const struct inputs &in, float through,
                                                   const float4 gate, uint32_t number)
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
        sums[i] = fmaf(through, u[i], cuda_warp_sum(sums[i])) * z[i];
    if (lane == 0)
        cuda_send(r.gated_sent + packet_at<RUN_WIDTH / 4>(at / RUN_STATES),
                  pack_four(float4{sums[0], sums[1], sums[2], sums[3]}, gate, number));
    float *to = r.segment->ssm + r.layers[l].ssm + (size_t)at * n + V * lane;
#pragma unroll
    for (int i = 0; i < RUN_STATES; i++)
        *reinterpret_cast<floats<V> *>(to + (size_t)i * n) = h[i];
}

/* T: tiles of in_proj's rows; N is 32 V. Grid: parts of RUN_WIDTH. */
template <int T, int V>
static __global__ void __launch_bounds__(RUN_THREADS + CUDA_WARP, 1)
    run_layers(const __grid_constant__ struct run r)
{
    CUDA_SHARED(unsigned char, memory);
    const struct room m = room_of(r, T);
    struct barriers *barriers = reinterpret_cast<struct barriers *>(memory + m.barriers);
    const uint32_t lane = threadIdx.x % CUDA_WARP, warp = threadIdx.x / CUDA_WARP;
    if (threadIdx.x == 0)
        for (uint32_t i = 0; i < sizeof *barriers / sizeof(uint64_t); i++)
            cuda_barrier_init(reinterpret_cast<uint64_t *>(barriers) + i, 1);
    cuda_barriers_ready();
    __syncthreads();
    cuda_depend_release();
    if (warp == RUN_WARPS) {
        fetch_layers(r, m, memory, barriers);
        return;
    }
    bf16 *row = reinterpret_cast<bf16 *>(memory + m.row);
    float *sums = reinterpret_cast<float *>(memory + m.sums),
          *parts = reinterpret_cast<float *>(memory + m.parts), *out_parts = parts + RUN_WARPS,
          *columns = reinterpret_cast<float *>(memory + m.columns);
    struct inputs *in = reinterpret_cast<struct inputs *>(memory + m.inputs);
    const struct mamba_shape &s = r.s;
    const uint32_t head = blockIdx.x * RUN_WIDTH / s.width;
    const bool has_out = threadIdx.x < RUN_OUT, steps = warp < RUN_WIDTH / RUN_STATES;
    const uint32_t out_at = blockIdx.x * RUN_OUT + threadIdx.x % RUN_OUT;
    const uint32_t first = warp % (RUN_WIDTH / RUN_STATES) * RUN_STATES; /* of its rows */
    struct own_result own = {};
    own.o = threadIdx.x;
    float through, out_bias;
    float4 gate, next_norm = {};
    const auto load_layer = [&](uint32_t l) {
        const struct run_layer &layer = r.layers[l];
        load_own(r, m.in_rows, l, &own);
        through = layer.weights.skip[head];
        gate = *reinterpret_cast<const float4 *>(layer.gate_norm + blockIdx.x * RUN_WIDTH + first);
    };
    const auto load_out = [&](uint32_t l) {
        out_bias = has_out && r.layers[l].out_bias ? r.layers[l].out_bias[out_at] : 0;
        if (l + 1 < r.layer_count)
            next_norm = *reinterpret_cast<const float4 *>(r.layers[l + 1].norm + out_at / 4 * 4);
    };
    load_layer(0);
    load_out(0);
    cuda_depend_wait();
    const uint32_t serial = *reinterpret_cast<volatile uint32_t *>(r.serial);
    float x = has_out ? r.hidden[out_at] : 0;
    float *kept = r.kept ? *r.kept : NULL;
    for (uint32_t l = 0; l < r.layer_count; l++) {
        const uint32_t number = serial + l + 1;
        /* in_proj */
        if (l == 0) {
            const uint32_t i = 4 * threadIdx.x;
            float sum = 0;
            if (i < r.d) {
                const uint4 packet =
                    pack_four(*reinterpret_cast<const float4 *>(r.hidden + i),
                              *reinterpret_cast<const float4 *>(r.layers[0].norm + i), 0);
                *reinterpret_cast<uint2 *>(row + i) = uint2{packet.x, packet.y};
                sum = __uint_as_float(packet.z);
            }
            sum = cuda_warp_sum(sum);
            if (lane == 0)
                parts[warp] = sum;
        } else {
            receive_row<RUN_OUT / 4>(r.hidden_sent, r.d, number - 1, row, parts);
        }
        cuda_meet<RUN_THREADS>();
        wait_pieces(barriers->in_full, m.in_rows, m.in_piece, l & 1);
        multiply<T>(reinterpret_cast<bf16 *>(memory + m.in), row, r.d, m.in_rows, sums);
        cuda_meet<RUN_THREADS>();
        if (threadIdx.x == 0)
            cuda_barrier_arrive(&barriers->in_free);
        if (own.o < m.in_rows)
            finish_own(r, l, number,
                       fmaf(sum_of<T>(sums, own.o), norm_scale(parts, r.d, r.epsilon), own.bias),
                       &own, in);
        /* The recurrence. */
        receive_columns(r, number, columns);
        cuda_barrier_wait(&barriers->state_full, l & 1);
        cuda_meet<RUN_THREADS>();
        if (steps)
            step_states<V>(r, l, first, reinterpret_cast<float *>(memory + m.state), columns, *in,
                           through, gate, number);
        if (l + 1 < r.layer_count)
            load_layer(l + 1);
        /* out_proj */
        receive_row<RUN_WIDTH / 4>(r.gated_sent, s.inner, number, row, out_parts);
        cuda_meet<RUN_THREADS>();
        if (threadIdx.x == 0)
            cuda_barrier_arrive(&barriers->state_free);
        wait_pieces(barriers->out_full, RUN_OUT, m.out_piece, l & 1);
        multiply<1>(reinterpret_cast<bf16 *>(memory + m.out), row, s.inner, RUN_OUT, sums);
        cuda_meet<RUN_THREADS>();
        if (threadIdx.x == 0)
            cuda_barrier_arrive(&barriers->out_free);
        if (warp == 0) {
            if (has_out)
                x = fmaf(sum_of<1>(sums, threadIdx.x), norm_scale(out_parts, s.inner, r.epsilon),
                         out_bias + x);
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
                cuda_send(r.hidden_sent + packet_at<RUN_OUT / 4>(out_at / 4),
                          pack_four(v, next_norm, number));
            }
        }
        if (l + 1 < r.layer_count)
            load_out(l + 1);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0)
        *r.serial = serial + r.layer_count;
}

template <int T, int V> static void launch(struct ops_context *x, const struct run &r)
{
    const size_t shared = room_of(r, T).bytes;
    CUDA_ALLOW_SHARED(x, (run_layers<T, V>), shared);
    CUDA_LAUNCH_TOGETHER(x, (run_layers<T, V>), dim3(r.s.inner / RUN_WIDTH),
                         dim3(RUN_THREADS + CUDA_WARP), shared, r);
}

template <int T> static void choose_width(struct ops_context *x, const struct run &r)
{
    r.s.n == 4 * CUDA_WARP ? launch<T, 4>(x, r) : launch<T, 2>(x, r);
}

static uint32_t tiles_of(const struct run &r)
{
    return cuda_ceil(2 * RUN_WIDTH + r.columns + 1, TILE);
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
    r->covers = (tiles == 5 || tiles == 6) && room_of(*r, tiles).bytes <= x->shared_most;
}
