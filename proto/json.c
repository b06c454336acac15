/* json.c - see json.h. */
#include "proto/json.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <string.h>

#include "proto/limits.h"

/* Length of the UTF-8 character at `p`, or 0 when there is none (RFC 3629). */
static size_t character(const unsigned char *p, size_t left)
{
    if (p[0] < 0x80)
        return 1;
    size_t size = p[0] >= 0xf0 ? 4 : p[0] >= 0xe0 ? 3 : 2;
    if (p[0] < 0xc2 || p[0] > 0xf4 || left < size)
        return 0;
    for (size_t i = 1; i < size; i++)
        if ((p[i] & 0xc0) != 0x80)
            return 0;
    if ((p[0] == 0xe0 && p[1] < 0xa0) || (p[0] == 0xed && p[1] > 0x9f) ||
        (p[0] == 0xf0 && p[1] < 0x90) || (p[0] == 0xf4 && p[1] > 0x8f))
        return 0;
    return size;
}

bool json_is_utf8(const char *text, size_t size)
{
    for (size_t i = 0; i < size;) {
        const size_t n = character((const unsigned char *)text + i, size - i);
        if (!n)
            return false;
        i += n;
    }
    return true;
}

void json_append_string(struct buf *out, const char *text, size_t size)
{
    const unsigned char *p = (const unsigned char *)text;
    size_t plain = 0; /* bytes before here that go out as they are, not yet written */
    buf_append(out, "\"", 1);
    for (size_t i = 0; i < size;) {
        const size_t n = character(p + i, size - i);
        if (n > 1 || (n == 1 && p[i] >= 0x20 && p[i] != '"' && p[i] != '\\' && p[i] != 0x7f)) {
            i += n;
            continue;
        }
        buf_append(out, text + plain, i - plain);
        if (!n)
            buf_append_text(out, "\\ufffd");
        else if (p[i] == '"' || p[i] == '\\')
            buf_append_format(out, "\\%c", p[i]);
        else if (p[i] == '\n')
            buf_append_text(out, "\\n");
        else
            buf_append_format(out, "\\u%04x", p[i]);
        plain = ++i;
    }
    buf_append(out, text + plain, size - plain);
    buf_append(out, "\"", 1);
}

void json_append_number(struct buf *out, double value)
{
    if (isfinite(value))
        buf_append_format(out, "%.9g", value);
    else
        buf_append_text(out, "null");
}

/* \u0000 would end a C string early and lose what follows it. */
static bool has_nul(const char *text, size_t size)
{
    for (const char *at = text; (at = memmem(at, size - (size_t)(at - text), "\\u0000", 6)); at++) {
        size_t slashes = 0;
        while (at - slashes > text && at[-1 - (long)slashes] == '\\')
            slashes++;
        if (slashes % 2 == 0)
            return true;
    }
    return memchr(text, 0, size) != NULL;
}

enum status json_parse_object(const char *text, size_t size, struct cJSON **root, struct error *err)
{
    if (!size)
        return error_set(err, STATUS_INVALID, "the body is empty; a JSON object is expected");
    if (has_nul(text, size))
        return error_set(err, STATUS_INVALID, "the body holds a NUL character");
    if (!json_is_utf8(text, size)) /* it could not be given back as it came */
        return error_set(err, STATUS_INVALID, "the body is not UTF-8");
    const char *end = NULL;
    *root = cJSON_ParseWithLengthOpts(text, size, &end, false);
    size_t rest = *root && end ? (size_t)(end - text) : size;
    while (rest < size && strchr(" \t\r\n", text[rest]))
        rest++;
    if (!*root || rest != size) {
        cJSON_Delete(*root);
        *root = NULL;
        return error_set(err, STATUS_INVALID, "the body is not valid JSON (near byte %zu)",
                         end ? (size_t)(end - text) : 0);
    }
    if (!cJSON_IsObject(*root)) {
        cJSON_Delete(*root);
        *root = NULL;
        return error_set(err, STATUS_INVALID, "the body is JSON, but not an object");
    }
    return STATUS_OK;
}

void json_fail(struct json_fields *f, enum status status, const char *name, const char *what)
{
    if (!f->status)
        f->status = error_set_param(f->err, status, name, "\"%.60s\" %s", name, what);
}

static const cJSON *get(const struct json_fields *f, const char *name)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(f->root, name);
    return cJSON_IsNull(item) ? NULL : item;
}

void json_read_bool(struct json_fields *f, const char *name, bool *out)
{
    const cJSON *item = get(f, name);
    if (item && !cJSON_IsBool(item))
        json_fail(f, STATUS_INVALID, name, "must be true or false");
    else if (item)
        *out = cJSON_IsTrue(item);
}

void json_read_number(struct json_fields *f, const char *name, double min, double max, double *out)
{
    const cJSON *item = get(f, name);
    if (!item)
        return;
    const double value = cJSON_IsNumber(item) ? item->valuedouble : NAN;
    if (!(value >= min && value <= max) && !f->status)
        f->status = error_set_param(f->err, STATUS_INVALID, name,
                                    "\"%s\" must be a number from %g to %g", name, min, max);
    else
        *out = value;
}

void json_read_count(struct json_fields *f, const char *name, uint64_t min, uint64_t max,
                     uint64_t *out)
{
    const cJSON *item = get(f, name);
    if (!item)
        return;
    const double value = cJSON_IsNumber(item) ? item->valuedouble : NAN;
    if (!(value >= (double)min && value <= (double)max) || value != floor(value)) {
        if (!f->status)
            f->status = error_set_param(f->err, STATUS_INVALID, name,
                                        "\"%s\" must be a whole number from %llu to %llu", name,
                                        (unsigned long long)min, (unsigned long long)max);
        return;
    }
    *out = (uint64_t)value;
}

void json_read_text(struct json_fields *f, const char *name, char *out, size_t room)
{
    const cJSON *item = get(f, name);
    if (!item)
        return;
    if (!cJSON_IsString(item))
        json_fail(f, STATUS_INVALID, name, "must be a string");
    else if (strlen(item->valuestring) >= room)
        json_fail(f, STATUS_INVALID, name, "is too long");
    else
        memcpy(out, item->valuestring, strlen(item->valuestring) + 1);
}

char *json_read_metadata(struct json_fields *f)
{
    const cJSON *metadata = get(f, "metadata"), *item;
    if (!metadata)
        return NULL;
    if (!cJSON_IsObject(metadata) || cJSON_GetArraySize(metadata) > LIMITS_METADATA_PAIRS)
        json_fail(f, STATUS_INVALID, "metadata", "must be an object of at most 16 pairs");
    cJSON_ArrayForEach(item, metadata)
    {
        if (!item->string || strlen(item->string) > LIMITS_METADATA_KEY || !cJSON_IsString(item) ||
            strlen(item->valuestring) > LIMITS_METADATA_VALUE)
            json_fail(f, STATUS_INVALID, "metadata",
                      "must map names of at most 64 bytes to strings of at most 512");
    }
    char *text = f->status ? NULL : cJSON_PrintUnformatted(metadata);
    if (!text && !f->status)
        f->status = error_set(f->err, STATUS_NO_MEMORY, "out of memory");
    return text;
}

void json_refuse_others(struct json_fields *f, const char *const *names)
{
    const cJSON *item;
    cJSON_ArrayForEach(item, f->root)
    {
        size_t i = 0;
        while (names[i] && strcmp(names[i], item->string) != 0)
            i++;
        if (!names[i])
            json_fail(f, STATUS_UNSUPPORTED, item->string, "is not a field of this request");
    }
}
