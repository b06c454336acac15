/* What waits, and for how long: the order of turns, timeouts, a full queue and when to come again,
 * parts by the weights of keys. One place at the engine, so that the rest waits. */
#include <cjson/cJSON.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/lib/answer.h"
#include "tests/lib/daemon.h"
#include "tests/lib/wire.h"

#define MODEL "tests/golden/wide-stickbreaking-topk8"
#define ANSWER "\"temperature\":0,\"ignore_eos\":true,\"prompt\":\"x\","
#define LONG "{\"max_tokens\":1000000,\"stream\":true," ANSWER

static struct daemon daemon_;
static char *folder;
static char keys[1100];
static const char *const flags[] = {
    "--threads",        "1",   "--running",        "1", "--queue", "3", "--queue-tokens", "64",
    "--running-memory", "64M", "--session-memory", "1", NULL};

static void ask(struct wire *wire, const char *headers, const char *body)
{
    wire_open(wire, &daemon_);
    wire_ask(wire, "POST", "/v1/completions", headers, body, strlen(body));
}

/* Holds the engine's one place. */
static void occupy(struct wire *wire)
{
    ask(wire, "", LONG "\"priority\":0}");
    assert_true(wire_wait_for(wire, "data: {"));
}

static void refused(const char *body, int status, const char *code, const char *param)
{
    struct wire wire;
    struct wire_answer answer;
    ask(&wire, "", body);
    wire_answer(&wire, &answer, false);
    wire_check_error(&answer, status, code, param);
    wire_answer_close(&answer);
    wire_close(&wire);
}

static void test_fields(void **state)
{
    (void)state;
    struct wire_answer answer;
    refused("{" ANSWER "\"priority\":3601}", 400, "invalid", "priority");
    refused("{" ANSWER "\"priority\":\"high\"}", 400, "invalid", "priority");
    refused("{" ANSWER "\"timeout\":0}", 400, "invalid", "timeout");
    static const char *const wrong[] = {"timeout=", "timeout=0", "timeout=1s", "priority=x",
                                        "priority=99999"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        char path[128];
        snprintf(path, sizeof path, "/v1/memories/mem_0/append?%s", wrong[i]);
        wire_call(&daemon_, "POST", path, "text", &answer);
        wire_check_error(&answer, 400, "invalid", *wrong[i] == 't' ? "timeout" : "priority");
        wire_answer_close(&answer);
    }
}

/* The later one is sooner when it asks for it, the earlier one when it lets pass. */
static void test_priority(void **state)
{
    (void)state;
    struct wire first, later, sooner;
    occupy(&first);
    ask(&later, "", LONG "\"priority\":0}");
    wire_wait_metric(&daemon_, "rambad_jobs_waiting", 1);
    ask(&sooner, "", LONG "\"priority\":-100}");
    wire_wait_metric(&daemon_, "rambad_jobs_waiting", 2);
    wire_close(&first);
    assert_true(wire_wait_for(&sooner, "data: {"));
    assert_int_equal(later.in.size, 0);
    assert_int_equal(wire_metric(&daemon_, "rambad_jobs_waiting"), 1);
    wire_close(&sooner);
    assert_true(wire_wait_for(&later, "data: {"));
    wire_close(&later);
    wire_wait_metric(&daemon_, "rambad_jobs_running", 0);
}

static void test_timeout_in_queue(void **state)
{
    (void)state;
    struct wire first, second;
    struct wire_answer answer;
    char value[64];
    occupy(&first);
    const double begin = daemon_now();
    ask(&second, "", "{" ANSWER "\"timeout\":0.3}");
    wire_answer(&second, &answer, false);
    const double waited = daemon_now() - begin;
    assert_true(waited >= 0.3); /* and long before the first one ends */
    wire_check_error(&answer, 408, "timeout", "timeout");
    assert_non_null(strstr(buf_text(&answer.body), "for its turn"));
    assert_true(wire_header(&answer, "x-should-retry", value, sizeof value));
    assert_string_equal(value, "false");
    wire_answer_close(&answer);
    wire_close(&second);
    assert_int_equal(wire_metric(&daemon_, "rambad_jobs_waiting"), 0);
    wire_wait_metric(&daemon_, "rambad_timeouts_total{where=\"queue\"}", 1);
    wire_wait_metric(&daemon_, "rambad_jobs{state=\"decode\"}", 1);
    wire_close(&first);
    wire_wait_metric(&daemon_, "rambad_jobs_running", 0);
}

/* One that is at work is cut: a stream by an error, a memory at its last commit. */
static void test_timeout_at_work(void **state)
{
    (void)state;
    struct wire wire;
    char id[LIMITS_ID_BYTES], body[512], path[128];
    struct wire_answer answer;
    daemon_create_memory(&daemon_, NULL, id);
    snprintf(body, sizeof body, LONG "\"timeout\":0.3,\"memory\":\"%s\"}", id);
    ask(&wire, "", body);
    assert_true(wire_wait_for(&wire, "data: {\"error\":"));
    assert_true(wire_wait_for(&wire, "\"code\":\"timeout\""));
    wire_close(&wire);
    assert_int_equal(daemon_get_memory(&daemon_, id).token_count, 0);
    /* An upload whose text does not come. */
    snprintf(path, sizeof path, "/v1/memories/%s/append?timeout=0.3", id);
    wire_open(&wire, &daemon_);
    wire_say(&wire,
             "POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n"
             "Content-Length: 100\r\n\r\nabc",
             path);
    wire_answer(&wire, &answer, false);
    wire_check_error(&answer, 408, "timeout", "timeout");
    wire_answer_close(&answer);
    wire_close(&wire);
    wire_wait_metric(&daemon_, "rambad_jobs_running", 0);
}

static double retry_after(struct wire *wire)
{
    struct wire_answer answer;
    char ms[64], s[64];
    wire_answer(wire, &answer, false);
    wire_check_error(&answer, 429, "busy", NULL);
    assert_true(wire_header(&answer, "retry-after-ms", ms, sizeof ms));
    assert_true(wire_header(&answer, "retry-after", s, sizeof s));
    const double seconds = atof(ms) * 1e-3;
    assert_true(seconds > 0 && atof(s) >= seconds && atof(s) < seconds + 1);
    wire_answer_close(&answer);
    return seconds;
}

static void test_full(void **state)
{
    (void)state;
    struct wire first, waiting[3], refuse;
    occupy(&first);
    /* In tokens: one of 40 waits (a token is a byte here), one more is too many. */
    char body[256];
    snprintf(body, sizeof body, "{\"prompt\":\"%040d\",\"max_tokens\":1}", 0);
    ask(&waiting[0], "", body);
    wire_wait_metric(&daemon_, "rambad_jobs_waiting", 1);
    ask(&refuse, "", body);
    retry_after(&refuse);
    wire_close(&refuse);
    /* In requests. */
    for (int i = 1; i < 3; i++) {
        ask(&waiting[i], "", "{\"prompt\":\"y\",\"max_tokens\":1}");
        wire_wait_metric(&daemon_, "rambad_jobs_waiting", i + 1);
    }
    ask(&refuse, "", "{\"prompt\":\"y\",\"max_tokens\":1}");
    const double once = retry_after(&refuse);
    assert_int_equal(wire_metric(&daemon_, "rambad_refused_total{reason=\"tokens\"}"), 1);
    assert_int_equal(wire_metric(&daemon_, "rambad_refused_total{reason=\"requests\"}"), 1);
    wire_close(&refuse);
    ask(&refuse, "", "{\"prompt\":\"y\",\"max_tokens\":1}");
    assert_true(retry_after(&refuse) >= once); /* behind the one before */
    wire_close(&refuse);
    wire_close(&first);
    for (int i = 0; i < 3; i++) {
        struct wire_answer answer;
        assert_int_equal(wire_answer(&waiting[i], &answer, false), 200);
        wire_answer_close(&answer);
        wire_close(&waiting[i]);
    }
}

/* What can never have room is refused at once, and says of what there is too little. */
static void test_too_large(void **state)
{
    (void)state;
    refused("{" ANSWER "\"max_tokens\":16000000,\"n\":128}", 413, "too_large", NULL);
}

/* ---- what is told of it ---- */

static bool log_says(const char *text)
{
    FILE *file = fopen(daemon_.log, "re");
    char line[4096];
    bool found = false;
    assert_non_null(file);
    while (!found && fgets(line, sizeof line, file))
        found = strstr(line, "\"cache_miss\"") && strstr(line, text);
    fclose(file);
    return found;
}

static void write_turn(const char *id)
{
    char body[256];
    struct wire_answer answer;
    snprintf(body, sizeof body, "{" ANSWER "\"max_tokens\":2,\"memory\":\"%s\"}", id);
    assert_int_equal(wire_call(&daemon_, "POST", "/v1/completions", body, &answer), 200);
    wire_answer_close(&answer);
}

/* A memory that is not in RAM when it is asked for: the log says why. */
static void test_miss(void **state)
{
    (void)state;
    char id[LIMITS_ID_BYTES], evicted[128], first_use[128];
    daemon_create_memory(&daemon_, NULL, id);
    write_turn(id); /* and out of RAM again: there is room for none */
    snprintf(evicted, sizeof evicted, "\"memory\":\"%s\",\"reason\":\"evicted\"", id);
    snprintf(first_use, sizeof first_use, "\"memory\":\"%s\",\"reason\":\"first_use\"", id);
    assert_false(log_says(id));
    write_turn(id);
    assert_true(log_says(evicted));
    assert_false(log_says(first_use));
    daemon_stop(&daemon_);
    daemon_start(&daemon_);
    write_turn(id);
    assert_true(log_says(first_use));
}

/* ---- weights ---- */

enum { LIGHT, HEAVY, KEYS };
static const char *const names[KEYS] = {"light", "heavy"};
static const double weights[KEYS] = {1, 3};
static const int shares[KEYS] = {25,
                                 75}; /* requests of each: they run dry at about the same time */

static void new_key(const char *name, const char *weight, char key[64], char headers[128])
{
    char command[3072];
    daemon_new_key(&daemon_, name, keys, key);
    snprintf(command, sizeof command, "sed -i '/^%s /s/$/%s/' '%s'", name, weight, keys);
    assert_int_equal(system(command), 0);
    snprintf(headers, 128, "Authorization: Bearer %s\r\nConnection: close\r\n", key);
}

/* The next job of one of the keys that the log tells of; its key. */
static int next_job(FILE *log, double *seconds)
{
    char line[4096];
    int key = KEYS;
    while (key == KEYS) {
        if (!fgets(line, sizeof line, log))
            fail_msg("the log does not tell of all jobs");
        cJSON *json = strstr(line, "\"event\":\"job\"") ? cJSON_Parse(line) : NULL;
        for (key = 0; key < KEYS; key++)
            if (json && strcmp(answer_text(json, "key"), names[key]) == 0)
                break;
        if (key < KEYS)
            *seconds = answer_number(json, "key_engine_seconds");
        cJSON_Delete(json);
    }
    return key;
}

/* As long as both want something, each job is of the key that has had less for its weight: whatever
 * steps take on a busy machine. */
static void check_order(void)
{
    double used[KEYS] = {0};
    int left[KEYS] = {shares[LIGHT], shares[HEAVY]};
    FILE *log = fopen(daemon_.log, "re");
    assert_non_null(log);
    while (left[LIGHT] && left[HEAVY]) {
        double seconds = 0;
        const int key = next_job(log, &seconds), other = KEYS - 1 - key;
        if (used[key] > used[other] * (1 + 1e-5)) /* the log has six digits */
            fail_msg("%s had a turn after %g s, %s had had %g s", names[key],
                     used[key] * weights[key], names[other], used[other] * weights[other]);
        assert_true(seconds > used[key] * weights[key]);
        used[key] = seconds / weights[key];
        left[key]--;
    }
    fclose(log);
    print_message("left when the other had none: %d of weight 1, %d of weight 3; %g and %g s\n",
                  left[LIGHT], left[HEAVY], used[LIGHT], used[HEAVY] * weights[HEAVY]);
}

static void test_weights(void **state)
{
    (void)state;
    static const char *const body = "{\"max_tokens\":60," ANSWER "\"n\":1}";
    struct wire holder, wires[100];
    char key[64], headers[KEYS][128], others[128];
    const char *const *before = daemon_.flags;
    int count = 0;
    new_key(names[LIGHT], "", key, headers[LIGHT]);
    new_key(names[HEAVY], " weight=3", key, headers[HEAVY]);
    new_key("holder", "", key, others);
    daemon_stop(&daemon_);
    daemon_.flags =
        (const char *const[]){"--threads", "1",  "--running",   "1",     "--queue", "100",
                              "--keys",    keys, "--log-level", "debug", NULL};
    daemon_.key = key;
    daemon_start(&daemon_);
    ask(&holder, others, LONG "\"priority\":0}");
    assert_true(wire_wait_for(&holder, "data: {"));
    for (int k = 0; k < KEYS; k++)
        for (int i = 0; i < shares[k]; i++)
            ask(&wires[count++], headers[k], body);
    wire_wait_metric(&daemon_, "rambad_jobs_waiting", count);
    wire_close(&holder);
    for (int i = 0; i < count; i++) {
        struct wire_answer answer;
        assert_int_equal(wire_answer(&wires[i], &answer, false), 200);
        wire_answer_close(&answer);
        wire_close(&wires[i]);
    }
    wire_wait_metric(&daemon_, "rambad_jobs_running", 0);
    check_order();
    daemon_stop(&daemon_);
    daemon_.flags = before;
    daemon_.key = NULL;
    daemon_start(&daemon_);
}

static int setup(void **state)
{
    (void)state;
    folder = daemon_begin(&daemon_, MODEL, flags);
    snprintf(keys, sizeof keys, "%s.keys", daemon_.data);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    remove(keys);
    daemon_end(&daemon_, folder);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fields),
        cmocka_unit_test(test_priority),
        cmocka_unit_test(test_timeout_in_queue),
        cmocka_unit_test(test_timeout_at_work),
        cmocka_unit_test(test_full),
        cmocka_unit_test(test_too_large),
        cmocka_unit_test(test_miss),
        cmocka_unit_test(test_weights),
    };
    return cmocka_run_group_tests_name("sched", tests, setup, teardown);
}
