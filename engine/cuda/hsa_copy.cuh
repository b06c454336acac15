/* hsa_copy.cuh - K/V pages by tensor copies: the copy engine brings a kv head's part of a whole
 * page to shared memory, swizzled. For sm_90 and later.
 * A page is any device address that is a multiple of PAGE_UNIT: the map's upper two dimensions are
 * the address itself, so that one map serves wherever pages lie.
 * Thread: the engine's. Owns nothing. Private to cuda/. */
#ifndef ENGINE_CUDA_HSA_COPY_CUH
#define ENGINE_CUDA_HSA_COPY_CUH

#include "engine/cuda/exchange.cuh"
#include "engine/cuda/hsa_tile.cuh"

#ifdef __CUDACC__
#include "engine/cuda/tensor_map.cuh"

#define PAGE_UNIT_BITS 8   /* of an address: the fourth dimension's stride */
#define PAGE_SPACE_BITS 28 /* the fifth's */
#define ADDRESS_BITS 47

/* A kv head's K (row 0) or V (row HSA_TOKENS) of a page, from the `block`-th HSA_BLOCK of columns
 * on, as hsa_place lays it out; `to`: a multiple of 1024. */
static __device__ __forceinline__ void hsa_fetch_half(bf16 *to, const CUtensorMap *map,
                                                      uint32_t block, uint32_t row,
                                                      const bf16 *page, uint64_t *barrier)
{
#if CUDA_EXCHANGES
    const uint64_t address = reinterpret_cast<uintptr_t>(page);
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile"
                 ".mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(
                     cuda_shared_address(to)),
                 "l"(map), "r"(0), "r"(row), "r"(block),
                 "r"((uint32_t)(address >> PAGE_UNIT_BITS) &
                     ((1u << (PAGE_SPACE_BITS - PAGE_UNIT_BITS)) - 1)),
                 "r"((uint32_t)(address >> PAGE_SPACE_BITS) - 1), "r"(cuda_shared_address(barrier))
                 : "memory");
#endif
}

static inline bool hsa_maps_pages(const struct ops_context *x)
{
    return x->early && cuda_map_encoder();
}

/* Pages whose rows are `width` bf16, in boxes of HSA_TOKENS rows by `blocks` HSA_BLOCKs. */
static inline bool hsa_map_pages(struct ops_context *x, uint32_t width, uint32_t blocks,
                                 CUtensorMap *out)
{
    const cuuint64_t size[5] = {HSA_BLOCK, 2 * HSA_TOKENS, width / HSA_BLOCK,
                                1ull << (PAGE_SPACE_BITS - PAGE_UNIT_BITS),
                                (1ull << (ADDRESS_BITS - PAGE_SPACE_BITS)) - 1};
    const cuuint64_t stride[4] = {(cuuint64_t)width * sizeof(bf16), HSA_BLOCK * sizeof(bf16),
                                  1ull << PAGE_UNIT_BITS, 1ull << PAGE_SPACE_BITS};
    const cuuint32_t box[5] = {HSA_BLOCK, HSA_TOKENS, blocks, 1, 1}, step[5] = {1, 1, 1, 1, 1};
    const CUresult result = cuda_map_encoder()(
        out, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5, (void *)(1ull << PAGE_SPACE_BITS), size, stride,
        box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        cuda_fail(x, STATUS_INTERNAL, "no tensor map of pages of width %u: error %d", width,
                  (int)result);
    return result == CUDA_SUCCESS;
}

#else

/* The emulator's: units of 16 bytes, one by one. */
struct CUtensorMap {
    uint32_t width, blocks;
};

static inline void hsa_fetch_half(bf16 *to, const CUtensorMap *map, uint32_t block, uint32_t row,
                                  const bf16 *page, uint64_t *barrier)
{
    page += (size_t)row * map->width + block * HSA_BLOCK;
    for (uint32_t i = 0; i < HSA_TOKENS; i++)
        for (uint32_t column = 0; column < map->blocks * HSA_BLOCK; column += 8)
            cuda_copy_bulk(to + hsa_place<HSA_TOKENS>(i, column),
                           page + (size_t)i * map->width + column, 16, barrier);
}

static inline bool hsa_maps_pages(const struct ops_context *x)
{
    return x->early;
}

static inline bool hsa_map_pages(struct ops_context *, uint32_t width, uint32_t blocks,
                                 CUtensorMap *out)
{
    *out = {width, blocks};
    return true;
}

#endif
#endif
