/* kernels_body.h - the inner loops of kernels.h, written once over the lanes of a simd_*.h.
 * Included by kernels_portable.c, kernels_avx2.c and kernels_avx512.c, each after its own. */
#include <math.h>
#include <string.h>

#include "engine/bf16.h"
#include "engine/cpu/kernels.h"

/* exp to about 1e-7 relative: 2^n * p(r), r = x - n ln 2 in two parts, p the Taylor polynomial of
 * degree 7. Below -87.3 the result stays at the smallest normal number. NaN stays NaN. */
CPU_FN vf vexp(vf x)
{
    x = vmin(vset(88.0f), vmax(vset(-87.3f), x));
    const vf n = vround(vmul(x, vset(1.44269504088896341f)));
    vf r = vfma(n, vset(-0.693359375f), x);
    r = vfma(n, vset(2.12194440e-4f), r);
    vf p = vset(1.0f / 5040);
    p = vfma(p, r, vset(1.0f / 720));
    p = vfma(p, r, vset(1.0f / 120));
    p = vfma(p, r, vset(1.0f / 24));
    p = vfma(p, r, vset(1.0f / 6));
    p = vfma(p, r, vset(0.5f));
    p = vfma(p, r, vset(1.0f));
    p = vfma(p, r, vset(1.0f));
    return vmul(p, vpow2(n));
}

CPU_FN vf vsilu(vf x)
{
    return vdiv(x, vadd(vset(1.0f), vexp(vsub(vset(0.0f), x))));
}

CPU_FN vf load_weight(const void *w, enum ops_dtype dtype, size_t at)
{
    return dtype == OPS_FP32 ? vload((const float *)w + at) : vload_bf16((const uint16_t *)w + at);
}

/* The last n < V elements, zeros behind them. */
CPU_FN vf load_weight_part(const void *w, enum ops_dtype dtype, size_t at, uint32_t n)
{
    if (dtype == OPS_FP32)
        return vload_part((const float *)w + at, n);
    uint16_t tail[V] = {0};
    memcpy(tail, (const uint16_t *)w + at, n * sizeof *tail);
    return vload_bf16(tail);
}

/* Rows are too short for the processor to see where the weights go on: it is told, this many rows
 * before they are needed. */
#define AHEAD 8

CPU_FN void fetch(const void *w, enum ops_dtype dtype, size_t at)
{
    __builtin_prefetch((const char *)w + at * (dtype == OPS_FP32 ? 4 : 2));
}

/* COUNT weight rows against ROWS rows of x, one accumulator each. */
#define SKINNY_TILE(COUNT, ROWS)                                                                  \
    do {                                                                                          \
        vf acc[COUNT][ROWS];                                                                      \
        _Pragma("GCC unroll 8") for (int i = 0; i < COUNT; i++)                                   \
            _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++) acc[i][r] = vset(0);           \
        uint32_t j = 0;                                                                           \
        for (; j + V <= k; j += V) {                                                              \
            vf a[ROWS];                                                                           \
            _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++) a[r] =                         \
                vload(x + (size_t)r * x_stride + j);                                              \
            _Pragma("GCC unroll 8") for (int i = 0; i < COUNT; i++)                               \
            {                                                                                     \
                const vf b = load_weight(w, dtype, (size_t)i * w_stride + j);                     \
                fetch(w, dtype, (size_t)(i + AHEAD) * w_stride + j);                              \
                _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++) acc[i][r] =                \
                    vfma(a[r], b, acc[i][r]);                                                     \
            }                                                                                     \
        }                                                                                         \
        _Pragma("GCC unroll 8") for (int i = 0; i < COUNT; i++)                                   \
            _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++)                                \
        {                                                                                         \
            if (j < k)                                                                            \
                acc[i][r] =                                                                       \
                    vfma(vload_part(x + (size_t)r * x_stride + j, k - j),                         \
                         load_weight_part(w, dtype, (size_t)i * w_stride + j, k - j), acc[i][r]); \
            float *to = &out[(size_t)r * out_stride + (size_t)i];                                 \
            *to = add ? *to + vsum(acc[i][r]) : vsum(acc[i][r]);                                  \
        }                                                                                         \
    } while (0)

/* The same lanes, but for rows of x too many and too long for the first cache: they are taken
 * DEEP columns at a time, for DEEP_ROWS rows of the weight, whose lanes wait in `lanes`. The
 * columns are copied together first: rows a power of two apart would put each other out. */
#define DEEP 256
#define DEEP_ROWS 16
#define NEAR (DEEP + V)

#define DEEP_TILE(COUNT, ROWS)                                                                   \
    do {                                                                                         \
        vf acc[COUNT][ROWS];                                                                     \
        float *kept = lanes + (size_t)i * ROWS * V;                                              \
        const size_t row = (at + i) * w_stride;                                                  \
        _Pragma("GCC unroll 8") for (int c = 0; c < COUNT; c++)                                  \
            _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++) acc[c][r] =                   \
                vload(kept + (c * ROWS + r) * V);                                                \
        uint32_t j = from;                                                                       \
        for (; j + V <= to; j += V) {                                                            \
            vf a[ROWS];                                                                          \
            _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++) a[r] =                        \
                vload(near + r * NEAR + j - from);                                               \
            _Pragma("GCC unroll 8") for (int c = 0; c < COUNT; c++)                              \
            {                                                                                    \
                const size_t here = row + (size_t)c * w_stride + j;                              \
                const vf b = load_weight(w, dtype, here);                                        \
                fetch(w, dtype, here + next);                                                    \
                _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++) acc[c][r] =               \
                    vfma(a[r], b, acc[c][r]);                                                    \
            }                                                                                    \
        }                                                                                        \
        if (j < to)                                                                              \
            _Pragma("GCC unroll 8") for (int c = 0; c < COUNT; c++)                              \
            {                                                                                    \
                const vf b = load_weight_part(w, dtype, row + (size_t)c * w_stride + j, to - j); \
                _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++) acc[c][r] =               \
                    vfma(vload_part(near + r * NEAR + j - from, to - j), b, acc[c][r]);          \
            }                                                                                    \
        _Pragma("GCC unroll 8") for (int c = 0; c < COUNT; c++)                                  \
            _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++)                               \
                vstore(kept + (c * ROWS + r) * V, acc[c][r]);                                    \
    } while (0)

/* A short memcpy that starts at once. */
CPU_FN void bring(float *to, const float *from, uint32_t n)
{
    uint32_t i = 0;
    for (; i + V <= n; i += V)
        vstore(to + i, vload(from + i));
    if (i < n)
        vstore_part(to + i, vload_part(from + i, n - i), n - i);
}

/* V sums of V lanes each, added in vsum's order. */
CPU_FN vf vsums(const float *lanes, size_t stride)
{
    vf t[V];
    _Pragma("GCC unroll 16") for (int i = 0; i < V; i++) t[i] = vload(lanes + (size_t)i * stride);
    vtranspose(t);
    _Pragma("GCC unroll 4") for (int half = V / 2; half; half /= 2)
        _Pragma("GCC unroll 8") for (int i = 0; i < half; i++) t[i] = vadd(t[i], t[i + half]);
    return t[0];
}

/* m is 8 or 4. */
CPU_FN void skinny_deep(const void *w, enum ops_dtype dtype, size_t w_stride, uint32_t count,
                        uint32_t k, const float *x, size_t x_stride, uint32_t m, float *out,
                        size_t out_stride, bool add)
{
    float lanes[DEEP_ROWS * 8 * V] __attribute__((aligned(64)));
    float near[8 * NEAR] __attribute__((aligned(64)));
    for (uint32_t at = 0; at < count; at += DEEP_ROWS) {
        const uint32_t n = count - at < DEEP_ROWS ? count - at : DEEP_ROWS;
        for (uint32_t i = 0; i < n * m; i++)
            vstore(lanes + (size_t)i * V, vset(0));
        for (uint32_t from = 0; from < k; from += DEEP) {
            const uint32_t to = k - from < DEEP ? k : from + DEEP;
            /* What the next round reads: further columns, or the next rows' first. */
            const size_t next = to < k ? DEEP : DEEP_ROWS * w_stride - from;
            uint32_t i = 0;
            for (uint32_t r = 0; r < m && (!at || k > DEEP); r++)
                bring(near + r * NEAR, x + r * x_stride + from, to - from);
            for (; i + 2 <= n && (m == 4 || V == 16); i += 2) /* else registers run out */
                if (m == 8)
                    DEEP_TILE(2, 8);
                else
                    DEEP_TILE(2, 4);
            for (; i < n; i++)
                if (m == 8)
                    DEEP_TILE(1, 8);
                else
                    DEEP_TILE(1, 4);
        }
        for (uint32_t r = 0; r < m; r++) {
            float *to = out + r * out_stride + at;
            uint32_t i = 0;
            for (; i + V <= n; i += V) {
                const vf sums = vsums(lanes + (size_t)(i * m + r) * V, (size_t)m * V);
                vstore(to + i, add ? vadd(vload(to + i), sums) : sums);
            }
            for (; i < n; i++) {
                const float sum = vsum(vload(lanes + (size_t)(i * m + r) * V));
                to[i] = add ? to[i] + sum : sum;
            }
        }
    }
}

/* m is 2 or 1. */
CPU_FN void skinny_rows(const void *w, enum ops_dtype dtype, size_t w_stride, uint32_t count,
                        uint32_t k, const float *x, size_t x_stride, uint32_t m, float *out,
                        size_t out_stride, bool add)
{
    const size_t element = dtype == OPS_FP32 ? 4 : 2;
    uint32_t at = 0;
    /* As many accumulators as hide the latency of an FMA and still fit the registers. */
    const uint32_t step = m == 1 ? 8 : 4;
    for (; at + step <= count; at += step) {
        if (m == 1)
            SKINNY_TILE(8, 1);
        else
            SKINNY_TILE(4, 2);
        w = (const char *)w + step * w_stride * element;
        out += step;
    }
    for (; at < count; at++) {
        if (m == 1)
            SKINNY_TILE(1, 1);
        else
            SKINNY_TILE(1, 2);
        w = (const char *)w + w_stride * element;
        out++;
    }
}

CPU_FN void skinny_any(const void *w, enum ops_dtype dtype, size_t w_stride, uint32_t count,
                       uint32_t k, const float *x, size_t x_stride, uint32_t m, float *out,
                       size_t out_stride, bool add)
{
    for (uint32_t step = 8; m; step /= 2)
        for (; m >= step; m -= step) {
            if (step >= 4)
                skinny_deep(w, dtype, w_stride, count, k, x, x_stride, step, out, out_stride, add);
            else
                skinny_rows(w, dtype, w_stride, count, k, x, x_stride, step, out, out_stride, add);
            x += step * x_stride;
            out += step * out_stride;
        }
}

CPU_TARGET static void skinny(const void *w, enum ops_dtype dtype, size_t w_stride, uint32_t count,
                              uint32_t k, const float *x, size_t x_stride, uint32_t m, float *out,
                              size_t out_stride, bool add)
{
    if (dtype == OPS_FP32)
        skinny_any(w, OPS_FP32, w_stride, count, k, x, x_stride, m, out, out_stride, add);
    else
        skinny_any(w, OPS_BF16, w_stride, count, k, x, x_stride, m, out, out_stride, add);
}

CPU_TARGET static void widen(const uint16_t *from, float *to, size_t n)
{
    size_t i = 0;
    for (; i + V <= n; i += V)
        vstore(to + i, vload_bf16(from + i));
    for (; i < n; i++)
        to[i] = bf16_to_float(from[i]);
}

/* ---- matrix products ---- */

CPU_FN void pack_rows(const void *w, enum ops_dtype dtype, size_t w_stride, uint32_t count,
                      uint32_t k, float *panels)
{
    for (uint32_t first = 0; first < count; first += NR, panels += (size_t)NR * k)
        for (uint32_t group = 0; group < NR; group += V) {
            float *to = panels + group;
            for (uint32_t j = 0; j < k; j += V, to += (size_t)V * NR) {
                const uint32_t n = k - j < V ? k - j : V;
                vf tile[V];
                for (uint32_t i = 0; i < V; i++) {
                    const uint32_t row = first + group + i;
                    const size_t at = row * w_stride + j;
                    tile[i] = row >= count ? vset(0)
                              : n == V     ? load_weight(w, dtype, at)
                                           : load_weight_part(w, dtype, at, n);
                }
                vtranspose(tile);
                for (uint32_t i = 0; i < n; i++)
                    vstore(to + (size_t)i * NR, tile[i]);
            }
        }
}

CPU_TARGET static void pack_transposed(const void *w, enum ops_dtype dtype, size_t w_stride,
                                       uint32_t count, uint32_t k, float *panels)
{
    if (dtype == OPS_FP32)
        pack_rows(w, OPS_FP32, w_stride, count, k, panels);
    else
        pack_rows(w, OPS_BF16, w_stride, count, k, panels);
}

CPU_TARGET static void pack(const float *b, size_t b_stride, const float *factors, uint32_t k,
                            uint32_t n, float *panels)
{
    for (uint32_t first = 0; first < n; first += NR)
        for (uint32_t j = 0; j < k; j++)
            for (uint32_t group = first; group < first + NR; group += V, panels += V) {
                const uint32_t left = group < n ? n - group : 0;
                const float *from = b + j * b_stride + group;
                const vf v = left >= V ? vload(from) : left ? vload_part(from, left) : vset(0);
                vstore(panels, factors ? vmul(v, vset(factors[j])) : v);
            }
}

CPU_TARGET static void unpack_transposed(const float *panels, uint32_t count, uint32_t k, float *w)
{
    for (uint32_t first = 0; first < count; first += NR, panels += (size_t)NR * k)
        for (uint32_t group = 0; group < NR && first + group < count; group += V)
            for (uint32_t j = 0; j < k; j += V) {
                const uint32_t n = k - j < V ? k - j : V;
                vf tile[V];
                for (uint32_t i = 0; i < V; i++)
                    tile[i] = i < n ? vload(panels + (size_t)(j + i) * NR + group) : vset(0);
                vtranspose(tile);
                for (uint32_t i = 0; i < V && first + group + i < count; i++)
                    vstore_part(w + (size_t)(first + group + i) * k + j, tile[i], n);
            }
}

/* ROWS rows of A against one panel; every element is one sum over j in order, then C's part. */
#define PRODUCT_TILE(ROWS)                                                                         \
    do {                                                                                           \
        vf acc[ROWS][NR / V];                                                                      \
        const float *from[(ROWS + 3) / 4], *b = panel;                                             \
        _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; r++)                                    \
            _Pragma("GCC unroll 2") for (int v = 0; v < NR / V; v++) acc[r][v] = vset(0);          \
        _Pragma("GCC unroll 3") for (int r = 0; r < (ROWS + 3) / 4; r++) from[r] =                 \
            a + (size_t)(4 * r) * a_row;                                                           \
        for (uint32_t j = 0; j < k; j++, b += NR) {                                                \
            vf column[NR / V];                                                                     \
            _Pragma("GCC unroll 2") for (int v = 0; v < NR / V; v++) column[v] = vload(b + v * V); \
            _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; r++)                                \
            {                                                                                      \
                const vf x = vset(from[r / 4][(size_t)(r % 4) * a_row]);                           \
                _Pragma("GCC unroll 2") for (int v = 0; v < NR / V; v++) acc[r][v] =               \
                    vfma(x, column[v], acc[r][v]);                                                 \
            }                                                                                      \
            _Pragma("GCC unroll 3") for (int r = 0; r < (ROWS + 3) / 4; r++) from[r] += a_col;     \
        }                                                                                          \
        _Pragma("GCC unroll 12") for (int r = 0; r < ROWS; r++)                                    \
            _Pragma("GCC unroll 2") for (int v = 0; v < NR / V; v++)                               \
                put(c + (size_t)r * c_stride + v * V, acc[r][v], beta,                             \
                    n > (uint32_t)(v * V) ? n - (uint32_t)(v * V) : 0);                            \
        a += (size_t)ROWS * a_row;                                                                 \
        c += (size_t)ROWS * c_stride;                                                              \
        m -= ROWS;                                                                                 \
    } while (0)

/* The first n of V elements of C. */
CPU_FN void put(float *c, vf sum, float beta, uint32_t n)
{
    if (n >= V)
        vstore(c, beta == 0 ? sum : vfma(vset(beta), vload(c), sum));
    else if (n)
        vstore_part(c, beta == 0 ? sum : vfma(vset(beta), vload_part(c, n), sum), n);
}

CPU_TARGET static void product_panel(const float *a, size_t a_row, size_t a_col, const float *panel,
                                     uint32_t m, uint32_t n, uint32_t k, float beta, float *c,
                                     size_t c_stride)
{
    while (m >= MR)
        PRODUCT_TILE(MR);
    if (MR > 8 && m >= 8)
        PRODUCT_TILE(8);
    if (MR > 4 && m >= 4)
        PRODUCT_TILE(4);
    if (m >= 2)
        PRODUCT_TILE(2);
    if (m)
        PRODUCT_TILE(1);
}

/* Rows go by few enough at a time that they stay in the first cache while the panels pass. */
CPU_TARGET static void product(const float *a, size_t a_row, size_t a_col, const float *panels,
                               uint32_t m, uint32_t n, uint32_t k, float beta, float *c,
                               size_t c_stride)
{
    for (uint32_t row = 0; row < m; row += MR) {
        const float *panel = panels;
        for (uint32_t first = 0; first < n; first += NR, panel += (size_t)NR * k)
            product_panel(a + row * a_row, a_row, a_col, panel, m - row < MR ? m - row : MR,
                          n - first < NR ? n - first : NR, k, beta, c + row * c_stride + first,
                          c_stride);
    }
}

CPU_TARGET static void rms_norm(const float *x, const float *weight, uint32_t n, float epsilon,
                                float *out)
{
    vf sum = vset(0);
    uint32_t i = 0;
    for (; i + V <= n; i += V) {
        const vf v = vload(x + i);
        sum = vfma(v, v, sum);
    }
    if (i < n) {
        const vf v = vload_part(x + i, n - i);
        sum = vfma(v, v, sum);
    }
    const float scale = 1 / sqrtf(vsum(sum) / (float)n + epsilon);
    for (i = 0; i + V <= n; i += V) {
        const vf v = vmul(vload(x + i), vset(scale));
        vstore(out + i, weight ? vmul(v, vload(weight + i)) : v);
    }
    for (; i < n; i++)
        out[i] = x[i] * scale * (weight ? weight[i] : 1);
}

CPU_TARGET static void silu_multiply(float *y, const float *gate, uint32_t n)
{
    uint32_t i = 0;
    for (; i + V <= n; i += V)
        vstore(y + i, vmul(vload(y + i), vsilu(vload(gate + i))));
    if (i < n)
        vstore_part(y + i, vmul(vload_part(y + i, n - i), vsilu(vload_part(gate + i, n - i))),
                    n - i);
}

CPU_TARGET static void add_scaled(float *y, const float *x, float scale, uint32_t n)
{
    uint32_t i = 0;
    for (; i + V <= n; i += V)
        vstore(y + i, vfma(vload(x + i), vset(scale), vload(y + i)));
    for (; i < n; i++)
        y[i] += x[i] * scale;
}

CPU_TARGET static void blend(float *y, float own, const float *x, float scale, uint32_t n)
{
    uint32_t i = 0;
    for (; i + V <= n; i += V)
        vstore(y + i, vfma(vload(x + i), vset(scale), vmul(vset(own), vload(y + i))));
    for (; i < n; i++)
        y[i] = y[i] * own + x[i] * scale;
}

CPU_FN void softmax_row(float *x, uint32_t n, bool extra)
{
    float top = extra ? 0 : -INFINITY;
    uint32_t i = 0;
    for (; i + V <= n; i += V)
        top = fmaxf(top, vtop(vload(x + i)));
    for (; i < n; i++)
        top = fmaxf(top, x[i]);
    vf sum = vset(0);
    for (i = 0; i + V <= n; i += V) {
        const vf e = vexp(vsub(vload(x + i), vset(top)));
        vstore(x + i, e);
        sum = vadd(sum, e);
    }
    float total = vsum(sum) + (extra ? expf(-top) : 0);
    for (; i < n; i++)
        total += x[i] = expf(x[i] - top);
    const float scale = 1 / total;
    for (i = 0; i + V <= n; i += V)
        vstore(x + i, vmul(vload(x + i), vset(scale)));
    for (; i < n; i++)
        x[i] *= scale;
}

CPU_TARGET static void softmax(float *x, uint32_t n, bool extra)
{
    softmax_row(x, n, extra);
}

CPU_TARGET static void convolve(const float *const *in, const float *weight, const float *bias,
                                uint32_t taps, uint32_t n, float *out)
{
    uint32_t j = 0;
    for (; j + V <= n; j += V) {
        vf sum = bias ? vload(bias + j) : vset(0);
        for (uint32_t i = 0; i < taps; i++)
            sum = vfma(vload(weight + (size_t)i * n + j), vload(in[i] + j), sum);
        vstore(out + j, vsilu(sum));
    }
    if (j < n) {
        vf sum = bias ? vload_part(bias + j, n - j) : vset(0);
        for (uint32_t i = 0; i < taps; i++)
            sum = vfma(vload_part(weight + (size_t)i * n + j, n - j), vload_part(in[i] + j, n - j),
                       sum);
        vstore_part(out + j, vsilu(sum), n - j);
    }
}

CPU_TARGET static void recur(float *state, uint32_t width, uint32_t n, float decay,
                             const float *dtx, const float *b, const float *c, float *y)
{
    for (uint32_t p = 0; p < width; p++, state += n) {
        vf sum = vset(0);
        uint32_t i = 0;
        for (; i + V <= n; i += V) {
            __builtin_prefetch(state + i + 8 * n, 1); /* the states are too many for the caches */
            const vf s = vfma(vset(dtx[p]), vload(b + i), vmul(vset(decay), vload(state + i)));
            vstore(state + i, s);
            sum = vfma(s, vload(c + i), sum);
        }
        if (i < n) {
            const vf s = vfma(vset(dtx[p]), vload_part(b + i, n - i),
                              vmul(vset(decay), vload_part(state + i, n - i)));
            vstore_part(state + i, s, n - i);
            sum = vfma(s, vload_part(c + i, n - i), sum);
        }
        y[p] = vsum(sum);
    }
}

CPU_TARGET static void decay_row(const float *scores, const float *log_decay, float last,
                                 const float *dt, uint32_t n, float *out)
{
    uint32_t s = 0;
    for (; s + V <= n; s += V)
        vstore(out + s, vmul(vmul(vload(scores + s), vload(dt + s)),
                             vexp(vsub(vset(last), vload(log_decay + s)))));
    if (s < n)
        vstore_part(out + s,
                    vmul(vmul(vload_part(scores + s, n - s), vload_part(dt + s, n - s)),
                         vexp(vsub(vset(last), vload_part(log_decay + s, n - s)))),
                    n - s);
}

CPU_TARGET static uint32_t find_above(const float *s, uint32_t from, uint32_t n, float limit)
{
    for (; from + V <= n; from += V) {
        const uint32_t mask = vabove(vload(s + from), vset(limit));
        if (mask)
            return from + (uint32_t)__builtin_ctz(mask);
    }
    while (from < n && !(s[from] > limit))
        from++;
    return from;
}

/* o_g += weight * p_g V for ROWS heads and WIDE * V elements from `e` on, of which n exist. */
#define MIX_TILE(ROWS, WIDE)                                                              \
    do {                                                                                  \
        vf acc[ROWS][WIDE];                                                               \
        _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++)                            \
            _Pragma("GCC unroll 2") for (int i = 0; i < WIDE; i++) acc[r][i] = vset(0);   \
        for (uint32_t t = 0; t < tokens; t++) {                                           \
            vf v[WIDE];                                                                   \
            _Pragma("GCC unroll 2") for (int i = 0; i < WIDE; i++) v[i] =                 \
                n >= V ? load_weight(values, dtype, t * stride + e + (uint32_t)(i * V))   \
                       : load_weight_part(values, dtype, t * stride + e, n);              \
            _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++)                        \
            {                                                                             \
                const vf share = vset(p[(size_t)r * tokens + t]);                         \
                _Pragma("GCC unroll 2") for (int i = 0; i < WIDE; i++) acc[r][i] =        \
                    vfma(share, v[i], acc[r][i]);                                         \
            }                                                                             \
        }                                                                                 \
        for (int r = 0; r < ROWS; r++)                                                    \
            for (int i = 0; i < WIDE; i++) {                                              \
                float *to = o + (size_t)r * hd + e + i * V;                               \
                if (n >= V)                                                               \
                    vstore(to, vfma(acc[r][i], vset(weight), vload(to)));                 \
                else                                                                      \
                    vstore_part(to, vfma(acc[r][i], vset(weight), vload_part(to, n)), n); \
            }                                                                             \
    } while (0)

/* Twice as wide where the registers allow, so that sums of few heads do not wait for themselves. */
#define MIX_ROWS(ROWS)                                                \
    do {                                                              \
        uint32_t e = 0, n = 2 * V;                                    \
        for (; e + 2 * V <= hd && (ROWS <= 4 || V == 16); e += 2 * V) \
            MIX_TILE(ROWS, 2);                                        \
        for (; e < hd; e += V) {                                      \
            n = hd - e;                                               \
            MIX_TILE(ROWS, 1);                                        \
        }                                                             \
        p += (size_t)ROWS * tokens;                                   \
        o += (size_t)ROWS * hd;                                       \
    } while (0)

CPU_FN void attend_any(const struct cpu_page *page, enum ops_dtype dtype, const float *q,
                       uint32_t heads, float scale, float weight, bool extra, float *p, float *o)
{
    const uint32_t tokens = page->tokens, hd = page->width;
    const size_t stride = page->stride;
    const void *values = page->values;
    skinny_any(page->keys, dtype, stride, tokens, hd, q, hd, heads, p, tokens, false);
    for (uint32_t g = 0; g < heads; g++) {
        float *row = p + (size_t)g * tokens;
        for (uint32_t t = 0; t < tokens; t++)
            row[t] *= scale;
        softmax_row(row, tokens, extra);
    }
    uint32_t left = heads;
    for (; left >= 8; left -= 8)
        MIX_ROWS(8);
    for (; left >= 4; left -= 4)
        MIX_ROWS(4);
    for (; left; left--)
        MIX_ROWS(1);
}

CPU_TARGET static void attend(const struct cpu_page *page, const float *q, uint32_t heads,
                              float scale, float weight, bool extra, float *scratch, float *o)
{
    if (page->dtype == OPS_FP32)
        attend_any(page, OPS_FP32, q, heads, scale, weight, extra, scratch, o);
    else
        attend_any(page, OPS_BF16, q, heads, scale, weight, extra, scratch, o);
}

static const struct cpu_kernels table = {
    .name = CPU_LEVEL_NAME,
    .skinny = skinny,
    .widen = widen,
    .panel = NR,
    .pack_transposed = pack_transposed,
    .pack = pack,
    .unpack_transposed = unpack_transposed,
    .product = product,
    .rms_norm = rms_norm,
    .silu_multiply = silu_multiply,
    .add_scaled = add_scaled,
    .blend = blend,
    .softmax = softmax,
    .convolve = convolve,
    .recur = recur,
    .decay_row = decay_row,
    .find_above = find_above,
    .attend = attend,
};
