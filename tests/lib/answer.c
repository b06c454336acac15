#include "tests/lib/answer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

const cJSON *answer_at(const cJSON *json, const char *path)
{
    char name[64];
    while (json && *path) {
        const size_t size = strcspn(path, ".");
        snprintf(name, sizeof name, "%.*s", (int)size, path);
        json = cJSON_IsArray(json) ? cJSON_GetArrayItem(json, atoi(name))
                                   : cJSON_GetObjectItemCaseSensitive(json, name);
        path += size + (path[size] == '.');
    }
    return json;
}

const char *answer_text(const cJSON *json, const char *path)
{
    const char *text = cJSON_GetStringValue(answer_at(json, path));
    if (!text)
        fail_msg("no text at %s", path);
    return text ? text : "";
}

double answer_number(const cJSON *json, const char *path)
{
    const cJSON *item = answer_at(json, path);
    if (!cJSON_IsNumber(item))
        fail_msg("no number at %s", path);
    return item->valuedouble;
}

cJSON *answer_events(const struct wire_answer *answer)
{
    cJSON *events = cJSON_CreateArray();
    bool done = false;
    for (const char *p = answer->body.data; *p;) {
        const char *end = strstr(p, "\n\n");
        assert_non_null(end);
        assert_false(done);
        if (*p != ':') {
            assert_memory_equal(p, "data: ", 6);
            p += 6;
            done = end - p == 6 && memcmp(p, "[DONE]", 6) == 0;
            if (!done) {
                cJSON *event = cJSON_ParseWithLength(p, (size_t)(end - p));
                assert_non_null(event);
                assert_null(answer_at(event, "error"));
                cJSON_AddItemToArray(events, event);
            }
        }
        p = end + 2;
    }
    assert_true(done);
    return events;
}
