/* Responses: what of a request is taken, the order and the numbers of the events, and that what is
 * kept says the same as what was there. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "proto/response_json.h"
#include "tests/lib/answer.h"

static enum status parse(const char *json, struct response_request *out, struct error *err)
{
    *err = (struct error){0};
    return response_request_parse(json, strlen(json), out, err);
}

static void assert_refused(const char *json, enum status status, const char *param)
{
    struct response_request request;
    struct error err;
    const enum status got = parse(json, &request, &err);
    if (got != status || strcmp(err.param, param) != 0)
        fail_msg("%s: %s, %s: %s", json, status_text(got), err.param, err.message);
}

static void test_defaults(void **state)
{
    (void)state;
    struct response_request r;
    struct error err;
    assert_int_equal(parse("{\"input\":\"hello\"}", &r, &err), STATUS_OK);
    assert_int_equal(r.input.count, 1);
    assert_string_equal(r.input.messages[0].role, "user");
    assert_string_equal(r.input.messages[0].text, "hello");
    assert_int_equal(r.input.messages[0].size, 5);
    assert_true(r.store && !r.background && !r.base.stream && r.base.memory_write);
    assert_true(r.base.temperature == 1 && r.base.top_p == 1);
    assert_int_equal(r.base.max_tokens, LIMITS_CHAT_TOKENS);
    assert_int_equal(r.base.logprobs, -1);
    assert_false(r.has_max_tokens || r.instructions || r.metadata || r.truncation_auto);
    assert_string_equal(r.tool_choice, "auto");
    response_request_close(&r);
}

static void test_fields(void **state)
{
    (void)state;
    struct response_request r;
    struct error err;
    struct buf item;
    assert_int_equal(
        parse(
            "{\"input\":[{\"role\":\"developer\",\"content\":\"be brief\"},{\"type\":\"message\","
            "\"role\":\"assistant\",\"content\":[{\"type\":\"output_text\",\"text\":\"a\","
            "\"annotations\":[],\"logprobs\":[]},{\"type\":\"output_text\",\"text\":\"\\\"b\"}]}],"
            "\"conversation\":{\"id\":\"conv_1\"},\"tools\":[],\"tool_choice\":\"none\",\"text\":"
            "{\"format\":{\"type\":\"text\"}},\"truncation\":\"auto\",\"top_logprobs\":3,"
            "\"include\":[\"memory.retrieval\"],\"max_output_tokens\":7,\"seed\":5,\"stop\":\"x\","
            "\"reasoning\":null,\"store\":false,\"user\":\"me\",\"instructions\":\"sing\","
            "\"stream_options\":{\"include_obfuscation\":false}}",
            &r, &err),
        STATUS_UNSUPPORTED); /* even a null is another field */
    assert_string_equal(err.param, "reasoning");
    assert_int_equal(
        parse(
            "{\"input\":[{\"role\":\"developer\",\"content\":\"be brief\"},{\"type\":\"message\","
            "\"role\":\"assistant\",\"content\":[{\"type\":\"output_text\",\"text\":\"a\","
            "\"annotations\":[],\"logprobs\":[]},{\"type\":\"output_text\",\"text\":\"\\\"b\"}]}],"
            "\"conversation\":{\"id\":\"conv_1\"},\"tools\":[],\"tool_choice\":\"none\",\"text\":"
            "{\"format\":{\"type\":\"text\"}},\"truncation\":\"auto\",\"top_logprobs\":3,"
            "\"include\":[\"memory.retrieval\"],\"max_output_tokens\":7,\"seed\":5,\"stop\":\"x\","
            "\"store\":false,\"user\":\"me\",\"instructions\":\"sing\","
            "\"stream_options\":{\"include_obfuscation\":false}}",
            &r, &err),
        STATUS_OK);
    assert_int_equal(r.input.count, 2);
    assert_string_equal(r.input.messages[0].role, "system");
    assert_string_equal(r.input.messages[1].text, "a\"b");
    assert_string_equal(r.conversation, "conv_1");
    assert_string_equal(r.tool_choice, "none");
    assert_string_equal(r.instructions, "sing");
    assert_true(r.truncation_auto && r.base.retrieval && r.base.has_seed && !r.store);
    assert_int_equal(r.base.logprobs, 3);
    assert_int_equal(r.base.max_tokens, 7);
    assert_int_equal(r.base.stop_count, 1);
    buf_init(&item);
    response_items_append(&r.input, 0, "msg_1", &item);
    assert_string_equal(buf_text(&item),
                        "{\"id\":\"msg_1\",\"type\":\"message\",\"status\":\"completed\",\"role\":"
                        "\"developer\",\"content\":[{\"type\":\"input_text\",\"text\":\"be brief\"}"
                        "]}");
    item.size = 0;
    response_items_append(&r.input, 1, "msg_2", &item);
    assert_string_equal(
        buf_text(&item),
        "{\"id\":\"msg_2\",\"type\":\"message\",\"status\":\"completed\",\"role\":\"assistant\","
        "\"content\":[{\"type\":\"output_text\",\"text\":\"a\",\"annotations\":[]},{\"type\":"
        "\"output_text\",\"text\":\"\\\"b\",\"annotations\":[]}]}");
    buf_close(&item);
    response_request_close(&r);
}

static void test_refusals(void **state)
{
    (void)state;
    assert_refused("{}", STATUS_INVALID, "input");
    assert_refused("{\"input\":[]}", STATUS_INVALID, "input");
    assert_refused("{\"input\":5}", STATUS_INVALID, "input");
    assert_refused("{\"input\":[5]}", STATUS_INVALID, "input[0]");
    assert_refused("{\"input\":[[1]]}", STATUS_INVALID, "input[0]");
    assert_refused("{\"input\":[{\"role\":\"tool\",\"content\":\"a\"}]}", STATUS_UNSUPPORTED,
                   "input[0].role");
    assert_refused("{\"input\":[{\"role\":\"user\"}]}", STATUS_INVALID, "input[0].content");
    assert_refused("{\"input\":[{\"role\":\"user\",\"content\":[]}]}", STATUS_INVALID,
                   "input[0].content");
    assert_refused("{\"input\":[{\"role\":\"user\",\"content\":[{\"type\":\"input_file\"}]}]}",
                   STATUS_UNSUPPORTED, "input[0].content");
    assert_refused("{\"input\":[{\"role\":\"user\",\"content\":\"a\",\"phase\":1}]}",
                   STATUS_UNSUPPORTED, "input[0].phase");
    assert_refused("{\"input\":[{\"type\":\"reasoning\",\"summary\":[]}]}", STATUS_UNSUPPORTED,
                   "input[0].type");
    assert_refused("{\"input\":\"a\",\"tools\":[{}]}", STATUS_UNSUPPORTED, "tools");
    assert_refused("{\"input\":\"a\",\"tool_choice\":{\"type\":\"function\"}}", STATUS_INVALID,
                   "tool_choice");
    assert_refused("{\"input\":\"a\",\"text\":[1]}", STATUS_INVALID, "text");
    assert_refused("{\"input\":\"a\",\"text\":{\"verbosity\":\"low\"}}", STATUS_UNSUPPORTED,
                   "text.verbosity");
    assert_refused("{\"input\":\"a\",\"truncation\":\"middle\"}", STATUS_UNSUPPORTED, "truncation");
    assert_refused("{\"input\":\"a\",\"instructions\":[]}", STATUS_UNSUPPORTED, "instructions");
    assert_refused("{\"input\":\"a\",\"metadata\":{\"a\":1}}", STATUS_INVALID, "metadata");
    assert_refused("{\"input\":\"a\",\"conversation\":{\"name\":\"x\"}}", STATUS_UNSUPPORTED,
                   "name");
    assert_refused("{\"input\":\"a\",\"conversation\":{}}", STATUS_INVALID, "conversation");
    assert_refused("{\"input\":\"a\",\"max_output_tokens\":0}", STATUS_INVALID,
                   "max_output_tokens");
    assert_refused("{\"input\":\"a\",\"memory\":\"m\",\"conversation\":\"c\"}", STATUS_INVALID,
                   "memory");
    assert_refused("{\"input\":\"a\",\"stream_options\":{\"include_obfuscation\":true}}",
                   STATUS_UNSUPPORTED, "stream_options");
    assert_refused("{\"input\":\"a\",\"max_tokens\":5}", STATUS_UNSUPPORTED, "max_tokens");
}

static void test_conversations(void **state)
{
    (void)state;
    struct conversation_request r;
    struct error err = {0};
    struct buf many;
    assert_int_equal(conversation_request_parse("", 0, &r, &err), STATUS_OK);
    assert_int_equal(r.items.count, 0);
    assert_null(r.metadata);
    conversation_request_close(&r);
    buf_init(&many);
    buf_append_text(&many, "{\"metadata\":{\"a\":\"b\"},\"items\":[");
    for (int i = 0; i < LIMITS_CONVERSATION_ITEMS; i++)
        buf_append_format(&many, "%s{\"role\":\"user\",\"content\":\"%d\"}", i ? "," : "", i);
    const size_t size = many.size;
    buf_append_text(&many, "]}");
    assert_int_equal(conversation_request_parse(many.data, many.size, &r, &err), STATUS_OK);
    assert_int_equal(r.items.count, LIMITS_CONVERSATION_ITEMS);
    assert_string_equal(r.metadata, "{\"a\":\"b\"}");
    conversation_request_close(&r);
    many.size = size;
    buf_append_text(&many, ",{\"role\":\"user\",\"content\":\"x\"}]}");
    assert_int_equal(conversation_request_parse(many.data, many.size, &r, &err), STATUS_INVALID);
    assert_string_equal(err.param, "items");
    assert_int_equal(conversation_update_parse("{}", 2, &r, &err), STATUS_INVALID);
    assert_string_equal(err.param, "metadata");
    assert_int_equal(conversation_items_parse("{\"items\":[]}", 12, &r, &err), STATUS_INVALID);
    assert_string_equal(err.param, "items");
    assert_int_equal(conversation_items_parse("{\"metadata\":{}}", 15, &r, &err),
                     STATUS_UNSUPPORTED);
    buf_close(&many);
}

/* ---- events ---- */

static void begin(struct response *r)
{
    struct response_request request;
    struct error err;
    assert_int_equal(parse("{\"input\":\"a\",\"metadata\":{\"k\":\"v\"}}", &request, &err),
                     STATUS_OK);
    response_init(r);
    strcpy(r->id, "resp_1");
    strcpy(r->item, "msg_1");
    r->created_at = 1700000000;
    response_set_fields(r, &request, "a model");
    response_request_close(&request);
}

static void add(struct response *r, const char *text, const char *logprobs)
{
    struct buf buf;
    buf_init(&buf);
    buf_append_text(&buf, logprobs);
    response_add_step(r, text, strlen(text), &buf);
    buf_close(&buf);
}

static void annotate(struct response *r, const char *json)
{
    struct buf buf;
    buf_init(&buf);
    buf_append_text(&buf, json);
    response_add_annotation(r, &buf);
    buf_close(&buf);
}

/* The types of all events without "response.", a space behind each; each is well formed and has its
 * number. */
static void assert_events(const struct response *r, const char *types)
{
    struct buf event, seen;
    buf_init(&event);
    buf_init(&seen);
    for (uint64_t i = 0; i < response_event_count(r); i++) {
        event.size = 0;
        response_append_event(r, i, &event);
        const char *text = buf_text(&event), *data = strstr(text, "\ndata: ");
        assert_memory_equal(text, "event: response.", 16);
        assert_non_null(data);
        assert_string_equal(text + event.size - 2, "\n\n");
        cJSON *json = cJSON_Parse(data + 7);
        assert_non_null(json);
        assert_true(answer_number(json, "sequence_number") == (double)i);
        assert_memory_equal(answer_text(json, "type"), text + 7, (size_t)(data - text - 7));
        buf_append_format(&seen, "%s ", answer_text(json, "type") + 9);
        cJSON_Delete(json);
    }
    assert_string_equal(buf_text(&seen), types);
    buf_close(&event);
    buf_close(&seen);
}

#define OPENING "created in_progress output_item.added content_part.added "
#define CLOSING "output_text.done content_part.done output_item.done "

static void test_events(void **state)
{
    (void)state;
    struct response r;
    begin(&r);
    r.status = RESPONSE_QUEUED;
    r.background = true;
    assert_events(&r, "created ");
    r.status = RESPONSE_IN_PROGRESS;
    r.begun = true;
    assert_events(&r, OPENING);
    add(&r, "one", "{\"token\":\"one\"}");
    add(&r, "", "{\"token\":\"half\"}");
    add(&r, " two", "");
    annotate(&r, "{\"type\":\"memory_citation\",\"n\":1}"); /* comes with the end */
    annotate(&r, "{\"type\":\"memory_citation\",\"n\":2}");
    assert_events(&r, OPENING "output_text.delta output_text.delta output_text.delta ");
    r.status = RESPONSE_FAILED;
    strcpy(r.error_code, "io");
    assert_events(&r, OPENING "output_text.delta output_text.delta output_text.delta failed ");
    r.status = RESPONSE_CANCELLED;
    assert_events(&r, OPENING "output_text.delta output_text.delta output_text.delta failed ");
    const char *whole =
        OPENING "output_text.delta output_text.delta output_text.delta "
                "output_text.annotation.added output_text.annotation.added " CLOSING;
    char types[512];
    for (int i = 0; i < 2; i++) {
        r.status = i ? RESPONSE_COMPLETED : RESPONSE_INCOMPLETE;
        snprintf(types, sizeof types, "%s%s ", whole, i ? "completed" : "incomplete");
        assert_events(&r, types);
    }
    struct buf event;
    buf_init(&event);
    static const char *const deltas[] = {"\"delta\":\"one\",\"logprobs\":[{\"token\":\"one\"}]}\n",
                                         "\"delta\":\"\",\"logprobs\":[{\"token\":\"half\"}]}\n",
                                         "\"delta\":\" two\",\"logprobs\":[]}\n"};
    for (uint64_t i = 0; i < 3; i++) {
        event.size = 0;
        response_append_event(&r, 4 + i, &event);
        assert_non_null(strstr(buf_text(&event), deltas[i]));
    }
    event.size = 0;
    response_append_event(&r, 8, &event);
    assert_non_null(strstr(buf_text(&event), "\"annotation_index\":1,\"annotation\":{\"type\":"
                                             "\"memory_citation\",\"n\":2}}\n"));
    buf_close(&event);
    response_close(&r);
    begin(&r); /* refused before it began */
    r.status = RESPONSE_FAILED;
    assert_events(&r, "created failed ");
    response_close(&r);
}

/* What was kept gives the same object and the same events; what is damaged is nothing. */
static void test_kept(void **state)
{
    (void)state;
    struct response r, again;
    struct buf bytes, one, other;
    begin(&r);
    r.begun = true;
    r.status = RESPONSE_COMPLETED;
    r.completed_at = 1700000001;
    r.input_tokens = 7;
    r.cached_tokens = 3;
    r.output_tokens = 2;
    strcpy(r.memory, "mem_1");
    add(&r, "one", "{\"token\":\"one\"}");
    add(&r, " two", "{\"token\":\"two\"}");
    annotate(&r, "{\"n\":1}");
    annotate(&r, "{\"n\":2}");
    buf_init(&bytes);
    buf_init(&one);
    buf_init(&other);
    response_encode(&r, &bytes);
    assert_int_equal(response_decode(bytes.data, bytes.size, &again), STATUS_OK);
    response_append_object(&r, &one);
    response_append_object(&again, &other);
    assert_int_equal(response_event_count(&r), response_event_count(&again));
    for (uint64_t i = 0; i < response_event_count(&r); i++) {
        response_append_event(&r, i, &one);
        response_append_event(&again, i, &other);
    }
    assert_string_equal(buf_text(&one), buf_text(&other));
    response_close(&again);
    for (size_t size = 0; size < bytes.size; size++)
        assert_int_equal(response_decode(bytes.data, size, &again), STATUS_CORRUPT);
    for (size_t i = 0; i < bytes.size;
         i++) { /* whatever a byte says, nothing is read past its end */
        bytes.data[i] ^= (char)0xff;
        if (response_decode(bytes.data, bytes.size, &again) == STATUS_OK) {
            other.size = 0;
            for (uint64_t k = 0; k < response_event_count(&again); k++)
                response_append_event(&again, k, &other);
            response_close(&again);
        }
        bytes.data[i] ^= (char)0xff;
    }
    buf_close(&bytes);
    buf_close(&one);
    buf_close(&other);
    response_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults), cmocka_unit_test(test_fields),
        cmocka_unit_test(test_refusals), cmocka_unit_test(test_conversations),
        cmocka_unit_test(test_events),   cmocka_unit_test(test_kept)};
    return cmocka_run_group_tests_name("response", tests, NULL, NULL);
}
