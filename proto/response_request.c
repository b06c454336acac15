/* response_request.c - see response_request.h. */
#include "proto/response_request.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/completion_fields.h"
#include "proto/json.h"

#define MAX_TOKENS_LIMIT (1u << 24)

static void no_memory(struct json_fields *f)
{
    if (!f->status)
        f->status = error_set(f->err, STATUS_NO_MEMORY, "out of memory");
}

/* ---- items ---- */

/* Refuses fields of `object`, which is at `name`, that are not among `known` and not null. */
static void refuse_fields(struct json_fields *f, const char *name, const cJSON *object,
                          const char *const *known)
{
    const cJSON *field = cJSON_IsObject(object) ? object->child : NULL;
    for (; field; field = field->next) {
        char path[64];
        size_t i = 0;
        while (known[i] && strcmp(known[i], field->string) != 0)
            i++;
        snprintf(path, sizeof path, "%.32s.%.28s", name, field->string);
        if (!known[i] && !cJSON_IsNull(field))
            json_fail(f, STATUS_UNSUPPORTED, path, "is not a field that is taken");
    }
}

static void add_text(struct json_fields *f, const char *text, struct chat_message *message,
                     bool assistant, struct buf *content)
{
    const size_t size = strlen(text);
    char *grown = realloc(message->text, message->size + size + 1);
    if (!grown) {
        no_memory(f);
        return;
    }
    memcpy(grown + message->size, text, size + 1);
    message->text = grown;
    message->size += size;
    buf_append_format(content, "%s{\"type\":\"%s\",\"text\":", content->size > 1 ? "," : "",
                      assistant ? "output_text" : "input_text");
    json_append_string(content, text, size);
    buf_append_text(content, assistant ? ",\"annotations\":[]}" : "}");
}

/* Parts of text; those of an answer may come back as they were given. */
static void read_part(struct json_fields *f, const char *name, const cJSON *part,
                      struct chat_message *message, bool assistant, struct buf *content)
{
    static const char *const known[] = {"type", "text", NULL};
    static const char *const known_answer[] = {"type", "text", "annotations", "logprobs", NULL};
    const char *type = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(part, "type"));
    const char *text = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(part, "text"));
    if (!cJSON_IsObject(part) || !type)
        json_fail(f, STATUS_INVALID, name, "must be text, or an array of parts with a type");
    else if (strcmp(type, assistant ? "output_text" : "input_text") != 0 &&
             strcmp(type, "text") != 0)
        json_fail(f, STATUS_UNSUPPORTED, name,
                  assistant ? "may hold parts of type \"output_text\" alone"
                            : "may hold parts of type \"input_text\" alone");
    else if (!text)
        json_fail(f, STATUS_INVALID, name, "has a part without text");
    else
        refuse_fields(f, name, part, assistant ? known_answer : known);
    if (!f->status)
        add_text(f, text, message, assistant, content);
}

static void read_item(struct json_fields *f, const char *list, const cJSON *item,
                      struct response_items *items)
{
    static const char *const known[] = {"type", "role", "content", "id", "status", "object", NULL};
    static const char *const roles[] = {"system", "developer", "user", "assistant"};
    char name[64], path[64];
    struct chat_message *message = &items->messages[items->count];
    const cJSON *content = cJSON_GetObjectItemCaseSensitive(item, "content"), *part;
    const cJSON *type = cJSON_GetObjectItemCaseSensitive(item, "type");
    const char *role = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(item, "role"));
    snprintf(name, sizeof name, "%s[%zu]", list, items->count);
    items->roles[items->count] = "";
    items->count++;
    if (!cJSON_IsObject(item)) {
        json_fail(f, STATUS_INVALID, name, "must be an object");
        return;
    }
    snprintf(path, sizeof path, "%.40s.type", name);
    if (type && !cJSON_IsNull(type) &&
        (!cJSON_IsString(type) || strcmp(type->valuestring, "message") != 0))
        json_fail(f, STATUS_UNSUPPORTED, path, "may be \"message\" alone: there are no tools");
    refuse_fields(f, name, item, known);
    snprintf(path, sizeof path, "%.40s.role", name);
    message->role = completion_read_role(f, path, role);
    for (size_t i = 0; role && i < sizeof roles / sizeof *roles; i++)
        if (strcmp(role, roles[i]) == 0)
            items->roles[items->count - 1] = roles[i];
    const bool assistant = strcmp(message->role, "assistant") == 0;
    struct buf parts;
    buf_init(&parts);
    buf_append_text(&parts, "[");
    snprintf(path, sizeof path, "%.40s.content", name);
    if (cJSON_IsString(content))
        add_text(f, content->valuestring, message, assistant, &parts);
    else if (!cJSON_IsArray(content) || !content->child)
        json_fail(f, STATUS_INVALID, path, "must be text, or an array of parts with a type");
    else
        cJSON_ArrayForEach(part, content)
        {
            if (!f->status)
                read_part(f, path, part, message, assistant, &parts);
        }
    buf_append_text(&parts, "]");
    items->content[items->count - 1] = strdup(buf_text(&parts));
    if (!items->content[items->count - 1])
        no_memory(f);
    buf_close(&parts);
}

static bool make_room(struct json_fields *f, struct response_items *items, size_t count)
{
    items->messages = calloc(count + 1, sizeof *items->messages);
    items->content = calloc(count + 1, sizeof *items->content);
    items->roles = calloc(count + 1, sizeof *items->roles);
    if (!items->messages || !items->content || !items->roles)
        no_memory(f);
    return !f->status;
}

static void read_items(struct json_fields *f, const char *name, const cJSON *list, size_t most,
                       struct response_items *items)
{
    const cJSON *item;
    const int count = cJSON_IsArray(list) ? cJSON_GetArraySize(list) : -1;
    if (count < 0)
        json_fail(f, STATUS_INVALID, name, "must be an array of messages");
    else if ((size_t)count > most)
        json_fail(f, STATUS_INVALID, name,
                  most == LIMITS_CONVERSATION_ITEMS ? "may hold at most 20 items"
                                                    : "holds too many items");
    if (f->status || !make_room(f, items, (size_t)count))
        return;
    cJSON_ArrayForEach(item, list)
    {
        if (!f->status)
            read_item(f, name, item, items);
    }
}

static void close_items(struct response_items *items)
{
    for (size_t i = 0; i < items->count; i++) {
        free(items->messages[i].text);
        free(items->content[i]);
    }
    free(items->messages);
    free(items->content);
    free(items->roles);
    *items = (struct response_items){0};
}

void response_items_append(const struct response_items *items, size_t index, const char *id,
                           struct buf *out)
{
    buf_append_format(out,
                      "{\"id\":\"%s\",\"type\":\"message\",\"status\":\"completed\","
                      "\"role\":\"%s\",\"content\":",
                      id, items->roles[index]);
    buf_append_text(out, items->content[index]);
    buf_append_text(out, "}");
}

/* ---- responses ---- */

/* Text is one message of the user's. */
static void read_input(struct json_fields *f, struct response_request *r)
{
    const cJSON *input = cJSON_GetObjectItemCaseSensitive(f->root, "input");
    if (!input || cJSON_IsNull(input)) {
        json_fail(f, STATUS_INVALID, "input", "is missing");
        return;
    }
    if (!cJSON_IsString(input)) {
        read_items(f, "input", input, LIMITS_MESSAGES, &r->input);
        if (!f->status && !r->input.count)
            json_fail(f, STATUS_INVALID, "input", "is empty");
        return;
    }
    if (f->status || !make_room(f, &r->input, 1))
        return;
    struct buf content;
    buf_init(&content);
    buf_append_text(&content, "[");
    r->input.count = 1;
    r->input.messages[0].role = r->input.roles[0] = "user";
    add_text(f, input->valuestring, &r->input.messages[0], false, &content);
    buf_append_text(&content, "]");
    r->input.content[0] = strdup(buf_text(&content));
    if (!r->input.content[0])
        no_memory(f);
    buf_close(&content);
}

/* A string, or {"id": string}. */
static void read_conversation(struct json_fields *f, struct response_request *r)
{
    static const char *const known[] = {"id", NULL};
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(f->root, "conversation");
    if (!cJSON_IsObject(item)) {
        json_read_text(f, "conversation", r->conversation, sizeof r->conversation);
        return;
    }
    struct json_fields inner = {.root = item, .err = f->err, .status = f->status};
    json_refuse_others(&inner, known);
    json_read_text(&inner, "id", r->conversation, sizeof r->conversation);
    if (!r->conversation[0])
        json_fail(&inner, STATUS_INVALID, "conversation", "must be an id, or hold one");
    f->status = inner.status;
}

static void read_include(struct json_fields *f, struct response_request *r)
{
    const cJSON *include = cJSON_GetObjectItemCaseSensitive(f->root, "include"), *item;
    uint64_t tops = UINT64_MAX;
    r->base.logprobs = -1;
    json_read_count(f, "top_logprobs", 0, LIMITS_LOGPROBS, &tops);
    if (tops != UINT64_MAX && tops)
        r->base.logprobs = (int32_t)tops;
    if (!include || cJSON_IsNull(include))
        return;
    if (!cJSON_IsArray(include))
        json_fail(f, STATUS_INVALID, "include", "must be an array");
    cJSON_ArrayForEach(item, include)
    {
        const char *what = cJSON_GetStringValue(item);
        if (what && strcmp(what, "memory.retrieval") == 0)
            r->base.retrieval = true;
        else if (what && strcmp(what, "message.output_text.logprobs") == 0)
            r->base.logprobs = r->base.logprobs < 0 ? 0 : r->base.logprobs;
        else
            json_fail(f, STATUS_UNSUPPORTED, "include",
                      "may hold \"memory.retrieval\" and \"message.output_text.logprobs\" alone");
    }
}

/* Fields that may say what is so anyway, since clients send them. */
static void read_defaults(struct json_fields *f, struct response_request *r)
{
    static const char *const text_known[] = {"format", NULL};
    const cJSON *text = cJSON_GetObjectItemCaseSensitive(f->root, "text");
    strcpy(r->tool_choice, completion_read_defaults(f, &r->parallel_tool_calls));
    r->truncation_auto = completion_read_choice(f, "truncation", "disabled", "auto");
    completion_read_stream_options(f, NULL);
    if (!text || cJSON_IsNull(text))
        return;
    if (!cJSON_IsObject(text))
        json_fail(f, STATUS_INVALID, "text", "must be an object");
    refuse_fields(f, "text", text, text_known);
    completion_read_format(f, "text.format", cJSON_GetObjectItemCaseSensitive(text, "format"));
}

/* What the fields demand of each other. */
static void check_together(struct json_fields *f, const struct response_request *r)
{
    if (r->previous[0] && r->conversation[0])
        json_fail(f, STATUS_INVALID, "previous_response_id",
                  "and \"conversation\" exclude each other");
    if (r->base.memory[0] && (r->previous[0] || r->conversation[0]))
        json_fail(f, STATUS_INVALID, "memory",
                  "excludes \"previous_response_id\" and \"conversation\"");
    if (r->background && !r->store)
        json_fail(f, STATUS_INVALID, "background", "needs \"store\": true");
}

enum status response_request_parse(const char *json, size_t size, struct response_request *out,
                                   struct error *err)
{
    static const char *const known[] = {"model",
                                        "input",
                                        "instructions",
                                        "previous_response_id",
                                        "store",
                                        "background",
                                        "conversation",
                                        "max_output_tokens",
                                        "stream",
                                        "metadata",
                                        "truncation",
                                        "stream_options",
                                        "include",
                                        "top_logprobs",
                                        "temperature",
                                        "top_p",
                                        "top_k",
                                        "min_p",
                                        "repetition_penalty",
                                        "presence_penalty",
                                        "seed",
                                        "stop",
                                        "frequency_penalty",
                                        "logit_bias",
                                        "ignore_eos",
                                        "priority",
                                        "timeout",
                                        "user",
                                        "safety_identifier",
                                        "prompt_cache_key",
                                        "service_tier",
                                        "memory",
                                        "memory_write",
                                        "tools",
                                        "tool_choice",
                                        "parallel_tool_calls",
                                        "text",
                                        NULL};
    cJSON *root;
    const enum status status = json_parse_object(json, size, &root, err);
    if (status)
        return status;
    struct json_fields f = {.root = root, .err = err};
    struct response_request *r = out;
    *r = (struct response_request){
        .base = {.chat = true, .n = 1, .best_of = 1, .memory_write = true}, .store = true};
    json_refuse_others(&f, known);
    json_read_text(&f, "model", r->base.model, sizeof r->base.model);
    json_read_count(&f, "max_output_tokens", 1, MAX_TOKENS_LIMIT, &r->base.max_tokens);
    r->has_max_tokens = r->base.max_tokens != 0;
    r->base.max_tokens = r->has_max_tokens ? r->base.max_tokens : LIMITS_CHAT_TOKENS;
    completion_read_sampling(&f, &r->base);
    read_include(&f, r);
    json_read_bool(&f, "stream", &r->base.stream);
    json_read_bool(&f, "ignore_eos", &r->base.ignore_eos);
    completion_read_terms(&f, &r->base);
    json_read_text(&f, "memory", r->base.memory, sizeof r->base.memory);
    json_read_bool(&f, "memory_write", &r->base.memory_write);
    json_read_text(&f, "previous_response_id", r->previous, sizeof r->previous);
    read_conversation(&f, r);
    json_read_bool(&f, "store", &r->store);
    json_read_bool(&f, "background", &r->background);
    const cJSON *instructions = cJSON_GetObjectItemCaseSensitive(root, "instructions");
    if (cJSON_IsString(instructions)) {
        r->instructions = strdup(instructions->valuestring);
        if (!r->instructions)
            no_memory(&f);
    } else if (instructions && !cJSON_IsNull(instructions)) {
        json_fail(&f, STATUS_UNSUPPORTED, "instructions", "must be text");
    }
    r->metadata = json_read_metadata(&f);
    read_defaults(&f, r);
    check_together(&f, r);
    read_input(&f, r);
    cJSON_Delete(root);
    if (f.status)
        response_request_close(r);
    return f.status;
}

void response_request_close(struct response_request *request)
{
    completion_request_close(&request->base);
    close_items(&request->input);
    free(request->instructions);
    free(request->metadata);
    *request = (struct response_request){0};
}

/* ---- conversations ---- */

/* A body of those fields alone; `wanted` must be there. */
static enum status parse_conversation(const char *json, size_t size, const char *const *known,
                                      const char *wanted, struct conversation_request *out,
                                      struct error *err)
{
    cJSON *root;
    *out = (struct conversation_request){0};
    if (!size && !wanted)
        return STATUS_OK;
    const enum status status = json_parse_object(json, size, &root, err);
    if (status)
        return status;
    struct json_fields f = {.root = root, .err = err};
    json_refuse_others(&f, known);
    const cJSON *items = cJSON_GetObjectItemCaseSensitive(root, "items");
    if (items && !cJSON_IsNull(items))
        read_items(&f, "items", items, LIMITS_CONVERSATION_ITEMS, &out->items);
    out->metadata = json_read_metadata(&f);
    if (wanted && !out->metadata && !out->items.count)
        json_fail(&f, STATUS_INVALID, wanted, items ? "is empty" : "is missing");
    cJSON_Delete(root);
    if (f.status)
        conversation_request_close(out);
    return f.status;
}

enum status conversation_request_parse(const char *json, size_t size,
                                       struct conversation_request *out, struct error *err)
{
    static const char *const known[] = {"items", "metadata", NULL};
    return parse_conversation(json, size, known, NULL, out, err);
}

enum status conversation_update_parse(const char *json, size_t size,
                                      struct conversation_request *out, struct error *err)
{
    static const char *const known[] = {"metadata", NULL};
    return parse_conversation(json, size, known, "metadata", out, err);
}

enum status conversation_items_parse(const char *json, size_t size,
                                     struct conversation_request *out, struct error *err)
{
    static const char *const known[] = {"items", NULL};
    return parse_conversation(json, size, known, "items", out, err);
}

void conversation_request_close(struct conversation_request *request)
{
    close_items(&request->items);
    free(request->metadata);
    *request = (struct conversation_request){0};
}
