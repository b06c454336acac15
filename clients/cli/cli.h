/* cli.h - what the commands of `ramba` share: arguments, messages, exit codes, one call each.
 * Thread: one. Owns nothing. */
#ifndef CLIENTS_CLI_CLI_H
#define CLIENTS_CLI_CLI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "clients/cli/http.h"
#include "proto/client_json.h"

/* Exit codes; a script may tell them apart. */
enum cli_exit {
    CLI_OK = 0,
    CLI_FAILED = 1, /* the server refused, or something broke on the way */
    CLI_USAGE = 2,  /* wrong arguments */
    CLI_NO_SERVER = 3,
    CLI_NOT_FOUND = 4 /* no such memory */
};

struct cli {
    struct http http;
    const char *command; /* for messages: "append" */
};

/* The commands. argv[0] is the command's name. Each returns an enum cli_exit. */
int cli_append(struct cli *cli, int argc, char **argv);
int cli_ask(struct cli *cli, int argc, char **argv);
int cli_chat(struct cli *cli, int argc, char **argv);
int cli_list(struct cli *cli, int argc, char **argv);
int cli_show(struct cli *cli, int argc, char **argv);
int cli_new(struct cli *cli, int argc, char **argv);
int cli_fork(struct cli *cli, int argc, char **argv);
int cli_rename(struct cli *cli, int argc, char **argv);
int cli_export(struct cli *cli, int argc, char **argv);
int cli_import(struct cli *cli, int argc, char **argv);
int cli_turns(struct cli *cli, int argc, char **argv);
int cli_rewind(struct cli *cli, int argc, char **argv);
int cli_remove(struct cli *cli, int argc, char **argv);

/* From here on the first SIGINT ends the running call and the second the program. */
void cli_catch_interrupt(void);

/* One line on standard error: "ramba append: ...". Returns `code`. */
int cli_fail(const struct cli *cli, int code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* Says what went wrong with a finished call and what to do about it; returns the exit code. */
int cli_fail_http(const struct cli *cli, const struct http_answer *answer);
/* "see ramba --help" behind the message. */
int cli_usage(const struct cli *cli, const char *format, ...) __attribute__((format(printf, 2, 3)));
int cli_unknown(const struct cli *cli, const char *option);

/* Takes `--name VALUE` or `--name=VALUE` at argv[*at]; *at then stands on its last argument.
 * Returns NULL when argv[*at] is another option or VALUE is missing. */
const char *cli_value(int argc, char **argv, int *at, const char *name);
/* A whole number in [0, max]; false when `text` is none. */
bool cli_number(const char *text, uint64_t max, uint64_t *out);

/* GET of a memory by id, or by the name given at its creation. Says why when it fails. */
int cli_get_memory(struct cli *cli, const char *name, struct client_memory *memory);
/* POST /v1/memories; `from` and `name` may be NULL; `at`: where to fork, 0 for as it is. Says why
 * when it fails. */
int cli_create_memory(struct cli *cli, const char *from, uint64_t at, const char *name,
                      struct client_memory *memory);

/* "12.3 MiB"; `out` is returned. */
const char *cli_bytes(char out[24], uint64_t bytes);
/* "1,234,567". */
const char *cli_count(char out[32], uint64_t count);
/* "1:02:03" or "2:03". */
const char *cli_duration(char out[24], double seconds);

#endif
