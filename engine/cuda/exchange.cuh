/* exchange.cuh - what blocks of a grid that run at once, and the copy engine beside them, tell each
 * other: packets in global memory, barriers and bulk copies in shared memory. For sm_90 and later;
 * where kernels are compiled for others this does nothing, and no such kernel is launched.
 * Thread: device code. Owns nothing. Private to cuda/. */
#ifndef ENGINE_CUDA_EXCHANGE_CUH
#define ENGINE_CUDA_EXCHANGE_CUH

#include "engine/cuda/device.cuh"

#ifdef __CUDACC__

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define CUDA_EXCHANGES 1
#else
#define CUDA_EXCHANGES 0
#endif

static __device__ __forceinline__ uint32_t cuda_shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* A barrier of `threads` threads of the block; `which`: 1 to 3. */
template <int threads, int which = 1> static __device__ __forceinline__ void cuda_meet(void)
{
    asm volatile("bar.sync %0, %1;" ::"n"(which), "n"(threads) : "memory");
}

/* The thread is there, and does not wait for the others. */
template <int threads, int which> static __device__ __forceinline__ void cuda_arrive(void)
{
    asm volatile("bar.arrive %0, %1;" ::"n"(which), "n"(threads) : "memory");
}

/* What the block did in shared memory, as far as this thread has waited for it, comes before the
 * copies that it starts from here on. */
static __device__ __forceinline__ void cuda_before_copies(void)
{
#if CUDA_EXCHANGES
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/* Barriers are set up that copies will arrive at; before __syncthreads. */
static __device__ __forceinline__ void cuda_barriers_ready(void)
{
    cuda_before_copies();
}

/* Arrives, with bytes to come by copies. */
static __device__ __forceinline__ void cuda_barrier_expect(uint64_t *barrier, uint32_t bytes)
{
#if CUDA_EXCHANGES
    asm volatile(
        "mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(cuda_shared_address(barrier)),
        "r"(bytes)
        : "memory");
#endif
}

/* From global memory to shared memory; both and `bytes` aligned to 16. */
static __device__ __forceinline__ void cuda_copy_bulk(void *to, const void *from, uint32_t bytes,
                                                      uint64_t *barrier)
{
#if CUDA_EXCHANGES
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(cuda_shared_address(to)),
                 "l"(from), "r"(bytes), "r"(cuda_shared_address(barrier))
                 : "memory");
#endif
}

/* What is read once leaves the L2 cache first. */
static __device__ __forceinline__ uint64_t cuda_passing_policy(void)
{
    uint64_t policy = 0;
#if CUDA_EXCHANGES
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
    return policy;
}

static __device__ __forceinline__ void cuda_copy_passing(void *to, const void *from, uint32_t bytes,
                                                         uint64_t *barrier, uint64_t policy)
{
#if CUDA_EXCHANGES
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(cuda_shared_address(to)),
                 "l"(from), "r"(bytes), "r"(cuda_shared_address(barrier)), "l"(policy)
                 : "memory");
#endif
}

/* Nothing, for so many clocks at least. */
static __device__ __forceinline__ void cuda_pause(uint32_t clocks)
{
    const uint32_t from = (uint32_t)clock();
    while ((uint32_t)clock() - from < clocks)
        ;
}

/* ---- packets: written and read whole by whatever block ---- */

static __device__ __forceinline__ void cuda_send(uint4 *to, const uint4 v)
{
#if CUDA_EXCHANGES
    asm volatile("{\n"
                 ".reg .b128 all;\n"
                 ".reg .b64 low, high;\n"
                 "mov.b64 low, {%1, %2};\n"
                 "mov.b64 high, {%3, %4};\n"
                 "mov.b128 all, {low, high};\n"
                 "st.relaxed.gpu.global.b128 [%0], all;\n"
                 "}\n" ::"l"(to),
                 "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
#endif
}

static __device__ __forceinline__ uint4 cuda_look(const uint4 *from)
{
    uint4 v = {};
#if CUDA_EXCHANGES
    asm volatile("{\n"
                 ".reg .b128 all;\n"
                 ".reg .b64 low, high;\n"
                 "ld.relaxed.gpu.global.b128 all, [%4];\n"
                 "mov.b128 {low, high}, all;\n"
                 "mov.b64 {%0, %1}, low;\n"
                 "mov.b64 {%2, %3}, high;\n"
                 "}\n"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
#endif
    return v;
}

static __device__ __forceinline__ void cuda_send(uint2 *to, const uint2 v)
{
    const uint64_t word = (uint64_t)v.y << 32 | v.x;
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}

static __device__ __forceinline__ uint2 cuda_look(const uint2 *from)
{
    uint64_t word;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
    return uint2{(uint32_t)word, (uint32_t)(word >> 32)};
}

/* All blocks of the grid run at once. */
#define CUDA_LAUNCH_TOGETHER CUDA_LAUNCH_EARLY

#else
#define CUDA_LAUNCH_TOGETHER(context, kernel, grid, block, shared, ...)                    \
    do {                                                                                   \
        const dim3 launch_grid = grid, launch_block = block;                               \
        if (!(context)->failed) {                                                          \
            emulator_launch((context)->stream, #kernel, launch_grid, launch_block, shared, \
                            [=] { (kernel)(__VA_ARGS__); }, true);                         \
            cuda_launched(context, #kernel);                                               \
        }                                                                                  \
    } while (0)
#endif

#endif
