/* live_memory.c - memories in use and those kept in RAM between turns. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "proto/base/assert.h"
#include "proto/base/hash.h"
#include "proto/base/log.h"
#include "server/engine_thread_private.h"

struct live_memory *live_memory_find(struct engine_thread *thread, const char *id)
{
    LIST_EACH(node, &thread->memories)
    {
        struct live_memory *memory = LIST_ENTRY(node, struct live_memory, node);
        if (strcmp(memory->id, id) == 0)
            return memory;
    }
    return NULL;
}

/* Whether an idle one is what storage holds: false after a rewind. */
static bool is_current(const struct live_memory *memory, const struct storage_memory *record)
{
    return memory->branch == record->branch && memory->position == record->token_count;
}

/* Why a memory that is not in RAM is not. */
static const char *why_missed(const struct engine_thread *thread, const char *id)
{
    const uint64_t hash = hash64(id, strlen(id), 0);
    for (size_t i = 0; i < sizeof thread->evicted / sizeof *thread->evicted; i++)
        if (thread->evicted[i] == hash)
            return "evicted";
    return "first_use";
}

static void note_eviction(struct engine_thread *thread, const char *id)
{
    const size_t room = sizeof thread->evicted / sizeof *thread->evicted;
    thread->evicted[thread->evictions++ % room] = hash64(id, strlen(id), 0);
}

/* A memory was read from disk because it was not in RAM as it was wanted. */
static void log_miss(const struct job *job, const char *id, const char *reason, uint64_t position,
                     uint64_t begin_ns)
{
    const char *named = job->is_append ? job->append.memory : job->generate.memory;
    log_event(LOG_INFO, "cache_miss", "request", LOG_STR,
              job->is_append ? job->append.request_id : job->generate.request_id, "memory", LOG_STR,
              *named ? named : id, "reason", LOG_STR, reason, "position", LOG_INT,
              (int64_t)position, "seconds", LOG_NUM,
              (double)(engine_thread_now_ns() - begin_ns) * 1e-9, NULL);
}

enum status live_memory_load(const struct job *job, const char *id, const char *reason,
                             uint64_t *position, struct engine_session **out, struct error *err)
{
    struct engine_thread *thread = job->thread;
    const uint64_t begin_ns = engine_thread_now_ns();
    struct storage_range *ranges = NULL;
    struct chunk_range *chunks = NULL;
    size_t count = 0, size = 0;
    void *snapshot = NULL;
    *position = 0;
    enum status status = storage_lineage(thread->storage, id, &ranges, &count);
    if (!status)
        status = storage_snapshot(thread->storage, id, &snapshot, &size, position);
    const bool empty = status == STATUS_NOT_FOUND && ranges;
    if (empty) /* no turn was committed yet */
        status = STATUS_OK;
    if (status) {
        error_set(err, status, status == STATUS_NOT_FOUND ? "no memory named %s" : "memory %s: %s",
                  id, status_text(status));
        goto out;
    }
    chunks = calloc(count, sizeof *chunks);
    if (!chunks) {
        status = error_set(err, STATUS_NO_MEMORY, "out of memory");
        goto out;
    }
    for (size_t i = 0; i < count; i++)
        chunks[i] = (struct chunk_range){.branch = ranges[i].branch, .first = ranges[i].first};
    status = engine_session_create(thread->engine, chunks, count, snapshot, size, out, err);
    if (!status && engine_session_position(*out) != *position) {
        engine_session_destroy(*out);
        status = error_set(err, STATUS_CORRUPT, "memory %s: its snapshot is of position %llu", id,
                           (unsigned long long)engine_session_position(*out));
    }
    if (!status && empty)
        thread->counted.resumes_empty++;
    else if (!status)
        thread->counted.resumes_disk++;
    if (!status && !empty)
        log_miss(job, id, reason, *position, begin_ns);
out:
    free(ranges);
    free(chunks);
    free(snapshot);
    return status;
}

enum status live_memory_open(struct engine_thread *thread, const char *id, struct job *job,
                             struct live_memory **out, struct error *err)
{
    struct live_memory *memory = live_memory_find(thread, id);
    if (memory && memory->user)
        return error_set(err, STATUS_CONFLICT,
                         "memory %s is being written by another request; try again when it is "
                         "done",
                         id);
    struct storage_memory record;
    enum status status = storage_memory_get(thread->storage, id, &record);
    if (status)
        return error_set(err, status,
                         status == STATUS_NOT_FOUND ? "no memory named %s" : "memory %s: %s", id,
                         status_text(status));
    if (memory && is_current(memory, &record)) {
        storage_memory_close(&record);
        memory->user = job;
        thread->counted.resumes_ram++;
        *out = memory;
        return STATUS_OK;
    }
    /* It stands elsewhere now: it was rewound, or written by a request that had no session. */
    const char *reason = memory ? "other_position" : why_missed(thread, id);
    if (memory)
        live_memory_drop(thread, memory);
    memory = calloc(1, sizeof *memory);
    if (memory) {
        snprintf(memory->id, sizeof memory->id, "%s", id);
        memory->branch = record.branch;
        memory->text_bytes = record.text_bytes;
        status = live_memory_load(job, id, reason, &memory->position, &memory->session, err);
    } else {
        status = error_set(err, STATUS_NO_MEMORY, "out of memory");
    }
    storage_memory_close(&record);
    if (status) {
        free(memory);
        return status;
    }
    memory->user = job;
    list_push_back(&thread->memories, &memory->node);
    *out = memory;
    return STATUS_OK;
}

void live_memory_drop(struct engine_thread *thread, struct live_memory *memory)
{
    (void)thread;
    list_remove(&memory->node);
    if (memory->session)
        engine_session_destroy(memory->session);
    free(memory);
}

void live_memory_release(struct engine_thread *thread, struct live_memory *memory)
{
    memory->user = NULL;
    list_remove(&memory->node);
    if (engine_session_bytes(memory->session) > thread->options.session_bytes)
        list_push_front(&thread->memories, &memory->node); /* others need not go first, in vain */
    else
        list_push_back(&thread->memories, &memory->node);
    size_t idle = 0;
    LIST_EACH(node, &thread->memories)
    {
        const struct live_memory *other = LIST_ENTRY(node, struct live_memory, node);
        idle += other->user ? 0 : engine_session_bytes(other->session);
    }
    LIST_EACH_SAFE(node, &thread->memories)
    {
        struct live_memory *other = LIST_ENTRY(node, struct live_memory, node);
        if (idle <= thread->options.session_bytes)
            return;
        if (other->user)
            continue;
        idle -= engine_session_bytes(other->session);
        note_eviction(thread, other->id);
        live_memory_drop(thread, other);
    }
}

void live_memory_drop_all(struct engine_thread *thread)
{
    while (!list_empty(&thread->memories))
        live_memory_drop(thread, LIST_ENTRY(thread->memories.next, struct live_memory, node));
}

void live_memory_new_id(const char *prefix, char id[LIMITS_ID_BYTES])
{
    uint64_t words[2]; /* nobody may guess and name it */
    ASSERT(getrandom(words, sizeof words, 0) == sizeof words);
    snprintf(id, LIMITS_ID_BYTES, "%s%016llx%08x", prefix, (unsigned long long)words[0],
             (unsigned)words[1]);
}

void live_memory_delete_ephemeral(struct engine_thread *thread, const char *id)
{
    /* What is left of it after a failure is dropped at the next opening. */
    (void)!storage_memory_delete(thread->storage, id, NULL, NULL);
}
