/* emulator.cc - see cuda_runtime.h; and matrix products in place of cuBLASLt's. x86-64 alone. */
#include <chrono>
#include <cstdlib>
#include <map>
#include <vector>

#include "engine/cuda/cuda.h"
#include "engine/cuda/device.cuh"
#include "engine/cuda/mamba_blocks.cuh"
#include "engine/cuda/retrieve.cuh"

dim3 threadIdx, blockIdx, blockDim, gridDim;

#define STACK_BYTES ((size_t)64 << 10)
#define SHARED_BYTES ((size_t)227 << 10) /* what a block of an H100 can have */
#define SHARED_STATIC ((size_t)48 << 10) /* without cudaFuncSetAttribute */
#define THREADS 1024
#define MEETINGS 4 /* of some threads of a block: barriers that are named */
#define IDLE_TURNS 64

/* Saves the callee's registers and the stack of `from`, takes those of `to`. */
extern "C" void emulator_switch(void **from, void *to);
asm(R"(
.text
.globl emulator_switch
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

struct fiber {
    void *stack, *sp;
    bool done;
    unsigned phase; /* of the exchange under way */
};

struct warp {
    uint64_t words[2][32]; /* by phase: a lane can be one exchange ahead, never two */
    unsigned arrived, generation;
};

/* Threads that wait for each other until `expected` have come. */
struct meeting {
    unsigned arrived, generation;
};

struct bulk_copy {
    void *to;
    const void *from;
    uint32_t bytes;
    uint64_t *barrier;
};

struct running_block {
    fiber fibers[THREADS];
    warp warps[THREADS / 32];
    unsigned left, current; /* threads that are not done; the one that runs */
    meeting all, some[MEETINGS];
    dim3 index;
    unsigned char *shared;
    std::vector<bulk_copy> bulk; /* under way */
};

static struct {
    running_block *block; /* that runs */
    unsigned count;       /* of its threads */
    uint64_t progress;
    void *scheduler;
    const char *name;
    const std::function<void()> *kernel;
} e;

struct copy {
    void *to;
    const void *from; /* NULL: zeros */
    unsigned bytes;
};

/* Of each thread: groups of copies under way, the last one not yet closed. */
static std::vector<std::vector<copy>> copies[THREADS];

void *emulator_shared(void)
{
    return e.block->shared;
}

static void yield(void)
{
    emulator_switch(&e.block->fibers[e.block->current].sp, e.scheduler);
}

void emulator_yield(void)
{
    yield();
}

void emulator_sent(void)
{
    e.progress++;
}

static void enter(void)
{
    (*e.kernel)();
    e.block->fibers[e.block->current].done = true;
    e.progress++;
    yield();
    abort();
}

static void start(fiber *f)
{
    if (!f->stack)
        f->stack = aligned_alloc(64, STACK_BYTES);
    void **top = (void **)((char *)f->stack + STACK_BYTES);
    *--top = NULL; /* keeps the stack as a call would leave it */
    *--top = (void *)enter;
    for (int i = 0; i < 6; i++)
        *--top = NULL;
    f->sp = top;
    f->done = false;
    f->phase = 0;
}

static void arrive(meeting *m, unsigned expected)
{
    e.progress++;
    if (++m->arrived == expected) {
        m->arrived = 0;
        m->generation++;
    }
}

static void meet(meeting *m, unsigned expected)
{
    const unsigned generation = m->generation;
    arrive(m, expected);
    while (m->generation == generation)
        yield();
}

void __syncthreads(void)
{
    meet(&e.block->all, e.count);
}

void emulator_meet(unsigned threads, unsigned which)
{
    meet(&e.block->some[which], threads);
}

void emulator_arrive(unsigned threads, unsigned which)
{
    arrive(&e.block->some[which], threads);
}

const uint64_t *emulator_exchange(uint64_t word)
{
    const unsigned current = e.block->current;
    fiber *f = &e.block->fibers[current];
    warp *w = &e.block->warps[current / 32];
    const unsigned phase = f->phase, generation = w->generation;
    const unsigned lanes = e.count - current / 32 * 32 < 32 ? e.count % 32 : 32;
    f->phase ^= 1;
    w->words[phase][current % 32] = word;
    e.progress++;
    if (++w->arrived == lanes) {
        w->arrived = 0;
        w->generation++;
    }
    while (w->generation == generation)
        yield();
    return w->words[phase];
}

static void start_block(running_block *b, dim3 index, size_t shared_bytes)
{
    b->all = {0, 0};
    for (meeting &some : b->some)
        some = {0, 0};
    b->index = index;
    b->left = e.count;
    b->bulk.clear();
    if (!b->shared)
        b->shared = (unsigned char *)aligned_alloc(256, SHARED_BYTES);
    memset(b->shared, 0xff, shared_bytes);
    for (unsigned i = 0; i < (e.count + 31) / 32; i++)
        b->warps[i].arrived = b->warps[i].generation = 0;
    for (unsigned i = 0; i < e.count; i++)
        start(&b->fibers[i]);
}

/* Every thread goes on to where it waits. */
static void turn_block(running_block *b)
{
    e.block = b;
    blockIdx = b->index;
    for (unsigned i = 0; i < e.count; i++) {
        if (b->fibers[i].done)
            continue;
        b->current = i;
        threadIdx = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
        emulator_switch(&e.scheduler, b->fibers[i].sp);
        b->left -= b->fibers[i].done;
    }
}

/* Blocks that run at once. */
static void run_blocks(const std::vector<running_block *> &blocks)
{
    unsigned idle = 0; /* turns; a thread may look for several packets, one a turn */
    for (bool left = true; left;) {
        const uint64_t before = e.progress;
        left = false;
        for (running_block *b : blocks) {
            turn_block(b);
            left |= b->left > 0;
        }
        idle = e.progress == before ? idle + 1 : 0;
        if (left && idle > IDLE_TURNS) {
            fprintf(stderr, "emulator: %s: threads wait for others that never come\n", e.name);
            abort();
        }
    }
}

struct kept_launch {
    const char *name;
    dim3 grid, block;
    size_t shared_bytes;
    std::function<void()> kernel;
    bool together;
};

struct emulator_graph {
    std::vector<kept_launch> launches;
};

struct emulator_stream {
    bool late; /* its work is done when somebody waits for it */
    bool forked; /* from the stream whose work is recorded */
    std::vector<kept_launch> launches;
};

struct emulator_event {
    emulator_stream *stream; /* that it was recorded on */
    std::chrono::steady_clock::time_point when;
};

static unsigned streams; /* open */

static emulator_graph *recording;
static std::vector<emulator_stream *> forks; /* of its stream */

static void run_grid(const kept_launch &l)
{
    e.name = l.name;
    e.kernel = &l.kernel;
    e.count = l.block.x * l.block.y * l.block.z;
    gridDim = l.grid;
    blockDim = l.block;
    static std::vector<running_block *> pool;
    const size_t at_once = l.together ? (size_t)l.grid.x * l.grid.y * l.grid.z : 1;
    while (pool.size() < at_once)
        pool.push_back(new running_block());
    std::vector<running_block *> running;
    for (unsigned z = 0; z < l.grid.z; z++)
        for (unsigned y = 0; y < l.grid.y; y++)
            for (unsigned x = 0; x < l.grid.x; x++) {
                running.push_back(pool[running.size()]);
                start_block(running.back(), dim3(x, y, z), l.shared_bytes);
                if (running.size() < at_once)
                    continue;
                for (auto &groups : copies)
                    groups.clear();
                run_blocks(running);
                running.clear();
            }
}

static void flush(emulator_stream *stream)
{
    std::vector<kept_launch> launches;
    launches.swap(stream->launches);
    for (const kept_launch &l : launches)
        if (recording)
            recording->launches.push_back(l);
        else
            run_grid(l);
}

void emulator_launch(emulator_stream *stream, const char *name, dim3 grid, dim3 block,
                     size_t shared_bytes, const std::function<void()> &kernel, bool together)
{
    const size_t threads = (size_t)block.x * block.y * block.z;
    if (threads > THREADS || !threads || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu ||
        shared_bytes > SHARED_BYTES) {
        fprintf(stderr, "emulator: %s: grid %u %u %u, block %u %u %u, %zu bytes shared\n", name,
                grid.x, grid.y, grid.z, block.x, block.y, block.z, shared_bytes);
        abort();
    }
    const kept_launch launch = {name, grid, block, shared_bytes, kernel, together};
    if (recording && stream->late && !stream->forked) {
        fprintf(stderr, "emulator: %s: on another stream while a graph is recorded\n", name);
        abort();
    }
    if (stream->late)
        stream->launches.push_back(launch);
    else if (recording)
        recording->launches.push_back(launch);
    else
        run_grid(launch);
}

/* ---- tensor cores, asynchronous copies ---- */

/* Every lane gives its arguments; the last to come does the work of all, then all go on. */
template <typename A> static void together(A *own, void (*work)(A *const *all))
{
    const unsigned current = e.block->current;
    fiber *f = &e.block->fibers[current];
    warp *w = &e.block->warps[current / 32];
    const unsigned phase = f->phase, generation = w->generation;
    if (e.count % 32) {
        fprintf(stderr, "emulator: %s: a warp that is not full\n", e.name);
        abort();
    }
    f->phase ^= 1;
    w->words[phase][current % 32] = (uint64_t)(uintptr_t)own;
    e.progress++;
    if (++w->arrived == 32) {
        A *all[32];
        for (unsigned i = 0; i < 32; i++)
            all[i] = (A *)(uintptr_t)w->words[phase][i];
        work(all);
        w->arrived = 0;
        w->generation++;
    }
    while (w->generation == generation)
        yield();
}

static float half_of(uint32_t word, unsigned which)
{
    return __uint_as_float(which ? word & 0xffff0000u : word << 16);
}

struct mma {
    float *d;
    const uint32_t *a, *b;
};

static void multiply(mma *const *lanes)
{
    float a[16][16], b[16][8];
    for (unsigned lane = 0; lane < 32; lane++) {
        const unsigned group = lane / 4, pair = lane % 4 * 2;
        for (unsigned i = 0; i < 8;
             i++) /* register i / 2: 8 rows further if odd, columns if 2, 3 */
            a[group + i / 2 % 2 * 8][pair + i / 4 * 8 + i % 2] =
                half_of(lanes[lane]->a[i / 2], i % 2);
        for (unsigned i = 0; i < 4; i++)
            b[pair + i / 2 * 8 + i % 2][group] = half_of(lanes[lane]->b[i / 2], i % 2);
    }
    float d[16][8] = {};
    for (unsigned row = 0; row < 16; row++)
        for (unsigned k = 0; k < 16; k++)
            for (unsigned column = 0; column < 8; column++)
                d[row][column] += a[row][k] * b[k][column];
    for (unsigned lane = 0; lane < 32; lane++)
        for (unsigned i = 0; i < 4; i++)
            lanes[lane]->d[i] += d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

void cuda_mma(float d[4], const uint32_t a[4], const uint32_t b[2])
{
    mma own = {d, a, b};
    together(&own, multiply);
}

/* A warp's 16 rows of a warpgroup's product; a: a tile, or registers as cuda_mma has them. */
struct narrow {
    float *d;
    const bf16 *a;
    const uint32_t *words;
    const bf16 *b;
    bool first;
    unsigned warp; /* of the warpgroup */
};

/* Element `column` of row `row` of a tile, which a swizzle of 128 bytes lays out. */
static float tile_at(const bf16 *tile, unsigned row, unsigned column)
{
    return cuda_float(tile[row * 64 + (column / 8 ^ row % 8) * 8 + column % 8]);
}

static void multiply_narrow(narrow *const *lanes)
{
    const narrow &own = *lanes[0];
    const unsigned depth = own.words ? 16 : 64;
    if ((uintptr_t)own.b % 1024 || (own.a && (uintptr_t)own.a % 1024))
        fprintf(stderr, "emulator: %s: a tile is not aligned\n", e.name), abort();
    float a[16][64];
    for (unsigned row = 0; row < 16; row++)
        for (unsigned k = 0; k < depth; k++)
            a[row][k] =
                own.words
                    ? half_of(lanes[row % 8 * 4 + k % 8 / 2]->words[row / 8 + k / 8 * 2], k % 2)
                    : tile_at(own.a, own.warp * 16 + row, k);
    for (unsigned row = 0; row < 16; row++)
        for (unsigned column = 0; column < 64; column++) {
            float sum = 0;
            for (unsigned k = 0; k < depth; k++)
                sum +=
                    a[row][k] * (own.words ? tile_at(own.b, k, column) : tile_at(own.b, column, k));
            float *d =
                lanes[row % 8 * 4 + column % 8 / 2]->d + column / 8 * 4 + row / 8 * 2 + column % 2;
            *d = own.first ? sum : *d + sum;
        }
}

void wgmma_narrow(float d[32], const void *a, const void *b, bool first)
{
    narrow own = {d, (const bf16 *)a, NULL, (const bf16 *)b, first, threadIdx.x / 32 % 4};
    together(&own, multiply_narrow);
}

void wgmma_narrow_rows(float d[32], const uint32_t a[4], const void *b)
{
    narrow own = {d, NULL, a, (const bf16 *)b, false, threadIdx.x / 32 % 4};
    together(&own, multiply_narrow);
}

struct matrices {
    uint32_t *out;
    const bf16 *row;
};

template <bool transposed> static void load(matrices *const *lanes)
{
    for (unsigned lane = 0; lane < 32; lane++)
        if ((uintptr_t)lanes[lane]->row % 16)
            fprintf(stderr, "emulator: %s: a matrix row is not aligned\n", e.name), abort();
    for (unsigned lane = 0; lane < 32; lane++) {
        const unsigned across = lane / 4, along = lane % 4 * 2;
        for (unsigned i = 0; i < 4; i++) {
            const auto at = [&](unsigned r, unsigned c) -> uint32_t {
                return lanes[i * 8 + r]->row[c].bits;
            };
            lanes[lane]->out[i] = transposed ? at(along, across) | at(along + 1, across) << 16
                                             : at(across, along) | at(across, along + 1) << 16;
        }
    }
}

void cuda_load_matrices(uint32_t out[4], const bf16 *row)
{
    matrices own = {out, row};
    together(&own, load<false>);
}

void cuda_load_transposed(uint32_t out[4], const bf16 *row)
{
    matrices own = {out, row};
    together(&own, load<true>);
}

static void carry_out(const copy &c)
{
    if (c.from)
        memcpy(c.to, c.from, c.bytes);
    else
        memset(c.to, 0, c.bytes);
}

void emulator_copy(void *shared, const void *global, unsigned bytes, bool there)
{
    if ((uintptr_t)shared % bytes || (there && (uintptr_t)global % bytes))
        fprintf(stderr, "emulator: %s: an asynchronous copy is not aligned\n", e.name), abort();
    auto &groups = copies[e.block->current];
    if (groups.empty())
        groups.emplace_back();
    const copy c = {shared, there ? global : NULL, bytes};
    if (blockIdx.x % 2)
        carry_out(c);
    else
        memset(shared, 0xff, bytes), groups.back().push_back(c);
}

void cuda_copy_commit(void)
{
    auto &groups = copies[e.block->current];
    if (groups.empty())
        groups.emplace_back();
    groups.emplace_back();
}

void emulator_copy_wait(int left)
{
    auto &groups = copies[e.block->current];
    while (groups.size() > (size_t)left + 1) {
        for (const copy &c : groups.front())
            carry_out(c);
        groups.erase(groups.begin());
    }
}

/* In a barrier's 64 bits. */
struct barrier {
    uint16_t arrivals, left;        /* of a phase, and until this one ends */
    uint32_t phase : 1, bytes : 31; /* that are still to come */
};
static_assert(sizeof(barrier) == sizeof(uint64_t), "a barrier is 8 bytes");

static barrier *barrier_at(uint64_t *at)
{
    return reinterpret_cast<barrier *>(at);
}

static void end_phase(barrier *b)
{
    e.progress++;
    if (b->left || b->bytes)
        return;
    b->left = b->arrivals;
    b->phase ^= 1;
}

void cuda_barrier_init(uint64_t *at, uint32_t arrivals)
{
    *barrier_at(at) = {(uint16_t)arrivals, (uint16_t)arrivals, 0, 0};
}

void cuda_barrier_expect(uint64_t *at, uint32_t bytes)
{
    barrier *b = barrier_at(at);
    if (!b->left || b->left > b->arrivals)
        fprintf(stderr, "emulator: %s: a barrier that nobody set up\n", e.name), abort();
    b->left--;
    b->bytes += bytes;
    end_phase(b);
}

void cuda_barrier_arrive(uint64_t *at)
{
    cuda_barrier_expect(at, 0);
}

void cuda_barrier_copied(uint64_t *at)
{
    cuda_copy_commit();
    emulator_copy_wait(0);
    cuda_barrier_arrive(at);
}

void cuda_copy_bulk(void *to, const void *from, uint32_t bytes, uint64_t *at)
{
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16 || !bytes)
        fprintf(stderr, "emulator: %s: a bulk copy is not aligned\n", e.name), abort();
    memset(to, 0xff, bytes);
    e.block->bulk.push_back({to, from, bytes, at});
    e.progress++;
}

static void end_copies(uint64_t *at)
{
    if (!barrier_at(at)->bytes)
        return;
    std::vector<bulk_copy> others;
    for (const bulk_copy &c : e.block->bulk) {
        if (c.barrier != at) {
            others.push_back(c);
            continue;
        }
        memcpy(c.to, c.from, c.bytes);
        barrier_at(at)->bytes -= c.bytes;
    }
    if (others.size() < e.block->bulk.size())
        end_phase(barrier_at(at));
    e.block->bulk.swap(others);
}

void cuda_barrier_wait(uint64_t *at, uint32_t parity)
{
    while (barrier_at(at)->phase == parity) {
        yield();
        end_copies(at);
    }
}

/* ---- the runtime ---- */

static std::map<const char *, std::pair<size_t, cudaMemoryType>> allocated;

static cudaError_t allocate(void **out, size_t bytes, cudaMemoryType type)
{
    *out = aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!*out)
        return cudaErrorMemoryAllocation;
    memset(*out, 0xff, bytes); /* NaN until it is written */
    allocated[(const char *)*out] = {bytes, type};
    return cudaSuccess;
}

static cudaError_t release(void *memory)
{
    allocated.erase((const char *)memory);
    free(memory);
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **out, size_t bytes)
{
    return allocate(out, bytes, cudaMemoryTypeDevice);
}

cudaError_t cudaFree(void *memory)
{
    return release(memory);
}

cudaError_t cudaHostRegister(void *memory, size_t bytes, unsigned)
{
    memset(memory, 0xff, bytes);
    allocated[(const char *)memory] = {bytes, cudaMemoryTypeHost};
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *memory)
{
    allocated.erase((const char *)memory);
    return cudaSuccess;
}

/* Where the allocation of `memory` ends, and of which type it is; NULL: nobody's. */
static const char *allocation(const void *memory, cudaPointerAttributes *out)
{
    auto after = allocated.upper_bound((const char *)memory);
    if (after == allocated.begin())
        return NULL;
    --after;
    const char *const end = after->first + after->second.first;
    if ((const char *)memory >= end)
        return NULL;
    out->type = after->second.second;
    return end;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *out, const void *memory)
{
    out->type = cudaMemoryTypeUnregistered;
    (void)allocation(memory, out);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream)
{
    cudaPointerAttributes a, b;
    flush(stream);
    if (recording) {
        fprintf(stderr, "emulator: a copy while a graph is recorded\n");
        abort();
    }
    cudaPointerGetAttributes(&a, to);
    cudaPointerGetAttributes(&b, from);
    if (kind != cudaMemcpyDefault &&
        ((a.type == cudaMemoryTypeDevice) != (kind != cudaMemcpyDeviceToHost) ||
         (b.type == cudaMemoryTypeDevice) != (kind != cudaMemcpyHostToDevice))) {
        fprintf(stderr, "emulator: a copy's direction is not that of its pointers\n");
        abort();
    }
    const char *const to_end = allocation(to, &a), *const from_end = allocation(from, &b);
    if ((to_end && (char *)to + bytes > to_end) ||
        (from_end && (const char *)from + bytes > from_end)) {
        fprintf(stderr, "emulator: a copy reaches out of an allocation\n");
        abort();
    }
    memmove(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream)
{
    flush(stream);
    memset(to, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned)
{
    *out = new emulator_stream{streams++ > 0, false, {}};
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned)
{
    *out = new emulator_event();
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    flush(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream)
{
    return cudaStreamSynchronize(stream);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    delete stream;
    streams--;
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned)
{
    if (recording && stream->late && !stream->forked) {
        stream->forked = true;
        forks.push_back(stream);
    }
    return cudaEventSynchronize(event);
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    if (recording && stream->late && !stream->forked) {
        fprintf(stderr, "emulator: an event of another stream while a graph is recorded\n");
        abort();
    }
    event->stream = stream;
    event->when = std::chrono::steady_clock::now();
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t)
{
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to)
{
    *ms = std::chrono::duration<float, std::milli>(to->when - from->when).count();
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    if (event->stream)
        flush(event->stream);
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    delete event;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode)
{
    recording = new emulator_graph;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *out)
{
    for (emulator_stream *s : forks) {
        if (s->launches.size()) {
            fprintf(stderr, "emulator: a graph ends before what was forked from its stream\n");
            abort();
        }
        s->forked = false;
    }
    forks.clear();
    *out = recording;
    recording = NULL;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long)
{
    *out = new emulator_graph(*graph);
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t)
{
    for (const kept_launch &l : graph->launches)
        run_grid(l);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph)
{
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGetLastError(void)
{
    return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t error)
{
    return error == cudaErrorMemoryAllocation ? "out of memory"
           : error == cudaSuccess             ? "no error"
                                              : "launch failure";
}

cudaError_t cudaGetDeviceCount(int *count)
{
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int)
{
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *out, int)
{
    *out = {"emulated", 9, 0, 16, SHARED_BYTES};
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total)
{
    *available = *total = (size_t)1 << 30;
    return cudaSuccess;
}

/* ---- products ---- */

enum status cuda_products_open(struct ops_context *, struct error *)
{
    return STATUS_OK;
}

void cuda_products_close(struct ops_context *)
{
}

bool cuda_product(struct ops_context *x, const void *w, uint32_t n, uint32_t k, const void *in,
                  uint32_t m, void *out, enum cuda_sum how)
{
    const auto at = [x](const void *from, size_t i) {
        return x->wide ? ((const float *)from)[i]
                       : __uint_as_float((uint32_t)((const uint16_t *)from)[i] << 16);
    };
    if (x->failed)
        return true;
    const auto multiply_all = [=] {
        for (uint32_t i = 0; i < m; i++)
            for (uint32_t j = 0; j < n; j++) {
                float sum = 0;
                for (uint32_t l = 0; l < k; l++)
                    sum += at(in, (size_t)i * k + l) * at(w, (size_t)j * k + l);
                const size_t to = (size_t)i * n + j;
                if (how == CUDA_NARROW && !x->wide)
                    ((bf16 *)out)[to] = cuda_bf16(sum);
                else
                    ((float *)out)[to] = how == CUDA_ADD ? ((float *)out)[to] + sum : sum;
            }
    };
    emulator_launch(x->stream, "a product", dim3(1), dim3(1), 0, multiply_all);
    return true;
}

/* Scans take the form of other GPUs. */
bool cuda_scan_blocks(struct ops_context *, const struct cuda_segment *, const struct ops_segment *,
                      uint32_t, struct cuda_candidate *)
{
    return false;
}

/* Shapes of both kinds are tested: these, and those whose gate has its norm at once. */
bool cuda_adds_scaled(const struct ops_context *x)
{
    return !x->wide && x->config.hidden_size % 512 == 0;
}

void cuda_add_scaled(struct ops_context *x, const void *weight, const void *in,
                     const struct scaled_rows &s)
{
    std::vector<float> sums((size_t)s.count * s.columns);
    cuda_product(x, weight, s.columns, s.depth, in, s.count, sums.data(), CUDA_SET);
    for (uint32_t i = 0; i < s.count && !x->failed; i++) {
        float square = 0;
        for (uint32_t j = 0; j < s.parts; j++)
            square += s.squares[(size_t)i * s.parts + j];
        const float scale = 1 / sqrtf(square / (float)s.depth + s.epsilon);
        for (uint32_t j = 0; j < s.columns; j++)
            s.out[(size_t)i * s.columns + j] +=
                scale * sums[(size_t)i * s.columns + j] + (s.bias ? s.bias[j] : 0);
    }
}
