/* encode.cuh - what the two forms of the chunk encoder's attention share.
 * Thread: the engine's. Owns nothing. Private to cuda/. */
#ifndef ENGINE_CUDA_ENCODE_CUH
#define ENGINE_CUDA_ENCODE_CUH

#include "engine/cuda/cuda.h"

struct encoder_heads {
    uint32_t heads, kv_heads, width, positions;
};

/* Rows as products left them, and what comes to them: biases (NULL: none), norms of heads. */
struct encoder_inputs {
    const float *q, *k, *v;
    const float *q_bias, *k_bias, *v_bias, *q_norm, *k_norm;
};

/* The form on tensor cores covers this. */
bool cuda_encodes_tiles(const struct ops_context *context, const struct encoder_heads &heads);
/* encoder_y of `count` chunks. */
void cuda_encode_attention(struct ops_context *context, const struct encoder_heads &heads,
                           uint32_t count, const struct encoder_inputs &in);

#endif
