/* What a client writes, the server must read; what the server writes, a client must read. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "proto/answer_json.h"
#include "proto/client_json.h"
#include "proto/completion_request.h"

static void test_memory(void **state)
{
    (void)state;
    const struct answer_memory said = {.id = "mem_0123456789abcdef01234567",
                                       .parent = "mem_ffffffffffffffffffffffff",
                                       .metadata = "{\"name\":\"a b\\u00fc\\\"\",\"x\":\"y\"}",
                                       .created_at = 1700000000,
                                       .token_count = 9007199254740991,
                                       .chunk_count = 2,
                                       .text_bytes = 3,
                                       .bytes_on_disk = 4};
    struct buf json, list_json;
    struct client_memory heard;
    struct client_memory_list list;
    buf_init(&json);
    buf_init(&list_json);
    answer_json_memory(&json, &said);
    assert_int_equal(client_json_memory(json.data, json.size, &heard), STATUS_OK);
    assert_string_equal(heard.id, said.id);
    assert_string_equal(heard.parent, said.parent);
    assert_string_equal(heard.name, "a b\xc3\xbc\"");
    assert_int_equal(heard.created_at, said.created_at);
    assert_int_equal(heard.token_count, said.token_count);
    assert_int_equal(heard.chunk_count, 2);
    assert_int_equal(heard.text_bytes, 3);
    assert_int_equal(heard.bytes_on_disk, 4);
    buf_append_format(&list_json, "{\"data\":[%s,%s],\"has_more\":true}", buf_text(&json),
                      buf_text(&json));
    assert_int_equal(client_json_memory_list(list_json.data, list_json.size, &list), STATUS_OK);
    assert_int_equal(list.count, 2);
    assert_true(list.has_more);
    assert_string_equal(list.items[1].id, said.id);
    client_json_memory_list_close(&list);
    buf_close(&json);
    buf_close(&list_json);
}

static void test_append(void **state)
{
    (void)state;
    const struct answer_append said = {"mem_0", 5, 70, 300, 1.5};
    for (int progress = 0; progress < 2; progress++) {
        struct buf json;
        struct client_append heard;
        buf_init(&json);
        answer_json_append(&json, &said, progress);
        assert_int_equal(client_json_append(json.data, json.size, &heard), STATUS_OK);
        assert_int_equal(heard.is_final, !progress);
        assert_int_equal(heard.tokens, 5);
        assert_int_equal(heard.position, 70);
        assert_int_equal(heard.text_bytes, 300);
        assert_true(heard.seconds > 1.49 && heard.seconds < 1.51);
        buf_close(&json);
    }
}

static void test_error(void **state)
{
    (void)state;
    struct buf json;
    struct client_error error;
    buf_init(&json);
    answer_json_error(&json, STATUS_CONFLICT, "the memory is \"busy\"", "");
    assert_true(client_json_error(json.data, json.size, &error));
    assert_string_equal(error.message, "the memory is \"busy\"");
    assert_string_equal(error.code, "conflict");
    assert_false(client_json_error("{\"id\":1}", 8, &error));
    assert_false(client_json_error("<html>", 6, &error));
    assert_string_equal(error.message, "");
    buf_close(&json);
}

static void test_completion(void **state)
{
    (void)state;
    const struct answer_head head = {.id = "cmpl-1", .model = "model", .created = 1700000000};
    const struct answer_choice choice = {
        .text = " In a castle.", .text_size = 13, .finish_reason = "stop"};
    const struct answer_usage usage = {11, 4, 7};
    struct buf json;
    struct client_completion heard;
    buf_init(&json);
    answer_json_completion(&json, &head, &choice, 1, &usage);
    assert_int_equal(client_json_completion(json.data, json.size, &heard), STATUS_OK);
    assert_string_equal(heard.text, " In a castle.");
    assert_string_equal(heard.finish_reason, "stop");
    assert_int_equal(heard.prompt_tokens, 11);
    assert_int_equal(heard.completion_tokens, 4);
    assert_int_equal(heard.source_count, 0);
    client_json_completion_close(&heard);
    static const char retrieval[] =
        "{\"choices\":[{\"text\":\"x\",\"retrieval\":[{\"token_index\":0,\"chunks\":["
        "{\"chunk\":7,\"weight\":0.5,\"text\":\"seven\"},{\"chunk\":9,\"weight\":0.25}]},"
        "{\"token_index\":1,\"chunks\":[]}]}]}";
    assert_int_equal(client_json_completion(retrieval, sizeof retrieval - 1, &heard), STATUS_OK);
    assert_int_equal(heard.source_count, 2);
    assert_int_equal(heard.sources[0].chunk, 7);
    assert_string_equal(heard.sources[0].text, "seven");
    assert_int_equal(heard.sources[1].chunk, 9);
    assert_true(heard.sources[1].weight > 0.24 && heard.sources[1].weight < 0.26);
    assert_string_equal(heard.sources[1].text, "");
    client_json_completion_close(&heard);
    json.size = 0;
    answer_json_usage_chunk(&json, &head, &usage); /* no choice in it */
    assert_int_equal(client_json_completion(json.data, json.size, &heard), STATUS_OK);
    assert_string_equal(heard.text, "");
    assert_string_equal(heard.finish_reason, "");
    client_json_completion_close(&heard);
    buf_close(&json);
}

static void test_turns(void **state)
{
    (void)state;
    const struct answer_turn said[] = {{.position = 90,
                                        .parent = 40,
                                        .text_bytes = 300,
                                        .created_at = 1700000000,
                                        .has_snapshot = true,
                                        .bookmark = "a \"good\" place"},
                                       {.position = 40, .parent = -1, .bookmark = ""}};
    struct client_turn_list heard;
    struct buf json;
    buf_init(&json);
    buf_append_text(&json, "{\"object\":\"list\",\"data\":[");
    answer_json_turn(&json, &said[0]);
    buf_append_text(&json, ",");
    answer_json_turn(&json, &said[1]);
    buf_append_text(&json, "],\"has_more\":true}");
    assert_int_equal(client_json_turn_list(json.data, json.size, &heard), STATUS_OK);
    assert_int_equal(heard.count, 2);
    assert_true(heard.has_more);
    assert_int_equal(heard.items[0].position, 90);
    assert_int_equal(heard.items[0].text_bytes, 300);
    assert_int_equal(heard.items[0].created_at, 1700000000);
    assert_true(heard.items[0].has_snapshot && !heard.items[1].has_snapshot);
    assert_string_equal(heard.items[0].bookmark, "a \"good\" place");
    assert_string_equal(heard.items[1].bookmark, "");
    client_json_turn_list_close(&heard);
    assert_int_equal(client_json_turn_list("{\"data\":[7]}", 12, &heard), STATUS_INVALID);
    assert_int_equal(client_json_turn_list("{}", 2, &heard), STATUS_INVALID);
    buf_close(&json);
}

static void test_requests(void **state)
{
    (void)state;
    static const char prompt[] = "\nQuestion: \"who\"\xff?\nAnswer:";
    struct client_completion_request said = {.memory = "mem_0123456789abcdef01234567",
                                             .memory_write = false,
                                             .prompt = prompt,
                                             .prompt_size = sizeof prompt - 1,
                                             .stop = "\n",
                                             .max_tokens = 64,
                                             .temperature = 0,
                                             .seed = 5,
                                             .stream = true,
                                             .retrieval = true};
    struct completion_request heard;
    struct error err = {0};
    struct buf json;
    buf_init(&json);
    client_json_write_completion(&json, &said);
    assert_int_equal(completion_request_parse(json.data, json.size, &heard, &err), STATUS_OK);
    assert_string_equal(heard.memory, said.memory);
    assert_false(heard.memory_write);
    assert_int_equal(heard.prompt_count, 1);
    assert_int_equal(heard.max_tokens, 64);
    assert_int_equal(heard.stop_count, 1);
    assert_string_equal(heard.stop[0], "\n");
    assert_true(heard.temperature <= 0 && heard.has_seed && heard.seed == 5);
    assert_true(heard.stream && heard.retrieval);
    /* What is no UTF-8 cannot be said in JSON. */
    assert_string_equal(heard.prompts[0].text, "\nQuestion: \"who\"\xef\xbf\xbd?\nAnswer:");
    completion_request_close(&heard);
    buf_close(&json);
}

/* Whatever is no such object is refused, and nothing is left to free. */
static void test_refusals(void **state)
{
    (void)state;
    static const char *const wrong[] = {
        "", "null", "[]", "{", "{}", "7", "{\"data\":7}", "{\"data\":[7]}", "{\"choices\":{}}"};
    struct buf body;
    buf_init(&body);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        size_t size = strlen(wrong[i]);
        struct client_memory memory;
        struct client_memory_list list;
        struct client_append append;
        struct client_completion completion;
        struct client_chunk_list chunks;
        assert_int_equal(client_json_memory(wrong[i], size, &memory), STATUS_INVALID);
        assert_int_equal(client_json_write_rename(&body, wrong[i], size, "x"), STATUS_INVALID);
        assert_int_equal(body.size, 0);
        assert_int_equal(client_json_memory_list(wrong[i], size, &list), STATUS_INVALID);
        assert_int_equal(client_json_append(wrong[i], size, &append), STATUS_INVALID);
        assert_int_equal(client_json_completion(wrong[i], size, &completion), STATUS_INVALID);
        assert_int_equal(client_json_chunk_list(wrong[i], size, &chunks), STATUS_INVALID);
    }
    buf_close(&body);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_memory),   cmocka_unit_test(test_append),
        cmocka_unit_test(test_error),    cmocka_unit_test(test_completion),
        cmocka_unit_test(test_turns),    cmocka_unit_test(test_requests),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
