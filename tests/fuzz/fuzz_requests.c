/* fuzz_requests.c - bodies that are JSON and have the fields of their kind, in any order and with
 * any values, mostly of the right sort, through the parsers of requests.
 *
 * Input: a byte that chooses the kind; then the bytes by which everything is drawn, one for each
 * choice; behind the last all are zero. */
#include <cjson/cJSON.h>
#include <stdio.h>

#include "proto/json.h"
#include "tests/fuzz/bodies.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum sort {
    SORT_TEXT,
    SORT_ID,
    SORT_COUNT,
    SORT_NUMBER,
    SORT_BOOL,
    SORT_PROMPT,
    SORT_MESSAGES,
    SORT_TEXTS,
    SORT_BIAS,
    SORT_PAIRS,
    SORT_OPTIONS,
    SORT_INCLUDE,
    SORT_EXPIRES,
    SORT_ANY
};

struct field {
    const char *name;
    enum sort sort;
};

#define SAMPLING                                                                             \
    {"model", SORT_ID}, {"max_tokens", SORT_COUNT}, {"n", SORT_COUNT}, {"stop", SORT_TEXTS}, \
        {"temperature", SORT_NUMBER}, {"top_p", SORT_NUMBER}, {"top_k", SORT_COUNT},         \
        {"min_p", SORT_NUMBER}, {"seed", SORT_COUNT}, {"stream", SORT_BOOL},                 \
        {"repetition_penalty", SORT_NUMBER}, {"presence_penalty", SORT_NUMBER},              \
        {"frequency_penalty", SORT_NUMBER}, {"logit_bias", SORT_BIAS},                       \
        {"stream_options", SORT_OPTIONS}, {"user", SORT_TEXT}, {"memory", SORT_ID},          \
        {"memory_write", SORT_BOOL}, {"retrieval", SORT_BOOL}, {"include", SORT_INCLUDE},    \
        {"priority", SORT_NUMBER}, {"timeout", SORT_NUMBER}, {"ignore_eos", SORT_BOOL}

static const struct field completion[] = {{"prompt", SORT_PROMPT},  SAMPLING,
                                          {"best_of", SORT_COUNT},  {"echo", SORT_BOOL},
                                          {"logprobs", SORT_COUNT}, {"suffix", SORT_TEXT},
                                          {NULL, SORT_ANY}};
static const struct field chat[] = {{"messages", SORT_MESSAGES},
                                    SAMPLING,
                                    {"max_completion_tokens", SORT_COUNT},
                                    {"logprobs", SORT_BOOL},
                                    {"top_logprobs", SORT_COUNT},
                                    {"tools", SORT_ANY},
                                    {"tool_choice", SORT_ID},
                                    {"parallel_tool_calls", SORT_BOOL},
                                    {"response_format", SORT_ANY},
                                    {"modalities", SORT_ANY},
                                    {"service_tier", SORT_ID},
                                    {"store", SORT_BOOL},
                                    {NULL, SORT_ANY}};
static const struct field response[] = {{"input", SORT_MESSAGES},
                                        SAMPLING,
                                        {"instructions", SORT_TEXT},
                                        {"previous_response_id", SORT_ID},
                                        {"conversation", SORT_ID},
                                        {"store", SORT_BOOL},
                                        {"background", SORT_BOOL},
                                        {"truncation", SORT_ID},
                                        {"metadata", SORT_PAIRS},
                                        {"max_output_tokens", SORT_COUNT},
                                        {"tool_choice", SORT_ID},
                                        {"parallel_tool_calls", SORT_BOOL},
                                        {"service_tier", SORT_ID},
                                        {"top_logprobs", SORT_COUNT},
                                        {"text", SORT_ANY},
                                        {NULL, SORT_ANY}};
static const struct field conversation[] = {
    {"metadata", SORT_PAIRS}, {"items", SORT_MESSAGES}, {NULL, SORT_ANY}};
static const struct field items[] = {{"items", SORT_MESSAGES}, {NULL, SORT_ANY}};
static const struct field memory[] = {
    {"from", SORT_ID}, {"at", SORT_COUNT}, {"metadata", SORT_PAIRS}, {"expires_after", SORT_EXPIRES},
    {NULL, SORT_ANY}};
static const struct field bookmark[] = {
    {"position", SORT_COUNT}, {"bookmark", SORT_TEXT}, {NULL, SORT_ANY}};
static const struct field rewind_to[] = {{"to", SORT_COUNT}, {NULL, SORT_ANY}};

struct maker {
    const uint8_t *data;
    size_t size, at;
    struct buf json;
    bool spoiled; /* it has what the parser of JSON refuses */
    unsigned depth;
};

static uint8_t draw(struct maker *m)
{
    return m->at < m->size ? m->data[m->at++] : 0;
}

/* Bytes of the input as they are, or something in particular. */
static void make_text(struct maker *m)
{
    static const char *const some[] = {
        "\"\"",         "\"x\"",          "\"\\ud83d\\ude00\"", "\"\xf0\x9f\x98\x80\"",
        "\"\\\"\\\\\"", "\"\\u007f\\n\"", "\"<|im_end|>\"",     "\"\\u0000\"",
        "\"\\ud800\"",  "\"\xff\""};
    const uint8_t kind = draw(m) % 16;
    if (kind < sizeof some / sizeof *some) {
        buf_append_text(&m->json, some[kind]);
        m->spoiled = m->spoiled || kind >= 7;
    } else if (kind == 15) {
        buf_append_text(&m->json, "\"");
        for (unsigned n = draw(m) * 4u; n; n--)
            buf_append_text(&m->json, "ab");
        buf_append_text(&m->json, "\"");
    } else {
        const size_t wanted = draw(m), left = m->size - m->at;
        const size_t n = wanted < left ? wanted : left;
        for (size_t i = 0; i < n; i++)
            m->spoiled = m->spoiled || !m->data[m->at + i]; /* it is written as \u0000 */
        json_append_string(&m->json, (const char *)m->data + m->at, n);
        m->at += n;
    }
}

static void make_number(struct maker *m)
{
    static const char *const some[] = {"0",
                                       "1",
                                       "2",
                                       "-1",
                                       "-0",
                                       "0.5",
                                       "1.5",
                                       "20",
                                       "128",
                                       "1e0",
                                       "1e308",
                                       "1e999",
                                       "-1e999",
                                       "1e-400",
                                       "4294967295",
                                       "4294967296",
                                       "2147483647",
                                       "2147483648",
                                       "9007199254740991",
                                       "9007199254740993",
                                       "18446744073709551615",
                                       "18446744073709551616",
                                       "0.1000000000000000055511151231257827",
                                       "100"};
    const uint8_t kind = draw(m);
    if (kind < 192)
        buf_append_text(&m->json, some[kind % (sizeof some / sizeof *some)]);
    else
        buf_append_format(&m->json, "%d", (kind & 1 ? -1 : 1) * (draw(m) << (kind & 15)));
}

static void make_any(struct maker *m);

static void make_word(struct maker *m)
{
    static const char *const some[] = {
        "mem_0123456789abcdef01234567",
        "resp_0",
        "conv_0",
        "auto",
        "none",
        "disabled",
        "memory.retrieval",
        "user",
        "ramba-20m",
        "",
        "text",
        "a name that is longer than any that the server has ever given to anything it keeps"};
    const uint8_t kind = draw(m);
    if (kind > 200)
        make_text(m);
    else
        buf_append_format(&m->json, "\"%s\"", some[kind % (sizeof some / sizeof *some)]);
}

static void make_content(struct maker *m)
{
    static const char *const types[] = {"text", "input_text", "output_text", "image_url"};
    if (draw(m) % 4 < 2) {
        make_text(m);
        return;
    }
    buf_append_text(&m->json, "[");
    for (unsigned i = 0, n = draw(m) % 4; i < n; i++) {
        buf_append_format(&m->json, "%s{\"type\":\"%s\",\"text\":", i ? "," : "",
                          types[draw(m) % 8 < 6 ? draw(m) % 3 : 3]);
        make_text(m);
        if (draw(m) > 240)
            buf_append_text(&m->json, ",\"annotations\":[]");
        buf_append_text(&m->json, "}");
    }
    buf_append_text(&m->json, "]");
}

static void make_messages(struct maker *m)
{
    static const char *const roles[] = {"user", "assistant", "system", "user",
                                        "user", "developer", "tool",   ""};
    if (draw(m) > 230) {
        make_any(m);
        return;
    }
    buf_append_text(&m->json, "[");
    for (unsigned i = 0, n = draw(m) % 6 + (draw(m) > 250 ? 40 : 0); i < n; i++) {
        buf_append_format(&m->json, "%s{\"role\":\"%s\"", i ? "," : "",
                          roles[draw(m) < 240 ? draw(m) % 6 : draw(m) % 8]);
        if (draw(m) < 250) {
            buf_append_text(&m->json, ",\"content\":");
            make_content(m);
        }
        if (draw(m) > 230)
            buf_append_format(&m->json, ",\"%s\":null", draw(m) & 1 ? "name" : "tool_calls");
        if (draw(m) > 240)
            buf_append_text(&m->json, ",\"type\":\"message\",\"id\":\"msg_0\"");
        buf_append_text(&m->json, "}");
    }
    buf_append_text(&m->json, "]");
}

/* [a, b, ...] or {"": a, ...} of what `make` makes. */
static void make_list(struct maker *m, void (*make)(struct maker *m), bool object, unsigned most)
{
    buf_append_text(&m->json, object ? "{" : "[");
    for (unsigned i = 0, n = draw(m) % (most + 1); i < n; i++) {
        buf_append_text(&m->json, i ? "," : "");
        if (object) {
            if (draw(m) & 1)
                buf_append_format(&m->json, "\"%u\"", draw(m) * 17u);
            else
                make_text(m);
            buf_append_text(&m->json, ":");
        }
        make(m);
    }
    buf_append_text(&m->json, object ? "}" : "]");
}

static void make_any(struct maker *m)
{
    static const char *const some[] = {"null", "true", "false", "{}", "[]", "[[]]", "[{}]"};
    const uint8_t kind = draw(m) % 16;
    if (kind < 7 || m->depth >= 40) {
        buf_append_text(&m->json, some[kind % 7]);
        return;
    }
    m->depth++;
    if (kind < 9)
        make_number(m);
    else if (kind < 11)
        make_text(m);
    else if (kind < 13)
        make_list(m, make_any, kind & 1, 5);
    else if (kind == 13)
        make_list(m, make_number, false, 200);
    else
        make_list(m, make_any, kind & 1, 1);
    m->depth--;
}

static void make_prompt(struct maker *m)
{
    const uint8_t kind = draw(m) % 8;
    if (kind < 3)
        make_text(m);
    else if (kind < 5)
        make_list(m, make_number, false, 30);
    else if (kind == 5)
        make_list(m, make_text, false, 8);
    else
        make_any(m);
}

static void make_expires(struct maker *m)
{
    static const char *const anchors[] = {"last_active_at", "created_at", "now"};
    buf_append_format(&m->json, "{\"anchor\":\"%s\",\"%s\":", anchors[draw(m) % 3],
                      draw(m) & 1 ? "days" : "seconds");
    make_number(m);
    if (draw(m) > 240)
        buf_append_text(&m->json, ",\"seconds\":1");
    buf_append_text(&m->json, "}");
}

static void make_value(struct maker *m, enum sort sort)
{
    if (draw(m) > 235) {
        make_any(m);
        return;
    }
    switch (sort) {
    case SORT_TEXT:
        make_text(m);
        break;
    case SORT_ID:
        make_word(m);
        break;
    case SORT_COUNT:
    case SORT_NUMBER:
        make_number(m);
        break;
    case SORT_BOOL:
        buf_append_text(&m->json, draw(m) & 1 ? "true" : "false");
        break;
    case SORT_PROMPT:
        make_prompt(m);
        break;
    case SORT_MESSAGES:
        make_messages(m);
        break;
    case SORT_TEXTS:
        if (draw(m) & 1)
            make_text(m);
        else
            make_list(m, make_text, false, 6);
        break;
    case SORT_BIAS:
        make_list(m, make_number, true, 20);
        break;
    case SORT_PAIRS:
        make_list(m, make_text, true, 18);
        break;
    case SORT_OPTIONS:
        buf_append_format(&m->json, "{\"include_usage\":%s}", draw(m) & 1 ? "true" : "1");
        break;
    case SORT_INCLUDE:
        make_list(m, make_word, false, 3);
        break;
    case SORT_EXPIRES:
        make_expires(m);
        break;
    case SORT_ANY:
        make_any(m);
        break;
    }
}

static void make_body(struct maker *m, const struct field *fields)
{
    unsigned count = 0, made = 0;
    while (fields[count].name)
        count++;
    buf_append_text(&m->json, "{");
    /* The first is what the parser demands. */
    for (unsigned i = 0, n = 1 + draw(m) % 8; i < n; i++) {
        const uint8_t which = i ? draw(m) : draw(m) > 240;
        buf_append_text(&m->json, made++ ? "," : "");
        if (which == 255) {
            make_text(m);
            buf_append_text(&m->json, ":");
            make_any(m);
        } else {
            buf_append_format(&m->json, "\"%s\":", fields[which % count].name);
            make_value(m, fields[which % count].sort);
        }
    }
    buf_append_text(&m->json, "}");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const struct {
        void (*parse)(const char *json, size_t size);
        const struct field *fields;
    } kinds[] = {{parse_completion, completion}, {parse_chat, chat},
                 {parse_response, response},     {parse_conversation, conversation},
                 {parse_items, items},           {parse_memory, memory},
                 {parse_bookmark, bookmark},     {parse_rewind, rewind_to}};
    struct maker m = {.data = data, .size = size};
    struct cJSON *root;
    struct error err = {0};
    if (!size)
        return 0;
    buf_init(&m.json);
    const size_t kind = draw(&m) % (sizeof kinds / sizeof *kinds);
    make_body(&m, kinds[kind].fields);
    /* What is JSON is taken as such. */
    const enum status status = json_parse_object(m.json.data, m.json.size, &root, &err);
    ASSERT(!status || m.spoiled);
    if (!status)
        cJSON_Delete(root);
    char *exact = malloc(m.json.size); /* reading past the end is seen */
    ASSERT(exact);
    memcpy(exact, m.json.data, m.json.size);
    kinds[kind].parse(exact, m.json.size);
    free(exact);
    buf_close(&m.json);
    return 0;
}
