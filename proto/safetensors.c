/* safetensors.c - see safetensors.h. */
#include "proto/safetensors.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    const char *name;
    enum safetensors_dtype dtype;
    uint32_t size;
} dtypes[] = {{"BF16", SAFETENSORS_BF16, 2}, {"F16", SAFETENSORS_F16, 2},
              {"F32", SAFETENSORS_F32, 4},   {"F64", SAFETENSORS_F64, 8},
              {"I32", SAFETENSORS_I32, 4},   {"I64", SAFETENSORS_I64, 8}};

/* A JSON number that is a whole one and exact in a double. */
static bool whole(const cJSON *item, uint64_t *value)
{
    if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0) || item->valuedouble > 9e15 ||
        item->valuedouble != floor(item->valuedouble))
        return false;
    *value = (uint64_t)item->valuedouble;
    return true;
}

static enum status parse_entry(const cJSON *item, uint64_t data, uint64_t file_size,
                               struct safetensors_entry *entry, struct error *err)
{
    const cJSON *dtype = cJSON_GetObjectItemCaseSensitive(item, "dtype");
    const cJSON *shape = cJSON_GetObjectItemCaseSensitive(item, "shape");
    const cJSON *offsets = cJSON_GetObjectItemCaseSensitive(item, "data_offsets");
    if (!cJSON_IsString(dtype) || !cJSON_IsArray(shape) || !cJSON_IsArray(offsets) ||
        cJSON_GetArraySize(offsets) != 2 || cJSON_GetArraySize(shape) > SAFETENSORS_RANK_MAX)
        return error_set(err, STATUS_INVALID, "tensor \"%.100s\": malformed entry", item->string);
    uint64_t begin, end, elements = 1;
    if (!whole(cJSON_GetArrayItem(offsets, 0), &begin) ||
        !whole(cJSON_GetArrayItem(offsets, 1), &end) || begin > end || end > file_size - data)
        return error_set(err, STATUS_INVALID,
                         "tensor \"%.100s\": its bytes lie outside the file (is it truncated?)",
                         item->string);
    const cJSON *size;
    cJSON_ArrayForEach(size, shape)
    {
        uint64_t n;
        if (!whole(size, &n) || (n && elements > UINT64_MAX / 16 / n))
            return error_set(err, STATUS_INVALID, "tensor \"%.100s\": malformed shape",
                             item->string);
        elements *= n;
        entry->shape[entry->rank++] = n;
    }
    snprintf(entry->dtype_name, sizeof entry->dtype_name, "%s", dtype->valuestring);
    entry->dtype = SAFETENSORS_OTHER;
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++) {
        if (strcmp(dtypes[i].name, dtype->valuestring) != 0)
            continue;
        entry->dtype = dtypes[i].dtype;
        if (elements * dtypes[i].size != end - begin)
            return error_set(err, STATUS_INVALID,
                             "tensor \"%.100s\": its size does not match its shape", item->string);
    }
    entry->offset = data + begin;
    entry->size = end - begin;
    entry->name = strdup(item->string);
    return entry->name ? STATUS_OK : error_set(err, STATUS_NO_MEMORY, "out of memory");
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct safetensors_entry *)a)->name,
                  ((const struct safetensors_entry *)b)->name);
}

static int by_offset(const void *a, const void *b)
{
    const struct safetensors_entry *x = a, *y = b;
    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    return (x->size > y->size) - (x->size < y->size);
}

/* Entries share no byte and no name. Leaves them sorted by name. */
static enum status check_distinct(struct safetensors *s, struct error *err)
{
    if (!s->count)
        return STATUS_OK;
    qsort(s->entries, s->count, sizeof *s->entries, by_offset);
    for (size_t i = 1; i < s->count; i++)
        if (s->entries[i].offset < s->entries[i - 1].offset + s->entries[i - 1].size)
            return error_set(err, STATUS_INVALID, "tensors \"%.100s\" and \"%.100s\" overlap",
                             s->entries[i - 1].name, s->entries[i].name);
    qsort(s->entries, s->count, sizeof *s->entries, by_name);
    for (size_t i = 1; i < s->count; i++)
        if (strcmp(s->entries[i].name, s->entries[i - 1].name) == 0)
            return error_set(err, STATUS_INVALID, "tensor \"%.100s\" is listed twice",
                             s->entries[i].name);
    return STATUS_OK;
}

enum status safetensors_parse(const void *file, size_t available, uint64_t file_size,
                              struct safetensors *out, struct error *err)
{
    *out = (struct safetensors){0};
    uint64_t header = 0;
    if (available < 8 || file_size < 8)
        return error_set(err, STATUS_INVALID, "not a safetensors file: shorter than 8 bytes");
    for (int i = 7; i >= 0; i--)
        header = header << 8 | ((const unsigned char *)file)[i];
    if (header > SAFETENSORS_HEADER_MAX || header > available - 8 || header > file_size - 8)
        return error_set(err, STATUS_INVALID,
                         "not a safetensors file, or truncated: header of %llu bytes",
                         (unsigned long long)header);
    cJSON *root = cJSON_ParseWithLength((const char *)file + 8, (size_t)header);
    if (!cJSON_IsObject(root)) {
        cJSON_Delete(root);
        return error_set(err, STATUS_INVALID, "safetensors header is not a JSON object");
    }
    enum status status = STATUS_OK;
    out->entries = calloc((size_t)cJSON_GetArraySize(root) + 1, sizeof *out->entries);
    if (!out->entries)
        status = error_set(err, STATUS_NO_MEMORY, "out of memory");
    const cJSON *item;
    cJSON_ArrayForEach(item, root)
    {
        if (status)
            break;
        if (strcmp(item->string, "__metadata__") != 0)
            status = parse_entry(item, 8 + header, file_size, &out->entries[out->count++], err);
    }
    cJSON_Delete(root);
    if (!status)
        status = check_distinct(out, err);
    if (status)
        safetensors_close(out);
    return status;
}

void safetensors_close(struct safetensors *safetensors)
{
    for (size_t i = 0; i < safetensors->count; i++)
        free(safetensors->entries[i].name);
    free(safetensors->entries);
    *safetensors = (struct safetensors){0};
}

const struct safetensors_entry *safetensors_find(const struct safetensors *safetensors,
                                                 const char *name)
{
    size_t low = 0, high = safetensors->count;
    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        const int order = strcmp(safetensors->entries[middle].name, name);
        if (!order)
            return &safetensors->entries[middle];
        if (order < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return NULL;
}

static int by_text(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

enum status safetensors_parse_index(const char *json, size_t size, char ***files, size_t *count,
                                    struct error *err)
{
    *files = NULL;
    *count = 0;
    cJSON *root = cJSON_ParseWithLength(json, size);
    const cJSON *map = cJSON_GetObjectItemCaseSensitive(root, "weight_map");
    enum status status = STATUS_OK;
    char **names = NULL;
    size_t found = 0;
    if (!cJSON_IsObject(map) || !map->child) {
        status = error_set(err, STATUS_INVALID, "the index has no \"weight_map\"");
        goto out;
    }
    names = calloc((size_t)cJSON_GetArraySize(map), sizeof *names);
    if (!names) {
        status = error_set(err, STATUS_NO_MEMORY, "out of memory");
        goto out;
    }
    const cJSON *item;
    cJSON_ArrayForEach(item, map)
    {
        if (!cJSON_IsString(item) || !*item->valuestring || strchr(item->valuestring, '/')) {
            status = error_set(err, STATUS_INVALID, "the index names no plain file for \"%.100s\"",
                               item->string);
            goto out;
        }
        names[found++] = item->valuestring;
    }
    qsort(names, found, sizeof *names, by_text);
    size_t distinct = 0;
    for (size_t i = 0; i < found; i++)
        if (!i || strcmp(names[i], names[distinct - 1]) != 0)
            names[distinct++] = names[i];
    for (size_t i = 0; i < distinct; i++) {
        names[i] = strdup(names[i]);
        if (!names[i]) {
            while (i)
                free(names[--i]);
            status = error_set(err, STATUS_NO_MEMORY, "out of memory");
            goto out;
        }
    }
    *files = names;
    *count = distinct;
    names = NULL;
out:
    free(names);
    cJSON_Delete(root);
    return status;
}
