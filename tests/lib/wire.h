/* wire.h - HTTP by hand over one socket, for tests of what a client library would never send.
 * Thread: the test's. Owns the socket and what was read from it.
 * Waits at most WIRE_SECONDS for anything; then the running test fails. */
#ifndef TESTS_LIB_WIRE_H
#define TESTS_LIB_WIRE_H

#include <stdbool.h>
#include <stddef.h>

#include "proto/base/buf.h"
#include "tests/lib/daemon.h"

#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
#define WIRE_SECONDS 600 /* a daemon that checks itself is slow */
#else
#define WIRE_SECONDS 60
#endif

struct cJSON;

struct wire {
    int fd;
    struct buf in; /* read, not taken yet */
};

struct wire_answer {
    int status;      /* 0: the connection ended before the answer was whole */
    struct buf head; /* status line and header lines */
    struct buf body; /* without chunk framing */
};

void wire_open(struct wire *wire, const struct daemon *daemon);
void wire_close(struct wire *wire);
void wire_send(struct wire *wire, const char *data, size_t size);
void wire_say(struct wire *wire, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* A whole request with a body (NULL: none), keep-alive. `headers` are further lines, each with its
 * end, or "". */
void wire_ask(struct wire *wire, const char *method, const char *path, const char *headers,
              const char *body, size_t size);
/* The next answer; a 100 is one of its own. `is_head`: it has no body whatever its header says.
 * Close it with wire_answer_close. Returns its status. */
int wire_answer(struct wire *wire, struct wire_answer *answer, bool is_head);
void wire_answer_close(struct wire_answer *answer);
/* Reads until `text` has come, and leaves all in wire->in. False: the connection ended first. */
bool wire_wait_for(struct wire *wire, const char *text);
/* Whether the server ends the connection with nothing further, and how long that took. */
bool wire_ends(struct wire *wire, double *seconds);

/* One request on a connection of its own. */
int wire_call(const struct daemon *daemon, const char *method, const char *path, const char *body,
              struct wire_answer *answer);
/* The same, for one whose answer must have this status; its body, which must be JSON: delete it. */
struct cJSON *wire_call_json(const struct daemon *daemon, const char *method, const char *path,
                             const char *body, int status);
/* The value of a header field; false when there is none. */
bool wire_header(const struct wire_answer *answer, const char *name, char *out, size_t room);
/* The body, which must be JSON; delete it. */
struct cJSON *wire_json(const struct wire_answer *answer);
/* The answer is this error: all four keys, an x-request-id, `code`, and `param` (NULL: null). */
void wire_check_error(const struct wire_answer *answer, int status, const char *code,
                      const char *param);
/* A sample of /metrics, such as "rambad_jobs_running"; it must be there. */
double wire_metric(const struct daemon *daemon, const char *name);
/* Waits until the sample has this value. */
void wire_wait_metric(const struct daemon *daemon, const char *name, double value);

#endif
