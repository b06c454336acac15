/* API keys against the real daemon: nobody is let in without one, nobody sees another's memories by
 * any route, whose they are outlives a restart, and keys change while it runs. */
#include <cjson/cJSON.h>
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

#include "tests/lib/daemon.h"
#include "tests/lib/store_helper.h"
#include "tests/lib/wire.h"

#define MODEL "engine/models/ramba-20m"
#define IN_ENVIRONMENT "a key of many letters"

static struct daemon daemon_;
static char *folder, keys[1024];
static char ann[64], bob[64];
static const char *const flags[] = {"--threads", "1", "--keys", keys, NULL};

static const char *once = ""; /* a further header line */

/* A request with a key (NULL: none). Returns its status. */
static int ask(const char *key, const char *method, const char *path, const char *body,
               struct wire_answer *answer)
{
    struct wire wire;
    char headers[256];
    snprintf(headers, sizeof headers, "Connection: close\r\n%s%s%s%s", once,
             key ? "Authorization: Bearer " : "", key ? key : "", key ? "\r\n" : "");
    wire_open(&wire, &daemon_);
    wire_ask(&wire, method, path, headers, body, body ? strlen(body) : 0);
    wire_answer(&wire, answer, strcmp(method, "HEAD") == 0);
    wire_close(&wire);
    return answer->status;
}

static void expect(const char *key, const char *method, const char *path, const char *body,
                   int status)
{
    struct wire_answer answer;
    if (ask(key, method, path, body, &answer) != status)
        fail_msg("%s %s: HTTP %d, not %d: %s", method, path, answer.status, status,
                 buf_text(&answer.body));
    wire_answer_close(&answer);
}

static void refuse(const char *key, const char *method, const char *path, const char *body,
                   int status, const char *code, const char *param)
{
    struct wire_answer answer;
    ask(key, method, path, body, &answer);
    if (answer.status != status)
        print_message("%s %s\n", method, path);
    wire_check_error(&answer, status, code, param);
    wire_answer_close(&answer);
}

/* What a POST of the key's makes. */
static void make(const char *key, const char *path, const char *body, int status,
                 char id[LIMITS_ID_BYTES])
{
    struct wire_answer answer;
    assert_int_equal(ask(key, "POST", path, body, &answer), status);
    cJSON *json = wire_json(&answer);
    snprintf(id, LIMITS_ID_BYTES, "%s", cJSON_GetStringValue(cJSON_GetObjectItem(json, "id")));
    cJSON_Delete(json);
    wire_answer_close(&answer);
}

static void new_memory(const char *key, const char *body, char id[LIMITS_ID_BYTES])
{
    make(key, "/v1/memories", body, 201, id);
}

/* The ids of the key's list, as far as one page goes. */
static cJSON *list(const char *key)
{
    struct wire_answer answer;
    assert_int_equal(ask(key, "GET", "/v1/memories", NULL, &answer), 200);
    cJSON *json = wire_json(&answer);
    wire_answer_close(&answer);
    return json;
}

static void assert_list(const char *key, size_t count, const char *first)
{
    cJSON *json = list(key);
    assert_int_equal(cJSON_GetArraySize(cJSON_GetObjectItem(json, "data")), count);
    if (first)
        assert_string_equal(cJSON_GetStringValue(cJSON_GetObjectItem(json, "first_id")), first);
    cJSON_Delete(json);
}

static int setup(void **state)
{
    (void)state;
    folder = store_helper_folder();
    snprintf(keys, sizeof keys, "%s/keys", folder);
    daemon_init(&daemon_, MODEL, folder, "data");
    daemon_.flags = flags;
    daemon_new_key(&daemon_, "ann", keys, ann);
    daemon_new_key(&daemon_, "bob", keys, bob);
    setenv("RAMBAD_API_KEY", IN_ENVIRONMENT, 1);
    daemon_start(&daemon_);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    daemon_stop(&daemon_);
    daemon_check(&daemon_);
    store_helper_remove(folder);
    return 0;
}

static void test_no_key(void **state)
{
    (void)state;
    struct stat about;
    struct wire_answer answer;
    char value[64];
    assert_int_equal(stat(keys, &about), 0);
    assert_int_equal(about.st_mode & 0777, 0600);
    expect(NULL, "GET", "/health", NULL, 200);
    expect(NULL, "GET", "/health/live", NULL, 200);
    expect(NULL, "GET", "/health/ready", NULL, 200);
    static const char *const paths[] = {
        "/metrics", "/v1/models", "/v1/memories", "/v1/memories/mem_x", "/v1/memories/mem_x/export",
        "/v2"};
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) {
        refuse(NULL, "GET", paths[i], NULL, 401, "unauthorized", NULL);
        refuse("rk_wrong", "GET", paths[i], NULL, 401, "unauthorized", NULL);
    }
    refuse(NULL, "POST", "/v1/completions", "{\"prompt\":\"a\"}", 401, "unauthorized", NULL);
    refuse("", "POST", "/v1/memories", NULL, 401, "unauthorized", NULL);
    refuse(NULL, "POST", "/v1/memories/mem_x/append", "text", 401, "unauthorized", NULL);
    ask(NULL, "GET", "/v1/models", NULL, &answer);
    assert_true(wire_header(&answer, "www-authenticate", value, sizeof value));
    assert_string_equal(value, "Bearer");
    wire_answer_close(&answer);
    expect(ann, "GET", "/metrics", NULL, 200);
    expect(bob, "GET", "/v1/models", NULL, 200);
    expect(IN_ENVIRONMENT, "GET", "/v1/models", NULL, 200);
    expect(ann, "GET", "/v2", NULL, 404);
    /* An upload is turned away before it is read. */
    struct wire wire;
    wire_open(&wire, &daemon_);
    wire_say(&wire, "POST /v1/memories/import HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n");
    assert_int_equal(wire_answer(&wire, &answer, false), 401);
    wire_check_error(&answer, 401, "unauthorized", NULL);
    wire_answer_close(&answer);
    wire_close(&wire);
}

/* Every road to another's memory ends as if it were not there. */
static void refuse_everything(const char *key, const char *id)
{
    static const struct {
        const char *method, *path, *body;
    } roads[] = {{"GET", "", NULL},
                 {"GET", "/chunks", NULL},
                 {"GET", "/export", NULL},
                 {"GET", "/turns", NULL},
                 {"POST", "/append", "my own words"},
                 {"POST", "/turns", "{\"position\":4,\"bookmark\":\"b\"}"},
                 {"DELETE", "/turns?position=4", NULL},
                 {"POST", "/rewind", "{\"to\":2}"},
                 {"DELETE", "", NULL}};
    char path[128], body[256];
    for (size_t i = 0; i < sizeof roads / sizeof *roads; i++) {
        snprintf(path, sizeof path, "/v1/memories/%s%s", id, roads[i].path);
        refuse(key, roads[i].method, path, roads[i].body, 404, "not_found", NULL);
    }
    snprintf(body, sizeof body, "{\"from\":\"%s\"}", id);
    refuse(key, "POST", "/v1/memories", body, 404, "not_found", "from");
    snprintf(body, sizeof body, "{\"from\":\"%s\",\"at\":2}", id);
    refuse(key, "POST", "/v1/memories", body, 404, "not_found", "from");
    for (int write = 0; write < 2; write++) {
        snprintf(body, sizeof body,
                 "{\"prompt\":\"a\",\"max_tokens\":1,\"memory\":\"%s\",\"memory_write\":%s}", id,
                 write ? "true" : "false");
        refuse(key, "POST", "/v1/completions", body, 404, "not_found", NULL);
    }
    snprintf(path, sizeof path, "/v1/memories?after=%s", id);
    refuse(key, "GET", path, NULL, 404, "not_found", NULL);
}

static void test_strangers(void **state)
{
    (void)state;
    char id[LIMITS_ID_BYTES], fork[LIMITS_ID_BYTES], path[128], body[256];
    struct wire_answer file, answer;
    new_memory(ann, "{}", id);
    snprintf(path, sizeof path, "/v1/memories/%s/append", id);
    expect(ann, "POST", path, "what ann has said", 200);
    refuse_everything(bob, id);
    refuse_everything(IN_ENVIRONMENT, id);
    refuse_everything(bob, "mem_none");
    assert_list(ann, 1, id);
    assert_list(bob, 0, NULL);
    /* Nothing of it has changed, and its owner can do all of it. */
    snprintf(path, sizeof path, "/v1/memories/%s", id);
    ask(ann, "GET", path, NULL, &answer);
    cJSON *json = wire_json(&answer);
    assert_int_equal(cJSON_GetNumberValue(cJSON_GetObjectItem(json, "text_bytes")), 17);
    cJSON_Delete(json);
    wire_answer_close(&answer);
    snprintf(body, sizeof body, "{\"from\":\"%s\",\"at\":4}", id); /* read again from its start */
    new_memory(ann, body, fork);
    refuse_everything(bob, fork);
    snprintf(path, sizeof path, "/v1/memories/%s/rewind", fork);
    expect(ann, "POST", path, "{\"to\":2}", 200);
    refuse_everything(bob, fork);
    snprintf(path, sizeof path, "/v1/memories/%s/export", id);
    assert_int_equal(ask(ann, "GET", path, NULL, &file), 200);
    /* A file that is handed over becomes the one's who imports it. */
    struct wire wire;
    char headers[256];
    snprintf(headers, sizeof headers, "Connection: close\r\nAuthorization: Bearer %s\r\n", bob);
    wire_open(&wire, &daemon_);
    wire_ask(&wire, "POST", "/v1/memories/import", headers, file.body.data, file.body.size);
    assert_int_equal(wire_answer(&wire, &answer, false), 201);
    json = wire_json(&answer);
    snprintf(fork, sizeof fork, "%s", cJSON_GetStringValue(cJSON_GetObjectItem(json, "id")));
    cJSON_Delete(json);
    wire_answer_close(&answer);
    wire_answer_close(&file);
    wire_close(&wire);
    refuse_everything(ann, fork);
    assert_list(bob, 1, fork);
    assert_list(ann, 2, NULL);
    /* It is kept with the memory. */
    daemon_kill(&daemon_);
    daemon_start(&daemon_);
    refuse_everything(ann, fork);
    refuse_everything(bob, id);
    assert_list(bob, 1, fork);
    assert_list(ann, 2, NULL);
}

/* The same for a response (under way, too) and a conversation. */
static void refuse_talk(const char *key, const char *response, const char *conversation)
{
    static const struct {
        const char *method, *path, *body;
    } roads[] = {{"GET", "/v1/responses/%s", NULL},
                 {"GET", "/v1/responses/%s?stream=true", NULL},
                 {"GET", "/v1/responses/%s/input_items", NULL},
                 {"POST", "/v1/responses/%s/cancel", NULL},
                 {"DELETE", "/v1/responses/%s", NULL},
                 {"GET", "/v1/conversations/%C", NULL},
                 {"POST", "/v1/conversations/%C", "{\"metadata\":{\"a\":\"b\"}}"},
                 {"GET", "/v1/conversations/%C/items", NULL},
                 {"POST", "/v1/conversations/%C/items",
                  "{\"items\":[{\"role\":\"user\",\"content\":\"a\"}]}"},
                 {"GET", "/v1/conversations/%C/items/msg_1", NULL},
                 {"DELETE", "/v1/conversations/%C/items/msg_1", NULL},
                 {"DELETE", "/v1/conversations/%C", NULL}};
    char path[128], body[256];
    for (size_t i = 0; i < sizeof roads / sizeof *roads; i++) {
        const bool second = strstr(roads[i].path, "%C") != NULL;
        snprintf(path, sizeof path, "%.*s%s%s", (int)strcspn(roads[i].path, "%"), roads[i].path,
                 second ? conversation : response, strchr(roads[i].path, '%') + 2);
        refuse(key, roads[i].method, path, roads[i].body, 404, "not_found", NULL);
    }
    snprintf(body, sizeof body, "{\"from\":\"%s\"}", response);
    refuse(key, "POST", "/v1/memories", body, 404, "not_found", "from");
    snprintf(body, sizeof body, "{\"input\":\"a\",\"previous_response_id\":\"%s\"}", response);
    refuse(key, "POST", "/v1/responses", body, 404, "not_found", "previous_response_id");
    refuse(key, "POST", "/v1/responses/input_tokens", body, 404, "not_found",
           "previous_response_id");
    snprintf(body, sizeof body, "{\"input\":\"a\",\"conversation\":\"%s\"}", conversation);
    refuse(key, "POST", "/v1/responses", body, 404, "not_found", "conversation");
}

static void test_talk(void **state)
{
    (void)state;
    char conversation[LIMITS_ID_BYTES], running[LIMITS_ID_BYTES], done[LIMITS_ID_BYTES], path[128];
    make(ann, "/v1/conversations", "{\"items\":[{\"role\":\"user\",\"content\":\"a\"}]}", 200,
         conversation);
    make(ann, "/v1/responses", "{\"input\":\"a\",\"max_output_tokens\":2}", 200, done);
    make(ann, "/v1/responses",
         "{\"input\":\"a\",\"background\":true,\"ignore_eos\":true,\"max_output_tokens\":1000000}",
         200, running);
    refuse_talk(bob, running, conversation);
    refuse_talk(bob, done, conversation);
    refuse_talk(bob, "resp_none", "conv_none");
    snprintf(path, sizeof path, "/v1/responses/%s/cancel", running);
    expect(ann, "POST", path, NULL, 200);
    daemon_kill(&daemon_);
    daemon_start(&daemon_);
    refuse_talk(bob, running, conversation);
    refuse_talk(IN_ENVIRONMENT, done, conversation);
    const char *const owned[] = {"/v1/responses/",     running,     "/v1/responses/", done,
                                 "/v1/conversations/", conversation};
    for (size_t i = 0; i < 6; i += 2) {
        snprintf(path, sizeof path, "%s%s", owned[i], owned[i + 1]);
        expect(ann, "GET", path, NULL, 200);
        expect(ann, "DELETE", path, NULL, 200);
    }
}

/* A second key of a name sees what the first has made; the first can then be taken away. */
static void test_rotation(void **state)
{
    (void)state;
    char eve[64], second[64], id[LIMITS_ID_BYTES], path[128];
    refuse("rk_", "GET", "/v1/models", NULL, 401, "unauthorized", NULL);
    daemon_new_key(&daemon_, "eve", keys, eve);
    refuse(eve, "GET", "/v1/models", NULL, 401, "unauthorized", NULL);
    daemon_reread_keys(&daemon_);
    new_memory(eve, "{}", id);
    snprintf(path, sizeof path, "/v1/memories/%s", id);
    assert_int_equal(truncate(keys, 0), 0); /* no key at all: a slip, not a wish */
    daemon_reread_keys(&daemon_);
    expect(eve, "GET", path, NULL, 200);
    daemon_new_key(&daemon_, "ann", keys, ann);
    daemon_new_key(&daemon_, "bob", keys, bob);
    daemon_new_key(&daemon_, "eve", keys, second);
    daemon_reread_keys(&daemon_);
    expect(second, "GET", path, NULL, 200);
    refuse(eve, "GET", path, NULL, 401, "unauthorized", NULL);
}

/* One's Idempotency-Key says nothing of another's request. */
static void test_once(void **state)
{
    (void)state;
    char id[LIMITS_ID_BYTES], again[LIMITS_ID_BYTES], other[LIMITS_ID_BYTES];
    once = "Idempotency-Key: k\r\n";
    new_memory(ann, "{}", id);
    new_memory(ann, "{}", again);
    new_memory(bob, "{}", other);
    once = "";
    assert_string_equal(again, id);
    assert_string_not_equal(other, id);
}

/* Open to others only with keys, or when told. */
static void test_bind(void **state)
{
    (void)state;
    static const char script[] =
        "unset RAMBAD_API_KEY; exec \"$RAMBAD_BIN\" --data \"$D\" --port 0 --model nowhere "
        "--host 0.0.0.0 $F 2>&1";
    const struct {
        const char *flags, *says;
    } cases[] = {{"", "--insecure"},
                 {"--insecure=0", "--insecure"},
                 {"--insecure", "nowhere"}, /* on to the next thing that is wrong */
                 {"--keys K", "nowhere"}};
    setenv("D", daemon_.data, 1);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct buf out;
        char f[1100];
        buf_init(&out);
        snprintf(f, sizeof f, "%s", cases[i].flags);
        if (strcmp(f, "--keys K") == 0)
            snprintf(f, sizeof f, "--keys %s", keys);
        setenv("F", f, 1);
        assert_int_equal(
            daemon_run(&daemon_, (const char *const[]){"/bin/sh", "-c", script, NULL}, &out), 1);
        if (!strstr(buf_text(&out), cases[i].says))
            fail_msg("%s: %s", cases[i].flags, out.data);
        buf_close(&out);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_no_key), cmocka_unit_test(test_strangers),
        cmocka_unit_test(test_talk),   cmocka_unit_test(test_rotation),
        cmocka_unit_test(test_once),   cmocka_unit_test(test_bind)};
    return cmocka_run_group_tests_name("keys", tests, setup, teardown);
}
