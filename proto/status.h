/* status.h - the one list of outcomes, each with its text, HTTP status and API error type.
 * Thread: any (pure functions). Owns nothing.
 * STATUS_OK is 0, so `if (status)` reads as "if it failed". */
#ifndef PROTO_STATUS_H
#define PROTO_STATUS_H

/* name, `code` in the API, text, HTTP status, `type` of the API error body */
#define STATUS_LIST(X)                                                                     \
    X(OK, "ok", "ok", 200, "")                                                             \
    X(INVALID, "invalid", "invalid request", 400, "invalid_request_error")                 \
    X(UNSUPPORTED, "unsupported", "not supported", 400, "invalid_request_error")           \
    X(UNAUTHORIZED, "unauthorized", "no valid API key", 401, "authentication_error")       \
    X(FORBIDDEN, "forbidden", "not allowed", 403, "permission_error")                      \
    X(NOT_FOUND, "not_found", "not found", 404, "not_found_error")                         \
    X(METHOD, "method", "method not allowed", 405, "invalid_request_error")                \
    X(TIMEOUT, "timeout", "timed out", 408, "timeout_error")                               \
    X(CONFLICT, "conflict", "conflict", 409, "conflict_error")                             \
    X(TOO_LARGE, "too_large", "too large", 413, "invalid_request_error")                   \
    X(MEDIA_TYPE, "media_type", "unsupported media type", 415, "invalid_request_error")    \
    X(MISMATCH, "mismatch", "made by another model", 422, "invalid_request_error")         \
    X(BUSY, "busy", "busy", 429, "rate_limit_error")                                       \
    X(HEADERS_TOO_LARGE, "headers_too_large", "header fields too large", 431,              \
      "invalid_request_error")                                                             \
    X(CANCELLED, "cancelled", "cancelled", 499, "cancelled_error")                         \
    X(INTERNAL, "internal", "internal error", 500, "server_error")                         \
    X(IO, "io", "input/output error", 500, "server_error")                                 \
    X(CORRUPT, "corrupt", "data is damaged", 500, "server_error")                          \
    X(UNAVAILABLE, "unavailable", "unavailable", 503, "server_error")                      \
    X(CLOSED, "closed", "closed", 503, "server_error")                                     \
    X(NO_MEMORY, "no_memory", "out of memory", 503, "server_error")                        \
    X(DISK_FULL, "disk_full", "disk full", 507, "server_error")                            \
    X(MEMORY_QUOTA, "memory_quota_exceeded",                                               \
      "the memory's quota on disk (--memory-quota) is used up", 507, "insufficient_quota") \
    X(KEY_QUOTA, "key_quota_exceeded",                                                     \
      "the key's quota on disk (quota= in the file of keys) is used up", 507,              \
      "insufficient_quota")

enum status {
#define X(name, code, text, http, type) STATUS_##name,
    STATUS_LIST(X)
#undef X
};

#define STATUS_CHECKED __attribute__((warn_unused_result))

/* A message a person reads: what went wrong and what to do. Filled only on failure. */
struct error {
    char message[512];
    char param[64]; /* request field it is about, or "" */
};

/* Text such as "not found"; borrowed, lives for ever. */
const char *status_text(enum status status);
/* The API's `code`, such as "not_found"; borrowed, lives for ever. */
const char *status_code(enum status status);
int status_http(enum status status);
const char *status_type(enum status status);

/* Writes the formatted message into `err` (which may be NULL) and returns `status`, so that a
 * failure is one line: return error_set(err, STATUS_INVALID, "...", ...). */
enum status error_set(struct error *err, enum status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* The same, naming the request field. */
enum status error_set_param(struct error *err, enum status status, const char *param,
                            const char *format, ...) __attribute__((format(printf, 4, 5)));

#endif
