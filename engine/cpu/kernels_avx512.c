/* kernels_avx512.c - the inner loops for x86 processors with AVX512. */
#include "engine/cpu/kernels.h"

#ifdef __x86_64__
#include "engine/cpu/simd_avx512.h"
/* The lanes come first. */
#include "engine/cpu/kernels_body.h"

const struct cpu_kernels *cpu_kernels_avx512(void)
{
    return &table;
}
#else
const struct cpu_kernels *cpu_kernels_avx512(void)
{
    return NULL;
}
#endif
