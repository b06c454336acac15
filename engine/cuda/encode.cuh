/* encode.cuh - what the two forms of the chunk encoder's attention share.
 * Thread: the engine's. Owns nothing. Private to cuda/. */
#ifndef ENGINE_CUDA_ENCODE_CUH
#define ENGINE_CUDA_ENCODE_CUH

#include "engine/cuda/cuda.h"

struct encoder_heads {
    uint32_t heads, kv_heads, width, positions;
};

/* encoder_y of `count` chunks from encoder_q, _k and _v as the products left them, on tensor cores.
 * False: the form is not covered, nothing was done. */
bool cuda_encode_attention(struct ops_context *context, const struct encoder_heads &heads,
                           uint32_t count, const float *q_norm, const float *k_norm);

#endif
