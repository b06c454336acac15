#include "tests/lib/wire.h"

#include <arpa/inet.h>
#include <cjson/cJSON.h>
#include <errno.h>
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/lib/document.h"

void wire_open(struct wire *wire, const struct daemon *daemon)
{
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)daemon->port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    buf_init(&wire->in);
    wire->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(wire->fd >= 0);
    assert_int_equal(connect(wire->fd, (struct sockaddr *)&address, sizeof address), 0);
}

void wire_close(struct wire *wire)
{
    close(wire->fd);
    buf_close(&wire->in);
}

void wire_send(struct wire *wire, const char *data, size_t size)
{
    while (size) {
        const ssize_t sent = send(wire->fd, data, size, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0)
            return; /* refused meanwhile: the answer tells */
        data += sent;
        size -= (size_t)sent;
    }
}

void wire_say(struct wire *wire, const char *format, ...)
{
    char text[4096];
    va_list args;
    va_start(args, format);
    const int size = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    assert_true(size >= 0 && (size_t)size < sizeof text);
    wire_send(wire, text, (size_t)size);
}

void wire_ask(struct wire *wire, const char *method, const char *path, const char *headers,
              const char *body, size_t size)
{
    struct buf request;
    buf_init(&request);
    buf_append_format(&request, "%s %s HTTP/1.1\r\nHost: test\r\n%s", method, path, headers);
    if (body)
        buf_append_format(&request, "Content-Length: %zu\r\n", size);
    buf_append_text(&request, "\r\n");
    if (body)
        buf_append(&request, body, size);
    wire_send(wire, request.data, request.size);
    buf_close(&request);
}

/* More bytes; false at the end of the connection. */
static bool more(struct wire *wire)
{
    char block[16384];
    struct pollfd ready = {.fd = wire->fd, .events = POLLIN};
    if (poll(&ready, 1, WIRE_SECONDS * 1000) == 0)
        fail_msg("nothing came for %d s; so far: %.300s", WIRE_SECONDS, buf_text(&wire->in));
    const ssize_t got = recv(wire->fd, block, sizeof block, 0);
    if (got <= 0)
        return false;
    buf_append(&wire->in, block, (size_t)got);
    return true;
}

static char *find(struct wire *wire, const char *text)
{
    return wire->in.size ? memmem(wire->in.data, wire->in.size, text, strlen(text)) : NULL;
}

bool wire_wait_for(struct wire *wire, const char *text)
{
    while (!find(wire, text))
        if (!more(wire))
            return false;
    return true;
}

bool wire_ends(struct wire *wire, double *seconds)
{
    const double start = daemon_now();
    while (!wire->in.size && more(wire))
        ;
    if (seconds)
        *seconds = daemon_now() - start;
    return !wire->in.size;
}

static bool take(struct wire *wire, struct buf *out, size_t size)
{
    while (wire->in.size < size)
        if (!more(wire))
            return false;
    buf_append(out, wire->in.data, size);
    buf_consume(&wire->in, size);
    return true;
}

static bool take_chunks(struct wire *wire, struct buf *out)
{
    for (;;) {
        if (!wire_wait_for(wire, "\r\n"))
            return false;
        char *end;
        const size_t size = strtoul(wire->in.data, &end, 16);
        assert_true(end > wire->in.data && *end == '\r');
        buf_consume(&wire->in, (size_t)(end - wire->in.data) + 2);
        struct buf line;
        buf_init(&line);
        const bool good = take(wire, out, size) && take(wire, &line, 2);
        if (good)
            assert_memory_equal(line.data, "\r\n", 2);
        buf_close(&line);
        if (!good || !size)
            return good;
    }
}

int wire_answer(struct wire *wire, struct wire_answer *answer, bool is_head)
{
    char value[64];
    *answer = (struct wire_answer){0};
    if (!wire_wait_for(wire, "\r\n\r\n"))
        return 0;
    take(wire, &answer->head, (size_t)(find(wire, "\r\n\r\n") - wire->in.data) + 4);
    assert_int_equal(sscanf(buf_text(&answer->head), "HTTP/1.1 %d ", &answer->status), 1);
    bool whole = true;
    if (is_head || answer->status == 100)
        return answer->status;
    if (wire_header(answer, "content-length", value, sizeof value))
        whole = take(wire, &answer->body, strtoul(value, NULL, 10));
    else if (wire_header(answer, "transfer-encoding", value, sizeof value))
        whole = take_chunks(wire, &answer->body);
    else /* until the end */
        while (take(wire, &answer->body, wire->in.size) && more(wire))
            ;
    buf_text(&answer->body);
    if (!whole)
        answer->status = 0;
    return answer->status;
}

void wire_answer_close(struct wire_answer *answer)
{
    buf_close(&answer->head);
    buf_close(&answer->body);
}

bool wire_header(const struct wire_answer *answer, const char *name, char *out, size_t room)
{
    const size_t size = strlen(name);
    for (const char *line = answer->head.data; (line = strstr(line, "\r\n"));) {
        line += 2;
        if (strncasecmp(line, name, size) != 0 || line[size] != ':')
            continue;
        line += size + 1 + strspn(line + size + 1, " ");
        snprintf(out, room, "%.*s", (int)strcspn(line, "\r\n"), line);
        return true;
    }
    return false;
}

int wire_call(const struct daemon *daemon, const char *method, const char *path, const char *body,
              struct wire_answer *answer)
{
    struct wire wire;
    char headers[256];
    snprintf(headers, sizeof headers, "Connection: close\r\n%s%s%s",
             daemon->key ? "Authorization: Bearer " : "", daemon->key ? daemon->key : "",
             daemon->key ? "\r\n" : "");
    wire_open(&wire, daemon);
    wire_ask(&wire, method, path, headers, body, body ? strlen(body) : 0);
    wire_answer(&wire, answer, strcmp(method, "HEAD") == 0);
    wire_close(&wire);
    document_check(method, path, answer->status);
    return answer->status;
}

struct cJSON *wire_json(const struct wire_answer *answer)
{
    cJSON *root = cJSON_ParseWithLength(answer->body.data, answer->body.size);
    if (!root)
        print_message("not JSON: %.*s\n", (int)answer->body.size, answer->body.data);
    assert_non_null(root);
    return root;
}

struct cJSON *wire_call_json(const struct daemon *daemon, const char *method, const char *path,
                             const char *body, int status)
{
    struct wire_answer answer;
    if (wire_call(daemon, method, path, body, &answer) != status)
        fail_msg("%s %s %s: HTTP %d, not %d: %s", method, path, body ? body : "", answer.status,
                 status, buf_text(&answer.body));
    cJSON *json = wire_json(&answer);
    wire_answer_close(&answer);
    return json;
}

void wire_check_error(const struct wire_answer *answer, int status, const char *code,
                      const char *param)
{
    char id[64];
    if (answer->status != status)
        print_message("HTTP %d, not %d: %.*s\n", answer->status, status, (int)answer->body.size,
                      answer->body.data);
    assert_int_equal(answer->status, status);
    assert_true(wire_header(answer, "x-request-id", id, sizeof id));
    assert_true(strlen(id) > 0);
    cJSON *root = wire_json(answer);
    const cJSON *error = cJSON_GetObjectItemCaseSensitive(root, "error");
    assert_int_equal(cJSON_GetArraySize(root), 1);
    assert_int_equal(cJSON_GetArraySize(error), 4);
    const char *message = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(error, "message"));
    const char *type = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(error, "type"));
    const cJSON *named = cJSON_GetObjectItemCaseSensitive(error, "param");
    assert_non_null(message);
    assert_true(strlen(message) > 0 && type && strlen(type) > 0);
    assert_string_equal(cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(error, "code")),
                        code);
    if (param ? !cJSON_IsString(named) || strcmp(named->valuestring, param) != 0
              : !cJSON_IsNull(named))
        fail_msg("param is not %s: %s", param ? param : "null", answer->body.data);
    cJSON_Delete(root);
}

double wire_metric(const struct daemon *daemon, const char *name)
{
    struct wire_answer answer;
    char line[256];
    assert_int_equal(wire_call(daemon, "GET", "/metrics", NULL, &answer), 200);
    snprintf(line, sizeof line, "\n%s ", name);
    const char *at = strstr(buf_text(&answer.body), line);
    if (!at)
        fail_msg("no metric %s", name);
    const double value = strtod(at + strlen(line), NULL);
    wire_answer_close(&answer);
    return value;
}

void wire_wait_metric(const struct daemon *daemon, const char *name, double value)
{
    const double start = daemon_now();
    for (double last; (last = wire_metric(daemon, name)) != value; usleep(10000))
        if (daemon_now() - start > WIRE_SECONDS)
            fail_msg("%s stays at %g, not %g", name, last, value);
}
