/* Conversations against the real daemon: what is added to one is read into its memory, what is
 * answered in one is added to it, and all of it is there after kill -9. */
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

#define GREEDY "\"temperature\":0,\"max_output_tokens\":12"
#define BODY_BYTES 1024

static struct daemon daemon_;
static char *folder;
static const char *const flags[] = {"--threads", "1", NULL};

static cJSON *call(const char *method, const char *path, const char *body, int status)
{
    return wire_call_json(&daemon_, method, path, body, status);
}

/* A call of the conversation `id`. */
static cJSON *of(const char *method, const char *id, const char *rest, const char *body, int status)
{
    char path[256];
    snprintf(path, sizeof path, "/v1/conversations/%s%s", id, rest);
    return call(method, path, body, status);
}

static cJSON *respond(const char *id, const char *input, const char *more)
{
    char body[BODY_BYTES];
    snprintf(body, sizeof body, "{\"conversation\":\"%s\",\"input\":\"%s\"," GREEDY "%s}", id,
             input, more);
    return call("POST", "/v1/responses", body, 200);
}

static const char *text_of(const cJSON *response)
{
    return answer_text(response, "output.0.content.0.text");
}

/* The texts of all items in order, a bar behind each. */
static void assert_items(const char *id, const char *texts)
{
    cJSON *list = of("GET", id, "/items?order=asc&limit=100", NULL, 200);
    const cJSON *item;
    struct buf seen;
    buf_init(&seen);
    cJSON_ArrayForEach(item, answer_at(list, "data"))
        buf_append_format(&seen, "%s|", answer_text(item, "content.0.text"));
    assert_string_equal(buf_text(&seen), texts);
    buf_close(&seen);
    cJSON_Delete(list);
}

static void new_conversation(const char *body, char id[LIMITS_ID_BYTES])
{
    cJSON *conversation = call("POST", "/v1/conversations", body, 200);
    assert_string_equal(answer_text(conversation, "object"), "conversation");
    snprintf(id, LIMITS_ID_BYTES, "%s", answer_text(conversation, "id"));
    cJSON_Delete(conversation);
}

static void delete_conversation(const char *id)
{
    cJSON *deleted = of("DELETE", id, "", NULL, 200);
    assert_string_equal(answer_text(deleted, "object"), "conversation.deleted");
    assert_true(cJSON_IsTrue(answer_at(deleted, "deleted")));
    cJSON_Delete(deleted);
    cJSON_Delete(of("GET", id, "", NULL, 404));
    cJSON_Delete(of("GET", id, "/items", NULL, 404));
}

static int setup(void **state)
{
    (void)state;
    folder = daemon_begin(&daemon_, "engine/models/ramba-20m", flags);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    daemon_end(&daemon_, folder);
    return 0;
}

/* ---- tests ---- */

#define USER(text) "{\"role\":\"user\",\"content\":\"" text "\"}"
#define ASSISTANT(text) "{\"role\":\"assistant\",\"content\":\"" text "\"}"

/* However the messages came, one by one or with the question, the model has read the same. */
static void test_same(void **state)
{
    (void)state;
    char id[LIMITS_ID_BYTES], texts[BODY_BYTES];
    new_conversation(
        "{\"items\":[" USER("A raven lives in the tower.") "," ASSISTANT("I see.") "]}", id);
    cJSON *added =
        of("POST", id, "/items",
           "{\"items\":[" USER("The key is under the mat.") "," ASSISTANT("Yes.") "]}", 200);
    assert_int_equal(cJSON_GetArraySize(answer_at(added, "data")), 2);
    cJSON *response = respond(id, "Where does the raven live?", "");
    cJSON *chat = call(
        "POST", "/v1/chat/completions",
        "{\"messages\":[" USER("A raven lives in the tower.") "," ASSISTANT("I see.") "," USER(
            "The key is under the mat.") "," ASSISTANT("Yes.") "," USER("Where does the raven "
                                                                        "live?") "],"
                                                                                 "\"temperature\":"
                                                                                 "0,"
                                                                                 "\"max_tokens\":"
                                                                                 "12}",
        200);
    assert_string_equal(text_of(response), answer_text(chat, "choices.0.message.content"));
    assert_true(answer_number(response, "usage.input_tokens") ==
                answer_number(chat, "usage.prompt_tokens"));
    assert_string_equal(answer_text(response, "conversation.id"), id);
    assert_string_equal(answer_text(response, "memory"), id);
    /* It is a memory of that name, which holds all of it. */
    assert_true(daemon_get_memory(&daemon_, id).token_count ==
                answer_number(response, "usage.total_tokens"));
    snprintf(texts, sizeof texts,
             "A raven lives in the tower.|I see.|The key is under the mat.|Yes.|Where does the "
             "raven live?|%s|",
             text_of(response));
    for (int i = 0; i < 2; i++) {
        assert_items(id, texts);
        cJSON *newest = of("GET", id, "/items?limit=1", NULL, 200);
        assert_string_equal(answer_text(newest, "data.0.id"), answer_text(response, "output.0.id"));
        assert_true(cJSON_IsTrue(answer_at(newest, "has_more")));
        cJSON_Delete(newest);
        char rest[128];
        snprintf(rest, sizeof rest, "/items/%s", answer_text(added, "data.0.id"));
        cJSON *item = of("GET", id, rest, NULL, 200);
        assert_true(cJSON_Compare(item, answer_at(added, "data.0"), true));
        cJSON_Delete(item);
        if (!i)
            daemon_restart(&daemon_);
    }
    /* What goes on from a response of it is another's. */
    char body[BODY_BYTES];
    snprintf(body, sizeof body, "{\"input\":\"And?\"," GREEDY ",\"previous_response_id\":\"%s\"}",
             answer_text(response, "id"));
    cJSON *aside = call("POST", "/v1/responses", body, 200);
    assert_string_not_equal(answer_text(aside, "memory"), id);
    assert_items(id, texts);
    delete_conversation(id);
    cJSON_Delete(call("POST", "/v1/responses", body, 404));
    snprintf(body, sizeof body, "/v1/responses/%s", answer_text(response, "id"));
    cJSON_Delete(call("GET", body, NULL, 200)); /* what was said is still there to read */
    cJSON_Delete(call("DELETE", body, NULL, 200));
    snprintf(body, sizeof body, "/v1/responses/%s", answer_text(aside, "id"));
    cJSON_Delete(call("DELETE", body, NULL, 200));
    cJSON_Delete(added);
    cJSON_Delete(response);
    cJSON_Delete(chat);
    cJSON_Delete(aside);
}

static void test_metadata(void **state)
{
    (void)state;
    char id[LIMITS_ID_BYTES];
    new_conversation("{\"metadata\":{\"a\":\"b\"}}", id);
    cJSON *got = of("GET", id, "", NULL, 200);
    assert_string_equal(answer_text(got, "metadata.a"), "b");
    assert_true(answer_number(got, "created_at") > 1.7e9);
    assert_items(id, "");
    cJSON *updated = of("POST", id, "", "{\"metadata\":{\"c\":\"d\"}}", 200);
    assert_string_equal(answer_text(updated, "metadata.c"), "d");
    assert_null(answer_at(updated, "metadata.a"));
    cJSON_Delete(of("POST", id, "", "{\"metadata\":{\"c\":1}}", 400));
    daemon_restart(&daemon_);
    cJSON *again = of("GET", id, "", NULL, 200);
    assert_true(cJSON_Compare(again, updated, true));
    delete_conversation(id);
    cJSON_Delete(got);
    cJSON_Delete(updated);
    cJSON_Delete(again);
}

/* A response that is not stored is a turn of its conversation all the same; and its instructions
 * are not. */
static void test_turns(void **state)
{
    (void)state;
    char id[LIMITS_ID_BYTES], texts[BODY_BYTES];
    new_conversation("", id);
    cJSON *one = respond(id, "The key is under the mat.",
                         ",\"store\":false,\"instructions\":\"You are a raven.\"");
    cJSON *two = respond(id, "Where is it?", ",\"background\":true");
    char path[128];
    snprintf(path, sizeof path, "/v1/responses/%s?stream=true", answer_text(two, "id"));
    struct wire_answer events; /* comes to its end with the response */
    assert_int_equal(wire_call(&daemon_, "GET", path, NULL, &events), 200);
    assert_true(strstr(buf_text(&events.body), "event: response.completed") ||
                strstr(buf_text(&events.body), "event: response.incomplete"));
    wire_answer_close(&events);
    snprintf(path, sizeof path, "/v1/responses/%s", answer_text(one, "id"));
    cJSON_Delete(call("GET", path, NULL, 404));
    snprintf(path, sizeof path, "/v1/responses/%s", answer_text(two, "id"));
    cJSON *ended = call("GET", path, NULL, 200);
    snprintf(texts, sizeof texts, "The key is under the mat.|%s|Where is it?|%s|", text_of(one),
             text_of(ended));
    assert_items(id, texts);
    /* The conversation holds the first without its instructions. */
    char count[BODY_BYTES];
    cJSON *plain = call("POST", "/v1/responses/input_tokens",
                        "{\"input\":\"The key is under the mat.\"}", 200);
    assert_true(answer_number(ended, "usage.input_tokens_details.cached_tokens") ==
                answer_number(plain, "input_tokens") + answer_number(one, "usage.output_tokens"));
    snprintf(count, sizeof count, "{\"input\":\"x\",\"conversation\":\"%s\"}", id);
    cJSON *all = call("POST", "/v1/responses/input_tokens", count, 200);
    assert_true(answer_number(all, "input_tokens") > answer_number(ended, "usage.total_tokens"));
    /* Back to before the second turn: its items go, too. */
    char body[64], memory[128];
    snprintf(memory, sizeof memory, "/v1/memories/%s/rewind", id);
    snprintf(body, sizeof body, "{\"to\":%.0f}",
             answer_number(ended, "usage.input_tokens_details.cached_tokens"));
    cJSON_Delete(call("POST", memory, body, 200));
    snprintf(texts, sizeof texts, "The key is under the mat.|%s|", text_of(one));
    assert_items(id, texts);
    cJSON_Delete(call("DELETE", path, NULL, 200));
    delete_conversation(id);
    cJSON_Delete(one);
    cJSON_Delete(two);
    cJSON_Delete(ended);
    cJSON_Delete(plain);
    cJSON_Delete(all);
}

/* What the model would say next in the conversation, which stays as it is. */
static void assert_same_next(const char *id, const char *other)
{
    char body[BODY_BYTES];
    cJSON *said[2];
    for (int i = 0; i < 2; i++) {
        snprintf(body, sizeof body,
                 "{\"memory\":\"%s\",\"memory_write\":false,\"store\":false,\"input\":\"Where is "
                 "it?\"," GREEDY "}",
                 i ? other : id);
        said[i] = call("POST", "/v1/responses", body, 200);
    }
    assert_string_equal(text_of(said[0]), text_of(said[1]));
    assert_true(cJSON_Compare(answer_at(said[0], "usage"), answer_at(said[1], "usage"), true));
    cJSON_Delete(said[0]);
    cJSON_Delete(said[1]);
}

static void delete_item(const char *id, int index, int status)
{
    char rest[128];
    cJSON *list = of("GET", id, "/items?order=asc", NULL, 200);
    const cJSON *item = cJSON_GetArrayItem(answer_at(list, "data"), index);
    snprintf(rest, sizeof rest, "/items/%s", answer_text(item, "id"));
    cJSON *left = of("DELETE", id, rest, NULL, status);
    if (status == 200)
        assert_string_equal(answer_text(left, "id"), id);
    cJSON_Delete(of("GET", id, rest, NULL, status == 200 ? 404 : 200));
    cJSON_Delete(list);
    cJSON_Delete(left);
}

/* An item that is deleted was never said: the conversation is as if it had been without it. */
static void test_forget(void **state)
{
    (void)state;
    char id[LIMITS_ID_BYTES], other[LIMITS_ID_BYTES], body[BODY_BYTES];
    new_conversation(
        "{\"items\":[" USER("A raven lives in the tower.") "," ASSISTANT("I see.") "]}", id);
    cJSON_Delete(of("POST", id, "/items",
                    "{\"items\":[" USER("The key is under the mat.") "," ASSISTANT("Yes.") "]}",
                    200));
    cJSON *response = respond(id, "And then?", "");
    delete_item(id, 2, 200);
    daemon_restart(&daemon_);
    snprintf(body, sizeof body,
             "{\"items\":[" USER("A raven lives in the tower.") "," ASSISTANT(
                 "I see.") "," ASSISTANT("Yes.") "," USER("And then?") "," ASSISTANT("%s") "]}",
             text_of(response));
    new_conversation(body, other);
    snprintf(body, sizeof body, "A raven lives in the tower.|I see.|Yes.|And then?|%s|",
             text_of(response));
    assert_items(id, body);
    assert_true(daemon_get_memory(&daemon_, id).token_count ==
                daemon_get_memory(&daemon_, other).token_count);
    assert_int_equal(daemon_get_memory(&daemon_, id).text_bytes,
                     daemon_get_memory(&daemon_, other).text_bytes);
    assert_same_next(id, other);
    delete_conversation(other);
    /* The newest, then all the others. */
    delete_item(id, 4, 200);
    new_conversation("{\"items\":[" USER("A raven lives in the tower.") "," ASSISTANT(
                         "I see.") "," ASSISTANT("Yes.") "," USER("And then?") "]}",
                     other);
    assert_same_next(id, other);
    delete_conversation(other);
    for (int i = 0; i < 4; i++)
        delete_item(id, i % 2 ? 0 : 3 - i, 200);
    assert_items(id, "");
    assert_true(daemon_get_memory(&daemon_, id).token_count == 0);
    /* Words that are no items would be lost with it. */
    cJSON_Delete(of("POST", id, "/items", "{\"items\":[" USER("a") "]}", 200));
    snprintf(body, sizeof body, "/v1/memories/%s/append", id);
    cJSON_Delete(call("POST", body, "A raven lives in the tower.", 200));
    delete_item(id, 0, 409);
    assert_items(id, "a|");
    delete_conversation(id);
    snprintf(body, sizeof body, "/v1/responses/%s", answer_text(response, "id"));
    cJSON_Delete(call("DELETE", body, NULL, 200));
    cJSON_Delete(response);
}

static cJSON *once(const char *key, const char *path, const char *body)
{
    struct buf out;
    buf_init(&out);
    const int status =
        daemon_call_once(&daemon_, key, path, "application/json", body, strlen(body), &out);
    if (status != 200)
        fail_msg("%s: HTTP %d %s", path, status, buf_text(&out));
    cJSON *json = cJSON_Parse(buf_text(&out));
    buf_close(&out);
    return json;
}

static void test_once(void **state)
{
    (void)state;
    char id[LIMITS_ID_BYTES], path[128];
    const char *items = "{\"items\":[" USER("a") "," ASSISTANT("b") "]}";
    const char *const bodies[] = {"{}", items};
    for (int i = 0; i < 2; i++) { /* an empty one, and one with items */
        cJSON *made = once(i ? "c1" : "c0", "/v1/conversations", bodies[i]);
        daemon_restart(&daemon_);
        cJSON *again = once(i ? "c1" : "c0", "/v1/conversations", bodies[i]);
        assert_true(cJSON_Compare(made, again, true));
        snprintf(id, sizeof id, "%s", answer_text(made, "id"));
        assert_items(id, i ? "a|b|" : "");
        cJSON_Delete(made);
        cJSON_Delete(again);
        if (!i)
            delete_conversation(id);
    }
    snprintf(path, sizeof path, "/v1/conversations/%s/items", id);
    cJSON *first = once("i1", path, items), *second = once("i1", path, items);
    assert_true(cJSON_Compare(first, second, true));
    assert_items(id, "a|b|a|b|");
    delete_conversation(id);
    cJSON_Delete(first);
    cJSON_Delete(second);
}

/* What fails leaves nothing, and a memory of another kind is no conversation. */
static void test_refusals(void **state)
{
    (void)state;
    char id[LIMITS_ID_BYTES];
    struct buf body;
    buf_init(&body);
    buf_append_text(&body, "{\"items\":[");
    for (int i = 0; i < 21; i++)
        buf_append_format(&body, "%s" USER("x"), i ? "," : "");
    buf_append_text(&body, "]}");
    cJSON_Delete(call("POST", "/v1/conversations", buf_text(&body), 400));
    cJSON_Delete(call("POST", "/v1/conversations",
                      "{\"items\":[{\"type\":\"function_call\",\"name\":\"f\"}]}", 400));
    daemon_create_memory(&daemon_, NULL, id);
    cJSON_Delete(of("GET", id, "", NULL, 404));
    cJSON_Delete(of("DELETE", id, "", NULL, 404));
    buf_close(&body);
    char path[128];
    snprintf(path, sizeof path, "/v1/memories/%s", id);
    cJSON_Delete(call("DELETE", path, NULL, 200));
    cJSON *list = call("GET", "/v1/memories", NULL, 200);
    assert_int_equal(cJSON_GetArraySize(answer_at(list, "data")), 0);
    cJSON_Delete(list);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same),  cmocka_unit_test(test_metadata),
        cmocka_unit_test(test_turns), cmocka_unit_test(test_forget),
        cmocka_unit_test(test_once),  cmocka_unit_test(test_refusals)};
    return cmocka_run_group_tests_name("conversations", tests, setup, teardown);
}
