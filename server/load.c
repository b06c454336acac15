/* load.c - see load.h. */
#include "server/load.h"

#include <llhttp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <uv.h>

#include "proto/base/assert.h"
#include "proto/base/buf.h"
#include "proto/base/list.h"

#define PORT 8080
#define CONNECTING_MOST 64 /* at once: more could overflow the server's backlog */
#define TICK_MS 1
#define END_SECONDS 60 /* for what is under way when the time is over */
#define READ_BYTES (64u << 10)
#define RETRY_MS 100 /* of a client that was refused or cut off */
#define EVENT_BYTES ((size_t)64 << 20)

/*  NEW -> CONNECTING -> FREE -> BUSY -> FREE ...; a refusal or a failure leads to RESTING, and that
 *  to NEW or FREE. All can reach CLOSED, at the end. */
enum client_state { NEW, CONNECTING, FREE, BUSY, RESTING, CLOSED };

struct client {
    struct list node; /* in load->fresh or load->idle while NEW or FREE */
    struct load *load;
    uint32_t index;
    enum client_state state;
    uv_tcp_t tcp;
    uv_connect_t connect;
    uv_write_t write;
    llhttp_t parser;
    struct buf line; /* of the event stream, not whole yet; or of an error's body */
    uint64_t due_ns, last_ns, rest_until_ns;
    bool open, speaks, ended; /* a socket is there; had its first token; had its [DONE] */
};

struct load {
    const struct load_options *options;
    struct load_report *report;
    uv_loop_t loop;
    uv_timer_t tick;
    llhttp_settings_t settings;
    struct buf request;
    struct client *clients;
    struct list fresh, idle, resting;
    uint64_t begin_ns, end_ns, last_ns; /* ns of uv_hrtime */
    uint64_t begun;                     /* requests */
    uint64_t streams;                   /* now */
    uint32_t connecting;
    bool over;
};

static void next_client(struct load *load);

/* ---- the end of requests and connections ---- */

static void rest(struct client *c)
{
    c->state = RESTING;
    c->rest_until_ns = uv_hrtime() + RETRY_MS * UINT64_C(1000000);
    list_push_back(&c->load->resting, &c->node);
}

static void closed_cb(uv_handle_t *handle)
{
    struct client *c = handle->data;
    c->open = false;
    if (c->state != CLOSED)
        rest(c);
}

static void drop(struct client *c)
{
    if (c->open && !uv_is_closing((uv_handle_t *)&c->tcp))
        uv_close((uv_handle_t *)&c->tcp, closed_cb);
}

static void leave(struct client *c)
{
    if (c->state == CONNECTING)
        c->load->connecting--;
    if (c->state == BUSY)
        c->load->streams--;
    list_remove(&c->node);
}

static void failed(struct client *c, const char *why)
{
    struct load_report *r = c->load->report;
    if (c->state == CLOSED || uv_is_closing((uv_handle_t *)&c->tcp))
        return;
    if (c->state == BUSY || c->state == CONNECTING) {
        r->failed++;
        snprintf(r->error, sizeof r->error, "%s", why);
    }
    leave(c);
    c->state = NEW; /* closed_cb lets it rest */
    drop(c);
}

/* ---- what comes back ---- */

/* The value behind `"name":`, which is a string's inside or a number; NULL: there is none. */
static const char *field(const char *json, size_t size, const char *name, size_t *value_size)
{
    const char *at = memmem(json, size, name, strlen(name)), *end = json + size;
    if (!at)
        return NULL;
    at += strlen(name);
    while (at < end && *at == ' ')
        at++;
    const bool is_text = at < end && *at == '"';
    const char *value = at + is_text, *stop = value;
    while (stop < end && (is_text ? *stop != '"' : *stop >= '0' && *stop <= '9'))
        stop += *stop == '\\' ? 2 : 1;
    if (stop > end)
        return NULL;
    *value_size = (size_t)(stop - value);
    return value;
}

static void take_event(struct client *c, const char *data, size_t size, uint64_t now)
{
    struct load *load = c->load;
    struct load_report *r = load->report;
    size_t text_size, count_size;
    if (size == 6 && memcmp(data, "[DONE]", 6) == 0) {
        c->ended = true;
        return;
    }
    if (size > 9 && memcmp(data, "{\"error\":", 9) == 0) {
        snprintf(r->error, sizeof r->error, "%.*s", (int)(size < 200 ? size : 200), data);
        return;
    }
    const char *text = field(data, size, "\"text\":", &text_size);
    if (text && text_size) {
        r->events++;
        if (!c->speaks)
            histogram_add(&r->first_token, now - c->due_ns);
        else
            histogram_add(&r->between, now - c->last_ns);
        c->speaks = true;
        c->last_ns = now;
        if (load->options->text_cb)
            load->options->text_cb(load->options->context, c->index, text, text_size, now);
    }
    const char *count = field(data, size, "\"completion_tokens\":", &count_size);
    if (count && count_size)
        r->tokens += strtoull(count, NULL, 10);
}

static int body_cb(llhttp_t *parser, const char *data, size_t size)
{
    struct client *c = parser->data;
    const uint64_t now = uv_hrtime();
    if (parser->status_code != 200) {
        if (c->line.size < 200)
            buf_append(&c->line, data, size);
        return 0;
    }
    while (size) {
        const char *end = memchr(data, '\n', size);
        const size_t part = end ? (size_t)(end - data) : size;
        if (!end || c->line.size) {
            if (c->line.size + part > EVENT_BYTES)
                return HPE_USER;
            buf_append(&c->line, data, part);
        }
        if (!end)
            return 0;
        const char *line = c->line.size ? c->line.data : data;
        const size_t length = c->line.size ? c->line.size : part;
        if (length > 6 && memcmp(line, "data: ", 6) == 0)
            take_event(c, line + 6, length - 6, now);
        c->line.size = 0;
        data = end + 1;
        size -= part + 1;
    }
    return 0;
}

static int complete_cb(llhttp_t *parser)
{
    struct client *c = parser->data;
    struct load_report *r = c->load->report;
    if (c->state != BUSY)
        return HPE_USER; /* an answer that nobody asked for */
    c->load->last_ns = uv_hrtime();
    leave(c);
    if (parser->status_code != 200) {
        r->refused++;
        r->refused_status = parser->status_code;
        snprintf(r->error, sizeof r->error, "%s", c->line.size ? buf_text(&c->line) : "");
    } else if (c->ended) {
        r->complete++;
        histogram_add(&r->whole, c->load->last_ns - c->due_ns);
        if (c->load->options->done_cb)
            c->load->options->done_cb(c->load->options->context, c->index);
    } else {
        r->failed++; /* its stream ended with an error, which is noted, or without its end */
    }
    if (!llhttp_should_keep_alive(parser)) {
        c->state = NEW;
        drop(c);
    } else if (parser->status_code != 200) {
        rest(c);
    } else {
        c->state = FREE;
        list_push_back(&c->load->idle, &c->node);
    }
    return 0;
}

static void alloc_cb(uv_handle_t *handle, size_t suggested, uv_buf_t *out)
{
    static char buffer[READ_BYTES]; /* one loop, one read at a time */
    (void)handle;
    (void)suggested;
    *out = uv_buf_init(buffer, sizeof buffer);
}

static void read_cb(uv_stream_t *stream, ssize_t size, const uv_buf_t *data)
{
    struct client *c = stream->data;
    if (size < 0)
        failed(c, uv_strerror((int)size));
    else if (size && llhttp_execute(&c->parser, data->base, (size_t)size) != HPE_OK)
        failed(c, llhttp_get_error_reason(&c->parser));
    else if (c->state == FREE)
        next_client(c->load);
}

/* ---- what is asked ---- */

static void written_cb(uv_write_t *write, int status)
{
    struct client *c = write->data;
    if (status && status != UV_ECANCELED)
        failed(c, uv_strerror(status));
}

static void ask(struct client *c, uint64_t due_ns)
{
    struct load *load = c->load;
    uv_buf_t part = uv_buf_init(load->request.data, (unsigned)load->request.size);
    list_remove(&c->node);
    c->state = BUSY;
    c->due_ns = due_ns;
    c->speaks = c->ended = false;
    c->line.size = 0;
    load->begun++;
    if (++load->streams > load->report->streams_most)
        load->report->streams_most = load->streams;
    c->write.data = c;
    const int rc = uv_write(&c->write, (uv_stream_t *)&c->tcp, &part, 1, written_cb);
    if (rc)
        failed(c, uv_strerror(rc));
}

static void connected_cb(uv_connect_t *connect, int status)
{
    struct client *c = connect->data;
    if (status == UV_ECANCELED || c->state != CONNECTING)
        return;
    if (status || uv_read_start((uv_stream_t *)&c->tcp, alloc_cb, read_cb)) {
        failed(c, uv_strerror(status ? status : UV_EIO));
        return;
    }
    leave(c);
    c->state = FREE;
    list_push_back(&c->load->idle, &c->node);
    next_client(c->load);
}

static void connect_one(struct client *c)
{
    struct load *load = c->load;
    struct sockaddr_storage address;
    ASSERT(!uv_ip4_addr(load->options->host, load->options->port, (struct sockaddr_in *)&address) ||
           !uv_ip6_addr(load->options->host, load->options->port, (struct sockaddr_in6 *)&address));
    list_remove(&c->node);
    ASSERT(!uv_tcp_init(&load->loop, &c->tcp));
    c->tcp.data = c->connect.data = c;
    c->open = true;
    c->state = CONNECTING;
    load->connecting++;
    llhttp_init(&c->parser, HTTP_RESPONSE, &load->settings);
    c->parser.data = c;
    uv_tcp_nodelay(&c->tcp, 1);
    const int rc =
        uv_tcp_connect(&c->connect, &c->tcp, (const struct sockaddr *)&address, connected_cb);
    if (rc)
        failed(c, uv_strerror(rc));
}

/* Whether a request may still begin. */
static bool goes_on(const struct load *load, uint64_t now)
{
    const uint64_t most = load->options->requests;
    return now < load->end_ns && (!most || load->begun < most);
}

/* When the next request is due; 0: never. */
static uint64_t next_due(const struct load *load, uint64_t now)
{
    const double rate = load->options->rate;
    const uint64_t due =
        rate > 0 ? load->begin_ns + (uint64_t)((double)load->begun / rate * 1e9) : now;
    return goes_on(load, due) ? due : 0;
}

/* Hands out what is due to who is free, and connects who is not yet. */
static void next_client(struct load *load)
{
    const uint64_t now = uv_hrtime();
    uint64_t due;
    if (load->over)
        return;
    while (!list_empty(&load->idle) && (due = next_due(load, now)) && due <= now) {
        load->report->late += load->options->rate > 0 && now - due > TICK_MS * UINT64_C(2000000);
        ask(LIST_ENTRY(load->idle.next, struct client, node), due);
    }
    while (!list_empty(&load->fresh) && load->connecting < CONNECTING_MOST && goes_on(load, now))
        connect_one(LIST_ENTRY(load->fresh.next, struct client, node));
}

static void stop(struct load *load)
{
    load->over = true;
    for (uint32_t i = 0; i < load->options->clients; i++) {
        struct client *c = &load->clients[i];
        load->report->cut += c->state == BUSY;
        leave(c);
        c->state = CLOSED;
        drop(c);
    }
    uv_close((uv_handle_t *)&load->tick, NULL);
}

static void tick_cb(uv_timer_t *tick)
{
    struct load *load = tick->data;
    const uint64_t now = uv_hrtime();
    while (!list_empty(&load->resting)) {
        struct client *c = LIST_ENTRY(load->resting.next, struct client, node);
        if (c->rest_until_ns > now)
            break;
        list_remove(&c->node);
        c->state = c->open ? FREE : NEW;
        list_push_back(c->open ? &load->idle : &load->fresh, &c->node);
    }
    next_client(load);
    if ((!goes_on(load, now) && !load->streams) ||
        now >= load->end_ns + END_SECONDS * UINT64_C(1000000000))
        stop(load);
}

/* ---- a run ---- */

static void write_request(struct load *load)
{
    const struct load_options *o = load->options;
    struct buf body;
    uint64_t state = 1;
    buf_init(&body);
    buf_append_text(&body, "{\"prompt\":[");
    for (uint32_t i = 0; i < o->prompt_tokens; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        buf_append_format(&body, i ? ",%u" : "%u", 32 + (unsigned)(state >> 33) % 64);
    }
    buf_append_format(&body,
                      "],\"max_tokens\":%u,\"temperature\":0,\"ignore_eos\":true,\"stream\":true,"
                      "\"stream_options\":{\"include_usage\":true}",
                      o->max_tokens);
    if (o->model)
        buf_append_format(&body, ",\"model\":\"%s\"", o->model);
    buf_append_text(&body, "}");
    buf_append_format(&load->request,
                      "POST %s HTTP/1.1\r\nhost: %s:%d\r\ncontent-type: application/json\r\n",
                      o->path, o->host, o->port);
    if (o->key)
        buf_append_format(&load->request, "authorization: Bearer %s\r\n", o->key);
    buf_append_format(&load->request, "content-length: %zu\r\n\r\n", body.size);
    buf_append(&load->request, body.data, body.size);
    buf_close(&body);
}

enum status load_run(const struct load_options *options, struct load_report *report,
                     struct error *err)
{
    struct load load = {.options = options, .report = report};
    struct sockaddr_storage address;
    *report = (struct load_report){0};
    if (uv_ip4_addr(options->host, options->port, (struct sockaddr_in *)&address) &&
        uv_ip6_addr(options->host, options->port, (struct sockaddr_in6 *)&address))
        return error_set(err, STATUS_INVALID, "%s is not an IP address", options->host);
    load.clients = calloc(options->clients, sizeof *load.clients);
    if (!load.clients)
        return error_set(err, STATUS_NO_MEMORY, "out of memory");
    ASSERT(!uv_loop_init(&load.loop));
    ASSERT(!uv_timer_init(&load.loop, &load.tick));
    llhttp_settings_init(&load.settings);
    load.settings.on_body = body_cb;
    load.settings.on_message_complete = complete_cb;
    list_init(&load.fresh);
    list_init(&load.idle);
    list_init(&load.resting);
    write_request(&load);
    for (uint32_t i = 0; i < options->clients; i++) {
        load.clients[i].load = &load;
        load.clients[i].index = i;
        list_push_back(&load.fresh, &load.clients[i].node);
    }
    load.begin_ns = load.last_ns = uv_hrtime();
    load.end_ns = load.begin_ns + (uint64_t)(options->seconds * 1e9);
    load.tick.data = &load;
    uv_timer_start(&load.tick, tick_cb, TICK_MS, TICK_MS);
    uv_run(&load.loop, UV_RUN_DEFAULT);
    ASSERT(!uv_loop_close(&load.loop));
    report->seconds = (double)(load.last_ns - load.begin_ns) * 1e-9;
    for (uint32_t i = 0; i < options->clients; i++)
        buf_close(&load.clients[i].line);
    buf_close(&load.request);
    free(load.clients);
    return STATUS_OK;
}

/* ---- the command ---- */

static int usage(int code)
{
    fprintf(
        code ? stderr : stdout,
        "rambad bench --url http://127.0.0.1:8080 [--clients N] [--rate R] [--seconds S]\n"
        "             [--prompt-tokens N] [--max-tokens N] [--key KEY] [--model NAME] [--csv "
        "FILE]\n"
        "\n"
        "Asks a running server for streamed completions, and tells how long they took.\n\n"
        "  --clients N        connections, each with one request at a time (16)\n"
        "  --rate R           requests a second of all together, due at a fixed pace whatever the\n"
        "                     server does; 0: each client asks again at once (0)\n"
        "  --seconds S        how long requests are begun; those under way may end (10)\n"
        "  --prompt-tokens N  of each request (32)\n"
        "  --max-tokens N     of each answer, which does not end before (64)\n"
        "  --key KEY          API key; or RAMBA_API_KEY in the environment\n"
        "  --model NAME       for servers that want one\n"
        "  --csv FILE         append the figures to it\n\n"
        "  first token  from when a request was due to its first text\n"
        "  between      from one piece of text to the next of the same stream\n"
        "  whole        from when a request was due to its end\n\n"
        "With a rate, a request that finds every client busy waits for one, and that counts: else\n"
        "a slow server would be asked less, and look better. p99 is what 99 of 100 stay under.\n"
        "Exit code 1 when a request was refused or broke off.\n");
    return code;
}

bool load_parse_url(const char *url, struct load_options *o)
{
    static const char scheme[] = "http://";
    if (strncmp(url, scheme, sizeof scheme - 1) != 0)
        return false;
    const char *host = url + sizeof scheme - 1;
    const bool bracket = *host == '[';
    host += bracket;
    const size_t size = strcspn(host, bracket ? "]" : ":/");
    const char *rest = host + size + bracket;
    if (!size || size >= sizeof o->host || (bracket && host[size] != ']'))
        return false;
    memcpy(o->host, host, size);
    o->host[size] = 0;
    if (strcmp(o->host, "localhost") == 0)
        strcpy(o->host, "127.0.0.1");
    o->port = PORT;
    if (*rest == ':') {
        char *end;
        const unsigned long port = strtoul(rest + 1, &end, 10);
        if (end == rest + 1 || port < 1 || port > 65535)
            return false;
        o->port = (int)port;
        rest = end;
    }
    o->path = *rest == '/' && rest[1] ? rest : "/v1/completions";
    return !*rest || *rest == '/';
}

static void print_times(const char *name, const struct histogram *h)
{
    static const double shares[] = {0.5, 0.9, 0.99, 0.999, 1};
    char text[16];
    printf("  %-12s", name);
    for (size_t i = 0; i < sizeof shares / sizeof *shares; i++) {
        histogram_time(histogram_at(h, shares[i]), text);
        printf(" %9s", h->count ? text : "-");
    }
    printf("\n");
}

static void print_report(const struct load_report *r)
{
    const double seconds = r->seconds > 0 ? r->seconds : 1;
    printf("%llu answers, %llu tokens in %.1f s: %.1f answers/s, %.0f tokens/s; %llu streams at "
           "once at most\n",
           (unsigned long long)r->complete, (unsigned long long)r->tokens, r->seconds,
           (double)r->complete / seconds, (double)r->tokens / seconds,
           (unsigned long long)r->streams_most);
    if (r->late)
        printf("%llu requests were due before a client was free\n", (unsigned long long)r->late);
    if (r->refused)
        printf("%llu requests were refused, the last with %d\n", (unsigned long long)r->refused,
               r->refused_status);
    if (r->failed || r->cut)
        printf("%llu broke off, %llu had not ended %d s after the others\n",
               (unsigned long long)r->failed, (unsigned long long)r->cut, END_SECONDS);
    if (r->error[0])
        printf("the last error: %s\n", r->error);
    printf("\n  %-12s %9s %9s %9s %9s %9s\n", "", "p50", "p90", "p99", "p99.9", "largest");
    print_times("first token", &r->first_token);
    print_times("between", &r->between);
    print_times("whole", &r->whole);
    const struct histogram *const all[] = {&r->first_token, &r->between, &r->whole};
    static const char *const names[] = {"first token", "between", "whole"};
    for (size_t i = 0; i < 3; i++) {
        if (!all[i]->count)
            continue;
        printf("\n%s, from\n", names[i]);
        histogram_print(all[i], stdout);
    }
}

static bool write_csv(const char *path, const struct load_options *o, const struct load_report *r)
{
    static const double shares[] = {0.5, 0.9, 0.99, 0.999};
    const struct histogram *const all[] = {&r->first_token, &r->between, &r->whole};
    FILE *file = fopen(path, "ae");
    if (!file) {
        fprintf(stderr, "rambad: %s cannot be written\n", path);
        return false;
    }
    if (ftell(file) == 0)
        fprintf(file,
                "host,port,clients,rate,seconds,prompt_tokens,max_tokens,complete,refused,failed,"
                "cut,late,answers_per_s,tokens_per_s,first_p50_ms,first_p90_ms,first_p99_ms,"
                "first_p999_ms,between_p50_ms,between_p90_ms,between_p99_ms,between_p999_ms,"
                "whole_p50_ms,whole_p90_ms,whole_p99_ms,whole_p999_ms\n");
    const double seconds = r->seconds > 0 ? r->seconds : 1;
    fprintf(file, "%s,%d,%u,%g,%g,%u,%u,%llu,%llu,%llu,%llu,%llu,%.6g,%.6g", o->host, o->port,
            o->clients, o->rate, o->seconds, o->prompt_tokens, o->max_tokens,
            (unsigned long long)r->complete, (unsigned long long)r->refused,
            (unsigned long long)r->failed, (unsigned long long)r->cut, (unsigned long long)r->late,
            (double)r->complete / seconds, (double)r->tokens / seconds);
    for (size_t i = 0; i < 3; i++)
        for (size_t k = 0; k < 4; k++)
            fprintf(file, ",%.6g", (double)histogram_at(all[i], shares[k]) * 1e-6);
    fprintf(file, "\n");
    return fclose(file) == 0;
}

static bool number(const char *text, double least, double most, double *out)
{
    char *end;
    *out = strtod(text, &end);
    return end != text && !*end && *out >= least && *out <= most;
}

int load_main(int argc, char **argv)
{
    struct load_options o = {.key = getenv("RAMBA_API_KEY")};
    const char *csv = NULL;
    double clients = 16, prompt = 32, most = 64;
    bool good = true;
    o.seconds = 10;
    for (int i = 1; i < argc && good; i += 2) {
        const char *flag = argv[i], *value = argv[i + 1];
        if (strcmp(flag, "--help") == 0 || (value && strcmp(value, "--help") == 0))
            return usage(0);
        if (!value)
            good = false;
        else if (strcmp(flag, "--url") == 0)
            good = load_parse_url(value, &o);
        else if (strcmp(flag, "--clients") == 0)
            good = number(value, 1, 60000, &clients);
        else if (strcmp(flag, "--rate") == 0)
            good = number(value, 0, 1e6, &o.rate);
        else if (strcmp(flag, "--seconds") == 0)
            good = number(value, 0.1, 86400, &o.seconds);
        else if (strcmp(flag, "--prompt-tokens") == 0)
            good = number(value, 1, 4e6, &prompt);
        else if (strcmp(flag, "--max-tokens") == 0)
            good = number(value, 1, 4e6, &most);
        else if (strcmp(flag, "--key") == 0)
            o.key = value;
        else if (strcmp(flag, "--model") == 0)
            o.model = value;
        else if (strcmp(flag, "--csv") == 0)
            csv = value;
        else
            good = false;
        if (!good)
            fprintf(stderr, "rambad: %s%s%s is nothing that bench --url takes\n\n", flag,
                    value ? " " : "", value ? value : "");
    }
    if (!good || !o.host[0])
        return usage(2);
    o.clients = (uint32_t)clients;
    o.prompt_tokens = (uint32_t)prompt;
    o.max_tokens = (uint32_t)most;
    static struct load_report report;
    struct error err = {0};
    if (load_run(&o, &report, &err)) {
        fprintf(stderr, "rambad: %s\n", err.message);
        return 1;
    }
    print_report(&report);
    if (csv && !write_csv(csv, &o, &report))
        return 1;
    return report.refused || report.failed || report.cut || !report.complete;
}
