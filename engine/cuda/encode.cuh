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
/* `y` of the lane at work, for `count` chunks. */
void cuda_encode_attention(struct ops_context *context, const struct encoder_heads &heads,
                           uint32_t count, const struct encoder_inputs &in);

/* Scratch and streams of the lanes. False: no memory, or a failure of the device. */
bool cuda_encode_open(struct ops_context *context);
void cuda_encode_close(struct ops_context *context);

#endif
