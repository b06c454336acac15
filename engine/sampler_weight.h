/* sampler_weight.h - what a logit weighs when a token is drawn: the arithmetic that the sampler and
 * a device's own drawing share, to the bit.
 * Thread: any; pure functions. Owns nothing. Private to engine/.
 *
 * Weights are integers, so that their sums are the same in whatever order they are added. They come
 * from IEEE additions, multiplications and divisions in a fixed order, never contracted (a file of
 * kernels that includes this is compiled with -fmad=false), and from an exponential of our own: the
 * C library's differs from machine to machine in the last bit. */
#ifndef ENGINE_SAMPLER_WEIGHT_H
#define ENGINE_SAMPLER_WEIGHT_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define SAMPLER_BOTH __host__ __device__
#else
#define SAMPLER_BOTH
#endif

/* The weight of the most probable token; those of 2^18 such tokens still fit 64 bits. */
#define SAMPLER_WEIGHT_BITS 44
#define SAMPLER_WEIGHT_MOST ((uint64_t)1 << SAMPLER_WEIGHT_BITS)

/* A logit that is no number takes no part. */
static inline SAMPLER_BOTH float sampler_clean(float logit)
{
    if (logit > FLT_MAX)
        return FLT_MAX;
    return logit >= -FLT_MAX ? logit : -INFINITY;
}

/* e^x for x <= 0. With x = k ln 2 + r and |r| <= ln 2 / 2 the series to r^13 is good to 2^-53;
 * under 2^-1000 the result is taken as 0. */
static inline SAMPLER_BOTH double sampler_exponential(double x)
{
    if (!(x > -690))
        return 0;
    const double k = floor(x * 1.4426950408889634 + 0.5);
    const double r = (x - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10;
    double sum = 1;
    for (int i = 13; i > 0; i--)
        sum = 1 + sum * r / i;
    const uint64_t bits = (uint64_t)((int64_t)k + 1023) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return sum * power;
}

/* Of a clean logit; `top` is the largest, and a number. */
static inline SAMPLER_BOTH uint64_t sampler_weight(float logit, float top, float temperature)
{
    const double x = ((double)logit - (double)top) / (double)temperature;
    return (uint64_t)(sampler_exponential(x) * (double)SAMPLER_WEIGHT_MOST);
}

/* The least sum that reaches `share` (0 to 1) of `total`. */
static inline SAMPLER_BOTH uint64_t sampler_share(float share, uint64_t total)
{
    const uint64_t sum = (uint64_t)ceil((double)share * (double)total);
    return sum < 1 ? 1 : sum < total ? sum : total;
}

/* The least weight that min_p (0 to 1) leaves. */
static inline SAMPLER_BOTH uint64_t sampler_least(float min_p)
{
    const uint64_t least = (uint64_t)ceil((double)min_p * (double)SAMPLER_WEIGHT_MOST);
    return least < 1 ? 1 : least;
}

/* A number below `total` from 53 random bits. */
static inline SAMPLER_BOTH uint64_t sampler_point(uint64_t random, uint64_t total)
{
    const uint64_t low = (random & 0xffffffffu) * (total & 0xffffffffu);
    const uint64_t a = (random >> 32) * (total & 0xffffffffu) + (low >> 32);
    const uint64_t b = (random & 0xffffffffu) * (total >> 32) + (a & 0xffffffffu);
    const uint64_t high = (random >> 32) * (total >> 32) + (a >> 32) + (b >> 32);
    return high << 11 | (b & 0xffffffffu) >> 21; /* 128 bits of the product, without the last 53 */
}

#endif
