/* responding_prepare.c - a response, from its request to what the model shall read: what it goes on
 * from, where its turn will be, its items and its tokens. */
#include <stdlib.h>
#include <string.h>

#include "server/responding_private.h"

void responding_set_item(struct storage_item *item, const char *id, const struct buf *text)
{
    memcpy(item->id, id, sizeof item->id);
    item->bytes = text->data;
    item->size = text->size;
}

/* ---- what came before ---- */

enum status responding_read(const struct request *request, const char *id,
                            struct storage_object *object, struct response *response)
{
    enum status status = storage_object_get(request->server->storage, id, object);
    if (status)
        return status;
    if (request->key[0] && strcmp(object->tenant, request->key) != 0)
        status = STATUS_NOT_FOUND;
    if (!status)
        status = response_decode(object->bytes, object->size, response);
    if (status)
        storage_object_close(object);
    return status;
}

static enum status find_previous(struct responding *r)
{
    struct storage_object object;
    struct response response;
    const char *id = r->asked.previous;
    enum status status = responding_read(r->creator, id, &object, &response);
    if (status == STATUS_NOT_FOUND)
        return error_set_param(&r->err, status, "previous_response_id", "no response named %s", id);
    if (status)
        return error_set(&r->err, status, "response %s: %s", id, status_text(status));
    if (!object.reachable)
        status = error_set_param(
            &r->err, STATUS_NOT_FOUND, "previous_response_id", "%s",
            response.memory[0] ? "the memory that this response belongs to was deleted, is over, "
                                 "or was taken back to before it"
                               : "this response was not completed: there is nothing to go on from");
    memcpy(r->place.base, object.memory, sizeof r->place.base);
    r->place.position = object.position;
    r->goes_on = true;
    r->made_memory = object.made_memory;
    storage_object_close(&object);
    response_close(&response);
    return status;
}

/* The memory that it goes on from, where there is one, and how far that has come. */
static enum status find_base(struct responding *r)
{
    const struct response_request *asked = &r->asked;
    const bool is_conversation = asked->conversation[0] != 0;
    const char *name = is_conversation ? asked->conversation : asked->base.memory;
    struct storage_memory memory;
    enum status status = STATUS_OK;
    if (asked->previous[0])
        status = find_previous(r);
    else
        memcpy(r->place.base, name, LIMITS_ID_BYTES);
    if (status || !r->place.base[0])
        return status;
    status = storage_memory_get(r->server->storage, r->place.base, &memory);
    const bool found = !status && !memory.ephemeral &&
                       (!is_conversation || strncmp(name, "conv_", 5) == 0) &&
                       (asked->previous[0] || !r->key[0] || strcmp(memory.tenant, r->key) == 0);
    if (status && status != STATUS_NOT_FOUND)
        return error_set(&r->err, status, "memory %s: %s", r->place.base, status_text(status));
    const uint64_t stands = status ? 0 : memory.token_count;
    if (!status)
        storage_memory_close(&memory);
    if (!found)
        return error_set_param(&r->err, STATUS_NOT_FOUND,
                               is_conversation ? "conversation" : "memory", "no %s named %s",
                               is_conversation ? "conversation" : "memory", r->place.base);
    if (!r->goes_on)
        r->place.position = stands;
    r->wants_fork = r->place.position != stands;
    return STATUS_OK;
}

/* Whether it is written, and where: the rules of responding_create in one place. */
static enum status find_place(struct responding *r)
{
    const struct response_request *asked = &r->asked;
    const bool to_memory = asked->base.memory[0] && asked->base.memory_write;
    const enum status status = find_base(r);
    if (status)
        return status;
    r->writes = asked->store || asked->conversation[0] || to_memory;
    /* What is stored without being a conversation's or a memory's turn has a memory of its own, or
     * that of the response before it. */
    if (r->writes && !asked->conversation[0] && !to_memory && !r->made_memory)
        r->wants_fork = true;
    memcpy(r->place.memory, r->place.base, sizeof r->place.memory);
    r->place.stands = r->place.position;
    return STATUS_OK;
}

/* ---- its text ---- */

static enum status encode(struct responding *r, const char *instructions,
                          struct tokenizer_tokens *tokens, size_t *bytes)
{
    const struct response_items *input = &r->asked.input;
    struct chat_message *messages = calloc(input->count + 1, sizeof *messages);
    size_t count = 0;
    if (!messages)
        return STATUS_NO_MEMORY;
    if (instructions)
        messages[count++] =
            (struct chat_message){"system", (char *)(uintptr_t)instructions, strlen(instructions)};
    memcpy(messages + count, input->messages, input->count * sizeof *messages);
    count += input->count;
    enum status status = chat_check(&r->server->chat, messages, count, &r->err);
    if (status)
        snprintf(r->err.param, sizeof r->err.param, "input");
    else
        status = chat_encode(&r->server->chat, messages, count, r->place.position > 0, true, tokens,
                             bytes);
    free(messages);
    return status;
}

/* The items of the input, as they are given back. */
static enum status make_items(struct responding *r)
{
    const struct response_items *input = &r->asked.input;
    r->items = calloc(input->count + 1, sizeof *r->items);
    r->texts = calloc(input->count + 1, sizeof *r->texts);
    if (!r->items || !r->texts)
        return STATUS_NO_MEMORY;
    for (size_t i = 0; i < input->count; i++) {
        char id[LIMITS_ID_BYTES];
        server_new_id("msg_", id);
        response_items_append(input, i, id, &r->texts[i]);
        responding_set_item(&r->items[i], id, &r->texts[i]);
    }
    return STATUS_OK;
}

void responding_prepare(uv_work_t *work)
{
    struct responding *r = work->data;
    const struct buf *body = &r->creator->body;
    r->status = response_request_parse(body->data, body->size, &r->asked, &r->err);
    if (!r->status)
        r->status = generate_check(r->creator, &r->asked.base, &r->err);
    if (!r->status)
        r->status = find_place(r);
    if (!r->status)
        r->status = encode(r, r->asked.instructions, &r->prompt, &r->prompt_bytes);
    if (!r->status && r->asked.instructions && r->writes)
        r->status = encode(r, NULL, &r->kept_prompt, &r->kept_bytes);
    if (!r->status)
        r->status = make_items(r);
    if (!r->status)
        response_set_fields(&r->response, &r->asked,
                            engine_get_info(r->server->engine)->model_name);
}
