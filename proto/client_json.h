/* client_json.h - the API as a client sees it: request bodies out of plain values, answers into
 * plain structs.
 * Thread: any (pure functions). Owns nothing; what a parsed struct owns is freed by its _close.
 * Fields that an answer lacks are zero or ""; unknown fields are skipped, so that an older client
 * can talk to a newer server. */
#ifndef PROTO_CLIENT_JSON_H
#define PROTO_CLIENT_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/base/buf.h"
#include "proto/limits.h"
#include "proto/status.h"

#define CLIENT_JSON_NAME_BYTES 128

struct client_memory {
    char id[LIMITS_ID_BYTES];
    char parent[LIMITS_ID_BYTES];      /* "" when it is no fork */
    char name[CLIENT_JSON_NAME_BYTES]; /* metadata.name, cut at a character's border */
    int64_t created_at;                /* seconds since 1970 */
    uint64_t token_count, chunk_count, text_bytes, bytes_on_disk;
};

struct client_memory_list {
    struct client_memory *items; /* owned */
    size_t count;
    bool has_more;
};

/* The answer of an append, and each progress event of one. */
struct client_append {
    bool is_final;
    uint64_t tokens;     /* added by this request so far */
    uint64_t position;   /* of the memory, in tokens */
    uint64_t text_bytes; /* of the memory, committed */
    double seconds;
};

/* One passage that a generated token read. */
struct client_source {
    uint64_t chunk;
    double weight;
    char *text; /* owned; "" when an earlier part of the stream held it */
};

/* A completion, or one chunk of a streamed one; choice 0 alone. */
struct client_completion {
    char *text; /* owned, "" when there is none */
    size_t text_size;
    char finish_reason[32];        /* "" while it goes on */
    struct client_source *sources; /* owned */
    size_t source_count;
    uint64_t prompt_tokens, completion_tokens; /* 0 when not told */
};

struct client_chunk {
    uint64_t index;
    char *text; /* owned */
    size_t text_size;
};

/* One turn of a memory's past. */
struct client_turn {
    uint64_t position;                    /* of the memory after it, in tokens */
    uint64_t text_bytes;                  /* of the memory after it */
    int64_t created_at;                   /* seconds since 1970 */
    bool has_snapshot;                    /* a fork there is made at once */
    char bookmark[LIMITS_BOOKMARK_BYTES]; /* "" for none */
};

struct client_turn_list {
    struct client_turn *items; /* owned */
    size_t count;
    bool has_more;
};

struct client_chunk_list {
    struct client_chunk *items; /* owned */
    size_t count;
    bool has_more;
};

/* What an error answer or event says. False when `text` holds no {"error":{...}}; then `message`
 * and `code` are "". */
struct client_error {
    char message[512];
    char code[64];
};
bool client_json_error(const char *text, size_t size, struct client_error *error);

/* All parsers: STATUS_OK, or STATUS_INVALID when `text` is not the JSON object they expect. */
STATUS_CHECKED enum status client_json_memory(const char *text, size_t size,
                                              struct client_memory *memory);
STATUS_CHECKED enum status client_json_memory_list(const char *text, size_t size,
                                                   struct client_memory_list *list);
void client_json_memory_list_close(struct client_memory_list *list);
STATUS_CHECKED enum status client_json_append(const char *text, size_t size,
                                              struct client_append *append);
STATUS_CHECKED enum status client_json_completion(const char *text, size_t size,
                                                  struct client_completion *completion);
void client_json_completion_close(struct client_completion *completion);
STATUS_CHECKED enum status client_json_turn_list(const char *text, size_t size,
                                                 struct client_turn_list *list);
void client_json_turn_list_close(struct client_turn_list *list);
STATUS_CHECKED enum status client_json_chunk_list(const char *text, size_t size,
                                                  struct client_chunk_list *list);
void client_json_chunk_list_close(struct client_chunk_list *list);

/* The body of POST /v1/memories; `from` and `name` may be NULL, `at` 0: where it stands. Appends to
 * `out`. */
void client_json_write_create(struct buf *out, const char *from, uint64_t at, const char *name);
/* The body of PATCH /v1/memories/{id} that gives the memory of this answer another name; the rest
 * of its metadata stays. Appends to `out`. STATUS_INVALID: the text is no memory. */
STATUS_CHECKED enum status client_json_write_rename(struct buf *out, const char *text, size_t size,
                                                    const char *name);

struct client_completion_request {
    const char *memory; /* NULL: none */
    bool memory_write;
    const char *prompt; /* `prompt_size` bytes of text */
    size_t prompt_size;
    const char *stop; /* one stop string, or NULL */
    uint32_t max_tokens;
    double temperature;
    int64_t seed; /* under 0: the server's choice */
    bool stream;
    bool retrieval;
};
/* The body of POST /v1/completions. Bytes of the prompt that are no UTF-8 become U+FFFD, as JSON
 * cannot hold them; the server refuses NULs. Appends to `out`. */
void client_json_write_completion(struct buf *out, const struct client_completion_request *request);

#endif
