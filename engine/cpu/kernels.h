/* kernels.h - the inner loops, one table an instruction set, chosen once at opening.
 * Thread: any (pure functions). Owns nothing. Private to cpu/.
 * Every function computes a row independently of the rows beside it, in one fixed order, so that
 * what a sequence computes does not depend on its neighbours in a batch. */
#ifndef ENGINE_CPU_KERNELS_H
#define ENGINE_CPU_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/ops.h"

/* One chunk page as one kv head sees it. */
struct cpu_page {
    const void *keys, *values; /* [S] rows, `stride` elements apart */
    enum ops_dtype dtype;
    uint32_t stride, tokens, width; /* S, hd */
};

struct cpu_kernels {
    const char *name;
    /* out[r * out_stride + i] = w_i . x_r, or += : `count` weight rows of k elements `w_stride`
     * apart, m rows of x. Reads each weight once per 8 rows of x. */
    void (*skinny)(const void *w, enum ops_dtype dtype, size_t w_stride, uint32_t count, uint32_t k,
                   const float *x, size_t x_stride, uint32_t m, float *out, size_t out_stride,
                   bool add);
    void (*widen)(const uint16_t *from, float *to, size_t n);
    /* Matrix products: B is packed into panels of `panel` columns, [n / panel rounded
     * up][k][panel], zeros behind the last column. */
    uint32_t panel;
    /* B = W^T: `count` weight rows of k elements, `w_stride` apart. */
    void (*pack_transposed)(const void *w, enum ops_dtype dtype, size_t w_stride, uint32_t count,
                            uint32_t k, float *panels);
    /* B as it lies, k rows of n elements `b_stride` apart, row j times factors[j] (NULL: 1). */
    void (*pack)(const float *b, size_t b_stride, const float *factors, uint32_t k, uint32_t n,
                 float *panels);
    /* W [count, k] from panels of W^T: what pack_transposed read. */
    void (*unpack_transposed)(const float *panels, uint32_t count, uint32_t k, float *w);
    /* C [m, n] = A B + beta C; A's element (i, j) is a[i * a_row + j * a_col]. beta 0: C is not
     * read. A row's numbers depend on neither m nor the rows beside it. */
    void (*product)(const float *a, size_t a_row, size_t a_col, const float *panels, uint32_t m,
                    uint32_t n, uint32_t k, float beta, float *c, size_t c_stride);
    /* out = x / rms(x) * weight; weight NULL: 1. May be in place. */
    void (*rms_norm)(const float *x, const float *weight, uint32_t n, float epsilon, float *out);
    /* y *= SiLU(gate) */
    void (*silu_multiply)(float *y, const float *gate, uint32_t n);
    /* y += x * scale */
    void (*add_scaled)(float *y, const float *x, float scale, uint32_t n);
    /* y = y * own + x * scale */
    void (*blend)(float *y, float own, const float *x, float scale, uint32_t n);
    /* In place; `extra`: one more exp(0) in the denominator. */
    void (*softmax)(float *x, uint32_t n, bool extra);
    /* out[j] = SiLU(bias[j] + sum_i weight[i][j] * in[i][j]); weight is [taps, n]. */
    void (*convolve)(const float *const *in, const float *weight, const float *bias, uint32_t taps,
                     uint32_t n, float *out);
    /* One head of the recurrence, one token: state [width, n]; dtx[p] = dt * x[p];
     * state = decay * state + dtx outer b; y[p] = state[p] . c. */
    void (*recur)(float *state, uint32_t width, uint32_t n, float decay, const float *dtx,
                  const float *b, const float *c, float *y);
    /* out[s] = scores[s] * exp(last - log_decay[s]) * dt[s] for s < n. */
    void (*decay_row)(const float *scores, const float *log_decay, float last, const float *dt,
                      uint32_t n, float *out);
    /* First index in [from, n) with s[index] > limit, or n. */
    uint32_t (*find_above)(const float *s, uint32_t from, uint32_t n, float limit);
    /* o_g += weight * softmax(q_g K^T * scale) V for `heads` query heads; q and o are [heads, hd];
     * scratch holds heads * S floats. */
    void (*attend)(const struct cpu_page *page, const float *q, uint32_t heads, float scale,
                   float weight, bool extra, float *scratch, float *o);
};

const struct cpu_kernels *cpu_kernels_portable(void);
/* NULL where the build has none. The caller checks that the processor has the instructions. */
const struct cpu_kernels *cpu_kernels_avx2(void);
const struct cpu_kernels *cpu_kernels_avx512(void);

#endif
