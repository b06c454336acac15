/* `ramba export` and `import`: a memory as a file. */
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "clients/cli/cli.h"

static bool write_body(void *context, const char *data, size_t size)
{
    return fwrite(data, 1, size, context) == size;
}

/* An export may be all that is left of a memory tomorrow: it is on disk before anyone is told. */
static bool sync_file(FILE *file)
{
    struct stat kind;
    if (fflush(file) || fstat(fileno(file), &kind))
        return false;
    return !S_ISREG(kind.st_mode) || fsync(fileno(file)) == 0;
}

/* And its name. */
static bool sync_folder_of(const char *path)
{
    char copy[4096];
    snprintf(copy, sizeof copy, "%s", path);
    const int fd = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    const bool good = fd >= 0 && fsync(fd) == 0;
    if (fd >= 0)
        close(fd);
    return good;
}

/* The answer into `file`, which messages call `named`. */
static int save(struct cli *cli, const char *id, FILE *file, const char *named)
{
    char path[160];
    struct http_answer answer;
    int code = CLI_OK;
    snprintf(path, sizeof path, "/v1/memories/%s/export", id);
    struct http_call call = {
        .method = "GET", .path = path, .body_cb = write_body, .body_context = file};
    const bool done = http_do(&cli->http, &call, &answer);
    if (ferror(file) || (done && !sync_file(file)))
        code = cli_fail(cli, CLI_FAILED, "cannot write %s: %s", named, strerror(errno));
    else if (!done)
        code = cli_fail_http(cli, &answer);
    http_answer_close(&answer);
    return code;
}

/* To what is no file (a pipe, a device, a link) as it comes. What stands under the name of a file,
 * an earlier export perhaps, stays until all of the new one is there. */
static int save_as(struct cli *cli, const char *id, const char *named)
{
    char part[4096];
    struct stat known;
    const bool is_regular = lstat(named, &known) || S_ISREG(known.st_mode);
    if (snprintf(part, sizeof part, "%s%s", named, is_regular ? ".part" : "") >= (int)sizeof part)
        return cli_usage(cli, "wants a shorter name of the file");
    FILE *file = fopen(part, "wb");
    if (!file)
        return cli_fail(cli, CLI_FAILED, "cannot write %s: %s", part, strerror(errno));
    int code = save(cli, id, file, part);
    if (fclose(file) && code == CLI_OK)
        code = cli_fail(cli, CLI_FAILED, "cannot write %s: %s", part, strerror(errno));
    if (code == CLI_OK && is_regular && (rename(part, named) || !sync_folder_of(named)))
        code = cli_fail(cli, CLI_FAILED, "cannot write %s: %s", named, strerror(errno));
    if (code && is_regular)
        remove(part);
    return code;
}

int cli_export(struct cli *cli, int argc, char **argv)
{
    struct client_memory memory;
    if (argc != 3)
        return cli_usage(cli, "wants MEMORY FILE; FILE may be - for standard output");
    const int code = cli_get_memory(cli, argv[1], &memory);
    if (code)
        return code;
    return strcmp(argv[2], "-") == 0 ? save(cli, memory.id, stdout, "standard output")
                                     : save_as(cli, memory.id, argv[2]);
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
