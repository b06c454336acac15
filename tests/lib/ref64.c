/* ref64.c - see ref64.h. The reference's own sources with another width of number, so that the two
 * cannot drift apart; what has real floats in it comes before the word changes its meaning. */
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "engine/bf16.h"
#include "engine/packed.h"
#include "proto/base/assert.h"
#include "proto/limits.h"
#include "proto/model_config.h"
#include "proto/status.h"

#define float double
#define expf exp
#define log1pf log1p
#define sqrtf sqrt
#define powf pow
#define cosf cos
#define sinf sin
#define fminf fmin
#define fmaxf fmax
#define fabsf fabs
#define rintf rint
#define ldexpf ldexp

#define ops_ref ops_ref64
#define ref_scratch ref64_scratch
#define ref_linear ref64_linear
#define ref_rms_norm ref64_rms_norm
#define ref_silu ref64_silu
#define ref_softplus ref64_softplus
#define ref_softmax ref64_softmax
#define ref_pack_state ref64_pack_state
#define ref_unpack_state ref64_unpack_state
#define ref_embed ref64_embed
#define ref_mamba ref64_mamba
#define ref_encode_chunks ref64_encode_chunks
#define ref_retrieve ref64_retrieve
#define ref_hsa_query ref64_hsa_query
#define ref_hsa_attend ref64_hsa_attend
#define ref_hsa_out ref64_hsa_out
#define ref_logits ref64_logits
/* A double's way to bf16 goes through a float, as the table's callers have it. */
#define bf16_from_float(x) bf16_from_float((_Float32)(x))

#include "engine/ref/encode_chunks.c"
#include "engine/ref/hsa.c"
#include "engine/ref/logits.c"
#include "engine/ref/mamba.c"
#include "engine/ref/pack_state.c"
#include "engine/ref/ref.c"
#include "engine/ref/retrieve.c"
