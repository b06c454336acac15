/* proto/openapi.yaml against the running server: the same routes, fields and errors, and no answer
 * whose status is not documented for its route.
 *
 * The file is read as it is laid out: a path is a line of two spaces, a method of four, a status or
 * a schema's property of eight. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include <cmocka.h>

#include "server/route.h"
#include "tests/lib/answer.h"
#include "tests/lib/daemon.h"
#include "tests/lib/wire.h"

#define MODEL_NAME "wide-stickbreaking-topk8"
#define KEY "a key of many letters"
#define AUTHORIZATION "Connection: close\r\nAuthorization: Bearer " KEY "\r\n"
#define OPERATIONS 64
#define STATUSES 24

struct operation {
    char method[8], path[64]; /* "{}" for an id */
    int statuses[STATUSES];
    bool reached[STATUSES];
    int status_count;
    bool is_open; /* takes no key */
};

static struct daemon daemon_;
static char *folder;
static struct buf text; /* of the file */
static struct operation operations[OPERATIONS];
static int operation_count;
static const char *const flags[] = {"--threads", "1", NULL};

/* ---- the file ---- */

/* The next line, without its end; false behind the last. */
static bool next_line(const char **at, char line[256])
{
    const size_t size = strcspn(*at, "\n");
    if (!**at)
        return false;
    assert_true(size < 256);
    memcpy(line, *at, size);
    line[size] = 0;
    *at += size + ((*at)[size] == '\n');
    return true;
}

static size_t indent(const char *line)
{
    return strspn(line, " ");
}

static void read_operations(void)
{
    char line[256], path[64] = "";
    const char *at = strstr(text.data, "\npaths:\n");
    assert_non_null(at);
    at += 8;
    while (next_line(&at, line) && indent(line) > 0) {
        struct operation *o = &operations[operation_count ? operation_count - 1 : 0];
        char name[64];
        if (indent(line) == 2) {
            char *to = path;
            for (const char *p = line + 2; *p != ':'; p++) { /* {id} and {item_id} are {} */
                assert_true(to < path + sizeof path - 2);
                *to++ = *p;
                if (*p == '{')
                    p += strcspn(p, "}") - 1;
            }
            *to = 0;
        } else if (indent(line) == 4) {
            assert_true(operation_count < OPERATIONS);
            o = &operations[operation_count++];
            snprintf(o->method, sizeof o->method, "%.*s", (int)strcspn(line + 4, ":"), line + 4);
            for (char *p = o->method; *p; p++)
                *p = (char)(*p & 0xdf);
            memcpy(o->path, path, sizeof o->path);
        } else if (sscanf(line, "        \"%63[0-9]\"", name) == 1) {
            assert_true(o->status_count < STATUSES);
            o->statuses[o->status_count++] = atoi(name);
        } else if (strcmp(line, "      security: []") == 0) {
            o->is_open = true;
        }
    }
}

/* The properties of a schema, "name " behind each; those of the schema it is all of, too. */
static void read_properties(const char *schema, struct buf *out)
{
    char line[256], start[96];
    snprintf(start, sizeof start, "\n    %s:\n", schema);
    const char *at = strstr(text.data, start);
    bool inside = false;
    if (!at)
        fail_msg("there is no schema %s", schema);
    at += strlen(start);
    while (next_line(&at, line) && indent(line) > 4) {
        if (strstr(line, "allOf: [{$ref: \"#/components/schemas/Generation\"}]"))
            read_properties("Generation", out);
        if (indent(line) == 6)
            inside = strcmp(line, "      properties:") == 0;
        else if (indent(line) == 8 && inside)
            buf_append_format(out, "%.*s ", (int)strcspn(line + 8, ":"), line + 8);
        if (strncmp(line, "      properties: {", 19) == 0)
            buf_append_format(out, "%.*s ", (int)strcspn(line + 19, ":"), line + 19);
    }
}

static struct operation *find(const char *method, const char *path)
{
    for (int i = 0; i < operation_count; i++)
        if (strcmp(operations[i].method, method) == 0 && strcmp(operations[i].path, path) == 0)
            return &operations[i];
    return NULL;
}

static bool documents(const struct operation *o, int status)
{
    for (int i = 0; i < o->status_count; i++)
        if (o->statuses[i] == status)
            return true;
    return false;
}

/* The path with `id` in its hole; of two, "a/b" has one for each. */
static void fill_path(char out[256], const char *pattern, const char *id, const char *query)
{
    char *to = out;
    for (const char *p = pattern; *p; p++) {
        if (*p != '{') {
            *to++ = *p;
            continue;
        }
        const size_t size = strcspn(id, "/");
        memcpy(to, id, size);
        to += size;
        id += id[size] ? size + 1 : 0;
        p++;
    }
    strcpy(to, query);
}

/* ---- calls ---- */

/* A call of a documented operation on `id`; its answer must be documented, and be `status`. */
static void expect(struct operation *o, const char *id, const char *query, const char *headers,
                   const char *body, int status)
{
    char path[256];
    struct wire wire;
    struct wire_answer answer;
    fill_path(path, o->path, id, query);
    wire_open(&wire, &daemon_);
    wire_ask(&wire, o->method, path, headers, body, body ? strlen(body) : 0);
    if (wire_answer(&wire, &answer, false) != status)
        fail_msg("%s %s: HTTP %d, not %d: %s", o->method, path, answer.status, status,
                 buf_text(&answer.body));
    if (!documents(o, status))
        fail_msg("%s %s answers %d, which is not documented", o->method, o->path, status);
    for (int i = 0; i < o->status_count; i++)
        o->reached[i] |= o->statuses[i] == status;
    if (status >= 400) {
        cJSON *json = wire_json(&answer);
        (void)answer_text(json, "error.message");
        cJSON_Delete(json);
    }
    wire_answer_close(&answer);
    wire_close(&wire);
}

static void ask(const char *method, const char *path, const char *id, const char *query,
                const char *body, int status)
{
    struct operation *o = find(method, path);
    if (!o)
        fail_msg("%s %s is not documented", method, path);
    else
        expect(o, id, query, AUTHORIZATION, body, status);
}

static void new_memory(char id[LIMITS_ID_BYTES])
{
    struct wire wire;
    struct wire_answer answer;
    wire_open(&wire, &daemon_);
    wire_ask(&wire, "POST", "/v1/memories", AUTHORIZATION, "{}", 2);
    assert_int_equal(wire_answer(&wire, &answer, false), 201);
    cJSON *json = wire_json(&answer);
    snprintf(id, LIMITS_ID_BYTES, "%s", answer_text(json, "id"));
    cJSON_Delete(json);
    wire_answer_close(&answer);
    wire_close(&wire);
}

static int setup(void **state)
{
    char block[4096];
    size_t size;
    (void)state;
    FILE *file = fopen("proto/openapi.yaml", "r");
    assert_non_null(file);
    buf_init(&text);
    while ((size = fread(block, 1, sizeof block, file)) > 0)
        buf_append(&text, block, size);
    fclose(file);
    buf_text(&text);
    read_operations();
    setenv("RAMBAD_API_KEY", KEY, 1);
    folder = daemon_begin(&daemon_, "tests/golden/" MODEL_NAME, flags);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    daemon_end(&daemon_, folder);
    buf_close(&text);
    return 0;
}

/* ---- tests ---- */

static void test_routes(void **state)
{
    (void)state;
    const char *method, *path;
    int count = 0;
    for (; route_at((size_t)count, &method, &path); count++)
        if (!find(method, path))
            fail_msg("%s %s is not documented", method, path);
    /* Each once, so none is documented that does not exist. */
    assert_int_equal(operation_count, count);
    for (int i = 0; i < operation_count; i++)
        assert_ptr_equal(find(operations[i].method, operations[i].path), &operations[i]);
}

/* What the server itself says that a path takes. */
static void test_methods(void **state)
{
    (void)state;
    for (int i = 0; i < operation_count; i++) {
        char path[256], allow[128], documented[128] = "";
        struct wire wire;
        struct wire_answer answer;
        fill_path(path, operations[i].path, "x", "");
        for (int j = 0; j < operation_count; j++)
            if (strcmp(operations[j].path, operations[i].path) == 0)
                snprintf(documented + strlen(documented), sizeof documented - strlen(documented),
                         "%s%s%s", *documented ? ", " : "", operations[j].method,
                         strcmp(operations[j].method, "GET") == 0 ? ", HEAD" : "");
        wire_open(&wire, &daemon_);
        wire_ask(&wire, "PUT", path, AUTHORIZATION, NULL, 0);
        wire_answer(&wire, &answer, false);
        wire_check_error(&answer, 405, "method", NULL);
        assert_true(wire_header(&answer, "allow", allow, sizeof allow));
        /* These are also the places of a memory, or a response, of that name. */
        const bool is_both = strcmp(path, "/v1/memories/import") == 0 ||
                             strcmp(path, "/v1/responses/input_tokens") == 0;
        if (is_both ? !strstr(allow, documented) : strcmp(allow, documented) != 0)
            fail_msg("%s: takes %s, documented are %s", path, allow, documented);
        wire_answer_close(&answer);
        wire_close(&wire);
    }
}

/* What can go wrong with every request. */
static void test_every_operation(void **state)
{
    (void)state;
    char *huge = malloc(40001);
    struct buf headers;
    assert_non_null(huge);
    memset(huge, 'x', 40000);
    huge[40000] = 0;
    buf_init(&headers);
    buf_append_format(&headers, AUTHORIZATION "X-Huge: %s\r\n", huge);
    for (int i = 0; i < operation_count; i++) {
        struct operation *o = &operations[i];
        expect(o, "x", "?nonsense=1", AUTHORIZATION, NULL, 400);
        expect(o, "x", "", buf_text(&headers), NULL, 431);
        if (documents(o, 413))
            expect(o, "x", "", AUTHORIZATION "Content-Length: 1000000000\r\n", NULL,
                   strstr(o->path, "/v1/memories/{}") ? 404 : 413);
        if (o->is_open) {
            expect(o, "x", "", "", NULL, 200);
            assert_false(documents(o, 401));
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
    new_memory(id);
    ask("POST", "/v1/memories", "", "", "{}", 201);
    ask("POST", "/v1/memories", "", "", "{\"metadata\":1}", 400);
    ask("POST", "/v1/memories", "", "", "{\"from\":\"mem_none\"}", 404);
    ask("GET", "/v1/memories", "", "?limit=1", NULL, 200);
    ask("GET", "/v1/memories", "", "?limit=0", NULL, 400);
    ask("GET", "/v1/memories", "", "?after=mem_none", NULL, 404);
    ask("POST", "/v1/memories/{}/append", id, "", "once upon a time there was", 200);
    ask("POST", "/v1/memories/{}/append", id, "?offset=3", "x", 409);
    expect(find("POST", "/v1/memories/{}/append"), id, "",
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
    int reached = 0, documented = 0;
    for (int i = 0; i < operation_count; i++)
        for (int j = 0; j < operations[i].status_count; j++, documented++)
            reached += operations[i].reached[j];
    print_message("%d of %d documented statuses were reached\n", reached, documented);
}

/* The id of what a call of the server makes. */
static void make(const char *path, const char *body, char id[LIMITS_ID_BYTES])
{
    struct wire wire;
    struct wire_answer answer;
    wire_open(&wire, &daemon_);
    wire_ask(&wire, "POST", path, AUTHORIZATION, body, strlen(body));
    assert_int_equal(wire_answer(&wire, &answer, false), 200);
    cJSON *json = wire_json(&answer);
    snprintf(id, LIMITS_ID_BYTES, "%s", answer_text(json, "id"));
    cJSON_Delete(json);
    wire_answer_close(&answer);
    wire_close(&wire);
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
    make("/v1/responses", "{\"input\":\"a\",\"max_output_tokens\":2}", response);
    ask("POST", "/v1/responses", "", "", "{\"input\":\"a\",\"max_output_tokens\":2}", 200);
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
    make("/v1/responses",
         "{\"input\":\"a\",\"background\":true,\"ignore_eos\":true,\"max_output_tokens\":1000000}",
         slow);
    ask("DELETE", "/v1/responses/{}", slow, "", NULL, 409);
    ask("POST", "/v1/responses/{}/cancel", slow, "", NULL, 200);
    ask("DELETE", "/v1/responses/{}", slow, "", NULL, 200);
    ask("DELETE", "/v1/responses/{}", slow, "", NULL, 404);
    make("/v1/conversations", "{\"items\":[{\"role\":\"user\",\"content\":\"a\"}]}", conversation);
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
    make("/v1/responses", body, slow);
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

/* Every documented field is known to the server, and another one is not. */
static void test_fields(void **state)
{
    (void)state;
    static const struct {
        const char *schema, *method, *path;
        size_t count;
    } bodies[] = {{"ResponseRequest", "POST", "/v1/responses", 34},
                  {"ConversationRequest", "POST", "/v1/conversations", 2},
                  {"CompletionRequest", "POST", "/v1/completions", 28},
                  {"ChatRequest", "POST", "/v1/chat/completions", 27},
                  {"MemoryRequest", "POST", "/v1/memories", 4},
                  {"MemoryUpdate", "PATCH", "/v1/memories/ID", 2},
                  {"BookmarkRequest", "POST", "/v1/memories/ID/turns", 2},
                  {"RewindRequest", "POST", "/v1/memories/ID/rewind", 1}};
    char id[LIMITS_ID_BYTES];
    new_memory(id);
    for (size_t i = 0; i < sizeof bodies / sizeof *bodies; i++) {
        struct buf names;
        char path[128], *name, *rest;
        const char *hole = strstr(bodies[i].path, "ID");
        size_t count = 0;
        snprintf(path, sizeof path, "%.*s%s%s",
                 hole ? (int)(hole - bodies[i].path) : (int)strlen(bodies[i].path), bodies[i].path,
                 hole ? id : "", hole ? hole + 2 : "");
        buf_init(&names);
        read_properties(bodies[i].schema, &names);
        buf_append_text(&names, "nonsense");
        buf_text(&names);
        for (name = strtok_r(names.data, " ", &rest); name;
             name = strtok_r(NULL, " ", &rest), count++) {
            char body[128];
            struct wire wire;
            struct wire_answer answer;
            snprintf(body, sizeof body, "{\"%s\":null}", name);
            wire_open(&wire, &daemon_);
            wire_ask(&wire, bodies[i].method, path, AUTHORIZATION, body, strlen(body));
            wire_answer(&wire, &answer, false);
            cJSON *json = wire_json(&answer);
            const char *param = cJSON_GetStringValue(answer_at(json, "error.param"));
            const bool refused = param && strcmp(param, name) == 0 &&
                                 strcmp(answer_text(json, "error.code"), "unsupported") == 0;
            if (refused != (strcmp(name, "nonsense") == 0))
                fail_msg("%s %s: %s", bodies[i].schema, name, buf_text(&answer.body));
            cJSON_Delete(json);
            wire_answer_close(&answer);
            wire_close(&wire);
        }
        assert_int_equal(count, bodies[i].count + 1);
        buf_close(&names);
    }
}

/* The error's codes and types are those of proto/status.h. */
static void test_errors(void **state)
{
    (void)state;
    static const struct {
        const char *code, *type;
    } rows[] = {
#define X(name, code, text, http, type) {code, type},
        STATUS_LIST(X)
#undef X
    };
    const char *begin = strstr(text.data, "\n    Error:\n");
    const char *end = strstr(text.data, "\n    Generation:\n");
    assert_true(begin && end && begin < end);
    for (int codes = 0; codes < 2; codes++) {
        char listed[1024], all[1024] = " ", word[64], *name, *rest;
        const char *from = strstr(begin, codes ? "            code:" : "            type:");
        assert_true(from && from < end);
        from = strchr(from, '[');
        assert_non_null(from);
        snprintf(listed, sizeof listed, "%.*s", (int)strcspn(from + 1, "]"), from + 1);
        for (name = strtok_r(listed, " ,\n", &rest); name; name = strtok_r(NULL, " ,\n", &rest)) {
            bool known = false;
            for (size_t i = 1; i < sizeof rows / sizeof *rows; i++)
                known |= strcmp(codes ? rows[i].code : rows[i].type, name) == 0;
            if (!known)
                fail_msg("no error is %s", name);
            snprintf(all + strlen(all), sizeof all - strlen(all), "%s ", name);
        }
        for (size_t i = 1; i < sizeof rows / sizeof *rows; i++) {
            snprintf(word, sizeof word, " %s ", codes ? rows[i].code : rows[i].type);
            if (!strstr(all, word))
                fail_msg("%s is not documented", word);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_routes),
                                       cmocka_unit_test(test_methods),
                                       cmocka_unit_test(test_every_operation),
                                       cmocka_unit_test(test_talk),
                                       cmocka_unit_test(test_life),
                                       cmocka_unit_test(test_fields),
                                       cmocka_unit_test(test_errors)};
    return cmocka_run_group_tests_name("openapi", tests, setup, teardown);
}
