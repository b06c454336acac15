/* answer_json.c - see answer_json.h. */
#include "proto/answer_json.h"

#include <string.h>

#include "proto/json.h"

static void append_text(struct buf *out, const char *text)
{
    json_append_string(out, text, strlen(text));
}

static void append_text_or_null(struct buf *out, const char *text)
{
    if (text && *text)
        append_text(out, text);
    else
        buf_append_text(out, "null");
}

static void append_buf(struct buf *out, const struct buf *from)
{
    if (from->size)
        buf_append(out, from->data, from->size);
}

void answer_json_error(struct buf *out, enum status status, const char *message, const char *param)
{
    buf_append_text(out, "{\"error\":{\"message\":");
    append_text(out, message);
    buf_append_format(out, ",\"type\":\"%s\",\"param\":", status_type(status));
    append_text_or_null(out, param);
    buf_append_format(out, ",\"code\":\"%s\"}}", status_code(status));
}

void answer_json_event(struct buf *out, const struct buf *json)
{
    buf_append_text(out, "data: ");
    append_buf(out, json);
    buf_append_text(out, "\n\n");
}

void answer_logprobs_init(struct answer_logprobs *l)
{
    buf_init(&l->tokens);
    buf_init(&l->values);
    buf_init(&l->tops);
    buf_init(&l->offsets);
    l->count = 0;
}

void answer_logprobs_close(struct answer_logprobs *l)
{
    buf_close(&l->tokens);
    buf_close(&l->values);
    buf_close(&l->tops);
    buf_close(&l->offsets);
    l->count = 0;
}

void answer_logprobs_clear(struct answer_logprobs *l)
{
    l->tokens.size = l->values.size = l->tops.size = l->offsets.size = l->count = 0;
}

/* A token that is no text by itself is named by its bytes, as OpenAI's API does: two of them are
 * not the same key. */
static void append_token(struct buf *out, const char *text, size_t size)
{
    if (json_is_utf8(text, size)) {
        json_append_string(out, text, size);
        return;
    }
    buf_append_text(out, "\"bytes:");
    for (size_t i = 0; i < size; i++)
        buf_append_format(out, "\\\\x%02x", (unsigned char)text[i]);
    buf_append_text(out, "\"");
}

void answer_logprobs_add(struct answer_logprobs *l, const char *text, size_t size, double logprob,
                         const struct answer_top *tops, size_t top_count, size_t offset)
{
    const char *comma = l->count++ ? "," : "";
    buf_append_text(&l->tokens, comma);
    append_token(&l->tokens, text, size);
    buf_append_text(&l->values, comma);
    json_append_number(&l->values, logprob);
    buf_append_text(&l->tops, comma);
    buf_append_text(&l->tops, tops ? "{" : "null");
    for (size_t i = 0; tops && i < top_count; i++) {
        buf_append_text(&l->tops, i ? "," : "");
        append_token(&l->tops, tops[i].text, tops[i].size);
        buf_append_text(&l->tops, ":");
        json_append_number(&l->tops, tops[i].logprob);
    }
    buf_append_text(&l->tops, tops ? "}" : "");
    buf_append_format(&l->offsets, "%s%zu", comma, offset);
}

/* {token, logprob, bytes} without its end. */
static void append_chat_token(struct buf *out, const char *text, size_t size, double logprob)
{
    buf_append_text(out, "{\"token\":");
    append_token(out, text, size);
    buf_append_text(out, ",\"logprob\":");
    json_append_number(out, logprob);
    buf_append_text(out, ",\"bytes\":[");
    for (size_t i = 0; i < size; i++)
        buf_append_format(out, "%s%u", i ? "," : "", (unsigned char)text[i]);
    buf_append_text(out, "]");
}

void answer_logprobs_add_chat(struct answer_logprobs *l, const char *text, size_t size,
                              double logprob, const struct answer_top *tops, size_t top_count)
{
    buf_append_text(&l->tokens, l->count++ ? "," : "");
    append_chat_token(&l->tokens, text, size, logprob);
    buf_append_text(&l->tokens, ",\"top_logprobs\":[");
    for (size_t i = 0; i < top_count; i++) {
        buf_append_text(&l->tokens, i ? "," : "");
        append_chat_token(&l->tokens, tops[i].text, tops[i].size, tops[i].logprob);
        buf_append_text(&l->tokens, "}");
    }
    buf_append_text(&l->tokens, "]}");
}

static void append_head(struct buf *out, const struct answer_head *head, bool whole)
{
    const char *object = !head->chat ? "text_completion"
                         : whole     ? "chat.completion"
                                     : "chat.completion.chunk";
    /* Of each event of a stream, so without formats. */
    buf_append_text(out, "{\"id\":\"");
    buf_append_text(out, head->id);
    buf_append_text(out, "\",\"object\":\"");
    buf_append_text(out, object);
    buf_append_text(out, "\",\"created\":");
    buf_append_number(out, (uint64_t)head->created, 10, 1);
    buf_append_text(out, ",\"model\":");
    append_text(out, head->model);
    buf_append_text(out, ",\"system_fingerprint\":\"fp_");
    buf_append_number(out, head->fingerprint, 16, 16);
    buf_append_text(out, "\",\"choices\":[");
}

static void append_logprobs(struct buf *out, const struct answer_logprobs *logprobs, bool chat)
{
    buf_append_text(out, chat ? "{\"content\":[" : "{\"tokens\":[");
    append_buf(out, &logprobs->tokens);
    if (chat) {
        buf_append_text(out, "],\"refusal\":null}");
        return;
    }
    buf_append_text(out, "],\"token_logprobs\":[");
    append_buf(out, &logprobs->values);
    buf_append_text(out, "],\"top_logprobs\":[");
    append_buf(out, &logprobs->tops);
    buf_append_text(out, "],\"text_offset\":[");
    append_buf(out, &logprobs->offsets);
    buf_append_text(out, "]}");
}

/* "text":..., "message":{...} or "delta":{...}. */
static void append_said(struct buf *out, const struct answer_head *head,
                        const struct answer_choice *choice, bool whole)
{
    const char *text = choice->text ? choice->text : "";
    if (!head->chat) {
        buf_append_text(out, "\"text\":");
        json_append_string(out, text, choice->text_size);
        return;
    }
    buf_append_text(out, whole ? "\"message\":{" : "\"delta\":{");
    if (whole || choice->begins)
        buf_append_text(out, "\"role\":\"assistant\",\"refusal\":null,");
    if (whole || choice->begins || choice->text) {
        buf_append_text(out, "\"content\":");
        json_append_string(out, text, choice->text_size);
    }
    buf_append_text(out, "}");
}

static void append_choice(struct buf *out, const struct answer_head *head,
                          const struct answer_choice *choice, bool whole)
{
    buf_append_text(out, "{\"index\":");
    buf_append_number(out, choice->index, 10, 1);
    buf_append_text(out, ",");
    append_said(out, head, choice, whole);
    buf_append_text(out, ",\"logprobs\":");
    if (choice->logprobs)
        append_logprobs(out, choice->logprobs, head->chat);
    else
        buf_append_text(out, "null");
    if (choice->retrieval) {
        buf_append_text(out, ",\"retrieval\":[");
        append_buf(out, choice->retrieval);
        buf_append_text(out, "]");
    }
    buf_append_text(out, ",\"finish_reason\":");
    append_text_or_null(out, choice->finish_reason);
    buf_append_text(out, "}");
}

static void append_usage(struct buf *out, const struct answer_usage *usage)
{
    buf_append_format(out,
                      "],\"usage\":{\"prompt_tokens\":%llu,\"completion_tokens\":%llu,"
                      "\"total_tokens\":%llu,\"prompt_tokens_details\":{\"cached_tokens\":%llu}}}",
                      (unsigned long long)usage->prompt_tokens,
                      (unsigned long long)usage->completion_tokens,
                      (unsigned long long)(usage->prompt_tokens + usage->completion_tokens),
                      (unsigned long long)usage->cached_tokens);
}

void answer_json_chunk(struct buf *out, const struct answer_head *head,
                       const struct answer_choice *choice, bool null_usage)
{
    append_head(out, head, false);
    append_choice(out, head, choice, false);
    buf_append_text(out, null_usage ? "],\"usage\":null}" : "]}");
}

void answer_json_usage_chunk(struct buf *out, const struct answer_head *head,
                             const struct answer_usage *usage)
{
    append_head(out, head, false);
    append_usage(out, usage);
}

void answer_json_completion(struct buf *out, const struct answer_head *head,
                            const struct answer_choice *choices, size_t count,
                            const struct answer_usage *usage)
{
    append_head(out, head, true);
    for (size_t i = 0; i < count; i++) {
        buf_append_text(out, i ? "," : "");
        append_choice(out, head, &choices[i], true);
    }
    append_usage(out, usage);
}

void answer_json_replay(struct buf *out, const char *memory, uint64_t done, uint64_t total)
{
    buf_append_format(out,
                      "{\"object\":\"memory.replay.progress\",\"memory\":\"%s\","
                      "\"tokens_done\":%llu,\"tokens_total\":%llu}",
                      memory, (unsigned long long)done, (unsigned long long)total);
}

void answer_json_memory(struct buf *out, const struct answer_memory *memory)
{
    buf_append_format(out, "{\"id\":\"%s\",\"object\":\"memory\",\"created_at\":%lld,", memory->id,
                      (long long)memory->created_at);
    buf_append_format(out, "\"token_count\":%llu,\"chunk_count\":%llu,\"text_bytes\":%llu,",
                      (unsigned long long)memory->token_count,
                      (unsigned long long)memory->chunk_count,
                      (unsigned long long)memory->text_bytes);
    buf_append_format(
        out, "\"bytes_on_disk\":%llu,\"parent\":", (unsigned long long)memory->bytes_on_disk);
    append_text_or_null(out, memory->parent);
    buf_append_text(out, ",\"expires_after\":");
    if (memory->expires_s)
        buf_append_format(out, "{\"anchor\":\"%s\",\"seconds\":%lld},\"expires_at\":%lld",
                          memory->expires_from_use ? "last_active_at" : "created_at",
                          (long long)memory->expires_s, (long long)memory->expires_at);
    else
        buf_append_text(out, "null,\"expires_at\":null");
    buf_append_format(out, ",\"metadata\":%s}", memory->metadata);
}

void answer_json_turn(struct buf *out, const struct answer_turn *turn)
{
    buf_append_format(out, "{\"object\":\"memory.turn\",\"position\":%llu,\"parent\":",
                      (unsigned long long)turn->position);
    if (turn->parent < 0)
        buf_append_text(out, "null");
    else
        buf_append_format(out, "%lld", (long long)turn->parent);
    buf_append_format(out, ",\"text_bytes\":%llu,\"created_at\":%lld,\"snapshot\":%s,\"bookmark\":",
                      (unsigned long long)turn->text_bytes, (long long)turn->created_at,
                      turn->has_snapshot ? "true" : "false");
    append_text_or_null(out, turn->bookmark);
    buf_append_text(out, "}");
}

void answer_json_append(struct buf *out, const struct answer_append *append, bool progress)
{
    buf_append_format(out, "{\"object\":\"memory.append%s\",\"memory\":\"%s\",",
                      progress ? ".progress" : "", append->memory);
    buf_append_format(out, "\"tokens\":%llu,\"position\":%llu,\"text_bytes\":%llu,\"seconds\":",
                      (unsigned long long)append->tokens, (unsigned long long)append->position,
                      (unsigned long long)append->text_bytes);
    json_append_number(out, append->seconds);
    buf_append_text(out, "}");
}

void answer_json_memory_chunk(struct buf *out, const struct answer_chunk *chunk)
{
    buf_append_format(out,
                      "{\"index\":%llu,\"token_start\":%llu,\"token_end\":%llu,"
                      "\"byte_start\":%llu,\"byte_end\":%llu,\"text\":",
                      (unsigned long long)chunk->index, (unsigned long long)chunk->token_start,
                      (unsigned long long)chunk->token_end, (unsigned long long)chunk->byte_start,
                      (unsigned long long)chunk->byte_end);
    json_append_string(out, chunk->text, chunk->text_size);
    buf_append_text(out, "}");
}
