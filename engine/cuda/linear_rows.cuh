/* linear_rows.cuh - a product of the rows of short segments, as linear.cu hands it to
 * linear_rows.cu. Thread: the engine's. Owns nothing. Private to cuda/. */
#ifndef ENGINE_CUDA_LINEAR_ROWS_CUH
#define ENGINE_CUDA_LINEAR_ROWS_CUH

#include "engine/cuda/cuda.h"
#include "engine/cuda/device.cuh"

#define FEW_SHARES 8 /* of the depth, whose sums are added up in the end: warps of a block */

struct few {
    const bf16 *weight;
    uint32_t n, k, row_count;
    const float *x, *norm; /* norm NULL: ones */
    bool normed;           /* a norm stands before it */
    float epsilon;
    bf16 *ready; /* rows prepared by prepare_rows, and their scales */
    float *scales, *out;
    const float *bias;
    bool add;
    const float *squares; /* the rows lie in `ready` already, and here the sums of squares of each
                             four neighbours [rows, k / 4]; or NULL */
    struct few_next {   /* what the results, CUDA_LEFT_ROWS at most, become for the next product */
        bf16 *ready;    /* [rows, n], or NULL: nothing */
        float *squares; /* [rows, n / 4] */
        const float *norm;
    } next;
    struct cuda_soon soon;        /* count 0: nothing */
    struct cuda_convolution conv; /* count 0: of nothing */
};

/* Whether rows of depth k are taken. */
bool cuda_takes_rows(const struct ops_context *context, uint32_t k);
void cuda_multiply_rows(struct ops_context *context, const struct few &f);
/* linear_wide.cu: the same numbers of many rows, which are prepared, against very many weight rows.
 * False: it is not made for them. */
bool cuda_multiply_wide(struct ops_context *context, const struct few &f);

#endif
