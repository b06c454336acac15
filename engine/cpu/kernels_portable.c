/* kernels_portable.c - the inner loops for any processor. */
#include "engine/cpu/simd_portable.h"
/* The lanes come first. */
#include "engine/cpu/kernels_body.h"

const struct cpu_kernels *cpu_kernels_portable(void)
{
    return &table;
}
