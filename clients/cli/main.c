/* ramba - the command line of rambad. */
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clients/cli/cli.h"

#define DEFAULT_URL "http://127.0.0.1:8080"

static const char help[] =
    "ramba [--url URL] COMMAND ...   talks to a rambad server\n"
    "\n"
    "A memory is everything a conversation or a pile of text has told the model. It is kept on\n"
    "the server's disk and can be asked at any time, without being read again.\n"
    "\n"
    "  ramba append --new FILE         make a memory of a text file; prints its id\n"
    "  ramba append MEMORY FILE        add a file to a memory (FILE -: standard input)\n"
    "  ramba ask MEMORY QUESTION       ask; the memory stays as it is\n"
    "  ramba chat MEMORY               talk; the memory keeps every turn\n"
    "  ramba ls                        list the memories, newest first\n"
    "  ramba show MEMORY               what one holds\n"
    "  ramba new                       make an empty memory; prints its id\n"
    "  ramba fork MEMORY               copy a memory at once; both go their own ways\n"
    "  ramba rename MEMORY NAME        give a memory a name, or another\n"
    "  ramba turns MEMORY              the turns of its past: where to fork or rewind\n"
    "  ramba rewind MEMORY POSITION    take a memory back to an earlier position, in tokens\n"
    "  ramba export MEMORY FILE        write a memory to a file (FILE -: standard output)\n"
    "  ramba import FILE               make a memory of such a file; prints its id\n"
    "  ramba rm MEMORY...              delete memories\n"
    "\n"
    "MEMORY is an id (mem_...) or the name a memory was given.\n"
    "\n"
    "  --name NAME        append --new, new, fork: a name for the memory\n"
    "  --at POSITION      fork: as it was at this position, in tokens\n"
    "  --skip BYTES       append: leave out the file's first bytes, as after an interruption\n"
    "  --wait SECONDS     append: how long to wait for a server that went away (120)\n"
    "  --write            ask: let the memory keep question and answer\n"
    "  --sources          ask, chat: also print the passages that were read\n"
    "  --max-tokens N     ask (64), chat (512): longest answer\n"
    "  --temperature T    ask, chat: 0 is the likeliest answer (0)\n"
    "  --url URL          the server, also RAMBA_URL (" DEFAULT_URL ")\n"
    "                     a key for it is read from RAMBA_API_KEY\n"
    "  --version, --help\n"
    "\n"
    "For example:\n"
    "  m=$(ramba append --new book.txt)\n"
    "  ramba ask $m 'Who lives in the castle?' --sources\n"
    "  git log | ramba append $m -\n"
    "\n"
    "Exit code: 0 done, 1 failed, 2 wrong arguments, 3 no server, 4 no such memory.\n";

struct command {
    const char *name;
    int (*run)(struct cli *, int, char **);
};

static const struct command commands[] = {
    {"append", cli_append}, {"ask", cli_ask},     {"chat", cli_chat},     {"ls", cli_list},
    {"show", cli_show},     {"new", cli_new},     {"fork", cli_fork},     {"rm", cli_remove},
    {"rename", cli_rename}, {"turns", cli_turns}, {"rewind", cli_rewind}, {"export", cli_export},
    {"import", cli_import},
};

static void vsay(const struct cli *cli, const char *format, va_list args)
{
    fflush(stdout);
    fprintf(stderr, "ramba%s%s: ", cli->command ? " " : "", cli->command ? cli->command : "");
    vfprintf(stderr, format, args);
}

int cli_fail(const struct cli *cli, int code, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsay(cli, format, args);
    va_end(args);
    fputc('\n', stderr);
    return code;
}

int cli_usage(const struct cli *cli, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsay(cli, format, args);
    va_end(args);
    fputs("; see ramba --help\n", stderr);
    return CLI_USAGE;
}

int cli_unknown(const struct cli *cli, const char *option)
{
    return cli_usage(cli, "option '%s' is unknown here, or its value is missing", option);
}

int cli_fail_http(const struct cli *cli, const struct http_answer *answer)
{
    const char *message = answer->error.message;
    if (answer->interrupted)
        return cli_fail(cli, CLI_FAILED, "stopped");
    if (answer->refused)
        return cli_fail(cli, CLI_NO_SERVER,
                        "no server at %s (%s); start one with deploy/run, or name it with --url "
                        "or RAMBA_URL",
                        cli->http.url, answer->reason);
    if (answer->code == 404)
        return cli_fail(cli, CLI_NOT_FOUND, "%s; see ramba ls", message[0] ? message : "not found");
    if (answer->code == 401 || answer->code == 403)
        return cli_fail(cli, CLI_FAILED, "%s; set RAMBA_API_KEY",
                        message[0] ? message : "the server wants a key");
    if (message[0])
        return cli_fail(cli, CLI_FAILED, "%s", message);
    if (answer->code >= 300)
        return cli_fail(cli, CLI_FAILED, "%s answered HTTP %d; is it a rambad server?",
                        cli->http.url, answer->code);
    return cli_fail(cli, CLI_FAILED, "the connection broke: %s; try again",
                    answer->reason[0] ? answer->reason : "no answer");
}

const char *cli_value(int argc, char **argv, int *at, const char *name)
{
    size_t length = strlen(name);
    const char *arg = argv[*at];
    if (strncmp(arg, name, length) != 0)
        return NULL;
    if (arg[length] == '=')
        return arg + length + 1;
    if (arg[length] || *at + 1 >= argc)
        return NULL;
    return argv[++*at];
}

bool cli_number(const char *text, uint64_t max, uint64_t *out)
{
    char *end;
    if (text[0] < '0' || text[0] > '9')
        return false;
    errno = 0;
    unsigned long long x = strtoull(text, &end, 10);
    *out = x;
    return *end == 0 && errno == 0 && x <= max;
}

const char *cli_bytes(char out[24], uint64_t bytes)
{
    static const char *const units[] = {"KiB", "MiB", "GiB", "TiB"};
    double x = (double)bytes / 1024;
    size_t unit = 0;
    while (x >= 1000 && unit < 3) {
        x /= 1024;
        unit++;
    }
    if (bytes < 1024)
        snprintf(out, 24, "%u B", (unsigned)bytes);
    else
        snprintf(out, 24, x < 100 ? "%.1f %s" : "%.0f %s", x, units[unit]);
    return out;
}

const char *cli_count(char out[32], uint64_t count)
{
    char digits[24];
    int length = snprintf(digits, sizeof digits, "%llu", (unsigned long long)count), n = 0;
    for (int i = 0; i < length; i++) {
        if (i > 0 && (length - i) % 3 == 0)
            out[n++] = ',';
        out[n++] = digits[i];
    }
    out[n] = 0;
    return out;
}

const char *cli_duration(char out[24], double seconds)
{
    uint64_t s = seconds < 0 ? 0 : seconds > 3.6e8 ? 360000000 : (uint64_t)(seconds + 0.5);
    if (seconds >= 0 && seconds < 10)
        snprintf(out, 24, "%.1f s", seconds);
    else if (s < 3600)
        snprintf(out, 24, "%u:%02u", (unsigned)(s / 60), (unsigned)(s % 60));
    else
        snprintf(out, 24, "%u:%02u:%02u", (unsigned)(s / 3600), (unsigned)(s / 60 % 60),
                 (unsigned)(s % 60));
    return out;
}

static void on_interrupt(int number)
{
    (void)number;
    http_interrupted = 1;
    /* A second one ends the program, whatever it waits for. */
    signal(SIGINT, SIG_DFL);
}

void cli_catch_interrupt(void)
{
    struct sigaction action = {.sa_handler = on_interrupt};
    http_interrupted = 0;
    sigaction(SIGINT, &action, NULL);
}

/* What the command printed must have reached its reader. */
static int finish(const struct cli *cli, int code)
{
    if ((fflush(stdout) || ferror(stdout)) && code == CLI_OK)
        return cli_fail(cli, CLI_FAILED, "cannot write to standard output: %s", strerror(errno));
    return code;
}

int main(int argc, char **argv)
{
    struct cli cli = {0};
    const char *url = getenv("RAMBA_URL"), *value;
    int i = 1;
    for (; i < argc && argv[i][0] == '-'; i++) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            fputs(help, stdout);
            return finish(&cli, CLI_OK);
        }
        if (strcmp(argv[i], "--version") == 0) {
            puts("ramba " RAMBAD_VERSION);
            return finish(&cli, CLI_OK);
        }
        if (!(value = cli_value(argc, argv, &i, "--url")))
            return cli_unknown(&cli, argv[i]);
        url = value;
    }
    if (i >= argc) {
        fputs(help, stderr);
        return CLI_USAGE;
    }
    const struct command *command = NULL;
    for (size_t c = 0; c < sizeof commands / sizeof *commands; c++)
        if (strcmp(argv[i], commands[c].name) == 0)
            command = &commands[c];
    if (!command)
        return cli_usage(&cli, "unknown command '%s'", argv[i]);
    cli.command = command->name;
    int count = 0;
    for (int k = i; k < argc; k++) { /* --help and --url are welcome behind the command, too */
        if (strcmp(argv[k], "--help") == 0 || strcmp(argv[k], "-h") == 0) {
            fputs(help, stdout);
            return finish(&cli, CLI_OK);
        }
        if ((value = cli_value(argc, argv, &k, "--url")))
            url = value;
        else
            argv[i + count++] = argv[k];
    }
    cli_catch_interrupt();
    http_init(&cli.http, url && url[0] ? url : DEFAULT_URL, getenv("RAMBA_API_KEY"));
    const int code = finish(&cli, command->run(&cli, count, argv + i));
    http_close(&cli.http);
    return code;
}
