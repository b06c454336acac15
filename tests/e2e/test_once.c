/* Idempotency-Key against the real daemon: what is sent twice happens once and is answered alike,
 * through kill -9 and in the midst of an upload. */
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
#define FILE_BYTES 100000 /* several blocks, so that there is a midst */

static struct daemon daemon_;
static char *folder;
static const char *const flags[] = {"--threads", "1", NULL};

static int post(const char *path, const char *key, const char *headers, const char *body,
                struct wire_answer *answer)
{
    struct wire wire;
    char lines[512];
    snprintf(lines, sizeof lines, "Connection: close\r\nIdempotency-Key: %s\r\n%s", key, headers);
    wire_open(&wire, &daemon_);
    wire_ask(&wire, "POST", path, lines, body, strlen(body));
    wire_answer(&wire, answer, false);
    wire_close(&wire);
    return answer->status;
}

static cJSON *call(const char *path, const char *key, const char *body, int status)
{
    struct wire_answer answer;
    if (post(path, key, "", body, &answer) != status)
        fail_msg("%s: HTTP %d: %s", path, answer.status, buf_text(&answer.body));
    cJSON *json = wire_json(&answer);
    wire_answer_close(&answer);
    return json;
}

static void refused(const char *path, const char *key, const char *body, int status,
                    const char *code, const char *param)
{
    struct wire_answer answer;
    post(path, key, "", body, &answer);
    wire_check_error(&answer, status, code, param);
    wire_answer_close(&answer);
}

static int setup(void **state)
{
    (void)state;
    folder = daemon_begin(&daemon_, MODEL, flags);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    daemon_end(&daemon_, folder);
    return 0;
}

static void test_create(void **state)
{
    (void)state;
    cJSON *first = call("/v1/memories", "create", "{\"metadata\":{\"a\":\"b\"}}", 201);
    cJSON *again = call("/v1/memories", "create", "{\"metadata\":{\"a\":\"b\"}}", 201);
    cJSON *other = call("/v1/memories", "create 2", "{\"metadata\":{\"a\":\"b\"}}", 201);
    assert_true(cJSON_Compare(first, again, true));
    assert_string_not_equal(answer_text(first, "id"), answer_text(other, "id"));
    cJSON_Delete(again);
    daemon_restart(&daemon_);
    again = call("/v1/memories", "create", "{\"metadata\":{\"a\":\"b\"}}", 201);
    assert_true(cJSON_Compare(first, again, true));
    refused("/v1/memories", "create", "{\"metadata\":{\"a\":\"c\"}}", 409, "conflict",
            "Idempotency-Key");
    char body[128], huge[300];
    snprintf(body, sizeof body, "{\"from\":\"%s\",\"at\":1}", answer_text(first, "id"));
    refused("/v1/memories", "at", body, 400, "unsupported", "Idempotency-Key");
    memset(huge, 'k', sizeof huge - 1);
    huge[sizeof huge - 1] = 0;
    refused("/v1/memories", huge, "{}", 400, "invalid", "Idempotency-Key");
    /* What was refused was not done: the key is free. */
    refused("/v1/memories", "free", "{\"from\":\"mem_none\"}", 404, "not_found", "from");
    cJSON *freed = call("/v1/memories", "free", "{}", 201);
    cJSON_Delete(freed);
    cJSON_Delete(first);
    cJSON_Delete(again);
    cJSON_Delete(other);
}

/* All but the time that it took. */
static void assert_same_append(cJSON *a, cJSON *b)
{
    cJSON_DeleteItemFromObject(a, "seconds");
    cJSON_DeleteItemFromObject(b, "seconds");
    assert_true(cJSON_Compare(a, b, true));
}

static void test_append(void **state)
{
    (void)state;
    char id[LIMITS_ID_BYTES], path[128];
    struct wire_answer answer;
    daemon_create_memory(&daemon_, NULL, id);
    snprintf(path, sizeof path, "/v1/memories/%s/append", id);
    cJSON *first = call(path, "k", "a raven on a tower", 200);
    cJSON *again = call(path, "k", "a raven on a tower", 200);
    assert_same_append(first, again);
    cJSON_Delete(again);
    assert_int_equal(daemon_get_memory(&daemon_, id).text_bytes, 18);
    cJSON *more = call(path, "l", ", and another", 200);
    assert_int_equal(answer_number(more, "text_bytes"), 31);
    cJSON_Delete(more);
    daemon_restart(&daemon_);
    again = call(path, "k", "a raven on a tower", 200);
    assert_same_append(first, again);
    cJSON_Delete(again);
    assert_int_equal(
        post(path, "k", "Accept: text/event-stream\r\n", "a raven on a tower", &answer), 200);
    again = answer_events(&answer);
    assert_same_append(first, cJSON_GetArrayItem(again, cJSON_GetArraySize(again) - 1));
    cJSON_Delete(again);
    wire_answer_close(&answer);
    assert_int_equal(daemon_get_memory(&daemon_, id).text_bytes, 31);
    /* The same key for another memory is another one. */
    daemon_create_memory(&daemon_, NULL, id);
    snprintf(path, sizeof path, "/v1/memories/%s/append", id);
    cJSON *other = call(path, "k", "else", 200);
    assert_int_equal(answer_number(other, "text_bytes"), 4);
    cJSON_Delete(other);
    cJSON_Delete(first);
}

static void test_running(void **state)
{
    (void)state;
    char id[LIMITS_ID_BYTES], path[128], value[16];
    struct wire wire;
    struct wire_answer answer;
    daemon_create_memory(&daemon_, NULL, id);
    snprintf(path, sizeof path, "/v1/memories/%s/append", id);
    wire_open(&wire, &daemon_);
    wire_say(&wire,
             "POST %s HTTP/1.1\r\nHost: test\r\nIdempotency-Key: k\r\nContent-Length: 6\r\n\r\nabc",
             path);
    wire_wait_metric(&daemon_, "rambad_jobs_running", 1);
    post(path, "k", "", "abcdef", &answer);
    wire_check_error(&answer, 409, "conflict", NULL);
    assert_true(wire_header(&answer, "retry-after", value, sizeof value));
    wire_answer_close(&answer);
    wire_say(&wire, "def");
    assert_int_equal(wire_answer(&wire, &answer, false), 200);
    wire_answer_close(&answer);
    cJSON *again = call(path, "k", "abcdef", 200);
    assert_int_equal(answer_number(again, "text_bytes"), 6);
    cJSON_Delete(again);
    wire_close(&wire);
    /* One whose client is gone is over, and may come again. */
    wire_open(&wire, &daemon_);
    wire_say(&wire,
             "POST %s HTTP/1.1\r\nHost: test\r\nIdempotency-Key: m\r\nContent-Length: 6\r\n\r\nabc",
             path);
    wire_wait_metric(&daemon_, "rambad_jobs_running", 1);
    wire_close(&wire);
    wire_wait_metric(&daemon_, "rambad_jobs_running", 0);
    again = call(path, "m", "abcdef", 200);
    assert_int_equal(answer_number(again, "text_bytes"), 12);
    cJSON_Delete(again);
}

/* Until the memory holds more than so many bytes of text. */
static void wait_for_commit(const char *id, uint64_t text_bytes)
{
    const double start = daemon_now();
    while (daemon_get_memory(&daemon_, id).text_bytes <= text_bytes)
        if (daemon_now() - start > WIRE_SECONDS)
            fail_msg("nothing of the upload is committed");
}

/* Killed in the midst of an upload: sent again, it is there once, as if nothing had happened. */
static void test_broken_off(void **state)
{
    (void)state;
    char id[LIMITS_ID_BYTES], twin[LIMITS_ID_BYTES], path[128], other[128];
    char *file = malloc(FILE_BYTES + 1);
    struct wire wire;
    struct buf chunks, twins;
    assert_non_null(file);
    for (size_t i = 0; i < FILE_BYTES; i++)
        file[i] = i % 7 == 6 ? ' ' : (char)('a' + (i * i + i / 31) % 26);
    file[FILE_BYTES] = 0;
    daemon_create_memory(&daemon_, NULL, id);
    daemon_create_memory(&daemon_, NULL, twin);
    snprintf(path, sizeof path, "/v1/memories/%s/append", id);
    snprintf(other, sizeof other, "/v1/memories/%s/append", twin);
    cJSON *before = call(path, "before", "first ", 200);
    cJSON_Delete(before);
    before = call(other, "before", "first ", 200);
    cJSON_Delete(before);
    wire_open(&wire, &daemon_);
    wire_ask(&wire, "POST", path, "Accept: text/event-stream\r\nIdempotency-Key: k\r\n", file,
             FILE_BYTES);
    wait_for_commit(id, 6);
    daemon_kill(&daemon_);
    wire_close(&wire);
    daemon_start(&daemon_);
    const struct client_memory broken = daemon_get_memory(&daemon_, id);
    assert_true(broken.text_bytes > 6 && broken.text_bytes < FILE_BYTES);
    print_message("killed at byte %llu\n", (unsigned long long)broken.text_bytes);
    cJSON *whole = call(other, "k", file, 200), *again = call(path, "k", file, 200);
    assert_true(answer_number(again, "tokens") == answer_number(whole, "tokens"));
    assert_int_equal(answer_number(again, "text_bytes"), FILE_BYTES + 6);
    cJSON *third = call(path, "k", file, 200);
    assert_same_append(again, third);
    buf_init(&chunks);
    buf_init(&twins);
    assert_int_equal(daemon_read_chunks(&daemon_, id, &chunks),
                     daemon_read_chunks(&daemon_, twin, &twins));
    assert_int_equal(chunks.size, twins.size);
    assert_memory_equal(chunks.data, twins.data, chunks.size);
    buf_close(&chunks);
    buf_close(&twins);
    cJSON_Delete(whole);
    cJSON_Delete(again);
    cJSON_Delete(third);
    /* Not where the memory was written since. */
    wire_open(&wire, &daemon_);
    wire_ask(&wire, "POST", path, "Accept: text/event-stream\r\nIdempotency-Key: n\r\n", file,
             FILE_BYTES);
    wait_for_commit(id, FILE_BYTES + 6);
    wire_close(&wire);
    wire_wait_metric(&daemon_, "rambad_jobs_running", 0);
    cJSON *between = call(path, "o", "between", 200);
    cJSON_Delete(between);
    refused(path, "n", file, 409, "conflict", "Idempotency-Key");
    free(file);
}

static void test_completion(void **state)
{
    (void)state;
    char id[LIMITS_ID_BYTES], body[512];
    struct wire_answer answer;
    daemon_create_memory(&daemon_, NULL, id);
    snprintf(body, sizeof body,
             "{\"prompt\":\"Once\",\"max_tokens\":9,\"ignore_eos\":true,\"memory\":\"%s\"}", id);
    cJSON *first = call("/v1/completions", "k", body, 200);
    const uint64_t count = daemon_get_memory(&daemon_, id).token_count;
    assert_int_equal(count, 4 + 9);
    cJSON *again = call("/v1/completions", "k", body, 200); /* at a temperature, it was by chance */
    assert_true(cJSON_Compare(first, again, true));
    cJSON_Delete(again);
    daemon_restart(&daemon_);
    again = call("/v1/completions", "k", body, 200);
    assert_true(cJSON_Compare(first, again, true));
    cJSON_Delete(again);
    cJSON *other = call("/v1/completions", "l", body, 200);
    assert_string_not_equal(answer_text(first, "id"), answer_text(other, "id"));
    assert_int_equal(daemon_get_memory(&daemon_, id).token_count, 2 * count);
    cJSON_Delete(other);
    /* Streamed the first time and the second. */
    snprintf(body, sizeof body,
             "{\"prompt\":\"Once\",\"max_tokens\":9,\"ignore_eos\":true,\"memory\":\"%s\","
             "\"stream\":true,\"stream_options\":{\"include_usage\":true}}",
             id);
    refused("/v1/completions", "k", body, 409, "conflict", "Idempotency-Key");
    struct buf texts[2];
    cJSON *events[2];
    for (int i = 0; i < 2; i++) {
        const cJSON *event;
        buf_init(&texts[i]);
        assert_int_equal(post("/v1/completions", "s", "", body, &answer), 200);
        events[i] = answer_events(&answer);
        cJSON_ArrayForEach(event, events[i]) if (answer_at(event, "choices.0"))
            buf_append_text(&texts[i], answer_text(event, "choices.0.text"));
        wire_answer_close(&answer);
    }
    const int last = cJSON_GetArraySize(events[0]) - 1, end = cJSON_GetArraySize(events[1]) - 1;
    assert_string_equal(buf_text(&texts[0]), buf_text(&texts[1]));
    assert_string_equal(answer_text(events[0], "0.id"), answer_text(events[1], "0.id"));
    assert_true(cJSON_Compare(cJSON_GetArrayItem(events[0], last),
                              cJSON_GetArrayItem(events[1], end), true));
    assert_true(cJSON_Compare(cJSON_GetArrayItem(events[0], last - 1),
                              cJSON_GetArrayItem(events[1], end - 1), true));
    assert_int_equal(daemon_get_memory(&daemon_, id).token_count, 3 * count);
    for (int i = 0; i < 2; i++) {
        buf_close(&texts[i]);
        cJSON_Delete(events[i]);
    }
    snprintf(body, sizeof body, "{\"prompt\":\"a\",\"logprobs\":1,\"memory\":\"%s\"}", id);
    refused("/v1/completions", "p", body, 400, "unsupported", "Idempotency-Key");
    cJSON_Delete(first);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_create), cmocka_unit_test(test_append),
                                       cmocka_unit_test(test_running),
                                       cmocka_unit_test(test_broken_off),
                                       cmocka_unit_test(test_completion)};
    return cmocka_run_group_tests_name("once", tests, setup, teardown);
}
