/* wgmma.cuh - products by whole warpgroups on Hopper's tensor cores, from shared memory. Where nvcc
 * does not compile, the tests' emulator has those that are 64 columns wide.
 * Thread: device code, sm_90a alone. Private to cuda/. */
#ifndef ENGINE_CUDA_WGMMA_CUH
#define ENGINE_CUDA_WGMMA_CUH

#include "engine/cuda/device.cuh"

#define WGMMA_GROUP 128 /* threads of a warpgroup */
#define WGMMA_ROWS 64   /* of a warpgroup's product */
#define WGMMA_COLUMNS 256
#define WGMMA_DEPTH 64  /* of a tile: what a swizzle of 128 bytes spans */
#define WGMMA_ATOM 1024 /* bytes that a swizzle repeats after: eight rows of a tile */
#define WGMMA_NARROW 64 /* columns of the narrow products */

#if defined(__CUDACC__) && (defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__))

/* A tile's rows of WGMMA_DEPTH bf16, swizzled by 128 bytes (as cuda_swizzled does), as wgmma takes
 * them. The tile begins at a multiple of WGMMA_ATOM. */
static __device__ __forceinline__ uint64_t wgmma_tile(const void *rows)
{
    return (uint64_t)((uint32_t)__cvta_generic_to_shared(rows) >> 4) | (uint64_t)1 << 16 |
           (uint64_t)(WGMMA_ATOM >> 4) << 32 | (uint64_t)1 << 62;
}

#define WGMMA_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_SUMS_16(i) \
    WGMMA_SUMS_4(i), WGMMA_SUMS_4(i + 4), WGMMA_SUMS_4(i + 8), WGMMA_SUMS_4(i + 12)
#define WGMMA_SUMS_64(i) \
    WGMMA_SUMS_16(i), WGMMA_SUMS_16(i + 16), WGMMA_SUMS_16(i + 32), WGMMA_SUMS_16(i + 48)

/* d [64, 256] (+)= a [64, 16] b [256, 16]^T, one warpgroup. d[4 j + i]: row 16 warp + lane / 4,
 * eight further when i is 2 or 3, column 8 j + 2 (lane % 4) + i % 2. */
static __device__ __forceinline__ void wgmma_multiply(float d[WGMMA_COLUMNS / 2], uint64_t a,
                                                      uint64_t b, bool add)
{
    asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %130, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, "
                 "%8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, "
                 "%40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, "
                 "%56, %57, %58, %59, %60, %61, %62, %63, "
                 "%64, %65, %66, %67, %68, %69, %70, %71, "
                 "%72, %73, %74, %75, %76, %77, %78, %79, "
                 "%80, %81, %82, %83, %84, %85, %86, %87, "
                 "%88, %89, %90, %91, %92, %93, %94, %95, "
                 "%96, %97, %98, %99, %100, %101, %102, %103, "
                 "%104, %105, %106, %107, %108, %109, %110, %111, "
                 "%112, %113, %114, %115, %116, %117, %118, %119, "
                 "%120, %121, %122, %123, %124, %125, %126, %127}, "
                 "%128, %129, more, 1, 1, 0, 0;\n}\n"
                 : WGMMA_SUMS_64(0), WGMMA_SUMS_64(64)
                 : "l"(a), "l"(b), "r"((int)add));
}

/* What this thread wrote to shared memory can be read by wgmma, once the threads have met. */
static __device__ __forceinline__ void wgmma_hand_over(void)
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* Registers that were written are there for the products that follow. */
static __device__ __forceinline__ void wgmma_begin(void)
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

/* The products since the last one are a group: see wgmma_wait. */
static __device__ __forceinline__ void wgmma_end(void)
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* d += (or, with `first`, =) a [64, 64] b [256, 64]^T, tiles as wgmma_tile has them; under way
 * when it returns: see wgmma_wait. */
static __device__ __forceinline__ void wgmma_step(float d[WGMMA_COLUMNS / 2], const void *a,
                                                  const void *b, bool first)
{
    const uint64_t rows = wgmma_tile(a), columns = wgmma_tile(b);
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < WGMMA_DEPTH / 16; k++) /* 16 elements: 2 units of 16 bytes */
        wgmma_multiply(d, rows + 2 * k, columns + 2 * k, !first || k);
    wgmma_end();
}

#define WGMMA_NARROW_SUMS                                                     \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define WGMMA_SUMS_32 WGMMA_SUMS_16(0), WGMMA_SUMS_16(16)

/* d [64, 64] += (or, with `first`, =) a [64, 64] b [64, 64]^T, laid out as wgmma_step has them;
 * between wgmma_begin and wgmma_end. */
static __device__ __forceinline__ void wgmma_narrow(float d[WGMMA_NARROW / 2], const void *a,
                                                    const void *b, bool first)
{
    const uint64_t rows = wgmma_tile(a), columns = wgmma_tile(b);
#pragma unroll
    for (int k = 0; k < WGMMA_DEPTH / 16; k++)
        asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %34, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " WGMMA_NARROW_SUMS
                     ", %32, %33, more, 1, 1, 0, 0;\n}\n"
                     : WGMMA_SUMS_32
                     : "l"(rows + 2 * k), "l"(columns + 2 * k), "r"((int)(!first || k)));
}

/* d [64, 64] += a [64, 16] b [16, 64]: of a, each warp's 16 rows as cuda_mma has them; b: 16 rows
 * of a tile, from a multiple of eight rows on. Between wgmma_begin and wgmma_end; a's registers
 * are read until the product is done. */
static __device__ __forceinline__ void wgmma_narrow_rows(float d[WGMMA_NARROW / 2],
                                                         const uint32_t a[4], const void *b)
{
    asm volatile("{\n.reg .pred more;\nsetp.eq.b32 more, 0, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " WGMMA_NARROW_SUMS
                 ", {%32, %33, %34, %35}, %36, more, 1, 1, 1;\n}\n"
                 : WGMMA_SUMS_32
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(wgmma_tile(b)));
}

/* Until at most `left` of the warpgroup's steps are under way. */
template <int left> static __device__ __forceinline__ void wgmma_wait(void)
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
}

/* All are done, and d is what they made of it: nothing that reads it may come before. */
static __device__ __forceinline__ void wgmma_take(float d[WGMMA_NARROW / 2])
{
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < WGMMA_NARROW / 2; i++)
        asm volatile("" : "+f"(d[i])::"memory");
}

#endif

#endif
