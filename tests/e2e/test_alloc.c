/* The hot path allocates nothing per token: the same request with more tokens makes no more
 * allocations, in the whole daemon, from sampling to the socket. A preloaded counter counts.
 * What a finished chunk takes on its way to the disk is counted apart. */
#include <fcntl.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/lib/daemon.h"
#include "tests/lib/sanitizer.h"
#include "tests/lib/wire.h"

#define MODEL "engine/models/ramba-20m"
#define CHUNK 64
#define FEW 6u
#define MANY 40u /* with the prompt still in the first chunk */
#define TRIES 5
#define SLACK 20 /* of what a request does once, now and then; one for each token would be 34 */

static struct daemon daemon_;
static char *folder;
static char counter_path[] = "/tmp/rambad-alloc-XXXXXX";
static atomic_ullong *counter;
static double
    idle; /* allocations a second of a daemon that is asked nothing: it looks what is over */
static const char *const flags[] = {"--threads", "1", "--prefix-cache", "0", NULL};

static uint64_t settled(void)
{
    uint64_t before, now = atomic_load(counter);
    do { /* the last answers of the writer come a little later */
        usleep(20000);
        before = now;
        now = atomic_load(counter);
    } while (now != before);
    return now;
}

/* Allocations that one request makes on a connection that has carried such before, beside those of
 * an idle daemon; the least of several tries, since buffers grow to what they need. */
static double allocations(struct wire *wire, const char *path, const char *fields,
                          unsigned max_tokens)
{
    char body[512];
    double least = INFINITY;
    snprintf(body, sizeof body, "{%s,\"max_tokens\":%u,\"ignore_eos\":true,\"seed\":1}", fields,
             max_tokens);
    for (int i = 0; i < TRIES; i++) {
        const uint64_t before = settled();
        const double start = daemon_now();
        wire_ask(wire, "POST", path, "", body, strlen(body));
        assert_true(wire_wait_for(wire, "\r\n0\r\n\r\n"));
        assert_non_null(strstr(buf_text(&wire->in), "data: [DONE]"));
        wire->in.size = 0;
        const uint64_t count = settled() - before;
        least = fmin(least, (double)count - idle * (daemon_now() - start));
    }
    return least;
}

/* What the daemon does by itself, over two rounds of it. */
static void measure_idle(void)
{
    const uint64_t before = settled();
    const double start = daemon_now();
    usleep(2 * LIMITS_EXPIRY_SWEEP_MS * 1000);
    idle = (double)(settled() - before) / (daemon_now() - start);
    print_message("idle: %.2f allocations a second\n", idle);
}

static void check(const char *path, const char *fields)
{
    struct wire wire;
    wire_open(&wire, &daemon_);
    const double many = allocations(&wire, path, fields, MANY);
    const double few = allocations(&wire, path, fields, FEW);
    wire_close(&wire);
    print_message("%s %s: %.0f allocations for %u tokens, %.0f for %u\n", path, fields, few, FEW,
                  many, MANY);
    assert_true(many < few + SLACK);
}

static void test_tokens(void **state)
{
    (void)state;
    check("/v1/completions", "\"prompt\":\"x\",\"stream\":true");
    check("/v1/completions", "\"prompt\":\"x\",\"stream\":true,\"logprobs\":5");
    check("/v1/completions", "\"prompt\":\"x\",\"stream\":true,\"stop\":[\"zebra zebra\"]");
    check("/v1/completions", "\"prompt\":\"x\",\"stream\":true,\"n\":3");
    check("/v1/completions", "\"prompt\":\"x\",\"stream\":true,\"top_p\":0.9");
    check("/v1/chat/completions",
          "\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"stream\":true");
}

/* Ten chunks more: a bounded number for each, none for the tokens. */
static void test_chunks(void **state)
{
    (void)state;
    const char *fields = "\"prompt\":\"x\",\"stream\":true";
    struct wire wire;
    wire_open(&wire, &daemon_);
    const double many = allocations(&wire, "/v1/completions", fields, FEW + 10 * CHUNK);
    const double few = allocations(&wire, "/v1/completions", fields, FEW);
    wire_close(&wire);
    print_message("ten chunks: %.0f allocations\n", many - few);
    assert_true(many > few && many - few < 10 * CHUNK / 2);
}

static int setup(void **state)
{
    (void)state;
    const int fd = mkstemp(counter_path);
    assert_true(fd >= 0 && ftruncate(fd, sizeof *counter) == 0);
    counter = mmap(NULL, sizeof *counter, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    assert_true(counter != MAP_FAILED);
    close(fd);
    setenv("ALLOC_COUNT_FILE", counter_path, 1);
    sanitizer_preload(getenv("ALLOC_SHIM"));
    folder = daemon_begin(&daemon_, MODEL, flags);
    sanitizer_preload_nothing();
    assert_true(atomic_load(counter) > 0); /* it does count */
    measure_idle();
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    daemon_end(&daemon_, folder);
    unlink(counter_path);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_tokens),
                                       cmocka_unit_test(test_chunks)};
    return cmocka_run_group_tests_name("alloc", tests, setup, teardown);
}
