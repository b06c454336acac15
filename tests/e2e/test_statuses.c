/* The statuses of proto/openapi.yaml against the running server: no answer has one that is not
 * documented for its operation, and each that is documented comes. */
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/lib/answer.h"
#include "tests/lib/daemon.h"
#include "tests/lib/document.h"
#include "tests/lib/sanitizer.h"
#include "tests/lib/store_helper.h"
#include "tests/lib/wire.h"

#define MODEL_NAME "wide-stickbreaking-topk8"
#define KEY "a key of many letters"
#define TOKEN "Authorization: Bearer " KEY "\r\n"
#define AUTHORIZATION "Connection: close\r\n" TOKEN

static struct daemon daemon_;
static char *folder;
static struct document document;
static const char *const flags[] = {"--threads", "1", NULL};

/* ---- calls ---- */

/* The answer of a documented operation: its status is documented, and this one; an error is one. */
static void take_answer(struct wire *wire, struct operation *o, const char *path, int status)
{
    struct wire_answer answer;
    if (wire_answer(wire, &answer, false) != status)
        fail_msg("%s %s: HTTP %d, not %d: %s", o->method, path, answer.status, status,
                 buf_text(&answer.body));
    document_reach(o, status);
    if (status >= 400 && !(status == 503 && strstr(answer.body.data, "draining"))) {
        cJSON *json = wire_json(&answer);
        (void)answer_text(json, "error.message");
        cJSON_Delete(json);
    }
    wire_answer_close(&answer);
}

static void expect_bytes(struct operation *o, const char *id, const char *query,
                         const char *headers, const char *body, size_t size, int status)
{
    char path[256];
    struct wire wire;
    document_path(o, id, query, path);
    wire_open(&wire, &daemon_);
    wire_ask(&wire, o->method, path, headers, body, size);
    take_answer(&wire, o, path, status);
    wire_close(&wire);
}

/* A call of a documented operation on `id`; its answer must be documented, and be `status`. */
static void expect(struct operation *o, const char *id, const char *query, const char *headers,
                   const char *body, int status)
{
    expect_bytes(o, id, query, headers, body, body ? strlen(body) : 0, status);
}

static void ask(const char *method, const char *path, const char *id, const char *query,
                const char *body, int status)
{
    struct operation *o = document_find(&document, method, path);
    if (!o)
        fail_msg("%s %s is not documented", method, path);
    else
        expect(o, id, query, AUTHORIZATION, body, status);
}

/* What the calls below are about. */
static struct {
    char memory[LIMITS_ID_BYTES], fork[LIMITS_ID_BYTES], conversation[LIMITS_ID_BYTES];
    char item[LIMITS_ID_BYTES], response[LIMITS_ID_BYTES], background[LIMITS_ID_BYTES];
    double first_turn; /* of the memory, a position */
    struct buf file;   /* an export of it */
} world;

static void fill_in(const char *pattern, char out[512])
{
    char position[32];
    struct buf text;
    snprintf(position, sizeof position, "%.0f", world.first_turn);
    buf_init(&text);
    for (const char *p = pattern; *p; p++) {
        if (*p != '$')
            buf_append(&text, p, 1);
        else
            switch (*++p) {
            case 'M':
                buf_append_text(&text, world.memory);
                break;
            case 'C':
                buf_append_text(&text, world.conversation);
                break;
            case 'I':
                buf_append_text(&text, world.item);
                break;
            case 'R':
                buf_append_text(&text, world.response);
                break;
            case 'B':
                buf_append_text(&text, world.background);
                break;
            default:
                buf_append_text(&text, position);
            }
    }
    assert_true(text.size < 512);
    memcpy(out, buf_text(&text), text.size + 1);
    buf_close(&text);
}

/* A call beside the table's; its answer, which must be of this status, as JSON. */
static cJSON *call(const char *method, const char *path, const char *body, int status)
{
    char filled[512], at[512];
    fill_in(path, at);
    fill_in(body ? body : "", filled);
    return wire_call_json(&daemon_, method, at, body ? filled : NULL, status);
}

static void make_id(const char *path, const char *body, int status, char id[LIMITS_ID_BYTES])
{
    cJSON *json = call("POST", path, body, status);
    snprintf(id, LIMITS_ID_BYTES, "%s", answer_text(json, "id"));
    cJSON_Delete(json);
}

static int setup(void **state)
{
    (void)state;
    /* A daemon that checks itself would not have a library before its own. */
    sanitizer_address_option("verify_asan_link_order=0");
    document_open(&document);
    setenv("RAMBAD_API_KEY", KEY, 1);
    folder = daemon_begin(&daemon_, "tests/golden/" MODEL_NAME, flags);
    daemon_.key = KEY;
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    daemon_end(&daemon_, folder);
    document_close(&document);
    return 0;
}

/* What can go wrong with every request. */
static void test_every_operation(void **state)
{
    (void)state;
    char memory[LIMITS_ID_BYTES], *huge = malloc(40001);
    struct buf headers;
    assert_non_null(huge);
    memset(huge, 'x', 40000);
    huge[40000] = 0;
    buf_init(&headers);
    buf_append_format(&headers, AUTHORIZATION "X-Huge: %s\r\n", huge);
    make_id("/v1/memories", "{}", 201, memory);
    for (int i = 0; i < document.operation_count; i++) {
        struct operation *o = &document.operations[i];
        expect(o, "x", "?nonsense=1", AUTHORIZATION, NULL, 400);
        expect(o, "x", "", buf_text(&headers), NULL, 431);
        if (document_has(o, 413))
            expect(o, memory, "", AUTHORIZATION "Content-Length: 1000000000\r\n", NULL, 413);
        if (o->is_open) {
            expect(o, "x", "", "", NULL, 200);
            assert_false(document_has(o, 401));
        } else {
            expect(o, "x", "", "Authorization: Bearer wrong\r\n", NULL, 401);
        }
        if (strstr(o->path, "{}"))
            expect(o, "x", "", AUTHORIZATION, NULL, 404);
    }
    buf_close(&headers);
    free(huge);
}

/* A life of memories, with what it does not take. */
static void test_life(void **state)
{
    (void)state;
    char id[LIMITS_ID_BYTES], body[256];
    make_id("/v1/memories", "{}", 201, id);
    ask("POST", "/v1/memories", "", "", "{}", 201);
    ask("POST", "/v1/memories", "", "", "{\"metadata\":1}", 400);
    ask("POST", "/v1/memories", "", "", "{\"from\":\"mem_none\"}", 404);
    ask("GET", "/v1/memories", "", "?limit=1", NULL, 200);
    ask("GET", "/v1/memories", "", "?limit=0", NULL, 400);
    ask("GET", "/v1/memories", "", "?after=mem_none", NULL, 404);
    ask("POST", "/v1/memories/{}/append", id, "", "once upon a time there was", 200);
    ask("POST", "/v1/memories/{}/append", id, "?offset=3", "x", 409);
    expect(document_find(&document, "POST", "/v1/memories/{}/append"), id, "",
           AUTHORIZATION "Content-Type: application/json\r\n", "{}", 415);
    ask("POST", "/v1/memories/{}/append", id, "", " a raven", 200);
    ask("GET", "/v1/memories/{}", id, "", NULL, 200);
    ask("GET", "/v1/memories/{}/chunks", id, "", NULL, 200);
    ask("GET", "/v1/memories/{}/turns", id, "", NULL, 200);
    ask("POST", "/v1/memories/{}/turns", id, "", "{\"position\":26,\"bookmark\":\"b\"}", 200);
    ask("POST", "/v1/memories/{}/turns", id, "", "{\"position\":1}", 404);
    ask("DELETE", "/v1/memories/{}/turns", id, "?position=34", NULL, 409);
    ask("DELETE", "/v1/memories/{}/turns", id, "?position=26", NULL, 200);
    ask("GET", "/v1/memories/{}/export", id, "", NULL, 200);
    ask("POST", "/v1/memories/import", "", "", "no file", 400);
    ask("POST", "/v1/memories/{}/rewind", id, "", "{\"to\":10}", 200);
    snprintf(body, sizeof body, "{\"prompt\":\"a\",\"max_tokens\":1,\"memory\":\"%s\"}", id);
    ask("POST", "/v1/completions", "", "", body, 200);
    ask("POST", "/v1/completions", "", "", "{}", 400);
    ask("POST", "/v1/completions", "", "", "{\"prompt\":\"a\",\"memory\":\"mem_none\"}", 404);
    ask("POST", "/v1/chat/completions", "", "", "{}", 400);
    ask("GET", "/v1/models", "", "", NULL, 200);
    ask("GET", "/v1/models/{}", MODEL_NAME, "", NULL, 200);
    ask("GET", "/metrics", "", "", NULL, 200);
    ask("PATCH", "/v1/memories/{}", id, "", "{\"metadata\":{\"a\":\"b\"}}", 200);
    ask("PATCH", "/v1/memories/{}", id, "", "{\"metadata\":{\"a\":1}}", 400);
    ask("PATCH", "/v1/memories/{}", id, "",
        "{\"expires_after\":{\"anchor\":\"created_at\",\"days\":1}}", 200);
    ask("DELETE", "/v1/memories/{}", id, "", NULL, 200);
}

/* Responses and conversations, which need a model that chats: every status that a request can bring
 * about by itself, but 409 of two at once. */
static void test_talk(void **state)
{
    (void)state;
    char response[LIMITS_ID_BYTES], slow[LIMITS_ID_BYTES], conversation[LIMITS_ID_BYTES];
    char body[256], item[2 * LIMITS_ID_BYTES];
    const struct daemon golden = daemon_;
    char *other = daemon_begin(&daemon_, "engine/models/ramba-20m", flags);
    daemon_.key = KEY;
    make_id("/v1/responses", "{\"input\":\"a\",\"max_output_tokens\":2}", 200, response);
    ask("POST", "/v1/responses", "", "", "{\"input\":\"a\",\"max_output_tokens\":2}", 200);
    ask("POST", "/v1/chat/completions", "", "",
        "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"memory\":\"mem_none\"}", 404);
    ask("POST", "/v1/responses", "", "", "{}", 400);
    ask("POST", "/v1/responses", "", "", "{\"input\":\"a\",\"conversation\":\"conv_none\"}", 404);
    ask("POST", "/v1/responses/input_tokens", "", "", "{\"input\":\"a\"}", 200);
    ask("POST", "/v1/responses/input_tokens", "", "", "{}", 400);
    ask("POST", "/v1/responses/input_tokens", "", "",
        "{\"input\":\"a\",\"previous_response_id\":\"resp_none\"}", 404);
    ask("GET", "/v1/responses/{}", response, "", NULL, 200);
    ask("GET", "/v1/responses/{}", response, "?stream=true&starting_after=3", NULL, 200);
    ask("GET", "/v1/responses/{}", response, "?stream=1", NULL, 400);
    ask("GET", "/v1/responses/{}", "resp_none", "", NULL, 404);
    ask("GET", "/v1/responses/{}/input_items", response, "", NULL, 200);
    ask("GET", "/v1/responses/{}/input_items", response, "?limit=0", NULL, 400);
    ask("GET", "/v1/responses/{}/input_items", response, "?after=msg_none", NULL, 404);
    ask("POST", "/v1/responses/{}/cancel", response, "", NULL, 400);
    make_id(
        "/v1/responses",
        "{\"input\":\"a\",\"background\":true,\"ignore_eos\":true,\"max_output_tokens\":1000000}",
        200, slow);
    ask("DELETE", "/v1/responses/{}", slow, "", NULL, 409);
    ask("POST", "/v1/responses/{}/cancel", slow, "", NULL, 200);
    ask("DELETE", "/v1/responses/{}", slow, "", NULL, 200);
    ask("DELETE", "/v1/responses/{}", slow, "", NULL, 404);
    make_id("/v1/conversations", "{\"items\":[{\"role\":\"user\",\"content\":\"a\"}]}", 200,
            conversation);
    ask("POST", "/v1/conversations", "", "", NULL, 200);
    ask("POST", "/v1/conversations", "", "", "{\"items\":1}", 400);
    ask("GET", "/v1/conversations/{}", conversation, "", NULL, 200);
    ask("POST", "/v1/conversations/{}", conversation, "", "{\"metadata\":{\"a\":\"b\"}}", 200);
    ask("POST", "/v1/conversations/{}", conversation, "", "{}", 400);
    ask("POST", "/v1/conversations/{}/items", conversation, "",
        "{\"items\":[{\"role\":\"user\",\"content\":\"b\"}]}", 200);
    ask("POST", "/v1/conversations/{}/items", conversation, "", "{\"items\":[]}", 400);
    ask("GET", "/v1/conversations/{}/items", conversation, "?order=asc", NULL, 200);
    ask("GET", "/v1/conversations/{}/items", conversation, "?order=up", NULL, 400);
    ask("GET", "/v1/conversations/{}/items", conversation, "?after=msg_none", NULL, 404);
    snprintf(item, sizeof item, "%s/msg_none", conversation);
    ask("GET", "/v1/conversations/{}/items/{}", item, "", NULL, 404);
    ask("DELETE", "/v1/conversations/{}/items/{}", item, "", NULL, 404);
    snprintf(body, sizeof body,
             "{\"input\":\"a\",\"background\":true,\"ignore_eos\":true,\"max_output_tokens\":"
             "1000000,\"conversation\":\"%s\"}",
             conversation);
    make_id("/v1/responses", body, 200, slow);
    ask("POST", "/v1/responses", "", "", body, 409);
    ask("POST", "/v1/conversations/{}/items", conversation, "",
        "{\"items\":[{\"role\":\"user\",\"content\":\"b\"}]}", 409);
    ask("DELETE", "/v1/conversations/{}", conversation, "", NULL, 409);
    ask("POST", "/v1/responses/{}/cancel", slow, "", NULL, 200);
    ask("DELETE", "/v1/conversations/{}", conversation, "", NULL, 200);
    ask("DELETE", "/v1/conversations/{}", conversation, "", NULL, 404);
    daemon_end(&daemon_, other);
    daemon_ = golden;
}

/* ---- every status of every operation ---- */

#define CONNECTIONS 64 /* more than there are operations: they are under way all at once */
#define TEXT_OF_(number) #number
#define TEXT_OF(number) TEXT_OF_(number)

/* One call of each operation that the server can carry out. In ids, queries and bodies $M is the
 * memory, $T the position of its first turn, $C the conversation, $I an item of it, $R the
 * response, $B one that was in the background. The later ones take away what the earlier ones need.
 */
static const struct {
    const char *method, *path, *id, *query, *body;
    bool is_job; /* waits in the engine's queue; the others that write, in the store's alone */
} calls[] = {
    {"GET", "/health", "", "", NULL, false},
    {"GET", "/health/ready", "", "", NULL, false},
    {"GET", "/health/live", "", "", NULL, false},
    {"GET", "/metrics", "", "", NULL, false},
    {"GET", "/v1/models", "", "", NULL, false},
    {"GET", "/v1/models/{}", "ramba-20m", "", NULL, false},
    {"POST", "/v1/completions", "", "", "{\"memory\":\"$M\",\"prompt\":\"a\",\"max_tokens\":1}",
     true},
    {"POST", "/v1/chat/completions", "", "",
     "{\"memory\":\"$M\",\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"max_tokens\":1}",
     true},
    {"POST", "/v1/responses", "", "",
     "{\"conversation\":\"$C\",\"input\":\"a\",\"max_output_tokens\":1}", true},
    {"POST", "/v1/responses/input_tokens", "", "",
     "{\"previous_response_id\":\"$R\",\"input\":\"a\"}", false},
    {"GET", "/v1/responses/{}", "$R", "", NULL, false},
    {"POST", "/v1/responses/{}/cancel", "$B", "", NULL, false},
    {"GET", "/v1/responses/{}/input_items", "$R", "", NULL, false},
    {"POST", "/v1/conversations", "", "", "{\"items\":[{\"role\":\"user\",\"content\":\"a\"}]}",
     true},
    {"GET", "/v1/conversations/{}", "$C", "", NULL, false},
    {"POST", "/v1/conversations/{}", "$C", "", "{\"metadata\":{\"a\":\"b\"}}", false},
    {"GET", "/v1/conversations/{}/items", "$C", "", NULL, false},
    {"POST", "/v1/conversations/{}/items", "$C", "",
     "{\"items\":[{\"role\":\"user\",\"content\":\"a\"}]}", true},
    {"GET", "/v1/conversations/{}/items/{}", "$C/$I", "", NULL, false},
    {"POST", "/v1/memories", "", "", "{}", false},
    {"GET", "/v1/memories", "", "", NULL, false},
    {"GET", "/v1/memories/{}", "$M", "", NULL, false},
    {"PATCH", "/v1/memories/{}", "$M", "", "{\"metadata\":{\"a\":\"b\"}}", false},
    {"POST", "/v1/memories/{}/append", "$M", "", "and so on", true},
    {"GET", "/v1/memories/{}/chunks", "$M", "", NULL, false},
    {"GET", "/v1/memories/{}/export", "$M", "", NULL, false},
    {"POST", "/v1/memories/import", "", "", "", false},
    {"GET", "/v1/memories/{}/turns", "$M", "", NULL, false},
    {"POST", "/v1/memories/{}/turns", "$M", "", "{\"position\":$T,\"bookmark\":\"b\"}", false},
    {"DELETE", "/v1/memories/{}/turns", "$M", "?position=$T", NULL, false},
    {"POST", "/v1/memories/{}/rewind", "$M", "", "{\"to\":$T}", false},
    {"DELETE", "/v1/responses/{}", "$R", "", NULL, false},
    {"DELETE", "/v1/conversations/{}/items/{}", "$C/$I", "", NULL, true},
    {"DELETE", "/v1/conversations/{}", "$C", "", NULL, false},
    {"DELETE", "/v1/memories/{}", "$M", "", NULL, false},
};
#define CALLS (sizeof calls / sizeof *calls)

/* Makes the call; its answer must have this status. */
static void carry_out(size_t i, const char *headers, int status)
{
    char id[512], query[512], body[512];
    struct operation *o = document_find(&document, calls[i].method, calls[i].path);
    assert_non_null(o);
    fill_in(calls[i].id, id);
    fill_in(calls[i].query, query);
    fill_in(calls[i].body ? calls[i].body : "", body);
    const bool is_file = strstr(calls[i].path, "/import") != NULL;
    expect_bytes(o, id, query, headers,
                 is_file         ? world.file.data
                 : calls[i].body ? body
                                 : NULL,
                 is_file ? world.file.size : strlen(body), status);
}

static bool is_reached(const struct operation *o, int status)
{
    bool reached = false;
    for (int i = 0; i < o->status_count; i++)
        reached |= o->statuses[i] == status && o->reached[i];
    return reached;
}

enum which {
    ALL,
    JOBS,
    OTHERS,         /* than jobs */
    DISK,           /* which write to it */
    NOT_TO_THE_LAST /* which are not answered while the server drains */
};

static bool is_meant(size_t i, const struct operation *o, enum which which)
{
    switch (which) {
    case JOBS:
        return calls[i].is_job;
    case OTHERS:
        return !calls[i].is_job;
    case DISK:
        return document_has(o, 507);
    case NOT_TO_THE_LAST:
        return strcmp(o->path, "/metrics") != 0 && strcmp(o->path, "/health/live") != 0;
    case ALL:
        break;
    }
    return true;
}

/* All calls whose operation documents the status and has not had it yet get it now. */
static void all_answer(int status, enum which which)
{
    int count = 0;
    for (size_t i = 0; i < CALLS; i++) {
        const struct operation *o = document_find(&document, calls[i].method, calls[i].path);
        assert_non_null(o);
        if (!document_has(o, status) || is_reached(o, status) || !is_meant(i, o, which))
            continue;
        carry_out(i, AUTHORIZATION, status);
        count++;
    }
    assert_true(count > 0);
}

static void export_file(const char *memory, struct buf *file)
{
    struct wire_answer answer;
    char path[128];
    snprintf(path, sizeof path, "/v1/memories/%s/export", memory);
    assert_int_equal(wire_call(&daemon_, "GET", path, NULL, &answer), 200);
    buf_close(file);
    *file = answer.body;
    buf_init(&answer.body);
    wire_answer_close(&answer);
}

static void make_world(void)
{
    make_id("/v1/memories", "{}", 201, world.memory);
    cJSON *json = call("POST", "/v1/memories/$M/append", "once upon a time there was a raven", 200);
    world.first_turn = answer_number(json, "position");
    cJSON_Delete(json);
    cJSON_Delete(call("POST", "/v1/memories/$M/append", " and its writing desk", 200));
    make_id("/v1/memories", "{\"from\":\"$M\"}", 201, world.fork);
    make_id("/v1/responses", "{\"input\":\"a\",\"max_output_tokens\":1}", 200, world.response);
    make_id("/v1/responses", "{\"input\":\"a\",\"max_output_tokens\":1,\"background\":true}", 200,
            world.background);
    make_id("/v1/conversations",
            "{\"items\":[{\"role\":\"user\",\"content\":\"a\"},"
            "{\"role\":\"user\",\"content\":\"b\"}]}",
            200, world.conversation);
    json = call("GET", "/v1/conversations/$C/items?order=asc", NULL, 200);
    snprintf(world.item, sizeof world.item, "%s", answer_text(json, "data.0.id"));
    cJSON_Delete(json);
    export_file(world.memory, &world.file);
    wire_wait_metric(&daemon_, "rambad_jobs_running", 0); /* the one in the background */
}

/* A request that goes on for as long as its connection. */
static void begin_endless(struct wire *wire, const char *fields)
{
    char body[256], filled[512];
    snprintf(body, sizeof body, "{\"prompt\":\"a\",\"max_tokens\":1000000,\"ignore_eos\":true%s}",
             fields);
    fill_in(body, filled);
    wire_open(wire, &daemon_);
    wire_ask(wire, "POST", "/v1/completions", TOKEN, filled, strlen(filled));
}

/* A fork of an earlier time, with its progress. */
static void reach_events(void)
{
    char body[512];
    fill_in("{\"from\":\"$M\",\"at\":$T}", body);
    expect(document_find(&document, "POST", "/v1/memories"), "", "",
           AUTHORIZATION "Accept: text/event-stream\r\n", body, 200);
}

/* What is being written to, or is about to be: 409. And a fork has no say in the past it shares. */
static void reach_conflicts(void)
{
    static const char *const once[] = {"/v1/memories", "/v1/conversations"};
    struct wire endless;
    for (size_t i = 0; i < 2; i++) /* the key came with another body */
        for (int round = 0; round < 2; round++)
            expect(document_find(&document, "POST", once[i]), "", "",
                   AUTHORIZATION "Idempotency-Key: k\r\n",
                   round ? "{\"metadata\":{\"a\":\"b\"}}" : "{}",
                   round ? 409
                   : i   ? 200
                         : 201);
    begin_endless(&endless, ",\"memory\":\"$M\"");
    wire_wait_metric(&daemon_, "rambad_jobs_running", 1);
    char body[64], memory[LIMITS_ID_BYTES], busy[LIMITS_ID_BYTES];
    snprintf(body, sizeof body, "{\"position\":%.0f,\"bookmark\":\"b\"}", world.first_turn);
    ask("POST", "/v1/memories/{}/turns", world.fork, "", body, 409);
    make_id("/v1/responses",
            "{\"conversation\":\"$C\",\"input\":\"a\",\"max_output_tokens\":1000000,"
            "\"ignore_eos\":true,\"background\":true}",
            200, busy);
    memcpy(memory, world.response, sizeof memory);
    memcpy(world.response, busy, sizeof busy);
    all_answer(409, ALL);
    memcpy(world.response, memory, sizeof memory);
    ask("POST", "/v1/responses/{}/cancel", busy, "", NULL, 200);
    wire_close(&endless);
    wire_wait_metric(&daemon_, "rambad_jobs_running", 0);
}

static char control[1100]; /* the file that the disk of the daemon obeys: tests/lib/preload */

static void set_disk(const char *state)
{
    if (!state) {
        unlink(control);
        return;
    }
    FILE *file = fopen(control, "w");
    assert_non_null(file);
    assert_true(fputs(state, file) >= 0);
    fclose(file);
}

/* The daemon on the folder that it had, with these flags, and with a disk that can be told to fail.
 */
static void start_daemon(const char *const *with)
{
    setenv("IO_SHIM_CONTROL", control, 1);
    sanitizer_preload(getenv("IO_SHIM"));
    daemon_.flags = with;
    daemon_start(&daemon_);
    sanitizer_preload_nothing();
    unsetenv("IO_SHIM_CONTROL");
}

static void await_status(const char *path, int status)
{
    struct wire_answer answer;
    const double start = daemon_now();
    while (wire_call(&daemon_, "GET", path, NULL, &answer) != status) {
        wire_answer_close(&answer);
        assert_true(daemon_now() - start < WIRE_SECONDS);
        usleep(1000);
    }
    wire_answer_close(&answer);
}

/* A write that the disk holds up: one that changes something, or the smallest that can wait behind
 * it. False: no more may wait. */
static bool hold_up(struct wire *wire, bool changes)
{
    char path[128];
    struct wire_answer answer;
    struct pollfd look = {.events = POLLIN};
    const double start = daemon_now();
    double before = wire_metric(&daemon_, "rambad_writer_queue_bytes");
    snprintf(path, sizeof path, "/v1/memories/%s%s", world.fork,
             changes ? "" : "/turns?position=1000000");
    wire_open(wire, &daemon_);
    wire_ask(wire, changes ? "PATCH" : "DELETE", path, AUTHORIZATION,
             changes ? "{\"metadata\":{}}" : NULL, changes ? 15 : 0);
    look.fd = wire->fd;
    while (poll(&look, 1, 1) == 0) {
        const double now = wire_metric(&daemon_, "rambad_writer_queue_bytes");
        if (now > before)
            return true;
        before = now; /* one that was on its way is done */
        assert_true(daemon_now() - start < WIRE_SECONDS);
    }
    assert_int_equal(wire_answer(wire, &answer, false), 429);
    /* Not what the engine's queue told others. */
    assert_true(wire_header(&answer, "retry-after-ms", path, sizeof path));
    assert_string_equal(path, "1001");
    wire_answer_close(&answer);
    wire_close(wire);
    return false;
}

/* One request runs and one waits: no more may. And few may wait for the disk. */
static void reach_full_queues(void)
{
    struct wire running, waiting, held[64];
    struct wire_answer answer;
    size_t count = 0;
    begin_endless(&running, "");
    wire_wait_metric(&daemon_, "rambad_jobs_running", 1);
    begin_endless(&waiting, "");
    wire_wait_metric(&daemon_, "rambad_jobs_waiting", 1);
    all_answer(429, JOBS);
    wire_close(&waiting);
    wire_close(&running);
    wire_wait_metric(&daemon_, "rambad_jobs_running", 0);

    wire_wait_metric(&daemon_, "rambad_writer_queue_bytes", 0);
    set_disk("stalled");
    while (count < 64 && hold_up(&held[count], count == 0))
        count++;
    all_answer(429, OTHERS);
    set_disk(NULL);
    for (size_t i = 0; i < count; i++) {
        assert_int_equal(wire_answer(&held[i], &answer, false), i ? 404 : 200);
        wire_answer_close(&answer);
        wire_close(&held[i]);
    }
}

/* Bodies of which nothing comes, all at once. */
static void reach_timeouts(void)
{
    struct wire wires[CALLS];
    char id[512], path[256];
    for (size_t i = 0; i < CALLS; i++) {
        fill_in(calls[i].id, id);
        document_path(document_find(&document, calls[i].method, calls[i].path), id, "", path);
        wire_open(&wires[i], &daemon_);
        wire_ask(&wires[i], calls[i].method, path, AUTHORIZATION "Transfer-Encoding: chunked\r\n",
                 NULL, 0);
    }
    for (size_t i = 0; i < CALLS; i++) {
        struct operation *o = document_find(&document, calls[i].method, calls[i].path);
        take_answer(&wires[i], o, calls[i].path, 408);
        wire_close(&wires[i]);
    }
}

/* Those that are answered to the last are so, but for want of a connection. */
static void reach_connections(void)
{
    struct wire wires[CONNECTIONS];
    wire_wait_metric(&daemon_, "rambad_connections", 1); /* that which asks */
    for (int i = 0; i < CONNECTIONS; i++)
        wire_open(&wires[i], &daemon_);
    all_answer(503, ALL);
    for (int i = 0; i < CONNECTIONS; i++)
        wire_close(&wires[i]);
    await_status("/health/live", 200);
}

/* After SIGTERM, while something is to be finished. */
static void reach_drain(void)
{
    struct wire endless;
    begin_endless(&endless, "");
    wire_wait_metric(&daemon_, "rambad_jobs_running", 1);
    kill(daemon_.pid, SIGTERM);
    await_status("/health/ready", 503);
    all_answer(503, NOT_TO_THE_LAST);
    wire_close(&endless);
    daemon_await(&daemon_);
}

static void test_failures(void **state)
{
    (void)state;
    static const char *const narrow[] = {"--threads",
                                         "1",
                                         "--running",
                                         "1",
                                         "--queue",
                                         "1",
                                         "--write-queue",
                                         "4K",
                                         "--body-timeout",
                                         "1",
                                         "--connections",
                                         TEXT_OF(CONNECTIONS),
                                         NULL};
    const char *const damaged[] = {world.memory, world.response, world.background,
                                   world.conversation};
    const struct daemon golden = daemon_;
    char *other = store_helper_folder();
    snprintf(control, sizeof control, "%s/disk", other);
    make_id("/v1/memories", "{}", 201, world.memory);
    export_file(world.memory, &world.file);
    daemon_init(&daemon_, "engine/models/ramba-20m", other, "data");
    daemon_.key = KEY;
    start_daemon(flags);
    expect_bytes(document_find(&document, "POST", "/v1/memories/import"), "", "", AUTHORIZATION,
                 world.file.data, world.file.size, 422);
    make_world();
    reach_events();
    all_answer(201, ALL);
    all_answer(200, ALL); /* takes it away */
    make_world();
    reach_conflicts();
    set_disk("full");
    all_answer(507, ALL);
    set_disk("broken");
    all_answer(500, DISK);
    set_disk(NULL);
    reach_drain();
    daemon_check(&daemon_); /* nothing is left of all that failed */

    start_daemon(narrow);
    reach_full_queues();
    reach_timeouts();
    reach_connections();
    assert_true(store_damage(daemon_.data, damaged, sizeof damaged / sizeof *damaged) > 0);
    all_answer(500, ALL);
    daemon_kill(&daemon_);
    store_helper_remove(other);
    buf_close(&world.file);
    daemon_ = golden;
}

/* Pages of elsewhere, on a server that asks for no key. */
static void test_pages(void **state)
{
    (void)state;
    const struct daemon golden = daemon_;
    unsetenv("RAMBAD_API_KEY");
    char *other = daemon_begin(&daemon_, "tests/golden/" MODEL_NAME, flags);
    for (int i = 0; i < document.operation_count; i++)
        if (!document.operations[i].is_open)
            expect(&document.operations[i], "x", "",
                   "Connection: close\r\nOrigin: http://elsewhere\r\n", NULL, 403);
    daemon_end(&daemon_, other);
    setenv("RAMBAD_API_KEY", KEY, 1);
    daemon_ = golden;
}

/* The last one: all of them together have reached whatever is documented. */
static void test_all_reached(void **state)
{
    (void)state;
    int missing = 0, documented = 0;
    for (int i = 0; i < document.operation_count; i++) {
        const struct operation *o = &document.operations[i];
        for (int j = 0; j < o->status_count; j++, documented++) {
            if (o->reached[j])
                continue;
            missing++;
            print_error("%s %s never answers %d\n", o->method, o->path, o->statuses[j]);
        }
    }
    print_message("%d of %d documented statuses were reached\n", documented - missing, documented);
    assert_int_equal(missing, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_every_operation),
                                       cmocka_unit_test(test_life),
                                       cmocka_unit_test(test_talk),
                                       cmocka_unit_test(test_failures),
                                       cmocka_unit_test(test_pages),
                                       cmocka_unit_test(test_all_reached)};
    return cmocka_run_group_tests_name("statuses", tests, setup, teardown);
}
