#include "clients/cli/http.h"

#include <curl/curl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "proto/base/assert.h"
#include "proto/limits.h"

volatile sig_atomic_t http_interrupted;

/* One running call. */
struct exchange {
    struct http *http;
    const struct http_call *call;
    struct http_answer *answer;
    struct buf line;  /* of the event stream, so far */
    bool is_stream;   /* the answer is one */
    bool is_good;     /* its first line says 2xx */
    bool ended_early; /* event_cb asked for it */
};

static char *copy(const char *text)
{
    char *out = strdup(text);
    ASSERT(out);
    return out;
}

void http_init(struct http *http, const char *url, const char *api_key)
{
    curl_global_init(CURL_GLOBAL_DEFAULT);
    http->curl = curl_easy_init();
    ASSERT(http->curl);
    http->url = copy(url);
    size_t size = strlen(http->url);
    while (size > 0 && http->url[size - 1] == '/')
        http->url[--size] = 0;
    http->api_key = api_key ? copy(api_key) : NULL;
}

void http_close(struct http *http)
{
    curl_easy_cleanup(http->curl);
    curl_global_cleanup();
    free(http->url);
    free(http->api_key);
}

void http_answer_close(struct http_answer *answer)
{
    buf_close(&answer->body);
}

/* A line without its end. The server sends one `data:` line an event. */
static bool take_line(struct exchange *x, const char *line, size_t size)
{
    if (size > 0 && line[size - 1] == '\r')
        size--;
    if (size < 5 || memcmp(line, "data:", 5) != 0)
        return true;
    line += 5;
    size -= 5;
    if (size > 0 && *line == ' ') {
        line++;
        size--;
    }
    if (size == 6 && memcmp(line, "[DONE]", 6) == 0)
        return true;
    if (client_json_error(line, size, &x->answer->error))
        return true;
    if (x->call->event_cb(x->call->event_context, line, size))
        return true;
    x->ended_early = true;
    return false;
}

static size_t on_body(char *data, size_t one, size_t size, void *context)
{
    struct exchange *x = context;
    size *= one;
    if (x->call->body_cb && x->is_good)
        return x->call->body_cb(x->call->body_context, data, size) ? size : 0;
    if (!x->is_stream) {
        if (x->answer->body.size + size > 4 * LIMITS_JSON_BODY_BYTES)
            return 0;
        buf_append(&x->answer->body, data, size);
        return size;
    }
    if (x->line.size + size > LIMITS_JSON_BODY_BYTES)
        return 0;
    buf_append(&x->line, data, size);
    size_t from = 0;
    const char *end;
    while ((end = memchr(x->line.data + from, '\n', x->line.size - from))) {
        size_t length = (size_t)(end - x->line.data) - from;
        if (!take_line(x, x->line.data + from, length))
            return 0;
        from += length + 1;
    }
    buf_consume(&x->line, from);
    return size;
}

static size_t on_header(char *data, size_t one, size_t size, void *context)
{
    struct exchange *x = context;
    size *= one;
    char line[128];
    snprintf(line, sizeof line, "%.*s", (int)(size < 127 ? size : 127), data);
    if (strncmp(line, "HTTP/", 5) == 0)
        x->is_good = strncmp(line + strcspn(line, " "), " 2", 2) == 0;
    if (strncasecmp(line, "content-type: text/event-stream", 31) == 0)
        x->is_stream = x->call->event_cb != NULL;
    if (strncasecmp(line, "retry-after-ms:", 15) == 0)
        x->answer->retry_after_ms = (uint32_t)strtoul(line + 15, NULL, 10);
    if (strncasecmp(line, "retry-after:", 12) == 0 && x->answer->retry_after_ms == 0)
        x->answer->retry_after_ms = (uint32_t)(strtoul(line + 12, NULL, 10) * 1000);
    return size;
}

static size_t on_read(char *out, size_t one, size_t count, void *context)
{
    struct exchange *x = context;
    ssize_t got = x->call->read_cb(x->call->read_context, out, one * count);
    return got < 0 ? CURL_READFUNC_ABORT : (size_t)got;
}

static int on_progress(void *context, curl_off_t a, curl_off_t b, curl_off_t c, curl_off_t d)
{
    (void)context, (void)a, (void)b, (void)c, (void)d;
    return http_interrupted != 0;
}

static struct curl_slist *make_headers(const struct http *http, const struct http_call *call)
{
    struct curl_slist *list = NULL;
    list = curl_slist_append(list, call->event_cb  ? "Accept: text/event-stream"
                                   : call->body_cb ? "Accept: */*"
                                                   : "Accept: application/json");
    if (call->json)
        list = curl_slist_append(list, "Content-Type: application/json");
    if (call->read_cb) {
        char type[128];
        snprintf(type, sizeof type, "Content-Type: %.100s", call->type ? call->type : "text/plain");
        list = curl_slist_append(list, type);
        list = curl_slist_append(list, "Transfer-Encoding: chunked");
    }
    list = curl_slist_append(list, "Expect:"); /* no round trip before a body */
    if (http->api_key) {
        struct buf line;
        buf_init(&line);
        buf_append_format(&line, "Authorization: Bearer %s", http->api_key);
        list = curl_slist_append(list, buf_text(&line));
        buf_close(&line);
    }
    ASSERT(list);
    return list;
}

static void set_body(CURL *curl, const struct http_call *call, struct exchange *x)
{
    if (call->json) {
        curl_easy_setopt(curl, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t)call->json_size);
        curl_easy_setopt(curl, CURLOPT_POSTFIELDS, call->json);
    } else if (call->read_cb) {
        curl_easy_setopt(curl, CURLOPT_POST, 1L);
        curl_easy_setopt(curl, CURLOPT_READFUNCTION, on_read);
        curl_easy_setopt(curl, CURLOPT_READDATA, x);
    }
    if (strcmp(call->method, "GET") == 0)
        curl_easy_setopt(curl, CURLOPT_HTTPGET, 1L);
    else
        curl_easy_setopt(curl, CURLOPT_CUSTOMREQUEST, call->method);
}

/* Turns libcurl's result into what callers decide by. */
static bool conclude(struct exchange *x, CURLcode result, const char *detail)
{
    struct http_answer *answer = x->answer;
    long code = 0;
    curl_easy_getinfo(x->http->curl, CURLINFO_RESPONSE_CODE, &code);
    answer->code = (int)code;
    if (x->ended_early)
        return code / 100 == 2;
    answer->interrupted = http_interrupted != 0;
    answer->refused = result == CURLE_COULDNT_CONNECT || result == CURLE_COULDNT_RESOLVE_HOST;
    answer->cut = result != CURLE_OK && !answer->refused && !answer->interrupted;
    if (result != CURLE_OK)
        snprintf(answer->reason, sizeof answer->reason, "%s",
                 detail[0] ? detail : curl_easy_strerror(result));
    /* A server that answers an error while the body is still on its way may close at once: the
     * answer counts, not how the upload ended. */
    if (answer->body.size > 0 && !answer->error.message[0])
        client_json_error(answer->body.data, answer->body.size, &answer->error);
    if (code >= 400 && answer->error.message[0])
        answer->cut = false;
    return result == CURLE_OK && code / 100 == 2 && !answer->error.message[0];
}

bool http_do(struct http *http, const struct http_call *call, struct http_answer *answer)
{
    CURL *curl = http->curl;
    char detail[CURL_ERROR_SIZE] = "";
    struct buf url;
    *answer = (struct http_answer){0};
    struct exchange x = {.http = http, .call = call, .answer = answer};
    buf_init(&x.line);
    buf_init(&answer->body);
    buf_init(&url);
    buf_append_format(&url, "%s%s", http->url, call->path);
    struct curl_slist *headers = make_headers(http, call);
    curl_easy_reset(curl); /* options go, the connection stays */
    curl_easy_setopt(curl, CURLOPT_URL, buf_text(&url));
    curl_easy_setopt(curl, CURLOPT_PROTOCOLS_STR, "http,https");
    curl_easy_setopt(curl, CURLOPT_ERRORBUFFER, detail);
    curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(curl, CURLOPT_USERAGENT, "ramba/" RAMBAD_VERSION);
    curl_easy_setopt(curl, CURLOPT_CONNECTTIMEOUT_MS, 10000L);
    curl_easy_setopt(curl, CURLOPT_HTTPHEADER, headers);
    curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, on_body);
    curl_easy_setopt(curl, CURLOPT_WRITEDATA, &x);
    curl_easy_setopt(curl, CURLOPT_HEADERFUNCTION, on_header);
    curl_easy_setopt(curl, CURLOPT_HEADERDATA, &x);
    curl_easy_setopt(curl, CURLOPT_NOPROGRESS, 0L);
    curl_easy_setopt(curl, CURLOPT_XFERINFOFUNCTION, on_progress);
    set_body(curl, call, &x);
    bool good = conclude(&x, curl_easy_perform(curl), detail);
    curl_slist_free_all(headers);
    buf_close(&url);
    buf_close(&x.line);
    return good;
}
