/* cuda_runtime.h - the part of CUDA that engine/cuda uses, on a CPU: kernels run block by block,
 * their threads as coroutines, so that tests see every index and every barrier where there is no
 * GPU. Includes of <cuda_runtime.h> find this file first in emulated builds.
 * Thread: one. Owns the coroutines' stacks.
 *
 * What it shows: wrong indices (under the address sanitizer), deadlocked or divergent barriers and
 * shuffles, wrong fragment layouts, reads of shared memory that nobody wrote (it is filled with
 * NaN). What it cannot show: races between warps that its order hides, speed, the libraries. */
#ifndef TESTS_EMULATOR_CUDA_RUNTIME_H
#define TESTS_EMULATOR_CUDA_RUNTIME_H

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __maxnreg__(n)
#define __restrict__ __restrict
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c)
    {
    }
};
struct float2 {
    float x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

/* Of the thread that runs. */
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

void emulator_launch(struct emulator_stream *stream, const char *name, dim3 grid, dim3 block,
                     size_t shared_bytes, const std::function<void()> &kernel,
                     bool together = false); /* all blocks run at once */
void *emulator_shared(void);
/* Every lane gives a word and gets all 32 of them; a barrier of the warp. */
const uint64_t *emulator_exchange(uint64_t word);

void __syncthreads(void);

static inline void __syncwarp(unsigned = 0xffffffffu)
{
    emulator_exchange(0);
}

static inline float __uint_as_float(uint32_t bits)
{
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

static inline uint32_t __float_as_uint(float x)
{
    uint32_t out;
    memcpy(&out, &x, sizeof out);
    return out;
}

static inline uint32_t min(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

template <typename T> static inline T emulator_from(unsigned lane, T x)
{
    static_assert(sizeof(T) <= sizeof(uint64_t), "a word at most");
    uint64_t word = 0;
    memcpy(&word, &x, sizeof x);
    const uint64_t *all = emulator_exchange(word);
    T out;
    memcpy(&out, &all[lane & 31], sizeof out);
    return out;
}

template <typename T> static inline T __shfl_xor_sync(unsigned, T x, int mask)
{
    return emulator_from((threadIdx.x % 32) ^ (unsigned)mask, x);
}

static inline unsigned __reduce_max_sync(unsigned, unsigned x)
{
    const uint64_t *all = emulator_exchange(x);
    for (int i = 0; i < 32; i++)
        x = all[i] > x ? (unsigned)all[i] : x;
    return x;
}

static inline unsigned __reduce_min_sync(unsigned, unsigned x)
{
    const uint64_t *all = emulator_exchange(x);
    for (int i = 0; i < 32; i++)
        x = all[i] < x ? (unsigned)all[i] : x;
    return x;
}

template <typename T> static inline T __shfl_sync(unsigned, T x, int lane)
{
    return emulator_from((unsigned)lane, x);
}

static inline int __ffs(int x)
{
    return __builtin_ffs(x);
}

static inline int __clz(unsigned x)
{
    return x ? __builtin_clz(x) : 32;
}

static inline int __popc(unsigned x)
{
    return __builtin_popcount(x);
}

static inline int __popcll(unsigned long long x)
{
    return __builtin_popcountll(x);
}

static inline unsigned __ballot_sync(unsigned, int predicate)
{
    const uint64_t *all = emulator_exchange(predicate != 0);
    unsigned out = 0;
    for (unsigned i = 0; i < 32; i++)
        out |= (unsigned)all[i] << i;
    return out;
}

/* ---- what device.cuh has as instructions ---- */

struct bf16;

static inline float cuda_exp2(float x)
{
    return exp2f(x);
}

/* d [16, 8] += a [16, 16] b [16, 8]; layouts as PTX's mma.m16n8k16 has them. */
void cuda_mma(float d[4], const uint32_t a[4], const uint32_t b[2]);
/* As PTX's ldmatrix.x4, and with .trans. */
void cuda_load_matrices(uint32_t out[4], const bf16 *row);
void cuda_load_transposed(uint32_t out[4], const bf16 *row);

/* ---- and wgmma.cuh, what is 64 columns wide; done at once ---- */

void wgmma_narrow(float d[32], const void *a, const void *b, bool first);
void wgmma_narrow_rows(float d[32], const uint32_t a[4], const void *b);
static inline void wgmma_hand_over(void)
{
}
static inline void wgmma_begin(void)
{
}
static inline void wgmma_end(void)
{
}
static inline void wgmma_take(float *)
{
}

/* ---- copies and barriers ---- */

/* Done at once, or only when waited for, by turns: a kernel that reads too early, or writes where
 * a copy still reads, is seen. */
void emulator_copy(void *shared, const void *global, unsigned bytes, bool there);
static inline void cuda_copy_async(void *shared, const void *global, bool there = true)
{
    emulator_copy(shared, global, 16, there);
}
template <int bytes> static inline void cuda_copy_word(void *shared, const void *global)
{
    emulator_copy(shared, global, bytes, true);
}
void cuda_copy_commit(void);
void emulator_copy_wait(int left);
template <int left> static inline void cuda_copy_wait(void)
{
    emulator_copy_wait(left);
}

/* As PTX's mbarrier. */
void cuda_barrier_init(uint64_t *barrier, uint32_t arrivals);
void cuda_barrier_arrive(uint64_t *barrier);
void cuda_barrier_copied(uint64_t *barrier);

static inline void cuda_await(uint32_t)
{
}

void cuda_barrier_wait(uint64_t *barrier, uint32_t parity);

/* ---- and exchange.cuh ----
 * Bulk copies are done when somebody waits for them; until then there is NaN. */

void emulator_meet(unsigned threads, unsigned which);
template <int threads, int which = 1> static inline void cuda_meet(void)
{
    emulator_meet(threads, which);
}
static inline void cuda_pause(uint32_t clocks)
{
    (void)clocks;
}
void emulator_arrive(unsigned threads, unsigned which);
template <int threads, int which> static inline void cuda_arrive(void)
{
    emulator_arrive(threads, which);
}
void cuda_barrier_expect(uint64_t *barrier, uint32_t bytes);
void cuda_copy_bulk(void *to, const void *from, uint32_t bytes, uint64_t *barrier);
static inline void cuda_before_copies(void)
{
}

static inline void cuda_barriers_ready(void)
{
}
static inline uint64_t cuda_passing_policy(void)
{
    return 0;
}
static inline void cuda_copy_passing(void *to, const void *from, uint32_t bytes, uint64_t *barrier,
                                     uint64_t)
{
    cuda_copy_bulk(to, from, bytes, barrier);
}
/* Others run before a look, so that whoever looks again and again sees what they send. */
void emulator_yield(void);
void emulator_sent(void);
template <typename T> static inline void cuda_send(T *to, T packet)
{
    *to = packet;
    emulator_sent();
}
template <typename T> static inline T cuda_look(const T *from)
{
    emulator_yield();
    return *from;
}
[[noreturn]] static inline void __trap(void)
{
    abort();
}

/* Threads run one at a time. */
template <typename T> static inline T atomicAdd(T *at, T x)
{
    const T before = *at;
    *at += x;
    return before;
}

template <typename T> static inline T atomicMax(T *at, T x)
{
    const T before = *at;
    *at = x > before ? x : before;
    return before;
}

template <typename T> static inline T atomicOr(T *at, T x)
{
    const T before = *at;
    *at |= x;
    return before;
}

template <typename T> static inline T atomicXor(T *at, T x)
{
    const T before = *at;
    *at ^= x;
    return before;
}

static inline void __threadfence(void)
{
}

static inline void __threadfence_system(void)
{
}

/* ---- the runtime ----
 * Work on the first stream is done at once, on others when it is waited for: whoever does not wait
 * is seen. */

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorMemoryAllocation = 2,
    cudaErrorNotReady = 600,
    cudaErrorLaunchFailure = 719
};
typedef struct emulator_stream *cudaStream_t;
typedef struct emulator_event *cudaEvent_t;
enum cudaMemcpyKind {
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice };
struct cudaPointerAttributes {
    cudaMemoryType type;
};
struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount;
    size_t sharedMemPerBlockOptin;
};
enum { cudaStreamNonBlocking = 1, cudaHostRegisterPortable = 1, cudaEventDefault = 0, cudaEventDisableTiming = 2 };
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize,
    cudaFuncAttributePreferredSharedMemoryCarveout
};
#define cudaSharedmemCarveoutMaxShared 100

cudaError_t cudaMalloc(void **out, size_t bytes);
cudaError_t cudaFree(void *memory);
cudaError_t cudaHostRegister(void *memory, size_t bytes, unsigned flags);
cudaError_t cudaHostUnregister(void *memory);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to);
cudaError_t cudaEventDestroy(cudaEvent_t event);
/* Launches between begin and end are kept, with their arguments, and run by each launch of the
 * graph. Copies cannot be kept. */
typedef struct emulator_graph *cudaGraph_t, *cudaGraphExec_t;
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed = 2 };
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph);
cudaError_t cudaGetLastError(void);
const char *cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *out, int device);
cudaError_t cudaMemGetInfo(size_t *available, size_t *total);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *out, const void *memory);

template <typename F>
static inline cudaError_t cudaFuncSetAttribute(F, cudaFuncAttribute, int bytes)
{
    return bytes <= 227 << 10 ? cudaSuccess : cudaErrorLaunchFailure;
}

#endif
