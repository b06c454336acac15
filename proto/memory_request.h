/* memory_request.h - the bodies of requests about memories as plain structs.
 * Thread: any (pure functions). Owns its metadata until memory_request_close. */
#ifndef PROTO_MEMORY_REQUEST_H
#define PROTO_MEMORY_REQUEST_H

#include <stdbool.h>

#include "proto/limits.h"
#include "proto/status.h"

struct memory_expires {
    bool is_given;    /* a null too: never */
    uint64_t seconds; /* 0: never */
    bool from_use;
};

struct memory_request {
    char from[LIMITS_ID_BYTES]; /* "" for an empty memory */
    uint64_t at;                /* fork it as it was at this position; 0: as it is */
    char *metadata;             /* JSON object text; NULL when not given */
    struct memory_expires expires;
};

/* An empty body is an empty object. STATUS_INVALID or STATUS_UNSUPPORTED name the field. */
STATUS_CHECKED enum status memory_request_parse(const char *json, size_t size,
                                                struct memory_request *out, struct error *err);
/* The body of PATCH /v1/memories/{id}: what is given of "metadata" and "expires_after". */
STATUS_CHECKED enum status memory_update_parse(const char *json, size_t size,
                                               struct memory_request *out, struct error *err);
void memory_request_close(struct memory_request *request);

/* The body of POST /v1/memories/{id}/rewind: {"to": position}. */
STATUS_CHECKED enum status memory_rewind_parse(const char *json, size_t size, uint64_t *to,
                                               struct error *err);

struct memory_bookmark {
    uint64_t position;
    char name[LIMITS_BOOKMARK_BYTES]; /* "": take it back */
};
/* The body of POST /v1/memories/{id}/turns: {"position", "bookmark"}. */
STATUS_CHECKED enum status memory_bookmark_parse(const char *json, size_t size,
                                                 struct memory_bookmark *out, struct error *err);

#endif
