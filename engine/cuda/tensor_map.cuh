/* tensor_map.cuh - the driver's function that makes maps for tensor copies.
 * Thread: the engine's. Owns nothing. Private to cuda/; not for the emulator. */
#ifndef ENGINE_CUDA_TENSOR_MAP_CUH
#define ENGINE_CUDA_TENSOR_MAP_CUH

#include <cuda.h>
#include <cudaTypedefs.h>

#include "engine/cuda/device.cuh"

/* NULL where it has none. */
static inline PFN_cuTensorMapEncodeTiled_v12000 cuda_map_encoder(void)
{
    cudaDriverEntryPointQueryResult found;
    void *function = NULL;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &found) != cudaSuccess ||
        found != cudaDriverEntryPointSuccess)
        function = NULL;
    cudaGetLastError();
    return (PFN_cuTensorMapEncodeTiled_v12000)function;
}

#endif
