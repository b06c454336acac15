/* proto/openapi.yaml against the running server: the same routes, fields and errors. Its statuses
 * are for test_statuses.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "server/route.h"
#include "tests/lib/answer.h"
#include "tests/lib/daemon.h"
#include "tests/lib/document.h"
#include "tests/lib/wire.h"

#define MODEL_NAME "wide-stickbreaking-topk8"

static struct daemon daemon_;
static char *folder;
static struct document document;
static const char *const flags[] = {"--threads", "1", NULL};

static int setup(void **state)
{
    (void)state;
    document_open(&document);
    folder = daemon_begin(&daemon_, "tests/golden/" MODEL_NAME, flags);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    daemon_end(&daemon_, folder);
    document_close(&document);
    return 0;
}

/* ---- tests ---- */

static void test_routes(void **state)
{
    (void)state;
    const char *method, *path;
    int count = 0;
    for (; route_at((size_t)count, &method, &path); count++)
        if (!document_find(&document, method, path))
            fail_msg("%s %s is not documented", method, path);
    /* Each once, so none is documented that does not exist. */
    assert_int_equal(document.operation_count, count);
    for (int i = 0; i < document.operation_count; i++)
        assert_ptr_equal(
            document_find(&document, document.operations[i].method, document.operations[i].path),
            &document.operations[i]);
}

/* What the server itself says that a path takes. */
static void test_methods(void **state)
{
    (void)state;
    for (int i = 0; i < document.operation_count; i++) {
        char path[256], allow[128], documented[128] = "";
        struct wire wire;
        struct wire_answer answer;
        document_path(&document.operations[i], "x", "", path);
        for (int j = 0; j < document.operation_count; j++)
            if (strcmp(document.operations[j].path, document.operations[i].path) == 0)
                snprintf(documented + strlen(documented), sizeof documented - strlen(documented),
                         "%s%s%s", *documented ? ", " : "", document.operations[j].method,
                         strcmp(document.operations[j].method, "GET") == 0 ? ", HEAD" : "");
        wire_open(&wire, &daemon_);
        wire_ask(&wire, "PUT", path, "", NULL, 0);
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

/* Every documented field is known to the server, and another one is not. */
static void test_fields(void **state)
{
    (void)state;
    static const struct {
        const char *schema, *method, *path;
        size_t count;
    } bodies[] = {{"ResponseRequest", "POST", "/v1/responses", 37},
                  {"ConversationRequest", "POST", "/v1/conversations", 2},
                  {"CompletionRequest", "POST", "/v1/completions", 28},
                  {"ChatRequest", "POST", "/v1/chat/completions", 36},
                  {"MemoryRequest", "POST", "/v1/memories", 4},
                  {"MemoryUpdate", "PATCH", "/v1/memories/ID", 2},
                  {"BookmarkRequest", "POST", "/v1/memories/ID/turns", 2},
                  {"RewindRequest", "POST", "/v1/memories/ID/rewind", 1}};
    char id[LIMITS_ID_BYTES];
    daemon_create_memory(&daemon_, NULL, id);
    for (size_t i = 0; i < sizeof bodies / sizeof *bodies; i++) {
        struct buf names;
        char path[128], *name, *rest;
        const char *hole = strstr(bodies[i].path, "ID");
        size_t count = 0;
        snprintf(path, sizeof path, "%.*s%s%s",
                 hole ? (int)(hole - bodies[i].path) : (int)strlen(bodies[i].path), bodies[i].path,
                 hole ? id : "", hole ? hole + 2 : "");
        buf_init(&names);
        document_properties(&document, bodies[i].schema, &names);
        buf_append_text(&names, "nonsense");
        buf_text(&names);
        for (name = strtok_r(names.data, " ", &rest); name;
             name = strtok_r(NULL, " ", &rest), count++) {
            char body[128];
            struct wire wire;
            struct wire_answer answer;
            snprintf(body, sizeof body, "{\"%s\":null}", name);
            wire_open(&wire, &daemon_);
            wire_ask(&wire, bodies[i].method, path, "", body, strlen(body));
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
    const char *begin = strstr(document.text.data, "\n    Error:\n");
    const char *end = strstr(document.text.data, "\n    Generation:\n");
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
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_routes), cmocka_unit_test(test_methods),
        cmocka_unit_test(test_fields), cmocka_unit_test(test_errors)};
    return cmocka_run_group_tests_name("openapi", tests, setup, teardown);
}
