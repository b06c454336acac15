/* mamba_out.cu - out_proj of long segments on Hopper's tensor cores (wgmma, fed by the tensor
 * memory accelerator), with the norm behind the gate: it scales whole rows, so it waits for the
 * sums and takes no pass of its own. A block has 128 rows by 256 columns, two warpgroups with 64
 * rows each, and one warp that only fetches. Each row's sums run in the same order wherever it
 * lies. */
#include <cuda.h>
#include <cudaTypedefs.h>

#include "engine/cuda/device.cuh"
#include "engine/cuda/mamba_blocks.cuh"

#define ROWS 128 /* of a block's tile */
#define COLUMNS 256
#define DEPTH 64 /* of a stage: what a swizzle of 128 bytes spans */
#define STAGES 4
#define GROUP 128           /* threads of a warpgroup */
#define THREADS (3 * GROUP) /* two that multiply, one that fetches */
#define GROUP_ROWS (ROWS / 2)
#define STAGE_BYTES ((ROWS + COLUMNS) * DEPTH * 2)
#define ATOM 1024 /* bytes that a swizzle repeats after: eight rows of a stage */

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)

static __device__ __forceinline__ uint32_t address_of(const void *shared)
{
    return (uint32_t)__cvta_generic_to_shared(shared);
}

static __device__ __forceinline__ void barrier_init(uint64_t *barrier, uint32_t arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(barrier)), "r"(arrivals)
                 : "memory");
}

/* The one arrival of this phase, which ends when `bytes` have come too. */
static __device__ __forceinline__ void barrier_expect(uint64_t *barrier, uint32_t bytes)
{
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(barrier)),
        "r"(bytes)
        : "memory");
}

static __device__ __forceinline__ void barrier_arrive(uint64_t *barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_of(barrier)) : "memory");
}

/* Until the phase of this parity has ended. */
static __device__ __forceinline__ void barrier_wait(uint64_t *barrier, uint32_t parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}\n" ::"r"(address_of(barrier)),
                 "r"(parity)
                 : "memory");
}

/* The map's box at (column, row) to shared memory; zeros beyond the matrix. */
static __device__ __forceinline__ void fetch_box(void *to, const CUtensorMap *map, uint32_t column,
                                                 uint32_t row, uint64_t *barrier)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile"
                 ".mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(address_of(to)),
                 "l"(map), "r"(column), "r"(row), "r"(address_of(barrier))
                 : "memory");
}

/* A stage's rows of DEPTH elements, swizzled by 128 bytes, as wgmma takes them. */
static __device__ __forceinline__ uint64_t matrix_at(const void *rows)
{
    return (uint64_t)(address_of(rows) >> 4) | (uint64_t)1 << 16 | (uint64_t)(ATOM >> 4) << 32 |
           (uint64_t)1 << 62;
}

#define SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_16(i) SUMS_4(i), SUMS_4(i + 4), SUMS_4(i + 8), SUMS_4(i + 12)
#define SUMS_64(i) SUMS_16(i), SUMS_16(i + 16), SUMS_16(i + 32), SUMS_16(i + 48)

/* d [64, 256] (+)= a [64, 16] b [256, 16]^T, one warpgroup. d[4 j + i]: row 16 warp + lane / 4,
 * eight further when i is 2 or 3, column 8 j + 2 (lane % 4) + i % 2. */
static __device__ __forceinline__ void multiply(float d[COLUMNS / 2], uint64_t a, uint64_t b,
                                                bool add)
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
                 : SUMS_64(0), SUMS_64(64)
                 : "l"(a), "l"(b), "r"((int)add));
}

static __device__ __forceinline__ void fetch_stages(const CUtensorMap *x, const CUtensorMap *w,
                                                    uint8_t *stages, uint64_t *full,
                                                    uint64_t *empty, uint32_t steps)
{
    for (uint32_t i = 0; i < steps; i++) {
        const uint32_t slot = i % STAGES;
        uint8_t *to = stages + slot * STAGE_BYTES;
        if (i >= STAGES)
            barrier_wait(empty + slot, (i / STAGES - 1) % 2);
        barrier_expect(full + slot, STAGE_BYTES);
        fetch_box(to, x, i * DEPTH, blockIdx.y * ROWS, full + slot);
        fetch_box(to + ROWS * DEPTH * 2, w, i * DEPTH, blockIdx.x * COLUMNS, full + slot);
    }
}

static __device__ __forceinline__ void multiply_stages(const uint8_t *stages, uint64_t *full,
                                                       uint64_t *empty, uint32_t steps,
                                                       float d[COLUMNS / 2])
{
    const uint32_t group = threadIdx.x / GROUP;
    for (uint32_t i = 0; i < steps; i++) {
        const uint32_t slot = i % STAGES;
        const uint8_t *stage = stages + slot * STAGE_BYTES;
        barrier_wait(full + slot, i / STAGES % 2);
        const uint64_t a = matrix_at(stage + group * GROUP_ROWS * DEPTH * 2);
        const uint64_t b = matrix_at(stage + ROWS * DEPTH * 2);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < DEPTH / 16; k++) /* 16 elements: 2 units of 16 bytes */
            multiply(d, a + 2 * k, b + 2 * k, i || k);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (i) { /* the step before this one is done with its stage */
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (threadIdx.x % GROUP == 0)
                barrier_arrive(empty + (i - 1) % STAGES);
        }
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

/* out += scale * d, a warpgroup's rows, as far as there are. */
static __device__ __forceinline__ void add_rows(const struct scaled_rows &s,
                                                const float d[COLUMNS / 2])
{
    const uint32_t lane = threadIdx.x % CUDA_WARP;
    const uint32_t top = blockIdx.y * ROWS + threadIdx.x / CUDA_WARP * 16 + lane / 4;
    const uint32_t left = blockIdx.x * COLUMNS + lane % 4 * 2;
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        const uint32_t row = top + half * 8;
        if (row >= s.count)
            continue;
        float sum = 0;
        for (uint32_t i = 0; i < s.parts; i++)
            sum += s.squares[(size_t)row * s.parts + i];
        const float scale = 1 / sqrtf(sum / (float)s.depth + s.epsilon);
        float *to = s.out + (size_t)row * s.columns + left;
#pragma unroll
        for (uint32_t j = 0; j < COLUMNS / 8; j += 8) { /* eight on their way together */
            float2 v[8];
#pragma unroll
            for (uint32_t i = 0; i < 8; i++)
                v[i] = *reinterpret_cast<const float2 *>(to + (j + i) * 8);
#pragma unroll
            for (uint32_t i = 0; i < 8; i++) {
                const float *own = d + (j + i) * 4 + half * 2;
                if (s.bias) {
                    v[i].x += s.bias[left + (j + i) * 8];
                    v[i].y += s.bias[left + (j + i) * 8 + 1];
                }
                v[i].x = fmaf(scale, own[0], v[i].x);
                v[i].y = fmaf(scale, own[1], v[i].y);
                *reinterpret_cast<float2 *>(to + (j + i) * 8) = v[i];
            }
        }
    }
}

static __global__ void __launch_bounds__(THREADS, 1)
    add_scaled(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w,
               struct scaled_rows s)
{
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ uint64_t full[STAGES], empty[STAGES];
    uint8_t *stages = shared + (ATOM - address_of(shared) % ATOM) % ATOM;
    const uint32_t steps = s.depth / DEPTH;
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < STAGES; i++) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, 2);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x >= 2 * GROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        cuda_depend_wait();
        cuda_depend_release();
        if (threadIdx.x == 2 * GROUP)
            fetch_stages(&x, &w, stages, full, empty, steps);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const uint32_t row = blockIdx.y * ROWS + threadIdx.x;
    if (threadIdx.x < ROWS && row < s.count) /* what will be added to */
        cuda_bring_near(s.out + (size_t)row * s.columns + blockIdx.x * COLUMNS,
                        COLUMNS * sizeof(float));
    cuda_depend_wait(); /* for the sums of squares */
    cuda_depend_release();
    float d[COLUMNS / 2];
    multiply_stages(stages, full, empty, steps, d);
    add_rows(s, d);
}

#else

static __global__ void add_scaled(CUtensorMap, CUtensorMap, struct scaled_rows)
{
}

#endif

/* ---- the host's side ---- */

/* The driver's function that makes tensor maps; NULL where it, or the GPU, is of another kind. */
static PFN_cuTensorMapEncodeTiled_v12000 find_encoder(void)
{
    cudaDriverEntryPointQueryResult found;
    void *function = NULL;
    int major = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) != cudaSuccess ||
        major != 9 ||
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &found) != cudaSuccess ||
        found != cudaDriverEntryPointSuccess)
        function = NULL;
    cudaGetLastError();
    return (PFN_cuTensorMapEncodeTiled_v12000)function;
}

bool cuda_adds_scaled(const struct ops_context *x)
{
    return !x->wide && x->config.hidden_size % COLUMNS == 0 && x->config.inner_size % DEPTH == 0 &&
           find_encoder();
}

/* Rows of `depth` bf16, in boxes of DEPTH by `box`. */
static bool map_rows(struct ops_context *x, const void *from, uint32_t rows, uint32_t depth,
                     uint32_t box, CUtensorMap *out)
{
    const PFN_cuTensorMapEncodeTiled_v12000 encode = find_encoder();
    const cuuint64_t size[2] = {depth, rows}, stride[1] = {(cuuint64_t)depth * 2};
    const cuuint32_t box_size[2] = {DEPTH, box}, step[2] = {1, 1};
    const CUresult result =
        encode(out, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void *>(from), size, stride,
               box_size, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        cuda_fail(x, STATUS_INTERNAL, "no tensor map of [%u, %u]: error %d", rows, depth,
                  (int)result);
    return result == CUDA_SUCCESS;
}

void cuda_add_scaled(struct ops_context *x, const void *weight, const void *in,
                     const struct scaled_rows &s)
{
    const size_t bytes = (size_t)STAGES * STAGE_BYTES + ATOM;
    CUtensorMap rows, columns;
    if (x->failed || !map_rows(x, in, s.count, s.depth, ROWS, &rows) ||
        !map_rows(x, weight, s.columns, s.depth, COLUMNS, &columns))
        return;
    CUDA_ALLOW_SHARED(x, add_scaled, bytes);
    CUDA_LAUNCH_EARLY(x, add_scaled, dim3(s.columns / COLUMNS, cuda_ceil(s.count, ROWS)),
                      dim3(THREADS), bytes, rows, columns, s);
}
