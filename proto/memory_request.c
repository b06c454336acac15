/* memory_request.c - see memory_request.h. */
#include "proto/memory_request.h"

#include <cjson/cJSON.h>
#include <stdlib.h>
#include <string.h>

#include "proto/json.h"

#define POSITION_MAX ((uint64_t)1 << 53) /* as far as JSON's numbers are exact */

/* {"anchor": "last_active_at" or "created_at", "seconds" or "days": N}, or null. */
static void read_expires(struct json_fields *f, struct memory_expires *out)
{
    const cJSON *object = cJSON_GetObjectItemCaseSensitive(f->root, "expires_after"), *item;
    out->is_given = object != NULL;
    if (!object || cJSON_IsNull(object))
        return;
    const cJSON *anchor = cJSON_GetObjectItemCaseSensitive(object, "anchor");
    const cJSON *seconds = cJSON_GetObjectItemCaseSensitive(object, "seconds");
    const cJSON *days = cJSON_GetObjectItemCaseSensitive(object, "days");
    const cJSON *number = seconds ? seconds : days;
    cJSON_ArrayForEach(item, object)
    {
        if (item != anchor && item != number)
            number = NULL; /* another field, or both of the two */
    }
    const char *from = cJSON_GetStringValue(anchor);
    const double most = seconds ? LIMITS_EXPIRES_S : LIMITS_EXPIRES_S / 86400;
    const bool is_made = from && strcmp(from, "created_at") == 0;
    out->from_use = from && strcmp(from, "last_active_at") == 0;
    if (!cJSON_IsObject(object) || (!is_made && !out->from_use) || !cJSON_IsNumber(number) ||
        !(number->valuedouble >= 1 && number->valuedouble <= most) ||
        number->valuedouble != (double)(uint64_t)number->valuedouble) {
        json_fail(f, STATUS_INVALID, "expires_after",
                  "must be null, or an object of \"anchor\", \"last_active_at\" or \"created_at\", "
                  "and \"seconds\" or \"days\", a whole number from 1 to a hundred years");
        return;
    }
    out->seconds = (uint64_t)number->valuedouble * (seconds ? 1 : 86400);
}

static enum status parse(const char *json, size_t size, const char *const *known,
                         struct memory_request *out, struct error *err)
{
    *out = (struct memory_request){0};
    if (!size)
        return STATUS_OK;
    cJSON *root;
    const enum status status = json_parse_object(json, size, &root, err);
    if (status)
        return status;
    struct json_fields f = {.root = root, .err = err};
    json_refuse_others(&f, known);
    read_expires(&f, &out->expires);
    json_read_text(&f, "from", out->from, sizeof out->from);
    json_read_count(&f, "at", 1, POSITION_MAX, &out->at);
    if (out->at && !out->from[0])
        json_fail(&f, STATUS_INVALID, "at", "is a position of the memory that \"from\" names");
    out->metadata = json_read_metadata(&f);
    cJSON_Delete(root);
    if (f.status)
        memory_request_close(out);
    return f.status;
}

enum status memory_request_parse(const char *json, size_t size, struct memory_request *out,
                                 struct error *err)
{
    static const char *const known[] = {"from", "at", "metadata", "expires_after", NULL};
    return parse(json, size, known, out, err);
}

enum status memory_update_parse(const char *json, size_t size, struct memory_request *out,
                                struct error *err)
{
    static const char *const known[] = {"metadata", "expires_after", NULL};
    return parse(json, size, known, out, err);
}

void memory_request_close(struct memory_request *request)
{
    free(request->metadata);
    *request = (struct memory_request){0};
}

/* A body of these fields alone, the first of them wanted. */
static enum status parse_position(const char *json, size_t size, const char *const *known,
                                  uint64_t *position, char *name, struct error *err)
{
    cJSON *root;
    *position = UINT64_MAX;
    const enum status status = json_parse_object(json, size, &root, err);
    if (status)
        return status;
    struct json_fields f = {.root = root, .err = err};
    json_refuse_others(&f, known);
    json_read_count(&f, known[0], 0, POSITION_MAX, position);
    if (name)
        json_read_text(&f, known[1], name, LIMITS_BOOKMARK_BYTES);
    if (!f.status && *position == UINT64_MAX)
        json_fail(&f, STATUS_INVALID, known[0], "is missing: a position of the memory, in tokens");
    cJSON_Delete(root);
    return f.status;
}

enum status memory_rewind_parse(const char *json, size_t size, uint64_t *to, struct error *err)
{
    static const char *const known[] = {"to", NULL};
    return parse_position(json, size, known, to, NULL, err);
}

enum status memory_bookmark_parse(const char *json, size_t size, struct memory_bookmark *out,
                                  struct error *err)
{
    static const char *const known[] = {"position", "bookmark", NULL};
    *out = (struct memory_bookmark){0};
    return parse_position(json, size, known, &out->position, out->name, err);
}
