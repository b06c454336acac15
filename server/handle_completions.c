/* handle_completions.c - POST /v1/completions and /v1/chat/completions: text in, text out, from a
 * memory or from nothing. A chat differs in how it is read, and in the shapes of its answer.
 * One job a prompt; what they say is gathered by choice, and streamed as it comes or sent whole. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/answer_json.h"
#include "proto/base/assert.h"
#include "proto/completion_request.h"
#include "proto/json.h"
#include "server/generate.h"
#include "server/receipt.h"
#include "server/route.h"

struct choice {
    struct buf text;
    size_t characters; /* of the text so far, for text_offset */
    struct answer_logprobs logprobs;
    struct buf retrieval;
    uint32_t token_count;
    const char *finish_reason;
    double logprob_sum;
};

struct completion;

struct part { /* one prompt */
    struct completion *completion;
    uint32_t index;
    struct job *job;
    struct tokenizer_tokens tokens;
    int32_t *prompt; /* a copy for echo and passages: the job takes the tokens */
    size_t prompt_count;
    size_t text_bytes;
    uint64_t cached;        /* tokens of its memory, before the prompt */
    struct choice *choices; /* [best_of] */
    uint64_t *seen;         /* chunks whose text was sent */
    size_t seen_count, seen_capacity;
    int32_t *generated; /* of choice 0, for passages that the answer itself has filled */
    size_t generated_count, generated_capacity;
    bool done;
};

struct completion {
    struct request *request;
    struct server *server;
    struct completion_request asked;
    struct part *parts; /* [asked.prompt_count] */
    uint32_t open;      /* jobs not done */
    char id[LIMITS_ID_BYTES];
    int64_t created;
    struct answer_usage usage;
    size_t gathered; /* bytes of an answer that is not streamed */
    uv_work_t work;
    enum status status;
    struct error err;
    bool gone;
    bool once;   /* the request has an Idempotency-Key, and writes */
    bool is_old; /* it is answered as it was when it came before */
    uint64_t began_ns, first_token_ns;
};

static const struct tokenizer *tokenizer_of(const struct completion *c)
{
    return engine_tokenizer(c->server->engine);
}

static struct answer_head head_of(const struct completion *c)
{
    return (struct answer_head){.id = c->id,
                                .model = engine_get_info(c->server->engine)->model_name,
                                .created = c->created,
                                .fingerprint = engine_get_info(c->server->engine)->fingerprint,
                                .chat = c->asked.chat};
}

static void destroy(struct completion *c)
{
    for (size_t i = 0; c->parts && i < c->asked.prompt_count; i++) {
        struct part *part = &c->parts[i];
        for (size_t j = 0; part->choices && j < c->asked.best_of; j++) {
            buf_close(&part->choices[j].text);
            buf_close(&part->choices[j].retrieval);
            answer_logprobs_close(&part->choices[j].logprobs);
        }
        tokenizer_tokens_close(&part->tokens);
        free(part->choices);
        free(part->prompt);
        free(part->seen);
        free(part->generated);
    }
    free(c->parts);
    completion_request_close(&c->asked);
    free(c);
}

/* ---- what is sent ---- */

static void send_event(struct completion *c, const struct buf *json)
{
    struct buf *event = &c->server->event;
    if (c->gone)
        return;
    event->size = 0;
    answer_json_event(event, json);
    if (!c->request->streaming)
        request_stream_begin(c->request);
    request_stream_write(c->request, event->data, event->size);
}

static void send_chunk(struct completion *c, const struct answer_choice *choice)
{
    struct buf *json = &c->server->json;
    const struct answer_head head = head_of(c);
    json->size = 0;
    answer_json_chunk(json, &head, choice, c->asked.include_usage);
    send_event(c, json);
}

/* ---- retrieval ---- */

/* The token at `position` of what this prompt's model has read: its memory, the prompt, and the
 * answer; -1 when it cannot be had. */
static int32_t token_at(const struct part *part, uint64_t position)
{
    const struct completion *c = part->completion;
    int32_t token = -1;
    if (position < part->cached) {
        if (storage_read_tokens(c->server->storage, c->asked.memory, position, 1, &token))
            token = -1;
    } else if (position - part->cached < part->prompt_count) {
        token = part->prompt[position - part->cached];
    } else if (position - part->cached - part->prompt_count < part->generated_count) {
        token = part->generated[position - part->cached - part->prompt_count];
    }
    return token;
}

static void append_passage(const struct part *part, uint64_t chunk, struct buf *out)
{
    const struct completion *c = part->completion;
    const uint64_t s = engine_get_info(c->server->engine)->config->chunk_tokens;
    int32_t tokens[LIMITS_CHUNK_TOKENS];
    struct buf text;
    buf_init(&text);
    const bool stored =
        (chunk + 1) * s <= part->cached &&
        !storage_read_tokens(c->server->storage, c->asked.memory, chunk * s, s, tokens);
    for (uint64_t i = 0; i < s; i++) {
        const int32_t token = stored ? tokens[i] : token_at(part, chunk * s + i);
        size_t size = 0;
        const char *bytes = token < 0 ? "" : tokenizer_bytes(tokenizer_of(c), token, &size);
        if (size)
            buf_append(&text, bytes, size);
    }
    buf_append_text(out, ",\"text\":");
    json_append_string(out, text.data ? text.data : "", text.size);
    buf_close(&text);
}

/* Whether the chunk's text was sent before; it is from now on. */
static bool seen_before(struct part *part, uint64_t chunk)
{
    for (size_t i = 0; i < part->seen_count; i++)
        if (part->seen[i] == chunk)
            return true;
    if (part->seen_count == part->seen_capacity) {
        const size_t capacity = part->seen_capacity ? part->seen_capacity * 2 : 64;
        uint64_t *grown = realloc(part->seen, capacity * sizeof *grown);
        if (!grown)
            return true;
        part->seen = grown;
        part->seen_capacity = capacity;
    }
    part->seen[part->seen_count++] = chunk;
    return false;
}

/* {token_index, token, chunks:[{chunk, group, head, weight, token_start, token_end, text}]}; a
 * chunk's text comes with its first mention alone. */
static void append_retrieval(struct part *part, const struct choice *choice,
                             const struct event *event, struct buf *out)
{
    const struct completion *c = part->completion;
    const uint64_t s = engine_get_info(c->server->engine)->config->chunk_tokens;
    size_t size;
    const char *text = tokenizer_bytes(tokenizer_of(c), event->token, &size);
    buf_append_format(out, "%s{\"token_index\":%u,\"token\":", out->size ? "," : "",
                      choice->token_count);
    json_append_string(out, text, size);
    buf_append_text(out, ",\"chunks\":[");
    for (uint32_t i = 0; i < event->pick_count; i++) {
        const struct engine_pick *pick = &event->picks[i];
        buf_append_format(out, "%s{\"chunk\":%llu,\"group\":%u,\"head\":%u,\"weight\":%.6g,",
                          i ? "," : "", (unsigned long long)pick->chunk, pick->group, pick->head,
                          (double)pick->weight);
        buf_append_format(out, "\"token_start\":%llu,\"token_end\":%llu",
                          (unsigned long long)(pick->chunk * s),
                          (unsigned long long)((pick->chunk + 1) * s));
        if (!seen_before(part, pick->chunk))
            append_passage(part, pick->chunk, out);
        buf_append_text(out, "}");
    }
    buf_append_text(out, "]}");
}

/* ---- events of a job ---- */

static size_t choice_bytes(const struct choice *choice)
{
    const struct answer_logprobs *l = &choice->logprobs;
    return choice->text.size + choice->retrieval.size + l->tokens.size + l->values.size +
           l->tops.size + l->offsets.size;
}

static void keep_generated(struct part *part, int32_t token)
{
    if (part->generated_count == part->generated_capacity) {
        const size_t capacity = part->generated_capacity ? part->generated_capacity * 2 : 64;
        part->generated = realloc(part->generated, capacity * sizeof *part->generated);
        ASSERT(part->generated);
        part->generated_capacity = capacity;
    }
    part->generated[part->generated_count++] = token;
}

/* One fails, all do: the other jobs are called back. */
static void end_early(struct completion *c, enum status status)
{
    c->status = status;
    for (size_t i = 0; i < c->asked.prompt_count; i++)
        if (c->parts[i].job)
            job_cancel(c->parts[i].job);
}

static void take_token(struct part *part, const struct event *event)
{
    struct completion *c = part->completion;
    struct choice *choice = &part->choices[event->choice];
    const bool logprobs = c->asked.logprobs >= 0;
    if (!c->first_token_ns)
        c->first_token_ns = uv_hrtime();
    c->usage.completion_tokens++;
    if (event->choice == 0 && c->asked.retrieval)
        keep_generated(part, event->token);
    const size_t before = choice_bytes(choice);
    if (c->asked.stream) { /* each chunk carries its own; nothing is kept */
        answer_logprobs_clear(&choice->logprobs);
        choice->retrieval.size = 0;
    }
    if (logprobs)
        generate_add_logprob(tokenizer_of(c), &choice->logprobs, c->asked.chat, event->token,
                             (double)event->logprob, event->tops, event->top_count,
                             choice->characters);
    if (c->asked.retrieval)
        append_retrieval(part, choice, event, &choice->retrieval);
    choice->token_count++;
    choice->characters += generate_characters(event->text, event->text_size);
    if (!c->asked.stream) {
        if (event->text_size)
            buf_append(&choice->text, event->text, event->text_size);
        c->gathered += choice_bytes(choice) - before;
        if (c->gathered > LIMITS_ANSWER_BYTES)
            end_early(c, error_set(&c->err, STATUS_TOO_LARGE,
                                   "the answer has grown past %zu MiB; ask for it with \"stream\": "
                                   "true, or for less",
                                   LIMITS_ANSWER_BYTES / LIMITS_MIB));
    } else if (event->text_size || logprobs || c->asked.retrieval) {
        const struct answer_choice answer = {
            .index = part->index * (uint32_t)c->asked.n + event->choice,
            .text = event->text,
            .text_size = event->text_size,
            .logprobs = logprobs ? &choice->logprobs : NULL,
            .retrieval = c->asked.retrieval ? &choice->retrieval : NULL};
        send_chunk(c, &answer);
    }
}

/* The prompt's own text and log probabilities, before what follows. */
static void take_echo(struct part *part, const struct event *event)
{
    struct completion *c = part->completion;
    for (uint32_t k = 0; k < c->asked.best_of; k++) {
        struct choice *choice = &part->choices[k];
        for (size_t i = 0; i < part->prompt_count; i++) {
            size_t size;
            const char *text = tokenizer_bytes(tokenizer_of(c), part->prompt[i], &size);
            generate_add_logprob(tokenizer_of(c), &choice->logprobs, c->asked.chat, part->prompt[i],
                                 (double)event->echo_logprobs[i],
                                 event->echo_tops ? event->echo_tops + i * event->echo_top_count
                                                  : NULL,
                                 event->echo_top_count, choice->characters);
            choice->characters += generate_characters(text, size);
        }
    }
}

/* The prompt as text, where it is echoed without log probabilities or beside them. */
static void echo_text(struct part *part)
{
    struct completion *c = part->completion;
    for (uint32_t k = 0; k < c->asked.best_of; k++) {
        struct choice *choice = &part->choices[k];
        for (size_t i = 0; i < part->prompt_count; i++) {
            size_t size;
            const char *text = tokenizer_bytes(tokenizer_of(c), part->prompt[i], &size);
            if (size)
                buf_append(&choice->text, text, size);
        }
        if (c->asked.logprobs < 0)
            choice->characters =
                generate_characters(choice->text.data ? choice->text.data : "", choice->text.size);
        if (!c->asked.stream)
            continue;
        const struct answer_choice answer = {.index = part->index * (uint32_t)c->asked.n + k,
                                             .text = choice->text.data,
                                             .text_size = choice->text.size,
                                             .logprobs =
                                                 c->asked.logprobs >= 0 ? &choice->logprobs : NULL};
        send_chunk(c, &answer);
        choice->text.size = 0;
    }
}

static void finish_choice(struct part *part, const struct event *event)
{
    struct completion *c = part->completion;
    struct choice *choice = &part->choices[event->choice];
    choice->finish_reason = event->finish_reason == FINISH_STOP ? "stop" : "length";
    choice->logprob_sum = event->cumulative_logprob;
    if (!c->asked.stream)
        return;
    const struct answer_choice answer = {.index =
                                             part->index * (uint32_t)c->asked.n + event->choice,
                                         .finish_reason = choice->finish_reason};
    send_chunk(c, &answer);
}

/* The n most probable of best_of, by mean log probability as OpenAI ranks them. */
static int by_probability(const void *a, const void *b)
{
    const struct choice *x = a, *y = b;
    const double p = x->logprob_sum / (x->token_count ? x->token_count : 1);
    const double q = y->logprob_sum / (y->token_count ? y->token_count : 1);
    return (p < q) - (p > q);
}

static void answer_whole(struct completion *c)
{
    const size_t n = c->asked.n, total = c->asked.prompt_count * n;
    struct answer_choice *choices = calloc(total, sizeof *choices);
    ASSERT(choices);
    for (size_t i = 0; i < c->asked.prompt_count; i++) {
        struct part *part = &c->parts[i];
        if (c->asked.best_of > n)
            qsort(part->choices, c->asked.best_of, sizeof *part->choices, by_probability);
        for (size_t j = 0; j < n; j++) {
            const struct choice *choice = &part->choices[j];
            choices[i * n + j] = (struct answer_choice){
                .index = (uint32_t)(i * n + j),
                .text = choice->text.data,
                .text_size = choice->text.size,
                .logprobs = c->asked.logprobs >= 0 ? &choice->logprobs : NULL,
                .retrieval = c->asked.retrieval ? &choice->retrieval : NULL,
                .finish_reason = choice->finish_reason};
        }
    }
    struct buf body;
    const struct answer_head head = head_of(c);
    buf_init(&body);
    answer_json_completion(&body, &head, choices, total, &c->usage);
    request_answer_json(c->request, 200, &body);
    buf_close(&body);
    free(choices);
}

static void end_stream(struct completion *c)
{
    struct buf json;
    const struct answer_head head = head_of(c);
    buf_init(&json);
    if (c->asked.include_usage) {
        answer_json_usage_chunk(&json, &head, &c->usage);
        send_event(c, &json);
    }
    if (!c->request->streaming) /* nothing to say at all */
        request_stream_begin(c->request);
    request_stream_write(c->request, "data: [DONE]\n\n", 14);
    request_stream_end(c->request);
    buf_close(&json);
}

/* Every job is over: the answer, if it was not streamed, and the end. */
static void finish(struct completion *c)
{
    struct request *request = c->request;
    struct metrics *m = &c->server->metrics;
    if (!c->is_old) {
        m->prompt_tokens += c->usage.prompt_tokens;
        m->cached_tokens += c->usage.cached_tokens;
        m->completion_tokens += c->usage.completion_tokens;
    }
    if (!c->status && !c->is_old)
        metrics_observe(&m->whole, (double)(uv_hrtime() - c->began_ns) * 1e-9);
    if (c->first_token_ns)
        metrics_observe(&m->first_token, (double)(c->first_token_ns - c->began_ns) * 1e-9);
    if (!c->gone) {
        if (c->status && request->streaming)
            request_stream_fail(request, c->status, &c->err);
        else if (c->status)
            request_fail(request, c->status, &c->err);
        else if (c->asked.stream)
            end_stream(c);
        else
            answer_whole(c);
    }
    destroy(c);
    request_done(request);
}

static void part_done(struct part *part, const struct event *event)
{
    struct completion *c = part->completion;
    part->job = NULL;
    c->open--;
    if (event->status && !c->status) {
        if (event->error)
            c->err = *event->error;
        end_early(c, event->status);
    }
    if (!c->open)
        finish(c);
}

/* A stream's head goes out at once; a chat's says for each choice who speaks. */
static void begin_stream(struct completion *c)
{
    if (!c->asked.stream || c->gone)
        return;
    if (!c->request->streaming)
        request_stream_begin(c->request);
    for (uint32_t i = 0; c->asked.chat && i < c->asked.n; i++) {
        const struct answer_choice begins = {.index = i, .begins = true};
        send_chunk(c, &begins);
    }
}

static void event_cb(void *context, const struct event *event)
{
    struct part *part = context;
    struct completion *c = part->completion;
    switch (event->kind) {
    case EVENT_STARTED:
        part->cached = event->cached_tokens - event->resumed_tokens;
        c->usage.prompt_tokens += event->prompt_tokens + event->cached_tokens;
        c->usage.cached_tokens += event->cached_tokens;
        begin_stream(c);
        if (c->asked.echo && c->asked.logprobs < 0)
            echo_text(part);
        break;
    case EVENT_BLOCK:
    case EVENT_PROGRESS:
        break;
    case EVENT_ECHO:
        take_echo(part, event);
        echo_text(part);
        break;
    case EVENT_TOKEN:
        take_token(part, event);
        break;
    case EVENT_FINISHED:
        finish_choice(part, event);
        break;
    case EVENT_DONE:
        part_done(part, event);
        break;
    }
}

/* ---- from the request to jobs ---- */

static void gone(struct request *request)
{
    struct completion *c = request->state;
    c->gone = true;
    /* On the pool still: it sees that on its way back. */
    for (uint32_t i = 0; c->open && i < c->asked.prompt_count; i++)
        if (c->parts[i].job)
            job_cancel(c->parts[i].job);
}

/* ---- once ---- */

/* What is kept of the answer begins with the request's body, and whose answer it was. */
static void set_receipt(const struct completion *c, struct job_generate *g)
{
    struct buf head;
    buf_init(&head);
    receipt_append_body(c->request, &head);
    buf_append_format(&head, "%s %lld ", c->id, (long long)c->created);
    g->has_receipt = true;
    memcpy(g->receipt, c->request->receipt, sizeof g->receipt);
    g->receipt_head = strdup(buf_text(&head));
    ASSERT(g->receipt_head);
    buf_close(&head);
}

/* The answer again that was given before; `kept` holds it. */
static enum status answer_again(struct completion *c, const char *kept, size_t size)
{
    unsigned long long prompt, cached, completion;
    long long created;
    int reason;
    char id[LIMITS_ID_BYTES];
    const char *text = memchr(kept, '\n', size);
    if (!text || sscanf(kept, "%39s %lld %d %llu %llu %llu", id, &created, &reason, &prompt,
                        &cached, &completion) != 6)
        return STATUS_CORRUPT;
    text++;
    c->is_old = true;
    memcpy(c->id, id, sizeof c->id);
    c->created = created;
    c->usage = (struct answer_usage){
        .prompt_tokens = prompt + cached, .completion_tokens = completion, .cached_tokens = cached};
    struct choice *choice = &c->parts[0].choices[0];
    const struct answer_choice said = {.text = text, .text_size = size - (size_t)(text - kept)};
    const struct event finished = {.finish_reason = (enum finish_reason)reason};
    begin_stream(c);
    if (c->asked.stream && said.text_size)
        send_chunk(c, &said);
    else if (said.text_size)
        buf_append(&choice->text, said.text, said.text_size);
    finish_choice(&c->parts[0], &finished);
    return STATUS_OK;
}

static enum status begin_once(struct completion *c)
{
    const struct completion_request *r = &c->asked;
    char *kept;
    size_t size;
    if (!r->memory_write || !receipt_wanted(c->request))
        return STATUS_OK;
    if (r->echo || r->retrieval || r->logprobs >= 0 || r->max_tokens > LIMITS_RECEIPT_TOKENS)
        return error_set_param(&c->err, STATUS_UNSUPPORTED, "Idempotency-Key",
                               "an Idempotency-Key is not taken with \"echo\", \"logprobs\", "
                               "\"retrieval\", or more than %d tokens",
                               LIMITS_RECEIPT_TOKENS);
    enum status status = receipt_begin(c->request, true, &kept, &size, &c->err);
    c->once = !status;
    if (!status && kept)
        status = answer_again(c, kept, size);
    free(kept);
    return status;
}

static enum status submit(struct completion *c, struct part *part)
{
    const struct completion_request *r = &c->asked;
    struct job_generate g = {.memory_write = r->memory_write,
                             .tokens = part->tokens.ids,
                             .token_count = part->tokens.count,
                             .text_bytes = part->text_bytes,
                             .choices = (uint32_t)r->best_of,
                             .max_tokens = (uint32_t)r->max_tokens,
                             .ignore_eos = r->ignore_eos,
                             .echo_logprobs = r->echo && r->logprobs >= 0,
                             .retrieval = r->retrieval};
    memcpy(g.request_id, c->request->id, sizeof g.request_id);
    memcpy(g.memory, r->memory, sizeof g.memory);
    memcpy(g.terms.tenant, c->request->key, sizeof g.terms.tenant);
    if (c->once)
        set_receipt(c, &g);
    generate_fill(&g, r);
    const enum status status = generate_submit(c->server, &g, event_cb, part, &part->job, &c->err);
    if (status) {
        generate_unfill(&g);
        free(g.receipt_head);
    } else {
        part->tokens = (struct tokenizer_tokens){0};
        c->open++;
    }
    return status;
}

/* The prompt's tokens, from its text or as they were given. */
static enum status make_tokens(struct completion *c, struct part *part,
                               const struct completion_prompt *prompt)
{
    const int32_t vocab = (int32_t)engine_get_info(c->server->engine)->config->vocab_size;
    if (c->asked.chat)
        return chat_encode(&c->server->chat, c->asked.messages, c->asked.message_count,
                           c->asked.memory[0] != 0, true, &part->tokens, &part->text_bytes);
    if (prompt->text) {
        part->text_bytes = prompt->text_size;
        return tokenizer_encode(tokenizer_of(c), prompt->text, prompt->text_size, true,
                                &part->tokens);
    }
    if (!prompt->id_count)
        return STATUS_OK;
    part->tokens.ids = malloc(prompt->id_count * sizeof *part->tokens.ids);
    if (!part->tokens.ids)
        return STATUS_NO_MEMORY;
    memcpy(part->tokens.ids, prompt->ids, prompt->id_count * sizeof *prompt->ids);
    part->tokens.count = part->tokens.capacity = prompt->id_count;
    for (size_t i = 0; i < prompt->id_count; i++) {
        size_t size;
        if (prompt->ids[i] >= vocab)
            return error_set_param(&c->err, STATUS_INVALID, "prompt",
                                   "token id %d is not under the vocabulary size %d",
                                   prompt->ids[i], vocab);
        tokenizer_bytes(tokenizer_of(c), prompt->ids[i], &size);
        part->text_bytes += size;
    }
    return STATUS_OK;
}

static enum status prepare_part(struct completion *c, uint32_t index)
{
    struct part *part = &c->parts[index];
    part->completion = c;
    part->index = index;
    part->choices = calloc(c->asked.best_of, sizeof *part->choices);
    if (!part->choices)
        return STATUS_NO_MEMORY;
    const enum status status = make_tokens(c, part, &c->asked.prompts[index]);
    if (status)
        return status;
    const size_t count = part->tokens.count;
    const bool echo_logprobs = c->asked.echo && c->asked.logprobs >= 0;
    if (echo_logprobs && count * (1 + (size_t)c->asked.logprobs) > LIMITS_ECHO_LOGPROBS)
        return error_set_param(&c->err, STATUS_TOO_LARGE, "echo",
                               "\"logprobs\" of a prompt of %zu tokens are too many to echo",
                               count);
    if ((c->asked.echo || c->asked.retrieval) && count) {
        part->prompt = malloc(count * sizeof *part->prompt);
        if (!part->prompt)
            return STATUS_NO_MEMORY;
        memcpy(part->prompt, part->tokens.ids, count * sizeof *part->prompt);
        part->prompt_count = count;
    }
    return STATUS_OK;
}

/* On the pool: the body may be long, and its tokens many. */
static void prepare(uv_work_t *work)
{
    struct completion *c = work->data;
    const struct buf *body = &c->request->body;
    c->status = c->request->handler == &handle_chat
                    ? completion_request_parse_chat(body->data, body->size, &c->asked, &c->err)
                    : completion_request_parse(body->data, body->size, &c->asked, &c->err);
    if (!c->status)
        c->status = generate_check(c->request, &c->asked, &c->err);
    if (c->status)
        return;
    c->parts = calloc(c->asked.prompt_count, sizeof *c->parts);
    if (!c->parts)
        c->status = STATUS_NO_MEMORY;
    for (size_t i = 0; i < c->asked.prompt_count && !c->status; i++)
        c->status = prepare_part(c, (uint32_t)i);
}

static void prepared(uv_work_t *work, int cancelled)
{
    struct completion *c = work->data;
    (void)cancelled;
    c->request->wants_stream = c->asked.stream;
    if (!c->status && !c->gone)
        c->status = begin_once(c);
    for (size_t i = 0; i < c->asked.prompt_count && !c->status && !c->gone && !c->is_old; i++) {
        const enum status status = submit(c, &c->parts[i]);
        if (status)
            end_early(c, status);
    }
    if (!c->open)
        finish(c);
}

static void complete(struct request *request)
{
    struct completion *c = calloc(1, sizeof *c);
    if (!c) {
        request_fail(request, STATUS_NO_MEMORY, NULL);
        return;
    }
    c->request = request;
    c->server = request->server;
    server_new_id(request->handler == &handle_chat ? "chatcmpl-" : "cmpl-", c->id);
    c->created = (int64_t)time(NULL);
    c->began_ns = request->began_ns;
    request->state = c;
    request->gone_cb = gone;
    request_hold(request);
    c->work.data = c;
    uv_queue_work(c->server->loop, &c->work, prepare, prepared);
}

const struct request_handler handle_completions = {
    .name = "completions", .body_limit = LIMITS_JSON_BODY_BYTES, .end_cb = complete};
const struct request_handler handle_chat = {
    .name = "chat", .body_limit = LIMITS_JSON_BODY_BYTES, .end_cb = complete};
