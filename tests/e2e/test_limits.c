/* Quotas and ends of memories against the real daemon: what does not fit is refused with a message
 * that names the limit, what was acknowledged stays, and a memory ends when its time is over and
 * nobody uses it. PATCH changes both, and metadata. */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/lib/answer.h"
#include "tests/lib/daemon.h"
#include "tests/lib/store_helper.h"
#include "tests/lib/wire.h"

#define MODEL "tests/golden/wide-stickbreaking-topk8"

static struct daemon daemon_;
static char *folder, keys[1024], ann[64], bob[64];
static struct buf book;

static int ask(const char *key, const char *method, const char *path, const char *body, size_t size,
               struct wire_answer *answer)
{
    struct wire wire;
    char headers[160];
    snprintf(headers, sizeof headers, "Connection: close\r\nAuthorization: Bearer %s\r\n", key);
    wire_open(&wire, &daemon_);
    wire_ask(&wire, method, path, headers, body, size);
    wire_answer(&wire, answer, false);
    wire_close(&wire);
    return answer->status;
}

static cJSON *call(const char *key, const char *method, const char *path, const char *body,
                   int status)
{
    struct wire_answer answer;
    if (ask(key, method, path, body, body ? strlen(body) : 0, &answer) != status)
        fail_msg("%s %s: HTTP %d: %s", method, path, answer.status, buf_text(&answer.body));
    cJSON *json = wire_json(&answer);
    wire_answer_close(&answer);
    return json;
}

/* Every key of the file that belongs to `name` gets this quota, and the daemon is told. */
static void set_quota(const char *name, const char *quota)
{
    struct buf text;
    char line[256];
    buf_init(&text);
    FILE *file = fopen(keys, "r");
    assert_non_null(file);
    while (fgets(line, sizeof line, file)) {
        char *end = strstr(line, " quota=");
        line[end ? (size_t)(end - line) : strcspn(line, "\n")] = 0;
        const bool is_hers = strncmp(line, name, strlen(name)) == 0;
        buf_append_format(&text, "%s%s%s\n", line, is_hers ? " quota=" : "", is_hers ? quota : "");
    }
    fclose(file);
    file = fopen(keys, "w");
    assert_non_null(file);
    assert_int_equal(fwrite(text.data, 1, text.size, file), text.size);
    fclose(file);
    buf_close(&text);
    if (daemon_.pid)
        daemon_reread_keys(&daemon_);
}

static double metric(const char *name)
{
    struct wire_answer answer;
    char line[128];
    assert_int_equal(ask(bob, "GET", "/metrics", NULL, 0, &answer), 200);
    snprintf(line, sizeof line, "\n%s ", name);
    const char *at = strstr(buf_text(&answer.body), line);
    assert_non_null(at);
    const double value = strtod(at + strlen(line), NULL);
    wire_answer_close(&answer);
    return value;
}

static void new_memory(const char *key, const char *body, char id[LIMITS_ID_BYTES])
{
    cJSON *json = call(key, "POST", "/v1/memories", body, 201);
    snprintf(id, LIMITS_ID_BYTES, "%s", answer_text(json, "id"));
    cJSON_Delete(json);
}

static double number_of(const char *key, const char *id, const char *field)
{
    char path[160];
    snprintf(path, sizeof path, "/v1/memories/%s", id);
    cJSON *json = call(key, "GET", path, NULL, 200);
    const double number = answer_number(json, field);
    cJSON_Delete(json);
    return number;
}

/* Appends bytes of the book behind what the memory holds. */
static int append(const char *key, const char *id, size_t size, struct wire_answer *answer)
{
    char path[160];
    const size_t at = (size_t)number_of(key, id, "text_bytes");
    snprintf(path, sizeof path, "/v1/memories/%s/append?offset=%zu", id, at);
    struct wire wire;
    char headers[200];
    snprintf(headers, sizeof headers,
             "Connection: close\r\nContent-Type: text/plain\r\nAuthorization: Bearer %s\r\n", key);
    wire_open(&wire, &daemon_);
    wire_ask(&wire, "POST", path, headers, book.data + at, size);
    wire_answer(&wire, answer, false);
    wire_close(&wire);
    return answer->status;
}

/* Refused, with the code and a message that names the limit; what was told is there. */
static void assert_full(const char *key, const char *id, const char *code, const char *name)
{
    struct wire_answer answer;
    char again[8];
    const double before = number_of(key, id, "text_bytes");
    assert_int_equal(append(key, id, 400000, &answer), 507);
    wire_check_error(&answer, 507, code, NULL);
    assert_non_null(strstr(buf_text(&answer.body), name));
    assert_non_null(strstr(buf_text(&answer.body), "insufficient_quota"));
    assert_true(wire_header(&answer, "x-should-retry", again, sizeof again));
    assert_string_equal(again, "false");
    wire_answer_close(&answer);
    assert_true(number_of(key, id, "text_bytes") >= before);
}

static void append_ok(const char *key, const char *id, size_t size)
{
    struct wire_answer answer;
    if (append(key, id, size, &answer) != 200)
        fail_msg("HTTP %d: %s", answer.status, buf_text(&answer.body));
    wire_answer_close(&answer);
}

static void test_memory_quota(void **state)
{
    char id[LIMITS_ID_BYTES], other[LIMITS_ID_BYTES];
    (void)state;
    new_memory(bob, "{}", id);
    append_ok(bob, id, 20000);
    assert_full(bob, id, "memory_quota_exceeded", "--memory-quota");
    assert_true(number_of(bob, id, "bytes_on_disk") <= 6 << 20);
    assert_true(number_of(bob, id, "text_bytes") >= 20000);
    assert_full(bob, id, "memory_quota_exceeded", "--memory-quota");
    /* Another memory has its own room; and a kill changes nothing of it. */
    new_memory(bob, "{}", other);
    append_ok(bob, other, 20000);
    const double held = number_of(bob, id, "text_bytes");
    daemon_kill(&daemon_);
    daemon_start(&daemon_);
    assert_true(number_of(bob, id, "text_bytes") == held);
    assert_full(bob, id, "memory_quota_exceeded", "--memory-quota");
    /* A rewind makes room. */
    char path[160];
    snprintf(path, sizeof path, "/v1/memories/%s/rewind", id);
    cJSON_Delete(call(bob, "POST", path, "{\"to\":1000}", 200));
    append_ok(bob, id, 20000);
}

static void test_key_quota(void **state)
{
    char first[LIMITS_ID_BYTES], second[LIMITS_ID_BYTES], his[LIMITS_ID_BYTES], path[160];
    (void)state;
    new_memory(ann, "{}", first);
    new_memory(ann, "{}", second);
    new_memory(bob, "{}", his);
    append_ok(ann, first, 30000);
    assert_full(ann, second, "key_quota_exceeded", "of \\\"ann\\\"");
    assert_full(ann, first, "key_quota_exceeded", "quota=");
    append_ok(bob, his, 60000);
    /* A turn as well, once it is less, and a memory; asking does not write. */
    set_quota("ann", "1M");
    char body[256];
    snprintf(body, sizeof body, "{\"prompt\":\"And?\",\"memory\":\"%s\",\"max_tokens\":2}", first);
    struct wire_answer answer;
    ask(ann, "POST", "/v1/completions", body, strlen(body), &answer);
    wire_check_error(&answer, 507, "key_quota_exceeded", NULL);
    wire_answer_close(&answer);
    static const char *const makes[] = {"/v1/memories", "/v1/conversations"};
    for (size_t i = 0; i < sizeof makes / sizeof *makes; i++) {
        ask(ann, "POST", makes[i], "{\"metadata\":{\"a\":\"b\"}}", 22, &answer);
        wire_check_error(&answer, 507, "key_quota_exceeded", NULL);
        wire_answer_close(&answer);
    }
    snprintf(body, sizeof body,
             "{\"prompt\":\"And?\",\"memory\":\"%s\",\"max_tokens\":2,\"memory_write\":false}",
             first);
    cJSON_Delete(call(ann, "POST", "/v1/completions", body, 200));
    assert_true(metric("rambad_quota_refusals_total") >= 3);
    /* More for her: SIGHUP. */
    set_quota("ann", "64M");
    append_ok(ann, first, 20000);
    set_quota("ann", "2M");
    assert_full(ann, first, "key_quota_exceeded", "2097152");
    snprintf(path, sizeof path, "/v1/memories/%s", first);
    cJSON_Delete(call(ann, "DELETE", path, NULL, 200));
    snprintf(path, sizeof path, "/v1/memories/%s", second);
    cJSON_Delete(call(ann, "DELETE", path, NULL, 200));
    usleep(500000); /* the collector frees them */
    new_memory(ann, "{}", first);
    append_ok(ann, first, 10000);
}

static void test_patch(void **state)
{
    char id[LIMITS_ID_BYTES], path[160];
    (void)state;
    new_memory(
        bob,
        "{\"metadata\":{\"a\":\"b\"},\"expires_after\":{\"anchor\":\"created_at\",\"days\":2}}",
        id);
    snprintf(path, sizeof path, "/v1/memories/%s", id);
    cJSON *json = call(bob, "GET", path, NULL, 200);
    assert_string_equal(answer_text(json, "expires_after.anchor"), "created_at");
    assert_true(answer_number(json, "expires_after.seconds") == 172800);
    assert_true(answer_number(json, "expires_at") == answer_number(json, "created_at") + 172800);
    cJSON_Delete(json);
    json = call(bob, "PATCH", path, "{\"metadata\":{\"c\":\"d\"}}", 200);
    assert_string_equal(answer_text(json, "metadata.c"), "d");
    assert_null(answer_at(json, "metadata.a"));
    assert_true(answer_number(json, "expires_after.seconds") == 172800);
    cJSON_Delete(json);
    json = call(bob, "PATCH", path,
                "{\"expires_after\":{\"anchor\":\"last_active_at\",\"seconds\":90}}", 200);
    assert_string_equal(answer_text(json, "metadata.c"), "d");
    assert_string_equal(answer_text(json, "expires_after.anchor"), "last_active_at");
    cJSON_Delete(json);
    json = call(bob, "PATCH", path, "{\"expires_after\":null}", 200);
    assert_true(cJSON_IsNull(answer_at(json, "expires_after")));
    assert_true(cJSON_IsNull(answer_at(json, "expires_at")));
    cJSON_Delete(json);
    static const char *const bad[] = {
        "{\"expires_after\":3}",
        "{\"expires_after\":{}}",
        "{\"expires_after\":{\"anchor\":\"created_at\"}}",
        "{\"expires_after\":{\"anchor\":\"then\",\"days\":1}}",
        "{\"expires_after\":{\"anchor\":\"created_at\",\"days\":0}}",
        "{\"expires_after\":{\"anchor\":\"created_at\",\"days\":36501}}",
        "{\"expires_after\":{\"anchor\":\"created_at\",\"days\":1.5}}",
        "{\"expires_after\":{\"anchor\":\"created_at\",\"days\":1,\"seconds\":1}}",
        "{\"expires_after\":{\"anchor\":\"created_at\",\"days\":1,\"hours\":1}}"};
    struct wire_answer answer;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        ask(bob, "PATCH", path, bad[i], strlen(bad[i]), &answer);
        wire_check_error(&answer, 400, "invalid", "expires_after");
        wire_answer_close(&answer);
    }
    ask(bob, "PATCH", path, "{\"from\":\"x\"}", 12, &answer);
    wire_check_error(&answer, 400, "unsupported", "from");
    wire_answer_close(&answer);
    ask(ann, "PATCH", path, "{}", 2, &answer);
    wire_check_error(&answer, 404, "not_found", NULL);
    wire_answer_close(&answer);
}

/* Whether the memory is there. */
static bool is_there(const char *key, const char *id)
{
    struct wire_answer answer;
    char path[160];
    snprintf(path, sizeof path, "/v1/memories/%s", id);
    const int status = ask(key, "GET", path, NULL, 0, &answer);
    wire_answer_close(&answer);
    assert_true(status == 200 || status == 404);
    return status == 200;
}

/* Waits until the memory is over. */
static void await_end(const char *key, const char *id)
{
    for (const double start = daemon_now(); is_there(key, id); usleep(100000))
        if (daemon_now() - start > WIRE_SECONDS)
            fail_msg("a memory of one second is there long after its last use");
}

static void test_expiry(void **state)
{
    char used[LIMITS_ID_BYTES], idle[LIMITS_ID_BYTES], kept[LIMITS_ID_BYTES], path[400];
    struct wire wire;
    struct wire_answer answer;
    (void)state;
    new_memory(bob, "{\"expires_after\":{\"anchor\":\"created_at\",\"seconds\":1}}", idle);
    new_memory(bob, "{\"expires_after\":{\"anchor\":\"created_at\",\"seconds\":1}}", used);
    new_memory(bob, "{\"expires_after\":{\"anchor\":\"created_at\",\"days\":1}}", kept);
    /* An upload that goes on for as long as the first sweeps: its memory stays. */
    snprintf(path, sizeof path,
             "POST /v1/memories/%s/append HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n"
             "Authorization: Bearer %s\r\nContent-Length: 40000\r\n\r\n",
             used, bob);
    wire_open(&wire, &daemon_);
    wire_send(&wire, path, strlen(path));
    wire_send(&wire, book.data, 20000);
    await_end(bob, idle);
    usleep((LIMITS_EXPIRY_SWEEP_MS + 500) * 1000);
    assert_true(is_there(bob, used));
    wire_send(&wire, book.data + 20000, 20000);
    assert_int_equal(wire_answer(&wire, &answer, false), 200);
    wire_answer_close(&answer);
    wire_close(&wire);
    await_end(bob, used);
    assert_true(is_there(bob, kept));
    assert_true(metric("rambad_expired_total") >= 2);
}

static int setup(void **state)
{
    static const char *flags[] = {"--memory-quota", "6M", "--keys", keys, "--threads", "1", NULL};
    (void)state;
    folder = store_helper_folder();
    snprintf(keys, sizeof keys, "%s/keys", folder);
    daemon_init(&daemon_, MODEL, folder, "data");
    daemon_.flags = flags;
    daemon_new_key(&daemon_, "ann", keys, ann);
    daemon_new_key(&daemon_, "bob", keys, bob);
    set_quota("ann", "5M");
    buf_init(&book);
    daemon_write_book(&book, 90000);
    daemon_start(&daemon_);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    daemon_stop(&daemon_);
    daemon_check(&daemon_);
    store_helper_remove(folder);
    buf_close(&book);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_memory_quota),
        cmocka_unit_test(test_key_quota),
        cmocka_unit_test(test_patch),
        cmocka_unit_test(test_expiry),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
