/* simd_portable.h - four float lanes in GCC's generic vectors: any machine with a C compiler.
 * Thread: any (pure functions). Owns nothing.
 * The same names as simd_avx2.h and simd_avx512.h, so that kernels_body.h is written once. */
#ifndef ENGINE_CPU_SIMD_PORTABLE_H
#define ENGINE_CPU_SIMD_PORTABLE_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define CPU_LEVEL_NAME "portable"
#define CPU_TARGET
#define CPU_FN static inline __attribute__((always_inline, unused))

enum { V = 4, MR = 4, NR = 8 };

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

CPU_FN vf vset(float x)
{
    return (vf){x, x, x, x};
}

CPU_FN vf vload(const float *p)
{
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

CPU_FN void vstore(float *p, vf v)
{
    memcpy(p, &v, sizeof v);
}

CPU_FN vf vload_part(const float *p, uint32_t n)
{
    vf v = {0};
    memcpy(&v, p, n * sizeof *p);
    return v;
}

CPU_FN void vstore_part(float *p, vf v, uint32_t n)
{
    memcpy(p, &v, n * sizeof *p);
}

CPU_FN vf vload_bf16(const uint16_t *p)
{
    const vi bits = {(int32_t)((uint32_t)p[0] << 16), (int32_t)((uint32_t)p[1] << 16),
                     (int32_t)((uint32_t)p[2] << 16), (int32_t)((uint32_t)p[3] << 16)};
    return (vf)bits;
}

CPU_FN vf vadd(vf a, vf b)
{
    return a + b;
}

CPU_FN vf vsub(vf a, vf b)
{
    return a - b;
}

CPU_FN vf vmul(vf a, vf b)
{
    return a * b;
}

CPU_FN vf vdiv(vf a, vf b)
{
    return a / b;
}

CPU_FN vf vfma(vf a, vf b, vf c)
{
    return a * b + c;
}

/* Like x86: the second operand where either is NaN, so that vmax(limit, x) keeps a NaN. */
CPU_FN vf vmax(vf a, vf b)
{
    const vi pick = a > b;
    return (vf)(((vi)a & pick) | ((vi)b & ~pick));
}

CPU_FN vf vmin(vf a, vf b)
{
    const vi pick = a < b;
    return (vf)(((vi)a & pick) | ((vi)b & ~pick));
}

/* To the nearest whole number, for |x| < 2^22; ties to even. */
CPU_FN vf vround(vf a)
{
    const vf magic = vset(12582912.0f); /* 1.5 * 2^23: adding it drops the fraction */
    return (a + magic) - magic;
}

/* 2^n for whole n in [-126, 127]. */
CPU_FN vf vpow2(vf n)
{
    const vf magic = vset(12582912.0f + 127.0f);
    const vi bits = (vi)(n + magic);
    return (vf)(bits << 23);
}

CPU_FN float vsum(vf a)
{
    return (a[0] + a[2]) + (a[1] + a[3]);
}

CPU_FN float vtop(vf a)
{
    return fmaxf(fmaxf(a[0], a[2]), fmaxf(a[1], a[3]));
}

/* Bit i: a[i] > b[i]. */
CPU_FN uint32_t vabove(vf a, vf b)
{
    const vi pick = a > b;
    return (pick[0] ? 1u : 0u) | (pick[1] ? 2u : 0u) | (pick[2] ? 4u : 0u) | (pick[3] ? 8u : 0u);
}

CPU_FN void vtranspose(vf r[V])
{
    const vf a = r[0], b = r[1], c = r[2], d = r[3];
    r[0] = (vf){a[0], b[0], c[0], d[0]};
    r[1] = (vf){a[1], b[1], c[1], d[1]};
    r[2] = (vf){a[2], b[2], c[2], d[2]};
    r[3] = (vf){a[3], b[3], c[3], d[3]};
}

#endif
