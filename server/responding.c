/* responding.c - see responding.h. */
#include "server/responding.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/base/assert.h"
#include "proto/base/log.h"
#include "proto/json.h"
#include "server/receipt.h"
#include "server/responding_private.h"

enum watch {
    WATCH_ANSWER, /* the creator's: a failure is an error */
    WATCH_END,    /* whatever it is */
    WATCH_EVENTS
};

struct watcher {
    struct list node;
    struct responding *responding;
    struct request *request;
    enum watch watch;
    uint64_t next;   /* event */
    bool is_creator; /* when it goes, so does a response that is not in the background */
    bool gone;
};

static const struct tokenizer *tokenizer_of(const struct responding *r)
{
    return engine_tokenizer(r->server->engine);
}

static void destroy(struct responding *r)
{
    list_remove(&r->node);
    place_close(&r->place);
    for (size_t i = 0; r->texts && i <= r->asked.input.count; i++)
        buf_close(&r->texts[i]);
    free(r->texts);
    free(r->items);
    buf_close(&r->bytes);
    tokenizer_tokens_close(&r->prompt);
    tokenizer_tokens_close(&r->kept_prompt);
    free(r->generated);
    free(r->receipt_head);
    citations_close(&r->citations);
    response_close(&r->response);
    response_request_close(&r->asked);
    free(r);
}

/* ---- watchers ---- */

static void drop_watcher(struct watcher *watcher)
{
    struct request *request = watcher->request;
    list_remove(&watcher->node);
    free(watcher);
    request_done(request);
}

static void watcher_gone(struct request *request)
{
    struct watcher *watcher = request->state;
    struct responding *r = watcher->responding;
    watcher->gone = true; /* it is dropped where nothing can be using it */
    if (watcher->is_creator && !r->asked.background && r->job)
        job_cancel(r->job);
}

static struct watcher *watch(struct responding *r, struct request *request, enum watch kind,
                             uint64_t next)
{
    struct watcher *watcher = calloc(1, sizeof *watcher);
    ASSERT(watcher);
    *watcher = (struct watcher){
        .responding = r, .request = request, .watch = kind, .next = next, .gone = request->gone};
    request->state = watcher;
    request->gone_cb = watcher_gone;
    request_hold(request);
    list_push_back(&r->watchers, &watcher->node);
    return watcher;
}

static void send_events(struct watcher *watcher)
{
    const struct response *response = &watcher->responding->response;
    const uint64_t count = response_event_count(response);
    struct buf *events = &watcher->responding->server->event;
    if (watcher->gone)
        return;
    events->size = 0;
    for (; watcher->next < count; watcher->next++)
        response_append_event(response, watcher->next, events);
    if (!watcher->request->streaming)
        request_stream_begin(watcher->request);
    request_stream_write(watcher->request, events->data, events->size);
}

static void drop_gone(struct responding *r)
{
    LIST_EACH_SAFE(node, &r->watchers)
    {
        struct watcher *watcher = LIST_ENTRY(node, struct watcher, node);
        if (watcher->gone)
            drop_watcher(watcher);
    }
}

/* The events that are new go out to all who watch them. */
static void notify(struct responding *r)
{
    LIST_EACH(node, &r->watchers)
    {
        struct watcher *watcher = LIST_ENTRY(node, struct watcher, node);
        if (watcher->watch == WATCH_EVENTS)
            send_events(watcher);
    }
    drop_gone(r);
}

static void answer_object(struct request *request, const struct response *response)
{
    struct buf body;
    buf_init(&body);
    response_append_object(response, &body);
    request_answer_json(request, 200, &body);
    buf_close(&body);
}

/* It is over. A creator who has heard nothing yet hears of a failure as of any other. */
static void tell_end(struct responding *r, struct watcher *watcher)
{
    struct request *request = watcher->request;
    const bool failed = r->status && watcher->is_creator && !request->streaming;
    if (watcher->gone)
        return;
    if (failed) {
        request_fail(request, r->status, &r->err);
    } else if (watcher->watch == WATCH_EVENTS) {
        send_events(watcher);
        request_stream_end(request);
    } else {
        answer_object(request, &r->response);
    }
}

static void finish(struct responding *r)
{
    struct metrics *m = &r->server->metrics;
    m->prompt_tokens += r->response.input_tokens;
    m->cached_tokens += r->response.cached_tokens;
    m->completion_tokens += r->response.output_tokens;
    if (!r->status && !r->only_counts)
        metrics_observe(&m->whole, (double)(uv_hrtime() - r->began_ns) * 1e-9);
    if (r->first_token_ns)
        metrics_observe(&m->first_token, (double)(r->first_token_ns - r->began_ns) * 1e-9);
    r->response.status = r->end;
    list_remove(&r->node); /* who looks for it now finds it in storage */
    while (!list_empty(&r->watchers)) {
        struct watcher *watcher = LIST_ENTRY(r->watchers.next, struct watcher, node);
        tell_end(r, watcher);
        drop_watcher(watcher);
    }
    destroy(r);
}

void responding_watch_events(struct responding *responding, struct request *request, uint64_t from)
{
    struct watcher *watcher = watch(responding, request, WATCH_EVENTS, from);
    request->wants_stream = true;
    send_events(watcher);
}

void responding_watch_end(struct responding *responding, struct request *request)
{
    watch(responding, request, WATCH_END, 0);
}

struct responding *responding_find(const struct request *request, const char *id)
{
    LIST_EACH(node, &request->server->responses)
    {
        struct responding *r = LIST_ENTRY(node, struct responding, node);
        const bool is_known = r->acknowledged || (r->asked.store && r->response.begun);
        if (is_known && strcmp(r->response.id, id) == 0 && strcmp(r->key, request->key) == 0)
            return r;
    }
    return NULL;
}

void responding_cancel(struct responding *responding)
{
    if (responding->job)
        job_cancel(responding->job);
    else if (!responding->status) /* between two jobs: the next one is not begun */
        responding->status = STATUS_CANCELLED;
}

/* ---- the end ---- */

/* The object as it will be kept: with the end that the response has once this is on disk. */
static void fill_object(struct responding *r)
{
    struct storage_object *object = &r->object;
    const enum response_status now = r->response.status;
    r->bytes.size = 0;
    r->response.status = r->end;
    response_encode(&r->response, &r->bytes);
    r->response.status = now;
    *object = (struct storage_object){
        .created_at = r->response.created_at, .bytes = r->bytes.data, .size = r->bytes.size};
    memcpy(object->id, r->response.id, sizeof object->id);
    memcpy(object->tenant, r->key, sizeof object->tenant);
    r->keep = (struct storage_keep){.object = object};
}

static void end_stored(struct wait *wait)
{
    struct responding *r = LIST_ENTRY(wait, struct responding, wait);
    if (wait->status)
        log_event(LOG_ERROR, "the end of a response is not stored", "response", LOG_STR,
                  r->response.id, "status", LOG_STR, status_text(wait->status), NULL);
    finish(r);
}

/* It failed, or was cancelled. One that somebody has heard of is stored as such. */
static void fail(struct responding *r, enum status status)
{
    struct response *response = &r->response;
    r->status = status;
    if (!r->err.message[0])
        error_set(&r->err, status, "%s", status_text(status));
    snprintf(response->error_code, sizeof response->error_code, "%s", status_code(status));
    snprintf(response->error_message, sizeof response->error_message, "%s", r->err.message);
    r->end = status == STATUS_CANCELLED ? RESPONSE_CANCELLED : RESPONSE_FAILED;
    const bool is_known = r->acknowledged || (r->asked.base.stream && response->begun);
    if (!r->asked.store || (!is_known && !r->placed)) {
        finish(r);
        return;
    }
    r->wait.server = r->server;
    wait_for_write(&r->wait, end_stored);
    if (is_known) {
        fill_object(r);
        if (!r->placed)
            r->keep.lists[0] = (struct storage_list){response->id, r->items, r->asked.input.count};
        status = storage_put(r->server->storage, &r->keep, wait_stored_cb, &r->wait);
    } else { /* refused before anybody heard of it */
        status = storage_object_delete(r->server->storage, response->id, false, wait_stored_cb,
                                       &r->wait);
    }
    if (status)
        wait_refused(&r->wait, status);
}

static void complete(struct responding *r)
{
    r->place.lasts = r->place.is_fork && r->writes;
    finish(r);
}

/* ---- what is kept with the turn ---- */

/* The token at `index` behind the place where its job began: replayed, prompt, or answer. */
static int32_t own_token(const struct responding *r, uint64_t index)
{
    if (index < r->place.replay_count)
        return r->place.replay[index] & ~STORAGE_TOKEN_MARK;
    index -= r->place.replay_count;
    if (index < r->prompt.count)
        return r->prompt.ids[index];
    index -= r->prompt.count;
    return index < r->generated_count ? r->generated[index] : -1;
}

static void append_citation(struct responding *r, const struct citation *span)
{
    const uint64_t s = engine_get_info(r->server->engine)->config->chunk_tokens;
    const uint64_t from = span->chunk * s, before = r->place.stands;
    struct buf json, text;
    buf_init(&json);
    buf_init(&text);
    int32_t tokens[LIMITS_CHUNK_TOKENS];
    size_t stored = from >= before ? 0 : before - from < s ? (size_t)(before - from) : (size_t)s;
    if (stored && storage_read_tokens(r->server->storage, r->place.memory, from, stored, tokens))
        memset(tokens, -1, sizeof tokens); /* it is only not shown */
    for (size_t i = 0; i < s; i++) {
        size_t size = 0;
        const int32_t token = i < stored ? tokens[i] : own_token(r, from + i - before);
        const char *bytes = token < 0 ? "" : tokenizer_bytes(tokenizer_of(r), token, &size);
        if (size)
            buf_append(&text, bytes, size);
    }
    buf_append_format(&json,
                      "{\"type\":\"memory_citation\",\"start_index\":%zu,\"end_index\":%zu,"
                      "\"chunk\":%llu,\"weight\":%.6g,\"token_start\":%llu,\"token_end\":%llu,"
                      "\"text\":",
                      span->begin, span->end, (unsigned long long)span->chunk,
                      span->weight / span->tokens, (unsigned long long)from,
                      (unsigned long long)(from + s));
    json_append_string(&json, buf_text(&text), text.size);
    buf_append_text(&json, "}");
    response_add_annotation(&r->response, &json);
    buf_close(&json);
    buf_close(&text);
}

/* The answer is there: what the response will be once that is on disk, and what is put there. */
static void fill_keep(struct responding *r)
{
    struct response *response = &r->response;
    const size_t count = r->asked.input.count;
    for (size_t i = 0; i < r->citations.count && !r->keeping; i++)
        append_citation(r, &r->citations.spans[i]);
    response->completed_at = (int64_t)time(NULL);
    if (r->writes)
        memcpy(response->memory, r->place.memory, sizeof response->memory);
    if (!r->keeping) { /* a second time it is there already */
        response_append_item(response, r->end, &r->texts[count]);
        responding_set_item(&r->items[count], response->item, &r->texts[count]);
    }
    fill_object(r);
    if (r->asked.store) {
        memcpy(r->object.memory, r->place.memory, sizeof r->object.memory);
        r->object.made_memory = r->place.is_fork || r->made_memory;
    } else {
        r->keep.object = NULL;
    }
    if (r->asked.store && !r->asked.background) /* else its input was put before */
        r->keep.lists[0] = (struct storage_list){response->id, r->items, count};
    if (r->asked.conversation[0])
        r->keep.lists[1] = (struct storage_list){r->place.memory, r->items, count + 1};
}

/* ---- the job ---- */

static void submit(struct responding *r);
static void fork_place(struct responding *r);

static void take_token(struct responding *r, const struct event *event)
{
    struct answer_logprobs logprobs;
    struct response *response = &r->response;
    if (!r->first_token_ns)
        r->first_token_ns = uv_hrtime();
    response->output_tokens++;
    if (r->generated_count == r->generated_capacity) {
        r->generated_capacity = r->generated_capacity ? 2 * r->generated_capacity : 64;
        r->generated = realloc(r->generated, r->generated_capacity * sizeof *r->generated);
        ASSERT(r->generated);
    }
    r->generated[r->generated_count++] = event->token;
    size_t size;
    tokenizer_bytes(tokenizer_of(r), event->token, &size);
    r->generated_bytes += size;
    const size_t begin = r->characters;
    r->characters += generate_characters(event->text, event->text_size);
    if (event->pick_count)
        citations_add(&r->citations, event->picks, event->pick_count, begin, r->characters);
    answer_logprobs_init(&logprobs);
    if (r->asked.base.logprobs >= 0)
        generate_add_logprob(tokenizer_of(r), &logprobs, true, event->token, (double)event->logprob,
                             event->tops, event->top_count, 0);
    if (event->text_size || logprobs.count)
        response_add_step(response, event->text, event->text_size, &logprobs.tokens);
    answer_logprobs_close(&logprobs);
    if (response->text.size + response->logprobs.size > LIMITS_ANSWER_BYTES && !r->status) {
        r->status = error_set(&r->err, STATUS_TOO_LARGE, "the answer has grown past %zu MiB",
                              LIMITS_ANSWER_BYTES / LIMITS_MIB);
        job_cancel(r->job);
    }
    notify(r);
}

static void job_done(struct responding *r, const struct event *event)
{
    const enum status status = r->status ? r->status : event->status;
    r->job = NULL;
    if (status == STATUS_CONFLICT && r->goes_on && !r->place.is_fork) {
        fork_place(r); /* its memory went on meanwhile */
    } else if (status) {
        if (event->error && !r->err.message[0])
            r->err = *event->error;
        fail(r, status);
    } else if (r->writes && !r->keeping && r->asked.instructions) {
        fill_keep(r);
        r->keeping = true;
        submit(r);
    } else {
        complete(r);
    }
}

static void event_cb(void *context, const struct event *event)
{
    struct responding *r = context;
    struct response *response = &r->response;
    const bool has_base = r->place.position > 0;
    if (event->kind == EVENT_DONE) {
        job_done(r, event);
    } else if (r->keeping) {
        return; /* the answer was given; what is written now says nothing new */
    } else if (event->kind == EVENT_STARTED) {
        response->begun = true;
        response->status = RESPONSE_IN_PROGRESS;
        response->cached_tokens = has_base ? r->place.position : event->cached_tokens;
        response->input_tokens = has_base ? r->place.position + r->prompt.count
                                          : event->cached_tokens + event->prompt_tokens;
        notify(r);
    } else if (event->kind == EVENT_TOKEN) {
        take_token(r, event);
    } else if (event->kind == EVENT_FINISHED) {
        r->end = event->finish_reason == FINISH_LENGTH ? RESPONSE_INCOMPLETE : RESPONSE_COMPLETED;
        if (r->writes && r->asked.instructions)
            return; /* what is written comes after it */
        fill_keep(r);
        if (r->writes)
            job_go_on(r->job);
    }
}

/* A memory that is there for responses ends so long after its last use; 0: never. */
static int64_t response_seconds(const struct responding *r)
{
    return (int64_t)r->server->config->response_days * 86400;
}

/* The job that answers; or, for an answer with instructions, the one that writes the turn as the
 * memory shall have it. */
static enum status submit_job(struct responding *r)
{
    const bool writes = r->writes && (r->keeping || !r->asked.instructions);
    const bool is_there = r->place.memory[0] && !r->place.is_new;
    struct job_generate g = {
        .memory_write = writes,
        .has_at = is_there,
        .at = r->place.stands,
        .settles = writes && r->place.is_fork,
        .makes = writes && r->place.is_new,
        .expires_s = response_seconds(r),
        .keep = writes ? &r->keep : NULL,
        .waits = writes && !r->keeping,
        .choices = 1,
        .text_bytes = r->place.replay_bytes +
                      (r->keeping ? r->kept_bytes + r->generated_bytes : r->prompt_bytes),
        .max_tokens = r->keeping ? 0 : (uint32_t)r->asked.base.max_tokens,
        .ignore_eos = r->asked.base.ignore_eos,
        .retrieval = !r->keeping && r->asked.base.retrieval};
    if (r->keeping)
        g.tokens = place_tokens(&r->place, &r->kept_prompt, r->generated, r->generated_count,
                                &g.token_count);
    else
        g.tokens = place_tokens(&r->place, &r->prompt, NULL, 0, &g.token_count);
    if (!g.tokens)
        return STATUS_NO_MEMORY;
    memcpy(g.request_id, r->request_id, sizeof g.request_id);
    if (is_there || g.makes)
        memcpy(g.memory, r->place.memory, sizeof g.memory);
    memcpy(g.terms.tenant, r->key, sizeof g.terms.tenant);
    if (writes && r->has_receipt) {
        g.has_receipt = true;
        memcpy(g.receipt, r->receipt, sizeof g.receipt);
        g.receipt_head = strdup(r->receipt_head);
        ASSERT(g.receipt_head);
    }
    generate_fill(&g, &r->asked.base);
    const enum status status = generate_submit(r->server, &g, event_cb, r, &r->job, &r->err);
    if (status) {
        generate_unfill(&g);
        free(g.receipt_head);
        free(g.tokens);
    }
    return status;
}

/* A background one is on disk, and in the queue: its client hears of it. */
static void acknowledge(struct responding *r)
{
    struct watcher *watcher = LIST_ENTRY(r->watchers.next, struct watcher, node);
    r->acknowledged = true;
    if (list_empty(&r->watchers))
        return;
    if (watcher->watch == WATCH_EVENTS) {
        notify(r);
        return;
    }
    if (!watcher->gone)
        answer_object(watcher->request, &r->response);
    drop_watcher(watcher);
}

/* Whether the one who asked is still there, or need not be. */
static bool is_wanted(struct responding *r)
{
    drop_gone(r);
    return r->asked.background || !list_empty(&r->watchers);
}

static void submit(struct responding *r)
{
    enum status status = r->status;
    if (!status && !is_wanted(r))
        status = STATUS_CANCELLED;
    if (!status)
        status = submit_job(r);
    if (status)
        fail(r, status);
    else if (r->asked.background && !r->acknowledged)
        acknowledge(r);
}

static void forked(struct place *place, enum status status)
{
    struct responding *r = LIST_ENTRY(place, struct responding, place);
    if (status) {
        r->err = place->err;
        fail(r, status);
        return;
    }
    if (r->keeping)
        fill_keep(r); /* it names the memory */
    submit(r);
}

static void fork_place(struct responding *r)
{
    r->place.expires = (struct storage_expires){.seconds = response_seconds(r), .from_use = true};
    place_fork(&r->place, r->key, NULL, forked);
}

/* ---- from the request on: in the background ---- */

static void begin(struct responding *r)
{
    if (r->wants_fork && r->place.position) {
        fork_place(r);
        return;
    }
    if (r->wants_fork)
        place_new(&r->place);
    submit(r);
}

static void placeholder_stored(struct wait *wait)
{
    struct responding *r = LIST_ENTRY(wait, struct responding, wait);
    if (wait->status) {
        fail(r, wait->status);
    } else {
        r->placed = true;
        begin(r);
    }
}

/* On disk it stands as what it is if nothing more comes: cut off by the end of the server. */
static void store_placeholder(struct responding *r)
{
    struct response *response = &r->response;
    strcpy(response->error_code, "server_error");
    strcpy(response->error_message, "the server ended before this response was complete");
    response->status = RESPONSE_QUEUED;
    r->end = RESPONSE_FAILED;
    fill_object(r);
    response->error_code[0] = response->error_message[0] = 0;
    r->keep.lists[0] = (struct storage_list){response->id, r->items, r->asked.input.count};
    r->wait.server = r->server;
    wait_for_write(&r->wait, placeholder_stored);
    const enum status status = storage_put(r->server->storage, &r->keep, wait_stored_cb, &r->wait);
    if (status)
        wait_refused(&r->wait, status);
}

/* ---- from the request on: once, and beside others ---- */

/* True: it is answered as when it came before, or refused. */
static bool answer_again(struct responding *r, struct request *request)
{
    struct storage_object object;
    struct response response;
    char *kept = NULL;
    size_t size;
    if (!r->writes || !receipt_wanted(request))
        return false;
    if (r->asked.background || !r->asked.store)
        r->status = error_set_param(&r->err, STATUS_UNSUPPORTED, "Idempotency-Key",
                                    "an Idempotency-Key is not taken with \"background\", or "
                                    "without \"store\"");
    else
        r->status = receipt_begin(request, true, &kept, &size, &r->err);
    if (r->status || !kept) {
        struct buf head;
        buf_init(&head);
        receipt_append_body(request, &head);
        buf_append_format(&head, "%s ", r->response.id);
        r->has_receipt = !r->status;
        memcpy(r->receipt, request->receipt, sizeof r->receipt);
        r->receipt_head = strdup(buf_text(&head));
        ASSERT(r->receipt_head);
        buf_close(&head);
        return false;
    }
    kept[strcspn(kept, " ")] = 0;
    r->status = responding_read(request, kept, &object, &response);
    if (r->status == STATUS_NOT_FOUND)
        error_set(&r->err, r->status, "the response that this Idempotency-Key made was deleted");
    free(kept);
    if (r->status)
        return false;
    responding_answer(request, &response, r->asked.base.stream, 0);
    storage_object_close(&object);
    response_close(&response);
    return true;
}

/* Another that writes to the same memory: one that goes on from a response becomes a fork, as if it
 * had come later. */
static void look_around(struct responding *r)
{
    LIST_EACH(node, &r->server->responses)
    {
        const struct responding *other = LIST_ENTRY(node, struct responding, node);
        if (other == r || !other->writes || !r->writes || r->wants_fork ||
            strcmp(other->place.memory, r->place.memory) != 0)
            continue;
        if (r->goes_on)
            r->wants_fork = true;
        else
            r->status = error_set(&r->err, STATUS_CONFLICT,
                                  "memory %s is being written by another request; try again when "
                                  "it is done",
                                  r->place.memory);
    }
}

static void answer_count(struct responding *r)
{
    struct watcher *watcher = LIST_ENTRY(r->watchers.next, struct watcher, node);
    struct buf body;
    buf_init(&body);
    buf_append_format(&body, "{\"object\":\"response.input_tokens\",\"input_tokens\":%llu}",
                      (unsigned long long)(r->place.position + r->prompt.count));
    request_answer_json(watcher->request, 200, &body);
    buf_close(&body);
    watcher->gone = true; /* it needs no other answer */
    finish(r);
}

static void prepared(uv_work_t *work, int cancelled)
{
    struct responding *r = work->data;
    struct watcher *watcher = LIST_ENTRY(r->watchers.next, struct watcher, node);
    (void)cancelled;
    r->creator = NULL;
    if (!r->only_counts)
        list_push_back(&r->server->responses, &r->node);
    if (r->asked.base.stream && !r->only_counts) {
        watcher->watch = WATCH_EVENTS;
        watcher->request->wants_stream = true;
    }
    r->response.background = r->asked.background;
    if (!r->status && watcher->gone)
        r->status = STATUS_CANCELLED;
    if (!r->status && r->only_counts) {
        answer_count(r);
        return;
    }
    if (!r->status && answer_again(r, watcher->request)) {
        watcher->gone = true;
        finish(r);
        return;
    }
    if (!r->status)
        look_around(r);
    if (r->status) {
        r->asked.store = false; /* nothing was begun */
        fail(r, r->status);
    } else if (r->asked.background) {
        store_placeholder(r);
    } else {
        begin(r);
    }
}

void responding_create(struct request *request, bool only_counts)
{
    struct responding *r = calloc(1, sizeof *r);
    if (!r) {
        request_fail(request, STATUS_NO_MEMORY, NULL);
        return;
    }
    r->server = r->place.server = request->server;
    r->creator = request;
    r->only_counts = only_counts;
    list_init(&r->watchers);
    list_init(&r->node);
    memcpy(r->key, request->key, sizeof r->key);
    memcpy(r->request_id, request->id, sizeof r->request_id);
    response_init(&r->response);
    server_new_id("resp_", r->response.id);
    server_new_id("msg_", r->response.item);
    r->response.created_at = (int64_t)time(NULL);
    r->response.status = RESPONSE_IN_PROGRESS;
    r->began_ns = request->began_ns;
    watch(r, request, WATCH_ANSWER, 0)->is_creator = true;
    r->work.data = r;
    uv_queue_work(r->server->loop, &r->work, responding_prepare, prepared);
}

void responding_answer(struct request *request, const struct response *response, bool stream,
                       uint64_t from)
{
    if (!stream || strcmp(request->head->method, "HEAD") == 0) {
        answer_object(request, response);
        return;
    }
    struct buf events;
    buf_init(&events);
    for (uint64_t i = from; i < response_event_count(response); i++)
        response_append_event(response, i, &events);
    request_stream_begin(request);
    request_stream_write(request, events.data, events.size);
    request_stream_end(request);
    buf_close(&events);
}
