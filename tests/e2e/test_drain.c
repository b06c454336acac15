/* The end of the daemon: SIGTERM lets what runs come to its end, for a while; a second one does
 * not.
 */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/lib/daemon.h"
#include "tests/lib/wire.h"

#define MODEL "tests/golden/wide-stickbreaking-topk8"
#define LONG_TURN                                                                             \
    "{\"prompt\":\"on and on\",\"max_tokens\":1000000,\"temperature\":0,\"ignore_eos\":true," \
    "\"stream\":true}"

static int wait_for_end(struct daemon *daemon)
{
    int how = 0;
    for (double begin = daemon_now(); waitpid(daemon->pid, &how, WNOHANG) == 0; usleep(2000))
        if (daemon_now() - begin > WIRE_SECONDS)
            fail_msg("the daemon does not end");
    daemon->pid = 0;
    return WIFEXITED(how) ? WEXITSTATUS(how) : 128 + WTERMSIG(how);
}

/* Waits for the memory's first commit; the bytes of text that it holds then. */
static uint64_t await_commit(const struct daemon *daemon, const char *id)
{
    uint64_t bytes;
    for (double begin = daemon_now(); !(bytes = daemon_get_memory(daemon, id).text_bytes);
         usleep(2000))
        if (daemon_now() - begin > WIRE_SECONDS)
            fail_msg("nothing is committed");
    return bytes;
}

/* What follows the last `name` in the text. */
static uint64_t last_number(const char *text, const char *name)
{
    const char *last = NULL;
    while ((text = strstr(text, name)))
        last = text += strlen(name);
    assert_non_null(last);
    return strtoull(last, NULL, 10);
}

static void test_drain(void **state)
{
    (void)state;
    struct daemon daemon;
    struct wire turn, keep, late;
    struct wire_answer answer;
    char value[64];
    const char *body = "{\"prompt\":\"x\",\"max_tokens\":2000,\"ignore_eos\":true,\"stream\":true}";
    /* A machine may be busy for longer than the 30 s of the default. */
    char *folder = daemon_begin(
        &daemon, MODEL, (const char *const[]){"--threads", "1", "--drain-timeout", "3600", NULL});
    wire_open(&keep, &daemon); /* an idle connection is closed */
    wire_ask(&keep, "GET", "/health/ready", "", NULL, 0);
    assert_int_equal(wire_answer(&keep, &answer, false), 200);
    wire_answer_close(&answer);
    wire_open(&late, &daemon); /* its body ends after the signal */
    wire_say(&late, "POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 14\r\n\r\n{\"pro");
    wire_open(&turn, &daemon);
    wire_ask(&turn, "POST", "/v1/completions", "", body, strlen(body));
    assert_true(wire_wait_for(&turn, "data: {"));
    kill(daemon.pid, SIGTERM);
    assert_true(wire_ends(&keep, NULL));
    wire_call(&daemon, "GET", "/health/ready", NULL, &answer);
    assert_int_equal(answer.status, 503);
    wire_answer_close(&answer);
    wire_call(&daemon, "GET", "/health/live", NULL, &answer);
    assert_int_equal(answer.status, 200);
    wire_answer_close(&answer);
    wire_call(&daemon, "POST", "/v1/memories", "{}", &answer);
    wire_check_error(&answer, 503, "unavailable", NULL);
    assert_true(wire_header(&answer, "retry-after", value, sizeof value));
    assert_true(wire_header(&answer, "connection", value, sizeof value));
    wire_answer_close(&answer);
    wire_say(&late, "mpt\":\"x\"}");
    wire_answer(&late, &answer, false);
    wire_check_error(&answer, 503, "unavailable", NULL);
    wire_answer_close(&answer);
    assert_int_equal(wire_answer(&turn, &answer, false), 200); /* to its last token */
    assert_non_null(strstr(answer.body.data, "\"finish_reason\":\"length\""));
    assert_string_equal(answer.body.data + answer.body.size - 16, "\n\ndata: [DONE]\n\n");
    assert_true(wire_ends(&turn, NULL));
    wire_answer_close(&answer);
    assert_int_equal(wait_for_end(&daemon), 0);
    wire_close(&turn);
    wire_close(&keep);
    wire_close(&late);
    daemon_end(&daemon, folder);
}

/* What does not end within --drain-timeout is cut off: an append keeps what was committed. */
static void test_drain_deadline(void **state)
{
    (void)state;
    struct daemon daemon;
    struct wire upload, turn;
    struct wire_answer answer;
    char id[LIMITS_ID_BYTES], path[96], text[4096];
    char *folder = daemon_begin(
        &daemon, MODEL,
        (const char *const[]){"--backend", "cpu", /* whose blocks of an append are small */
                              "--threads", "1", "--drain-timeout", "1", /* until a commit: */
                              "--body-timeout", "3600", NULL});
    memset(text, 'a', sizeof text);
    daemon_create_memory(&daemon, NULL, id);
    snprintf(path, sizeof path, "/v1/memories/%s/append", id);
    wire_open(&upload, &daemon);
    wire_say(&upload,
             "POST %s HTTP/1.1\r\nHost: t\r\nAccept: text/event-stream\r\n"
             "Content-Length: 1000000\r\n\r\n",
             path);
    for (int i = 0; i < 12; i++)
        wire_send(&upload, text, sizeof text);
    const uint64_t before = await_commit(&daemon, id);
    wire_open(&turn, &daemon);
    wire_ask(&turn, "POST", "/v1/completions", "", LONG_TURN, strlen(LONG_TURN));
    assert_true(wire_wait_for(&turn, "data: {"));
    const double begin = daemon_now();
    kill(daemon.pid, SIGTERM);
    assert_int_equal(wire_answer(&turn, &answer, false), 200);
    assert_non_null(strstr(answer.body.data, "data: {\"error\":{"));
    assert_non_null(strstr(answer.body.data, "\"code\":\"unavailable\""));
    assert_null(strstr(answer.body.data, "[DONE]"));
    wire_answer_close(&answer);
    assert_int_equal(wire_answer(&upload, &answer, false), 200);
    assert_non_null(strstr(answer.body.data, "\"code\":\"unavailable\""));
    const uint64_t told = last_number(answer.body.data, "\"text_bytes\":");
    wire_answer_close(&answer);
    assert_int_equal(wait_for_end(&daemon), 0);
    assert_true(daemon_now() - begin >= 1);
    daemon_check(&daemon);
    daemon_start(&daemon);
    const struct client_memory memory = daemon_get_memory(&daemon, id);
    assert_true(told >= before && memory.text_bytes >= told);
    assert_true(memory.text_bytes <= 12 * sizeof text);
    wire_close(&upload);
    wire_close(&turn);
    daemon_end(&daemon, folder);
}

static void test_second_signal(void **state)
{
    (void)state;
    struct daemon daemon;
    struct wire turn;
    char *folder = daemon_begin(
        &daemon, MODEL, (const char *const[]){"--threads", "1", "--drain-timeout", "3600", NULL});
    wire_open(&turn, &daemon);
    wire_ask(&turn, "POST", "/v1/completions", "", LONG_TURN, strlen(LONG_TURN));
    assert_true(wire_wait_for(&turn, "data: {"));
    kill(daemon.pid, SIGTERM);
    usleep(300000);
    assert_int_equal(waitpid(daemon.pid, NULL, WNOHANG), 0); /* it waits for the turn */
    kill(daemon.pid, SIGTERM);
    assert_int_equal(wait_for_end(&daemon), 1);
    wire_close(&turn);
    daemon_end(&daemon, folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_drain),
                                       cmocka_unit_test(test_drain_deadline),
                                       cmocka_unit_test(test_second_signal)};
    return cmocka_run_group_tests_name("drain", tests, NULL, NULL);
}
