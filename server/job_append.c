/* job_append.c - text into a memory: block by block, each prefilled in slices, then committed. */
#include <stdlib.h>
#include <string.h>

#include "server/engine_thread_private.h"

/* A block's commit on its way to the disk. */
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
    job->cached = memory->position;
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

/* The block under way is prefilled: queues its commit. False: the queue is full, try again. */
static bool commit_block(struct job *job)
{
    struct engine_thread *thread = job->thread;
    struct append_block *block = job->block;
    const struct engine_session *session = job->memory->session;
    const size_t size = engine_session_snapshot_bytes(session);
    void *snapshot = malloc(size);
    struct commit *commit = malloc(sizeof *commit);
    struct reply *reply = snapshot && commit ? reply_create(thread, committed, commit) : NULL;
    if (!reply) {
        free(snapshot);
        free(commit);
        job_fail(job, STATUS_NO_MEMORY, "out of memory for a snapshot");
        return false;
    }
    engine_session_snapshot(session, snapshot);
    *commit = (struct commit){.job = job,
                              .position = engine_session_position(session),
                              .text_bytes = job->start_text_bytes + block->text_bytes,
                              .tokens = job->added};
    const struct storage_commit write = {.id = job->memory->id,
                                         .position = commit->position,
                                         .tokens = block->tokens,
                                         .token_count = block->token_count,
                                         .text_bytes = commit->text_bytes,
                                         .snapshot = snapshot,
                                         .snapshot_bytes = size,
                                         .goes_on = job->turn_open};
    const enum status status = storage_commit(thread->storage, &write, reply_done_cb, reply);
    free(snapshot);
    if (status) {
        reply_cancel(reply);
        free(commit);
        if (status != STATUS_BUSY)
            job_fail(job, status, "the text could not be stored: %s", status_text(status));
        return false;
    }
    job->start_text_bytes += block->text_bytes;
    job->commits_pending++;
    job->turn_open = true;
    job->last_seen = block->last;
    free(block->tokens);
    free(block);
    job->block = NULL;
    return true;
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
    job->prompt_done = 0;
}

void job_append_build(struct job *job, struct step_builder *builder)
{
    if (job->state != JOB_PREFILL)
        return;
    /* A block that waits for the writer's queue, then blocks without tokens. */
    while (!job->last_seen) {
        if (!job->block)
            next_block(job);
        if (!job->block)
            return;
        if (job->prompt_done < job->block->token_count)
            break;
        if (job->block->token_count) {
            if (!commit_block(job))
                return;
            continue;
        }
        job->last_seen = job->block->last;
        free(job->block->tokens);
        free(job->block);
        job->block = NULL;
    }
    if (job->last_seen) {
        finish_if_done(job);
        return;
    }
    const size_t left = job->block->token_count - job->prompt_done;
    const uint32_t n = step_slice(job->thread, engine_session_position(job->memory->session), left);
    const struct engine_step_item item = {.session = job->memory->session,
                                          .tokens = job->block->tokens + job->prompt_done,
                                          .token_count = n,
                                          .want_logits = n == left};
    step_add(builder, job, NULL, &item);
}

void job_append_result(struct job *job, const struct engine_step_item *item)
{
    job->prompt_done += item->token_count;
    job->added += item->token_count;
    if (job->prompt_done == job->block->token_count)
        commit_block(job);
}

void job_append_close(struct job *job)
{
    if (job->block) {
        free(job->block->tokens);
        free(job->block);
        job->block = NULL;
    }
    if (job->memory)
        live_memory_release(job->thread, job->memory);
    job->memory = NULL;
}
