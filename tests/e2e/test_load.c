/* `rambad bench --url` against the real daemon: it asks for what it was told to, counts what came
 * back, and says so when something did not. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/lib/daemon.h"
#include "tests/lib/store_helper.h"
#include "tests/lib/wire.h"

#define MODEL "tests/golden/wide-stickbreaking-topk8"
/* An answer that takes much longer than the fiftieth of a second, and less than the minute that a
 * load waits for its end. */
#ifdef __SANITIZE_THREAD__
#define LONG_TOKENS "50"
#else
#define LONG_TOKENS "500"
#endif

static struct daemon server;
static char *folder;

static int setup(void **state)
{
    static const char *const flags[] = {"--threads", "1", NULL};
    (void)state;
    folder = daemon_begin(&server, MODEL, flags);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    daemon_end(&server, folder);
    return 0;
}

/* `rambad bench --url URL` and further arguments. Returns the exit code. */
static int bench(const char *url, const char *const *arguments, struct buf *out)
{
    const char *bin = getenv("RAMBAD_BIN");
    const char *argv[32] = {bin ? bin : "build/rambad", "bench", "--url", url};
    size_t count = 4;
    while (*arguments)
        argv[count++] = *arguments++;
    out->size = 0;
    return daemon_run(&server, argv, out);
}

static void test_closed(void **state)
{
    (void)state;
    char csv[1200];
    struct buf out, rows;
    buf_init(&out);
    buf_init(&rows);
    snprintf(csv, sizeof csv, "%s/load.csv", folder);
    const double before = wire_metric(&server, "rambad_completion_tokens_total");
    const double prompt = wire_metric(&server, "rambad_prompt_tokens_total");
    for (int i = 0; i < 2; i++)
        assert_int_equal(
            bench(server.url,
                  (const char *const[]){"--clients", "3", "--seconds", "0.5", "--prompt-tokens",
                                        "20", "--max-tokens", "9", "--csv", csv, NULL},
                  &out),
            0);
    assert_non_null(strstr(buf_text(&out), "3 streams at once at most"));
    assert_non_null(strstr(out.data, "p99.9"));
    assert_non_null(strstr(out.data, "first token, from"));
    assert_non_null(strstr(out.data, "###"));
    /* One head, two rows, each as long; what they say is what the server has counted. */
    daemon_read_file(csv, &rows);
    unsigned long long complete = 0;
    size_t lines = 0, commas = 0;
    for (char *line = strtok((char *)(uintptr_t)buf_text(&rows), "\n"); line;
         line = strtok(NULL, "\n"), lines++) {
        size_t count = 0;
        unsigned long long some, refused, failed;
        double tokens, first, whole;
        for (const char *p = line; *p; p++)
            count += *p == ',';
        assert_true(!lines || count == commas);
        commas = count;
        if (!lines)
            continue;
        assert_int_equal(sscanf(line,
                                "127.0.0.1,%*d,3,0,0.5,20,9,%llu,%llu,%llu,0,0,%*f,%lf,%lf,%*f,"
                                "%*f,%*f,%*f,%*f,%*f,%*f,%lf",
                                &some, &refused, &failed, &tokens, &first, &whole),
                         6);
        assert_int_equal(refused + failed, 0);
        assert_true(first > 0 && whole >= first && tokens > 0);
        complete += some;
    }
    assert_int_equal(lines, 3);
    assert_true(complete >= 6);
    assert_true(wire_metric(&server, "rambad_completion_tokens_total") - before ==
                9 * (double)complete);
    assert_true(wire_metric(&server, "rambad_prompt_tokens_total") - prompt ==
                20 * (double)complete);
    buf_close(&out);
    buf_close(&rows);
}

/* A rate is kept whatever the clients; too few of them, and requests are late. */
static void test_rate(void **state)
{
    (void)state;
    unsigned long long answers = 0;
    struct buf out;
    buf_init(&out);
    assert_int_equal(bench(server.url,
                           (const char *const[]){"--clients", "20", "--rate", "20", "--seconds",
                                                 "1", "--max-tokens", "2", NULL},
                           &out),
                     0);
    assert_int_equal(sscanf(buf_text(&out), "%llu answers, 40 tokens", &answers), 1);
    assert_int_equal(answers, 20);
    assert_int_equal(bench(server.url,
                           (const char *const[]){"--clients", "1", "--rate", "50", "--seconds",
                                                 "0.5", "--max-tokens", LONG_TOKENS, NULL},
                           &out),
                     0);
    assert_non_null(strstr(buf_text(&out), "were due before a client was free"));
    buf_close(&out);
}

static void test_wrong(void **state)
{
    (void)state;
    char url[128];
    struct buf out;
    buf_init(&out);
    snprintf(url, sizeof url, "%s/v1/nothing", server.url);
    assert_int_equal(
        bench(url, (const char *const[]){"--clients", "2", "--seconds", "0.3", NULL}, &out), 1);
    assert_non_null(strstr(buf_text(&out), "were refused, the last with 404"));
    assert_non_null(strstr(out.data, "there is nothing at /v1/nothing"));
    assert_int_equal(bench("http://127.0.0.1:1",
                           (const char *const[]){"--clients", "2", "--seconds", "0.3", NULL}, &out),
                     1);
    assert_non_null(strstr(buf_text(&out), "connection refused"));
    static const char *const bad[][3] = {{"--clients", "0", NULL},
                                         {"--seconds", "x", NULL},
                                         {"--nothing", "1", NULL},
                                         {"--rate", NULL, NULL}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(bench(server.url, bad[i], &out), 2);
    assert_int_equal(bench("ftp://x", (const char *const[]){NULL}, &out), 2);
    assert_int_equal(bench("x", (const char *const[]){"--help", NULL}, &out), 2);
    assert_int_equal(bench(server.url, (const char *const[]){"--help", NULL}, &out), 0);
    assert_non_null(strstr(buf_text(&out), "--prompt-tokens"));
    buf_close(&out);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_closed),
        cmocka_unit_test(test_rate),
        cmocka_unit_test(test_wrong),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
