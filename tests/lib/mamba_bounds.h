/* mamba_bounds.h - how far a Mamba-2 block's state may be off when products take bf16.
 * Thread: the caller's. Owns nothing. */
#ifndef TESTS_LIB_MAMBA_BOUNDS_H
#define TESTS_LIB_MAMBA_BOUNDS_H

#include "engine/ops.h"

/* One segment from `state` (as it is before it, in floats; unchanged) over the rows x [rows, hidden_size].
 * `bounds`: of each number of the state behind it, ssm [heads, head_dim, state_size] and then conv
 * [conv_kernel - 1, conv_size], the largest error that is not one of the code. */
void mamba_state_bounds(const struct model_config *config, const struct ops_mamba_weights *weights,
                        const float *x, uint32_t rows, const struct ops_mamba_state *state,
                        float *bounds);

#endif
