/* device.cuh - what kernels are written with: launching, reductions, bf16, tensor-core products.
 * Thread: device code. Owns nothing. Private to cuda/.
 * Where nvcc does not compile (__CUDACC__ is not defined), the tests' emulator stands behind
 * <cuda_runtime.h> and declares the few primitives that are instructions here. */
#ifndef ENGINE_CUDA_DEVICE_CUH
#define ENGINE_CUDA_DEVICE_CUH

#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>

#define CUDA_WARP 32
#define CUDA_ALL_LANES 0xffffffffu

/* Launches `kernel` on a stream, or on the context's, unless the device has failed, and checks the
 * launch. An empty grid launches nothing. */
#ifdef __CUDACC__
#define CUDA_LAUNCH_ON(context, on, kernel, grid, block, shared, ...)                \
    do {                                                                             \
        const dim3 launch_grid = grid, launch_block = block;                         \
        if (!(context)->failed && launch_grid.x && launch_grid.y && launch_grid.z) { \
            auto launch_kernel = kernel;                                             \
            launch_kernel<<<launch_grid, launch_block, shared, on>>>(__VA_ARGS__);   \
            cuda_launched(context, #kernel);                                         \
        }                                                                            \
    } while (0)
#else
#define CUDA_LAUNCH_ON(context, on, kernel, grid, block, shared, ...)                \
    do {                                                                             \
        const dim3 launch_grid = grid, launch_block = block;                         \
        if (!(context)->failed && launch_grid.x && launch_grid.y && launch_grid.z) { \
            emulator_launch(on, #kernel, launch_grid, launch_block, shared,          \
                            [=] { (kernel)(__VA_ARGS__); });                         \
            cuda_launched(context, #kernel);                                         \
        }                                                                            \
    } while (0)
#endif

#define CUDA_LAUNCH(context, kernel, grid, block, shared, ...) \
    CUDA_LAUNCH_ON(context, (context)->stream, kernel, grid, block, shared, __VA_ARGS__)

/* Launches a kernel that may begin before the kernel in front of it on the stream has ended: it
 * calls cuda_depend_wait before it touches anything that others write, and until then may fetch
 * what nobody writes, such as weights. */
#ifdef __CUDACC__
template <typename... P, typename... A>
static inline void cuda_launch_early(cudaStream_t stream, bool early, void (*kernel)(P...),
                                     dim3 grid, dim3 block, size_t shared, A... args)
{
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = early;
    (void)cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...); /* see cuda_launched */
}

#define CUDA_LAUNCH_EARLY(context, kernel, grid, block, shared, ...)                    \
    do {                                                                                \
        const dim3 launch_grid = grid, launch_block = block;                            \
        if (!(context)->failed && launch_grid.x && launch_grid.y && launch_grid.z) {    \
            cuda_launch_early((context)->stream, (context)->early && !(context)->apart, \
                              kernel, launch_grid, launch_block, shared, __VA_ARGS__);  \
            (context)->apart = false;                                                   \
            cuda_launched(context, #kernel);                                            \
        }                                                                               \
    } while (0)
#else
#define CUDA_LAUNCH_EARLY CUDA_LAUNCH
#endif

/* The kernel behind this one may begin: blocks of it take their places as soon as every block of
 * this one has called this (or has ended). */
static __device__ __forceinline__ void cuda_depend_release(void)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/* Waits until the kernels in front of this one have ended and what they wrote can be read. */
static __device__ __forceinline__ void cuda_depend_wait(void)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* A warpgroup's threads may use so many registers from here on, of those that others of the block
 * gave back; without sm_90a all keep what they have. */
template <int count> static __device__ __forceinline__ void cuda_more_registers(void)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
#endif
}

template <int count> static __device__ __forceinline__ void cuda_fewer_registers(void)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
#endif
}

/* Dynamic shared memory of the block, as an array of `type` called `name`. */
#ifdef __CUDACC__
#define CUDA_SHARED(type, name)                                   \
    extern __shared__ __align__(16) unsigned char shared_bytes[]; \
    type *name = reinterpret_cast<type *>(shared_bytes)
/* The same, where a swizzle that repeats after 1024 bytes begins. */
#define CUDA_SHARED_TILES(type, name)                               \
    extern __shared__ __align__(1024) unsigned char shared_tiles[]; \
    type *name = reinterpret_cast<type *>(shared_tiles)
#else
#define CUDA_SHARED(type, name) type *name = reinterpret_cast<type *>(emulator_shared())
#define CUDA_SHARED_TILES(type, name) CUDA_SHARED(type, name)
#endif

/* Of `all` things in a row, those of one of `parts` that share them evenly. */
struct span {
    uint32_t first, count;
};

static __host__ __device__ __forceinline__ struct span share_of(uint32_t all, uint32_t parts,
                                                                uint32_t part)
{
    struct span s;
    s.first = (uint32_t)((uint64_t)all * part / parts);
    s.count = (uint32_t)((uint64_t)all * (part + 1) / parts) - s.first;
    return s;
}

/* ---- bf16 ---- */

struct bf16 {
    uint16_t bits;
};

static __device__ __forceinline__ float cuda_float(float x)
{
    return x;
}

static __device__ __forceinline__ float cuda_float(bf16 x)
{
    return __uint_as_float((uint32_t)x.bits << 16);
}

/* Rounded to nearest even; NaN stays NaN. */
static __device__ __forceinline__ bf16 cuda_bf16(float x)
{
    bf16 out;
#ifdef __CUDACC__
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
    const uint32_t bits = __float_as_uint(x);
    out.bits = x != x ? (uint16_t)(bits >> 16 | 0x40)
                      : (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
#endif
    return out;
}

static __device__ __forceinline__ void cuda_store(float *to, float x)
{
    *to = x;
}

static __device__ __forceinline__ void cuda_store(bf16 *to, float x)
{
    *to = cuda_bf16(x);
}

/* Two neighbours as the tensor cores take them: the first in the lower half. */
static __device__ __forceinline__ uint32_t cuda_pack(float first, float second)
{
#ifdef __CUDACC__
    uint32_t out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
    return out;
#else
    return (uint32_t)cuda_bf16(first).bits | (uint32_t)cuda_bf16(second).bits << 16;
#endif
}

static __device__ __forceinline__ float cuda_first(uint32_t pair)
{
    return __uint_as_float(pair << 16);
}

static __device__ __forceinline__ float cuda_second(uint32_t pair)
{
    return __uint_as_float(pair & 0xffff0000u);
}

/* 16 bytes of elements as floats. */
static __device__ __forceinline__ void cuda_load16(const float *from, float out[4])
{
    const float4 v = *reinterpret_cast<const float4 *>(from);
    out[0] = v.x;
    out[1] = v.y;
    out[2] = v.z;
    out[3] = v.w;
}

static __device__ __forceinline__ void cuda_load16(const bf16 *from, float out[8])
{
    const uint4 v = *reinterpret_cast<const uint4 *>(from);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out[2 * i] = cuda_first(words[i]);
        out[2 * i + 1] = cuda_second(words[i]);
    }
}

/* 16 bytes that this kernel reads once and nobody writes, past the L1 cache. */
static __device__ __forceinline__ uint4 cuda_stream16(const void *from)
{
#ifdef __CUDACC__
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
#else
    return *reinterpret_cast<const uint4 *>(from);
#endif
}

/* What will be read soon, 128 bytes of it, comes to the L2 cache. */
static __device__ __forceinline__ void cuda_prefetch(const void *from)
{
#ifdef __CUDACC__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
#else
    (void)*(const volatile char *)from;
#endif
}

/* ---- reductions, in an order that no other row of the batch can change ---- */

static __device__ __forceinline__ float cuda_warp_sum(float x)
{
#pragma unroll
    for (int step = CUDA_WARP / 2; step; step /= 2)
        x += __shfl_xor_sync(CUDA_ALL_LANES, x, step);
    return x;
}

/* Bits that are in the order of the numbers, which are no NaN and not minus zero. */
static __device__ __forceinline__ uint32_t cuda_order_of(float x)
{
    const uint32_t bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

static __device__ __forceinline__ float cuda_warp_max(float x)
{
#pragma unroll
    for (int step = CUDA_WARP / 2; step; step /= 2)
        x = fmaxf(x, __shfl_xor_sync(CUDA_ALL_LANES, x, step));
    return x;
}

/* Of all threads of the block, whose count is a multiple of 32; every thread gets the sum. */
static __device__ __forceinline__ float cuda_block_sum(float x)
{
    __shared__ float parts[CUDA_WARP];
    x = cuda_warp_sum(x);
    if (threadIdx.x % CUDA_WARP == 0)
        parts[threadIdx.x / CUDA_WARP] = x;
    __syncthreads();
    float sum = 0;
    for (uint32_t i = 0; i < blockDim.x / CUDA_WARP; i++)
        sum += parts[i];
    __syncthreads();
    return sum;
}

static __device__ __forceinline__ float cuda_silu(float x)
{
    return x / (1 + expf(-x));
}

/* 1 / x, within a few units of its last place. */
static __device__ __forceinline__ float cuda_reciprocal(float x)
{
#ifdef __CUDACC__
    float out;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
#else
    return 1 / x;
#endif
}

static __device__ __forceinline__ float cuda_softplus(float x)
{
    return x > 20 ? x : log1pf(expf(x));
}

/* ---- tensor cores, asynchronous copies: instructions here, plain code in the emulator ---- */

#ifdef __CUDACC__
/* 2^x, within 2 units of its last place. */
static __device__ __forceinline__ float cuda_exp2(float x)
{
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

/* d [16, 8] += a [16, 16] b [16, 8], one warp. With group = lane / 4 and pair = lane % 4:
 * a[0], a[1]: rows group and group + 8, columns 2 pair and 2 pair + 1; a[2], a[3]: the same rows,
 * columns 8 further; b[0]: rows 2 pair and 2 pair + 1 of column group; b[1]: rows 8 further;
 * d[0], d[1]: row group, columns 2 pair and 2 pair + 1; d[2], d[3]: row group + 8. */
static __device__ __forceinline__ void cuda_mma(float d[4], const uint32_t a[4],
                                                const uint32_t b[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* Four 8 x 8 matrices from shared memory: `row` is row lane % 8 of matrix lane / 8, eight
 * neighbours aligned to 16 bytes. out[i]: of matrix i, row lane / 4, columns 2 (lane % 4) and the
 * next; transposed: column lane / 4, rows 2 (lane % 4) and the next. */
static __device__ __forceinline__ void cuda_load_matrices(uint32_t out[4], const bf16 *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}

static __device__ __forceinline__ void cuda_load_transposed(uint32_t out[4], const bf16 *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}

/* 16 bytes from global to shared memory, past the registers; both aligned to 16. Zeros unless
 * `there`, and then nothing is read. */
static __device__ __forceinline__ void cuda_copy_async(void *shared, const void *global,
                                                       bool there = true)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(shared)),
                 "l"(global), "r"(there ? 16 : 0)
                 : "memory");
}

/* The same of 4 or 8 bytes, aligned to as many. */
template <int bytes>
static __device__ __forceinline__ void cuda_copy_word(void *shared, const void *global)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;\n" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(shared)),
                 "l"(global), "n"(bytes)
                 : "memory");
}

static __device__ __forceinline__ void cuda_copy_commit(void)
{
    asm volatile("cp.async.commit_group;\n" ::: "memory");
}

/* Waits until at most `left` of this thread's groups are under way. */
template <int left> static __device__ __forceinline__ void cuda_copy_wait(void)
{
    asm volatile("cp.async.wait_group %0;\n" ::"n"(left) : "memory");
}

/* A barrier in shared memory, whose phases each end with `arrivals` arrivals. */
static __device__ __forceinline__ void cuda_barrier_init(uint64_t *barrier, uint32_t arrivals)
{
    asm volatile("mbarrier.init.shared.b64 [%0], %1;\n" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(barrier)),
                 "r"(arrivals)
                 : "memory");
}

/* What this thread has read and written before is behind whoever waits. */
static __device__ __forceinline__ void cuda_barrier_arrive(uint64_t *barrier)
{
    asm volatile("{\n"
                 ".reg .b64 state;\n"
                 "mbarrier.arrive.shared.b64 state, [%0];\n"
                 "}\n" ::"r"((uint32_t)__cvta_generic_to_shared(barrier))
                 : "memory");
}

/* An arrival that comes once this thread's asynchronous copies so far are done. */
static __device__ __forceinline__ void cuda_barrier_copied(uint64_t *barrier)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];\n" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(barrier))
                 : "memory");
}

/* A warp goes on once every lane's `x` is there, and what it was made of. */
static __device__ __forceinline__ void cuda_await(uint32_t x)
{
    if (__ballot_sync(CUDA_ALL_LANES, x == UINT32_MAX))
        __nanosleep(1); /* as good as never: something has to hang on x */
}

/* Until the phase of this parity has ended; the first has parity 0, and the one before it has. */
static __device__ __forceinline__ void cuda_barrier_wait(uint64_t *barrier, uint32_t parity)
{
#if __CUDA_ARCH__ >= 900
#define CUDA_BARRIER_TEST "mbarrier.try_wait.parity.shared.b64"
#else
#define CUDA_BARRIER_TEST "mbarrier.test_wait.parity.shared.b64"
#endif
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n" CUDA_BARRIER_TEST " done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}\n" ::"r"((uint32_t)__cvta_generic_to_shared(barrier)),
                 "r"(parity)
                 : "memory");
}
#endif

/* `bytes` from global memory to the L2 cache, both aligned to 16: a hint. */
static __device__ __forceinline__ void cuda_bring_near(const void *from, uint32_t bytes)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#else
    (void)from;
    (void)bytes;
#endif
}

/* SiLU by approximations, far finer than bf16, which the result becomes. */
static __device__ __forceinline__ float cuda_silu_narrow(float x)
{
    return x * cuda_reciprocal(1 + cuda_exp2(x * -1.4426950408889634f));
}

/* Where a lane's row of four 8 x 8 matrices lies that make 16 x 16 elements: `by_rows`, the second
 * matrix is 8 rows further (what cuda_mma's a wants of rows of m, and its b, transposed, of rows of
 * k); otherwise 8 columns further (b of rows of n; a, transposed, of rows of k). */
static __device__ __forceinline__ const bf16 *cuda_matrix_row(const bf16 *corner, uint32_t stride,
                                                              bool by_rows)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, inner = lane % 8;
    const uint32_t second = lane / 8 % 2 * 8, third = lane / 16 * 8;
    const uint32_t row = by_rows ? inner + second : inner + third;
    return corner + row * stride + (by_rows ? third : second);
}

/* Where element `column` of row `row` lies in a tile of rows of W elements: units of 16 bytes
 * change places by the row, so that eight rows fall on all banks. */
template <int W>
static __device__ __forceinline__ uint32_t cuda_swizzled(uint32_t row, uint32_t column)
{
    return row * W + ((column / 8) ^ (row % 8)) * 8 + column % 8;
}

/* cuda_matrix_row in such a tile, for the matrices at (row, column). */
template <int W>
static __device__ __forceinline__ const bf16 *cuda_swizzled_row(const bf16 *tile, uint32_t row,
                                                                uint32_t column, bool by_rows)
{
    const uint32_t lane = threadIdx.x % CUDA_WARP, inner = lane % 8;
    const uint32_t second = lane / 8 % 2 * 8, third = lane / 16 * 8;
    return tile + cuda_swizzled<W>(row + inner + (by_rows ? second : third),
                                   column + (by_rows ? third : second));
}

/* A block may use `bytes` of dynamic shared memory, 48 KiB and more included. */
#define CUDA_ALLOW_SHARED(context, kernel, bytes)                                                \
    cuda_check(                                                                                  \
        context,                                                                                 \
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(bytes)), \
        #kernel)

/* Beside blocks of this kernel there is room for others with much dynamic shared memory, so that a
 * kernel that has it begins early: what is not shared memory is the first cache, and a
 * multiprocessor divides them anew only when it is empty. */
#define CUDA_SPARE_SHARED(context, kernel)                                                  \
    cuda_check(context,                                                                     \
               cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, \
                                    cudaSharedmemCarveoutMaxShared),                        \
               #kernel)

#endif
