/* bodies.h - the parsers of requests' bodies, each with what must hold of whatever comes to it:
 * what is accepted is within the documented bounds, what is refused says why. Thread: the fuzzer's.
 * Owns nothing. */
#ifndef TESTS_FUZZ_BODIES_H
#define TESTS_FUZZ_BODIES_H

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "proto/base/assert.h"
#include "proto/base/buf.h"
#include "proto/client_json.h"
#include "proto/completion_request.h"
#include "proto/memory_request.h"
#include "proto/response_request.h"

static inline void check_refusal(enum status status, const struct error *err)
{
    ASSERT(status == STATUS_OK || status == STATUS_INVALID || status == STATUS_UNSUPPORTED);
    ASSERT((status != STATUS_OK) == (err->message[0] != 0));
}

static inline bool between(double value, double min, double max)
{
    return value >= min && value <= max; /* NaN is not */
}

static inline void check_completion(const struct completion_request *r)
{
    ASSERT(r->prompt_count >= 1 && r->prompt_count <= LIMITS_PROMPTS);
    for (size_t i = 0; i < r->prompt_count; i++) {
        const struct completion_prompt *p = &r->prompts[i];
        ASSERT(!p->text || (!p->ids && strlen(p->text) == p->text_size));
        for (size_t j = 0; j < p->id_count; j++)
            ASSERT(p->ids[j] >= 0);
    }
    ASSERT(r->n >= 1 && r->best_of >= r->n && r->best_of * r->prompt_count <= LIMITS_CHOICES);
    ASSERT(!r->stream || r->best_of == r->n);
    ASSERT(r->logprobs >= -1 && r->logprobs <= LIMITS_LOGPROBS);
    ASSERT(r->stop_count <= LIMITS_STOP_STRINGS);
    for (size_t i = 0; i < r->stop_count; i++)
        ASSERT(r->stop[i][0] && strlen(r->stop[i]) <= LIMITS_STOP_BYTES);
    ASSERT(between(r->temperature, 0, 100) && between(r->top_p, 0, 1) && between(r->min_p, 0, 1));
    ASSERT(between(r->repetition_penalty, 0.01, 100) && between(r->presence_penalty, -2, 2) &&
           between(r->frequency_penalty, -2, 2));
    ASSERT(r->bias_count <= LIMITS_LOGIT_BIAS);
    for (size_t i = 0; i < r->bias_count; i++)
        ASSERT(r->bias[i].token >= 0 && between((double)r->bias[i].bias, -100, 100));
    ASSERT(strlen(r->model) < sizeof r->model && strlen(r->memory) < sizeof r->memory);
    ASSERT(!r->memory_write ||
           (r->memory[0] && r->best_of == 1 && r->prompt_count == 1)); /* one turn is written */
}

static inline void parse_completion(const char *json, size_t size)
{
    struct completion_request request;
    struct error err = {0};
    const enum status status = completion_request_parse(json, size, &request, &err);
    check_refusal(status, &err);
    if (status)
        return;
    check_completion(&request);
    completion_request_close(&request);
}

static inline void parse_chat(const char *json, size_t size)
{
    struct completion_request request;
    struct error err = {0};
    const enum status status = completion_request_parse_chat(json, size, &request, &err);
    check_refusal(status, &err);
    if (status)
        return;
    check_completion(&request);
    ASSERT(request.message_count >= 1 && request.message_count <= LIMITS_MESSAGES);
    for (size_t i = 0; i < request.message_count; i++)
        ASSERT(request.messages[i].role[0] &&
               strlen(request.messages[i].text) == request.messages[i].size);
    ASSERT(request.max_tokens >= 1);
    completion_request_close(&request);
}

static inline void parse_memory(const char *json, size_t size)
{
    struct memory_request request, again;
    struct error err = {0};
    enum status status = memory_update_parse(json, size, &request, &err);
    check_refusal(status, &err);
    if (!status)
        memory_request_close(&request);
    err = (struct error){0};
    status = memory_request_parse(json, size, &request, &err);
    check_refusal(status, &err);
    if (status)
        return;
    ASSERT(strlen(request.from) < sizeof request.from);
    ASSERT((double)request.expires.seconds <= (double)LIMITS_EXPIRES_S);
    if (request.metadata) { /* what is stored can be read as what was asked */
        struct buf body;
        buf_init(&body);
        buf_append_format(&body, "{\"metadata\":%s}", request.metadata);
        ASSERT(!memory_request_parse(body.data, body.size, &again, &err));
        ASSERT(strcmp(again.metadata, request.metadata) == 0);
        memory_request_close(&again);
        buf_close(&body);
    }
    memory_request_close(&request);
}

static inline void parse_bookmark(const char *json, size_t size)
{
    struct memory_bookmark bookmark;
    struct error err = {0};
    const enum status status = memory_bookmark_parse(json, size, &bookmark, &err);
    check_refusal(status, &err);
    if (!status)
        ASSERT(strlen(bookmark.name) < sizeof bookmark.name);
}

static inline void parse_rewind(const char *json, size_t size)
{
    uint64_t position;
    struct error err = {0};
    check_refusal(memory_rewind_parse(json, size, &position, &err), &err);
}

static inline void check_items(const struct response_items *items)
{
    for (size_t i = 0; i < items->count; i++) {
        ASSERT(items->messages[i].role[0] && items->roles[i][0]);
        ASSERT(!items->messages[i].text ||
               strlen(items->messages[i].text) == items->messages[i].size);
        /* What is given back can be sent again. */
        struct buf again, body;
        struct conversation_request request;
        struct error err = {0};
        buf_init(&again);
        buf_init(&body);
        response_items_append(items, i, "msg_0", &again);
        buf_append_format(&body, "{\"items\":[%s]}", buf_text(&again));
        ASSERT(!conversation_items_parse(body.data, body.size, &request, &err));
        ASSERT(request.items.count == 1);
        ASSERT(request.items.messages[0].size == items->messages[i].size);
        conversation_request_close(&request);
        buf_close(&again);
        buf_close(&body);
    }
}

static inline void parse_response(const char *json, size_t size)
{
    struct response_request request;
    struct error err = {0};
    const enum status status = response_request_parse(json, size, &request, &err);
    check_refusal(status, &err);
    if (status)
        return;
    const struct completion_request *base = &request.base;
    ASSERT(between(base->temperature, 0, 100) && between(base->top_p, 0, 1));
    ASSERT(base->max_tokens >= 1 && base->stop_count <= LIMITS_STOP_STRINGS);
    ASSERT(!request.previous[0] || (!request.conversation[0] && !base->memory[0]));
    ASSERT(!request.conversation[0] || !base->memory[0]);
    if (request.input.count < 8) /* each is parsed again */
        check_items(&request.input);
    response_request_close(&request);
}

static inline void check_conversation(enum status status, struct error *err,
                                      struct conversation_request *request)
{
    check_refusal(status, err);
    if (status)
        return;
    if (request->items.count < 8)
        check_items(&request->items);
    conversation_request_close(request);
}

static inline void parse_conversation(const char *json, size_t size)
{
    struct conversation_request request;
    struct error err = {0};
    check_conversation(conversation_request_parse(json, size, &request, &err), &err, &request);
    err = (struct error){0};
    check_conversation(conversation_update_parse(json, size, &request, &err), &err, &request);
}

static inline void parse_items(const char *json, size_t size)
{
    struct conversation_request request;
    struct error err = {0};
    check_conversation(conversation_items_parse(json, size, &request, &err), &err, &request);
}

/* What the command line makes of a server's answers. */
static inline void parse_answers(const char *json, size_t size)
{
    struct client_memory memory;
    struct client_memory_list memories;
    struct client_append append;
    struct client_completion completion;
    struct client_chunk_list chunks;
    struct client_error error;
    client_json_error(json, size, &error);
    if (!client_json_memory(json, size, &memory))
        ASSERT(strlen(memory.id) < sizeof memory.id && strlen(memory.name) < sizeof memory.name);
    if (!client_json_memory_list(json, size, &memories))
        client_json_memory_list_close(&memories);
    if (!client_json_append(json, size, &append))
        ASSERT(!isnan(append.seconds));
    if (!client_json_completion(json, size, &completion))
        client_json_completion_close(&completion);
    if (!client_json_chunk_list(json, size, &chunks))
        client_json_chunk_list_close(&chunks);
}

#endif
