/* answer_json.h - what the server says: errors, completions and their stream, memories, as JSON.
 * Thread: any (pure functions). Owns nothing; everything is appended to `out`. */
#ifndef PROTO_ANSWER_JSON_H
#define PROTO_ANSWER_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/base/buf.h"
#include "proto/status.h"

/* {"error":{...}}; param "" is written as null. */
void answer_json_error(struct buf *out, enum status status, const char *message, const char *param);
/* data: {json}\n\n around what `json` holds. */
void answer_json_event(struct buf *out, const struct buf *json);

/* The logprobs object of a completion, gathered token by token. */
struct answer_logprobs {
    struct buf tokens, values, tops, offsets;
    size_t count;
};
struct answer_top {
    const char *text;
    size_t size;
    double logprob;
};
void answer_logprobs_init(struct answer_logprobs *logprobs);
void answer_logprobs_close(struct answer_logprobs *logprobs);
/* Empty again; what it has grown to stays. */
void answer_logprobs_clear(struct answer_logprobs *logprobs);
/* A token that is no UTF-8 by itself is written as "bytes:" and \xNN for each of its bytes.
 * `logprob` NaN is null; tops NULL: null (the first echoed token); `offset` of the token in the
 * text, in characters. */
void answer_logprobs_add(struct answer_logprobs *logprobs, const char *text, size_t size,
                         double logprob, const struct answer_top *tops, size_t top_count,
                         size_t offset);

/* The same for a chat, where a token goes with its bytes and its alternatives. */
void answer_logprobs_add_chat(struct answer_logprobs *logprobs, const char *text, size_t size,
                              double logprob, const struct answer_top *tops, size_t top_count);

struct answer_head {
    const char *id, *model;
    int64_t created;      /* seconds since 1970 */
    uint64_t fingerprint; /* of the model */
    bool chat;            /* the shapes of /v1/chat/completions */
};
struct answer_usage {
    uint64_t prompt_tokens, completion_tokens, cached_tokens;
};
struct answer_choice {
    uint32_t index;
    const char *text; /* NULL: nothing was said, as at a stream's beginning or end */
    size_t text_size;
    bool begins;                            /* of a chat's stream: says whose the text is */
    const struct answer_logprobs *logprobs; /* NULL: null */
    const struct buf *retrieval;            /* elements of the array, with commas; NULL: none */
    const char *finish_reason;              /* NULL: null */
};
/* One chunk of a stream; `null_usage`: usage was asked for and comes last. */
void answer_json_chunk(struct buf *out, const struct answer_head *head,
                       const struct answer_choice *choice, bool null_usage);
void answer_json_usage_chunk(struct buf *out, const struct answer_head *head,
                             const struct answer_usage *usage);
void answer_json_completion(struct buf *out, const struct answer_head *head,
                            const struct answer_choice *choices, size_t count,
                            const struct answer_usage *usage);

struct answer_memory {
    const char *id, *parent, *metadata; /* parent "": null; metadata: JSON text */
    int64_t created_at;
    int64_t expires_s, expires_at; /* 0: never */
    bool expires_from_use;
    uint64_t token_count, chunk_count, text_bytes, bytes_on_disk;
};
void answer_json_memory(struct buf *out, const struct answer_memory *memory);
/* {"object":"memory.replay.progress"...}. */
void answer_json_replay(struct buf *out, const char *memory, uint64_t done, uint64_t total);

struct answer_turn {
    uint64_t position, text_bytes;
    int64_t created_at;
    int64_t parent; /* position of the turn before it; under 0: none */
    bool has_snapshot;
    const char *bookmark; /* "": null */
};
void answer_json_turn(struct buf *out, const struct answer_turn *turn);

struct answer_append {
    const char *memory;
    uint64_t tokens, position, text_bytes;
    double seconds;
};
/* {"object":"memory.append"...}, or "memory.append.progress". */
void answer_json_append(struct buf *out, const struct answer_append *append, bool progress);

struct answer_chunk {
    uint64_t index, token_start, token_end, byte_start, byte_end;
    const char *text;
    size_t text_size;
};
void answer_json_memory_chunk(struct buf *out, const struct answer_chunk *chunk);

#endif
