/* Web pages of other origins: nothing for them unless --cors-origin names them, then all that a
 * browser asks for; without keys they are turned away, since they could write without reading. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/lib/daemon.h"
#include "tests/lib/wire.h"

#define MODEL "tests/golden/wide-stickbreaking-topk8"
#define PAGE "https://app.example.com"
#define PREFLIGHT \
    "Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: x-stainless-os\r\n"

static struct daemon server;
static char *folder;

static void begin(const char *const *flags)
{
    folder = daemon_begin(&server, MODEL, flags);
}

static void end(void)
{
    daemon_end(&server, folder);
    unsetenv("RAMBAD_API_KEY");
}

/* A call of a page of `origin` (NULL: of no page). */
static void call(const char *method, const char *path, const char *origin, const char *headers,
                 const char *body, int status, struct wire_answer *answer)
{
    struct wire wire;
    char lines[512];
    snprintf(lines, sizeof lines, "%s%s%s%s", origin ? "Origin: " : "", origin ? origin : "",
             origin ? "\r\n" : "", headers);
    wire_open(&wire, &server);
    wire_ask(&wire, method, path, lines, body, body ? strlen(body) : 0);
    wire_answer(&wire, answer, false);
    if (answer->status != status)
        fail_msg("%s %s for %s: %d, not %d: %s", method, path, origin ? origin : "nobody",
                 answer->status, status, buf_text(&answer->body));
    wire_close(&wire);
}

static void check_header(struct wire_answer *answer, const char *name, const char *expected)
{
    char value[256];
    if (!wire_header(answer, name, value, sizeof value))
        fail_msg("there is no %s", name);
    assert_string_equal(value, expected);
}

static void check_no_header(struct wire_answer *answer, const char *name)
{
    char value[256];
    if (wire_header(answer, name, value, sizeof value))
        fail_msg("%s: %s", name, value);
}

/* No answer for a browser to show, whatever is asked. */
static void check_nothing(struct wire_answer *answer)
{
    check_no_header(answer, "access-control-allow-origin");
    check_no_header(answer, "access-control-allow-methods");
    check_no_header(answer, "access-control-allow-headers");
    wire_answer_close(answer);
}

static void test_off(void **state)
{
    (void)state;
    struct wire_answer answer;
    begin((const char *const[]){"--threads", "1", NULL});
    call("OPTIONS", "/v1/memories", PAGE, PREFLIGHT, NULL, 403, &answer);
    check_no_header(&answer, "vary");
    check_nothing(&answer);
    /* What a form can send needs no preflight: it is refused, not only hidden. */
    call("POST", "/v1/memories", PAGE, "Content-Type: text/plain\r\n", "{}", 403, &answer);
    wire_check_error(&answer, 403, "forbidden", NULL);
    check_nothing(&answer);
    call("GET", "/v1/memories", "null", "", NULL, 403, &answer);
    check_nothing(&answer);
    call("GET", "/health/live", PAGE, "", NULL, 200, &answer);
    check_nothing(&answer);
    /* The server's own pages may, and who is no page. */
    call("POST", "/v1/memories", "http://test", "", "{}", 201, &answer); /* as in "Host" */
    check_nothing(&answer);
    call("POST", "/v1/memories", NULL, "", "{}", 201, &answer);
    check_nothing(&answer);
    call("POST", "/v1/memories", "http://test:81", "", "{}", 403, &answer);
    check_nothing(&answer);
    end();
}

static void test_named(void **state)
{
    (void)state;
    struct wire_answer answer;
    setenv("RAMBAD_API_KEY", "a key of many letters", 1);
    begin((const char *const[]){"--threads", "1", "--cors-origin", "http://localhost:3000, " PAGE,
                                NULL});
    call("OPTIONS", "/v1/memories", PAGE, PREFLIGHT, NULL, 200, &answer); /* it sends no key */
    check_header(&answer, "access-control-allow-origin", PAGE);
    check_header(&answer, "access-control-allow-methods", "POST, GET, HEAD");
    check_header(&answer, "access-control-allow-headers", "authorization, *");
    check_header(&answer, "access-control-max-age", "7200");
    check_header(&answer, "vary", "origin");
    check_header(&answer, "content-length", "0");
    wire_answer_close(&answer);
    call("OPTIONS", "/v1/memories/mem_x/turns", PAGE, PREFLIGHT, NULL, 200, &answer);
    check_header(&answer, "access-control-allow-methods", "GET, HEAD, POST, DELETE");
    wire_answer_close(&answer);
    call("OPTIONS", "/v1/nothing", PAGE, PREFLIGHT, NULL, 401, &answer); /* not even that */
    wire_answer_close(&answer);
    call("OPTIONS", "/v1/memories", PAGE, "", NULL, 401, &answer); /* no preflight */
    check_header(&answer, "access-control-allow-origin", PAGE);
    wire_answer_close(&answer);
    call("OPTIONS", "/v1/memories", "https://evil.example.com", PREFLIGHT, NULL, 401, &answer);
    check_header(&answer, "vary", "origin");
    check_nothing(&answer);
    call("OPTIONS", "/v1/memories", PAGE ".evil.com", PREFLIGHT, NULL, 401, &answer);
    check_nothing(&answer);

    /* An error is for the page to read, too. */
    call("POST", "/v1/memories", PAGE, "", "{}", 401, &answer);
    check_header(&answer, "access-control-allow-origin", PAGE);
    wire_answer_close(&answer);
    call("POST", "/v1/memories", "http://localhost:3000",
         "Authorization: Bearer a key of many letters\r\n", "{}", 201, &answer);
    check_header(&answer, "access-control-allow-origin", "http://localhost:3000");
    check_header(&answer, "access-control-expose-headers",
                 "x-request-id, retry-after, retry-after-ms, x-should-retry");
    wire_answer_close(&answer);
    call("POST", "/v1/completions", PAGE, "Authorization: Bearer a key of many letters\r\n",
         "{\"prompt\":\"x\",\"max_tokens\":2,\"stream\":true}", 200, &answer);
    check_header(&answer, "access-control-allow-origin", PAGE);
    assert_non_null(strstr(buf_text(&answer.body), "[DONE]"));
    wire_answer_close(&answer);
    /* With a key, it is the key that decides. */
    call("POST", "/v1/memories", "https://evil.example.com",
         "Authorization: Bearer a key of many letters\r\n", "{}", 201, &answer);
    check_nothing(&answer);
    end();
}

static void test_any(void **state)
{
    (void)state;
    struct wire_answer answer;
    begin((const char *const[]){"--threads", "1", "--cors-origin", "*", NULL});
    call("OPTIONS", "/v1/completions", "null", PREFLIGHT, NULL, 200, &answer);
    check_header(&answer, "access-control-allow-origin", "*");
    check_header(&answer, "access-control-allow-methods", "POST");
    check_no_header(&answer, "vary");
    wire_answer_close(&answer);
    call("POST", "/v1/memories", PAGE, "", "{}", 201, &answer);
    check_header(&answer, "access-control-allow-origin", "*");
    wire_answer_close(&answer);
    call("POST", "/v1/memories", NULL, "", "{}", 201, &answer);
    check_no_header(&answer, "access-control-allow-origin");
    wire_answer_close(&answer);
    end();
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_off), cmocka_unit_test(test_named),
                                       cmocka_unit_test(test_any)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
