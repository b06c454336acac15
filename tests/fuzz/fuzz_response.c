/* fuzz_response.c - any bytes as what is kept of a response: decoding must not fault, and what it
 * accepts must encode to the same bytes again, and give events that are whole.
 *
 * Input: a byte; its low bit says that the rest is not those bytes, but what a response is made of,
 * one choice a byte, which must come back as it was. */
#include <stdlib.h>
#include <string.h>

#include "proto/base/assert.h"
#include "proto/response_json.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(const struct response *r)
{
    struct buf event;
    buf_init(&event);
    for (uint64_t i = 0; i < response_event_count(r); i++) {
        event.size = 0;
        response_append_event(r, i, &event);
        const char *text = buf_text(&event);
        ASSERT(strncmp(text, "event: response.", 16) == 0);
        ASSERT(event.size > 2 && memcmp(text + event.size - 2, "\n\n", 2) == 0);
    }
    buf_close(&event);
}

static void decode(const uint8_t *data, size_t size)
{
    struct response r;
    struct buf again;
    if (response_decode(data, size, &r))
        return;
    check(&r);
    buf_init(&again);
    response_encode(&r, &again);
    ASSERT(again.size == size && memcmp(again.data, data, size) == 0);
    buf_close(&again);
    response_close(&r);
}

static void make(const uint8_t *data, size_t size)
{
    struct response r;
    struct buf bytes, json;
    response_init(&r);
    buf_init(&bytes);
    buf_init(&json);
    r.begun = true;
    r.status = (enum response_status)(size % 6);
    strcpy(r.id, "resp_0");
    for (size_t i = 0; i + 2 < size; i += 3) {
        const size_t left = size - i - 2, n = data[i + 1] % 9;
        json.size = 0;
        if (data[i] & 1)
            buf_append_format(&json, "{\"n\":%zu}", i);
        if (data[i] & 2 && json.size)
            response_add_annotation(&r, &json);
        else
            response_add_step(&r, (const char *)data + i + 2, n < left ? n : left, &json);
    }
    check(&r);
    response_encode(&r, &bytes);
    decode((const uint8_t *)bytes.data, bytes.size);
    struct response again;
    ASSERT(!response_decode(bytes.data, bytes.size, &again)); /* nothing of it is lost */
    ASSERT(response_event_count(&again) == response_event_count(&r));
    response_close(&again);
    response_close(&r);
    buf_close(&bytes);
    buf_close(&json);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!size)
        return 0;
    if (data[0] & 1) {
        make(data + 1, size - 1);
        return 0;
    }
    uint8_t *exact = malloc(size); /* reading past the end is seen */
    ASSERT(exact);
    memcpy(exact, data + 1, size - 1);
    decode(exact, size - 1);
    free(exact);
    return 0;
}
