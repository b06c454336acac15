/* memory_request.c - see memory_request.h. */
#include "proto/memory_request.h"

#include <cjson/cJSON.h>
#include <stdlib.h>
#include <string.h>

#include "proto/json.h"

/* At most 16 pairs of short strings, as the API page says. */
static void check_metadata(struct json_fields *f, const cJSON *metadata)
{
    const cJSON *item;
    if (!cJSON_IsObject(metadata) || cJSON_GetArraySize(metadata) > LIMITS_METADATA_PAIRS) {
        json_fail(f, STATUS_INVALID, "metadata", "must be an object of at most 16 pairs");
        return;
    }
    cJSON_ArrayForEach(item, metadata)
    {
        if (strlen(item->string) > LIMITS_METADATA_KEY || !cJSON_IsString(item) ||
            strlen(item->valuestring) > LIMITS_METADATA_VALUE)
            json_fail(f, STATUS_INVALID, "metadata",
                      "must map names of at most 64 bytes to strings of at most 512");
    }
}

enum status memory_request_parse(const char *json, size_t size, struct memory_request *out,
                                 struct error *err)
{
    static const char *const known[] = {"from", "metadata", NULL};
    *out = (struct memory_request){0};
    if (!size)
        return STATUS_OK;
    cJSON *root;
    const enum status status = json_parse_object(json, size, &root, err);
    if (status)
        return status;
    struct json_fields f = {.root = root, .err = err};
    json_refuse_others(&f, known);
    json_read_text(&f, "from", out->from, sizeof out->from);
    const cJSON *metadata = cJSON_GetObjectItemCaseSensitive(root, "metadata");
    if (metadata && !cJSON_IsNull(metadata)) {
        check_metadata(&f, metadata);
        out->metadata = cJSON_PrintUnformatted(metadata);
        if (!out->metadata && !f.status)
            f.status = error_set(err, STATUS_NO_MEMORY, "out of memory");
    }
    cJSON_Delete(root);
    if (f.status)
        memory_request_close(out);
    return f.status;
}

void memory_request_close(struct memory_request *request)
{
    cJSON_free(request->metadata);
    *request = (struct memory_request){0};
}
