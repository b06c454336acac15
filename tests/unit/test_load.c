/* What `rambad bench --url` computes: shares of many times, and where it goes. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "proto/base/buf.h"
#include "server/load.h"

static int compare(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* Shares are those of the sorted values, to a step of the histogram, from one to hours. */
static void test_shares(void **state)
{
    (void)state;
    enum { COUNT = 20000 };
    static uint64_t values[COUNT];
    static struct histogram h;
    uint64_t seed = 7;
    assert_int_equal(histogram_at(&h, 0.5), 0);
    for (size_t i = 0; i < COUNT; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        values[i] = (seed >> 20) >> (seed >> 58); /* of every size up to 2^44 */
        histogram_add(&h, values[i]);
    }
    qsort(values, COUNT, sizeof *values, compare);
    assert_int_equal(h.count, COUNT);
    assert_int_equal(h.largest, values[COUNT - 1]);
    assert_int_equal(histogram_at(&h, 1), values[COUNT - 1]);
    static const double shares[] = {0.0001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999};
    for (size_t i = 0; i < sizeof shares / sizeof *shares; i++) {
        const uint64_t exact = values[(size_t)(shares[i] * COUNT + 0.5) - 1];
        const uint64_t got = histogram_at(&h, shares[i]);
        assert_true(got >= exact);
        assert_true(got - exact <= exact / HISTOGRAM_STEPS);
    }
}

static void test_extremes(void **state)
{
    (void)state;
    static struct histogram h;
    static const uint64_t values[] = {0, 1, 31, 32, 33, 63, 64, 65, UINT64_MAX};
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        memset(&h, 0, sizeof h);
        histogram_add(&h, values[i]);
        assert_int_equal(histogram_at(&h, 0.5), values[i]); /* no more than the largest */
        histogram_add(&h, UINT64_MAX);
        assert_true(histogram_at(&h, 0.5) >= values[i]);
        if (values[i] < UINT64_MAX)
            assert_true(histogram_at(&h, 0.5) - values[i] <= values[i] / HISTOGRAM_STEPS);
    }
}

static void test_times(void **state)
{
    (void)state;
    static const struct {
        uint64_t ns;
        const char *text;
    } cases[] = {{0, "0 ns"},
                 {999, "999 ns"},
                 {1000, "1.00 us"},
                 {9994, "9.99 us"},
                 {99940, "99.9 us"},
                 {340000, "340 us"},
                 {999600, "1.00 ms"},
                 {12345678, "12.3 ms"},
                 {1500000000, "1.50 s"},
                 {UINT64_C(3600000000000), "3600 s"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[16];
        histogram_time(cases[i].ns, text);
        assert_string_equal(text, cases[i].text);
    }
}

static void test_bars(void **state)
{
    (void)state;
    static struct histogram h;
    char *text;
    size_t size;
    FILE *out = open_memstream(&text, &size);
    assert_non_null(out);
    for (int i = 0; i < 100; i++)
        histogram_add(&h, 1 << 20);
    for (int i = 0; i < 50; i++)
        histogram_add(&h, 3 << 20);
    histogram_add(&h, 1 << 23);
    histogram_print(&h, out);
    fclose(out);
    char expected[512];
    snprintf(expected, sizeof expected,
             "    1.05 ms        100  %.50s\n    2.10 ms         50  %.25s\n"
             "    4.19 ms          0  \n    8.39 ms          1  #\n",
             "##################################################",
             "##################################################");
    assert_string_equal(text, expected);
    free(text);
}

static void test_urls(void **state)
{
    (void)state;
    static const struct {
        const char *url, *host, *path;
        int port;
    } good[] = {{"http://127.0.0.1:80", "127.0.0.1", "/v1/completions", 80},
                {"http://127.0.0.1:80/", "127.0.0.1", "/v1/completions", 80},
                {"http://10.1.2.3", "10.1.2.3", "/v1/completions", 8080},
                {"http://localhost:9/v2/completions", "127.0.0.1", "/v2/completions", 9},
                {"http://[::1]:7", "::1", "/v1/completions", 7}};
    static const char *const bad[] = {"",
                                      "127.0.0.1",
                                      "https://127.0.0.1",
                                      "http://",
                                      "http://:80",
                                      "http://1.2.3.4:",
                                      "http://1.2.3.4:0",
                                      "http://1.2.3.4:65536",
                                      "http://1.2.3.4:8x",
                                      "http://[::1"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        struct load_options o = {0};
        assert_true(load_parse_url(good[i].url, &o));
        assert_string_equal(o.host, good[i].host);
        assert_string_equal(o.path, good[i].path);
        assert_int_equal(o.port, good[i].port);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct load_options o = {0};
        assert_false(load_parse_url(bad[i], &o));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shares), cmocka_unit_test(test_extremes),
        cmocka_unit_test(test_times),  cmocka_unit_test(test_bars),
        cmocka_unit_test(test_urls),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
