/* mamba_run.cuh - Mamba-2 blocks that follow each other in one kernel (mamba_run.cu).
 * Thread: the engine's. Owns nothing. Private to cuda/. */
#ifndef ENGINE_CUDA_MAMBA_RUN_CUH
#define ENGINE_CUDA_MAMBA_RUN_CUH

#include "engine/cuda/mamba_step.cuh"

#define RUN_ROWS 1    /* at most: more have kernels that are faster (mamba_step.cu) */
#define RUN_LAYERS 32 /* of one kernel at most: its arguments have 4 KiB */
#define RUN_WIDTH 16  /* of the inner width, that a block of the grid has */
#define RUN_OUT 8     /* rows of out_proj that it has */
#define RUN_LINE 128  /* bytes of a line of the cache: what it sends of a row has one */

struct run_layer {
    struct step_weights<bf16> weights;
    const bf16 *in_proj, *out_proj;
    const float *norm, *gate_norm, *in_bias, *out_bias; /* biases: or NULL */
    size_t ssm, conv;                                   /* floats behind where the segments say */
};

struct run {
    struct mamba_shape s;
    uint32_t d, columns; /* columns: of B and C, of a block of the grid */
    uint32_t row_count, layer_count;
    float epsilon;
    const struct cuda_segment *segments; /* [row_count] on the device, a row each */
    float *hidden;                       /* [row_count, d] in and out */
    /* On the device, RUN_LINE bytes for each of RUN_ROWS rows and each block of the grid, nobody
     * else's; zeros in the beginning. */
    uint4 *hidden_sent, *gated_sent;
    uint2 *columns_sent;
    uint32_t *serial; /* layers that were run */
    struct run_layer layers[RUN_LAYERS];
};

static_assert(sizeof(struct run) <= 4096, "a kernel's arguments");

/* Whether it has such rows of the model. */
bool cuda_run_covers(const struct ops_context *context, uint32_t row_count);
void cuda_run_launch(struct ops_context *context, const struct run &run);

#endif
