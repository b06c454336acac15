/* mamba_run.cuh - Mamba-2 blocks that follow each other, of one row, in one kernel (mamba_run.cu).
 * Thread: the engine's. Owns nothing. Private to cuda/. */
#ifndef ENGINE_CUDA_MAMBA_RUN_CUH
#define ENGINE_CUDA_MAMBA_RUN_CUH

#include "engine/cuda/mamba_step.cuh"

#define RUN_LAYERS 32 /* of one kernel at most: its arguments have 4 KiB */
#define RUN_WIDTH 16  /* of the inner width, that a block of the grid has */
#define RUN_OUT 8     /* rows of out_proj that it has */
#define RUN_LINE 128  /* bytes of a line of the cache: what it sends has one */

struct run_layer {
    struct step_weights<bf16> weights;
    const bf16 *in_proj, *out_proj;
    const float *norm, *gate_norm, *in_bias, *out_bias; /* biases: or NULL */
    size_t ssm, conv;                                   /* floats behind where the segment says */
};

struct run {
    struct mamba_shape s;
    uint32_t d, columns; /* columns: of B and C, of a block of the grid */
    uint32_t layer_count;
    bool covers; /* it has such a model's rows; otherwise the rest is not said */
    float epsilon;
    const struct cuda_segment *segment; /* of the row, on the device */
    float *hidden;                      /* [d] in and out */
    float *const *kept;                 /* on the device: or NULL, or where it goes, too */
    /* On the device, RUN_LINE bytes for each block of the grid, nobody else's; zeros in the
     * beginning. */
    uint4 *hidden_sent, *gated_sent;
    uint2 *columns_sent;
    uint32_t *serial; /* layers that were run */
    struct run_layer layers[RUN_LAYERS];
};

static_assert(sizeof(struct run) <= 4096, "a kernel's arguments");

/* The model's shape, and whether the kernel has it. */
void cuda_run_open(const struct ops_context *context, struct run *run);
void cuda_run_launch(struct ops_context *context, const struct run &run);

#endif
