/* completion_request.h - the bodies of POST /v1/completions and /v1/chat/completions as one plain
 * struct.
 * Thread: any (pure functions). Owns its strings and arrays until completion_request_close. */
#ifndef PROTO_COMPLETION_REQUEST_H
#define PROTO_COMPLETION_REQUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/limits.h"
#include "proto/status.h"

struct completion_prompt {
    char *text; /* NULL: `ids` are given */
    size_t text_size;
    int32_t *ids;
    size_t id_count;
};

struct completion_bias {
    int32_t token;
    float bias;
};

struct chat_message {
    const char *role; /* "system", "user" or "assistant"; lives for ever */
    char *text;
    size_t size;
};

struct completion_request {
    bool chat;
    struct chat_message *messages; /* chat: at least one; then there is one prompt, empty */
    size_t message_count;
    char model[128]; /* "" when not given */
    struct completion_prompt *prompts;
    size_t prompt_count; /* at least 1 */
    uint64_t max_tokens, n, best_of;
    bool echo;
    int32_t logprobs; /* alternatives to report; -1: none asked for */
    char *stop[LIMITS_STOP_STRINGS];
    size_t stop_count;
    double temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
    uint64_t top_k;
    struct completion_bias *bias;
    size_t bias_count;
    bool has_seed;
    uint64_t seed;
    bool stream, include_usage;
    char memory[LIMITS_ID_BYTES];
    bool memory_write, retrieval, ignore_eos;
    double priority, timeout; /* seconds; see server/job.h */
};

/* Defaults: max_tokens 16, temperature 1, memory_write true. STATUS_INVALID or STATUS_UNSUPPORTED
 * name the field in err->param. `*out` needs its close only on STATUS_OK. */
STATUS_CHECKED enum status completion_request_parse(const char *json, size_t size,
                                                    struct completion_request *out,
                                                    struct error *err);
/* The same for a chat. Default max_tokens: LIMITS_CHAT_TOKENS. */
STATUS_CHECKED enum status completion_request_parse_chat(const char *json, size_t size,
                                                         struct completion_request *out,
                                                         struct error *err);
void completion_request_close(struct completion_request *request);

#endif
