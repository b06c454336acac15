/* `ramba append`: streams text into a memory and goes on after whatever cuts it.
 *
 * The server's count of committed text bytes is the only truth: each request names the count it
 * starts from (?offset=), so that one that was applied although its answer got lost is noticed and
 * never applied twice. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "clients/cli/cli.h"
#include "clients/cli/progress.h"
#include "clients/cli/source.h"

#define PATIENCE_S 120 /* without one committed byte, unless --wait says otherwise */
#define SETTLE_S 10    /* for the server to notice that a request was cut */

struct upload {
    struct cli *cli;
    struct source source;
    struct progress progress;
    char memory[LIMITS_ID_BYTES];
    const char *path;
    uint64_t base;     /* the memory's text bytes at the source's offset 0 */
    uint64_t first;    /* offset where this command began */
    uint64_t position; /* the memory's tokens when it began */
    uint64_t committed;
    double patience_s, moved; /* when something was last committed */
};

static void take_commit(struct upload *upload, uint64_t text_bytes, uint64_t position)
{
    if (text_bytes > upload->committed) {
        upload->committed = text_bytes;
        upload->moved = progress_now();
        source_release(&upload->source, text_bytes - upload->base);
    }
    uint64_t tokens = position > upload->position ? position - upload->position : 0;
    progress_update(&upload->progress, upload->committed - upload->base - upload->first, tokens);
}

static ssize_t read_cb(void *context, char *out, size_t room)
{
    struct upload *upload = context;
    return source_read(&upload->source, out, room);
}

static bool event_cb(void *context, const char *data, size_t size)
{
    struct client_append append;
    if (client_json_append(data, size, &append) == STATUS_OK && append.text_bytes > 0)
        take_commit(context, append.text_bytes, append.position);
    return true;
}

/* Whether asking again cannot help. */
static bool is_final(const struct http_answer *answer)
{
    static const char *const codes[] = {"invalid",   "unsupported", "not_found",
                                        "too_large", "disk_full",   "corrupt"};
    if (answer->code == 0 || answer->cut)
        return false;
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
        if (strcmp(answer->error.code, codes[i]) == 0)
            return true;
    return answer->code / 100 == 4 && answer->code != 408 && answer->code != 409 &&
           answer->code != 429;
}

static void nap(uint32_t ms)
{
    struct timespec time = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000};
    nanosleep(&time, NULL); /* a signal ends it early, which is right */
}

/* Asks the server for the memory. True: `memory` is filled. Close `answer` either way. */
static bool look(struct upload *upload, struct client_memory *memory, struct http_answer *answer)
{
    char path[128];
    snprintf(path, sizeof path, "/v1/memories/%s", upload->memory);
    struct http_call call = {.method = "GET", .path = path};
    return http_do(&upload->cli->http, &call, answer) &&
           !client_json_memory(answer->body.data, answer->body.size, memory);
}

static ssize_t no_text_cb(void *context, char *out, size_t room)
{
    (void)context, (void)out, (void)room;
    return 0;
}

/* A request was cut, and the server may still commit what it had of it. Waits until the memory is
 * free, which an append of nothing shows, and takes its count. */
static void settle(struct upload *upload)
{
    const double until = progress_now() + SETTLE_S;
    bool settled = false;
    cli_catch_interrupt(); /* the next Ctrl-C ends the waiting */
    while (!settled && !http_interrupted && progress_now() < until) {
        char path[160];
        struct http_answer answer;
        struct client_memory memory;
        settled = look(upload, &memory, &answer) && memory.text_bytes >= upload->committed &&
                  memory.text_bytes <= upload->base + upload->source.furthest;
        http_answer_close(&answer);
        if (settled) {
            snprintf(path, sizeof path, "/v1/memories/%s/append?offset=%llu", upload->memory,
                     (unsigned long long)memory.text_bytes);
            struct http_call call = {.method = "POST", .path = path, .read_cb = no_text_cb};
            settled = http_do(&upload->cli->http, &call, &answer);
            http_answer_close(&answer);
        }
        if (settled)
            upload->committed = memory.text_bytes;
        else
            nap(100);
    }
}

static int stopped(struct upload *upload)
{
    char bytes[24];
    progress_clear(&upload->progress);
    if (http_interrupted)
        settle(upload);
    uint64_t done = upload->committed - upload->base;
    fprintf(stderr, "stopped; %s of the text are in memory %s\n", cli_bytes(bytes, done),
            upload->memory);
    if (upload->source.seekable)
        fprintf(stderr, "go on with: ramba append --skip %llu %s %s\n", (unsigned long long)done,
                upload->memory, upload->path);
    return CLI_FAILED;
}

/* Asks the server where the memory stands, for as long as patience lasts, and moves the source
 * there. Returns CLI_OK, or the exit code after saying why. */
static int find_place(struct upload *upload, const struct http_answer *failure)
{
    struct cli *cli = upload->cli;
    uint32_t wait_ms = failure->retry_after_ms ? failure->retry_after_ms : 250;
    const char *why = failure->error.message[0] ? failure->error.message : failure->reason;
    progress_clear(&upload->progress);
    fprintf(stderr, "%s; trying again\n", why[0] ? why : "the connection broke");
    for (;;) {
        if (http_interrupted)
            return stopped(upload);
        if (progress_now() - upload->moved > upload->patience_s) {
            stopped(upload);
            return cli_fail(cli, CLI_FAILED, "gave up after %.0f s: %s", upload->patience_s, why);
        }
        nap(wait_ms < 10000 ? wait_ms : 10000);
        wait_ms = wait_ms < 2500 ? wait_ms * 2 : 5000;
        struct http_answer answer;
        struct client_memory memory;
        bool good = look(upload, &memory, &answer);
        bool over = !good && is_final(&answer);
        int code = over ? cli_fail_http(cli, &answer) : CLI_OK;
        http_answer_close(&answer);
        if (over)
            return code;
        if (!good)
            continue;
        if (memory.text_bytes < upload->committed)
            return cli_fail(cli, CLI_FAILED,
                            "memory %s lost text that was acknowledged: it holds %llu bytes, not "
                            "%llu; run `rambad check` on its data folder",
                            upload->memory, (unsigned long long)memory.text_bytes,
                            (unsigned long long)upload->committed);
        if (memory.text_bytes > upload->base + upload->source.furthest ||
            !source_seek(&upload->source, memory.text_bytes - upload->base))
            return cli_fail(cli, CLI_FAILED, "another client wrote to memory %s meanwhile",
                            upload->memory);
        take_commit(upload, memory.text_bytes, memory.token_count);
        return CLI_OK;
    }
}

/* One request, from where the source stands. True when all it sent is committed. */
static bool send_once(struct upload *upload, struct http_answer *answer)
{
    char path[160];
    snprintf(path, sizeof path, "/v1/memories/%s/append?offset=%llu", upload->memory,
             (unsigned long long)(upload->base + upload->source.offset));
    struct http_call call = {.method = "POST",
                             .path = path,
                             .read_cb = read_cb,
                             .read_context = upload,
                             .event_cb = event_cb,
                             .event_context = upload};
    bool good = http_do(&upload->cli->http, &call, answer);
    /* A server that ignored our wish for events answers with the result alone. */
    if (good && answer->body.size)
        event_cb(upload, answer->body.data, answer->body.size);
    return good && upload->committed == upload->base + upload->source.offset;
}

static int run(struct upload *upload)
{
    int code = CLI_OK;
    /* An empty text is one empty append, so that a memory that cannot be written says so. */
    bool sent = false;
    upload->moved = progress_now();
    while (code == CLI_OK && (source_wait(&upload->source) || !sent)) {
        struct http_answer answer;
        sent = send_once(upload, &answer);
        if (!sent && answer.interrupted)
            code = stopped(upload);
        else if (!sent && is_final(&answer))
            code = cli_fail_http(upload->cli, &answer);
        else if (!sent)
            code = find_place(upload, &answer);
        http_answer_close(&answer);
    }
    return code;
}

struct options {
    bool create;
    const char *name, *memory, *path;
    uint64_t skip, wait_s;
};

static int read_options(struct cli *cli, int argc, char **argv, struct options *options)
{
    const char *value, *rest[2];
    int count = 0;
    *options = (struct options){.wait_s = PATIENCE_S};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--new") == 0) {
            options->create = true;
        } else if ((value = cli_value(argc, argv, &i, "--name"))) {
            options->name = value;
        } else if ((value = cli_value(argc, argv, &i, "--skip"))) {
            if (!cli_number(value, INT64_MAX, &options->skip))
                return cli_usage(cli, "--skip wants a number of bytes, not '%s'", value);
        } else if ((value = cli_value(argc, argv, &i, "--wait"))) {
            if (!cli_number(value, 1000000, &options->wait_s))
                return cli_usage(cli, "--wait wants seconds, not '%s'", value);
        } else if (argv[i][0] == '-' && argv[i][1]) {
            return cli_unknown(cli, argv[i]);
        } else if (count < 2) {
            rest[count++] = argv[i];
        } else {
            return cli_usage(cli, "too many arguments from '%s' on", argv[i]);
        }
    }
    if (count != (options->create ? 1 : 2))
        return cli_usage(cli, "wants MEMORY FILE, or --new FILE; FILE may be - for standard input");
    options->memory = options->create ? NULL : rest[0];
    options->path = rest[count - 1];
    return CLI_OK;
}

int cli_append(struct cli *cli, int argc, char **argv)
{
    struct options options;
    struct upload upload = {.cli = cli};
    struct client_memory memory;
    struct error err;
    int code = read_options(cli, argc, argv, &options);
    if (code)
        return code;
    if (source_open(&upload.source, options.path, &err)) {
        code = cli_fail(cli, CLI_FAILED, "%s", err.message);
        goto out;
    }
    if (options.skip && !(upload.source.seekable && source_seek(&upload.source, options.skip))) {
        code = cli_usage(cli, "--skip needs a file, not a pipe");
        goto out;
    }
    if (options.create) { /* a memory made of a file is named after it */
        const char *slash = strrchr(options.path, '/');
        const char *name = options.name ? options.name : slash ? slash + 1 : options.path;
        code = cli_create_memory(cli, NULL, 0, strcmp(name, "-") ? name : NULL, &memory);
    } else {
        code = cli_get_memory(cli, options.memory, &memory);
    }
    if (code)
        goto out;
    snprintf(upload.memory, sizeof upload.memory, "%s", memory.id);
    upload.path = options.path;
    upload.first = upload.source.offset;
    /* May wrap below zero when bytes were skipped; sums with an offset come out right again. */
    upload.base = memory.text_bytes - upload.first;
    upload.committed = memory.text_bytes;
    upload.position = memory.token_count;
    upload.patience_s = (double)options.wait_s;
    progress_init(&upload.progress, upload.source.total_bytes > upload.first
                                        ? upload.source.total_bytes - upload.first
                                        : 0);
    code = run(&upload);
    if (code == CLI_OK) {
        progress_finish(&upload.progress);
        printf("%s\n", upload.memory);
    }
out:
    source_close(&upload.source);
    return code;
}
