/* completion_request.c - see completion_request.h. */
#include "proto/completion_request.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/completion_fields.h"

#define MAX_TOKENS_LIMIT (1u << 24)

static const char *const fields[] = {"model",
                                     "prompt",
                                     "max_tokens",
                                     "n",
                                     "best_of",
                                     "echo",
                                     "logprobs",
                                     "stop",
                                     "temperature",
                                     "top_p",
                                     "top_k",
                                     "min_p",
                                     "seed",
                                     "stream",
                                     "repetition_penalty",
                                     "presence_penalty",
                                     "logit_bias",
                                     "stream_options",
                                     "frequency_penalty",
                                     "suffix",
                                     "user",
                                     "memory",
                                     "memory_write",
                                     "retrieval",
                                     "include",
                                     "ignore_eos",
                                     "priority",
                                     "timeout",
                                     NULL};

static const char *const chat_fields[] = {"model",
                                          "messages",
                                          "max_tokens",
                                          "max_completion_tokens",
                                          "n",
                                          "logprobs",
                                          "top_logprobs",
                                          "stop",
                                          "temperature",
                                          "top_p",
                                          "top_k",
                                          "min_p",
                                          "seed",
                                          "stream",
                                          "stream_options",
                                          "repetition_penalty",
                                          "presence_penalty",
                                          "frequency_penalty",
                                          "logit_bias",
                                          "user",
                                          "safety_identifier",
                                          "prompt_cache_key",
                                          "service_tier",
                                          "store",
                                          "tools",
                                          "tool_choice",
                                          "parallel_tool_calls",
                                          "response_format",
                                          "modalities",
                                          "memory",
                                          "memory_write",
                                          "retrieval",
                                          "include",
                                          "ignore_eos",
                                          "priority",
                                          "timeout",
                                          NULL};

static void *take(struct json_fields *f, size_t count, size_t size)
{
    void *memory = calloc(count ? count : 1, size);
    if (!memory && !f->status)
        f->status = error_set(f->err, STATUS_NO_MEMORY, "out of memory");
    return memory;
}

static void set_text(struct json_fields *f, const cJSON *item, struct completion_prompt *prompt)
{
    prompt->text = strdup(item->valuestring);
    prompt->text_size = strlen(item->valuestring);
    if (!prompt->text && !f->status)
        f->status = error_set(f->err, STATUS_NO_MEMORY, "out of memory");
}

static void set_ids(struct json_fields *f, const cJSON *array, struct completion_prompt *prompt)
{
    prompt->ids = take(f, (size_t)cJSON_GetArraySize(array), sizeof *prompt->ids);
    const cJSON *item;
    cJSON_ArrayForEach(item, array)
    {
        if (f->status)
            return;
        if (!cJSON_IsNumber(item) ||
            !(item->valuedouble >= 0 && item->valuedouble < 2147483648.0) ||
            item->valuedouble != floor(item->valuedouble))
            json_fail(f, STATUS_INVALID, "prompt", "must hold strings or token ids");
        else
            prompt->ids[prompt->id_count++] = (int32_t)item->valuedouble;
    }
}

static void read_prompts(struct json_fields *f, struct completion_request *r)
{
    const cJSON *prompt = cJSON_GetObjectItemCaseSensitive(f->root, "prompt"), *item;
    const bool several = cJSON_IsArray(prompt) && prompt->child && !cJSON_IsNumber(prompt->child);
    const size_t count = several ? (size_t)cJSON_GetArraySize(prompt) : 1;
    if (!cJSON_IsString(prompt) && !cJSON_IsArray(prompt)) {
        json_fail(f, STATUS_INVALID, "prompt", prompt ? "must be text or token ids" : "is missing");
        return;
    }
    if (count > LIMITS_PROMPTS) {
        json_fail(f, STATUS_INVALID, "prompt", "holds too many prompts");
        return;
    }
    r->prompts = take(f, count, sizeof *r->prompts);
    if (!r->prompts)
        return;
    r->prompt_count = count;
    if (cJSON_IsString(prompt))
        set_text(f, prompt, &r->prompts[0]);
    else if (!several)
        set_ids(f, prompt, &r->prompts[0]);
    size_t at = 0;
    if (several)
        cJSON_ArrayForEach(item, prompt)
        {
            if (cJSON_IsString(item))
                set_text(f, item, &r->prompts[at++]);
            else if (cJSON_IsArray(item))
                set_ids(f, item, &r->prompts[at++]);
            else
                json_fail(f, STATUS_INVALID, "prompt", "must hold strings or token ids");
        }
}

/* ---- messages ---- */

static void append_part(struct json_fields *f, const char *name, const cJSON *part,
                        struct chat_message *message)
{
    const cJSON *type = cJSON_GetObjectItemCaseSensitive(part, "type");
    const cJSON *text =
        cJSON_IsObject(part) ? cJSON_GetObjectItemCaseSensitive(part, "text") : part;
    if (cJSON_IsObject(part) && (!cJSON_IsString(type) || strcmp(type->valuestring, "text") != 0)) {
        json_fail(f, STATUS_UNSUPPORTED, name, "may hold parts of type \"text\" alone");
        return;
    }
    if (!cJSON_IsString(text)) {
        json_fail(f, STATUS_INVALID, name, "must be text, or an array of text parts");
        return;
    }
    const size_t size = strlen(text->valuestring);
    char *grown = realloc(message->text, message->size + size + 1);
    if (!grown) {
        f->status = error_set(f->err, STATUS_NO_MEMORY, "out of memory");
        return;
    }
    memcpy(grown + message->size, text->valuestring, size + 1);
    message->text = grown;
    message->size += size;
}

const char *completion_read_role(struct json_fields *f, const char *name, const char *role)
{
    static const char *const roles[] = {"system", "user", "assistant"};
    if (role && strcmp(role, "developer") == 0) /* what system is called for newer models */
        role = "system";
    for (size_t i = 0; role && i < sizeof roles / sizeof *roles; i++)
        if (strcmp(role, roles[i]) == 0)
            return roles[i];
    json_fail(f, role ? STATUS_UNSUPPORTED : STATUS_INVALID, name,
              "must be system, developer, user or assistant");
    return "";
}

static void read_message(struct json_fields *f, size_t index, const cJSON *item,
                         struct chat_message *message)
{
    char name[64];
    const cJSON *field, *part;
    snprintf(name, sizeof name, "messages[%zu]", index);
    if (!cJSON_IsObject(item)) {
        json_fail(f, STATUS_INVALID, name, "must be an object");
        return;
    }
    cJSON_ArrayForEach(field, item)
    {
        snprintf(name, sizeof name, "messages[%zu].%.30s", index, field->string);
        /* An answer's message may come back as it was given, with "refusal": null. */
        if (strcmp(field->string, "role") != 0 && strcmp(field->string, "content") != 0 &&
            !cJSON_IsNull(field))
            json_fail(f, STATUS_UNSUPPORTED, name, "is not a field that is taken");
    }
    snprintf(name, sizeof name, "messages[%zu].role", index);
    message->role = completion_read_role(
        f, name, cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(item, "role")));
    snprintf(name, sizeof name, "messages[%zu].content", index);
    const cJSON *content = cJSON_GetObjectItemCaseSensitive(item, "content");
    if (!cJSON_IsArray(content)) {
        append_part(f, name, cJSON_IsObject(content) ? NULL : content, message);
        return;
    }
    if (!content->child)
        json_fail(f, STATUS_INVALID, name, "is empty");
    cJSON_ArrayForEach(part, content)
    {
        if (!f->status)
            append_part(f, name, cJSON_IsObject(part) ? part : NULL, message);
    }
}

static void read_messages(struct json_fields *f, struct completion_request *r)
{
    const cJSON *messages = cJSON_GetObjectItemCaseSensitive(f->root, "messages"), *item;
    const int count = cJSON_IsArray(messages) ? cJSON_GetArraySize(messages) : 0;
    if (!count || count > LIMITS_MESSAGES) {
        json_fail(f, STATUS_INVALID, "messages",
                  !messages ? "is missing"
                  : count   ? "holds too many messages"
                            : "must be an array of messages, and not empty");
        return;
    }
    r->messages = take(f, (size_t)count, sizeof *r->messages);
    r->prompts = take(f, 1, sizeof *r->prompts);
    if (!r->messages || !r->prompts)
        return;
    r->prompt_count = 1;
    cJSON_ArrayForEach(item, messages)
    {
        if (f->status)
            return;
        read_message(f, r->message_count, item, &r->messages[r->message_count]);
        r->message_count++;
    }
}

/* ---- what both have ---- */

static void add_stop(struct json_fields *f, struct completion_request *r, const cJSON *item)
{
    if (!cJSON_IsString(item) || !item->valuestring[0])
        json_fail(f, STATUS_INVALID, "stop", "must be strings that are not empty");
    else if (strlen(item->valuestring) > LIMITS_STOP_BYTES)
        json_fail(f, STATUS_INVALID, "stop", "holds a string that is too long");
    else if (r->stop_count == LIMITS_STOP_STRINGS)
        json_fail(f, STATUS_INVALID, "stop", "may hold at most 4 strings");
    else if (!(r->stop[r->stop_count++] = strdup(item->valuestring)))
        f->status = error_set(f->err, STATUS_NO_MEMORY, "out of memory");
}

static void read_stop(struct json_fields *f, struct completion_request *r)
{
    const cJSON *stop = cJSON_GetObjectItemCaseSensitive(f->root, "stop"), *item;
    if (!stop || cJSON_IsNull(stop))
        return;
    if (!cJSON_IsArray(stop)) {
        add_stop(f, r, stop);
        return;
    }
    cJSON_ArrayForEach(item, stop)
    {
        if (!f->status)
            add_stop(f, r, item);
    }
}

static void read_bias(struct json_fields *f, struct completion_request *r)
{
    const cJSON *bias = cJSON_GetObjectItemCaseSensitive(f->root, "logit_bias"), *item;
    if (!bias || cJSON_IsNull(bias))
        return;
    if (!cJSON_IsObject(bias) || cJSON_GetArraySize(bias) > LIMITS_LOGIT_BIAS) {
        json_fail(f, STATUS_INVALID, "logit_bias", "must be an object of at most 1024 tokens");
        return;
    }
    r->bias = take(f, (size_t)cJSON_GetArraySize(bias), sizeof *r->bias);
    cJSON_ArrayForEach(item, bias)
    {
        char *end;
        const long token = strtol(item->string, &end, 10);
        if (f->status)
            return;
        if (*end || end == item->string || token < 0 || token > INT32_MAX ||
            !cJSON_IsNumber(item) || !(fabs(item->valuedouble) <= 100))
            json_fail(f, STATUS_INVALID, "logit_bias", "must map token ids to -100 to 100");
        else
            r->bias[r->bias_count++] =
                (struct completion_bias){(int32_t)token, (float)item->valuedouble};
    }
}

static void read_logprobs(struct json_fields *f, struct completion_request *r)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(f->root, "logprobs");
    uint64_t count = 0;
    r->logprobs = -1;
    if (!item || cJSON_IsNull(item) || cJSON_IsFalse(item))
        return;
    if (!cJSON_IsTrue(item)) /* a switch elsewhere, a number here */
        json_read_count(f, "logprobs", 0, LIMITS_LOGPROBS, &count);
    r->logprobs = (int32_t)count;
}

static void read_chat_logprobs(struct json_fields *f, struct completion_request *r)
{
    bool wanted = false;
    uint64_t count = UINT64_MAX;
    json_read_bool(f, "logprobs", &wanted);
    json_read_count(f, "top_logprobs", 0, LIMITS_LOGPROBS, &count);
    if (count != UINT64_MAX && !wanted)
        json_fail(f, STATUS_INVALID, "top_logprobs", "needs \"logprobs\": true");
    r->logprobs = !wanted ? -1 : count == UINT64_MAX ? 0 : (int32_t)count;
}

/* One bound under its old name and its new one. */
static void read_chat_bound(struct json_fields *f, struct completion_request *r)
{
    uint64_t older = 0, newer = 0;
    json_read_count(f, "max_tokens", 1, MAX_TOKENS_LIMIT, &older);
    json_read_count(f, "max_completion_tokens", 1, MAX_TOKENS_LIMIT, &newer);
    if (older && newer && older != newer)
        json_fail(f, STATUS_INVALID, "max_tokens", "is not what \"max_completion_tokens\" says");
    r->max_tokens = newer ? newer : older ? older : LIMITS_CHAT_TOKENS;
}

void completion_read_stream_options(struct json_fields *f, bool *include_usage)
{
    static const char *const all[] = {"include_obfuscation", "include_usage", NULL};
    static const char *const few[] = {"include_obfuscation", NULL};
    const cJSON *options = cJSON_GetObjectItemCaseSensitive(f->root, "stream_options");
    bool obfuscated = false;
    if (!options || cJSON_IsNull(options))
        return;
    if (!cJSON_IsObject(options)) {
        json_fail(f, STATUS_INVALID, "stream_options", "must be an object");
        return;
    }
    struct json_fields inner = {.root = options, .err = f->err, .status = f->status};
    json_refuse_others(&inner, include_usage ? all : few);
    if (include_usage)
        json_read_bool(&inner, "include_usage", include_usage);
    json_read_bool(&inner, "include_obfuscation", &obfuscated);
    if (obfuscated)
        json_fail(&inner, STATUS_UNSUPPORTED, "stream_options",
                  "may not ask for obfuscation: use TLS with padding");
    f->status = inner.status;
}

bool completion_read_choice(struct json_fields *f, const char *field, const char *first,
                            const char *second)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(f->root, field);
    const char *text = cJSON_GetStringValue(item);
    const bool is_second = text && strcmp(text, second) == 0;
    char message[64];
    snprintf(message, sizeof message, "may be \"%s\" or \"%s\" alone", first, second);
    if (item && !cJSON_IsNull(item) && !is_second && (!text || strcmp(text, first) != 0))
        json_fail(f, text ? STATUS_UNSUPPORTED : STATUS_INVALID, field, message);
    return is_second;
}

const char *completion_read_defaults(struct json_fields *f, bool *parallel_tool_calls)
{
    const cJSON *tools = cJSON_GetObjectItemCaseSensitive(f->root, "tools");
    if (tools && !cJSON_IsNull(tools) && (!cJSON_IsArray(tools) || tools->child))
        json_fail(f, STATUS_UNSUPPORTED, "tools", "may be an empty array alone: there are none");
    *parallel_tool_calls = true;
    json_read_bool(f, "parallel_tool_calls", parallel_tool_calls);
    completion_read_choice(f, "service_tier", "auto", "default");
    return completion_read_choice(f, "tool_choice", "auto", "none") ? "none" : "auto";
}

void completion_read_format(struct json_fields *f, const char *name, const cJSON *format)
{
    const char *type = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(format, "type"));
    if (format && !cJSON_IsNull(format) &&
        (!type || strcmp(type, "text") != 0 || cJSON_GetArraySize(format) != 1))
        json_fail(f, STATUS_UNSUPPORTED, name, "may be of type \"text\" alone");
}

/* What else a chat may say that is so anyway. */
static void read_chat_defaults(struct json_fields *f)
{
    const cJSON *modalities = cJSON_GetObjectItemCaseSensitive(f->root, "modalities"), *item;
    bool parallel_tool_calls, store = false;
    completion_read_defaults(f, &parallel_tool_calls);
    completion_read_format(f, "response_format",
                           cJSON_GetObjectItemCaseSensitive(f->root, "response_format"));
    json_read_bool(f, "store", &store);
    if (store)
        json_fail(f, STATUS_UNSUPPORTED, "store", "may be false alone: /v1/responses stores");
    if (modalities && !cJSON_IsNull(modalities) && !cJSON_IsArray(modalities))
        json_fail(f, STATUS_INVALID, "modalities", "must be an array");
    cJSON_ArrayForEach(item, modalities)
    {
        if (!cJSON_IsString(item) || strcmp(item->valuestring, "text") != 0)
            json_fail(f, STATUS_UNSUPPORTED, "modalities", "may hold \"text\" alone");
    }
}

static void read_include(struct json_fields *f, struct completion_request *r)
{
    const cJSON *include = cJSON_GetObjectItemCaseSensitive(f->root, "include"), *item;
    if (!include || cJSON_IsNull(include))
        return;
    if (!cJSON_IsArray(include))
        json_fail(f, STATUS_INVALID, "include", "must be an array");
    cJSON_ArrayForEach(item, include)
    {
        if (cJSON_IsString(item) && strcmp(item->valuestring, "memory.retrieval") == 0)
            r->retrieval = true;
        else
            json_fail(f, STATUS_UNSUPPORTED, "include", "may hold \"memory.retrieval\" alone");
    }
}

void completion_read_sampling(struct json_fields *f, struct completion_request *r)
{
    read_stop(f, r);
    read_bias(f, r);
    r->temperature = r->top_p = r->repetition_penalty = 1;
    json_read_number(f, "temperature", 0, 100, &r->temperature);
    json_read_number(f, "top_p", 0, 1, &r->top_p);
    json_read_number(f, "min_p", 0, 1, &r->min_p);
    json_read_number(f, "repetition_penalty", 0.01, 100, &r->repetition_penalty);
    json_read_number(f, "presence_penalty", -2, 2, &r->presence_penalty);
    json_read_number(f, "frequency_penalty", -2, 2, &r->frequency_penalty);
    json_read_count(f, "top_k", 0, INT32_MAX, &r->top_k);
    const cJSON *seed = cJSON_GetObjectItemCaseSensitive(f->root, "seed");
    if (seed && !cJSON_IsNull(seed)) {
        if (!cJSON_IsNumber(seed) || !(fabs(seed->valuedouble) <= 9007199254740992.0) ||
            seed->valuedouble != floor(seed->valuedouble))
            json_fail(f, STATUS_INVALID, "seed", "must be a whole number");
        else
            r->seed = (uint64_t)(int64_t)seed->valuedouble;
        r->has_seed = true;
    }
}

void completion_read_terms(struct json_fields *f, struct completion_request *r)
{
    json_read_number(f, "priority", -LIMITS_PRIORITY_S, LIMITS_PRIORITY_S, &r->priority);
    json_read_number(f, "timeout", 0.001, LIMITS_TIMEOUT_S, &r->timeout);
}

/* What the fields demand of each other. */
static void check_together(struct json_fields *f, const struct completion_request *r)
{
    const cJSON *suffix = cJSON_GetObjectItemCaseSensitive(f->root, "suffix");
    if (suffix && !cJSON_IsNull(suffix))
        json_fail(f, STATUS_UNSUPPORTED, "suffix", "is not supported: the model writes forward");
    if (r->best_of < r->n)
        json_fail(f, STATUS_INVALID, "best_of", "must not be under \"n\"");
    if (r->best_of > r->n && r->stream)
        json_fail(f, STATUS_INVALID, "best_of", "cannot be streamed");
    if (r->memory[0] && r->memory_write && (r->best_of > 1 || r->prompt_count > 1))
        json_fail(f, STATUS_INVALID, "memory",
                  "takes one prompt and one choice, unless \"memory_write\" is false");
    if (r->prompt_count * r->best_of > LIMITS_CHOICES)
        json_fail(f, STATUS_INVALID, "n", "times the prompts is more than 128 sequences");
}

static void read_common(struct json_fields *f, struct completion_request *r)
{
    json_read_text(f, "model", r->model, sizeof r->model);
    json_read_count(f, "n", 1, LIMITS_CHOICES, &r->n);
    r->best_of = r->n;
    completion_read_sampling(f, r);
    json_read_bool(f, "stream", &r->stream);
    completion_read_stream_options(f, &r->include_usage);
    json_read_text(f, "memory", r->memory, sizeof r->memory);
    json_read_bool(f, "memory_write", &r->memory_write);
    r->memory_write = r->memory_write && r->memory[0];
    json_read_bool(f, "retrieval", &r->retrieval);
    read_include(f, r);
    json_read_bool(f, "ignore_eos", &r->ignore_eos);
    completion_read_terms(f, r);
}

static enum status parse(const char *json, size_t size, bool chat, struct completion_request *out,
                         struct error *err)
{
    cJSON *root;
    const enum status status = json_parse_object(json, size, &root, err);
    if (status)
        return status;
    struct json_fields f = {.root = root, .err = err};
    struct completion_request *r = out;
    *r = (struct completion_request){.chat = chat, .max_tokens = 16, .n = 1, .memory_write = true};
    json_refuse_others(&f, chat ? chat_fields : fields);
    read_common(&f, r);
    if (chat) {
        read_messages(&f, r);
        read_chat_bound(&f, r);
        read_chat_logprobs(&f, r);
        read_chat_defaults(&f);
    } else {
        read_prompts(&f, r);
        json_read_count(&f, "max_tokens", 0, MAX_TOKENS_LIMIT, &r->max_tokens);
        json_read_count(&f, "best_of", 1, LIMITS_CHOICES, &r->best_of);
        json_read_bool(&f, "echo", &r->echo);
        read_logprobs(&f, r);
    }
    check_together(&f, r);
    cJSON_Delete(root);
    if (f.status)
        completion_request_close(r);
    return f.status;
}

enum status completion_request_parse(const char *json, size_t size, struct completion_request *out,
                                     struct error *err)
{
    return parse(json, size, false, out, err);
}

enum status completion_request_parse_chat(const char *json, size_t size,
                                          struct completion_request *out, struct error *err)
{
    return parse(json, size, true, out, err);
}

void completion_request_close(struct completion_request *request)
{
    for (size_t i = 0; i < request->prompt_count; i++) {
        free(request->prompts[i].text);
        free(request->prompts[i].ids);
    }
    free(request->prompts);
    for (size_t i = 0; i < request->message_count; i++)
        free(request->messages[i].text);
    free(request->messages);
    for (size_t i = 0; i < request->stop_count; i++)
        free(request->stop[i]);
    free(request->bias);
    *request = (struct completion_request){0};
}
