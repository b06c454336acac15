/* ref64.h - engine/ref compiled in double precision: the truth that kernels are measured against.
 * Thread: the test's. Owns nothing.
 *
 * The table has ops.h's shape, but every `float *` it takes or fills points to doubles, an OPS_FP32
 * tensor or memory holds doubles, and retrieval's weights are struct ref64_retrieval. */
#ifndef TESTS_LIB_REF64_H
#define TESTS_LIB_REF64_H

#include "engine/ops.h"

struct ref64_retrieval {
    struct ops_tensor pre_norm, query, q_norm, k_norm;
    double pos_decay;
};

const struct ops *ops_ref64(void);

#endif
