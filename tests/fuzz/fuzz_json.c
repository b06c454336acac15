/* fuzz_json.c - any bytes as the body of a request, through the parsers of all that is parsed.
 *
 * Input: a byte that chooses the parser, then the body. What is accepted must be within the
 * documented bounds; what is refused must be named. To reach deep quickly, a body that begins with
 * a comma is taken as the rest of an object that has what the parser demands. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "proto/base/assert.h"
#include "proto/base/buf.h"
#include "proto/client_json.h"
#include "proto/completion_request.h"
#include "proto/memory_request.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_refusal(enum status status, const struct error *err)
{
    ASSERT(status == STATUS_OK || status == STATUS_INVALID || status == STATUS_UNSUPPORTED);
    ASSERT((status != STATUS_OK) == (err->message[0] != 0));
}

static bool between(double value, double min, double max)
{
    return value >= min && value <= max; /* NaN is not */
}

static void check_completion(const struct completion_request *r)
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

static void parse_completion(const char *json, size_t size)
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

static void parse_chat(const char *json, size_t size)
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

static void parse_memory(const char *json, size_t size)
{
    struct memory_request request, again;
    struct error err = {0};
    const enum status status = memory_request_parse(json, size, &request, &err);
    check_refusal(status, &err);
    if (status)
        return;
    ASSERT(strlen(request.from) < sizeof request.from);
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

static void parse_bookmark(const char *json, size_t size)
{
    struct memory_bookmark bookmark;
    struct error err = {0};
    const enum status status = memory_bookmark_parse(json, size, &bookmark, &err);
    check_refusal(status, &err);
    if (!status)
        ASSERT(strlen(bookmark.name) < sizeof bookmark.name);
}

static void parse_rewind(const char *json, size_t size)
{
    uint64_t position;
    struct error err = {0};
    check_refusal(memory_rewind_parse(json, size, &position, &err), &err);
}

/* What the command line makes of a server's answers. */
static void parse_answers(const char *json, size_t size)
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

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const struct {
        void (*parse)(const char *json, size_t size);
        const char *begin;
    } parsers[] = {{parse_completion, "{\"prompt\":\"x\""},
                   {parse_memory, "{\"from\":\"mem_0\""},
                   {parse_bookmark, "{\"position\":1"},
                   {parse_rewind, "{\"to\":1"},
                   {parse_chat, "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]"},
                   {parse_answers, "{\"object\":\"memory.append\",\"id\":\"mem_0\""}};
    if (!size)
        return 0;
    const size_t which = data[0] % (sizeof parsers / sizeof *parsers);
    struct buf body;
    buf_init(&body);
    if (size > 1 && data[1] == ',')
        buf_append_text(&body, parsers[which].begin);
    buf_append(&body, data + 1, size - 1);
    char *exact = malloc(body.size ? body.size : 1); /* reading past the end is seen */
    ASSERT(exact);
    if (body.size)
        memcpy(exact, body.data, body.size);
    parsers[which].parse(exact, body.size);
    free(exact);
    buf_close(&body);
    return 0;
}
