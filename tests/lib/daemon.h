/* daemon.h - starts, kills and stops the real daemon on a free port, calls it over HTTP, and runs
 * the command line against it.
 * Thread: the test's; daemon_kill from any.
 * Owns the process, which dies with the test, and its log file; not the data folder. Whatever goes
 * wrong with the process itself fails the running test. */
#ifndef TESTS_LIB_DAEMON_H
#define TESTS_LIB_DAEMON_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "proto/base/buf.h"
#include "proto/client_json.h"

struct daemon {
    pid_t pid; /* 0: not running */
    int port;
    char url[64];
    char data[1024], model[1024], log[1024];
    const char *const *flags; /* further flags, ends with NULL; may be NULL */
    const char *key;          /* that wire_call sends; NULL: none */
};

/* Its data is in `folder`/`name`, which is made unless an earlier daemon left it there; the log
 * goes beside it as `name`.log. RAMBAD_BIN and RAMBA_BIN name the programs. */
void daemon_init(struct daemon *daemon, const char *model, const char *folder, const char *name);
/* Starts it and waits until /health/ready says 200. Returns the seconds that took. */
double daemon_start(struct daemon *daemon);
/* Starts it and does not wait. */
void daemon_spawn(struct daemon *daemon);
/* A daemon started on a new folder, which is returned; and its end, with a check of what it leaves.
 */
char *daemon_begin(struct daemon *daemon, const char *model, const char *const *flags);
void daemon_end(struct daemon *daemon, char *folder);
/* daemon_kill and daemon_start. */
void daemon_restart(struct daemon *daemon);
/* kill -9, and waits for the end. Safe while another thread is in daemon_call. */
void daemon_kill(struct daemon *daemon);
/* SIGTERM; the daemon must end with exit code 0 within 30 seconds. */
void daemon_stop(struct daemon *daemon);
/* The same after its signal. */
void daemon_await(struct daemon *daemon);
/* SIGHUP, until the log says what became of it. */
void daemon_reread_keys(const struct daemon *daemon);
/* The end of its log, for a failing test's output. */
void daemon_print_log(const struct daemon *daemon);

/* One call. `body` may be NULL; `type` is its content type. The answer's body is appended to
 * `out`. Returns the HTTP status, 0 when the connection broke before the answer was whole. */
int daemon_call(const struct daemon *daemon, const char *method, const char *path, const char *type,
                const char *body, size_t size, struct buf *out);
/* A POST with an Idempotency-Key. */
int daemon_call_once(const struct daemon *daemon, const char *key, const char *path,
                     const char *type, const char *body, size_t size, struct buf *out);
/* An append that asks for events: they are appended to `out` as they come. `path` has the query. */
int daemon_append(const struct daemon *daemon, const char *path, const char *text, size_t size,
                  struct buf *out);
/* The calls that every test makes; they must succeed. */
void daemon_create_memory(const struct daemon *daemon, const char *from, char id[LIMITS_ID_BYTES]);
struct client_memory daemon_get_memory(const struct daemon *daemon, const char *id);
/* So many words of text, not twice the same for long. */
void daemon_write_book(struct buf *out, unsigned words);
void daemon_append_text(const struct daemon *daemon, const char *id, const char *text, size_t size);
/* What the memory says to `prompt`, greedily; its turn when `write`. Close it with
 * client_json_completion_close. */
struct client_completion daemon_complete(const struct daemon *daemon, const char *id,
                                         const char *prompt, uint32_t max_tokens, bool write);
/* All whole chunks of the memory: the server's answers one behind the other, as they came, for a
 * comparison to the byte. Returns the number of chunks. */
uint64_t daemon_read_chunks(const struct daemon *daemon, const char *id, struct buf *answers);

/* Runs a program with RAMBA_URL set and waits for it; argv ends with NULL. Its standard output is
 * appended to `out`. Returns its exit code. */
int daemon_run(const struct daemon *daemon, const char *const *argv, struct buf *out);
/* `ramba` with these arguments. */
int daemon_ramba(const struct daemon *daemon, const char *const *arguments, struct buf *out);
/* `rambad key NAME FILE`: adds a key to the file, and copies it to `out`. */
void daemon_new_key(const struct daemon *daemon, const char *name, const char *file, char out[64]);
/* `rambad check` of the data folder, which must find nothing. Not while the daemon runs. */
void daemon_check(const struct daemon *daemon);

/* For main: RAMBAD_TEST=test_drain* runs the tests of that name alone; without it, or empty: all.
 */
void daemon_choose_tests(void);
/* All of a file, appended to `out`. */
void daemon_read_file(const char *path, struct buf *out);
double daemon_now(void); /* seconds, for differences */

#endif
