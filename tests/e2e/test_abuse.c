/* Clients that mean harm: heads without an end, floods of requests whose answers nobody reads,
 * bodies that another server on the way could read otherwise, connections cut at any moment. The
 * daemon answers what it documents, keeps its memory, and goes on. RAMBAD_LONG=1: a gigabyte. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/lib/daemon.h"
#include "tests/lib/sanitizer.h"
#include "tests/lib/wire.h"

#define MODEL "tests/golden/wide-stickbreaking-topk8"
/* Of a daemon that keeps to its bounds, noise of the heap included. */
#define GROWTH_BYTES (8e6 * SANITIZER_MEMORY)

static struct daemon server;
static char *folder;

static int setup(void **state)
{
    static const char *const flags[] = {
        "--threads", "1", "--header-timeout", "5", "--drain-timeout", "300", NULL};
    (void)state;
    /* Freed memory is used again, as it is without a sanitizer. */
    sanitizer_address_option("quarantine_size_mb=1:thread_local_quarantine_size_kb=16");
    folder = daemon_begin(&server, MODEL, flags);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    daemon_end(&server, folder);
    return 0;
}

/* The daemon's memory, in bytes. */
static double resident(void)
{
    char path[64], line[256];
    double kib = 0;
    snprintf(path, sizeof path, "/proc/%d/status", (int)server.pid);
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    while (fgets(line, sizeof line, file))
        if (strncmp(line, "VmRSS:", 6) == 0)
            kib = strtod(line + 6, NULL);
    fclose(file);
    assert_true(kib > 0);
    return kib * 1024;
}

/* ---- heads without an end ---- */

static void test_endless_head(void **state)
{
    (void)state;
    static const struct {
        const char *begin, *more;
    } shapes[] = {{"GET /", "xxxxxxxxxxxxxxxx"},
                  {"GET / HTTP/1.1\r\nA: ", "yyyyyyyyyyyyyyyy"},
                  {"GET / HTTP/1.1\r\n", "A: b\r\nLonger: 12\r\n"},
                  {"GET / HTTP/1.1\r\n", "NameOfOneField"},
                  {"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2;",
                   "extensionextension"},
                  {"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
                   "2\r\n{}\r\n0\r\n",
                   "Trailer: of many\r\n"}};
    const char *much = getenv("RAMBAD_LONG");
    const size_t most = much && much[0] == '1' ? (size_t)1 << 30 : (size_t)16 << 20;
    const double before = resident();
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct wire wire;
        struct wire_answer answer;
        struct buf block;
        ssize_t got = 0;
        buf_init(&block);
        while (block.size < 1 << 18)
            buf_append_text(&block, shapes[i].more);
        wire_open(&wire, &server);
        wire_send(&wire, shapes[i].begin, strlen(shapes[i].begin));
        /* It goes on although the answer is there; that is read and dropped, for a while. */
        for (size_t sent = 0; sent < most && got >= 0; sent += block.size)
            for (size_t at = 0; at < block.size && got >= 0; at += (size_t)(got > 0 ? got : 0))
                got = send(wire.fd, block.data + at, block.size - at, MSG_NOSIGNAL);
        if (got >= 0) {
            if (wire_answer(&wire, &answer, false) != 431)
                fail_msg("shape %zu: %d", i, answer.status);
            wire_check_error(&answer, 431, "headers_too_large", NULL);
            if (i == 0) /* it takes its two seconds */
                assert_true(wire_ends(&wire, NULL));
            wire_answer_close(&answer);
        }
        wire_close(&wire);
        buf_close(&block);
    }
    if (resident() - before > GROWTH_BYTES)
        fail_msg("the daemon has grown by %.0f bytes", resident() - before);
}

/* ---- floods ---- */

/* Sends requests of `size` bytes until the daemon takes no more, and reads no answer. Returns how
 * many bytes it took. */
static size_t flood(struct wire *wire, size_t size)
{
    const double before = resident();
    struct buf block;
    size_t sent = 0;
    buf_init(&block);
    buf_append_format(&block, "GET /metrics HTTP/1.1\r\nHost: t\r\nX: ");
    while (block.size < size - 4)
        buf_append_text(&block, "x");
    buf_append_text(&block, "\r\n\r\n");
    for (double moved = daemon_now(); daemon_now() - moved < 1;) {
        const size_t at = sent % block.size;
        const ssize_t got =
            send(wire->fd, block.data + at, block.size - at, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (got > 0) {
            sent += (size_t)got;
            moved = daemon_now();
        } else {
            usleep(10000);
        }
        if (resident() - before > 4 * GROWTH_BYTES)
            fail_msg("after %zu bytes of requests the daemon has grown by %.0f bytes", sent,
                     resident() - before);
    }
    assert_true(sent > 1 << 16);
    if (resident() - before > GROWTH_BYTES)
        fail_msg("the daemon has grown by %.0f bytes", resident() - before);
    buf_close(&block);
    return sent;
}

enum { FLOOD_SIZE = 2048 }; /* of a request, so that sockets do not hold too many of them */

/* Requests without end, and nobody takes the answers, which are far longer: the daemon stops
 * reading. Whoever then takes them gets every one. */
static void test_flood(void **state)
{
    (void)state;
    struct wire wire;
    struct wire_answer answer;
    wire_open(&wire, &server);
    const size_t count = flood(&wire, FLOOD_SIZE) / FLOOD_SIZE;
    shutdown(wire.fd, SHUT_WR);
    for (size_t answers = 0; answers < count; answers++) {
        if (wire_answer(&wire, &answer, false) != 200)
            fail_msg("%d instead of answer %zu of %zu", answer.status, answers, count);
        wire_answer_close(&answer);
    }
    wire_close(&wire);
}

/* Nor does one who takes nothing hold up the daemon's end: --drain-timeout, which is longer than
 * daemon_stop waits, is for requests under way. */
static void test_flood_drain(void **state)
{
    (void)state;
    struct wire wire;
    wire_open(&wire, &server);
    flood(&wire, FLOOD_SIZE);
    daemon_stop(&server);
    wire_close(&wire);
    daemon_start(&server);
}

/* ---- what two servers could read as different requests ---- */

static void test_smuggling(void **state)
{
    (void)state;
#define POST "POST /v1/memories HTTP/1.1\r\nHost: t\r\n"
#define CHUNKED "Transfer-Encoding: chunked\r\n"
#define WITHIN "GET /v1/models HTTP/1.1\r\nHost: t\r\n\r\n"
    static const char *const shapes[] = {
        POST "Content-Length: 5\r\n" CHUNKED "\r\n0\r\n\r\n" WITHIN,
        POST CHUNKED "Content-Length: 5\r\n\r\n0\r\n\r\n" WITHIN,
        POST "Content-Length: 0\r\nContent-Length: 44\r\n\r\n" WITHIN,
        POST "Content-Length: 2, 44\r\n\r\n{}" WITHIN,
        POST "Content-Length: +2\r\n\r\n{}" WITHIN,
        POST "Content-Length: 0x2\r\n\r\n{}" WITHIN,
        POST "Content-Length: 2 2\r\n\r\n{}" WITHIN,
        POST "Content-Length:\r\n\r\n" WITHIN,
        POST "Content-Length : 2\r\n\r\n{}" WITHIN,
        POST "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" WITHIN,
        POST "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" WITHIN,
        POST "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" WITHIN,
        POST "Transfer-Encoding: identity\r\n\r\n" WITHIN,
        POST "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" WITHIN,
        POST CHUNKED CHUNKED "\r\n0\r\n\r\n" WITHIN,
        POST CHUNKED "Transfer-Encoding: identity\r\n\r\n0\r\n\r\n" WITHIN,
        POST "Transfer-Encoding: \x0b"
             "chunked\r\n\r\n0\r\n\r\n" WITHIN,
        POST "X: y\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" WITHIN,
        POST "X: y\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" WITHIN,
        POST CHUNKED "\r\n2 \r\n{}\r\n0\r\n\r\n" WITHIN,
        POST CHUNKED "\r\n-2\r\n{}\r\n0\r\n\r\n" WITHIN,
        POST CHUNKED "\r\n0x2\r\n{}\r\n0\r\n\r\n" WITHIN,
        POST CHUNKED "\r\n2\n{}\r\n0\r\n\r\n" WITHIN,
        POST CHUNKED "\r\n2\r\n{}\n0\r\n\r\n" WITHIN,
        POST CHUNKED "\r\n2\r\n{}x\r\n0\r\n\r\n" WITHIN,
        POST CHUNKED "\r\n2;a=\n\r\n{}\r\n0\r\n\r\n" WITHIN,
        POST CHUNKED "\r\n10000000000000002\r\n{}\r\n0\r\n\r\n" WITHIN,
        "POST /v1/memories HTTP/1.0\r\nHost: t\r\n" CHUNKED "\r\n0\r\n\r\n" WITHIN,
        "POST /v1/memories HTTP/1.1 \r\nHost: t\r\nContent-Length: 0\r\n\r\n" WITHIN,
        "POST /v1/memories\r\nHost: t\r\nContent-Length: 0\r\n\r\n" WITHIN,
        "GET /v1/models HTTP/1.1\r\n Host: t\r\n\r\n" WITHIN,
    };
    int both = 0;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct wire wire;
        struct wire_answer answer;
        wire_open(&wire, &server);
        wire_send(&wire, shapes[i], strlen(shapes[i]));
        const int first = wire_answer(&wire, &answer, false);
        wire_answer_close(&answer);
        if (first != 400 || !wire_ends(&wire, NULL)) {
            print_message("shape %zu: %d: %s\n", i, first, shapes[i]);
            both++;
        }
        wire_close(&wire);
    }
    assert_int_equal(both, 0);
}

/* ---- numbers that no field expects ---- */

/* `form` with the id in the place of @ and the number in that of #. */
static void fill_form(struct buf *out, const char *form, const char *id, const char *number)
{
    out->size = 0;
    for (; *form; form++)
        if (*form == '@')
            buf_append_text(out, id);
        else if (*form == '#')
            buf_append_text(out, number);
        else
            buf_append(out, form, 1);
}

/* Each number in each field and query is taken or refused, and never the server's own error. */
static void test_numbers(void **state)
{
    (void)state;
    static const char *const numbers[] = {"-1",
                                          "0.5",
                                          "-0.0",
                                          "1e999",
                                          "-1e999",
                                          "1e300",
                                          "1e-320",
                                          "4294967296",
                                          "9007199254740993",
                                          "9223372036854775808",
                                          "-9223372036854775809",
                                          "18446744073709551616"};
#define FIELD(name)                                                    \
    {                                                                  \
        "POST", "/v1/completions", "{\"prompt\":\"x\",\"" name "\":#}" \
    }
#define MEMORY "/v1/memories/@"
    static const char *const forms[][3] = {
        FIELD("max_tokens"),
        FIELD("temperature"),
        FIELD("top_p"),
        FIELD("top_k"),
        FIELD("min_p"),
        FIELD("n"),
        FIELD("best_of"),
        FIELD("logprobs"),
        FIELD("seed"),
        FIELD("presence_penalty"),
        FIELD("frequency_penalty"),
        FIELD("repetition_penalty"),
        FIELD("priority"),
        FIELD("timeout"),
        {"POST", "/v1/completions", "{\"prompt\":[#]}"},
        {"POST", "/v1/completions", "{\"prompt\":\"x\",\"logit_bias\":{\"1\":#}}"},
        {"POST", "/v1/responses", "{\"input\":\"x\",\"max_output_tokens\":#}"},
        {"POST", "/v1/memories", "{\"from\":\"@\",\"at\":#}"},
        {"POST", MEMORY "/rewind", "{\"to\":#}"},
        {"POST", MEMORY "/turns", "{\"position\":#,\"bookmark\":\"x\"}"},
        {"PATCH", MEMORY, "{\"expires_after\":{\"anchor\":\"created_at\",\"seconds\":#}}"},
        {"PATCH", MEMORY, "{\"expires_after\":{\"anchor\":\"created_at\",\"days\":#}}"},
        {"DELETE", MEMORY "/turns?position=#", NULL},
        {"GET", MEMORY "/turns?limit=#", NULL},
        {"GET", MEMORY "/chunks?from=#", NULL},
        {"GET", MEMORY "/chunks?limit=#", NULL},
        {"GET", "/v1/memories?limit=#", NULL},
        {"GET", "/v1/conversations/@/items?limit=#", NULL},
        {"GET", "/v1/responses/resp_1?stream=true&starting_after=#", NULL},
        {"POST", MEMORY "/append?offset=#", "text"},
        {"POST", MEMORY "/append?timeout=#", "text"},
        {"POST", MEMORY "/append?priority=#", "text"}};
    char id[LIMITS_ID_BYTES];
    struct buf path, body;
    buf_init(&path);
    buf_init(&body);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        for (size_t j = 0; j < sizeof forms / sizeof *forms; j++) {
            const char *const *form = forms[j];
            struct wire_answer answer;
            daemon_create_memory(&server, NULL, id);
            fill_form(&path, form[1], id, numbers[i]);
            fill_form(&body, form[2] ? form[2] : "", id, numbers[i]);
            const int status = wire_call(&server, form[0], buf_text(&path),
                                         form[2] ? buf_text(&body) : NULL, &answer);
            if (status >= 500 || status < 200 || (strstr(numbers[i], "e999") && status < 400))
                fail_msg("%s %s %s: %d", form[0], buf_text(&path), buf_text(&body), status);
            wire_answer_close(&answer);
        }
    buf_close(&path);
    buf_close(&body);
}

/* ---- connections that are cut ---- */

static void cut(struct wire *wire)
{
    const struct linger reset = {.l_onoff = 1};
    setsockopt(wire->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    wire_close(wire);
}

static void test_resets(void **state)
{
    (void)state;
#define COMPLETION(size) \
    "POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: " size "\r\n\r\n"
    static const char *const beginnings[] = {
        "",
        "GET /v1/mod",
        COMPLETION("100") "{\"prompt\":",
        "POST /v1/memories/import HTTP/1.1\r\nHost: t\r\nContent-Length: 10000\r\n\r\nRAMBA",
        "GET /v1/models HTTP/1.1\r\nHost: t\r\n\r\n",
        COMPLETION("33") "{\"prompt\":\"x\", \"max_tokens\":2000}",
        COMPLETION(
            "68") "{\"prompt\":\"x\", \"max_tokens\":1000000,\"ignore_eos\":true,\"stream\":true}"};
    const double connections = wire_metric(&server, "rambad_connections");
    double before = 0;
    for (int round = 0; round < 30; round++) {
        if (round == 10) /* what a first round leaves in the heap stays there */
            before = resident();
        for (size_t i = 0; i < sizeof beginnings / sizeof *beginnings; i++) {
            struct wire wire;
            wire_open(&wire, &server);
            wire_send(&wire, beginnings[i], strlen(beginnings[i]));
            if (round % 3 == 1)
                usleep(2000);
            else if (round % 3 == 2 && i >= 4)
                assert_true(wire_wait_for(&wire, "HTTP/1.1 200"));
            cut(&wire);
        }
        wire_wait_metric(&server, "rambad_jobs_running", 0);
    }
    wire_wait_metric(&server, "rambad_connections", connections);
    if (resident() - before > GROWTH_BYTES)
        fail_msg("the daemon has grown by %.0f bytes", resident() - before);
}

/* A client whose machine is gone says nothing at all: the kernel asks whether it is there. */
static void test_keepalive(void **state)
{
    (void)state;
    struct wire wire;
    struct sockaddr_in address;
    socklen_t size = sizeof address;
    char line[256];
    bool asks = false;
    wire_open(&wire, &server);
    wire_say(&wire, "GET /health/live HTTP/1.1\r\nHost: t\r\n\r\n");
    assert_true(wire_wait_for(&wire, "live"));
    assert_int_equal(getsockname(wire.fd, (struct sockaddr *)&address, &size), 0);
    FILE *file = fopen("/proc/net/tcp", "r");
    assert_non_null(file);
    while (fgets(line, sizeof line, file)) {
        unsigned local, remote, timer;
        if (sscanf(line, " %*d: %*x:%x %*x:%x %*x %*x:%*x %x:", &local, &remote, &timer) == 3 &&
            (int)local == server.port && remote == ntohs(address.sin_port))
            asks = timer == 2; /* of keep-alive */
    }
    fclose(file);
    assert_true(asks);
    wire_close(&wire);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_endless_head), cmocka_unit_test(test_flood),
        cmocka_unit_test(test_smuggling),    cmocka_unit_test(test_resets),
        cmocka_unit_test(test_keepalive),    cmocka_unit_test(test_flood_drain),
        cmocka_unit_test(test_numbers),
    };
    daemon_choose_tests();
    return cmocka_run_group_tests(tests, setup, teardown);
}
