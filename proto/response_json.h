/* response_json.h - a response of POST /v1/responses: as an object, as its events, and as the bytes
 * that are kept of it.
 * Thread: any (pure functions). A struct response owns its buffers until response_close.
 *
 * Its events are a function of what it holds: number k is the same whenever it is written, so a
 * stream is resumed, after a restart too, by writing the events behind the last one seen.
 *
 *   created, in_progress, output_item.added, content_part.added, output_text.delta...,
 *   (output_text.annotation.added...,) output_text.done, content_part.done, output_item.done,
 *   completed or incomplete; failed and cancelled ones end with `failed` wherever they stand. */
#ifndef PROTO_RESPONSE_JSON_H
#define PROTO_RESPONSE_JSON_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/base/buf.h"
#include "proto/limits.h"
#include "proto/response_request.h"

enum response_status {
    RESPONSE_QUEUED,
    RESPONSE_IN_PROGRESS,
    RESPONSE_COMPLETED,
    RESPONSE_INCOMPLETE, /* it reached max_output_tokens */
    RESPONSE_FAILED,
    RESPONSE_CANCELLED
};

struct response {
    char id[LIMITS_ID_BYTES], item[LIMITS_ID_BYTES]; /* its own, and its message's */
    char memory[LIMITS_ID_BYTES];                    /* where its turn is; "" while it has none */
    int64_t created_at, completed_at;                /* seconds since 1970; 0: not yet */
    enum response_status status;
    bool begun; /* its message was announced */
    bool background;
    uint64_t input_tokens, cached_tokens, output_tokens;
    char error_code[32], error_message[512]; /* of a failed one */
    struct buf fields;      /* members of the object that do not change, a comma behind each */
    struct buf text;        /* what it says */
    struct buf logprobs;    /* JSON of the tokens' logprobs, with commas */
    struct buf steps;       /* struct response_step[] */
    struct buf annotations; /* JSON, with commas */
    struct buf marks;       /* uint32_t[]: where each annotation ends */
};

struct response_step { /* one delta: where it ends in `text` and in `logprobs` */
    uint32_t text_end, logprobs_end;
};

void response_init(struct response *response);
void response_close(struct response *response);
/* The members that follow from the request. */
void response_set_fields(struct response *response, const struct response_request *request,
                         const char *model);
/* A delta; `logprobs` are elements with commas between them ("": none). */
void response_add_step(struct response *response, const char *text, size_t text_size,
                       const struct buf *logprobs);
/* `json` is one annotation. */
void response_add_annotation(struct response *response, const struct buf *json);

void response_append_object(const struct response *response, struct buf *out);
/* The message, as it stands when the response has ended so. */
void response_append_item(const struct response *response, enum response_status end,
                          struct buf *out);
/* How many events there are by now. */
uint64_t response_event_count(const struct response *response);
/* "event: TYPE\ndata: JSON\n\n" of event number `index`, which is under the count. */
void response_append_event(const struct response *response, uint64_t index, struct buf *out);

/* The bytes that are kept. */
void response_encode(const struct response *response, struct buf *out);
/* STATUS_CORRUPT: they are none. `*response` needs its close only on STATUS_OK. */
STATUS_CHECKED enum status response_decode(const void *bytes, size_t size,
                                           struct response *response);

#endif
