/* ending.cuh - how the last kernel of a recorded part tells the host that it is done (step.cu).
 * Thread: device code. Owns nothing. Private to cuda/. */
#ifndef ENGINE_CUDA_ENDING_CUH
#define ENGINE_CUDA_ENDING_CUH

#include "engine/cuda/cuda.h"

/* One thread of the kernel, once every other has written what the host will read. */
static __device__ __forceinline__ void cuda_tell_end(const struct cuda_ending &ending)
{
    if (!ending.told)
        return;
    const uint32_t count = *ending.count + 1;
    *ending.count = count;
    __threadfence_system();
    *(volatile uint32_t *)ending.told = count;
}

#endif
