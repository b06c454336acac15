/* The API against the real daemon with a small model of random weights: every documented error,
 * what each field does, and that requests side by side get the answers they get alone. */
#include <cjson/cJSON.h>
#include <math.h>
#include <pthread.h>
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

#define MODEL_NAME "wide-stickbreaking-topk8"
#define MODEL "tests/golden/" MODEL_NAME
#define CHUNK 16 /* tokens, and with this tokenizer bytes */
#define TURN "\"temperature\":0,\"ignore_eos\":true"

static struct daemon daemon_;
static char *folder;
/* On a CPU, whose blocks of an append are small. */
static const char *const flags[] = {"--backend", "cpu", "--threads", "1", NULL};

/* A call that must succeed; delete the result. */
static cJSON *call(const char *method, const char *path, const char *body)
{
    struct wire_answer answer;
    char type[64];
    const int status = wire_call(&daemon_, method, path, body, &answer);
    if (status / 100 != 2)
        fail_msg("%s %s: HTTP %d %s", method, path, status, buf_text(&answer.body));
    assert_true(wire_header(&answer, "content-type", type, sizeof type));
    assert_string_equal(type, "application/json");
    cJSON *json = wire_json(&answer);
    wire_answer_close(&answer);
    return json;
}

static cJSON *complete(const char *fields)
{
    char body[2048];
    snprintf(body, sizeof body, "{%s}", fields);
    return call("POST", "/v1/completions", body);
}

static void refused(const char *method, const char *path, const char *body, int status,
                    const char *code, const char *param)
{
    struct wire_answer answer;
    wire_call(&daemon_, method, path, body, &answer);
    if (answer.status != status)
        print_message("%s %s %.200s\n", method, path, body ? body : "");
    wire_check_error(&answer, status, code, param);
    wire_answer_close(&answer);
}

static cJSON *stream(const char *path, const char *headers, const char *body)
{
    struct wire wire;
    struct wire_answer answer;
    char value[64];
    wire_open(&wire, &daemon_);
    wire_ask(&wire, "POST", path, headers, body, strlen(body));
    if (wire_answer(&wire, &answer, false) != 200)
        fail_msg("HTTP %d: %s", answer.status, answer.body.data);
    assert_true(wire_header(&answer, "content-type", value, sizeof value));
    assert_string_equal(value, "text/event-stream");
    assert_true(wire_header(&answer, "cache-control", value, sizeof value));
    cJSON *events = answer_events(&answer);
    wire_answer_close(&answer);
    wire_close(&wire);
    return events;
}

static cJSON *stream_completion(const char *fields)
{
    char body[2048];
    snprintf(body, sizeof body, "{%s,\"stream\":true}", fields);
    return stream("/v1/completions", "", body);
}

/* ---- refusals ---- */

static void test_bodies(void **state)
{
    (void)state;
    static const struct {
        const char *body, *code, *param;
    } cases[] = {
        {"", "invalid", NULL},
        {"{", "invalid", NULL},
        {"{\"prompt\":\"x\"", "invalid", NULL},
        {"{\"prompt\":\"x\"} {}", "invalid", NULL},
        {"[]", "invalid", NULL},
        {"\"x\"", "invalid", NULL},
        {"{\"prompt\":\"a\\u0000b\"}", "invalid", NULL},
        {"{}", "invalid", "prompt"},
        {"{\"prompt\":null}", "invalid", "prompt"},
        {"{\"prompt\":5}", "invalid", "prompt"},
        {"{\"prompt\":[true]}", "invalid", "prompt"},
        {"{\"prompt\":[\"a\",5]}", "invalid", "prompt"},
        {"{\"prompt\":[-1]}", "invalid", "prompt"},
        {"{\"prompt\":[1.5]}", "invalid", "prompt"},
        {"{\"prompt\":[256]}", "invalid", "prompt"},
        {"{\"prompt\":[[1],[99999]]}", "invalid", "prompt"},
        {"{\"prompt\":\"\"}", "invalid", NULL},
        {"{\"prompt\":\"x\",\"max_tokens\":-1}", "invalid", "max_tokens"},
        {"{\"prompt\":\"x\",\"max_tokens\":1.5}", "invalid", "max_tokens"},
        {"{\"prompt\":\"x\",\"max_tokens\":\"9\"}", "invalid", "max_tokens"},
        {"{\"prompt\":\"x\",\"max_tokens\":1e300}", "invalid", "max_tokens"},
        {"{\"prompt\":\"x\",\"max_tokens\":1e999}", "invalid", "max_tokens"},
        {"{\"prompt\":\"x\",\"max_tokens\":18446744073709551616}", "invalid", "max_tokens"},
        {"{\"prompt\":[-1e999]}", "invalid", "prompt"},
        {"{\"prompt\":\"x\",\"temperature\":1e999}", "invalid", "temperature"},
        {"{\"prompt\":\"x\",\"seed\":-1e999}", "invalid", "seed"},
        {"{\"prompt\":\"x\",\"top_k\":1e999}", "invalid", "top_k"},
        {"{\"prompt\":\"x\",\"repetition_penalty\":1e999}", "invalid", "repetition_penalty"},
        {"{\"prompt\":\"x\",\"priority\":1e999}", "invalid", "priority"},
        {"{\"prompt\":\"x\",\"timeout\":1e999}", "invalid", "timeout"},
        {"{\"prompt\":\"x\",\"logit_bias\":{\"1\":-1e999}}", "invalid", "logit_bias"},
        {"{\"prompt\":\"x\",\"temperature\":NaN}", "invalid", NULL},
        {"{\"prompt\":\"x\",\"temperature\":0x1}", "invalid", NULL},
        {"{\"prompt\":\"\xff\"}", "invalid", NULL},
        {"{\"prompt\":\"\xc0\xaf\"}", "invalid", NULL},     /* longer than it need be */
        {"{\"prompt\":\"\xed\xa0\x80\"}", "invalid", NULL}, /* half a pair */
        {"{\"prompt\":\"\xf4\x90\x80\x80\"}", "invalid", NULL},
        {"{\"prompt\":\"\xe2\x82\"}", "invalid", NULL}, /* not all of one */
        {"{\"prompt\":\"\\ud800\"}", "invalid", NULL},
        {"{\"prompt\":\"\\udc00x\"}", "invalid", NULL},
        {"{\"\xff\":1,\"prompt\":\"x\"}", "invalid", NULL},
        {"{\"prompt\":\"x\",\"n\":0}", "invalid", "n"},
        {"{\"prompt\":\"x\",\"n\":129}", "invalid", "n"},
        {"{\"prompt\":[\"a\",\"b\"],\"n\":65}", "invalid", "n"},
        {"{\"prompt\":\"x\",\"n\":2,\"best_of\":1}", "invalid", "best_of"},
        {"{\"prompt\":\"x\",\"best_of\":2,\"stream\":true}", "invalid", "best_of"},
        {"{\"prompt\":\"x\",\"echo\":1}", "invalid", "echo"},
        {"{\"prompt\":\"x\",\"stream\":\"yes\"}", "invalid", "stream"},
        {"{\"prompt\":\"x\",\"logprobs\":21}", "invalid", "logprobs"},
        {"{\"prompt\":\"x\",\"stop\":5}", "invalid", "stop"},
        {"{\"prompt\":\"x\",\"stop\":\"\"}", "invalid", "stop"},
        {"{\"prompt\":\"x\",\"stop\":[\"a\",\"b\",\"c\",\"d\",\"e\"]}", "invalid", "stop"},
        {"{\"prompt\":\"x\",\"temperature\":-0.1}", "invalid", "temperature"},
        {"{\"prompt\":\"x\",\"temperature\":\"hot\"}", "invalid", "temperature"},
        {"{\"prompt\":\"x\",\"top_p\":1.1}", "invalid", "top_p"},
        {"{\"prompt\":\"x\",\"min_p\":-1}", "invalid", "min_p"},
        {"{\"prompt\":\"x\",\"top_k\":-1}", "invalid", "top_k"},
        {"{\"prompt\":\"x\",\"presence_penalty\":3}", "invalid", "presence_penalty"},
        {"{\"prompt\":\"x\",\"frequency_penalty\":-3}", "invalid", "frequency_penalty"},
        {"{\"prompt\":\"x\",\"repetition_penalty\":0}", "invalid", "repetition_penalty"},
        {"{\"prompt\":\"x\",\"seed\":1.5}", "invalid", "seed"},
        {"{\"prompt\":\"x\",\"logit_bias\":[]}", "invalid", "logit_bias"},
        {"{\"prompt\":\"x\",\"logit_bias\":{\"a\":1}}", "invalid", "logit_bias"},
        {"{\"prompt\":\"x\",\"logit_bias\":{\"1\":101}}", "invalid", "logit_bias"},
        {"{\"prompt\":\"x\",\"logit_bias\":{\"256\":1}}", "invalid", "logit_bias"},
        {"{\"prompt\":\"x\",\"stream_options\":true}", "invalid", "stream_options"},
        {"{\"prompt\":\"x\",\"stream_options\":{\"a\":1}}", "unsupported", "a"},
        {"{\"prompt\":\"x\",\"suffix\":\"y\"}", "unsupported", "suffix"},
        {"{\"prompt\":\"x\",\"include\":[\"other\"]}", "unsupported", "include"},
        {"{\"prompt\":\"x\",\"frobnicate\":1}", "unsupported", "frobnicate"},
        {"{\"prompt\":\"x\",\"retrieval\":\"yes\"}", "invalid", "retrieval"},
        {"{\"prompt\":\"x\",\"memory\":5}", "invalid", "memory"},
        {"{\"prompt\":\"x\",\"memory\":\"mem_0123456789012345678901234567890123456789\"}",
         "invalid", "memory"},
        {"{\"prompt\":[\"a\",\"b\"],\"memory\":\"mem_1\"}", "invalid", "memory"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        refused("POST", "/v1/completions", cases[i].body, 400, cases[i].code, cases[i].param);
    /* As deep as the body may be long: refused, not followed. */
    static const char *const nests[] = {"[", "{\"prompt\":"};
    for (size_t i = 0; i < sizeof nests / sizeof *nests; i++) {
        struct buf deep;
        buf_init(&deep);
        while (deep.size < 4 * LIMITS_MIB)
            buf_append_text(&deep, nests[i]);
        refused("POST", "/v1/completions", buf_text(&deep), 400, "invalid", NULL);
        buf_close(&deep);
    }
    refused("POST", "/v1/completions", "{\"prompt\":\"x\",\"model\":\"gpt-9\"}", 404, "not_found",
            "model");
    refused("POST", "/v1/chat/completions", /* this model has no template */
            "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}", 400, "unsupported",
            "messages");
    refused("POST", "/v1/completions", "{\"prompt\":\"x\",\"memory\":\"mem_none\"}", 404,
            "not_found", NULL);
    refused("POST", "/v1/completions",
            "{\"prompt\":\"x\",\"memory\":\"mem_none\",\"stream\":true,\"memory_write\":false}",
            404, "not_found", NULL);
    refused("POST", "/v1/memories", "{\"from\":5}", 400, "invalid", "from");
    refused("POST", "/v1/memories", "{\"name\":\"x\"}", 400, "unsupported", "name");
    refused("POST", "/v1/memories", "{\"metadata\":{\"a\":5}}", 400, "invalid", "metadata");
    refused("POST", "/v1/memories", "{\"metadata\":\"a\"}", 400, "invalid", "metadata");
    refused("POST", "/v1/memories", "not json", 400, "invalid", NULL);
    refused("POST", "/v1/memories", "{\"from\":\"mem_none\"}", 404, "not_found", "from");
    refused("GET", "/v1/memories/mem_none", NULL, 404, "not_found", NULL);
    refused("DELETE", "/v1/memories/mem_none", NULL, 404, "not_found", NULL);
    refused("GET", "/v1/memories/mem_none/chunks", NULL, 404, "not_found", NULL);
    refused("POST", "/v1/memories/mem_none/append", "text", 404, "not_found", NULL);
    refused("POST", "/v1/memories/mem_none/append?offset=-1", "text", 400, "invalid", "offset");
    refused("POST", "/v1/memories/mem_none/append?offset=1x", "text", 400, "invalid", "offset");
    refused("GET", "/v1/models/gpt-9", NULL, 404, "not_found", "model");
}

/* Echoed log probabilities take hundreds of bytes a token: a long prompt's are refused. */
static void test_echo_bound(void **state)
{
    (void)state;
    const size_t size = 60000;
    char *body = malloc(size + 128);
    assert_non_null(body);
    int used = snprintf(body, 128, "{\"echo\":true,\"logprobs\":20,\"prompt\":\"");
    memset(body + used, 'a', size);
    strcpy(body + (size_t)used + size, "\"}");
    refused("POST", "/v1/completions", body, 413, "too_large", "echo");
    free(body);
}

static void test_models(void **state)
{
    (void)state;
    cJSON *list = call("GET", "/v1/models", NULL);
    cJSON *one = call("GET", "/v1/models/" MODEL_NAME, NULL);
    assert_string_equal(answer_text(list, "object"), "list");
    assert_true(cJSON_Compare(answer_at(list, "data.0"), one, true));
    assert_string_equal(answer_text(one, "id"), MODEL_NAME);
    assert_string_equal(answer_text(one, "object"), "model");
    assert_string_equal(answer_text(one, "owned_by"), "rambad");
    assert_true(answer_number(one, "created") > 1.6e9);
    cJSON_Delete(list);
    cJSON_Delete(one);
}

/* ---- completions ---- */

static void test_completion(void **state)
{
    (void)state;
    cJSON *a = complete("\"prompt\":\"Once upon\"," TURN);
    assert_string_equal(answer_text(a, "object"), "text_completion");
    assert_string_equal(answer_text(a, "model"), MODEL_NAME);
    assert_memory_equal(answer_text(a, "id"), "cmpl-", 5);
    assert_true(answer_number(a, "created") > 1.6e9);
    assert_string_equal(answer_text(a, "choices.0.finish_reason"), "length");
    assert_true(cJSON_IsNull(answer_at(a, "choices.0.logprobs")));
    assert_int_equal(answer_number(a, "usage.prompt_tokens"), 9);
    assert_int_equal(answer_number(a, "usage.completion_tokens"), 16); /* the default */
    assert_int_equal(answer_number(a, "usage.total_tokens"), 25);
    assert_int_equal(answer_number(a, "usage.prompt_tokens_details.cached_tokens"), 0);
    /* The same prompt as token ids; several at once; max_tokens 0. */
    cJSON *ids = complete("\"prompt\":[79,110,99,101,32,117,112,111,110],\"model\":\"" MODEL_NAME
                          "\",\"user\":\"me\"," TURN);
    cJSON *many = complete("\"prompt\":[\"other\",\"Once upon\"],\"n\":2," TURN);
    assert_string_equal(answer_text(ids, "choices.0.text"), answer_text(a, "choices.0.text"));
    assert_int_equal(cJSON_GetArraySize(answer_at(many, "choices")), 4);
    for (int i = 0; i < 4; i++) {
        const cJSON *choice = cJSON_GetArrayItem(answer_at(many, "choices"), i);
        assert_int_equal(answer_number(choice, "index"), i);
    }
    assert_string_equal(answer_text(many, "choices.2.text"), answer_text(a, "choices.0.text"));
    assert_string_equal(answer_text(many, "choices.3.text"), answer_text(a, "choices.0.text"));
    assert_int_equal(answer_number(many, "usage.prompt_tokens"), 14);
    assert_int_equal(answer_number(many, "usage.completion_tokens"), 64);
    cJSON *none = complete("\"prompt\":\"Once upon\",\"max_tokens\":0,\"echo\":true," TURN);
    assert_string_equal(answer_text(none, "choices.0.text"), "Once upon");
    assert_int_equal(answer_number(none, "usage.completion_tokens"), 0);
    cJSON_Delete(a);
    cJSON_Delete(ids);
    cJSON_Delete(many);
    cJSON_Delete(none);
}

static void test_seed(void **state)
{
    (void)state;
    const char *fields = "\"prompt\":\"dice\",\"max_tokens\":24,\"temperature\":2,\"n\":2,"
                         "\"ignore_eos\":true,\"seed\":%s";
    char text[256];
    cJSON *answers[4];
    for (int i = 0; i < 4; i++) { /* 7, 7, 8, none */
        snprintf(text, sizeof text, fields, i < 2 ? "7" : i == 2 ? "8" : "null");
        answers[i] = complete(text);
    }
    assert_true(
        cJSON_Compare(answer_at(answers[0], "choices"), answer_at(answers[1], "choices"), true));
    for (int i = 2; i < 4; i++)
        assert_string_not_equal(answer_text(answers[0], "choices.0.text"),
                                answer_text(answers[i], "choices.0.text"));
    assert_string_not_equal(answer_text(answers[0], "choices.0.text"),
                            answer_text(answers[0], "choices.1.text"));
    for (int i = 0; i < 4; i++)
        cJSON_Delete(answers[i]);
}

static void test_bias_and_stop(void **state)
{
    (void)state;
    /* A bias of 100 decides every token: "z". */
    cJSON *a = complete("\"prompt\":\"x\",\"max_tokens\":5,\"logit_bias\":{\"122\":100}," TURN);
    assert_string_equal(answer_text(a, "choices.0.text"), "zzzzz");
    cJSON_Delete(a);
    /* A stop string that spans tokens is not in the text, nor is any part of it. */
    a = complete("\"prompt\":\"x\",\"max_tokens\":9,\"stop\":[\"q\",\"zz\"],"
                 "\"logit_bias\":{\"122\":100}," TURN);
    assert_string_equal(answer_text(a, "choices.0.text"), "");
    assert_string_equal(answer_text(a, "choices.0.finish_reason"), "stop");
    assert_int_equal(answer_number(a, "usage.completion_tokens"), 2);
    cJSON_Delete(a);
    /* One that never completes is given back at the end. */
    a = complete("\"prompt\":\"x\",\"max_tokens\":3,\"stop\":\"zzzz\","
                 "\"logit_bias\":{\"122\":100}," TURN);
    assert_string_equal(answer_text(a, "choices.0.text"), "zzz");
    assert_string_equal(answer_text(a, "choices.0.finish_reason"), "length");
    cJSON_Delete(a);
    /* The end of the text, unless it is to be ignored. */
    a = complete("\"prompt\":\"x\",\"max_tokens\":3,\"temperature\":0,\"logit_bias\":{\"0\":100}");
    assert_string_equal(answer_text(a, "choices.0.finish_reason"), "stop");
    assert_int_equal(answer_number(a, "usage.completion_tokens"), 1);
    cJSON_Delete(a);
}

static void test_logprobs(void **state)
{
    (void)state;
    cJSON *a = complete("\"prompt\":\"abc\",\"max_tokens\":4,\"logprobs\":3,\"echo\":true," TURN);
    const cJSON *l = answer_at(a, "choices.0.logprobs");
    const char *text = answer_text(a, "choices.0.text");
    assert_memory_equal(text, "abc", 3);
    const cJSON *tokens = answer_at(l, "tokens"), *values = answer_at(l, "token_logprobs");
    const cJSON *tops = answer_at(l, "top_logprobs"), *offsets = answer_at(l, "text_offset");
    assert_int_equal(cJSON_GetArraySize(tokens), 7);
    assert_int_equal(cJSON_GetArraySize(values), 7);
    assert_int_equal(cJSON_GetArraySize(tops), 7);
    assert_int_equal(cJSON_GetArraySize(offsets), 7);
    assert_true(cJSON_IsNull(cJSON_GetArrayItem(values, 0)));
    assert_true(cJSON_IsNull(cJSON_GetArrayItem(tops, 0)));
    for (int i = 0; i < 7; i++) {
        if (i < 3)
            assert_int_equal(cJSON_GetArrayItem(offsets, i)->valuedouble, i);
        if (!i)
            continue;
        const double value = cJSON_GetArrayItem(values, i)->valuedouble;
        assert_true(value <= 0);
        const cJSON *top = cJSON_GetArrayItem(tops, i);
        assert_int_equal(cJSON_GetArraySize(top), 3); /* no two by the same name */
        if (i >= 3) /* greedy: the token is the first of the alternatives */
            assert_true(fabs(top->child->valuedouble - value) < 1e-6);
    }
    cJSON_Delete(a);
    /* A token that is no character by itself is named by its byte. */
    a = complete("\"prompt\":\"x\",\"max_tokens\":1,\"logprobs\":1,"
                 "\"logit_bias\":{\"233\":100}," TURN);
    assert_string_equal(answer_text(a, "choices.0.logprobs.tokens.0"), "bytes:\\xe9");
    assert_string_equal(answer_text(a, "choices.0.text"), "\xef\xbf\xbd");
    cJSON_Delete(a);
    /* logprobs 0: the tokens' own alone. best_of ranks by them. */
    a = complete("\"prompt\":\"abc\",\"max_tokens\":4,\"logprobs\":0,\"n\":1,\"best_of\":4,"
                 "\"temperature\":1.5,\"seed\":3,\"ignore_eos\":true");
    cJSON *all = complete("\"prompt\":\"abc\",\"max_tokens\":4,\"logprobs\":0,\"n\":4,"
                          "\"temperature\":1.5,\"seed\":3,\"ignore_eos\":true");
    double best = -INFINITY;
    const char *best_text = NULL;
    for (int i = 0; i < 4; i++) {
        const cJSON *choice = cJSON_GetArrayItem(answer_at(all, "choices"), i), *value;
        double sum = 0;
        cJSON_ArrayForEach(value, answer_at(choice, "logprobs.token_logprobs")) sum +=
            value->valuedouble;
        if (sum > best) {
            best = sum;
            best_text = answer_text(choice, "text");
        }
    }
    assert_int_equal(cJSON_GetArraySize(answer_at(a, "choices")), 1);
    assert_string_equal(answer_text(a, "choices.0.text"), best_text);
    cJSON_Delete(a);
    cJSON_Delete(all);
}

/* A stream says what the whole answer says. */
static void test_stream(void **state)
{
    (void)state;
    const char *fields = "\"prompt\":[\"one\",\"two\"],\"n\":2,\"max_tokens\":12,\"echo\":true,"
                         "\"temperature\":1,\"seed\":5,\"logprobs\":2,\"ignore_eos\":true,"
                         "\"stream_options\":{\"include_usage\":true}";
    cJSON *whole = complete(fields), *events = stream_completion(fields);
    const int count = cJSON_GetArraySize(events);
    struct buf text[4];
    int ends[4] = {0}, tokens[4] = {0};
    for (int i = 0; i < 4; i++)
        buf_init(&text[i]);
    assert_true(count > 4);
    for (int i = 0; i < count; i++) {
        const cJSON *event = cJSON_GetArrayItem(events, i);
        assert_string_equal(answer_text(event, "object"), "text_completion");
        assert_string_equal(answer_text(event, "id"), answer_text(events, "0.id"));
        assert_true(answer_number(event, "created") == answer_number(events, "0.created"));
        assert_string_equal(answer_text(event, "model"), MODEL_NAME);
        if (i + 1 == count) { /* usage, in an event of its own */
            assert_int_equal(cJSON_GetArraySize(answer_at(event, "choices")), 0);
            assert_true(cJSON_Compare(answer_at(event, "usage"), answer_at(whole, "usage"), true));
            break;
        }
        assert_true(cJSON_IsNull(answer_at(event, "usage")));
        assert_int_equal(cJSON_GetArraySize(answer_at(event, "choices")), 1);
        const int index = (int)answer_number(event, "choices.0.index");
        assert_true(index >= 0 && index < 4 && !ends[index]);
        buf_append_text(&text[index], answer_text(event, "choices.0.text"));
        tokens[index] += cJSON_GetArraySize(answer_at(event, "choices.0.logprobs.tokens"));
        ends[index] = cJSON_IsString(answer_at(event, "choices.0.finish_reason"));
    }
    for (int i = 0; i < 4; i++) {
        const cJSON *choice = cJSON_GetArrayItem(answer_at(whole, "choices"), i);
        assert_true(ends[i]);
        assert_string_equal(buf_text(&text[i]), answer_text(choice, "text"));
        assert_int_equal(tokens[i], cJSON_GetArraySize(answer_at(choice, "logprobs.tokens")));
        buf_close(&text[i]);
    }
    cJSON_Delete(whole);
    cJSON_Delete(events);
    events = stream_completion("\"prompt\":\"x\",\"max_tokens\":2," TURN);
    const cJSON *event;
    cJSON_ArrayForEach(event, events) assert_null(answer_at(event, "usage")); /* not asked for */
    cJSON_Delete(events);
}

/* ---- memories ---- */

static void make(const char *body, char id[LIMITS_ID_BYTES])
{
    cJSON *memory = call("POST", "/v1/memories", body);
    assert_string_equal(answer_text(memory, "object"), "memory");
    snprintf(id, LIMITS_ID_BYTES, "%s", answer_text(memory, "id"));
    cJSON_Delete(memory);
}

static cJSON *append(const char *id, const char *query, const char *text)
{
    char path[160];
    snprintf(path, sizeof path, "/v1/memories/%s/append%s", id, query);
    return call("POST", path, text);
}

static const char book[] = "The tower stood on the hill. A raven lived there, and it was old. "
                           "Nobody knew its name, but it answered to Cornelius.\n";

static void test_memory(void **state)
{
    (void)state;
    char id[LIMITS_ID_BYTES], path[160];
    make("{\"metadata\":{\"name\":\"raven\",\"k\\u00e9y\":\"\\\"quoted\\\"\"}}", id);
    cJSON *a = append(id, "", book);
    const double size = (double)strlen(book);
    assert_string_equal(answer_text(a, "object"), "memory.append");
    assert_string_equal(answer_text(a, "memory"), id);
    assert_true(answer_number(a, "tokens") == size && answer_number(a, "position") == size &&
                answer_number(a, "text_bytes") == size && answer_number(a, "seconds") > 0);
    cJSON_Delete(a);
    snprintf(path, sizeof path, "/v1/memories/%s", id);
    a = call("GET", path, NULL);
    assert_true(answer_number(a, "token_count") == size);
    assert_int_equal(answer_number(a, "chunk_count"), strlen(book) / CHUNK);
    assert_true(answer_number(a, "bytes_on_disk") > 0 && answer_number(a, "created_at") > 1.6e9);
    assert_true(cJSON_IsNull(answer_at(a, "parent")));
    assert_string_equal(answer_text(a, "metadata.name"), "raven");
    assert_string_equal(answer_text(a, "metadata.k\xc3\xa9y"), "\"quoted\"");
    cJSON_Delete(a);
    /* Chunks, page by page: their text is the text. */
    struct buf text;
    buf_init(&text);
    for (int from = 0, more = 1; more; from += 3) {
        snprintf(path, sizeof path, "/v1/memories/%s/chunks?from=%d&limit=3", id, from);
        a = call("GET", path, NULL);
        more = cJSON_IsTrue(answer_at(a, "has_more"));
        const cJSON *chunk;
        int index = from;
        cJSON_ArrayForEach(chunk, answer_at(a, "data"))
        {
            assert_int_equal(answer_number(chunk, "index"), index);
            assert_int_equal(answer_number(chunk, "token_start"), index * CHUNK);
            assert_int_equal(answer_number(chunk, "token_end"), (index + 1) * CHUNK);
            assert_int_equal(answer_number(chunk, "byte_start"), text.size);
            buf_append_text(&text, answer_text(chunk, "text"));
            assert_int_equal(answer_number(chunk, "byte_end"), text.size);
            index++;
        }
        cJSON_Delete(a);
    }
    assert_int_equal(text.size, strlen(book) / CHUNK * CHUNK);
    assert_memory_equal(text.data, book, text.size);
    buf_close(&text);
    /* Delete, and it is gone for all. */
    snprintf(path, sizeof path, "/v1/memories/%s", id);
    a = call("DELETE", path, NULL);
    assert_string_equal(answer_text(a, "object"), "memory.deleted");
    assert_true(cJSON_IsTrue(answer_at(a, "deleted")));
    cJSON_Delete(a);
    refused("GET", path, NULL, 404, "not_found", NULL);
    refused("DELETE", path, NULL, 404, "not_found", NULL);
}

/* A retried append does not apply twice: it names where it begins. */
static void test_append_offset(void **state)
{
    (void)state;
    char id[LIMITS_ID_BYTES], path[160], value[64];
    struct wire wire;
    struct wire_answer answer;
    make("{}", id);
    cJSON_Delete(append(id, "?offset=0", "first "));
    snprintf(path, sizeof path, "/v1/memories/%s/append?offset=0", id);
    wire_open(&wire, &daemon_);
    wire_ask(&wire, "POST", path, "", "first ", 6);
    wire_answer(&wire, &answer, false);
    wire_check_error(&answer, 409, "conflict", "offset");
    assert_true(wire_header(&answer, "x-should-retry", value, sizeof value));
    assert_string_equal(value, "false");
    assert_false(wire_header(&answer, "retry-after", value, sizeof value));
    wire_answer_close(&answer);
    wire_close(&wire);
    cJSON *a = append(id, "?offset=6", "second");
    assert_int_equal(answer_number(a, "text_bytes"), 12);
    cJSON_Delete(a);
    a = append(id, "", ""); /* nothing is nothing */
    assert_int_equal(answer_number(a, "tokens"), 0);
    assert_int_equal(answer_number(a, "text_bytes"), 12);
    cJSON_Delete(a);
}

static void test_append_events(void **state)
{
    (void)state;
    char id[LIMITS_ID_BYTES], path[160];
    struct buf text;
    buf_init(&text);
    while (text.size < 70000)
        buf_append_text(&text, book);
    buf_text(&text);
    make("{}", id);
    snprintf(path, sizeof path, "/v1/memories/%s/append", id);
    cJSON *events =
        stream(path, "Accept: text/event-stream\r\nContent-Type: text/plain\r\n", text.data);
    const int count = cJSON_GetArraySize(events);
    double last = -1;
    assert_true(count >= 6); /* the start, a block each 16 KiB, the end */
    for (int i = 0; i < count; i++) {
        const cJSON *event = cJSON_GetArrayItem(events, i);
        assert_string_equal(answer_text(event, "object"),
                            i + 1 < count ? "memory.append.progress" : "memory.append");
        assert_true(answer_number(event, "text_bytes") >= last);
        last = answer_number(event, "text_bytes");
    }
    assert_true(last == (double)text.size);
    cJSON_Delete(events);
    buf_close(&text);
}

static void test_turns(void **state)
{
    (void)state;
    char id[LIMITS_ID_BYTES], fork[LIMITS_ID_BYTES], body[256], fields[256];
    make("{}", id);
    cJSON_Delete(append(id, "", book));
    snprintf(body, sizeof body, "{\"from\":\"%s\",\"metadata\":{\"name\":\"copy\"}}", id);
    make(body, fork);
    struct client_memory copy = daemon_get_memory(&daemon_, fork);
    assert_string_equal(copy.parent, id);
    assert_int_equal(copy.text_bytes, strlen(book));
    /* Without memory_write a question leaves no trace, however often. */
    snprintf(fields, sizeof fields,
             "\"prompt\":\"Who?\",\"max_tokens\":8,\"memory\":\"%s\",\"memory_write\":false," TURN,
             id);
    cJSON *a = complete(fields), *b = complete(fields);
    assert_true(cJSON_Compare(answer_at(a, "choices"), answer_at(b, "choices"), true));
    assert_int_equal(answer_number(a, "usage.prompt_tokens_details.cached_tokens"), strlen(book));
    assert_int_equal(answer_number(a, "usage.prompt_tokens"), strlen(book) + 4);
    assert_int_equal(daemon_get_memory(&daemon_, id).token_count, strlen(book));
    cJSON_Delete(b);
    /* With it, prompt and answer are there, and the memory goes on behind them. */
    snprintf(fields, sizeof fields, "\"prompt\":\"Who?\",\"max_tokens\":8,\"memory\":\"%s\"," TURN,
             id);
    b = complete(fields);
    assert_true(cJSON_Compare(answer_at(a, "choices"), answer_at(b, "choices"), true));
    assert_int_equal(daemon_get_memory(&daemon_, id).token_count, strlen(book) + 12);
    cJSON *c = complete(fields);
    assert_int_equal(answer_number(c, "usage.prompt_tokens_details.cached_tokens"),
                     strlen(book) + 12);
    cJSON_Delete(b);
    /* The fork knows nothing of it, and answers as the memory did. */
    snprintf(fields, sizeof fields, "\"prompt\":\"Who?\",\"max_tokens\":8,\"memory\":\"%s\"," TURN,
             fork);
    b = complete(fields);
    assert_true(cJSON_Compare(answer_at(a, "choices"), answer_at(b, "choices"), true));
    cJSON_Delete(a);
    cJSON_Delete(b);
    cJSON_Delete(c);
    /* All of it is on disk. */
    const uint64_t tokens = daemon_get_memory(&daemon_, id).token_count;
    daemon_kill(&daemon_);
    daemon_start(&daemon_);
    assert_int_equal(daemon_get_memory(&daemon_, id).token_count, tokens);
}

static void test_list(void **state)
{
    (void)state;
    char ids[5][LIMITS_ID_BYTES], path[160], after[LIMITS_ID_BYTES] = "";
    int found = 0;
    bool more = true;
    for (int i = 0; i < 5; i++)
        make("{}", ids[i]);
    while (more) { /* newest first */
        snprintf(path, sizeof path, "/v1/memories?limit=2%s%s", after[0] ? "&after=" : "", after);
        cJSON *page = call("GET", path, NULL);
        const int count = cJSON_GetArraySize(answer_at(page, "data"));
        assert_true(count == 2 || !cJSON_IsTrue(answer_at(page, "has_more")));
        for (int i = 0; i < count; i++) {
            const char *id = answer_text(cJSON_GetArrayItem(answer_at(page, "data"), i), "id");
            if (found < 5)
                assert_string_equal(id, ids[4 - found]);
            found++;
        }
        more = cJSON_IsTrue(answer_at(page, "has_more"));
        if (count)
            snprintf(after, sizeof after, "%s", answer_text(page, "last_id"));
        cJSON_Delete(page);
    }
    assert_true(found >= 5);
}

/* Each token's chunks, their weights, and each chunk's text at its first mention. */
static void check_retrieval(const cJSON *lists, int token_count, char seen[64])
{
    const cJSON *token, *chunk;
    int index = 0;
    cJSON_ArrayForEach(token, lists)
    {
        assert_int_equal(answer_number(token, "token_index"), index++);
        assert_true(strlen(answer_text(token, "token")) > 0);
        assert_true(cJSON_GetArraySize(answer_at(token, "chunks")) > 0);
        cJSON_ArrayForEach(chunk, answer_at(token, "chunks"))
        {
            const unsigned number = (unsigned)answer_number(chunk, "chunk");
            assert_true(number < 64);
            assert_int_equal(answer_number(chunk, "token_start"), number * CHUNK);
            assert_int_equal(answer_number(chunk, "token_end"), (number + 1) * CHUNK);
            assert_true(answer_number(chunk, "weight") >= 0 &&
                        answer_number(chunk, "weight") <= 1.001);
            assert_int_equal(answer_at(chunk, "text") != NULL, !seen[number]);
            const size_t begin = number * CHUNK;
            if (answer_at(chunk, "text") && begin + CHUNK <= strlen(book))
                assert_memory_equal(answer_text(chunk, "text"), book + begin, CHUNK);
            seen[number] = 1;
        }
    }
    assert_int_equal(index, token_count);
}

static void test_retrieval(void **state)
{
    (void)state;
    char id[LIMITS_ID_BYTES], fields[256], seen[64] = "", again[64] = "";
    make("{}", id);
    cJSON_Delete(append(id, "", book));
    snprintf(fields, sizeof fields,
             "\"prompt\":\"Who?\",\"max_tokens\":24,\"memory\":\"%s\",\"memory_write\":false,"
             "\"retrieval\":true," TURN,
             id);
    cJSON *a = complete(fields);
    check_retrieval(answer_at(a, "choices.0.retrieval"), 24, seen);
    assert_true(memchr(seen, 1, strlen(book) / CHUNK) != NULL);
    cJSON *events = stream_completion(fields), *joined = cJSON_CreateArray();
    cJSON *event;
    cJSON_ArrayForEach(event, events)
    {
        cJSON *list = cJSON_GetObjectItem(
            cJSON_GetArrayItem(cJSON_GetObjectItem(event, "choices"), 0), "retrieval");
        while (list && list->child)
            cJSON_AddItemToArray(joined, cJSON_DetachItemFromArray(list, 0));
    }
    check_retrieval(joined, 24, again);
    assert_true(cJSON_Compare(joined, answer_at(a, "choices.0.retrieval"), true));
    cJSON_Delete(a);
    snprintf(fields, sizeof fields,
             "\"prompt\":\"Who?\",\"memory\":\"%s\",\"memory_write\":false,"
             "\"include\":[\"memory.retrieval\"],\"max_tokens\":2," TURN,
             id);
    a = complete(fields);
    assert_int_equal(cJSON_GetArraySize(answer_at(a, "choices.0.retrieval")), 2);
    cJSON_Delete(a);
    cJSON_Delete(events);
    cJSON_Delete(joined);
}

/* ---- side by side ---- */

#define SIDE 8

struct side {
    pthread_t thread;
    char fields[256], *text;
    char id[LIMITS_ID_BYTES]; /* of a memory to append to */
};

static void *ask_aside(void *context)
{
    struct side *side = context;
    cJSON *a = complete(side->fields);
    side->text = strdup(answer_text(a, "choices.0.text"));
    cJSON_Delete(a);
    return NULL;
}

static void *append_aside(void *context)
{
    const struct side *side = context;
    for (int i = 0; i < 20; i++)
        cJSON_Delete(append(side->id, "", book));
    return NULL;
}

/* What is read side by side is remembered as what is read alone. */
static void test_appends_side_by_side(void **state)
{
    (void)state;
    struct side sides[4];
    for (int i = 0; i < 4; i++) {
        make("{}", sides[i].id);
        snprintf(sides[i].fields, sizeof sides[i].fields,
                 "\"prompt\":\"Who?\",\"max_tokens\":40,\"memory\":\"%s\"," TURN, sides[i].id);
        if (i == 0)
            append_aside(&sides[0]);
        else
            assert_int_equal(pthread_create(&sides[i].thread, NULL, append_aside, &sides[i]), 0);
    }
    for (int i = 0; i < 4; i++) {
        if (i)
            pthread_join(sides[i].thread, NULL);
        ask_aside(&sides[i]);
        assert_string_equal(sides[i].text, sides[0].text);
    }
    for (int i = 0; i < 4; i++)
        free(sides[i].text);
}

static void test_side_by_side(void **state)
{
    (void)state;
    struct side sides[SIDE];
    char id[LIMITS_ID_BYTES];
    make("{}", id);
    cJSON_Delete(append(id, "", book));
    for (int i = 0; i < SIDE; i++) { /* prompts and answers of all lengths, with and without */
        snprintf(sides[i].fields, sizeof sides[i].fields,
                 "\"prompt\":\"%.*s\",\"max_tokens\":%d%s%s%s," TURN, 1 + 15 * i, book,
                 120 - 11 * i, i % 2 ? ",\"memory_write\":false,\"memory\":\"" : "",
                 i % 2 ? id : "", i % 2 ? "\"" : "");
        ask_aside(&sides[i]);
    }
    char *alone[SIDE];
    for (int i = 0; i < SIDE; i++)
        alone[i] = sides[i].text;
    for (int i = 0; i < SIDE; i++)
        assert_int_equal(pthread_create(&sides[i].thread, NULL, ask_aside, &sides[i]), 0);
    for (int i = 0; i < SIDE; i++) {
        pthread_join(sides[i].thread, NULL);
        assert_string_equal(sides[i].text, alone[i]);
        free(sides[i].text);
        free(alone[i]);
    }
}

static void test_full_queue(void **state)
{
    (void)state;
    const char *body = "{\"prompt\":\"x\",\"max_tokens\":1000000,\"stream\":true," TURN "}";
    struct wire wires[3];
    struct wire_answer answer;
    char value[64];
    daemon_stop(&daemon_);
    const char *const *before = daemon_.flags;
    daemon_.flags = (const char *const[]){"--threads", "1", "--running", "1", "--queue", "1", NULL};
    daemon_start(&daemon_);
    for (int i = 0; i < 3; i++) {
        wire_open(&wires[i], &daemon_);
        wire_ask(&wires[i], "POST", "/v1/completions", "", body, strlen(body));
        if (i == 0)
            assert_true(wire_wait_for(&wires[i], "data: {"));
        else if (i == 1)
            wire_wait_metric(&daemon_, "rambad_jobs_waiting", 1);
    }
    wire_answer(&wires[2], &answer, false);
    wire_check_error(&answer, 429, "busy", NULL);
    assert_true(wire_header(&answer, "retry-after", value, sizeof value));
    assert_true(wire_header(&answer, "retry-after-ms", value, sizeof value));
    wire_answer_close(&answer);
    wire_close(&wires[0]); /* the second moves up */
    assert_true(wire_wait_for(&wires[1], "data: {"));
    wire_close(&wires[1]);
    wire_close(&wires[2]);
    wire_wait_metric(&daemon_, "rambad_jobs_running", 0);
    /* A stream that has not had its turn begins all the same, and is kept alive by comments. */
    const char *whole = "{\"prompt\":\"x\",\"max_tokens\":1000000," TURN "}";
    wire_open(&wires[0], &daemon_);
    wire_ask(&wires[0], "POST", "/v1/completions", "", whole, strlen(whole));
    wire_wait_metric(&daemon_, "rambad_jobs_running", 1);
    wire_open(&wires[1], &daemon_);
    wire_ask(&wires[1], "POST", "/v1/completions", "", body, strlen(body));
    assert_true(wire_wait_for(&wires[1], ": ping\n\n"));
    assert_non_null(strstr(buf_text(&wires[1].in), "\r\ncontent-type: text/event-stream\r\n"));
    assert_null(strstr(buf_text(&wires[1].in), "data:"));
    wire_close(&wires[0]);
    assert_true(wire_wait_for(&wires[1], "data: {"));
    wire_close(&wires[1]);
    daemon_stop(&daemon_);
    daemon_.flags = before;
    daemon_start(&daemon_);
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bodies),        cmocka_unit_test(test_echo_bound),
        cmocka_unit_test(test_models),        cmocka_unit_test(test_completion),
        cmocka_unit_test(test_seed),          cmocka_unit_test(test_bias_and_stop),
        cmocka_unit_test(test_logprobs),      cmocka_unit_test(test_stream),
        cmocka_unit_test(test_memory),        cmocka_unit_test(test_append_offset),
        cmocka_unit_test(test_append_events), cmocka_unit_test(test_turns),
        cmocka_unit_test(test_list),          cmocka_unit_test(test_retrieval),
        cmocka_unit_test(test_side_by_side),  cmocka_unit_test(test_appends_side_by_side),
        cmocka_unit_test(test_full_queue),
    };
    daemon_choose_tests();
    return cmocka_run_group_tests(tests, setup, teardown);
}
