/* wgmma.cuh - products by whole warpgroups on Hopper's tensor cores, from shared memory.
 * Thread: device code, sm_90a alone. Private to cuda/. */
#ifndef ENGINE_CUDA_WGMMA_CUH
#define ENGINE_CUDA_WGMMA_CUH

#include "engine/cuda/device.cuh"

#define WGMMA_GROUP 128 /* threads of a warpgroup */
#define WGMMA_ROWS 64   /* of a warpgroup's product */
#define WGMMA_COLUMNS 256
#define WGMMA_DEPTH 64  /* of a tile: what a swizzle of 128 bytes spans */
#define WGMMA_ATOM 1024 /* bytes that a swizzle repeats after: eight rows of a tile */

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)

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

/* d += (or, with `first`, =) a [64, 64] b [256, 64]^T, tiles as wgmma_tile has them; under way
 * when it returns: see wgmma_wait. */
static __device__ __forceinline__ void wgmma_step(float d[WGMMA_COLUMNS / 2], const void *a,
                                                  const void *b, bool first)
{
    const uint64_t rows = wgmma_tile(a), columns = wgmma_tile(b);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < WGMMA_DEPTH / 16; k++) /* 16 elements: 2 units of 16 bytes */
        wgmma_multiply(d, rows + 2 * k, columns + 2 * k, !first || k);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Until at most `left` of the warpgroup's steps are under way. */
template <int left> static __device__ __forceinline__ void wgmma_wait(void)
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
}

#endif

#endif
