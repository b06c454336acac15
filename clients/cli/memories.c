/* `ramba ls`, `show`, `new`, `fork`, `rename`, `rm`, the past; finding a memory by its name. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "clients/cli/cli.h"

#define PAGE 100

/* Of a memory or a conversation, which is one. Ids are made by the server of these alone, and must
 * not change a path. */
static bool looks_like_id(const char *text)
{
    return (strncmp(text, "mem_", 4) == 0 || strncmp(text, "conv_", 5) == 0) &&
           strlen(text) < LIMITS_ID_BYTES &&
           text[strspn(text, "abcdefghijklmnopqrstuvwxyz0123456789_")] == 0;
}

/* One page of the list, behind the memory `after` ("": from the start). */
static int get_page(struct cli *cli, const char *after, struct client_memory_list *list)
{
    char path[160];
    struct http_answer answer;
    int code = CLI_OK;
    snprintf(path, sizeof path, "/v1/memories?limit=%d%s%s", PAGE, after[0] ? "&after=" : "",
             after);
    struct http_call call = {.method = "GET", .path = path};
    *list = (struct client_memory_list){0};
    if (!http_do(&cli->http, &call, &answer))
        code = cli_fail_http(cli, &answer);
    else if (client_json_memory_list(answer.body.data, answer.body.size, list))
        code = cli_fail(cli, CLI_FAILED, "the server's list of memories is not one");
    http_answer_close(&answer);
    return code;
}

/* Calls `each` for every memory, newest first, until it returns false. */
static int each_memory(struct cli *cli, bool (*each)(void *, const struct client_memory *),
                       void *context)
{
    char after[LIMITS_ID_BYTES] = "";
    for (bool more = true; more;) {
        struct client_memory_list list;
        int code = get_page(cli, after, &list);
        if (code)
            return code;
        more = list.has_more && list.count > 0;
        for (size_t i = 0; i < list.count; i++) {
            memcpy(after, list.items[i].id, sizeof after);
            if (!each(context, &list.items[i])) {
                more = false;
                break;
            }
        }
        client_json_memory_list_close(&list);
    }
    return CLI_OK;
}

struct search {
    const char *name;
    struct client_memory found;
    int count;
};

static bool match(void *context, const struct client_memory *memory)
{
    struct search *search = context;
    if (strcmp(memory->name, search->name) == 0 && search->count++ == 0)
        search->found = *memory;
    return search->count < 2;
}

int cli_get_memory(struct cli *cli, const char *name, struct client_memory *memory)
{
    if (!looks_like_id(name)) {
        struct search search = {.name = name};
        int code = each_memory(cli, match, &search);
        if (code)
            return code;
        if (search.count == 0)
            return cli_fail(cli, CLI_NOT_FOUND, "no memory is named '%s'; see ramba ls", name);
        if (search.count > 1)
            return cli_fail(cli, CLI_USAGE,
                            "several memories are named '%s'; use an id from ramba ls", name);
        *memory = search.found;
        return CLI_OK;
    }
    char path[128];
    struct http_answer answer;
    int code = CLI_OK;
    snprintf(path, sizeof path, "/v1/memories/%s", name);
    struct http_call call = {.method = "GET", .path = path};
    if (!http_do(&cli->http, &call, &answer))
        code = cli_fail_http(cli, &answer);
    else if (client_json_memory(answer.body.data, answer.body.size, memory))
        code = cli_fail(cli, CLI_FAILED, "the server's answer is not a memory");
    http_answer_close(&answer);
    return code;
}

int cli_create_memory(struct cli *cli, const char *from, uint64_t at, const char *name,
                      struct client_memory *memory)
{
    struct buf body;
    struct http_answer answer;
    int code = CLI_OK;
    buf_init(&body);
    client_json_write_create(&body, from, at, name);
    struct http_call call = {
        .method = "POST", .path = "/v1/memories", .json = body.data, .json_size = body.size};
    if (!http_do(&cli->http, &call, &answer))
        code = cli_fail_http(cli, &answer);
    else if (client_json_memory(answer.body.data, answer.body.size, memory))
        code = cli_fail(cli, CLI_FAILED, "the server's answer is not a memory");
    http_answer_close(&answer);
    buf_close(&body);
    return code;
}

static void format_time(char out[32], int64_t seconds)
{
    time_t time = (time_t)seconds;
    struct tm local;
    localtime_r(&time, &local);
    strftime(out, 32, "%Y-%m-%d %H:%M", &local);
}

static bool print_row(void *context, const struct client_memory *memory)
{
    char when[32], tokens[32], disk[24];
    int *rows = context;
    format_time(when, memory->created_at);
    if ((*rows)++ == 0)
        printf("%-28s  %14s  %10s  %-16s  %s\n", "ID", "TOKENS", "ON DISK", "CREATED", "NAME");
    printf("%-28s  %14s  %10s  %-16s  %s\n", memory->id, cli_count(tokens, memory->token_count),
           cli_bytes(disk, memory->bytes_on_disk), when, memory->name);
    return true;
}

int cli_list(struct cli *cli, int argc, char **argv)
{
    int rows = 0;
    if (argc > 1)
        return cli_usage(cli, "takes no '%s'", argv[1]);
    int code = each_memory(cli, print_row, &rows);
    if (code == CLI_OK && rows == 0)
        fprintf(stderr, "no memories yet; make one with: ramba append --new FILE\n");
    return code;
}

int cli_show(struct cli *cli, int argc, char **argv)
{
    struct client_memory memory;
    char when[32], count[32], bytes[24];
    if (argc != 2)
        return cli_usage(cli, "wants one MEMORY");
    int code = cli_get_memory(cli, argv[1], &memory);
    if (code)
        return code;
    format_time(when, memory.created_at);
    printf("id        %s\n", memory.id);
    if (memory.name[0])
        printf("name      %s\n", memory.name);
    if (memory.parent[0])
        printf("fork of   %s\n", memory.parent);
    printf("created   %s\n", when);
    printf("tokens    %s\n", cli_count(count, memory.token_count));
    printf("chunks    %s\n", cli_count(count, memory.chunk_count));
    printf("text      %s (%llu bytes)\n", cli_bytes(bytes, memory.text_bytes),
           (unsigned long long)memory.text_bytes);
    printf("on disk   %s\n", cli_bytes(bytes, memory.bytes_on_disk));
    return CLI_OK;
}

/* `new` and `fork`: the options they share, then the one call. */
static int create(struct cli *cli, int argc, char **argv, bool is_fork)
{
    const char *value, *name = NULL, *from = NULL;
    uint64_t at = 0;
    struct client_memory memory;
    for (int i = 1; i < argc; i++) {
        if ((value = cli_value(argc, argv, &i, "--name")))
            name = value;
        else if (is_fork && (value = cli_value(argc, argv, &i, "--at"))) {
            if (!cli_number(value, INT64_MAX, &at) || at == 0)
                return cli_usage(cli, "--at wants a position in tokens, not '%s'", value);
        } else if (argv[i][0] == '-')
            return cli_unknown(cli, argv[i]);
        else if (is_fork && !from)
            from = argv[i];
        else
            return cli_usage(cli, "takes no '%s'", argv[i]);
    }
    if (is_fork && !from)
        return cli_usage(cli, "wants the MEMORY to copy");
    if (from) {
        int code = cli_get_memory(cli, from, &memory);
        if (code)
            return code;
    }
    char id[LIMITS_ID_BYTES];
    memcpy(id, from ? memory.id : "", from ? sizeof id : 1);
    int code = cli_create_memory(cli, from ? id : NULL, at, name, &memory);
    if (code == CLI_OK)
        printf("%s\n", memory.id);
    return code;
}

int cli_new(struct cli *cli, int argc, char **argv)
{
    return create(cli, argc, argv, false);
}

int cli_fork(struct cli *cli, int argc, char **argv)
{
    return create(cli, argc, argv, true);
}

/* A call whose answer matters only where it failed. */
static int send_json(struct cli *cli, const char *method, const char *path, const struct buf *body)
{
    struct http_answer answer;
    struct http_call call = {
        .method = method, .path = path, .json = body->data, .json_size = body->size};
    const int code = http_do(&cli->http, &call, &answer) ? CLI_OK : cli_fail_http(cli, &answer);
    http_answer_close(&answer);
    return code;
}

/* `old` is the answer that shows the memory: its other metadata stay. */
static int change_name(struct cli *cli, const char *path, const struct http_answer *old,
                       const char *name)
{
    struct buf body;
    buf_init(&body);
    const int code = client_json_write_rename(&body, old->body.data, old->body.size, name)
                         ? cli_fail(cli, CLI_FAILED, "the server's answer is not a memory")
                         : send_json(cli, "PATCH", path, &body);
    buf_close(&body);
    return code;
}

int cli_rename(struct cli *cli, int argc, char **argv)
{
    struct client_memory memory;
    struct http_answer answer;
    char path[128];
    if (argc != 3)
        return cli_usage(cli, "wants MEMORY NAME");
    int code = cli_get_memory(cli, argv[1], &memory);
    if (code)
        return code;
    snprintf(path, sizeof path, "/v1/memories/%s", memory.id);
    struct http_call call = {.method = "GET", .path = path};
    code = http_do(&cli->http, &call, &answer) ? change_name(cli, path, &answer, argv[2])
                                               : cli_fail_http(cli, &answer);
    http_answer_close(&answer);
    return code;
}

static void print_turns(const struct client_turn_list *list, bool is_first)
{
    char when[32], tokens[32];
    if (is_first && list->count)
        printf("%14s  %-16s  %-8s  %s\n", "POSITION", "CREATED", "SNAPSHOT", "BOOKMARK");
    for (size_t i = 0; i < list->count; i++) {
        const struct client_turn *turn = &list->items[i];
        format_time(when, turn->created_at);
        snprintf(tokens, sizeof tokens, "%llu", (unsigned long long)turn->position);
        printf("%14s  %-16s  %-8s  %s\n", tokens, when, turn->has_snapshot ? "yes" : "-",
               turn->bookmark);
    }
}

int cli_turns(struct cli *cli, int argc, char **argv)
{
    struct client_memory memory;
    if (argc != 2)
        return cli_usage(cli, "wants one MEMORY");
    int code = cli_get_memory(cli, argv[1], &memory);
    uint64_t from = code == CLI_OK ? memory.token_count : 0;
    for (bool more = true, is_first = true; code == CLI_OK && more; is_first = false) {
        char path[160];
        struct http_answer answer;
        struct client_turn_list list = {0};
        snprintf(path, sizeof path, "/v1/memories/%s/turns?limit=%d&from=%llu", memory.id, PAGE,
                 (unsigned long long)from);
        struct http_call call = {.method = "GET", .path = path};
        if (!http_do(&cli->http, &call, &answer))
            code = cli_fail_http(cli, &answer);
        else if (client_json_turn_list(answer.body.data, answer.body.size, &list))
            code = cli_fail(cli, CLI_FAILED, "the server's list of turns is not one");
        else
            print_turns(&list, is_first);
        more = list.has_more && list.count > 0;
        if (more)
            from = list.items[list.count - 1].position - 1;
        client_json_turn_list_close(&list);
        http_answer_close(&answer);
    }
    return code;
}

int cli_rewind(struct cli *cli, int argc, char **argv)
{
    struct client_memory memory;
    struct buf body;
    char path[160];
    uint64_t to;
    if (argc != 3 || !cli_number(argv[2], INT64_MAX, &to))
        return cli_usage(cli, "wants MEMORY POSITION, a number of tokens");
    int code = cli_get_memory(cli, argv[1], &memory);
    if (code)
        return code;
    snprintf(path, sizeof path, "/v1/memories/%s/rewind", memory.id);
    buf_init(&body);
    buf_append_format(&body, "{\"to\":%llu}", (unsigned long long)to);
    code = send_json(cli, "POST", path, &body);
    buf_close(&body);
    return code;
}

int cli_remove(struct cli *cli, int argc, char **argv)
{
    int worst = CLI_OK;
    if (argc < 2)
        return cli_usage(cli, "wants at least one MEMORY");
    for (int i = 1; i < argc; i++)
        if (argv[i][0] == '-')
            return cli_unknown(cli, argv[i]);
    for (int i = 1; i < argc; i++) { /* one that is missing does not keep the others */
        struct client_memory memory;
        int code = cli_get_memory(cli, argv[i], &memory);
        if (code == CLI_OK) {
            char path[128];
            struct http_answer answer;
            snprintf(path, sizeof path, "/v1/memories/%s", memory.id);
            struct http_call call = {.method = "DELETE", .path = path};
            if (!http_do(&cli->http, &call, &answer))
                code = cli_fail_http(cli, &answer);
            http_answer_close(&answer);
        }
        if (code)
            worst = code;
    }
    return worst;
}
