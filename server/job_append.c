/* job_append.c - text into a memory: block by block, each prefilled in slices; commits fall on
 * borders of blocks, when one is due, so that what a memory computes does not depend on them. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server/engine_thread_private.h"

/* A commit on its way to the disk. */
struct commit {
    struct job *job;
    uint64_t position, text_bytes, tokens;
};

void job_append_start(struct job *job)
{
    struct error err = {0};
    struct live_memory *memory;
    const enum status status =
        live_memory_open(job->thread, job->append.memory, job, &memory, &err);
    if (status) {
        job_fail(job, status, "%s", err.message);
        return;
    }
    job->memory = memory;
    const int64_t expected = job->append.expected_text_bytes;
    if (expected >= 0 && (uint64_t)expected != memory->text_bytes) {
        job_fail(job, STATUS_CONFLICT,
                 "the memory holds %llu bytes of text, not %lld; go on from there",
                 (unsigned long long)memory->text_bytes, (long long)expected);
        memcpy(job->err.param, "offset", sizeof "offset");
        return;
    }
    job->start_text_bytes = memory->text_bytes;
    job->began_text_bytes = job->append.goes_on ? job->append.earlier_start : memory->text_bytes;
    job->cached = memory->position;
    job->due_ns = engine_thread_now_ns() + LIMITS_APPEND_COMMIT_MS * 1000000;
    job->state = JOB_PREFILL;
    const struct event event = {.kind = EVENT_STARTED,
                                .cached_tokens = memory->position,
                                .position = memory->position,
                                .text_bytes = memory->text_bytes};
    job_post(job, &event);
}

static void finish_if_done(struct job *job)
{
    if (!job->last_seen || job->commits_pending || job->block || job->state != JOB_PREFILL)
        return;
    job->prefilled_ns = job->decoded_ns = engine_thread_now_ns();
    job_finish(job);
}

static void committed(struct reply *reply, enum status status)
{
    struct commit *commit = reply->context;
    struct job *job = commit->job;
    reply_free(reply);
    job->commits_pending--;
    if (status) {
        job_fail(job, status, "the text could not be stored: %s", status_text(status));
    } else if (job->memory) {
        job->memory->position = commit->position;
        job->memory->text_bytes = commit->text_bytes;
        const struct event event = {.kind = EVENT_PROGRESS,
                                    .tokens_done = commit->tokens,
                                    .position = commit->position,
                                    .text_bytes = commit->text_bytes};
        job_post(job, &event);
    }
    free(commit);
    finish_if_done(job);
}

/* How far the upload has come with this commit, for whoever sends it again. */
static void make_receipt(const struct job *job, const struct commit *commit, bool is_last,
                         struct storage_receipt *receipt, char answer[160])
{
    memcpy(receipt->name, job->append.receipt, sizeof receipt->name);
    receipt->bytes = answer;
    receipt->size = (size_t)snprintf(
        answer, 160, "%llu %llu %llu %llu %d %.6f", (unsigned long long)job->began_text_bytes,
        (unsigned long long)(job->append.earlier_tokens + commit->tokens),
        (unsigned long long)commit->position, (unsigned long long)commit->text_bytes, is_last,
        (double)(engine_thread_now_ns() - job->submitted_ns) * 1e-9);
}

/* Whether what was prefilled since the last commit is worth a snapshot: it is as large whatever
 * it is for, so a commit waits until the chunks outweigh it, or until it has waited long. */
static bool is_due(const struct job *job)
{
    const struct engine_session *session = job->memory->session;
    const struct engine_info *info = engine_get_info(job->thread->engine);
    const uint64_t chunks = job->written_count / info->config->chunk_tokens;
    return job->ended || engine_thread_now_ns() >= job->due_ns ||
           chunks * (info->kv_bytes + info->landmark_bytes) >=
               LIMITS_APPEND_SNAPSHOT_SHARE * engine_session_snapshot_bytes(session);
}

/* Queues a commit of the blocks prefilled so far. False: the queue is full, try again; or failed.
 */
static bool commit_blocks(struct job *job)
{
    struct engine_thread *thread = job->thread;
    struct engine_session *session = job->memory->session;
    /* The turn ends with a rounded state; what is committed on its way leaves the state alone, for
     * when that happens depends on the clock. */
    if (job->ended) {
        engine_session_round(session);
        job->written[job->written_count - 1] |= STORAGE_TOKEN_MARK;
    }
    size_t size;
    void *snapshot = job_snapshot(thread, session, &size);
    struct commit *commit = malloc(sizeof *commit);
    struct reply *reply = snapshot && commit ? reply_create(thread, committed, commit) : NULL;
    if (!reply) {
        free(snapshot);
        free(commit);
        job_fail(job, STATUS_NO_MEMORY, "out of memory for a snapshot");
        return false;
    }
    *commit = (struct commit){.job = job,
                              .position = engine_session_position(session),
                              .text_bytes = job->start_text_bytes + job->written_text_bytes,
                              .tokens = job->added};
    struct storage_receipt receipt;
    char answer[160];
    make_receipt(job, commit, job->ended, &receipt, answer);
    const struct storage_commit write = {.id = job->memory->id,
                                         .receipt = job->append.has_receipt ? &receipt : NULL,
                                         .position = commit->position,
                                         .tokens = job->written,
                                         .token_count = job->written_count,
                                         .text_bytes = commit->text_bytes,
                                         .snapshot = snapshot,
                                         .snapshot_bytes = size,
                                         .takes_snapshot = true,
                                         .goes_on = job->turn_open};
    const enum status status = storage_commit(thread->storage, &write, reply_done_cb, reply);
    if (status) {
        free(snapshot);
        reply_cancel(reply);
        free(commit);
        if (status != STATUS_BUSY)
            job_fail(job, status, "the text could not be stored: %s", status_text(status));
        return false;
    }
    job->start_text_bytes += job->written_text_bytes;
    job->written_text_bytes = 0;
    job->written_count = 0;
    job->due_ns = engine_thread_now_ns() + LIMITS_APPEND_COMMIT_MS * 1000000;
    job->commits_pending++;
    job->turn_open = true;
    job->last_seen = job->ended;
    return true;
}

static void free_block(struct job *job)
{
    free(job->block->tokens);
    free(job->block);
    job->block = NULL;
    job->prompt_done = 0;
}

/* The block under way is prefilled, or has no tokens: it waits for a commit. */
static void end_block(struct job *job)
{
    const struct append_block *block = job->block;
    if (job->written_capacity - job->written_count < block->token_count) {
        const size_t capacity = 2 * (job->written_count + block->token_count);
        int32_t *grown = realloc(job->written, capacity * sizeof *grown);
        if (!grown) {
            job_fail(job, STATUS_NO_MEMORY, "out of memory for tokens");
            return;
        }
        job->written = grown;
        job->written_capacity = capacity;
    }
    if (block->token_count) {
        memcpy(job->written + job->written_count, block->tokens,
               block->token_count * sizeof *block->tokens);
        const struct event event = {.kind = EVENT_BLOCK};
        job_post(job, &event);
    }
    job->written_count += block->token_count;
    job->written_text_bytes += block->text_bytes;
    job->ended = block->last;
    free_block(job);
}

/* The next block that the loop has sent; NULL: none yet. */
static void next_block(struct job *job)
{
    pthread_mutex_lock(&job->thread->lock);
    if (!list_empty(&job->blocks)) {
        job->block = LIST_ENTRY(job->blocks.next, struct append_block, node);
        list_remove(&job->block->node);
    }
    pthread_mutex_unlock(&job->thread->lock);
}

void job_append_prepare(struct job *job)
{
    if (job->state != JOB_PREFILL)
        return;
    /* A commit that waits for the writer's queue, then blocks without tokens. */
    while (!job->last_seen) {
        /* Between blocks alone: within one the session is ahead of what is written. */
        if (job->written_count && !job->prompt_done && is_due(job) && !commit_blocks(job))
            return;
        job->last_seen = job->ended;
        if (!job->block && !job->ended)
            next_block(job);
        if (!job->block || job->prompt_done < job->block->token_count)
            break;
        end_block(job);
        if (job->state != JOB_PREFILL)
            return;
    }
    if (job->last_seen)
        finish_if_done(job);
    else if (job->block)
        job->entry.rows = step_slice(job->thread, engine_session_position(job->memory->session),
                                     job->block->token_count - job->prompt_done);
}

void job_append_build(struct job *job, const struct sched_pick *pick, struct step_builder *builder)
{
    const struct engine_step_item item = {.session = job->memory->session,
                                          .tokens = job->block->tokens + job->prompt_done,
                                          .token_count = pick->rows,
                                          .want_logits = pick->rows == job->block->token_count -
                                                                           job->prompt_done};
    step_add(builder, job, NULL, &item);
}

void job_append_result(struct job *job, const struct engine_step_item *item)
{
    job->prompt_done += item->token_count;
    job->added += item->token_count;
    job->thread->counted.prefill_tokens += item->token_count;
    if (job->prompt_done < job->block->token_count)
        return;
    end_block(job);
    sched_resize(&job->thread->sched, &job->entry, engine_session_bytes(job->memory->session));
    if (job->state == JOB_PREFILL && is_due(job))
        commit_blocks(job);
}

void job_append_close(struct job *job)
{
    if (job->block)
        free_block(job);
    if (job->memory)
        live_memory_release(job->thread, job->memory);
    job->memory = NULL;
}
