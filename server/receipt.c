/* receipt.c - see receipt.h. */
#include "server/receipt.h"

#include <stdlib.h>
#include <string.h>

#include "proto/base/sha256.h"

#define BODY_BYTES (2 * SHA256_BYTES + 1) /* hexadecimal, and a space */

bool receipt_wanted(const struct request *request)
{
    return request->head->idempotency_key[0] != 0;
}

void receipt_append_body(const struct request *request, struct buf *out)
{
    unsigned char hash[SHA256_BYTES];
    sha256(request->body.data ? request->body.data : "", request->body.size, hash);
    for (size_t i = 0; i < sizeof hash; i++)
        buf_append_format(out, "%02x", hash[i]);
    buf_append_text(out, " ");
}

/* Whose key, for what, and the key: equal keys of others, or for other things, are not the same. */
static void make_name(struct request *request)
{
    struct buf text;
    buf_init(&text);
    buf_append_format(&text, "%s\n%s %s\n%s", request->key, request->head->method,
                      request->head->path, request->head->idempotency_key);
    sha256(text.data, text.size, request->receipt);
    buf_close(&text);
}

static bool is_running(const struct request *request)
{
    LIST_EACH(node, &request->server->receipts)
    {
        const struct request *other = LIST_ENTRY(node, struct request, receipt_node);
        if (memcmp(other->receipt, request->receipt, sizeof request->receipt) == 0)
            return true;
    }
    return false;
}

/* Takes the body's hash off what was kept; false: it is another body's. */
static bool take_body(const struct request *request, char *kept, size_t size)
{
    struct buf body;
    buf_init(&body);
    receipt_append_body(request, &body);
    const bool same = size >= BODY_BYTES && memcmp(kept, body.data, BODY_BYTES) == 0;
    buf_close(&body);
    if (same)
        memmove(kept, kept + BODY_BYTES, size - BODY_BYTES + 1);
    return same;
}

enum status receipt_begin(struct request *request, bool with_body, char **kept, size_t *size,
                          struct error *err)
{
    void *bytes;
    *kept = NULL;
    if (strlen(request->head->idempotency_key) > LIMITS_RECEIPT_KEY_BYTES)
        return error_set_param(err, STATUS_INVALID, "Idempotency-Key",
                               "an Idempotency-Key has at most %d bytes", LIMITS_RECEIPT_KEY_BYTES);
    make_name(request);
    if (is_running(request))
        return error_set(err, STATUS_CONFLICT,
                         "the request with this Idempotency-Key is being carried out; try again "
                         "when it is done");
    list_push_back(&request->server->receipts, &request->receipt_node);
    request->has_receipt = true;
    const enum status status =
        storage_receipt_get(request->server->storage, request->receipt, &bytes, size);
    if (status)
        return status == STATUS_NOT_FOUND ? STATUS_OK
                                          : error_set(err, status, "%s", status_text(status));
    if (with_body && !take_body(request, bytes, *size)) {
        free(bytes);
        return error_set_param(err, STATUS_CONFLICT, "Idempotency-Key",
                               "this Idempotency-Key was used for a request with another body");
    }
    *size -= with_body ? BODY_BYTES : 0;
    *kept = bytes;
    return STATUS_OK;
}

void receipt_end(struct request *request)
{
    if (request->has_receipt)
        list_remove(&request->receipt_node);
    request->has_receipt = false;
}
