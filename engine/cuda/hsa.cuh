/* hsa.cuh - what the forms of sparse attention share.
 * Thread: the engine's. Owns nothing. Private to cuda/. */
#ifndef ENGINE_CUDA_HSA_CUH
#define ENGINE_CUDA_HSA_CUH

#include "engine/cuda/cuda.h"

struct hsa_shape {
    uint32_t heads, kv_heads, retrieval_heads, topk, tokens, width;
    float scale;
    bool softmax1;
};

/* Rows through tensor cores; `weights` and `pages` on the device, each page at a multiple of 256
 * bytes. False: the form is not covered, nothing was done; the answer does not depend on the
 * rows. */
bool cuda_attend_pages(struct ops_context *context, const struct hsa_shape &shape,
                       uint32_t row_count, const float *q, const float *weights,
                       const void *const *pages, float *o);
/* The same for many rows, in a form that reads a page once for neighbours that picked it; the same
 * bits. False: not covered, or too few rows; nothing was done. */
bool cuda_attend_groups(struct ops_context *context, const struct hsa_shape &shape,
                        uint32_t row_count, const float *q, const float *weights,
                        const void *const *pages, float *o);

#endif
