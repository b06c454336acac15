#include "proto/client_json.h"

#include <cjson/cJSON.h>
#include <stdlib.h>
#include <string.h>

#include "proto/base/assert.h"
#include "proto/json.h"

/* ---- reading ---- */

static const cJSON *field(const cJSON *object, const char *name)
{
    return cJSON_GetObjectItemCaseSensitive(object, name);
}

/* Copies what fits, ending between two UTF-8 characters. */
static void copy_text(const cJSON *object, const char *name, char *out, size_t width)
{
    const char *text = cJSON_GetStringValue(field(object, name));
    size_t size = text ? strlen(text) : 0;
    if (size >= width) {
        size = width - 1;
        while (size > 0 && ((unsigned char)text[size] & 0xc0) == 0x80)
            size--;
    }
    if (size)
        memcpy(out, text, size);
    out[size] = 0;
}

static double number(const cJSON *object, const char *name)
{
    const cJSON *item = field(object, name);
    return cJSON_IsNumber(item) ? item->valuedouble : 0;
}

/* Doubles hold counts up to 2^53 exactly, far beyond any memory. */
static uint64_t whole(const cJSON *object, const char *name)
{
    double x = number(object, name);
    return x > 0 && x <= 9007199254740992.0 ? (uint64_t)x : 0;
}

static char *own_text(const cJSON *object, const char *name, size_t *size)
{
    const char *text = cJSON_GetStringValue(field(object, name));
    char *copy = strdup(text ? text : "");
    ASSERT(copy);
    *size = strlen(copy);
    return copy;
}

static void *make(size_t count, size_t size)
{
    void *p = calloc(count ? count : 1, size);
    ASSERT(p);
    return p;
}

static cJSON *parse_object(const char *text, size_t size)
{
    cJSON *root = cJSON_ParseWithLength(text, size);
    if (root && !cJSON_IsObject(root)) {
        cJSON_Delete(root);
        root = NULL;
    }
    return root;
}

bool client_json_error(const char *text, size_t size, struct client_error *error)
{
    *error = (struct client_error){0};
    cJSON *root = parse_object(text, size);
    const cJSON *inner = field(root, "error");
    bool found = cJSON_IsObject(inner);
    if (found) {
        copy_text(inner, "message", error->message, sizeof error->message);
        copy_text(inner, "code", error->code, sizeof error->code);
    }
    cJSON_Delete(root);
    return found;
}

static bool read_memory(const cJSON *object, struct client_memory *memory)
{
    *memory = (struct client_memory){0};
    if (!cJSON_IsString(field(object, "id")))
        return false;
    copy_text(object, "id", memory->id, sizeof memory->id);
    copy_text(object, "parent", memory->parent, sizeof memory->parent);
    copy_text(field(object, "metadata"), "name", memory->name, sizeof memory->name);
    memory->created_at = (int64_t)whole(object, "created_at");
    memory->token_count = whole(object, "token_count");
    memory->chunk_count = whole(object, "chunk_count");
    memory->text_bytes = whole(object, "text_bytes");
    memory->bytes_on_disk = whole(object, "bytes_on_disk");
    return true;
}

enum status client_json_memory(const char *text, size_t size, struct client_memory *memory)
{
    cJSON *root = parse_object(text, size);
    bool good = root && read_memory(root, memory);
    cJSON_Delete(root);
    return good ? STATUS_OK : STATUS_INVALID;
}

enum status client_json_memory_list(const char *text, size_t size, struct client_memory_list *list)
{
    *list = (struct client_memory_list){0};
    cJSON *root = parse_object(text, size);
    const cJSON *data = field(root, "data"), *item;
    bool good = cJSON_IsArray(data);
    if (good) {
        list->items = make((size_t)cJSON_GetArraySize(data), sizeof *list->items);
        list->has_more = cJSON_IsTrue(field(root, "has_more"));
        cJSON_ArrayForEach(item, data) good &= read_memory(item, &list->items[list->count++]);
    }
    if (!good)
        client_json_memory_list_close(list);
    cJSON_Delete(root);
    return good ? STATUS_OK : STATUS_INVALID;
}

void client_json_memory_list_close(struct client_memory_list *list)
{
    free(list->items);
    *list = (struct client_memory_list){0};
}

enum status client_json_append(const char *text, size_t size, struct client_append *append)
{
    *append = (struct client_append){0};
    cJSON *root = parse_object(text, size);
    const char *object = cJSON_GetStringValue(field(root, "object"));
    bool good = object && strncmp(object, "memory.append", 13) == 0;
    if (good) {
        append->is_final = strcmp(object, "memory.append") == 0;
        append->tokens = whole(root, "tokens");
        append->position = whole(root, "position");
        append->text_bytes = whole(root, "text_bytes");
        append->seconds = number(root, "seconds");
    }
    cJSON_Delete(root);
    return good ? STATUS_OK : STATUS_INVALID;
}

/* `retrieval` is [{token..., chunks:[{chunk, weight, text}]}], the text at the first mention. */
static void read_sources(const cJSON *list, struct client_completion *completion)
{
    const cJSON *token, *one;
    size_t count = 0;
    cJSON_ArrayForEach(token, list) count += (size_t)cJSON_GetArraySize(field(token, "chunks"));
    completion->sources = make(count, sizeof *completion->sources);
    cJSON_ArrayForEach(token, list)
    {
        cJSON_ArrayForEach(one, field(token, "chunks"))
        {
            struct client_source *source = &completion->sources[completion->source_count++];
            size_t ignored;
            source->chunk = whole(one, "chunk");
            source->weight = number(one, "weight");
            source->text = own_text(one, "text", &ignored);
        }
    }
}

enum status client_json_completion(const char *text, size_t size,
                                   struct client_completion *completion)
{
    *completion = (struct client_completion){0};
    cJSON *root = parse_object(text, size);
    const cJSON *choices = field(root, "choices");
    bool good = cJSON_IsArray(choices);
    const cJSON *choice = good ? cJSON_GetArrayItem(choices, 0) : NULL; /* NULL: usage alone */
    if (good) {
        completion->text = own_text(choice, "text", &completion->text_size);
        copy_text(choice, "finish_reason", completion->finish_reason,
                  sizeof completion->finish_reason);
        const cJSON *usage = field(root, "usage");
        completion->prompt_tokens = whole(usage, "prompt_tokens");
        completion->completion_tokens = whole(usage, "completion_tokens");
        read_sources(field(choice, "retrieval"), completion);
    }
    cJSON_Delete(root);
    return good ? STATUS_OK : STATUS_INVALID;
}

void client_json_completion_close(struct client_completion *completion)
{
    for (size_t i = 0; i < completion->source_count; i++)
        free(completion->sources[i].text);
    free(completion->sources);
    free(completion->text);
    *completion = (struct client_completion){0};
}

enum status client_json_turn_list(const char *text, size_t size, struct client_turn_list *list)
{
    *list = (struct client_turn_list){0};
    cJSON *root = parse_object(text, size);
    const cJSON *data = field(root, "data"), *item;
    bool good = cJSON_IsArray(data);
    if (good) {
        list->items = make((size_t)cJSON_GetArraySize(data), sizeof *list->items);
        list->has_more = cJSON_IsTrue(field(root, "has_more"));
        cJSON_ArrayForEach(item, data)
        {
            struct client_turn *turn = &list->items[list->count++];
            turn->position = whole(item, "position");
            turn->text_bytes = whole(item, "text_bytes");
            turn->created_at = (int64_t)whole(item, "created_at");
            turn->has_snapshot = cJSON_IsTrue(field(item, "snapshot"));
            copy_text(item, "bookmark", turn->bookmark, sizeof turn->bookmark);
            good &= cJSON_IsObject(item);
        }
    }
    if (!good)
        client_json_turn_list_close(list);
    cJSON_Delete(root);
    return good ? STATUS_OK : STATUS_INVALID;
}

void client_json_turn_list_close(struct client_turn_list *list)
{
    free(list->items);
    *list = (struct client_turn_list){0};
}

enum status client_json_chunk_list(const char *text, size_t size, struct client_chunk_list *list)
{
    *list = (struct client_chunk_list){0};
    cJSON *root = parse_object(text, size);
    const cJSON *data = field(root, "data"), *item;
    bool good = cJSON_IsArray(data);
    if (good) {
        list->items = make((size_t)cJSON_GetArraySize(data), sizeof *list->items);
        list->has_more = cJSON_IsTrue(field(root, "has_more"));
        cJSON_ArrayForEach(item, data)
        {
            struct client_chunk *chunk = &list->items[list->count++];
            chunk->index = whole(item, "index");
            chunk->text = own_text(item, "text", &chunk->text_size);
            good &= cJSON_IsObject(item);
        }
    }
    if (!good)
        client_json_chunk_list_close(list);
    cJSON_Delete(root);
    return good ? STATUS_OK : STATUS_INVALID;
}

void client_json_chunk_list_close(struct client_chunk_list *list)
{
    for (size_t i = 0; i < list->count; i++)
        free(list->items[i].text);
    free(list->items);
    *list = (struct client_chunk_list){0};
}

/* ---- writing ---- */

static void print_to(struct buf *out, cJSON *root)
{
    char *text = cJSON_PrintUnformatted(root);
    ASSERT(text);
    buf_append_text(out, text);
    cJSON_free(text);
    cJSON_Delete(root);
}

void client_json_write_create(struct buf *out, const char *from, uint64_t at, const char *name)
{
    cJSON *root = cJSON_CreateObject();
    ASSERT(root);
    if (from)
        ASSERT(cJSON_AddStringToObject(root, "from", from));
    if (at)
        ASSERT(cJSON_AddNumberToObject(root, "at", (double)at));
    if (name) {
        cJSON *metadata = cJSON_AddObjectToObject(root, "metadata");
        ASSERT(metadata && cJSON_AddStringToObject(metadata, "name", name));
    }
    print_to(out, root);
}

enum status client_json_write_rename(struct buf *out, const char *text, size_t size,
                                     const char *name)
{
    cJSON *memory = parse_object(text, size);
    cJSON *metadata = cJSON_DetachItemFromObjectCaseSensitive(memory, "metadata");
    cJSON_Delete(memory);
    if (!cJSON_IsObject(metadata)) {
        cJSON_Delete(metadata);
        return STATUS_INVALID;
    }
    cJSON_DeleteItemFromObjectCaseSensitive(metadata, "name");
    cJSON *root = cJSON_CreateObject();
    ASSERT(root && cJSON_AddStringToObject(metadata, "name", name) &&
           cJSON_AddItemToObject(root, "metadata", metadata));
    print_to(out, root);
    return STATUS_OK;
}

void client_json_write_completion(struct buf *out, const struct client_completion_request *request)
{
    cJSON *root = cJSON_CreateObject();
    ASSERT(root);
    if (request->memory) {
        ASSERT(cJSON_AddStringToObject(root, "memory", request->memory));
        ASSERT(cJSON_AddBoolToObject(root, "memory_write", request->memory_write));
    }
    ASSERT(cJSON_AddNumberToObject(root, "max_tokens", request->max_tokens));
    ASSERT(cJSON_AddNumberToObject(root, "temperature", request->temperature));
    if (request->seed >= 0)
        ASSERT(cJSON_AddNumberToObject(root, "seed", (double)request->seed));
    if (request->stop) {
        cJSON *stop = cJSON_AddArrayToObject(root, "stop");
        ASSERT(stop && cJSON_AddItemToArray(stop, cJSON_CreateString(request->stop)));
    }
    if (request->stream)
        ASSERT(cJSON_AddTrueToObject(root, "stream"));
    if (request->retrieval)
        ASSERT(cJSON_AddTrueToObject(root, "retrieval"));
    print_to(out, root);
    /* cJSON would copy bytes that are no UTF-8. */
    ASSERT(out->data[out->size - 1] == '}');
    out->size--;
    buf_append_text(out, ",\"prompt\":");
    json_append_string(out, request->prompt, request->prompt_size);
    buf_append(out, "}", 1);
}
