/* memory_request.h - the body of POST /v1/memories as a plain struct.
 * Thread: any (pure functions). Owns its metadata until memory_request_close. */
#ifndef PROTO_MEMORY_REQUEST_H
#define PROTO_MEMORY_REQUEST_H

#include "proto/limits.h"
#include "proto/status.h"

struct memory_request {
    char from[LIMITS_ID_BYTES]; /* "" for an empty memory */
    char *metadata;             /* JSON object text; NULL when not given */
};

/* An empty body is an empty object. STATUS_INVALID or STATUS_UNSUPPORTED name the field. */
STATUS_CHECKED enum status memory_request_parse(const char *json, size_t size,
                                                struct memory_request *out, struct error *err);
void memory_request_close(struct memory_request *request);

#endif
