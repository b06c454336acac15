/* `ramba export` and `import`: a memory as a file. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "clients/cli/cli.h"

static bool write_body(void *context, const char *data, size_t size)
{
    return fwrite(data, 1, size, context) == size;
}

int cli_export(struct cli *cli, int argc, char **argv)
{
    struct client_memory memory;
    struct http_answer answer;
    char path[160];
    if (argc != 3)
        return cli_usage(cli, "wants MEMORY FILE; FILE may be - for standard output");
    int code = cli_get_memory(cli, argv[1], &memory);
    if (code)
        return code;
    bool piped = strcmp(argv[2], "-") == 0;
    FILE *file = piped ? stdout : fopen(argv[2], "wb");
    if (!file)
        return cli_fail(cli, CLI_FAILED, "cannot write %s: %s", argv[2], strerror(errno));
    snprintf(path, sizeof path, "/v1/memories/%s/export", memory.id);
    struct http_call call = {
        .method = "GET", .path = path, .body_cb = write_body, .body_context = file};
    bool done = http_do(&cli->http, &call, &answer);
    /* A file is only there when all of it is. */
    bool written = piped ? fflush(file) == 0 : fclose(file) == 0;
    if (!done || !written) {
        code = done ? cli_fail(cli, CLI_FAILED, "cannot write %s: %s", argv[2], strerror(errno))
                    : cli_fail_http(cli, &answer);
        if (!piped)
            remove(argv[2]);
    }
    http_answer_close(&answer);
    return code;
}

static ssize_t read_file(void *context, char *out, size_t room)
{
    FILE *file = context;
    size_t got = fread(out, 1, room, file);
    return got == 0 && ferror(file) ? -1 : (ssize_t)got;
}

int cli_import(struct cli *cli, int argc, char **argv)
{
    struct client_memory memory;
    struct http_answer answer;
    if (argc > 1 && argv[1][0] == '-' && argv[1][1])
        return cli_unknown(cli, argv[1]);
    if (argc != 2)
        return cli_usage(cli, "wants one FILE, which may be - for standard input");
    bool piped = strcmp(argv[1], "-") == 0;
    FILE *file = piped ? stdin : fopen(argv[1], "rb");
    if (!file)
        return cli_fail(cli, CLI_FAILED, "cannot read %s: %s", argv[1], strerror(errno));
    struct http_call call = {.method = "POST",
                             .path = "/v1/memories/import",
                             .type = "application/octet-stream",
                             .read_cb = read_file,
                             .read_context = file};
    int code = CLI_OK;
    if (!http_do(&cli->http, &call, &answer))
        code = cli_fail_http(cli, &answer);
    else if (client_json_memory(answer.body.data, answer.body.size, &memory))
        code = cli_fail(cli, CLI_FAILED, "the server's answer is not a memory");
    else
        printf("%s\n", memory.id);
    http_answer_close(&answer);
    if (!piped)
        fclose(file);
    return code;
}
