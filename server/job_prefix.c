/* job_prefix.c - requests that name no memory: each goes on from the longest beginning that an
 * earlier one of its key has left, and leaves what it said to later ones. See prefix.h.
 *
 * Where that beginning ends where its conversation does, the conversation is written on; else a
 * branch of it is made. What is kept is a cache: nobody waits for its commits but a request that
 * wants to go on from them, and whatever goes wrong with it ends in reading the prompt anew. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/base/assert.h"
#include "proto/base/log.h"
#include "server/engine_thread_private.h"

/* Turns of an entry looked at for those that have a snapshot, the newest. */
#define TURNS (2 * LIMITS_PREFIX_SNAPSHOTS)

static void missed(const struct job *job, const char *reason)
{
    job->thread->counted.prefix_misses++;
    log_event(LOG_INFO, "prefix_miss", "request", LOG_STR, job->generate.request_id, "reason",
              LOG_STR, reason, "prompt_tokens", LOG_INT, (int64_t)job->generate.token_count, NULL);
}

/* ---- what storage knows of an entry ---- */

static enum status refresh(struct engine_thread *thread, struct prefix_entry *entry)
{
    struct storage_memory record;
    struct storage_turn turns[TURNS];
    uint64_t positions[TURNS];
    size_t count, kept = 0;
    bool has_more;
    enum status status = storage_memory_get(thread->storage, entry->id, &record);
    if (status)
        return status;
    prefix_set_bytes(thread->prefix, entry, record.bytes_on_disk);
    storage_memory_close(&record);
    status =
        storage_turn_list(thread->storage, entry->id, UINT64_MAX, TURNS, turns, &count, &has_more);
    if (status)
        return status;
    for (size_t i = 0; i < count; i++)
        if (turns[i].has_snapshot)
            positions[kept++] = turns[i].position;
    prefix_keep(thread->prefix, entry, positions, kept);
    return STATUS_OK;
}

/* ---- leaving ---- */

static void release(struct engine_thread *thread, struct prefix_entry *entry)
{
    entry->users--;
    if (entry->position == entry->begin) /* nothing came of it */
        prefix_doom(thread->prefix, entry);
}

static void committed(struct reply *reply, enum status status)
{
    struct engine_thread *thread = reply->thread;
    struct prefix_entry *entry = reply->context;
    reply_free(reply);
    entry->pending--;
    if (status == STATUS_DISK_FULL)
        prefix_shrink(thread->prefix);
    if (!status && !entry->pending)
        status = refresh(thread, entry);
    if (status)
        prefix_doom(thread->prefix, entry);
    LIST_EACH_SAFE(node, &thread->running)
    {
        struct job *job = LIST_ENTRY(node, struct job, node);
        if (entry->pending || job->state != JOB_OPENING || job->prefix_wait != entry)
            continue;
        job->prefix_wait = NULL;
        job_generate_open(job);
    }
}

/* Queues a snapshot of where the session stands. False: not now, or there was nothing new. */
static bool commit(struct job *job)
{
    struct engine_thread *thread = job->thread;
    struct prefix_entry *entry = job->prefix;
    const struct engine_session *session = job->sequences[0].session;
    const uint64_t position = engine_session_position(session);
    /* What others wait for goes first. */
    if (position == entry->position ||
        storage_append_room(thread->storage) < thread->prefix_room / 2)
        return false;
    struct reply *reply = reply_create(thread, committed, entry);
    if (!reply)
        return false;
    if (job_generate_commit(job, entry->id, session, entry->position, position, 0, reply)) {
        reply_cancel(reply);
        return false;
    }
    entry->pending++;
    while (entry->position < position) {
        const int32_t token = job_generate_token(job, entry->position);
        prefix_advance(thread->prefix, entry, &token, 1, entry->position + 1 == position);
    }
    job->memory->position = position;
    job->due_ns = engine_thread_now_ns() + LIMITS_APPEND_COMMIT_MS * 1000000;
    return true;
}

void job_prefix_moved(struct job *job)
{
    const struct engine_info *info = engine_get_info(job->thread->engine);
    const uint64_t chunks = (job->prompt_done - job->prefix->position) / info->config->chunk_tokens;
    const bool due =
        job->prompt_done == job->prefix_border || engine_thread_now_ns() >= job->due_ns ||
        chunks * (info->kv_bytes + info->landmark_bytes) >=
            LIMITS_APPEND_SNAPSHOT_SHARE * engine_session_snapshot_bytes(job->sequences[0].session);
    if (due)
        (void)commit(job);
}

uint32_t job_prefix_slice(const struct job *job, uint32_t n)
{
    if (job->prefix && job->prefix_border > job->prompt_done &&
        job->prefix_border - job->prompt_done < n)
        n = (uint32_t)(job->prefix_border - job->prompt_done);
    return n;
}

void job_prefix_prompt_done(struct job *job)
{
    if (job->generate.token_count - job->prefix->position >= LIMITS_PREFIX_TOKENS)
        (void)commit(job);
}

/* Whether what this job leaves is there already, since another said the same. */
static bool is_repeated(const struct job *job)
{
    const struct prefix_entry *entry = job->prefix;
    const uint64_t end = engine_session_position(job->sequences[0].session);
    uint64_t hash = entry->hash;
    for (uint64_t i = entry->position; i < end; i++)
        hash = prefix_chain(hash, job_generate_token(job, i));
    return entry->position == entry->begin &&
           prefix_has(job->thread->prefix, entry->tenant, hash, end);
}

void job_prefix_finish(struct job *job)
{
    struct prefix_entry *entry = job->prefix;
    if (is_repeated(job) ||
        (!commit(job) && entry->position != engine_session_position(job->sequences[0].session)))
        prefix_doom(job->thread->prefix, entry); /* its chunks have gone on without it */
}

void job_prefix_close(struct job *job)
{
    if (job->prefix_from)
        job->prefix_from->users--;
    if (job->prefix && job->status == STATUS_CORRUPT) /* the next one shall not meet it again */
        prefix_doom(job->thread->prefix, job->prefix);
    if (job->prefix)
        release(job->thread, job->prefix);
    job->prefix = job->prefix_from = NULL;
}

/* ---- beginning ---- */

bool job_prefix_take(struct job *job, const char *id, const struct engine_session *session)
{
    const struct job_generate *g = &job->generate;
    const uint64_t position = engine_session_position(session);
    bool same = position <= g->token_count &&
                (position < g->token_count || engine_session_has_logits(session));
    int32_t *stored = malloc((position + 1) * sizeof *stored);
    if (!stored || !same || storage_read_tokens(job->thread->storage, id, 0, position, stored) ||
        memcmp(stored, g->tokens, position * sizeof *stored) != 0)
        same = false;
    free(stored);
    if (!same) {
        missed(job, status_code(STATUS_CORRUPT));
    } else if (position) {
        job->thread->counted.prefix_hits++;
        job->thread->counted.prefix_tokens += position;
        const uint64_t known = job->prefix_border > position ? job->prefix_border : position;
        log_event(LOG_DEBUG, "prefix_hit", "request", LOG_STR, g->request_id, "prompt_tokens",
                  LOG_INT, (int64_t)g->token_count, "known_tokens", LOG_INT, (int64_t)known,
                  "cached_tokens", LOG_INT, (int64_t)position, NULL);
    }
    if (job->prefix_from) {
        job->prefix_from->users--;
        if (!same)
            prefix_doom(job->thread->prefix, job->prefix_from);
    }
    job->prefix_from = NULL;
    if (same)
        job->resumed = job->prompt_done = position;
    return same;
}

/* The entry's memory is there. */
static void open_entry(struct job *job)
{
    struct engine_thread *thread = job->thread;
    struct prefix_entry *entry = job->prefix;
    struct live_memory *memory = NULL;
    struct error err = {0};
    enum status status = live_memory_open(thread, entry->id, job, &memory, &err);
    const bool read = !status;
    const bool is_new = entry->position == entry->begin;
    if (read && ((!is_new && engine_session_position(memory->session) != entry->position) ||
                 !job_prefix_take(job, entry->id, memory->session))) {
        live_memory_drop(thread, memory);
        status = STATUS_CORRUPT;
    }
    if (status) {
        if (!read)
            missed(job, status_code(status));
        if (job->prefix_from)
            prefix_doom(thread->prefix, job->prefix_from);
        prefix_doom(thread->prefix, entry);
        job_prefix_close(job);
        job_generate_open_empty(job);
        return;
    }
    if (job->resumed != entry->position) { /* the snapshot looked for was dropped meanwhile */
        entry->begin = entry->position = job->resumed;
        entry->hash = prefix_seed(thread->prefix, entry->tenant);
        for (uint64_t i = 0; i < job->resumed; i++)
            entry->hash = prefix_chain(entry->hash, job->generate.tokens[i]);
    }
    job->memory = memory;
    job->sequences[0].session = memory->session;
    job->due_ns = engine_thread_now_ns() + LIMITS_APPEND_COMMIT_MS * 1000000;
    job_generate_begin(job);
}

static void entry_made(struct reply *reply, enum status status)
{
    struct job *job = reply->context;
    reply_free(reply);
    job->pending--;
    if (job->state != JOB_OPENING)
        return; /* cancelled meanwhile */
    if (!status) {
        open_entry(job);
        return;
    }
    if (job->prefix_from && status != STATUS_DISK_FULL)
        prefix_doom(job->thread->prefix, job->prefix_from);
    missed(job, status_code(status));
    job_prefix_close(job);
    job_generate_open_empty(job);
}

/* A new entry for the job, which branches off where `hit` says. */
static bool make_entry(struct job *job, const struct prefix_hit *hit)
{
    struct engine_thread *thread = job->thread;
    char id[LIMITS_ID_BYTES];
    live_memory_new_id(STORAGE_PREFIX, id);
    const uint64_t hash =
        hit->entry ? hit->hash : prefix_seed(thread->prefix, job->generate.terms.tenant);
    struct reply *reply = reply_create(thread, entry_made, job);
    if (!reply)
        return false;
    const struct storage_memory_options options = {.id = id,
                                                   .from = hit->entry ? hit->entry->id : NULL,
                                                   .at = hit->position,
                                                   .tenant = job->generate.terms.tenant};
    job->prefix =
        prefix_add(thread->prefix, id, job->generate.terms.tenant, hit->entry, hit->position, hash);
    if (!job->prefix || storage_memory_create(thread->storage, &options, reply_done_cb, reply)) {
        if (job->prefix)
            prefix_remove(thread->prefix, job->prefix);
        job->prefix = NULL;
        reply_cancel(reply);
        return false;
    }
    job->prefix->users++;
    job->pending++;
    return true;
}

/* What is known of the first `count` tokens. False: a commit of it is waited for; then the job
 * opens again. */
static bool find(struct job *job, size_t count, struct prefix_hit *hit)
{
    struct engine_thread *thread = job->thread;
    const struct job_generate *g = &job->generate;
    prefix_find(thread->prefix, g->terms.tenant, g->tokens, count, hit);
    if (hit->entry && hit->entry->pending) {
        job->prefix_wait = hit->entry;
        return false;
    }
    if (!hit->entry)
        missed(job, hit->border ? "no_snapshot" : "new");
    else
        prefix_touch(thread->prefix, hit->entry);
    return true;
}

static void branch_off(struct job *job, const struct prefix_hit *hit)
{
    if (!hit->entry)
        return;
    job->prefix_from = hit->entry;
    job->prefix_from->users++;
}

bool job_prefix_start(struct job *job, uint64_t *at)
{
    struct engine_thread *thread = job->thread;
    const struct job_generate *g = &job->generate;
    struct prefix_hit hit;
    if (!thread->prefix || g->memory[0])
        return false;
    if (g->token_count < LIMITS_PREFIX_TOKENS)
        return false;
    if (g->echo_logprobs) { /* every token is asked for what it was likely */
        missed(job, "echo");
        return false;
    }
    /* What the last token of the prompt read is not in a snapshot. */
    if (!find(job, g->token_count - g->retrieval, &hit))
        return true;
    if (hit.border >= hit.position + LIMITS_PREFIX_TOKENS)
        job->prefix_border = hit.border;
    if (g->choices == 1 && hit.entry && prefix_is_free_end(hit.entry, hit.position)) {
        job->prefix = hit.entry;
        job->prefix->users++;
        open_entry(job);
        return true;
    }
    branch_off(job, &hit);
    *at = hit.position;
    return g->choices == 1 && make_entry(job, &hit);
}

/* ---- a memory that begins with what is known ---- */

static void make_memory(struct job *job, uint64_t at);

/* What it was to begin with is not there, or says something else: it begins with nothing. */
static void make_empty(struct job *job)
{
    if (job->prefix_from) {
        job->prefix_from->users--;
        prefix_doom(job->thread->prefix, job->prefix_from);
        job->prefix_from = NULL;
    }
    make_memory(job, 0);
}

static void open_made(struct job *job)
{
    struct engine_thread *thread = job->thread;
    struct live_memory *memory;
    struct error err = {0};
    const enum status status = live_memory_open(thread, job->generate.memory, job, &memory, &err);
    if (status && !job->prefix_from) {
        job_fail(job, status, "%s", err.message);
        return;
    }
    if (job->prefix_from && (status || !job_prefix_take(job, memory->id, memory->session))) {
        if (status) {
            (void)!storage_memory_delete(thread->storage, job->generate.memory, NULL, NULL);
        } else {
            live_memory_delete_ephemeral(thread, memory->id);
            live_memory_drop(thread, memory);
        }
        make_empty(job);
        return;
    }
    job->memory = memory; /* its text begins with the prompt's, whatever it holds of that */
    job->sequences[0].session = memory->session;
    job_generate_begin(job);
}

static void memory_made(struct reply *reply, enum status status)
{
    struct job *job = reply->context;
    reply_free(reply);
    job->pending--;
    if (job->state != JOB_OPENING)
        return; /* cancelled meanwhile */
    if (!status)
        open_made(job);
    else if (job->prefix_from && status != STATUS_DISK_FULL && status != STATUS_IO)
        make_empty(job);
    else
        job_fail(job, status, "%s", status_text(status));
}

static void make_memory(struct job *job, uint64_t at)
{
    const struct job_generate *g = &job->generate;
    struct reply *reply = reply_create(job->thread, memory_made, job);
    const struct storage_memory_options options = {
        .id = g->memory,
        .from = job->prefix_from ? job->prefix_from->id : NULL,
        .at = at,
        .tenant = g->terms.tenant,
        .expires = {.seconds = g->expires_s, .from_use = true},
        .ephemeral = true};
    const enum status status =
        reply ? storage_memory_create(job->thread->storage, &options, reply_done_cb, reply)
              : STATUS_NO_MEMORY;
    if (!status) {
        job->pending++;
        return;
    }
    if (reply)
        reply_cancel(reply);
    job_fail(job, status, "%s", status_text(status));
}

void job_prefix_make(struct job *job)
{
    const struct job_generate *g = &job->generate;
    struct prefix_hit hit = {.entry = NULL};
    if (job->thread->prefix && g->token_count >= LIMITS_PREFIX_TOKENS) {
        if (!find(job, g->token_count - 1, &hit)) /* a turn has a token of its own */
            return;
        branch_off(job, &hit);
    }
    make_memory(job, hit.position);
}

void job_prefix_leave(struct job *job)
{
    struct prefix *prefix = job->thread->prefix;
    const struct job_generate *g = &job->generate;
    if (!prefix || job->memory->position < LIMITS_PREFIX_TOKENS)
        return;
    uint64_t hash = prefix_seed(prefix, g->terms.tenant);
    for (uint64_t i = 0; i < job->resumed; i++)
        hash = prefix_chain(hash, g->tokens[i]);
    struct prefix_entry *entry =
        prefix_borrow(prefix, g->memory, g->terms.tenant, job->resumed, hash);
    while (entry && entry->position < job->memory->position) {
        const int32_t token = job_generate_token(job, entry->position);
        prefix_advance(prefix, entry, &token, 1, entry->position + 1 == job->memory->position);
    }
}

/* ---- the thread ---- */

/* An entry as storage holds it; NULL: it is of no use. */
static struct prefix_entry *read_entry(struct engine_thread *thread,
                                       const struct storage_memory *record)
{
    struct storage_range *ranges = NULL;
    struct storage_turn turns[TURNS];
    size_t range_count, turn_count;
    bool has_more;
    int32_t *tokens = malloc((record->token_count + 1) * sizeof *tokens);
    enum status status = tokens ? STATUS_OK : STATUS_NO_MEMORY;
    if (!status)
        status = storage_read_tokens(thread->storage, record->id, 0, record->token_count, tokens);
    if (!status)
        status = storage_lineage(thread->storage, record->id, &ranges, &range_count);
    if (!status)
        status = storage_turn_list(thread->storage, record->id, UINT64_MAX, TURNS, turns,
                                   &turn_count, &has_more);
    struct prefix_entry *entry = NULL;
    if (!status && turn_count)
        entry = prefix_add(thread->prefix, record->id, record->tenant, NULL, 0,
                           prefix_seed(thread->prefix, record->tenant));
    if (entry) {
        /* What lies before its own branch is its parent's to mark. */
        const uint64_t own =
            ranges[range_count - 1].first * engine_get_info(thread->engine)->config->chunk_tokens;
        entry->begin = entry->position = own;
        for (uint64_t i = 0; i < own; i++)
            entry->hash = prefix_chain(entry->hash, tokens[i]);
        for (size_t i = turn_count; i--;)
            if (turns[i].has_snapshot && turns[i].position > entry->position)
                prefix_advance(thread->prefix, entry, tokens + entry->position,
                               turns[i].position - entry->position, true);
        prefix_set_bytes(thread->prefix, entry, record->bytes_on_disk);
    }
    free(ranges);
    free(tokens);
    if (entry && entry->position != record->token_count) {
        prefix_remove(thread->prefix, entry);
        entry = NULL;
    }
    return entry;
}

struct found {
    struct storage_memory record;
    struct prefix_entry *entry;
    int64_t used_at; /* its last turn */
};

static int by_use(const void *a, const void *b)
{
    const struct found *x = a, *y = b;
    if (x->used_at != y->used_at)
        return x->used_at < y->used_at ? -1 : 1;
    return (x->record.branch > y->record.branch) - (x->record.branch < y->record.branch);
}

static int by_id(const void *a, const void *b)
{
    const struct found *x = a, *y = b;
    return strcmp(x->record.id, y->record.id);
}

static void discard(struct engine_thread *thread, const char *id)
{
    if (storage_memory_delete(thread->storage, id, NULL, NULL))
        log_event(LOG_WARN, "prefix_kept", "memory", LOG_STR, id, NULL); /* the next start tries */
}

/* What storage holds under `id`; false: nothing to go on from, or it is not to be kept. */
static bool look(struct engine_thread *thread, const char *id, struct found *found)
{
    struct storage_turn turn;
    size_t count = 0;
    bool has_more;
    if (storage_memory_get(thread->storage, id, &found->record)) {
        log_event(LOG_WARN, "prefix_damaged", "memory", LOG_STR, id, NULL);
        return false;
    }
    storage_memory_close(&found->record);
    if (!thread->options.prefix_bytes || !found->record.bytes_on_disk ||
        storage_turn_list(thread->storage, id, UINT64_MAX, 1, &turn, &count, &has_more) || !count)
        return false;
    found->used_at = turn.created_at;
    return true;
}

enum status job_prefix_open(struct engine_thread *thread, struct error *err)
{
    char(*ids)[LIMITS_ID_BYTES];
    size_t id_count, count = 0;
    thread->prefix_room = storage_append_room(thread->storage);
    enum status status = storage_prefix_list(thread->storage, &ids, &id_count);
    struct found *found = status ? NULL : calloc(id_count + 1, sizeof *found);
    if (!status && !found)
        status = STATUS_NO_MEMORY;
    if (!status && thread->options.prefix_bytes)
        status = prefix_create(engine_get_info(thread->engine)->config->chunk_tokens,
                               thread->options.prefix_bytes, &thread->prefix);
    for (size_t i = 0; !status && i < id_count; i++) {
        if (look(thread, ids[i], &found[count]))
            count++;
        else
            discard(thread, ids[i]);
    }
    if (count)
        qsort(found, count, sizeof *found, by_use);
    for (size_t i = 0; i < count; i++)
        found[i].entry = read_entry(thread, &found[i].record);
    if (count)
        qsort(found, count, sizeof *found, by_id);
    for (size_t i = 0; i < count; i++) {
        struct found wanted;
        memcpy(wanted.record.id, found[i].record.parent, sizeof wanted.record.id);
        const struct found *parent = bsearch(&wanted, found, count, sizeof *found, by_id);
        if (found[i].entry && parent && parent->entry)
            prefix_set_parent(found[i].entry, parent->entry);
    }
    for (size_t i = 0; i < count; i++)
        if (!found[i].entry)
            discard(thread, found[i].record.id);
    free(found);
    free(ids);
    return status
               ? error_set(err, status, "the prefix cache cannot be read: %s", status_text(status))
               : STATUS_OK;
}

void job_prefix_close_all(struct engine_thread *thread)
{
    if (thread->prefix)
        prefix_destroy(thread->prefix);
    thread->prefix = NULL;
}

static void thinned(struct reply *reply, enum status status)
{
    reply->thread->prefix_thins = false;
    committed(reply, status);
}

/* The conversation under way, and what it branched off from, give up their oldest places before it
 * goes as a whole. */
static bool thin(struct engine_thread *thread, struct prefix_entry *entry)
{
    const uint64_t position = prefix_spare(thread->prefix, entry);
    struct reply *reply = position ? reply_create(thread, thinned, entry) : NULL;
    if (!reply)
        return false;
    if (storage_turn_delete(thread->storage, entry->id, position, reply_done_cb, reply)) {
        reply_cancel(reply);
        return false;
    }
    entry->pending++;
    thread->prefix_thins = true;
    return true;
}

void job_prefix_sweep(struct engine_thread *thread)
{
    struct prefix_entry *entry;
    /* What is given up counts when it is gone: until then nothing else goes for it. */
    while (thread->prefix && !thread->prefix_thins && (entry = prefix_victim(thread->prefix))) {
        if (entry->borrowed) {
            prefix_remove(thread->prefix, entry);
            continue;
        }
        if (thin(thread, entry))
            return;
        struct live_memory *live = live_memory_find(thread, entry->id);
        if (storage_memory_delete(thread->storage, entry->id, NULL, NULL))
            return; /* out of memory: later */
        if (live)
            live_memory_drop(thread, live);
        thread->counted.prefix_evictions += !entry->doomed;
        prefix_remove(thread->prefix, entry);
    }
}
