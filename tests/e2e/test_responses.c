/* Responses against the real daemon: stored with their turn, gone on from and forked, streamed and
 * taken up again, in the background, cancelled, deleted, and all of it after kill -9. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/lib/answer.h"
#include "tests/lib/daemon.h"
#include "tests/lib/wire.h"

#define MODEL_NAME "ramba-20m"
#define GREEDY "\"temperature\":0,\"max_output_tokens\":12"
#define PATH_BYTES 256

static struct daemon daemon_;
static char *folder;
/* Fewer snapshots than the test has turns, so that old ones are reached by replay. */
static const char *const flags[] = {"--threads", "1", "--keep-snapshots", "2", "--drain-timeout",
                                    "1",         NULL};

static cJSON *call(const char *method, const char *path, const char *body, int status)
{
    return wire_call_json(&daemon_, method, path, body, status);
}

static cJSON *respond(const char *fields, ...) __attribute__((format(printf, 1, 2)));
static cJSON *respond(const char *fields, ...)
{
    char inner[2048], body[2100];
    va_list args;
    va_start(args, fields);
    vsnprintf(inner, sizeof inner, fields, args);
    va_end(args);
    snprintf(body, sizeof body, "{%s}", inner);
    return call("POST", "/v1/responses", body, 200);
}

static const char *id_of(const cJSON *response)
{
    return answer_text(response, "id");
}

static const char *text_of(const cJSON *response)
{
    return answer_text(response, "output.0.content.0.text");
}

static cJSON *get(const char *id, const char *rest, int status)
{
    char path[PATH_BYTES];
    snprintf(path, sizeof path, "/v1/responses/%s%s", id, rest);
    return call("GET", path, NULL, status);
}

static void delete_response(const char *id, int status)
{
    char path[PATH_BYTES];
    snprintf(path, sizeof path, "/v1/responses/%s", id);
    cJSON *answer = call("DELETE", path, NULL, status);
    if (status == 200)
        assert_true(cJSON_IsTrue(answer_at(answer, "deleted")));
    cJSON_Delete(answer);
}

static int memory_count(void)
{
    cJSON *list = call("GET", "/v1/memories?limit=100", NULL, 200);
    const int count = cJSON_GetArraySize(answer_at(list, "data"));
    cJSON_Delete(list);
    return count;
}

/* The events of a stream, each with its own name in front. */
static cJSON *events_of(const char *body)
{
    cJSON *events = cJSON_CreateArray();
    for (const char *p = body; *p;) {
        char name[64];
        const char *end = strstr(p, "\n\n");
        assert_non_null(end);
        if (*p != ':') {
            assert_int_equal(sscanf(p, "event: %63s", name), 1);
            p = strchr(p, '\n') + 1;
            assert_memory_equal(p, "data: ", 6);
            cJSON *event = cJSON_ParseWithLength(p + 6, (size_t)(end - p - 6));
            assert_non_null(event);
            assert_string_equal(answer_text(event, "type"), name);
            cJSON_AddItemToArray(events, event);
        }
        p = end + 2;
    }
    return events;
}

static cJSON *stream(const char *method, const char *path, const char *body)
{
    struct wire_answer answer;
    if (wire_call(&daemon_, method, path, body, &answer) != 200)
        fail_msg("%s %s: HTTP %d %s", method, path, answer.status, buf_text(&answer.body));
    cJSON *events = events_of(buf_text(&answer.body));
    wire_answer_close(&answer);
    return events;
}

/* The events behind number `after` of a response, as the server gives them again. */
static cJSON *again(const char *id, int after)
{
    char path[PATH_BYTES];
    snprintf(path, sizeof path, "/v1/responses/%s?stream=true&starting_after=%d", id, after);
    return stream("GET", path, NULL);
}

static const cJSON *last_of(const cJSON *events)
{
    return cJSON_GetArrayItem(events, cJSON_GetArraySize(events) - 1);
}

static int setup(void **state)
{
    (void)state;
    folder = daemon_begin(&daemon_, "engine/models/" MODEL_NAME, flags);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    daemon_end(&daemon_, folder);
    return 0;
}

/* ---- tests ---- */

/* What the API promises of every response; and it says what a chat says. */
static void test_whole(void **state)
{
    (void)state;
    static const char *const required[] = {
        "id",          "object",   "created_at",   "status", "error", "incomplete_details",
        "model",       "tools",    "instructions", "output", "usage", "parallel_tool_calls",
        "tool_choice", "metadata", "temperature",  "top_p"};
    cJSON *response = respond("\"input\":\"Who lives in the tower?\"," GREEDY
                              ",\"store\":false,\"metadata\":{\"a\":\"b\"},\"model\":\"" MODEL_NAME
                              "\",\"instructions\":\"Be brief.\"");
    for (size_t i = 0; i < sizeof required / sizeof *required; i++)
        if (!answer_at(response, required[i]))
            fail_msg("%s is missing", required[i]);
    cJSON *chat = call("POST", "/v1/chat/completions",
                       "{\"messages\":[{\"role\":\"system\",\"content\":\"Be brief.\"},{\"role\":"
                       "\"user\",\"content\":\"Who lives in the tower?\"}],\"temperature\":0,"
                       "\"max_tokens\":12}",
                       200);
    assert_string_equal(text_of(response), answer_text(chat, "choices.0.message.content"));
    assert_true(answer_number(response, "usage.input_tokens") ==
                answer_number(chat, "usage.prompt_tokens"));
    assert_true(answer_number(response, "usage.output_tokens") ==
                answer_number(chat, "usage.completion_tokens"));
    assert_string_equal(answer_text(response, "metadata.a"), "b");
    assert_string_equal(answer_text(response, "instructions"), "Be brief.");
    assert_string_equal(answer_text(response, "output.0.role"), "assistant");
    assert_true(cJSON_IsNull(answer_at(response, "memory")));
    /* It was not stored, and left nothing. */
    cJSON_Delete(get(id_of(response), "", 404));
    assert_int_equal(memory_count(), 0);
    cJSON_Delete(response);
    cJSON_Delete(chat);
}

/* A chain, forks of its old and its last links, with the same words whatever was restarted. */
static void test_chain(void **state)
{
    (void)state;
    enum { TURNS = 5 };
    char ids[TURNS][LIMITS_ID_BYTES], memory[LIMITS_ID_BYTES] = "";
    double before = 0;
    for (int i = 0; i < TURNS; i++) {
        cJSON *response = i ? respond("\"input\":\"Turn %d: and then?\"," GREEDY
                                      ",\"previous_response_id\":\"%s\"",
                                      i, ids[i - 1])
                            : respond("\"input\":\"A raven lives in the tower.\"," GREEDY);
        snprintf(ids[i], sizeof ids[i], "%s", id_of(response));
        /* All that was said before is there, and is not read again. */
        assert_true(answer_number(response, "usage.input_tokens_details.cached_tokens") == before);
        before = answer_number(response, "usage.total_tokens");
        if (!i)
            snprintf(memory, sizeof memory, "%s", answer_text(response, "memory"));
        assert_string_equal(answer_text(response, "memory"), memory); /* one memory, no forks */
        cJSON_Delete(response);
    }
    assert_true(daemon_get_memory(&daemon_, memory).token_count == before);
    assert_int_equal(memory_count(), 1);
    /* An old one is gone on from as if the later ones had never been; twice the same, and after a
     * kill. Its snapshot was dropped long ago. */
    cJSON *forks[3];
    for (int i = 0; i < 3; i++) {
        if (i == 2)
            daemon_restart(&daemon_);
        forks[i] = respond(
            "\"input\":\"Where is the raven?\"," GREEDY ",\"previous_response_id\":\"%s\"", ids[1]);
        assert_string_not_equal(answer_text(forks[i], "memory"), memory);
        assert_string_equal(text_of(forks[i]), text_of(forks[0]));
        assert_true(
            cJSON_Compare(answer_at(forks[i], "usage"), answer_at(forks[0], "usage"), true));
    }
    /* The same as an uninterrupted chain of the same turns. */
    cJSON *one = respond("\"input\":\"A raven lives in the tower.\"," GREEDY);
    cJSON *two = respond(
        "\"input\":\"Turn 1: and then?\"," GREEDY ",\"previous_response_id\":\"%s\"", id_of(one));
    cJSON *three = respond(
        "\"input\":\"Where is the raven?\"," GREEDY ",\"previous_response_id\":\"%s\"", id_of(two));
    assert_string_equal(text_of(three), text_of(forks[0]));
    assert_true(cJSON_Compare(answer_at(three, "usage"), answer_at(forks[0], "usage"), true));
    assert_int_equal(memory_count(), 5);
    /* A look that is not stored moves nothing, at the end or in the middle. */
    cJSON *look = respond("\"input\":\"Where is the raven?\"," GREEDY
                          ",\"store\":false,\"previous_response_id\":\"%s\"",
                          ids[1]);
    assert_string_equal(text_of(look), text_of(forks[0]));
    assert_int_equal(memory_count(), 5);
    cJSON *count = NULL;
    char body[256];
    snprintf(body, sizeof body,
             "{\"input\":\"Where is the raven?\",\"previous_response_id\":\"%s\"}", ids[1]);
    count = call("POST", "/v1/responses/input_tokens", body, 200);
    assert_true(answer_number(count, "input_tokens") == answer_number(look, "usage.input_tokens"));
    /* A memory from a response stands where that stood. */
    snprintf(body, sizeof body, "{\"from\":\"%s\"}", ids[1]);
    cJSON *forked = call("POST", "/v1/memories", body, 201);
    assert_true(answer_number(forked, "token_count") ==
                answer_number(look, "usage.input_tokens_details.cached_tokens"));
    /* With the last of its responses goes the memory; the others' stay. */
    for (int i = 0; i < TURNS; i++)
        delete_response(ids[i], 200);
    delete_response(ids[0], 404);
    cJSON_Delete(get(ids[0], "", 404));
    assert_int_equal(memory_count(), 5); /* four of responses, one from a response */
    snprintf(body, sizeof body, "/v1/memories/%s", memory);
    cJSON_Delete(call("GET", body, NULL, 404));
    snprintf(body, sizeof body, "/v1/memories/%s", answer_text(forked, "id"));
    cJSON_Delete(call("DELETE", body, NULL, 200));
    for (int i = 0; i < 3; i++) {
        delete_response(id_of(forks[i]), 200);
        cJSON_Delete(forks[i]);
    }
    delete_response(id_of(one), 200);
    delete_response(id_of(three), 200);
    /* What the deleted ones said is still part of this one. */
    cJSON *after = respond("\"input\":\"Where is the raven?\"," GREEDY
                           ",\"previous_response_id\":\"%s\",\"store\":false",
                           id_of(two));
    assert_string_equal(text_of(after), text_of(three));
    delete_response(id_of(two), 200);
    assert_int_equal(memory_count(), 0);
    cJSON_Delete(one);
    cJSON_Delete(two);
    cJSON_Delete(three);
    cJSON_Delete(look);
    cJSON_Delete(count);
    cJSON_Delete(forked);
    cJSON_Delete(after);
}

/* Instructions are read, and are not in what the next one goes on from. */
static void test_instructions(void **state)
{
    (void)state;
    cJSON *plain = respond("\"input\":\"The key is under the mat.\"," GREEDY);
    cJSON *told = respond("\"input\":\"The key is under the mat.\"," GREEDY
                          ",\"instructions\":\"You are a raven. Answer as one.\"");
    assert_true(answer_number(told, "usage.input_tokens") >
                answer_number(plain, "usage.input_tokens") + 5);
    const double said = answer_number(told, "usage.output_tokens");
    cJSON *next = respond("\"input\":\"Where is it?\"," GREEDY ",\"previous_response_id\":\"%s\"",
                          id_of(told));
    assert_true(answer_number(next, "usage.input_tokens_details.cached_tokens") ==
                answer_number(plain, "usage.input_tokens") + said);
    delete_response(id_of(plain), 200);
    delete_response(id_of(told), 200);
    delete_response(id_of(next), 200);
    assert_int_equal(memory_count(), 0);
    cJSON_Delete(plain);
    cJSON_Delete(told);
    cJSON_Delete(next);
}

/* Exactly the events that the API has, in their order. */
static void check_events(const cJSON *events, const char *end)
{
    static const char *const opening[] = {"response.created", "response.in_progress",
                                          "response.output_item.added",
                                          "response.content_part.added"};
    static const char *const closing[] = {"response.output_text.done", "response.content_part.done",
                                          "response.output_item.done"};
    const int count = cJSON_GetArraySize(events), deltas = count - 8;
    struct buf text;
    buf_init(&text);
    assert_true(deltas > 0);
    for (int i = 0; i < count; i++) {
        const cJSON *event = cJSON_GetArrayItem(events, i);
        const char *type = answer_text(event, "type");
        assert_true(answer_number(event, "sequence_number") == i);
        if (i < 4) {
            assert_string_equal(type, opening[i]);
        } else if (i < 4 + deltas) {
            assert_string_equal(type, "response.output_text.delta");
            assert_non_null(answer_at(event, "logprobs"));
            buf_append_text(&text, answer_text(event, "delta"));
        } else {
            assert_string_equal(type, i + 1 == count ? end : closing[i - 4 - deltas]);
        }
    }
    const cJSON *last = answer_at(last_of(events), "response");
    assert_string_equal(buf_text(&text), text_of(last));
    assert_string_equal(answer_text(last, "status"), strchr(end, '.') + 1);
    assert_string_equal(answer_text(events, "0.response.id"), id_of(last));
    buf_close(&text);
}

static void test_stream(void **state)
{
    (void)state;
    cJSON *events = stream("POST", "/v1/responses",
                           "{\"input\":\"Tell me.\",\"stream\":true,\"temperature\":0,"
                           "\"max_output_tokens\":16,\"ignore_eos\":true}");
    check_events(events, "response.incomplete");
    const cJSON *response = answer_at(last_of(events), "response");
    assert_string_equal(answer_text(response, "incomplete_details.reason"), "max_output_tokens");
    for (int i = 0; i < 2; i++) { /* and as they were, after a kill too */
        cJSON *kept = get(id_of(response), "", 200);
        cJSON *all = again(id_of(response), 0), *rest = again(id_of(response), 9);
        assert_true(cJSON_Compare(kept, response, true));
        assert_int_equal(cJSON_GetArraySize(all), cJSON_GetArraySize(events) - 1);
        for (int j = 0; j < cJSON_GetArraySize(all); j++)
            assert_true(
                cJSON_Compare(cJSON_GetArrayItem(all, j), cJSON_GetArrayItem(events, j + 1), true));
        assert_true(answer_number(rest, "0.sequence_number") == 10);
        assert_int_equal(cJSON_GetArraySize(rest), cJSON_GetArraySize(all) - 9);
        cJSON_Delete(kept);
        cJSON_Delete(all);
        cJSON_Delete(rest);
        if (!i)
            daemon_restart(&daemon_);
    }
    delete_response(id_of(response), 200);
    cJSON_Delete(events);
}

/* Log probabilities and passages, in the deltas and in the whole. */
static void test_include(void **state)
{
    (void)state;
    struct buf body;
    buf_init(&body);
    buf_append_text(&body, "{\"input\":\"");
    for (int i = 0; i < 40; i++)
        buf_append_format(&body, "In room %d lives a raven. ", i);
    buf_append_text(&body, "Who lives in room 3?\",\"temperature\":0,\"max_output_tokens\":8,"
                           "\"include\":[\"memory.retrieval\",\"message.output_text.logprobs\"],"
                           "\"top_logprobs\":2,\"stream\":true,\"store\":false}");
    cJSON *events = stream("POST", "/v1/responses", buf_text(&body)), *event;
    const cJSON *part = answer_at(last_of(events), "response.output.0.content.0");
    const cJSON *annotations = answer_at(part, "annotations"),
                *logprobs = answer_at(part, "logprobs");
    int seen_logprobs = 0, seen_annotations = 0;
    cJSON_ArrayForEach(event, events)
    {
        const char *type = answer_text(event, "type");
        const cJSON *token;
        if (strcmp(type, "response.output_text.delta") == 0)
            cJSON_ArrayForEach(token, answer_at(event, "logprobs"))
            {
                assert_true(
                    cJSON_Compare(token, cJSON_GetArrayItem(logprobs, seen_logprobs++), true));
                assert_int_equal(cJSON_GetArraySize(answer_at(token, "top_logprobs")), 2);
            }
        if (strcmp(type, "response.output_text.annotation.added") == 0)
            assert_true(cJSON_Compare(answer_at(event, "annotation"),
                                      cJSON_GetArrayItem(annotations, seen_annotations++), true));
    }
    assert_int_equal(seen_logprobs, cJSON_GetArraySize(logprobs));
    assert_true(seen_logprobs > 0);
    assert_int_equal(seen_annotations, cJSON_GetArraySize(annotations));
    assert_true(seen_annotations > 0);
    const char *text = answer_text(annotations, "0.text");
    assert_string_equal(answer_text(annotations, "0.type"), "memory_citation");
    assert_true(answer_number(annotations, "0.weight") > 0);
    assert_true(answer_number(annotations, "0.token_end") -
                    answer_number(annotations, "0.token_start") ==
                64);
    assert_non_null(strstr(text, "raven"));
    cJSON_Delete(events);
    buf_close(&body);
}

static cJSON *wait_for_end(const char *id)
{
    for (double begin = daemon_now(); daemon_now() - begin < 60;) {
        cJSON *response = get(id, "", 200);
        const char *status = answer_text(response, "status");
        if (strcmp(status, "queued") != 0 && strcmp(status, "in_progress") != 0)
            return response;
        cJSON_Delete(response);
        usleep(10000);
    }
    fail_msg("response %s does not end", id);
    return NULL;
}

static void test_background(void **state)
{
    (void)state;
    char path[PATH_BYTES];
    struct wire wire;
    struct wire_answer answer;
    /* It goes on without its client. */
    cJSON *queued = respond("\"input\":\"Tell me.\",\"background\":true," GREEDY);
    assert_string_equal(answer_text(queued, "status"), "queued");
    cJSON *ended = wait_for_end(id_of(queued));
    assert_true(cJSON_GetArraySize(answer_at(ended, "output")) == 1);
    cJSON *events = again(id_of(queued), 0);
    assert_true(answer_number(events, "0.sequence_number") == 1);
    daemon_restart(&daemon_); /* its events are on disk */
    cJSON *others = again(id_of(queued), 0);
    assert_true(cJSON_Compare(events, others, true));
    cJSON_Delete(others);
    delete_response(id_of(queued), 200);
    cJSON_Delete(queued);
    cJSON_Delete(ended);
    cJSON_Delete(events);
    /* A long one, watched by two, one of whom leaves; then it is cancelled. */
    cJSON *life = respond("\"input\":\"Tell me.\",\"background\":true,\"ignore_eos\":true,"
                          "\"max_output_tokens\":1000000");
    snprintf(path, sizeof path, "/v1/responses/%s?stream=true&starting_after=2", id_of(life));
    struct wire leaver;
    wire_open(&leaver, &daemon_);
    wire_ask(&leaver, "GET", path, "", NULL, 0);
    assert_true(wire_wait_for(&leaver, "\"sequence_number\":3,"));
    wire_close(&leaver);
    wire_open(&wire, &daemon_);
    wire_ask(&wire, "GET", path, "", NULL, 0);
    assert_true(wire_wait_for(&wire, "\"sequence_number\":9,"));
    cJSON *running = get(id_of(life), "", 200);
    assert_string_equal(answer_text(running, "status"), "in_progress");
    delete_response(id_of(life), 409);
    snprintf(path, sizeof path, "/v1/responses/%s/cancel", id_of(life));
    for (int i = 0; i < 2; i++) { /* the second finds it ended */
        cJSON *cancelled = call("POST", path, "", 200);
        assert_string_equal(answer_text(cancelled, "status"), "cancelled");
        cJSON_Delete(cancelled);
    }
    assert_int_equal(wire_answer(&wire, &answer, false), 200);
    events = events_of(buf_text(&answer.body));
    assert_string_equal(answer_text(last_of(events), "type"), "response.failed");
    assert_string_equal(answer_text(last_of(events), "response.status"), "cancelled");
    wire_answer_close(&answer);
    wire_close(&wire);
    daemon_restart(&daemon_);
    cJSON *kept = get(id_of(life), "", 200);
    assert_true(cJSON_Compare(kept, answer_at(last_of(events), "response"), true));
    /* Nothing is left of its turn, and nothing goes on from it. */
    assert_int_equal(memory_count(), 0);
    char body[256];
    snprintf(body, sizeof body, "{\"input\":\"And?\",\"previous_response_id\":\"%s\"}",
             id_of(life));
    cJSON_Delete(call("POST", "/v1/responses", body, 404));
    delete_response(id_of(life), 200);
    cJSON_Delete(events);
    cJSON_Delete(life);
    cJSON_Delete(running);
    cJSON_Delete(kept);
}

/* One that the end of the server cuts off says so; its client can be gone long since. */
static void test_cut_off(void **state)
{
    (void)state;
    cJSON *life = respond("\"input\":\"Tell me.\",\"background\":true,\"ignore_eos\":true,"
                          "\"max_output_tokens\":1000000");
    daemon_restart(&daemon_);
    cJSON *kept = get(id_of(life), "", 200), *events = again(id_of(life), 0);
    assert_string_equal(answer_text(kept, "status"), "failed");
    assert_string_equal(answer_text(kept, "error.code"), "server_error");
    assert_string_equal(answer_text(last_of(events), "type"), "response.failed");
    cJSON *items = get(id_of(life), "/input_items", 200);
    assert_string_equal(answer_text(items, "data.0.content.0.text"), "Tell me.");
    char path[PATH_BYTES];
    snprintf(path, sizeof path, "/v1/responses/%s/cancel", id_of(life));
    cJSON *cancelled = call("POST", path, "", 200); /* there is nothing left of it to cancel */
    assert_true(cJSON_Compare(kept, cancelled, true));
    cJSON_Delete(cancelled);
    assert_int_equal(memory_count(), 0);
    delete_response(id_of(life), 200);
    cJSON_Delete(life);
    cJSON_Delete(kept);
    cJSON_Delete(events);
    cJSON_Delete(items);
    /* A server that is asked to end cuts it off, too, when its time is over. */
    life = respond("\"input\":\"Tell me.\",\"background\":true,\"ignore_eos\":true,"
                   "\"max_output_tokens\":1000000");
    daemon_stop(&daemon_);
    daemon_start(&daemon_);
    kept = get(id_of(life), "", 200);
    assert_string_equal(answer_text(kept, "status"), "failed");
    assert_string_equal(answer_text(kept, "error.code"), "unavailable");
    assert_int_equal(memory_count(), 0);
    delete_response(id_of(life), 200);
    cJSON_Delete(life);
    cJSON_Delete(kept);
    /* One that is not in the background ends with its client. */
    struct wire wire;
    const char *body = "{\"input\":\"Tell me.\",\"stream\":true,\"ignore_eos\":true,"
                       "\"max_output_tokens\":1000000}";
    wire_open(&wire, &daemon_);
    wire_ask(&wire, "POST", "/v1/responses", "", body, strlen(body));
    assert_true(wire_wait_for(&wire, "\"sequence_number\":9,"));
    char id[LIMITS_ID_BYTES];
    assert_int_equal(sscanf(strstr(wire.in.data, "\"resp_"), "\"%39[a-z0-9_]", id), 1);
    wire_close(&wire);
    kept = wait_for_end(id);
    assert_string_equal(answer_text(kept, "status"), "cancelled");
    assert_true(answer_number(kept, "usage.output_tokens") > 4);
    assert_int_equal(memory_count(), 0);
    delete_response(id, 200);
    cJSON_Delete(kept);
}

/* One that the queue has no room for is refused at once, in the background too, and leaves nothing.
 */
static void test_busy(void **state)
{
    (void)state;
    static const char *const narrow[] = {"--threads", "1", "--running", "1", "--queue", "1", NULL};
    const char *body = "{\"input\":\"Tell me.\",\"background\":true,\"ignore_eos\":true,"
                       "\"max_output_tokens\":1000000}";
    const struct daemon wide = daemon_;
    char *other = daemon_begin(&daemon_, "engine/models/" MODEL_NAME, narrow);
    char ids[4][LIMITS_ID_BYTES], path[PATH_BYTES];
    int count = 0, status = 200;
    while (count < 4 && status == 200) {
        struct wire_answer answer;
        status = wire_call(&daemon_, "POST", "/v1/responses", body, &answer);
        if (status == 200) {
            cJSON *response = wire_json(&answer);
            snprintf(ids[count++], LIMITS_ID_BYTES, "%s", id_of(response));
            cJSON_Delete(response);
        } else {
            wire_check_error(&answer, 429, "busy", NULL);
        }
        wire_answer_close(&answer);
    }
    assert_int_equal(status, 429);
    assert_true(count >= 1 && count <= 3);
    for (int i = count - 1; i >= 0; i--) { /* the waiting ones first */
        snprintf(path, sizeof path, "/v1/responses/%s/cancel", ids[i]);
        cJSON_Delete(call("POST", path, "", 200));
        delete_response(ids[i], 200);
    }
    assert_int_equal(memory_count(), 0);
    daemon_end(&daemon_, other);
    daemon_ = wide;
}

static void test_items(void **state)
{
    (void)state;
    cJSON *response = respond(
        "\"input\":[{\"role\":\"developer\",\"content\":\"Be brief.\"},{\"type\":\"message\","
        "\"role\":\"user\",\"content\":[{\"type\":\"input_text\",\"text\":\"a\"},{\"type\":"
        "\"input_text\",\"text\":\"b\"}]},{\"role\":\"assistant\",\"id\":\"msg_1\",\"status\":"
        "\"completed\",\"content\":[{\"type\":\"output_text\",\"text\":\"c\",\"annotations\":[]}]},"
        "{\"role\":\"user\",\"content\":\"d\"}]," GREEDY);
    cJSON *items = get(id_of(response), "/input_items?order=asc", 200);
    static const char *const texts[] = {"Be brief.", "a", "c", "d"};
    static const char *const roles[] = {"developer", "user", "assistant", "user"};
    for (int i = 0; i < 4; i++) {
        const cJSON *item = cJSON_GetArrayItem(answer_at(items, "data"), i);
        assert_string_equal(answer_text(item, "role"), roles[i]);
        assert_string_equal(answer_text(item, "content.0.text"), texts[i]);
        assert_memory_equal(id_of(item), "msg_", 4);
    }
    assert_string_equal(answer_text(items, "data.1.content.1.text"), "b");
    char rest[128];
    snprintf(rest, sizeof rest, "/input_items?limit=2&after=%s", answer_text(items, "data.3.id"));
    cJSON *page = get(id_of(response), rest, 200);
    assert_string_equal(answer_text(page, "first_id"), answer_text(items, "data.2.id"));
    assert_string_equal(answer_text(page, "last_id"), answer_text(items, "data.1.id"));
    assert_true(cJSON_IsTrue(answer_at(page, "has_more")));
    cJSON_Delete(get(id_of(response), "/input_items?after=msg_none", 404));
    cJSON_Delete(get(id_of(response), "/input_items?order=up", 400));
    /* Its memory goes when it was not used for long. */
    snprintf(rest, sizeof rest, "/v1/memories/%s", answer_text(response, "memory"));
    cJSON *memory = call("GET", rest, NULL, 200);
    assert_true(answer_number(memory, "expires_after.seconds") == 30 * 86400);
    assert_string_equal(answer_text(memory, "expires_after.anchor"), "last_active_at");
    cJSON_Delete(memory);
    delete_response(id_of(response), 200);
    cJSON_Delete(get(id_of(response), "/input_items", 404));
    cJSON_Delete(response);
    cJSON_Delete(items);
    cJSON_Delete(page);
}

/* A response is a turn of the memory that it names. */
static void test_memory(void **state)
{
    (void)state;
    char id[LIMITS_ID_BYTES], path[PATH_BYTES];
    daemon_create_memory(&daemon_, NULL, id);
    snprintf(path, sizeof path, "/v1/memories/%s/append", id);
    cJSON *appended = call("POST", path, "A raven lives in the tower. Nobody else does.", 200);
    const double before = answer_number(appended, "position");
    cJSON *look =
        respond("\"input\":\"Who?\"," GREEDY ",\"memory\":\"%s\",\"memory_write\":false", id);
    assert_true(answer_number(look, "usage.input_tokens_details.cached_tokens") == before);
    assert_true(daemon_get_memory(&daemon_, id).token_count == before);
    assert_string_not_equal(answer_text(look, "memory"), id); /* what is stored is a fork */
    cJSON *turn = respond("\"input\":\"Who?\"," GREEDY ",\"memory\":\"%s\"", id);
    assert_string_equal(text_of(turn), text_of(look));
    assert_string_equal(answer_text(turn, "memory"), id);
    assert_true(daemon_get_memory(&daemon_, id).token_count ==
                answer_number(turn, "usage.total_tokens"));
    /* Going on from it leaves the memory as it is: that is its owner's. */
    cJSON *next =
        respond("\"input\":\"Where?\"," GREEDY ",\"previous_response_id\":\"%s\"", id_of(turn));
    assert_string_not_equal(answer_text(next, "memory"), id);
    assert_true(daemon_get_memory(&daemon_, id).token_count ==
                answer_number(turn, "usage.total_tokens"));
    delete_response(id_of(turn), 200); /* its memory was not made for it, and stays */
    assert_true(daemon_get_memory(&daemon_, id).token_count ==
                answer_number(turn, "usage.total_tokens"));
    /* Back to before another response: it can be read, and not gone on from. */
    cJSON *last = respond("\"input\":\"Why?\"," GREEDY ",\"memory\":\"%s\"", id);
    char body[256];
    snprintf(path, sizeof path, "/v1/memories/%s/rewind", id);
    snprintf(body, sizeof body, "{\"to\":%.0f}", before);
    cJSON_Delete(call("POST", path, body, 200));
    cJSON_Delete(get(id_of(last), "", 200));
    snprintf(body, sizeof body, "{\"input\":\"And?\",\"previous_response_id\":\"%s\"}",
             id_of(last));
    cJSON_Delete(call("POST", "/v1/responses", body, 404));
    delete_response(id_of(last), 200);
    delete_response(id_of(look), 200);
    delete_response(id_of(next), 200);
    assert_int_equal(memory_count(), 1);
    snprintf(path, sizeof path, "/v1/memories/%s", id);
    cJSON_Delete(call("DELETE", path, NULL, 200));
    cJSON_Delete(appended);
    cJSON_Delete(look);
    cJSON_Delete(turn);
    cJSON_Delete(next);
    cJSON_Delete(last);
}

/* A memory that is over takes along what a response could be gone on from, and not what it says. */
static void test_memory_over(void **state)
{
    struct wire_answer answer;
    char id[LIMITS_ID_BYTES], path[PATH_BYTES], body[256];
    (void)state;
    daemon_create_memory(&daemon_, NULL, id);
    cJSON *turn = respond("\"input\":\"Who?\"," GREEDY ",\"memory\":\"%s\"", id);
    snprintf(path, sizeof path, "/v1/memories/%s", id);
    cJSON_Delete(
        call("PATCH", path, "{\"expires_after\":{\"anchor\":\"created_at\",\"seconds\":1}}", 200));
    const double start = daemon_now();
    while (memory_count() > 0) {
        if (daemon_now() - start > 60)
            fail_msg("a memory of one second is there after a minute");
        usleep(100000);
    }
    cJSON *again_ = get(id_of(turn), "", 200);
    assert_string_equal(text_of(again_), text_of(turn));
    snprintf(body, sizeof body, "{\"input\":\"And?\",\"previous_response_id\":\"%s\"}",
             id_of(turn));
    assert_int_equal(wire_call(&daemon_, "POST", "/v1/responses", body, &answer), 404);
    assert_non_null(strstr(buf_text(&answer.body), "is over"));
    wire_answer_close(&answer);
    delete_response(id_of(turn), 200);
    cJSON_Delete(turn);
    cJSON_Delete(again_);
}

/* Two that go on from the same one at once: each gets its own past. */
static void test_at_once(void **state)
{
    (void)state;
    cJSON *first = respond("\"input\":\"A raven lives in the tower.\"," GREEDY);
    struct wire wires[2];
    char body[512], texts[2][256];
    for (int i = 0; i < 2; i++) {
        snprintf(body, sizeof body,
                 "{\"input\":\"Where %d?\",\"temperature\":0,\"max_output_tokens\":64,"
                 "\"ignore_eos\":true,\"previous_response_id\":\"%s\"}",
                 i, id_of(first));
        wire_open(&wires[i], &daemon_);
        wire_ask(&wires[i], "POST", "/v1/responses", "", body, strlen(body));
    }
    char memories[2][LIMITS_ID_BYTES];
    for (int i = 0; i < 2; i++) {
        struct wire_answer answer;
        assert_int_equal(wire_answer(&wires[i], &answer, false), 200);
        cJSON *response = wire_json(&answer);
        snprintf(memories[i], sizeof memories[i], "%s", answer_text(response, "memory"));
        snprintf(texts[i], sizeof texts[i], "%.200s", text_of(response));
        delete_response(id_of(response), 200);
        cJSON_Delete(response);
        wire_answer_close(&answer);
        wire_close(&wires[i]);
    }
    assert_string_not_equal(memories[0], memories[1]);
    for (int i = 0; i < 2; i++) { /* and says what it says alone */
        cJSON *alone =
            respond("\"input\":\"Where %d?\",\"temperature\":0,\"max_output_tokens\":64,"
                    "\"ignore_eos\":true,\"previous_response_id\":\"%s\",\"store\":false",
                    i, id_of(first));
        char text[256];
        snprintf(text, sizeof text, "%.200s", text_of(alone));
        assert_string_equal(text, texts[i]);
        cJSON_Delete(alone);
    }
    delete_response(id_of(first), 200);
    assert_int_equal(memory_count(), 0);
    cJSON_Delete(first);
}

static void test_once(void **state)
{
    (void)state;
    const char *body = "{\"input\":\"Tell me.\",\"max_output_tokens\":12}";
    struct buf first, second;
    buf_init(&first);
    buf_init(&second);
    assert_int_equal(daemon_call_once(&daemon_, "k1", "/v1/responses", "application/json", body,
                                      strlen(body), &first),
                     200);
    daemon_restart(&daemon_);
    assert_int_equal(daemon_call_once(&daemon_, "k1", "/v1/responses", "application/json", body,
                                      strlen(body), &second),
                     200);
    assert_string_equal(buf_text(&first), buf_text(&second));
    assert_int_equal(memory_count(), 1);
    cJSON *response = cJSON_Parse(buf_text(&first));
    delete_response(id_of(response), 200);
    cJSON_Delete(response);
    buf_close(&first);
    buf_close(&second);
}

static void refused(const char *fields, const char *code, const char *param)
{
    char body[1024];
    struct wire_answer answer;
    snprintf(body, sizeof body, "{%s}", fields);
    wire_call(&daemon_, "POST", "/v1/responses", body, &answer);
    wire_check_error(&answer, strcmp(code, "not_found") == 0 ? 404 : 400, code, param);
    wire_answer_close(&answer);
}

static void test_refusals(void **state)
{
    (void)state;
    refused("\"model\":\"" MODEL_NAME "\"", "invalid", "input");
    refused("\"input\":\"a\",\"tools\":[{\"type\":\"function\",\"name\":\"f\"}]", "unsupported",
            "tools");
    refused("\"input\":\"a\",\"reasoning\":{\"effort\":\"low\"}", "unsupported", "reasoning");
    refused("\"input\":\"a\",\"text\":{\"format\":{\"type\":\"json_object\"}}", "unsupported",
            "text.format");
    refused("\"input\":[{\"type\":\"function_call_output\",\"output\":\"x\"}]", "unsupported",
            "input[0].type");
    refused("\"input\":[{\"role\":\"user\",\"content\":[{\"type\":\"input_image\"}]}]",
            "unsupported", "input[0].content");
    refused("\"input\":\"a\",\"previous_response_id\":\"resp_none\"", "not_found",
            "previous_response_id");
    refused("\"input\":\"a\",\"conversation\":\"conv_none\"", "not_found", "conversation");
    refused("\"input\":\"a\",\"memory\":\"mem_none\"", "not_found", "memory");
    refused("\"input\":\"a\",\"previous_response_id\":\"a\",\"conversation\":\"b\"", "invalid",
            "previous_response_id");
    refused("\"input\":\"a\",\"background\":true,\"store\":false", "invalid", "background");
    refused("\"input\":\"a\",\"include\":[\"file_search_call.results\"]", "unsupported", "include");
    refused("\"input\":\"a\",\"model\":\"another\"", "not_found", "model");
    cJSON *response = respond("\"input\":\"a\"," GREEDY);
    char path[PATH_BYTES];
    snprintf(path, sizeof path, "/v1/responses/%s/cancel", id_of(response));
    cJSON_Delete(call("POST", path, "", 400)); /* it was not in the background */
    cJSON_Delete(get(id_of(response), "?stream=maybe", 400));
    cJSON_Delete(get(id_of(response), "?starting_after=1", 400));
    delete_response(id_of(response), 200);
    cJSON_Delete(response);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_whole),       cmocka_unit_test(test_chain),
        cmocka_unit_test(test_stream),      cmocka_unit_test(test_instructions),
        cmocka_unit_test(test_include),     cmocka_unit_test(test_background),
        cmocka_unit_test(test_cut_off),     cmocka_unit_test(test_busy),
        cmocka_unit_test(test_items),       cmocka_unit_test(test_memory),
        cmocka_unit_test(test_memory_over), cmocka_unit_test(test_at_once),
        cmocka_unit_test(test_once),        cmocka_unit_test(test_refusals)};
    return cmocka_run_group_tests_name("responses", tests, setup, teardown);
}
