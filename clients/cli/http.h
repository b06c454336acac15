/* http.h - calls to the server over libcurl: whole answers, event streams, streamed bodies.
 * Thread: one. Owns the connection, which is kept between calls. */
#ifndef CLIENTS_CLI_HTTP_H
#define CLIENTS_CLI_HTTP_H

#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "proto/base/buf.h"
#include "proto/client_json.h"

struct http {
    void *curl;    /* libcurl's handle */
    char *url;     /* without a slash at its end; owned */
    char *api_key; /* owned; NULL: none */
};

struct http_answer {
    int code;                  /* HTTP status; 0 when no answer came */
    bool refused;              /* nobody listens there */
    bool interrupted;          /* http_interrupted was set */
    bool cut;                  /* the connection broke before the answer was whole */
    uint32_t retry_after_ms;   /* 0: not told */
    char reason[256];          /* of a failure without an answer, for people */
    struct client_error error; /* what the server said, in an answer or an event */
    struct buf body;           /* of an answer that is no event stream */
};

/* Set by the signal handler of SIGINT: the running call ends early. */
extern volatile sig_atomic_t http_interrupted;

/* `url` and `api_key` (NULL: none) are copied. */
void http_init(struct http *http, const char *url, const char *api_key);
void http_close(struct http *http);

/* Returns bytes written to `out`; 0 ends the body; -1 aborts the call. */
typedef ssize_t (*http_read_cb)(void *context, char *out, size_t room);
/* One event's data, not terminated. False ends the call early. */
typedef bool (*http_event_cb)(void *context, const char *data, size_t size);

struct http_call {
    const char *method; /* "GET"... */
    const char *path;   /* "/v1/memories", with its query */
    const char *json;   /* body, or NULL */
    size_t json_size;
    http_read_cb read_cb; /* streamed body of any length, instead of `json` */
    void *read_context;
    const char *type;      /* of the streamed body; NULL: text/plain */
    http_event_cb body_cb; /* takes the answer's body as it comes; false ends the call */
    void *body_context;
    http_event_cb event_cb; /* asks for an event stream; NULL: a whole answer */
    void *event_context;
};

/* Makes the call. True when the server answered 2xx, the answer is whole and no event held an
 * error. `answer` is filled either way, close it. */
bool http_do(struct http *http, const struct http_call *call, struct http_answer *answer);
void http_answer_close(struct http_answer *answer);

#endif
