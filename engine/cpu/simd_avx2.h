/* simd_avx2.h - eight float lanes with AVX2 and FMA, for functions compiled with CPU_TARGET.
 * Thread: any (pure functions). Owns nothing.
 * The same names as simd_portable.h; its comments hold here. */
#ifndef ENGINE_CPU_SIMD_AVX2_H
#define ENGINE_CPU_SIMD_AVX2_H

#include <immintrin.h>
#include <stdint.h>

#define CPU_LEVEL_NAME "avx2"
#define CPU_TARGET __attribute__((target("avx2,fma")))
#define CPU_FN static inline __attribute__((always_inline, unused)) CPU_TARGET

enum { V = 8, MR = 6, NR = 16 };

typedef __m256 vf;

CPU_FN vf vset(float x)
{
    return _mm256_set1_ps(x);
}

CPU_FN vf vload(const float *p)
{
    return _mm256_loadu_ps(p);
}

CPU_FN void vstore(float *p, vf v)
{
    _mm256_storeu_ps(p, v);
}

CPU_FN __m256i vmask(uint32_t n)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lane);
}

CPU_FN vf vload_part(const float *p, uint32_t n)
{
    return _mm256_maskload_ps(p, vmask(n));
}

CPU_FN void vstore_part(float *p, vf v, uint32_t n)
{
    _mm256_maskstore_ps(p, vmask(n), v);
}

CPU_FN vf vload_bf16(const uint16_t *p)
{
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

CPU_FN vf vadd(vf a, vf b)
{
    return _mm256_add_ps(a, b);
}

CPU_FN vf vsub(vf a, vf b)
{
    return _mm256_sub_ps(a, b);
}

CPU_FN vf vmul(vf a, vf b)
{
    return _mm256_mul_ps(a, b);
}

CPU_FN vf vdiv(vf a, vf b)
{
    return _mm256_div_ps(a, b);
}

CPU_FN vf vfma(vf a, vf b, vf c)
{
    return _mm256_fmadd_ps(a, b, c);
}

CPU_FN vf vmax(vf a, vf b)
{
    return _mm256_max_ps(a, b);
}

CPU_FN vf vmin(vf a, vf b)
{
    return _mm256_min_ps(a, b);
}

CPU_FN vf vround(vf a)
{
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

CPU_FN vf vpow2(vf n)
{
    const __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
}

CPU_FN float vsum(vf a)
{
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

CPU_FN float vtop(vf a)
{
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

CPU_FN uint32_t vabove(vf a, vf b)
{
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
}

CPU_FN void vtranspose(vf r[V])
{
    vf t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}

#endif
