/* mamba_out.cu - out_proj of long segments on Hopper's tensor cores (wgmma, fed by the tensor
 * memory accelerator), with the norm behind the gate: it scales whole rows, so it waits for the
 * sums and takes no pass of its own. A block has 128 rows by 256 columns, two warpgroups with 64
 * rows each, and one warp that only fetches. Each row's sums run in the same order wherever it
 * lies. */
#include "engine/cuda/device.cuh"
#include "engine/cuda/mamba_blocks.cuh"
#include "engine/cuda/tensor_map.cuh"
#include "engine/cuda/wgmma.cuh"

#define ROWS 128 /* of a block's tile */
#define COLUMNS WGMMA_COLUMNS
#define DEPTH WGMMA_DEPTH /* of a stage */
#define STAGES 4
#define GROUP WGMMA_GROUP
#define THREADS (3 * GROUP) /* two that multiply, one that fetches */
#define GROUP_ROWS (ROWS / 2)
#define STAGE_BYTES ((ROWS + COLUMNS) * DEPTH * 2)
#define ATOM WGMMA_ATOM

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)

static __device__ __forceinline__ uint32_t address_of(const void *shared)
{
    return (uint32_t)__cvta_generic_to_shared(shared);
}

/* The one arrival of this phase, which ends when `bytes` have come too. */
static __device__ __forceinline__ void barrier_expect(uint64_t *barrier, uint32_t bytes)
{
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(barrier)),
        "r"(bytes)
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

static __device__ __forceinline__ void fetch_stages(const CUtensorMap *x, const CUtensorMap *w,
                                                    uint8_t *stages, uint64_t *full,
                                                    uint64_t *empty, uint32_t steps)
{
    for (uint32_t i = 0; i < steps; i++) {
        const uint32_t slot = i % STAGES;
        uint8_t *to = stages + slot * STAGE_BYTES;
        if (i >= STAGES)
            cuda_barrier_wait(empty + slot, (i / STAGES - 1) % 2);
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
        cuda_barrier_wait(full + slot, i / STAGES % 2);
        wgmma_step(d, stage + group * GROUP_ROWS * DEPTH * 2, stage + ROWS * DEPTH * 2, !i);
        if (i) { /* the step before this one is done with its stage */
            wgmma_wait<1>();
            if (threadIdx.x % GROUP == 0)
                cuda_barrier_arrive(empty + (i - 1) % STAGES);
        }
    }
    wgmma_wait<0>();
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
            cuda_barrier_init(full + i, 1);
            cuda_barrier_init(empty + i, 2);
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

/* Code for 9.0 that may not use what 9.0 alone has: it must not be taken for what it stands for. */
static __global__ void add_scaled(CUtensorMap, CUtensorMap, struct scaled_rows)
{
    __trap();
}

#endif

/* ---- the host's side ---- */

bool cuda_adds_scaled(const struct ops_context *x)
{
    return x->hopper && !x->wide && x->config.hidden_size % COLUMNS == 0 &&
           x->config.inner_size % DEPTH == 0 && cuda_map_encoder();
}

/* Rows of `depth` bf16, in boxes of DEPTH by `box`. */
static bool map_rows(struct ops_context *x, const void *from, uint32_t rows, uint32_t depth,
                     uint32_t box, CUtensorMap *out)
{
    const PFN_cuTensorMapEncodeTiled_v12000 encode = cuda_map_encoder();
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
