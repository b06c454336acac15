/* response_request.h - the bodies of POST /v1/responses, and of those about conversations, as plain
 * structs.
 * Thread: any (pure functions). Each owns its texts until its close. */
#ifndef PROTO_RESPONSE_REQUEST_H
#define PROTO_RESPONSE_REQUEST_H

#include "proto/base/buf.h"
#include "proto/completion_request.h"

/* Messages, each in two forms: as it is rendered, and as it is given back. */
struct response_items {
    struct chat_message *messages;
    char **content;     /* [count]: JSON text of the array of its parts */
    const char **roles; /* [count]: as given: "developer" stays what it is */
    size_t count;
};

struct response_request {
    /* What it has in common with other requests: model, max_tokens, sampling, stop, logprobs,
     * stream, memory, memory_write, retrieval. Its own messages are not used. */
    struct completion_request base;
    struct response_items input;
    char *instructions;                 /* NULL: none */
    char *metadata;                     /* JSON text; NULL: none */
    char previous[LIMITS_ID_BYTES];     /* "": none */
    char conversation[LIMITS_ID_BYTES]; /* "": none; never both, nor one beside base.memory */
    bool store, background, truncation_auto, has_max_tokens;
    char tool_choice[8]; /* "auto" or "none": there are no tools */
    bool parallel_tool_calls;
};

/* Defaults: store true, max_tokens LIMITS_CHAT_TOKENS. STATUS_INVALID or STATUS_UNSUPPORTED name
 * the field in err->param. `*out` needs its close only on STATUS_OK. */
STATUS_CHECKED enum status response_request_parse(const char *json, size_t size,
                                                  struct response_request *out, struct error *err);
void response_request_close(struct response_request *request);

struct conversation_request {
    struct response_items items;
    char *metadata; /* JSON text; NULL: not given */
};
/* The body of POST /v1/conversations: {"items", "metadata"}; an empty one is an empty object. */
STATUS_CHECKED enum status conversation_request_parse(const char *json, size_t size,
                                                      struct conversation_request *out,
                                                      struct error *err);
/* The body of POST /v1/conversations/{id}: {"metadata"}, which must be there. */
STATUS_CHECKED enum status conversation_update_parse(const char *json, size_t size,
                                                     struct conversation_request *out,
                                                     struct error *err);
/* The body of POST /v1/conversations/{id}/items: {"items"}, at least one. */
STATUS_CHECKED enum status conversation_items_parse(const char *json, size_t size,
                                                    struct conversation_request *out,
                                                    struct error *err);
void conversation_request_close(struct conversation_request *request);

/* Item `index` as JSON: {id, type: "message", status, role, content}. */
void response_items_append(const struct response_items *items, size_t index, const char *id,
                           struct buf *out);

#endif
