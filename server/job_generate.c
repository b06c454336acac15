/* job_generate.c - a prompt and what follows it: open or fork the memory, prefill, sample, commit.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "proto/base/assert.h"
#include "server/engine_thread_private.h"

#define WRITTEN_TOKENS 4096 /* of an answer, for which there is room from the start */

static const struct tokenizer *tokenizer_of(const struct job *job)
{
    return engine_tokenizer(job->thread->engine);
}

/* ---- opening ---- */

void job_generate_begin(struct job *job)
{
    struct sequence *first = &job->sequences[0];
    job->cached = engine_session_position(first->session);
    if (!job->generate.token_count && !engine_session_has_logits(first->session)) {
        job_fail(job, STATUS_INVALID,
                 "the prompt is empty, and there is nothing before it to go on from");
        return;
    }
    job->state = JOB_PREFILL;
    const struct event event = {.kind = EVENT_STARTED,
                                .prompt_tokens = job->generate.token_count - job->resumed,
                                .cached_tokens = job->cached,
                                .resumed_tokens = job->resumed,
                                .tokens_total = job->generate.token_count};
    job_post(job, &event);
}

/* A fork of the session of the memory that is asked. That comes to RAM for it, and stays there for
 * whoever asks next, as far as the budget allows. STATUS_CONFLICT: it is being written to, or
 * stands elsewhere than at `position` by now. */
static enum status fork_memory(struct job *job, struct sequence *s, uint64_t position,
                               struct error *err)
{
    struct live_memory *memory;
    enum status status = live_memory_open(job->thread, job->generate.memory, job, &memory, err);
    if (status)
        return status;
    status = memory->position == position
                 ? engine_session_fork(memory->session, s->branch, &s->session)
                 : STATUS_CONFLICT;
    live_memory_release(job->thread, memory);
    return status;
}

/* The session of an ephemeral memory that storage has just made. */
static enum status open_ephemeral(struct job *job, struct sequence *s, struct error *err)
{
    struct engine_thread *thread = job->thread;
    struct storage_memory record;
    enum status status = storage_memory_get(thread->storage, s->id, &record);
    if (status)
        return error_set(err, status, "%s", status_text(status));
    s->branch = record.branch;
    if (job->generate.has_at && record.token_count != job->generate.at) {
        storage_memory_close(&record);
        return error_set(err, STATUS_CONFLICT, "memory %s went on in another request",
                         job->generate.memory);
    }
    const bool named = job->generate.memory[0];
    uint64_t position = record.token_count;
    if (!named || fork_memory(job, s, position, err)) {
        const struct live_memory *live =
            named ? live_memory_find(thread, job->generate.memory) : NULL;
        const char *reason = !named ? "prefix" : live && live->user ? "in_use" : "other_position";
        status = live_memory_load(job, s->id, reason, &position, &s->session, err);
    }
    storage_memory_close(&record);
    return status;
}

static void ephemeral_made(struct reply *reply, enum status status)
{
    struct job *job = reply->context;
    struct sequence *s = &job->sequences[0];
    reply_free(reply);
    job->pending--;
    if (status) {
        s->id[0] = 0;
        job_fail(job, status, status == STATUS_NOT_FOUND ? "no memory named %s" : "%.0s%s",
                 job->generate.memory, status_text(status));
        return;
    }
    if (job->state != JOB_OPENING)
        return; /* cancelled meanwhile */
    struct error err = {0};
    status = open_ephemeral(job, s, &err);
    if (job->prefix_from && (status || !job_prefix_take(job, s->id, s->session))) {
        if (s->session)
            engine_session_destroy(s->session);
        s->session = NULL;
        live_memory_delete_ephemeral(job->thread, s->id);
        job_generate_open_empty(job);
    } else if (status) {
        job_fail(job, status, "%s", err.message);
    } else {
        job_generate_begin(job);
    }
}

/* Asks storage for an ephemeral memory under s->id, empty or a fork of `from` at `at` (0: as it
 * stands). */
static void make_ephemeral(struct job *job, struct sequence *s, const char *from, uint64_t at,
                           void (*made_cb)(struct reply *reply, enum status status))
{
    struct reply *reply = reply_create(job->thread, made_cb, job);
    if (!reply) {
        job_fail(job, STATUS_NO_MEMORY, "out of memory");
        return;
    }
    live_memory_new_id("ephemeral_", s->id);
    const struct storage_memory_options options = {
        .id = s->id, .from = from, .at = at, .ephemeral = true};
    const enum status status =
        storage_memory_create(job->thread->storage, &options, reply_done_cb, reply);
    if (status) {
        s->id[0] = 0;
        reply_cancel(reply);
        job_fail(job, status, "%s", status_text(status));
        return;
    }
    job->pending++;
}

void job_generate_open_empty(struct job *job)
{
    make_ephemeral(job, &job->sequences[0], NULL, 0, ephemeral_made);
}

static enum status init_sequence(struct job *job, uint32_t index)
{
    const struct job_generate *g = &job->generate;
    struct sequence *s = &job->sequences[index];
    s->job = job;
    s->index = index;
    tokenizer_decoder_init(&s->decoder);
    struct sampler_params params = g->sampling;
    params.seed += index;
    const int32_t vocab = (int32_t)engine_get_info(job->thread->engine)->config->vocab_size;
    enum status status = sampler_create(&params, vocab, &s->sampler);
    for (size_t i = 0; !status && i < g->token_count; i++)
        sampler_observe(s->sampler, g->tokens[i]);
    if (!status && g->stop_count)
        status = sampler_stop_create((const char *const *)g->stop, g->stop_sizes, g->stop_count,
                                     &s->stop);
    return status;
}

static enum status take_echo_memory(struct job *job)
{
    const struct job_generate *g = &job->generate;
    const size_t slice = engine_get_info(job->thread->engine)->slice_tokens;
    const size_t tops = g->sampling.top_logprobs;
    job->echo = malloc(g->token_count * sizeof *job->echo);
    job->echo_tops = calloc(g->token_count * tops + 1, sizeof *job->echo_tops);
    job->targets = malloc(slice * sizeof *job->targets);
    job->slice_logprobs = malloc(slice * sizeof *job->slice_logprobs);
    job->slice_tops = malloc((slice * tops + 1) * sizeof *job->slice_tops);
    if (!job->echo || !job->echo_tops || !job->targets || !job->slice_logprobs || !job->slice_tops)
        return STATUS_NO_MEMORY;
    job->echo[0] = NAN;
    return STATUS_OK;
}

/* Notes the marks of the prompt's tokens and takes them off. */
static enum status take_marks(struct job *job)
{
    struct job_generate *g = &job->generate;
    size_t count = 0;
    for (size_t i = 0; i < g->token_count; i++)
        count += (g->tokens[i] & STORAGE_TOKEN_MARK) != 0;
    job->marks = malloc((count + 1) * sizeof *job->marks);
    if (!job->marks)
        return STATUS_NO_MEMORY;
    for (size_t i = 0; i < g->token_count; i++) {
        if (g->tokens[i] & STORAGE_TOKEN_MARK)
            job->marks[job->mark_count++] = i;
        g->tokens[i] &= ~STORAGE_TOKEN_MARK;
    }
    return STATUS_OK;
}

void job_generate_start(struct job *job)
{
    const struct job_generate *g = &job->generate;
    enum status status = take_marks(job);
    job->sequences = status ? NULL : calloc(g->choices, sizeof *job->sequences);
    if (!job->sequences) {
        status = STATUS_NO_MEMORY;
    } else {
        job->sequence_count = 1;
        status = init_sequence(job, 0);
    }
    if (!status && g->echo_logprobs && g->token_count)
        status = take_echo_memory(job);
    if (status) {
        job_fail(job, status, "%s", status_text(status));
        return;
    }
    job_generate_open(job);
}

void job_generate_open(struct job *job)
{
    const struct job_generate *g = &job->generate;
    if (g->makes) {
        job_prefix_make(job);
        return;
    }
    if (!g->memory_write) {
        uint64_t at = 0;
        const char *from = g->memory[0] ? g->memory : NULL;
        if (job_prefix_start(job, &at))
            return;
        if (job->prefix_from)
            from = job->prefix_from->id;
        make_ephemeral(job, &job->sequences[0], from, at, ephemeral_made);
        return;
    }
    struct error err = {0};
    struct live_memory *memory;
    const enum status status = live_memory_open(job->thread, g->memory, job, &memory, &err);
    if (status) {
        job_fail(job, status, "%s", err.message);
        return;
    }
    if (g->has_at && memory->position != g->at) {
        live_memory_release(job->thread, memory);
        job_fail(job, STATUS_CONFLICT, "memory %s went on in another request", g->memory);
        return;
    }
    job->memory = memory;
    job->start_text_bytes = memory->text_bytes;
    job->sequences[0].session = memory->session;
    job_generate_begin(job);
}

/* ---- the end: commit, or just be done ---- */

static void finish_ok(struct job *job)
{
    if (!job->decoded_ns)
        job->decoded_ns = engine_thread_now_ns();
    job_finish(job);
}

static void turn_committed(struct reply *reply, enum status status)
{
    struct job *job = reply->context;
    reply_free(reply);
    job->pending--;
    if (status) {
        job_fail(job, status, "the turn could not be stored: %s", status_text(status));
        return;
    }
    job->memory->position = engine_session_position(job->memory->session);
    job->memory->text_bytes =
        job->start_text_bytes + job->generate.text_bytes + job->written_text_bytes;
    if (job->generate.makes)
        job_prefix_leave(job);
    finish_ok(job);
}

/* What was answered, for whoever asks again. */
static void make_receipt(const struct job *job, struct storage_receipt *receipt, struct buf *answer)
{
    const struct job_generate *g = &job->generate;
    buf_append_format(answer, "%s%d %zu %llu %u\n", g->receipt_head, (int)job->finish_reason,
                      g->token_count, (unsigned long long)job->cached, job->completion_tokens);
    if (job->said.size)
        buf_append(answer, job->said.data, job->said.size);
    memcpy(receipt->name, g->receipt, sizeof receipt->name);
    receipt->bytes = answer->data;
    receipt->size = answer->size;
}

int32_t job_generate_token(const struct job *job, size_t index)
{
    const struct job_generate *g = &job->generate;
    return index < g->token_count ? g->tokens[index] : job->written[index - g->token_count];
}

void *job_snapshot(struct engine_thread *thread, const struct engine_session *session, size_t *size)
{
    struct engine_thread_stats *counted = &thread->counted;
    const bool rounded = engine_session_is_rounded(session);
    *size = engine_session_snapshot_bytes(session);
    void *snapshot = malloc(*size);
    if (!snapshot)
        return NULL;
    engine_session_snapshot(session, snapshot);
    *(rounded ? &counted->snapshots_rounded : &counted->snapshots_full) += 1;
    *(rounded ? &counted->snapshot_rounded_bytes : &counted->snapshot_full_bytes) += *size;
    return snapshot;
}

enum status job_generate_commit(struct job *job, const char *id,
                                const struct engine_session *session, size_t from, size_t to,
                                uint64_t text_bytes, struct reply *reply)
{
    const struct job_generate *g = &job->generate;
    size_t size;
    void *snapshot = job_snapshot(job->thread, session, &size);
    int32_t *tokens = malloc((to - from + 1) * sizeof *tokens);
    enum status status = STATUS_NO_MEMORY;
    if (snapshot && tokens) {
        for (size_t i = from; i < to; i++)
            tokens[i - from] = job_generate_token(job, i);
        for (size_t i = 0; i < job->mark_count; i++)
            if (job->marks[i] >= from && job->marks[i] < to)
                tokens[job->marks[i] - from] |= STORAGE_TOKEN_MARK;
        if (to > from && engine_session_is_rounded(session))
            tokens[to - from - 1] |= STORAGE_TOKEN_MARK;
        struct storage_receipt receipt;
        struct buf answer;
        buf_init(&answer);
        if (g->has_receipt)
            make_receipt(job, &receipt, &answer);
        const struct storage_commit write = {.id = id,
                                             .receipt = g->has_receipt ? &receipt : NULL,
                                             .position = engine_session_position(session),
                                             .tokens = tokens,
                                             .token_count = to - from,
                                             .text_bytes = text_bytes,
                                             .snapshot = snapshot,
                                             .snapshot_bytes = size,
                                             .takes_snapshot = true,
                                             .keep = g->keep,
                                             .settles = g->settles || g->makes};
        status = storage_commit(job->thread->storage, &write, reply_done_cb, reply);
        buf_close(&answer);
    }
    if (status)
        free(snapshot);
    free(tokens);
    return status;
}

/* Everything is generated and consumed: writes the turn to its memory, if it has one. */
static void finish_turn(struct job *job)
{
    if (!job->decoded_ns)
        job->decoded_ns = engine_thread_now_ns();
    if (job->prefix)
        job_prefix_finish(job);
    if (!job->memory || job->prefix || !(job->generate.token_count + job->written_count)) {
        finish_ok(job);
        return;
    }
    if (job->generate.waits && !atomic_load(&job->may_commit))
        return; /* the loop writes what is kept with the turn; build comes by again */
    struct reply *reply = reply_create(job->thread, turn_committed, job);
    enum status status = STATUS_NO_MEMORY;
    /* A memory goes on from what its snapshot holds, whether it stays in RAM or not. */
    engine_session_round(job->memory->session);
    if (reply)
        status = job_generate_commit(
            job, job->memory->id, job->memory->session, job->resumed,
            job->generate.token_count + job->written_count,
            job->start_text_bytes + job->generate.text_bytes + job->written_text_bytes, reply);
    if (!status) {
        job->state = JOB_COMMITTING;
        job->pending++;
        return;
    }
    if (reply)
        reply_cancel(reply);
    if (status != STATUS_BUSY) /* else build comes by again */
        job_fail(job, status, "the turn could not be stored: %s", status_text(status));
}

/* ---- tokens ---- */

/* What ends a turn in the usual chat templates, whichever the model has. */
static const char *const turn_ends[] = {"<|im_end|>",    "<|endoftext|>", "<|eot_id|>",
                                        "<end_of_turn>", "<|end|>",       "</s>"};

static bool ends_turn(const struct job *job, int32_t token)
{
    if (job->generate.ignore_eos)
        return false;
    const struct model_config *c = engine_get_info(job->thread->engine)->config;
    if (token == c->eos_token)
        return true;
    for (size_t i = 0; i < sizeof turn_ends / sizeof *turn_ends; i++)
        if (token == tokenizer_added_id(tokenizer_of(job), turn_ends[i]))
            return true;
    return false;
}

static bool keep_written(struct job *job, int32_t token)
{
    if (job->written_count == job->written_capacity) {
        const size_t most = (size_t)job->generate.max_tokens + 1;
        const size_t begin = most < WRITTEN_TOKENS ? most : WRITTEN_TOKENS;
        const size_t capacity = job->written_capacity ? job->written_capacity * 2 : begin;
        int32_t *grown = realloc(job->written, capacity * sizeof *grown);
        if (!grown)
            return false;
        job->written = grown;
        job->written_capacity = capacity;
    }
    job->written[job->written_count++] = token;
    size_t size;
    tokenizer_bytes(tokenizer_of(job), token, &size);
    job->written_text_bytes += size;
    return true;
}

/* How long the sequence has waited for this token since its last one. */
static void note_gap(struct engine_thread *thread, struct sequence *s)
{
    const uint64_t now = engine_thread_now_ns();
    if (s->token_ns) {
        const double gap = (double)(now - s->token_ns) * 1e-9;
        metrics_observe(&thread->counted.token_gap, gap);
        thread->counted.stalls += gap > thread->options.max_stall;
    }
    s->token_ns = now;
}

/* A token was sampled for `s`: its text goes out as far as no stop string can hold it. */
static void take_token(struct job *job, struct sequence *s, const struct sampler_result *result,
                       const struct engine_pick *picks, uint32_t pick_count)
{
    const struct job_generate *g = &job->generate;
    note_gap(job->thread, s);
    s->token = result->token;
    s->generated++;
    s->logprob_sum += (double)result->logprob;
    job->completion_tokens++;
    if (job->memory && !keep_written(job, s->token)) {
        job_fail(job, STATUS_NO_MEMORY, "out of memory");
        return;
    }
    struct buf *decoded = &job->thread->decoded, *text = &job->thread->text;
    decoded->size = text->size = 0;
    const bool end = ends_turn(job, s->token);
    bool stopped = end;
    if (!end)
        tokenizer_decode(tokenizer_of(job), &s->decoder, s->token, false, decoded);
    const bool last = end || s->generated == g->max_tokens;
    if (last)
        tokenizer_decode_end(&s->decoder, decoded);
    if (s->stop &&
        sampler_stop_feed(s->stop, decoded->data ? decoded->data : "", decoded->size, text))
        stopped = true;
    else if (!s->stop)
        buf_append(text, decoded->data, decoded->size);
    s->finished = stopped || last;
    const bool hit = stopped && !end;
    if (s->finished && s->stop && !hit)
        sampler_stop_flush(s->stop, text);
    if (g->has_receipt && text->size)
        buf_append(&job->said, text->data, text->size);
    const struct event event = {.kind = EVENT_TOKEN,
                                .choice = s->index,
                                .token = s->token,
                                .logprob = result->logprob,
                                .top_count = g->sampling.want_logprobs ? result->top_count : 0,
                                .tops = result->top,
                                .picks = g->retrieval ? picks : NULL,
                                .pick_count = g->retrieval ? pick_count : 0,
                                .text = text->data,
                                .text_size = text->size};
    job_post(job, &event);
    if (!s->finished)
        return;
    job->finish_reason = stopped ? FINISH_STOP : FINISH_LENGTH;
    const struct event finished = {.kind = EVENT_FINISHED,
                                   .choice = s->index,
                                   .finish_reason = stopped ? FINISH_STOP : FINISH_LENGTH,
                                   .stop_index = hit ? 0 : -1,
                                   .cumulative_logprob = s->logprob_sum};
    job_post(job, &finished);
    s->settled = !job->memory || job->prefix; /* a memory also takes in the last token */
}

static void finish_if_settled(struct job *job)
{
    for (uint32_t i = 0; i < job->sequence_count; i++)
        if (!job->sequences[i].settled)
            return;
    if (job->state == JOB_DECODE)
        finish_turn(job);
}

/* ---- several choices: the prompt is committed once, each choice forks it ---- */

static void forks_made(struct job *job)
{
    for (uint32_t i = 1; i < job->generate.choices; i++) {
        struct sequence *s = &job->sequences[i];
        struct storage_memory record;
        enum status status = storage_memory_get(job->thread->storage, s->id, &record);
        if (!status) {
            s->branch = record.branch;
            storage_memory_close(&record);
            status = init_sequence(job, i);
        }
        if (!status)
            status = engine_session_fork(job->sequences[0].session, s->branch, &s->session);
        if (status) {
            job_fail(job, status, "%s", status_text(status));
            return;
        }
    }
    job->state = JOB_DECODE;
}

static void fork_step_done(struct reply *reply, enum status status)
{
    struct job *job = reply->context;
    reply_free(reply);
    job->pending--;
    if (status)
        job_fail(job, status, "%s", status_text(status));
    if (!job->pending && job->state == JOB_FORKING)
        forks_made(job);
}

static void start_forks(struct job *job)
{
    struct sequence *first = &job->sequences[0];
    struct reply *reply = reply_create(job->thread, fork_step_done, job);
    job->state = JOB_FORKING;
    const enum status status =
        reply ? job_generate_commit(job, first->id, first->session, job->resumed,
                                    job->generate.token_count, 0, reply)
              : STATUS_NO_MEMORY;
    if (status) {
        if (reply)
            reply_cancel(reply);
        if (status == STATUS_BUSY)
            job->state = JOB_PREFILL; /* build comes by again */
        else
            job_fail(job, status, "%s", status_text(status));
        return;
    }
    job->pending++;
    job->sequence_count = job->generate.choices;
    for (uint32_t i = 1; i < job->generate.choices && job->state == JOB_FORKING; i++)
        make_ephemeral(job, &job->sequences[i], first->id, 0, fork_step_done);
}

/* ---- prefill ---- */

/* The prompt is in. */
static void prompt_done(struct job *job, const struct engine_step_item *item)
{
    const struct job_generate *g = &job->generate;
    job->prefilled_ns = engine_thread_now_ns();
    if (job->prefix)
        job_prefix_prompt_done(job);
    if (job->echo) {
        const struct event event = {.kind = EVENT_ECHO,
                                    .prompt_tokens = g->token_count,
                                    .echo_top_count = g->sampling.top_logprobs};
        job_post(job, &event);
    }
    if (!g->max_tokens) {
        for (uint32_t i = 0; i < g->choices; i++) {
            const struct event finished = {.kind = EVENT_FINISHED,
                                           .choice = i,
                                           .finish_reason = FINISH_LENGTH,
                                           .stop_index = -1};
            job_post(job, &finished);
        }
        job->finish_reason = FINISH_LENGTH;
        job->sequences[0].finished = job->sequences[0].settled = true;
        job->state = JOB_DECODE;
        finish_turn(job);
    } else if (g->choices > 1) {
        start_forks(job);
    } else {
        job->state = JOB_DECODE;
        take_token(job, &job->sequences[0], &item->result, item->picks, item->pick_count);
        finish_if_settled(job);
    }
}

/* Tokens up to the next mark, or to the prompt's end. */
static size_t left_to_mark(const struct job *job)
{
    const size_t end = job->marks_done < job->mark_count ? job->marks[job->marks_done] + 1
                                                         : job->generate.token_count;
    return end - job->prompt_done;
}

/* What the next slice is, or whether something comes before it. */
static void prepare_prefill(struct job *job)
{
    const struct job_generate *g = &job->generate;
    const size_t left = g->token_count - job->prompt_done;
    if (left) {
        job->entry.rows = job_prefix_slice(
            job, step_slice(job->thread, engine_session_position(job->sequences[0].session),
                            left_to_mark(job)));
        job->entry.rows_left = left;
    } else if (g->max_tokens && g->choices == 1) {
        job->entry.decodes = 1; /* a token from the logits that are there */
    } else if (g->choices > 1 && g->max_tokens && job->prefilled_ns) {
        start_forks(job); /* they found the queue full */
    } else {
        const struct engine_step_item none = {0};
        prompt_done(job, &none);
    }
}

static void build_prefill(struct job *job, uint32_t n, struct step_builder *builder)
{
    const struct job_generate *g = &job->generate;
    struct sequence *s = &job->sequences[0];
    const bool last = n == g->token_count - job->prompt_done;
    const bool sampling = g->max_tokens && g->choices == 1;
    struct engine_step_item item = {.session = s->session,
                                    .tokens = g->tokens + job->prompt_done,
                                    .token_count = n,
                                    /* Whoever goes on from a snapshot may have nothing to add. */
                                    .want_logits = last || job->prefix,
                                    .sampler = last && sampling ? s->sampler : NULL,
                                    .want_picks = last && g->retrieval};
    if (job->echo && n) {
        for (uint32_t i = 0; i < n; i++) {
            const size_t next = job->prompt_done + i + 1;
            job->targets[i] = next < g->token_count ? g->tokens[next] : -1;
        }
        /* Row i scores token i + 1. */
        item.targets = job->targets;
        item.target_top_count = g->sampling.top_logprobs;
        item.target_logprobs = job->slice_logprobs;
        item.target_tops = g->sampling.top_logprobs ? job->slice_tops : NULL;
    }
    step_add(builder, job, s, &item);
}

static void keep_echo(struct job *job, const struct engine_step_item *item)
{
    const size_t tops = job->generate.sampling.top_logprobs;
    for (uint32_t i = 0; job->echo && i < item->token_count; i++) {
        const size_t to = job->prompt_done + i + 1;
        if (to >= job->generate.token_count)
            break;
        job->echo[to] = item->target_logprobs[i];
        if (tops)
            memcpy(job->echo_tops + to * tops, item->target_tops + i * tops,
                   tops * sizeof *job->echo_tops);
    }
}

/* ---- the step ---- */

void job_generate_prepare(struct job *job)
{
    if (job->state == JOB_PREFILL) {
        prepare_prefill(job);
        return;
    }
    if (job->state != JOB_DECODE)
        return;
    for (uint32_t i = 0; i < job->sequence_count; i++)
        job->entry.decodes += !job->sequences[i].settled;
    if (!job->entry.decodes) /* a commit that found the queue full */
        finish_turn(job);
}

void job_generate_build(struct job *job, const struct sched_pick *pick,
                        struct step_builder *builder)
{
    if (job->state == JOB_PREFILL) {
        build_prefill(job, pick->rows, builder);
        return;
    }
    uint32_t at = job->cursor, left = pick->decodes;
    for (; left; at = (at + 1) % job->sequence_count) {
        struct sequence *s = &job->sequences[at];
        if (s->settled)
            continue;
        left--;
        /* A fresh choice samples from the prompt's logits; a finished one takes in its last token.
         */
        const struct engine_step_item item = {.session = s->session,
                                              .tokens = &s->token,
                                              .token_count = s->generated ? 1 : 0,
                                              .want_logits = s->finished,
                                              .sampler = s->finished ? NULL : s->sampler,
                                              .want_picks = job->generate.retrieval};
        step_add(builder, job, s, &item);
    }
    job->cursor = at; /* the rest goes first next time */
}

void job_generate_result(struct job *job, struct sequence *s, const struct engine_step_item *item)
{
    if (job->state == JOB_PREFILL) {
        keep_echo(job, item);
        job->prompt_done += item->token_count;
        job->added += item->token_count;
        job->thread->counted.prefill_tokens += item->token_count;
        if (item->token_count && job->marks_done < job->mark_count && !left_to_mark(job)) {
            engine_session_round(s->session);
            job->marks_done++;
        }
        if (job->prompt_done == job->generate.token_count) {
            prompt_done(job, item);
            return;
        }
        if (job->prefix)
            job_prefix_moved(job);
        const struct event event = {.kind = EVENT_PROGRESS,
                                    .tokens_done = job->prompt_done,
                                    .tokens_total = job->generate.token_count,
                                    .prompt_tokens = job->generate.token_count,
                                    .cached_tokens = job->cached};
        job_post(job, &event);
        return;
    }
    if (s->finished)
        s->settled = true;
    else
        take_token(job, s, &item->result, item->picks, item->pick_count);
    finish_if_settled(job);
}

void job_generate_close(struct job *job)
{
    for (uint32_t i = 0; job->sequences && i < job->generate.choices; i++) {
        struct sequence *s = &job->sequences[i];
        if (s->session && !job->generate.memory_write && !job->prefix) { /* else it is the live
                                                                             memory's */
            engine_session_forget(s->session, 0);
            engine_session_destroy(s->session);
        }
        if (s->id[0])
            live_memory_delete_ephemeral(job->thread, s->id);
        if (s->sampler)
            sampler_destroy(s->sampler);
        if (s->stop)
            sampler_stop_destroy(s->stop);
    }
    if (job->memory)
        live_memory_release(job->thread, job->memory);
    job->memory = NULL;
    job_prefix_close(job);
}
