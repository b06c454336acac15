/* response_json.c - see response_json.h. */
#include "proto/response_json.h"

#include <string.h>

#include "proto/base/assert.h"
#include "proto/json.h"

#define OPENING_EVENTS 3 /* of one that has begun, behind the first */
#define CLOSING_EVENTS 4

static const char *const status_names[] = {"queued",     "in_progress", "completed",
                                           "incomplete", "failed",      "cancelled"};

static void buffers_of(struct response *r, struct buf *out[6])
{
    out[0] = &r->fields;
    out[1] = &r->text;
    out[2] = &r->logprobs;
    out[3] = &r->steps;
    out[4] = &r->annotations;
    out[5] = &r->marks;
}

void response_init(struct response *response)
{
    *response = (struct response){0};
}

void response_close(struct response *response)
{
    struct buf *buffers[6];
    buffers_of(response, buffers);
    for (size_t i = 0; i < 6; i++)
        buf_close(buffers[i]);
}

static void append_buf(struct buf *out, const struct buf *bytes)
{
    if (bytes->size)
        buf_append(out, bytes->data, bytes->size);
}

static void append_text(struct buf *out, const char *text)
{
    json_append_string(out, text, strlen(text));
}

static void append_text_or_null(struct buf *out, const char *text)
{
    if (text && text[0])
        append_text(out, text);
    else
        buf_append_text(out, "null");
}

/* ---- what it holds ---- */

static void append_number(struct buf *out, const char *name, double value)
{
    buf_append_format(out, "\"%s\":", name);
    json_append_number(out, value);
    buf_append_text(out, ",");
}

void response_set_fields(struct response *response, const struct response_request *request,
                         const char *model)
{
    struct buf *out = &response->fields;
    buf_append_text(out, "\"instructions\":");
    append_text_or_null(out, request->instructions);
    buf_append_text(out, ",\"model\":");
    append_text(out, model);
    buf_append_text(out, ",\"previous_response_id\":");
    append_text_or_null(out, request->previous);
    buf_append_text(out, ",\"conversation\":");
    if (request->conversation[0]) {
        buf_append_text(out, "{\"id\":");
        append_text(out, request->conversation);
        buf_append_text(out, "}");
    } else {
        buf_append_text(out, "null");
    }
    buf_append_text(out, ",\"max_output_tokens\":");
    if (request->has_max_tokens)
        buf_append_format(out, "%llu", (unsigned long long)request->base.max_tokens);
    else
        buf_append_text(out, "null");
    buf_append_text(out, ",\"metadata\":");
    buf_append_text(out, request->metadata ? request->metadata : "{}");
    buf_append_text(out, ",");
    append_number(out, "temperature", request->base.temperature);
    append_number(out, "top_p", request->base.top_p);
    buf_append_format(out, "\"top_logprobs\":%d,",
                      request->base.logprobs < 0 ? 0 : (int)request->base.logprobs);
    buf_append_format(out,
                      "\"truncation\":\"%s\",\"parallel_tool_calls\":%s,\"tool_choice\":\"%s\","
                      "\"tools\":[],\"text\":{\"format\":{\"type\":\"text\"}},\"reasoning\":null,"
                      "\"store\":%s,",
                      request->truncation_auto ? "auto" : "disabled",
                      request->parallel_tool_calls ? "true" : "false", request->tool_choice,
                      request->store ? "true" : "false");
}

static size_t step_count(const struct response *r)
{
    return r->steps.size / sizeof(struct response_step);
}

static struct response_step step_at(const struct response *r, size_t index)
{
    struct response_step step = {0};
    if (index < step_count(r))
        memcpy(&step, r->steps.data + index * sizeof step, sizeof step);
    return step;
}

static size_t annotation_count(const struct response *r)
{
    return r->marks.size / sizeof(uint32_t);
}

/* Where annotation `index` ends; 0 for the one before the first. */
static uint32_t mark_at(const struct response *r, size_t index)
{
    uint32_t mark = 0;
    memcpy(&mark, r->marks.data + index * sizeof mark, sizeof mark);
    return mark;
}

void response_add_step(struct response *response, const char *text, size_t text_size,
                       const struct buf *logprobs)
{
    if (text_size)
        buf_append(&response->text, text, text_size);
    if (logprobs->size) {
        if (response->logprobs.size)
            buf_append_text(&response->logprobs, ",");
        append_buf(&response->logprobs, logprobs);
    }
    const struct response_step step = {(uint32_t)response->text.size,
                                       (uint32_t)response->logprobs.size};
    buf_append(&response->steps, &step, sizeof step);
}

void response_add_annotation(struct response *response, const struct buf *json)
{
    if (response->annotations.size)
        buf_append_text(&response->annotations, ",");
    append_buf(&response->annotations, json);
    const uint32_t mark = (uint32_t)response->annotations.size;
    buf_append(&response->marks, &mark, sizeof mark);
}

/* ---- the object ---- */

static bool is_over(const struct response *response)
{
    return response->status >= RESPONSE_COMPLETED;
}

static bool is_answered(const struct response *r)
{
    return r->status == RESPONSE_COMPLETED || r->status == RESPONSE_INCOMPLETE;
}

static void append_part(const struct response *r, bool whole, struct buf *out)
{
    buf_append_text(out, "{\"type\":\"output_text\",\"text\":");
    json_append_string(out, whole && r->text.size ? r->text.data : "", whole ? r->text.size : 0);
    buf_append_text(out, ",\"annotations\":[");
    if (whole)
        append_buf(out, &r->annotations);
    buf_append_text(out, "],\"logprobs\":[");
    if (whole)
        append_buf(out, &r->logprobs);
    buf_append_text(out, "]}");
}

/* `end`: how the response ended; not: the message is only announced. */
static void append_message(const struct response *r, enum response_status end, struct buf *out)
{
    const bool over = end >= RESPONSE_COMPLETED;
    buf_append_format(out,
                      "{\"id\":\"%s\",\"type\":\"message\",\"status\":\"%s\","
                      "\"role\":\"assistant\",\"content\":[",
                      r->item,
                      !over                       ? "in_progress"
                      : end == RESPONSE_COMPLETED ? "completed"
                                                  : "incomplete");
    if (over)
        append_part(r, true, out);
    buf_append_text(out, "]}");
}

void response_append_item(const struct response *response, enum response_status end,
                          struct buf *out)
{
    append_message(response, end, out);
}

static void append_usage(const struct response *r, struct buf *out)
{
    buf_append_format(out,
                      "{\"input_tokens\":%llu,\"input_tokens_details\":{\"cached_tokens\":%llu},"
                      "\"output_tokens\":%llu,\"output_tokens_details\":{\"reasoning_tokens\":0},"
                      "\"total_tokens\":%llu}",
                      (unsigned long long)r->input_tokens, (unsigned long long)r->cached_tokens,
                      (unsigned long long)r->output_tokens,
                      (unsigned long long)(r->input_tokens + r->output_tokens));
}

/* As it was, or is, with that status. */
static void append_object(const struct response *r, enum response_status status, struct buf *out)
{
    const bool over = status >= RESPONSE_COMPLETED;
    buf_append_format(out,
                      "{\"id\":\"%s\",\"object\":\"response\",\"created_at\":%lld,"
                      "\"status\":\"%s\",\"background\":%s,\"completed_at\":",
                      r->id, (long long)r->created_at, status_names[status],
                      r->background ? "true" : "false");
    if (status == RESPONSE_COMPLETED)
        buf_append_format(out, "%lld", (long long)r->completed_at);
    else
        buf_append_text(out, "null");
    buf_append_text(out, ",\"error\":");
    if (status == RESPONSE_FAILED) {
        buf_append_format(out, "{\"code\":\"%s\",\"message\":", r->error_code);
        append_text(out, r->error_message);
        buf_append_text(out, "}");
    } else {
        buf_append_text(out, "null");
    }
    buf_append_text(out, ",\"incomplete_details\":");
    buf_append_text(out, status == RESPONSE_INCOMPLETE ? "{\"reason\":\"max_output_tokens\"},"
                                                       : "null,");
    append_buf(out, &r->fields);
    buf_append_text(out, "\"memory\":");
    append_text_or_null(out, over ? r->memory : "");
    buf_append_text(out, ",\"output\":[");
    if (over && (is_answered(r) || r->text.size))
        append_message(r, r->status, out);
    buf_append_text(out, "],\"usage\":");
    if (over && r->begun)
        append_usage(r, out);
    else
        buf_append_text(out, "null");
    buf_append_text(out, "}");
}

void response_append_object(const struct response *response, struct buf *out)
{
    append_object(response, response->status, out);
}

/* ---- events ---- */

uint64_t response_event_count(const struct response *r)
{
    return 1 + (r->begun ? OPENING_EVENTS + step_count(r) : 0) +
           (is_answered(r)        ? annotation_count(r) + CLOSING_EVENTS
            : is_over(r) ? 1
                                  : 0);
}

/* Begins the event; the members that tell what it is about follow. */
static void begin_event(struct buf *out, const char *type, uint64_t index)
{
    buf_append_format(out,
                      "event: response.%s\ndata: {\"type\":\"response.%s\","
                      "\"sequence_number\":%llu,",
                      type, type, (unsigned long long)index);
}

static void append_whole(const struct response *r, const char *type, enum response_status status,
                         uint64_t index, struct buf *out)
{
    begin_event(out, type, index);
    buf_append_text(out, "\"response\":");
    append_object(r, status, out);
    buf_append_text(out, "}\n\n");
}

/* Where in the answer: its only part of its only message. */
static void begin_part_event(const struct response *r, const char *type, uint64_t index,
                             struct buf *out)
{
    begin_event(out, type, index);
    buf_append_format(out, "\"item_id\":\"%s\",\"output_index\":0,\"content_index\":0,", r->item);
}

static void append_opening(const struct response *r, uint64_t which, uint64_t index,
                           struct buf *out)
{
    if (which == 0) {
        append_whole(r, "in_progress", RESPONSE_IN_PROGRESS, index, out);
    } else if (which == 1) {
        begin_event(out, "output_item.added", index);
        buf_append_text(out, "\"output_index\":0,\"item\":");
        append_message(r, RESPONSE_IN_PROGRESS, out);
        buf_append_text(out, "}\n\n");
    } else {
        begin_part_event(r, "content_part.added", index, out);
        buf_append_text(out, "\"part\":");
        append_part(r, false, out);
        buf_append_text(out, "}\n\n");
    }
}

static void append_delta(const struct response *r, size_t which, uint64_t index, struct buf *out)
{
    const struct response_step step = step_at(r, which);
    const struct response_step before = which ? step_at(r, which - 1) : (struct response_step){0};
    size_t logprobs = before.logprobs_end, text_size = step.text_end - before.text_end;
    if (logprobs && step.logprobs_end > logprobs)
        logprobs++; /* the comma */
    begin_part_event(r, "output_text.delta", index, out);
    buf_append_text(out, "\"delta\":");
    json_append_string(out, text_size ? r->text.data + before.text_end : "", text_size);
    buf_append_text(out, ",\"logprobs\":[");
    if (step.logprobs_end > logprobs)
        buf_append(out, r->logprobs.data + logprobs, step.logprobs_end - logprobs);
    buf_append_text(out, "]}\n\n");
}

static void append_annotation(const struct response *r, size_t which, uint64_t index,
                              struct buf *out)
{
    const uint32_t begin = which ? mark_at(r, which - 1) + 1 : 0;
    begin_part_event(r, "output_text.annotation.added", index, out);
    buf_append_format(out, "\"annotation_index\":%zu,\"annotation\":", which);
    buf_append(out, r->annotations.data + begin, mark_at(r, which) - begin);
    buf_append_text(out, "}\n\n");
}

static void append_closing(const struct response *r, uint64_t which, uint64_t index,
                           struct buf *out)
{
    if (which == 0) {
        begin_part_event(r, "output_text.done", index, out);
        buf_append_text(out, "\"text\":");
        json_append_string(out, r->text.size ? r->text.data : "", r->text.size);
        buf_append_text(out, ",\"logprobs\":[");
        append_buf(out, &r->logprobs);
        buf_append_text(out, "]}\n\n");
    } else if (which == 1) {
        begin_part_event(r, "content_part.done", index, out);
        buf_append_text(out, "\"part\":");
        append_part(r, true, out);
        buf_append_text(out, "}\n\n");
    } else if (which == 2) {
        begin_event(out, "output_item.done", index);
        buf_append_text(out, "\"output_index\":0,\"item\":");
        append_message(r, r->status, out);
        buf_append_text(out, "}\n\n");
    } else {
        append_whole(r, status_names[r->status], r->status, index, out);
    }
}

void response_append_event(const struct response *r, uint64_t index, struct buf *out)
{
    uint64_t at = index;
    ASSERT(index < response_event_count(r));
    if (at == 0) {
        append_whole(r, "created", r->background ? RESPONSE_QUEUED : RESPONSE_IN_PROGRESS, index,
                     out);
        return;
    }
    at--;
    if (r->begun && at < OPENING_EVENTS) {
        append_opening(r, at, index, out);
        return;
    }
    at -= r->begun ? OPENING_EVENTS : 0;
    if (r->begun && at < step_count(r)) {
        append_delta(r, (size_t)at, index, out);
        return;
    }
    at -= r->begun ? step_count(r) : 0;
    if (!is_answered(r))
        append_whole(r, "failed", r->status, index, out);
    else if (at < annotation_count(r))
        append_annotation(r, (size_t)at, index, out);
    else
        append_closing(r, at - annotation_count(r), index, out);
}

/* ---- what is kept ---- */

#define KEPT_VERSION 1

static void put_u64(struct buf *out, uint64_t x)
{
    unsigned char bytes[8];
    for (int i = 0; i < 8; i++)
        bytes[i] = (unsigned char)(x >> (8 * i));
    buf_append(out, bytes, sizeof bytes);
}

static void put_bytes(struct buf *out, const void *bytes, size_t size)
{
    put_u64(out, size);
    if (size)
        buf_append(out, bytes, size);
}

/* Numbers one behind the other, least byte first, so that the bytes are the same everywhere. */
static void put_numbers(struct buf *out, const struct buf *numbers)
{
    put_u64(out, numbers->size);
    for (size_t i = 0; i < numbers->size; i += 4) {
        uint32_t x;
        unsigned char bytes[4];
        memcpy(&x, numbers->data + i, sizeof x);
        for (int j = 0; j < 4; j++)
            bytes[j] = (unsigned char)(x >> (8 * j));
        buf_append(out, bytes, sizeof bytes);
    }
}

static bool is_numbers(size_t index)
{
    return index == 3 || index == 5;
}

void response_encode(const struct response *response, struct buf *out)
{
    struct response *r = (struct response *)(uintptr_t)response; /* to list its buffers */
    struct buf *buffers[6];
    const uint64_t numbers[] = {
        KEPT_VERSION,    (uint64_t)r->created_at, (uint64_t)r->completed_at, (uint64_t)r->status,
        r->begun,        r->background,           r->input_tokens,           r->cached_tokens,
        r->output_tokens};
    const char *const texts[] = {r->id, r->item, r->memory, r->error_code, r->error_message};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        put_u64(out, numbers[i]);
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        put_bytes(out, texts[i], strlen(texts[i]));
    buffers_of(r, buffers);
    for (size_t i = 0; i < 6; i++) {
        if (is_numbers(i))
            put_numbers(out, buffers[i]);
        else
            put_bytes(out, buffers[i]->data, buffers[i]->size);
    }
}

struct reader {
    const unsigned char *at, *end;
    bool bad;
};

static uint64_t take_u64(struct reader *in)
{
    uint64_t x = 0;
    if (in->end - in->at < 8) {
        in->bad = true;
        return 0;
    }
    for (int i = 0; i < 8; i++)
        x |= (uint64_t)in->at[i] << (8 * i);
    in->at += 8;
    return x;
}

static const unsigned char *take_bytes(struct reader *in, size_t *size)
{
    const uint64_t count = take_u64(in);
    *size = 0;
    if (in->bad || count > (uint64_t)(in->end - in->at)) {
        in->bad = true;
        return NULL;
    }
    *size = (size_t)count;
    in->at += count;
    return in->at - count;
}

static void take_text(struct reader *in, char *out, size_t room)
{
    size_t size;
    const unsigned char *bytes = take_bytes(in, &size);
    in->bad |= size >= room || (size && memchr(bytes, 0, size));
    if (!in->bad && size)
        memcpy(out, bytes, size);
    if (!in->bad)
        out[size] = 0;
}

static void take_buffer(struct reader *in, bool numbers, struct buf *out)
{
    size_t size;
    const unsigned char *bytes = take_bytes(in, &size);
    if (in->bad || !size)
        return;
    if (!numbers) {
        buf_append(out, bytes, size);
        return;
    }
    in->bad |= size % 4 != 0;
    for (size_t i = 0; i + 4 <= size; i += 4) {
        const uint32_t x = (uint32_t)bytes[i] | (uint32_t)bytes[i + 1] << 8 |
                           (uint32_t)bytes[i + 2] << 16 | (uint32_t)bytes[i + 3] << 24;
        buf_append(out, &x, sizeof x);
    }
}

/* Whether every place that it names is there. */
static bool is_sound(const struct response *r)
{
    struct response_step before = {0};
    if (r->steps.size % sizeof before)
        return false;
    for (size_t i = 0; i < step_count(r); i++) {
        const struct response_step step = step_at(r, i);
        if (step.text_end < before.text_end || step.logprobs_end < before.logprobs_end)
            return false;
        before = step;
    }
    if (before.text_end > r->text.size || before.logprobs_end > r->logprobs.size)
        return false;
    for (size_t i = 0, at = 0; i < annotation_count(r); i++) {
        const uint32_t mark = mark_at(r, i);
        if (mark < at || mark > r->annotations.size)
            return false;
        at = (size_t)mark + 1;
    }
    return true;
}

enum status response_decode(const void *bytes, size_t size, struct response *r)
{
    struct reader in = {.at = bytes, .end = (const unsigned char *)bytes + size};
    struct buf *buffers[6];
    response_init(r);
    in.bad = take_u64(&in) != KEPT_VERSION;
    r->created_at = (int64_t)take_u64(&in);
    r->completed_at = (int64_t)take_u64(&in);
    const uint64_t status = take_u64(&in), begun = take_u64(&in), background = take_u64(&in);
    r->status = (enum response_status)status;
    r->begun = begun != 0;
    r->background = background != 0;
    r->input_tokens = take_u64(&in);
    r->cached_tokens = take_u64(&in);
    r->output_tokens = take_u64(&in);
    take_text(&in, r->id, sizeof r->id);
    take_text(&in, r->item, sizeof r->item);
    take_text(&in, r->memory, sizeof r->memory);
    take_text(&in, r->error_code, sizeof r->error_code);
    take_text(&in, r->error_message, sizeof r->error_message);
    buffers_of(r, buffers);
    for (size_t i = 0; i < 6; i++)
        take_buffer(&in, is_numbers(i), buffers[i]);
    if (in.bad || in.at != in.end || status > RESPONSE_CANCELLED || begun > 1 || background > 1 ||
        !is_sound(r)) {
        response_close(r);
        return STATUS_CORRUPT;
    }
    return STATUS_OK;
}
