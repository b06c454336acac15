/* mamba.cuh - what the two forms of a Mamba-2 block share: mamba_step.cu goes token by token
 * through segments of few rows, mamba_blocks.cu through long ones in blocks.
 * Thread: the engine's. Owns nothing. Private to cuda/. */
#ifndef ENGINE_CUDA_MAMBA_CUH
#define ENGINE_CUDA_MAMBA_CUH

#include "engine/cuda/cuda.h"

/* Sizes that the kernels of a layer share. */
struct mamba_shape {
    uint32_t heads, width, n, groups; /* Hm, P, N, G */
    uint32_t inner, conv, proj, taps;
    float dt_min, dt_max;
};

static inline struct mamba_shape mamba_shape_of(const struct model_config *c)
{
    struct mamba_shape s;
    s.heads = c->mamba_heads;
    s.width = c->mamba_head_dim;
    s.n = c->state_size;
    s.groups = c->state_groups;
    s.inner = c->inner_size;
    s.conv = c->conv_size;
    s.proj = c->proj_size;
    s.taps = c->conv_kernel;
    s.dt_min = c->dt_min;
    s.dt_max = c->dt_max;
    return s;
}

/* Whether states of this shape can be kept in bf16. */
bool cuda_mamba_keeps_bf16(const struct model_config *config);

/* Everything of the long segments between the norm (`normed`) and out_proj (`mixed`), and where it
 * returns true out_proj too, to `hidden`; `segments`: all of the step's, on the device. */
bool cuda_mamba_blocks(struct ops_context *context, const struct ops_mamba_weights *weights,
                       const struct ops_rows *rows, const struct cuda_segment *segments,
                       float *hidden);

/* Segments of at most CUDA_FEW_ROWS rows, token by token, from x->projected to x->scanned:
 * convolution, recurrence and gate; the norm behind the gate is left out. States and tails lie
 * `ssm` and `conv` floats behind where the segments say. */
void cuda_mamba_step(struct ops_context *context, const struct ops_mamba_weights *weights,
                     const struct cuda_segment *segments, uint32_t segment_count, size_t ssm,
                     size_t conv);

/* Several segments of one row each: whether they can be taken together; what in_proj does for them
 * to its columns and brings near; and the recurrence, the gate and all of the norm behind it that
 * comes before out_proj, whose rows are prepared then. The same numbers as cuda_mamba_step's. */
bool cuda_mamba_takes_singles(const struct ops_context *context, const struct ops_rows *rows);
struct cuda_convolution cuda_mamba_convolution(const struct ops_context *context,
                                               const struct ops_mamba_weights *weights,
                                               const struct cuda_segment *segments, size_t conv);
struct cuda_soon cuda_mamba_soon(const struct ops_context *context,
                                 const struct cuda_segment *segments, uint32_t segment_count,
                                 size_t ssm);
void cuda_mamba_singles(struct ops_context *context, const struct ops_mamba_weights *weights,
                        const struct cuda_segment *segments, uint32_t first_row,
                        uint32_t segment_count, size_t ssm);

#endif
