/* `ramba ask` and `ramba chat`: questions to a memory, answers as they are made. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clients/cli/cli.h"

#define ASK_TOKENS 64
#define CHAT_TOKENS 512
#define SOURCES_SHOWN 5

struct passage {
    uint64_t chunk;
    double weight; /* summed over the answer's tokens */
    char *text;
};

struct answer_stream {
    bool started;     /* something but white space was printed */
    bool at_line_end; /* the last byte printed was one */
    bool trim;        /* white space before the first word is the prompt's, not the answer's */
    struct passage *passages;
    size_t passage_count, passage_room;
};

static void print_text(struct answer_stream *stream, const char *text, size_t size)
{
    while (stream->trim && !stream->started && size > 0 && strchr(" \t\r\n", *text)) {
        text++;
        size--;
    }
    if (size == 0)
        return;
    stream->started = true;
    stream->at_line_end = text[size - 1] == '\n';
    fwrite(text, 1, size, stdout);
    fflush(stdout);
}

static void add_source(struct answer_stream *stream, struct client_source *source)
{
    for (size_t i = 0; i < stream->passage_count; i++)
        if (stream->passages[i].chunk == source->chunk) {
            stream->passages[i].weight += source->weight;
            return;
        }
    if (stream->passage_count == stream->passage_room) {
        size_t room = stream->passage_room ? 2 * stream->passage_room : 64;
        void *more = realloc(stream->passages, room * sizeof *stream->passages);
        if (!more)
            return;
        stream->passages = more;
        stream->passage_room = room;
    }
    stream->passages[stream->passage_count++] =
        (struct passage){.chunk = source->chunk, .weight = source->weight, .text = source->text};
    source->text = NULL; /* taken */
}

static bool event_cb(void *context, const char *data, size_t size)
{
    struct answer_stream *stream = context;
    struct client_completion completion;
    if (client_json_completion(data, size, &completion))
        return true;
    print_text(stream, completion.text, completion.text_size);
    for (size_t i = 0; i < completion.source_count; i++)
        add_source(stream, &completion.sources[i]);
    client_json_completion_close(&completion);
    return true;
}

static int by_weight(const void *a, const void *b)
{
    double x = ((const struct passage *)a)->weight, y = ((const struct passage *)b)->weight;
    return (x < y) - (x > y);
}

/* The passages that weighed most, on one line each. */
static void print_sources(struct answer_stream *stream)
{
    double sum = 0;
    if (stream->passage_count == 0) {
        printf("\nno passage of the memory was read\n");
        return;
    }
    qsort(stream->passages, stream->passage_count, sizeof *stream->passages, by_weight);
    for (size_t i = 0; i < stream->passage_count; i++)
        sum += stream->passages[i].weight;
    printf("\nread most:\n");
    for (size_t i = 0; i < stream->passage_count && i < SOURCES_SHOWN; i++) {
        const struct passage *passage = &stream->passages[i];
        printf("%3.0f%%  chunk %llu: ", sum > 0 ? 100 * passage->weight / sum : 0,
               (unsigned long long)passage->chunk);
        for (const char *p = passage->text; *p; p++)
            putchar((unsigned char)*p < ' ' ? ' ' : *p);
        putchar('\n');
    }
}

/* Prints the answer as it comes. */
static int complete(struct cli *cli, const struct client_completion_request *request, bool trim)
{
    struct buf body;
    struct http_answer answer;
    struct answer_stream stream = {.trim = trim};
    int code = CLI_OK;
    buf_init(&body);
    client_json_write_completion(&body, request);
    struct http_call call = {.method = "POST",
                             .path = "/v1/completions",
                             .json = body.data,
                             .json_size = body.size,
                             .event_cb = event_cb,
                             .event_context = &stream};
    bool good = http_do(&cli->http, &call, &answer);
    if (stream.started && !stream.at_line_end)
        putchar('\n');
    if (!good)
        code = cli_fail_http(cli, &answer);
    else if (request->retrieval)
        print_sources(&stream);
    fflush(stdout);
    for (size_t i = 0; i < stream.passage_count; i++)
        free(stream.passages[i].text);
    free(stream.passages);
    http_answer_close(&answer);
    buf_close(&body);
    return code;
}

struct options {
    bool write, sources;
    const char *memory;
    uint64_t max_tokens;
    double temperature;
};

/* Reads one option at argv[*at]; -1 when it was one, else an exit code. */
static int read_option(struct cli *cli, int argc, char **argv, int *at, struct options *options)
{
    const char *value;
    char *end;
    if (strcmp(argv[*at], "--write") == 0) {
        options->write = true;
    } else if (strcmp(argv[*at], "--sources") == 0) {
        options->sources = true;
    } else if ((value = cli_value(argc, argv, at, "--max-tokens"))) {
        if (!cli_number(value, UINT32_MAX, &options->max_tokens) || options->max_tokens == 0)
            return cli_usage(cli, "--max-tokens wants a count, not '%s'", value);
    } else if ((value = cli_value(argc, argv, at, "--temperature"))) {
        options->temperature = strtod(value, &end);
        if (*end || end == value || !(options->temperature >= 0 && options->temperature <= 2))
            return cli_usage(cli, "--temperature wants a number from 0 to 2, not '%s'", value);
    } else {
        return cli_unknown(cli, argv[*at]);
    }
    return -1;
}

static void read_all(struct buf *out)
{
    char block[4096];
    size_t got;
    while ((got = fread(block, 1, sizeof block, stdin)) > 0 &&
           out->size + got <= LIMITS_JSON_BODY_BYTES / 2)
        buf_append(out, block, got);
    while (out->size > 0 && out->data[out->size - 1] == '\n')
        out->size--;
}

int cli_ask(struct cli *cli, int argc, char **argv)
{
    struct options options = {.max_tokens = ASK_TOKENS};
    struct buf question, prompt;
    struct client_memory memory;
    int code = -1;
    buf_init(&question);
    buf_init(&prompt);
    for (int i = 1; i < argc; i++) {
        if (argv[i][0] == '-' && argv[i][1]) {
            code = read_option(cli, argc, argv, &i, &options);
            if (code >= 0)
                goto out;
        } else if (!options.memory) {
            options.memory = argv[i];
        } else { /* a question without quotation marks is as good */
            if (question.size)
                buf_append(&question, " ", 1);
            if (strcmp(argv[i], "-") == 0)
                read_all(&question);
            else
                buf_append_text(&question, argv[i]);
        }
    }
    if (!options.memory || question.size == 0) {
        code = cli_usage(cli, "wants MEMORY QUESTION; QUESTION may be - for standard input");
        goto out;
    }
    code = cli_get_memory(cli, options.memory, &memory);
    if (code)
        goto out;
    buf_append_text(&prompt, "\nQuestion: ");
    buf_append(&prompt, question.data, question.size);
    buf_append_text(&prompt, "\nAnswer:");
    struct client_completion_request request = {.memory = memory.id,
                                                .memory_write = options.write,
                                                .prompt = prompt.data,
                                                .prompt_size = prompt.size,
                                                .stop = "\n",
                                                .max_tokens = (uint32_t)options.max_tokens,
                                                .temperature = options.temperature,
                                                .seed = -1,
                                                .stream = true,
                                                .retrieval = options.sources};
    code = complete(cli, &request, true);
out:
    buf_close(&question);
    buf_close(&prompt);
    return code;
}

/* One question of a chat, in the form that the shipped model was trained on. */
static int turn(struct cli *cli, const struct options *options, const char *memory,
                const char *text, size_t size)
{
    struct buf prompt;
    buf_init(&prompt);
    buf_append_text(&prompt, "\n<|im_start|>user\n");
    buf_append(&prompt, text, size);
    buf_append_text(&prompt, "<|im_end|>\n<|im_start|>assistant\n");
    struct client_completion_request request = {.memory = memory,
                                                .memory_write = true,
                                                .prompt = prompt.data,
                                                .prompt_size = prompt.size,
                                                .stop = "<|im_end|>",
                                                .max_tokens = (uint32_t)options->max_tokens,
                                                .temperature = options->temperature,
                                                .seed = -1,
                                                .stream = true,
                                                .retrieval = options->sources};
    int code = complete(cli, &request, false);
    buf_close(&prompt);
    return code;
}

int cli_chat(struct cli *cli, int argc, char **argv)
{
    struct options options = {.max_tokens = CHAT_TOKENS};
    struct client_memory memory;
    char *line = NULL;
    size_t room = 0;
    int code;
    for (int i = 1; i < argc; i++) {
        if (argv[i][0] == '-') {
            code = read_option(cli, argc, argv, &i, &options);
            if (code >= 0)
                return code;
        } else if (options.memory) {
            return cli_usage(cli, "takes no '%s'", argv[i]);
        } else {
            options.memory = argv[i];
        }
    }
    if (!options.memory)
        return cli_usage(cli, "wants a MEMORY; make one with: ramba new");
    code = cli_get_memory(cli, options.memory, &memory);
    if (code)
        return code;
    bool terminal = isatty(STDIN_FILENO) && isatty(STDOUT_FILENO);
    if (terminal)
        fprintf(stderr, "%s remembers every turn. Ctrl-C stops an answer, Ctrl-D ends.\n",
                memory.id);
    for (;;) {
        if (terminal) {
            printf("> ");
            fflush(stdout);
        }
        ssize_t got = getline(&line, &room, stdin);
        if (got < 0) {
            if (terminal)
                putchar('\n');
            break;
        }
        while (got > 0 && (line[got - 1] == '\n' || line[got - 1] == '\r'))
            got--;
        if (got == 0)
            continue;
        cli_catch_interrupt();
        code = turn(cli, &options, memory.id, line, (size_t)got);
        if (code && !terminal)
            break; /* what follows in a script would build on an answer that never came */
    }
    free(line);
    return code;
}
