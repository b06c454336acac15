/* The CPU backend's inner loops by themselves, at every level this processor has: matrix products
 * on ragged shapes, their edges, and the pool that runs them. Whole numbers, so results are exact
 * whatever the order of summation. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/bf16.h"
#include "engine/cpu/kernels.h"
#include "engine/cpu/pool.h"

#define SEED 20250607u

static const struct cpu_kernels *levels[3];
static size_t level_count;

static int find_levels(void **state)
{
    (void)state;
    levels[level_count++] = cpu_kernels_portable();
#ifdef __x86_64__
    __builtin_cpu_init();
    if (cpu_kernels_avx2() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        levels[level_count++] = cpu_kernels_avx2();
    if (cpu_kernels_avx512() && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        levels[level_count++] = cpu_kernels_avx512();
#endif
    for (size_t i = 0; i < level_count; i++)
        printf("level %s, seed %u\n", levels[i]->name, SEED);
    return 0;
}

static uint64_t random_state;

/* A whole number in [-8, 8]: exact in bf16, and sums of thousands of products in fp32. */
static float whole(void)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (float)(random_state >> 33 & 15) - 8 + (float)(random_state >> 40 & 1);
}

static float *fresh(size_t count, float value)
{
    float *memory = malloc((count + 1) * sizeof *memory);
    assert_non_null(memory);
    for (size_t i = 0; i < count; i++)
        memory[i] = value;
    return memory;
}

static const uint32_t sizes[][3] = {{1, 1, 1},    {2, 31, 3},    {5, 33, 17},  {8, 64, 64},
                                    {12, 32, 15}, {13, 65, 66},  {24, 7, 129}, {31, 96, 1},
                                    {65, 65, 64}, {100, 40, 200}};

struct problem {
    uint32_t m, n, k;
    size_t a_stride, w_stride, c_stride;
    float *a, *w; /* A [m, k], W [n, k] */
    uint16_t *w_bf16;
    float *panels, *c;
};

static void make(struct problem *p, const uint32_t *size)
{
    *p = (struct problem){.m = size[0], .n = size[1], .k = size[2]};
    p->a_stride = p->k + 3u;
    p->w_stride = p->k + 5u;
    p->c_stride = p->n + 7u;
    p->a = fresh(p->m * p->a_stride, NAN); /* NAN: what must not be read */
    p->w = fresh(p->n * p->w_stride, NAN);
    p->w_bf16 = malloc(p->n * p->w_stride * sizeof *p->w_bf16);
    p->panels = fresh((size_t)(p->n + 32) * p->k, NAN);
    p->c = fresh(p->m * p->c_stride, NAN);
    assert_non_null(p->w_bf16);
    for (uint32_t i = 0; i < p->m; i++)
        for (uint32_t j = 0; j < p->k; j++)
            p->a[i * p->a_stride + j] = whole();
    for (uint32_t i = 0; i < p->n; i++)
        for (uint32_t j = 0; j < p->k; j++)
            p->w[i * p->w_stride + j] = whole();
    for (size_t i = 0; i < p->n * p->w_stride; i++)
        p->w_bf16[i] = bf16_from_float(p->w[i]);
}

static void drop(struct problem *p)
{
    free(p->a);
    free(p->w);
    free(p->w_bf16);
    free(p->panels);
    free(p->c);
}

static float exact(const struct problem *p, uint32_t i, uint32_t j)
{
    float sum = 0;
    for (uint32_t e = 0; e < p->k; e++)
        sum += p->a[i * p->a_stride + e] * p->w[j * p->w_stride + e];
    return sum;
}

/* C = `times` * A W^T, and nothing outside of it. */
static void check(const struct problem *p, float times)
{
    for (uint32_t i = 0; i < p->m; i++)
        for (uint32_t j = 0; j < p->c_stride; j++) {
            const float got = p->c[i * p->c_stride + j];
            if (j < p->n)
                assert_true(got == times * exact(p, i, j));
            else
                assert_true(isnan(got)); /* as it was */
        }
}

static void products_are_exact_and_stay_inside(void **state)
{
    (void)state;
    random_state = SEED;
    for (size_t level = 0; level < level_count; level++)
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            const struct cpu_kernels *k = levels[level];
            struct problem p;
            make(&p, sizes[i]);
            k->pack_transposed(p.w, OPS_FP32, p.w_stride, p.n, p.k, p.panels);
            k->product(p.a, p.a_stride, 1, p.panels, p.m, p.n, p.k, 0, p.c, p.c_stride);
            check(&p, 1);
            k->pack_transposed(p.w_bf16, OPS_BF16, p.w_stride, p.n, p.k, p.panels);
            k->product(p.a, p.a_stride, 1, p.panels, p.m, p.n, p.k, 1, p.c, p.c_stride);
            check(&p, 2);
            k->product(p.a, p.a_stride, 1, p.panels, p.m, p.n, p.k, 0.5f, p.c, p.c_stride);
            check(&p, 2);
            /* Back as it was, and A read by columns. */
            float *w = fresh((size_t)p.n * p.k, NAN), *turned = fresh((size_t)p.m * p.k, NAN);
            k->unpack_transposed(p.panels, p.n, p.k, w);
            for (uint32_t r = 0; r < p.n; r++)
                assert_memory_equal(w + (size_t)r * p.k, p.w + r * p.w_stride, p.k * sizeof *w);
            for (uint32_t r = 0; r < p.m; r++)
                for (uint32_t j = 0; j < p.k; j++)
                    turned[(size_t)j * p.m + r] = p.a[r * p.a_stride + j];
            k->product(turned, 1, p.m, p.panels, p.m, p.n, p.k, 0, p.c, p.c_stride);
            check(&p, 1);
            free(w);
            free(turned);
            drop(&p);
        }
}

static void packing_as_it_lies_scales_rows(void **state)
{
    (void)state;
    random_state = SEED + 1;
    for (size_t level = 0; level < level_count; level++)
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            const struct cpu_kernels *k = levels[level];
            struct problem p;
            make(&p, sizes[i]);
            const size_t stride = p.n + 9u;
            float *b = fresh(p.k * stride, NAN), *factors = fresh(p.k, 0);
            for (uint32_t j = 0; j < p.k; j++) {
                factors[j] = j % 2 ? 2 : 0.5f;
                for (uint32_t r = 0; r < p.n; r++)
                    b[j * stride + r] = p.w[r * p.w_stride + j] / factors[j];
            }
            k->pack(b, stride, factors, p.k, p.n, p.panels);
            k->product(p.a, p.a_stride, 1, p.panels, p.m, p.n, p.k, 0, p.c, p.c_stride);
            check(&p, 1);
            free(b);
            free(factors);
            drop(&p);
        }
}

static void skinny_products_are_exact(void **state)
{
    (void)state;
    random_state = SEED + 2;
    for (size_t level = 0; level < level_count; level++)
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            const struct cpu_kernels *k = levels[level];
            struct problem p;
            make(&p, sizes[i]);
            k->skinny(p.w, OPS_FP32, p.w_stride, p.n, p.k, p.a, p.a_stride, p.m, p.c, p.c_stride,
                      false);
            check(&p, 1);
            k->skinny(p.w_bf16, OPS_BF16, p.w_stride, p.n, p.k, p.a, p.a_stride, p.m, p.c,
                      p.c_stride, true);
            check(&p, 2);
            drop(&p);
        }
}

/* A row's bits are the same alone, among others, and in another place among them. */
static void rows_do_not_depend_on_their_neighbours(void **state)
{
    (void)state;
    random_state = SEED + 3;
    for (size_t level = 0; level < level_count; level++) {
        const struct cpu_kernels *k = levels[level];
        struct problem p;
        make(&p, (const uint32_t[]){45, 50, 77});
        for (size_t i = 0; i < p.m * p.a_stride; i++)
            p.a[i] = whole() / 7; /* now rounding shows the order of the sums */
        float *alone = fresh(p.n, NAN);
        for (int way = 0; way < 2; way++)
            for (uint32_t from = 0; from < 4; from++)
                for (uint32_t m = 1; m + from <= p.m; m += 1 + m / 3) {
                    const float *a = p.a + from * p.a_stride;
                    k->pack_transposed(p.w, OPS_FP32, p.w_stride, p.n, p.k, p.panels);
                    if (way)
                        k->skinny(p.w, OPS_FP32, p.w_stride, p.n, p.k, a, p.a_stride, m, p.c,
                                  p.c_stride, false);
                    else
                        k->product(a, p.a_stride, 1, p.panels, m, p.n, p.k, 0, p.c, p.c_stride);
                    for (uint32_t r = 0; r < m; r++) {
                        const float *row = a + r * p.a_stride;
                        if (way)
                            k->skinny(p.w, OPS_FP32, p.w_stride, p.n, p.k, row, p.a_stride, 1,
                                      alone, p.n, false);
                        else
                            k->product(row, p.a_stride, 1, p.panels, 1, p.n, p.k, 0, alone, p.n);
                        assert_memory_equal(p.c + r * p.c_stride, alone, p.n * sizeof *alone);
                    }
                }
        free(alone);
        drop(&p);
    }
}

static void the_first_above_is_found(void **state)
{
    (void)state;
    for (size_t level = 0; level < level_count; level++)
        for (uint32_t n = 0; n < 70; n++) {
            float *s = fresh(n, 1);
            assert_int_equal(levels[level]->find_above(s, 0, n, 1), n); /* equal is not above */
            for (uint32_t at = 0; at < n; at++) {
                s[at] = 1.5f;
                for (uint32_t from = 0; from <= n; from += 3)
                    assert_int_equal(levels[level]->find_above(s, from, n, 1), from <= at ? at : n);
                s[at] = 1;
            }
            free(s);
        }
}

struct tally {
    atomic_uint runs[300];
    uint32_t threads;
};

static void count_task(void *argument, uint32_t index, uint32_t worker)
{
    struct tally *t = argument;
    assert_true(worker < t->threads);
    atomic_fetch_add_explicit(&t->runs[index], 1, memory_order_relaxed);
}

/* More threads than processors, so that some are put aside in the middle. */
static void every_index_runs_once(void **state)
{
    (void)state;
    static struct tally t;
    struct pool *pool;
    t.threads = 7;
    assert_int_equal(pool_open(t.threads, &pool), STATUS_OK);
    uint32_t want[300] = {0};
    for (uint32_t loop = 0; loop < 3000; loop++) {
        const uint32_t count = loop * 7919u % 301u;
        pool_run(pool, count, count_task, &t);
        for (uint32_t i = 0; i < count; i++)
            want[i]++;
        for (uint32_t i = 0; i < 300; i++)
            assert_int_equal(atomic_load_explicit(&t.runs[i], memory_order_relaxed), want[i]);
    }
    pool_close(pool);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(products_are_exact_and_stay_inside),
        cmocka_unit_test(packing_as_it_lies_scales_rows),
        cmocka_unit_test(skinny_products_are_exact),
        cmocka_unit_test(rows_do_not_depend_on_their_neighbours),
        cmocka_unit_test(the_first_above_is_found),
        cmocka_unit_test(every_index_runs_once),
    };
    return cmocka_run_group_tests(tests, find_levels, NULL);
}
