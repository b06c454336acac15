/* simd_avx512.h - sixteen float lanes with AVX-512 (F, BW, DQ, VL), for CPU_TARGET functions.
 * Thread: any (pure functions). Owns nothing.
 * The same names as simd_portable.h; its comments hold here. */
#ifndef ENGINE_CPU_SIMD_AVX512_H
#define ENGINE_CPU_SIMD_AVX512_H

#include <immintrin.h>
#include <stdint.h>

#define CPU_LEVEL_NAME "avx512"
#ifdef __clang__ /* which keeps 512-bit vectors as they are written and lacks the word for it */
#define CPU_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#else
#define CPU_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#endif
#define CPU_FN static inline __attribute__((always_inline, unused)) CPU_TARGET

enum { V = 16, MR = 12, NR = 32 };

typedef __m512 vf;

CPU_FN vf vset(float x)
{
    return _mm512_set1_ps(x);
}

CPU_FN vf vload(const float *p)
{
    return _mm512_loadu_ps(p);
}

CPU_FN void vstore(float *p, vf v)
{
    _mm512_storeu_ps(p, v);
}

CPU_FN __mmask16 vmask(uint32_t n)
{
    return (__mmask16)((1u << n) - 1u);
}

CPU_FN vf vload_part(const float *p, uint32_t n)
{
    return _mm512_maskz_loadu_ps(vmask(n), p);
}

CPU_FN void vstore_part(float *p, vf v, uint32_t n)
{
    _mm512_mask_storeu_ps(p, vmask(n), v);
}

CPU_FN vf vload_bf16(const uint16_t *p)
{
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

CPU_FN vf vadd(vf a, vf b)
{
    return _mm512_add_ps(a, b);
}

CPU_FN vf vsub(vf a, vf b)
{
    return _mm512_sub_ps(a, b);
}

CPU_FN vf vmul(vf a, vf b)
{
    return _mm512_mul_ps(a, b);
}

CPU_FN vf vdiv(vf a, vf b)
{
    return _mm512_div_ps(a, b);
}

CPU_FN vf vfma(vf a, vf b, vf c)
{
    return _mm512_fmadd_ps(a, b, c);
}

CPU_FN vf vmax(vf a, vf b)
{
    return _mm512_max_ps(a, b);
}

CPU_FN vf vmin(vf a, vf b)
{
    return _mm512_min_ps(a, b);
}

CPU_FN vf vround(vf a)
{
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

CPU_FN vf vpow2(vf n)
{
    const __m512i bits = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 23));
}

CPU_FN float vsum(vf a)
{
    const __m256 high = _mm512_extractf32x8_ps(a, 1);
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

CPU_FN float vtop(vf a)
{
    return _mm512_reduce_max_ps(a);
}

CPU_FN uint32_t vabove(vf a, vf b)
{
    return (uint32_t)_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
}

CPU_FN void vtranspose(vf r[V])
{
    vf t[16], u[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
        u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    /* u[4g + j] holds column 4q + j of rows 4g..4g+3 in its quarter q: gather the quarters. */
    for (int j = 0; j < 4; j++) {
        const vf even_low = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88);
        const vf odd_low = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);
        const vf even_high = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
        const vf odd_high = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
        r[j] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
        r[8 + j] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
        r[4 + j] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
        r[12 + j] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
}

#endif
