/* The protocol, byte by byte, against the real daemon: what is malformed, too large or too slow
 * gets the documented error; what is only unusual works; a client that goes away takes its request
 * back. */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/lib/daemon.h"
#include "tests/lib/store_helper.h"
#include "tests/lib/wire.h"

#define MODEL "tests/golden/wide-stickbreaking-topk8"
#define HEADER_SECONDS 2
#define BODY_SECONDS 3
#define IDLE_SECONDS 4
#define LONG_TURN                                                                             \
    "{\"prompt\":\"on and on\",\"max_tokens\":1000000,\"temperature\":0,\"ignore_eos\":true," \
    "\"stream\":true}"

struct fixture {
    char *folder;
    struct daemon daemon;
};

static const char *const flags[] = {"--threads",
                                    "1",
                                    "--header-timeout",
                                    "2",
                                    "--body-timeout",
                                    "3",
                                    "--idle-timeout",
                                    "4",
                                    "--drain-timeout",
                                    "30",
                                    NULL};

static void start(struct fixture *f, const char *const *with)
{
    f->folder = store_helper_folder();
    daemon_init(&f->daemon, MODEL, f->folder, "data");
    f->daemon.flags = with;
    daemon_start(&f->daemon);
}

static void stop(struct fixture *f)
{
    if (f->daemon.pid)
        daemon_stop(&f->daemon);
    daemon_check(&f->daemon);
    store_helper_remove(f->folder);
}

static int setup(void **state)
{
    static struct fixture fixture;
    *state = &fixture;
    start(&fixture, flags);
    return 0;
}

static int teardown(void **state)
{
    stop(*state);
    return 0;
}

/* ---- malformed, too large, too slow ---- */

static void test_malformed(void **state)
{
    struct fixture *f = *state;
    static const char *const requests[] = {
        "this is no HTTP\r\n\r\n",
        "GET\r\n\r\n",
        "BREW /v1/models HTTP/1.1\r\nHost: t\r\n\r\n",
        "GET /v1/models HTTP/9.9\r\nHost: t\r\n\r\n",
        "GET /v1/models HTTP/1.1\r\nHost t\r\n\r\n",
        "GET /v1/models HTTP/1.1\r\nHost: t\r\nA\x01: b\r\n\r\n",
        "GET /v1/%zz HTTP/1.1\r\nHost: t\r\n\r\n",
        "GET /v1/models%00 HTTP/1.1\r\nHost: t\r\n\r\n",
        "GET v1/models HTTP/1.1\r\nHost: t\r\n\r\n",
        "CONNECT example.com:80 HTTP/1.1\r\nHost: t\r\n\r\n",
        "POST /v1/memories HTTP/1.1\r\nHost: t\r\nContent-Length: -1\r\n\r\n",
        "POST /v1/memories HTTP/1.1\r\nHost: t\r\nContent-Length: 2x\r\n\r\n",
        "POST /v1/memories HTTP/1.1\r\nHost: t\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        "POST /v1/memories HTTP/1.1\r\nHost: t\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        "POST /v1/memories HTTP/1.1\r\nHost: t\r\nContent-Length: 2\r\n"
        "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        "POST /v1/memories HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n{}",
        "POST /v1/memories HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
        "ffffffffffffffffff\r\n{}",
    };
    for (size_t i = 0; i < sizeof requests / sizeof *requests; i++) {
        struct wire wire;
        struct wire_answer answer;
        double seconds;
        wire_open(&wire, &f->daemon);
        wire_send(&wire, requests[i], strlen(requests[i]));
        if (wire_answer(&wire, &answer, false) != 400)
            print_message("request %zu: %s\n", i, requests[i]);
        wire_check_error(&answer, 400, "invalid", NULL);
        assert_true(wire_ends(&wire, &seconds));
        assert_true(seconds < 1);
        wire_answer_close(&answer);
        wire_close(&wire);
    }
}

static void test_headers_too_large(void **state)
{
    struct fixture *f = *state;
    for (int what = 0; what < 3; what++) {
        struct wire wire;
        struct wire_answer answer;
        struct buf request;
        buf_init(&request);
        buf_append_text(&request, "GET /");
        for (int i = 0; what == 0 && i < 9000; i++)
            buf_append_text(&request, "x");
        buf_append_text(&request, " HTTP/1.1\r\nHost: t\r\n");
        for (int i = 0; what == 1 && i < 40000; i++) /* one long field */
            buf_append_text(&request, i ? "y" : "Cookie: ");
        for (int i = 0; what == 2 && i < 10000; i++) /* many empty ones */
            buf_append_text(&request, "A:\r\n");
        buf_append_text(&request, "\r\n\r\n");
        wire_open(&wire, &f->daemon);
        wire_send(&wire, request.data, request.size);
        wire_answer(&wire, &answer, false);
        wire_check_error(&answer, 431, "headers_too_large", NULL);
        assert_true(wire_ends(&wire, NULL));
        wire_answer_close(&answer);
        wire_close(&wire);
        buf_close(&request);
    }
}

static void test_slow(void **state)
{
    struct fixture *f = *state;
    struct wire header, drops, body, idle, silent;
    struct wire_answer answer;
    wire_open(&header, &f->daemon);
    wire_say(&header, "GET /v1/models HTTP/1.1\r\nHo");
    wire_open(&body, &f->daemon);
    wire_say(&body, "POST /v1/memories HTTP/1.1\r\nHost: t\r\nContent-Length: 10\r\n\r\n{");
    wire_open(&silent, &f->daemon);
    wire_open(&idle, &f->daemon);
    wire_ask(&idle, "GET", "/health/live", "", NULL, 0);
    assert_int_equal(wire_answer(&idle, &answer, false), 200);
    wire_answer_close(&answer);
    /* Bytes that come drop by drop win no time. */
    wire_open(&drops, &f->daemon);
    double begin = daemon_now();
    const char *const text = "\r\n\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: a-very-long-name\r\n";
    for (size_t i = 0; daemon_now() - begin < HEADER_SECONDS + 0.7; usleep(100000))
        wire_send(&drops, text + i % strlen(text), 1), i++;
    assert_int_equal(wire_answer(&drops, &answer, false), 408);
    wire_answer_close(&answer);

    wire_answer(&header, &answer, false);
    wire_check_error(&answer, 408, "timeout", NULL);
    wire_answer_close(&answer);
    wire_answer(&body, &answer, false);
    wire_check_error(&answer, 408, "timeout", NULL);
    assert_true(daemon_now() - begin >= BODY_SECONDS - 0.5);
    wire_answer_close(&answer);
    assert_true(wire_ends(&header, NULL));
    assert_true(wire_ends(&body, NULL));
    assert_true(wire_ends(&silent, NULL)); /* nothing was asked, nothing is said */
    assert_true(wire_ends(&idle, NULL));
    assert_true(daemon_now() - begin >= IDLE_SECONDS - 0.5);
    wire_close(&header);
    wire_close(&body);
    wire_close(&silent);
    wire_close(&idle);
    wire_close(&drops);
}

/* A client must not send again by itself what is there in part; with a key it may, and goes on
 * where it was. */
static void test_half_an_upload(void **state)
{
    struct fixture *f = *state;
    struct wire wires[2];
    struct wire_answer answer;
    char ids[2][LIMITS_ID_BYTES], value[16], text[5 * 4096]; /* more than a block */
    memset(text, 'a', sizeof text);
    for (int keyed = 0; keyed < 2; keyed++) {
        daemon_create_memory(&f->daemon, NULL, ids[keyed]);
        wire_open(&wires[keyed], &f->daemon);
        wire_say(
            &wires[keyed],
            "POST /v1/memories/%s/append HTTP/1.1\r\nHost: t\r\n%sContent-Length: 1000000\r\n\r\n",
            ids[keyed], keyed ? "Idempotency-Key: half\r\n" : "");
        wire_send(&wires[keyed], text, sizeof text);
    }
    /* Then drop by drop until it is there. */
    const double begin = daemon_now();
    while (!daemon_get_memory(&f->daemon, ids[0]).text_bytes ||
           !daemon_get_memory(&f->daemon, ids[1]).text_bytes) {
        assert_true(daemon_now() - begin < WIRE_SECONDS);
        wire_send(&wires[0], text, 1);
        wire_send(&wires[1], text, 1);
        usleep(20000);
    }
    for (int keyed = 0; keyed < 2; keyed++) {
        wire_answer(&wires[keyed], &answer, false);
        wire_check_error(&answer, 408, "timeout", NULL);
        assert_int_equal(wire_header(&answer, "x-should-retry", value, sizeof value), !keyed);
        if (!keyed)
            assert_string_equal(value, "false");
        wire_answer_close(&answer);
        wire_close(&wires[keyed]);
    }
}

static void test_body_too_large(void **state)
{
    struct fixture *f = *state;
    struct wire wire;
    struct wire_answer answer;
    double seconds;
    wire_open(&wire, &f->daemon); /* refused by its announcement */
    wire_say(&wire, "POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 17000000\r\n\r\n");
    wire_answer(&wire, &answer, false);
    wire_check_error(&answer, 413, "too_large", NULL);
    assert_true(wire_ends(&wire, &seconds));
    assert_true(seconds < 1);
    wire_answer_close(&answer);
    wire_close(&wire);

    /* Without one it is refused when it grows past the limit; the answer arrives although the
     * client goes on sending. */
    char *block = malloc(1 << 20);
    assert_non_null(block);
    memset(block, ' ', 1 << 20);
    wire_open(&wire, &f->daemon);
    wire_say(&wire, "POST /v1/memories HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n");
    for (int i = 0; i < 4; i++) {
        wire_say(&wire, "100000\r\n");
        wire_send(&wire, block, 1 << 20);
        wire_say(&wire, "\r\n");
    }
    wire_answer(&wire, &answer, false);
    wire_check_error(&answer, 413, "too_large", NULL);
    wire_answer_close(&answer);
    wire_close(&wire);

    /* The same for an upload whose type is refused at its head. */
    wire_open(&wire, &f->daemon);
    wire_say(&wire, "POST /v1/memories/mem_x/append HTTP/1.1\r\nHost: t\r\n"
                    "Content-Type: application/pdf\r\nContent-Length: 4194304\r\n\r\n");
    for (int i = 0; i < 4; i++)
        wire_send(&wire, block, 1 << 20);
    wire_answer(&wire, &answer, false);
    wire_check_error(&answer, 415, "media_type", NULL);
    wire_answer_close(&answer);
    wire_close(&wire);
    free(block);
}

/* ---- routes and connections ---- */

static void test_routes(void **state)
{
    struct fixture *f = *state;
    struct wire wire;
    struct wire_answer answer;
    char value[128];
    wire_open(&wire, &f->daemon); /* all on one connection */
    wire_ask(&wire, "GET", "/v2/nothing", "", NULL, 0);
    wire_answer(&wire, &answer, false);
    wire_check_error(&answer, 404, "not_found", NULL);
    assert_false(wire_header(&answer, "connection", value, sizeof value));
    wire_answer_close(&answer);
    wire_ask(&wire, "POST", "/v2/nothing", "", "with a body", 11);
    wire_answer(&wire, &answer, false);
    wire_check_error(&answer, 404, "not_found", NULL);
    wire_answer_close(&answer);
    wire_ask(&wire, "DELETE", "/v1/memories", "", NULL, 0);
    wire_answer(&wire, &answer, false);
    wire_check_error(&answer, 405, "method", NULL);
    assert_true(wire_header(&answer, "allow", value, sizeof value));
    assert_string_equal(value, "POST, GET, HEAD");
    wire_answer_close(&answer);
    wire_ask(&wire, "GET", "/v1/completions", "", NULL, 0);
    wire_answer(&wire, &answer, false);
    wire_check_error(&answer, 405, "method", NULL);
    assert_true(wire_header(&answer, "allow", value, sizeof value));
    assert_string_equal(value, "POST");
    wire_answer_close(&answer);
    wire_ask(&wire, "GET", "/v1/memories?limit=3&order=asc", "", NULL, 0);
    wire_answer(&wire, &answer, false);
    wire_check_error(&answer, 400, "unsupported", NULL);
    assert_non_null(strstr(answer.body.data, "order"));
    wire_answer_close(&answer);
    static const char *const bad[] = {"/v1/memories?limit=0", "/v1/memories?limit=101",
                                      "/v1/memories?limit=x", "/v1/memories?limit=-1"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        wire_ask(&wire, "GET", bad[i], "", NULL, 0);
        wire_answer(&wire, &answer, false);
        wire_check_error(&answer, 400, "invalid", "limit");
        wire_answer_close(&answer);
    }
    wire_ask(&wire, "GET", "/%76%31/models", "", NULL, 0);
    assert_int_equal(wire_answer(&wire, &answer, false), 200);
    wire_answer_close(&answer);
    for (int i = 0; i < 2; i++) { /* a HEAD has a length and no body */
        wire_ask(&wire, "HEAD", i ? "/nowhere" : "/v1/models", "", NULL, 0);
        assert_int_equal(wire_answer(&wire, &answer, true), i ? 404 : 200);
        assert_true(wire_header(&answer, "content-length", value, sizeof value));
        assert_true(strtoul(value, NULL, 10) > 0);
        wire_answer_close(&answer);
    }
    wire_ask(&wire, "GET", "/health/live", "Connection: close\r\n", NULL, 0);
    assert_int_equal(wire_answer(&wire, &answer, false), 200);
    assert_true(wire_header(&answer, "connection", value, sizeof value));
    assert_string_equal(value, "close");
    assert_true(wire_ends(&wire, NULL));
    wire_answer_close(&answer);
    wire_close(&wire);
}

static void test_request_ids(void **state)
{
    struct fixture *f = *state;
    static const struct {
        const char *header;
        bool kept;
    } cases[] = {{"X-Request-Id: my-own_ID.7\r\n", false}, /* a dot */
                 {"X-Request-Id: my-own_ID7\r\n", true},
                 {"X-Request-Id: \"}{\"\r\n", false},
                 {"X-Request-Id: 0123456789012345678901234567890123456789\r\n", false},
                 {"X-Request-Id:\r\n", false},
                 {"", false}};
    char ids[6][64];
    for (size_t i = 0; i < 6; i++) {
        struct wire wire;
        struct wire_answer answer;
        wire_open(&wire, &f->daemon);
        wire_ask(&wire, "GET", i % 2 ? "/v1/models" : "/nowhere", cases[i].header, NULL, 0);
        wire_answer(&wire, &answer, false);
        assert_true(wire_header(&answer, "x-request-id", ids[i], sizeof ids[i]));
        assert_int_equal(strcmp(ids[i], "my-own_ID7") == 0, cases[i].kept);
        for (size_t k = 0; k < i; k++)
            assert_string_not_equal(ids[i], ids[k]);
        wire_answer_close(&answer);
        wire_close(&wire);
    }
}

static void test_pipelining(void **state)
{
    struct fixture *f = *state;
    static const char *const bodies[] = {
        "{\"prompt\":\"one\",\"max_tokens\":3,\"temperature\":0}",
        "{\"prompt\":\"two\",\"max_tokens\":3,\"temperature\":0,\"stream\":true}"};
    struct buf requests;
    buf_init(&requests);
    buf_append_text(&requests, "GET /v1/models HTTP/1.1\r\nHost: t\r\nX-Request-Id: a\r\n\r\n");
    for (int i = 0; i < 2; i++)
        buf_append_format(&requests,
                          "POST /v1/completions HTTP/1.1\r\nHost: t\r\nX-Request-Id: %c\r\n"
                          "Content-Length: %zu\r\n\r\n%s",
                          'b' + i, strlen(bodies[i]), bodies[i]);
    buf_append_text(&requests, "HEAD /v1/models HTTP/1.1\r\nHost: t\r\nX-Request-Id: d\r\n\r\n"
                               "GET /nowhere HTTP/1.1\r\nHost: t\r\nX-Request-Id: e\r\n\r\n"
                               "POST /v1/memories HTTP/1.1\r\nHost: t\r\nX-Request-Id: f\r\n"
                               "Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n"
                               "GET /health HTTP/1.1\r\nHost: t\r\nX-Request-Id: g\r\n\r\n");
    static const int statuses[] = {200, 200, 200, 200, 404, 201, 200};
    for (size_t step = 1; step <= requests.size; step *= 40) { /* by the byte, in parts, at once */
        struct wire wire;
        wire_open(&wire, &f->daemon);
        for (size_t at = 0; at < requests.size; at += step) {
            const size_t left = requests.size - at;
            wire_send(&wire, requests.data + at, left < step ? left : step);
        }
        for (int i = 0; i < 7; i++) {
            struct wire_answer answer;
            char id[64], expected[2] = {(char)('a' + i), 0};
            assert_int_equal(wire_answer(&wire, &answer, i == 3), statuses[i]);
            assert_true(wire_header(&answer, "x-request-id", id, sizeof id));
            assert_string_equal(id, expected);
            wire_answer_close(&answer);
        }
        assert_int_equal(wire.in.size, 0);
        wire_close(&wire);
    }
    buf_close(&requests);
}

/* More than is buffered waits in the socket while a turn runs, and is all there afterwards. */
static void test_pipelining_much(void **state)
{
    struct fixture *f = *state;
    const char *turn = "{\"prompt\":\"one\",\"max_tokens\":300,\"ignore_eos\":true}";
    const size_t size = 200000;
    char *metadata = malloc(size);
    struct wire wire;
    struct wire_answer answer;
    assert_non_null(metadata);
    memset(metadata, ' ', size);
    memcpy(metadata, "{}", 2);
    wire_open(&wire, &f->daemon);
    wire_ask(&wire, "POST", "/v1/completions", "", turn, strlen(turn));
    for (int i = 0; i < 3; i++)
        wire_ask(&wire, "POST", "/v1/memories", "", metadata, size);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(wire_answer(&wire, &answer, false), i ? 201 : 200);
        wire_answer_close(&answer);
    }
    wire_close(&wire);
    free(metadata);
}

static void test_unusual(void **state)
{
    struct fixture *f = *state;
    struct wire wire;
    struct wire_answer answer;
    char value[64];
    /* An end that was sent is no absence. */
    wire_open(&wire, &f->daemon);
    wire_say(&wire, "GET /v1/models HTTP/1.1\r\nHost: t\r\n\r\n");
    shutdown(wire.fd, SHUT_WR);
    assert_int_equal(wire_answer(&wire, &answer, false), 200);
    wire_answer_close(&answer);
    wire_close(&wire);
    /* HTTP/1.0 knows no chunks and keeps no connection. */
    const char *body = "{\"prompt\":\"x\",\"max_tokens\":2,\"stream\":true}";
    wire_open(&wire, &f->daemon);
    wire_say(&wire, "POST /v1/completions HTTP/1.0\r\nContent-Length: %zu\r\n\r\n%s", strlen(body),
             body);
    assert_int_equal(wire_answer(&wire, &answer, false), 200);
    assert_false(wire_header(&answer, "transfer-encoding", value, sizeof value));
    assert_memory_equal(answer.body.data, "data: {", 7);
    assert_string_equal(answer.body.data + answer.body.size - 16, "\n\ndata: [DONE]\n\n");
    wire_answer_close(&answer);
    wire_close(&wire);
    /* An offer of HTTP/2 is passed over, and the connection goes on. */
    wire_open(&wire, &f->daemon);
    for (int i = 0; i < 2; i++) {
        wire_ask(&wire, "GET", "/v1/models",
                 "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
                 "HTTP2-Settings: AAMAAABkAAQAAP__\r\n",
                 NULL, 0);
        assert_int_equal(wire_answer(&wire, &answer, false), 200);
        wire_answer_close(&answer);
    }
    wire_close(&wire);
    /* Expect: 100-continue waits for the 100 or the refusal. */
    wire_open(&wire, &f->daemon);
    wire_say(&wire, "POST /v1/memories HTTP/1.1\r\nHost: t\r\nExpect: 100-continue\r\n"
                    "Content-Length: 2\r\n\r\n");
    assert_int_equal(wire_answer(&wire, &answer, false), 100);
    wire_answer_close(&answer);
    wire_say(&wire, "{}");
    assert_int_equal(wire_answer(&wire, &answer, false), 201);
    wire_answer_close(&answer);
    wire_close(&wire);
    wire_open(&wire, &f->daemon);
    wire_say(&wire, "POST /v1/memories/mem_x/append HTTP/1.1\r\nHost: t\r\nExpect: 100-continue\r\n"
                    "Content-Type: image/png\r\nContent-Length: 2\r\n\r\n");
    wire_answer(&wire, &answer, false);
    wire_check_error(&answer, 415, "media_type", NULL);
    wire_answer_close(&answer);
    wire_close(&wire);
}

static void test_too_many_connections(void **state)
{
    (void)state;
    struct fixture f;
    struct wire wires[5];
    struct wire_answer answer;
    char value[64];
    start(&f, (const char *const[]){"--connections", "4", "--threads", "1", NULL});
    for (int i = 0; i < 4; i++) {
        wire_open(&wires[i], &f.daemon);
        wire_ask(&wires[i], "GET", "/health/live", "", NULL, 0);
        assert_int_equal(wire_answer(&wires[i], &answer, false), 200);
        wire_answer_close(&answer);
    }
    wire_open(&wires[4], &f.daemon);
    wire_answer(&wires[4], &answer, false);
    wire_check_error(&answer, 503, "unavailable", NULL);
    assert_true(wire_header(&answer, "retry-after", value, sizeof value));
    assert_true(wire_ends(&wires[4], NULL));
    wire_answer_close(&answer);
    for (int i = 0; i < 5; i++)
        wire_close(&wires[i]);
    stop(&f);
}

/* ---- uploads ---- */

static void make_memory(struct fixture *f, char path[96])
{
    char id[LIMITS_ID_BYTES];
    daemon_create_memory(&f->daemon, NULL, id);
    snprintf(path, 96, "/v1/memories/%s/append", id);
}

static void test_chunked_upload(void **state)
{
    struct fixture *f = *state;
    char whole[96], parts[96], id[LIMITS_ID_BYTES];
    struct buf text, chunks[2];
    struct wire wire;
    struct wire_answer answer;
    buf_init(&text);
    buf_init(&chunks[0]);
    buf_init(&chunks[1]);
    for (int i = 0; text.size < 40000; i++)
        buf_append_format(&text, "%d caf\xc3\xa9, %x\n", i, (unsigned)i * 2654435761u);
    make_memory(f, whole);
    make_memory(f, parts);
    wire_open(&wire, &f->daemon);
    wire_ask(&wire, "POST", whole, "", text.data, text.size);
    assert_int_equal(wire_answer(&wire, &answer, false), 200);
    wire_answer_close(&answer);
    wire_say(&wire, "POST %s HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n", parts);
    for (size_t at = 0, size = 1; at < text.size; at += size, size = size * 7 % 3001 + 1) {
        if (size > text.size - at)
            size = text.size - at;
        wire_say(&wire, "%zX;name=\"value\"\r\n", size);
        wire_send(&wire, text.data + at, size);
        wire_say(&wire, "\r\n");
    }
    wire_say(&wire, "0\r\nX-Trailer: yes\r\n\r\n");
    assert_int_equal(wire_answer(&wire, &answer, false), 200);
    wire_answer_close(&answer);
    wire_close(&wire);
    for (int i = 0; i < 2; i++) {
        snprintf(id, sizeof id, "%.*s", 28, (i ? parts : whole) + strlen("/v1/memories/"));
        assert_int_equal(daemon_get_memory(&f->daemon, id).text_bytes, text.size);
        daemon_read_chunks(&f->daemon, id, &chunks[i]);
    }
    assert_int_equal(chunks[0].size, chunks[1].size);
    assert_memory_equal(chunks[0].data, chunks[1].data, chunks[0].size);
    buf_close(&text);
    buf_close(&chunks[0]);
    buf_close(&chunks[1]);
}

/* A body that was held back, and then was complete, does not hold back what comes behind it. */
static void test_after_upload(void **state)
{
    struct fixture *f = *state;
    char path[96];
    struct buf text;
    struct wire wire;
    struct wire_answer file, answer;
    buf_init(&text);
    while (text.size < 100000)
        buf_append_format(&text, "%zu, ", text.size);
    make_memory(f, path);
    wire_open(&wire, &f->daemon);
    wire_ask(&wire, "POST", path, "", text.data, text.size);
    assert_int_equal(wire_answer(&wire, &answer, false), 200);
    wire_answer_close(&answer);
    strcpy(strrchr(path, '/'), "/export");
    wire_ask(&wire, "GET", path, "", NULL, 0);
    assert_int_equal(wire_answer(&wire, &file, false), 200);
    wire_ask(&wire, "POST", "/v1/memories/import", "", file.body.data, file.body.size);
    assert_int_equal(wire_answer(&wire, &answer, false), 201);
    wire_answer_close(&answer);
    wire_ask(&wire, "GET", "/v1/models", "", NULL, 0);
    assert_int_equal(wire_answer(&wire, &answer, false), 200);
    wire_answer_close(&answer);
    wire_answer_close(&file);
    wire_close(&wire);
    buf_close(&text);
}

/* A client that offers more than the model reads is held back by its socket. */
static void test_back_pressure(void **state)
{
    struct fixture *f = *state;
    const size_t offered = (size_t)256 << 20, block_size = 1 << 16;
    char path[96], *block = malloc(block_size);
    struct wire wire;
    struct wire_answer answer;
    size_t sent = 0;
    const double before = wire_metric(&f->daemon, "rambad_disconnects_total");
    assert_non_null(block);
    memset(block, 'e', block_size);
    make_memory(f, path);
    wire_open(&wire, &f->daemon);
    wire_say(&wire, "POST %s HTTP/1.1\r\nHost: t\r\nContent-Length: %zu\r\n\r\n", path, offered);
    for (double moved = daemon_now(); sent < offered && daemon_now() - moved < 1;) {
        const ssize_t got = send(wire.fd, block, block_size, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (got > 0) {
            sent += (size_t)got;
            if (got > 4096)
                moved = daemon_now();
        } else {
            usleep(10000);
        }
    }
    /* What stands between is two sockets' buffers, not the daemon's memory. */
    assert_true(sent < offered / 4);
    /* Meanwhile others are answered, and the memory is busy for all but this one. */
    wire_call(&f->daemon, "POST", path, "more", &answer);
    wire_check_error(&answer, 409, "conflict", NULL);
    char value[64];
    assert_true(wire_header(&answer, "retry-after", value, sizeof value));
    wire_answer_close(&answer);
    /* Reset, as by a client that is killed. After a mere end its kernel would first deliver what it
     * holds, and nobody could tell. */
    const struct linger reset = {.l_onoff = 1};
    setsockopt(wire.fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    wire_close(&wire);
    wire_wait_metric(&f->daemon, "rambad_jobs_running", 0);
    assert_true(wire_metric(&f->daemon, "rambad_disconnects_total") == before + 1);
    free(block);
}

/* ---- clients that go away ---- */

static void test_disconnect(void **state)
{
    struct fixture *f = *state;
    for (int streamed = 0; streamed < 2; streamed++) {
        struct wire wire;
        const char *body =
            streamed ? LONG_TURN : "{\"prompt\":\"x\",\"max_tokens\":1000000,\"ignore_eos\":true}";
        const double before = wire_metric(&f->daemon, "rambad_disconnects_total");
        const double tokens = wire_metric(&f->daemon, "rambad_completion_tokens_total");
        wire_open(&wire, &f->daemon);
        wire_ask(&wire, "POST", "/v1/completions", "", body, strlen(body));
        if (streamed)
            assert_true(wire_wait_for(&wire, "data: {"));
        wire_wait_metric(&f->daemon, "rambad_jobs_running", 1);
        wire_close(&wire);
        wire_wait_metric(&f->daemon, "rambad_jobs_running", 0);
        assert_true(wire_metric(&f->daemon, "rambad_disconnects_total") == before + 1);
        assert_true(wire_metric(&f->daemon, "rambad_completion_tokens_total") < tokens + 900000);
    }
}

/* A reader that takes nothing reaches its limit and is cut off, although it never leaves. */
static void test_slow_reader(void **state)
{
    struct fixture *f = *state;
    const char *body = "{\"prompt\":\"x\",\"max_tokens\":1000000,\"ignore_eos\":true,\"n\":8,"
                       "\"logprobs\":20,\"retrieval\":true,\"stream\":true}";
    const int small = 4096;
    struct wire wire;
    const double before = wire_metric(&f->daemon, "rambad_disconnects_total");
    wire_open(&wire, &f->daemon);
    setsockopt(wire.fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    wire_ask(&wire, "POST", "/v1/completions", "", body, strlen(body));
    wire_wait_metric(&f->daemon, "rambad_disconnects_total", before + 1);
    wire_wait_metric(&f->daemon, "rambad_jobs_running", 0);
    wire_close(&wire);
}

/* ---- metrics ---- */

static bool is_name(const char *text, size_t size)
{
    for (size_t i = 0; i < size; i++)
        if (!((text[i] >= 'a' && text[i] <= 'z') || text[i] == '_' || (i && text[i] <= '9')))
            return false;
    return size > 7 && memcmp(text, "rambad_", 7) == 0;
}

/* Every line is a comment of its metric or a sample of the metric announced last. */
static void test_metrics(void **state)
{
    struct fixture *f = *state;
    struct wire_answer answer;
    char type[64], name[128] = "", kind[16] = "";
    int samples = 0, histograms = 0;
    double last = 0;
    assert_int_equal(wire_call(&f->daemon, "GET", "/metrics", NULL, &answer), 200);
    assert_true(wire_header(&answer, "content-type", type, sizeof type));
    assert_string_equal(type, "text/plain; version=0.0.4");
    assert_int_equal(answer.body.data[answer.body.size - 1], '\n');
    for (char *line = strtok(answer.body.data, "\n"); line; line = strtok(NULL, "\n")) {
        if (strncmp(line, "# HELP ", 7) == 0) {
            assert_true(strchr(line + 7, ' ') != NULL);
            continue;
        }
        if (strncmp(line, "# TYPE ", 7) == 0) {
            assert_int_equal(sscanf(line + 7, "%127s %15s", name, kind), 2);
            assert_true(strcmp(kind, "counter") == 0 || strcmp(kind, "gauge") == 0 ||
                        strcmp(kind, "histogram") == 0);
            histograms += strcmp(kind, "histogram") == 0;
            last = 0;
            continue;
        }
        const size_t size = strcspn(line, "{ ");
        assert_true(is_name(line, size));
        assert_memory_equal(line, name, strlen(name));
        char *value = strrchr(line, ' '), *end;
        assert_non_null(value);
        const double number = strtod(value, &end);
        assert_true(end > value && *end == 0 && number >= 0);
        if (line[size] == '{')
            assert_int_equal(value[-1], '}');
        const char *rest = line + strlen(name);
        if (strcmp(kind, "histogram") != 0)
            assert_int_equal(size, strlen(name));
        else if (strncmp(rest, "_bucket", 7) == 0 || strncmp(rest, "_count", 6) == 0)
            assert_true(number >= last), last = number; /* +Inf is the count */
        else
            assert_int_equal(strncmp(rest, "_sum ", 5), 0);
        samples++;
    }
    assert_true(samples > 60);
    assert_int_equal(histograms, 6);
    wire_answer_close(&answer);
    /* What this file has done so far is counted. */
    assert_true(wire_metric(&f->daemon, "rambad_requests_total{handler=\"none\",status=\"404\"}") >=
                2);
    assert_true(
        wire_metric(&f->daemon, "rambad_requests_total{handler=\"append\",status=\"200\"}") >= 2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_malformed),
        cmocka_unit_test(test_headers_too_large),
        cmocka_unit_test(test_slow),
        cmocka_unit_test(test_half_an_upload),
        cmocka_unit_test(test_body_too_large),
        cmocka_unit_test(test_routes),
        cmocka_unit_test(test_request_ids),
        cmocka_unit_test(test_pipelining),
        cmocka_unit_test(test_pipelining_much),
        cmocka_unit_test(test_unusual),
        cmocka_unit_test(test_too_many_connections),
        cmocka_unit_test(test_chunked_upload),
        cmocka_unit_test(test_after_upload),
        cmocka_unit_test(test_back_pressure),
        cmocka_unit_test(test_disconnect),
        cmocka_unit_test(test_slow_reader),
        cmocka_unit_test(test_metrics),
    };
    daemon_choose_tests();
    return cmocka_run_group_tests(tests, setup, teardown);
}
