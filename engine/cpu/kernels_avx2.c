/* kernels_avx2.c - the inner loops for x86 processors with AVX2. */
#include "engine/cpu/kernels.h"

#ifdef __x86_64__
#include "engine/cpu/simd_avx2.h"
/* The lanes come first. */
#include "engine/cpu/kernels_body.h"

const struct cpu_kernels *cpu_kernels_avx2(void)
{
    return &table;
}
#else
const struct cpu_kernels *cpu_kernels_avx2(void)
{
    return NULL;
}
#endif
