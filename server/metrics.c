/* metrics.c - see metrics.h. */
#include "server/metrics.h"

#include <string.h>

void metrics_init(struct metrics *metrics)
{
    *metrics = (struct metrics){0};
}

void metrics_request(struct metrics *metrics, const char *handler, int status)
{
    size_t i = 0;
    while (i < metrics->request_kinds && (metrics->requests[i].status != status ||
                                          strcmp(metrics->requests[i].handler, handler) != 0))
        i++;
    if (i == METRICS_ROUTES)
        return;
    if (i == metrics->request_kinds) {
        metrics->requests[i].handler = handler;
        metrics->requests[i].status = status;
        metrics->request_kinds++;
    }
    metrics->requests[i].count++;
}

static void write_histogram(struct buf *out, const char *name, const char *help,
                            const struct metrics_histogram *h)
{
    uint64_t total = 0;
    double limit = METRICS_LEAST_S;
    buf_append_format(out, "# HELP rambad_%s %s\n# TYPE rambad_%s histogram\n", name, help, name);
    for (size_t i = 0; i < METRICS_BUCKETS; i++, limit *= 2) {
        total += h->buckets[i];
        if (i + 1 < METRICS_BUCKETS)
            buf_append_format(out, "rambad_%s_bucket{le=\"%g\"} %llu\n", name, limit,
                              (unsigned long long)total);
    }
    buf_append_format(out, "rambad_%s_bucket{le=\"+Inf\"} %llu\n", name,
                      (unsigned long long)h->count);
    buf_append_format(out, "rambad_%s_sum %.9g\nrambad_%s_count %llu\n", name, h->sum, name,
                      (unsigned long long)h->count);
}

static void write_one(struct buf *out, const char *type, const char *name, const char *help,
                      double value)
{
    buf_append_format(out, "# HELP rambad_%s %s\n# TYPE rambad_%s %s\nrambad_%s %.17g\n", name,
                      help, name, type, name, value);
}

/* What waits and what is at work, how long that took, and what it did to the others. */
static void write_jobs(struct buf *out, const struct engine_thread_stats *s)
{
    static const char *const states[ENGINE_THREAD_STATES] = {
        "queued", "opening", "prefill", "forking", "decode", "committing", "aborting"};
    write_one(out, "gauge", "jobs_running", "Requests on the engine now.", (double)s->running);
    write_one(out, "gauge", "jobs_waiting", "Requests in the queue.", (double)s->waiting);
    buf_append_text(out, "# HELP rambad_jobs Requests with the engine, by what they do.\n"
                         "# TYPE rambad_jobs gauge\n");
    for (size_t i = 0; i < ENGINE_THREAD_STATES; i++)
        buf_append_format(out, "rambad_jobs{state=\"%s\"} %llu\n", states[i],
                          (unsigned long long)s->states[i]);
    write_one(out, "gauge", "queue_tokens", "Tokens of prompts in the queue.",
              (double)s->waiting_tokens);
    buf_append_format(out,
                      "# HELP rambad_refused_total Requests sent away with 429, by what there was "
                      "too much of in the queue.\n"
                      "# TYPE rambad_refused_total counter\n"
                      "rambad_refused_total{reason=\"requests\"} %llu\n"
                      "rambad_refused_total{reason=\"tokens\"} %llu\n"
                      "# HELP rambad_timeouts_total Requests whose timeout passed, by where.\n"
                      "# TYPE rambad_timeouts_total counter\n"
                      "rambad_timeouts_total{where=\"queue\"} %llu\n"
                      "rambad_timeouts_total{where=\"engine\"} %llu\n",
                      (unsigned long long)s->refused_requests,
                      (unsigned long long)s->refused_tokens, (unsigned long long)s->timeouts_queued,
                      (unsigned long long)s->timeouts_running);
    write_one(out, "gauge", "running_memory_bytes", "Of the sessions at work.",
              (double)s->running_bytes);
    write_one(out, "gauge", "running_memory_max_bytes", "What they may take.",
              (double)s->running_bytes_max);
    write_histogram(out, "queue_seconds", "Time in the queue.", &s->queue);
    write_histogram(out, "prefill_seconds", "Time for the prompt.", &s->prefill);
    write_histogram(out, "per_token_seconds", "Between tokens of a request, its mean.",
                    &s->per_token);
    write_histogram(out, "token_gap_seconds", "Between two tokens of a sequence, each.",
                    &s->token_gap);
    write_one(out, "gauge", "max_stall_seconds", "What token_gap_seconds shall not exceed.",
              s->max_stall);
    write_one(out, "counter", "stalls_total", "Tokens that came later than that.",
              (double)s->stalls);
}

static void write_engine(struct buf *out, const struct engine_thread_stats *s)
{
    const struct engine_stats *e = &s->engine;
    write_jobs(out, s);
    write_one(out, "gauge", "sessions_idle", "Memories kept in RAM between turns.",
              (double)s->sessions_idle);
    write_one(out, "gauge", "sessions_idle_bytes", "What they take.",
              (double)s->sessions_idle_bytes);
    buf_append_format(out,
                      "# HELP rambad_resumes_total Memories taken up again, by where from.\n"
                      "# TYPE rambad_resumes_total counter\n"
                      "rambad_resumes_total{tier=\"ram\"} %llu\n"
                      "rambad_resumes_total{tier=\"disk\"} %llu\n"
                      "rambad_resumes_total{tier=\"empty\"} %llu\n",
                      (unsigned long long)s->resumes_ram, (unsigned long long)s->resumes_disk,
                      (unsigned long long)s->resumes_empty);
    write_one(out, "counter", "prefix_hits_total",
              "Requests without a memory that went on from an earlier one.",
              (double)s->prefix_hits);
    write_one(out, "counter", "prefix_misses_total", "Those that could not.",
              (double)s->prefix_misses);
    write_one(out, "counter", "prefix_saved_tokens_total", "Tokens that hits did not read again.",
              (double)s->prefix_tokens);
    write_one(out, "counter", "prefix_evictions_total", "Conversations that made room.",
              (double)s->prefix_evictions);
    write_one(out, "gauge", "prefix_entries", "Conversations and branches kept.",
              (double)s->prefix_entries);
    write_one(out, "gauge", "prefix_bytes", "What they take on disk.", (double)s->prefix_bytes);
    write_one(out, "counter", "prefill_tokens_total", "Tokens of prompts and appends read.",
              (double)s->prefill_tokens);
    write_one(out, "counter", "steps_total", "Engine steps.", (double)s->steps);
    write_one(out, "counter", "step_rows_total", "Tokens that went through them.",
              (double)s->step_rows);
    write_one(out, "counter", "step_seconds_total", "Time inside them.", (double)s->step_ns * 1e-9);
    write_one(out, "counter", "chunks_encoded_total", "Chunk memories made.",
              (double)e->chunks_encoded);
    write_one(out, "gauge", "landmark_bytes", "Landmarks in RAM.", (double)e->landmark_bytes);
    write_one(out, "gauge", "pages_resident", "Chunk pages in RAM.", (double)e->pages_resident);
    write_one(out, "gauge", "pages_capacity", "Chunk pages that may be.", (double)e->page_capacity);
    write_one(out, "gauge", "pages_pinned", "Chunk pages that wait for the disk or are in use.",
              (double)e->pages_pinned);
    write_one(out, "counter", "page_hits_total", "Chunks picked that were in RAM.",
              (double)e->page_hits);
    write_one(out, "counter", "page_misses_total", "Chunks picked that had to be read back.",
              (double)e->page_misses);
    write_one(out, "counter", "page_evictions_total", "Pages that made room.",
              (double)e->page_evictions);
    write_one(out, "counter", "page_read_bytes_total", "Bytes read back.",
              (double)e->page_read_bytes);
    write_one(out, "counter", "page_read_seconds_total", "Time spent reading them.",
              (double)e->page_read_ns * 1e-9);
    write_one(out, "gauge", "device_pages", "Chunk pages with a copy on the GPU.",
              (double)e->device_pages);
    write_one(out, "gauge", "device_pages_capacity", "Chunk pages that may have one.",
              (double)e->device_page_capacity);
    write_one(out, "counter", "device_page_hits_total", "Chunks read that were on the GPU.",
              (double)e->device_page_hits);
    write_one(out, "counter", "device_page_misses_total", "Chunks read that were copied there.",
              (double)e->device_page_misses);
}

static void write_storage(struct buf *out, const struct storage_stats *s, uint64_t prefixes)
{
    write_one(out, "gauge", "memories", "Memories on disk.",
              s->memories > prefixes ? (double)(s->memories - prefixes) : 0);
    write_one(out, "gauge", "map_used_bytes", "Of the store's file.", (double)s->map_used_bytes);
    write_one(out, "gauge", "map_bytes", "What it may grow to.", (double)s->map_bytes);
    write_one(out, "gauge", "writer_queue_bytes", "Waiting for the writer.",
              (double)s->queue_bytes);
    write_one(out, "counter", "commits_total", "Group commits.", (double)s->commits);
    write_one(out, "counter", "commit_seconds_total", "Time inside them.",
              (double)s->commit_ns * 1e-9);
    write_one(out, "counter", "chunks_written_total", "Chunks on disk.", (double)s->chunks_written);
}

void metrics_write(const struct metrics *m, const struct engine_thread_stats *engine,
                   const struct storage_stats *storage, size_t connections, struct buf *out)
{
    buf_append_text(out, "# HELP rambad_requests_total Requests answered.\n"
                         "# TYPE rambad_requests_total counter\n");
    for (size_t i = 0; i < m->request_kinds; i++)
        buf_append_format(out, "rambad_requests_total{handler=\"%s\",status=\"%d\"} %llu\n",
                          m->requests[i].handler, m->requests[i].status,
                          (unsigned long long)m->requests[i].count);
    write_one(out, "gauge", "connections", "Open connections.", (double)connections);
    write_one(out, "counter", "prompt_tokens_total", "Prompt tokens.", (double)m->prompt_tokens);
    write_one(out, "counter", "cached_tokens_total", "Tokens that a memory already held.",
              (double)m->cached_tokens);
    write_one(out, "counter", "completion_tokens_total", "Generated tokens.",
              (double)m->completion_tokens);
    write_one(out, "counter", "appended_tokens_total", "Tokens appended to memories.",
              (double)m->appended_tokens);
    write_one(out, "counter", "appended_bytes_total", "Bytes appended to memories.",
              (double)m->appended_bytes);
    write_one(out, "counter", "forks_total", "Forks of memories.", (double)m->forks);
    write_one(out, "counter", "expired_total", "Memories that were deleted at their end.",
              (double)m->expired);
    write_one(out, "counter", "quota_refusals_total", "Requests that a quota on disk ended.",
              (double)m->quota_refusals);
    write_one(out, "counter", "disconnects_total",
              "Requests whose client went away before the answer.", (double)m->disconnects);
    write_histogram(out, "first_token_seconds", "From the request to its first token.",
                    &m->first_token);
    write_histogram(out, "request_seconds", "From the request to its last byte.", &m->whole);
    write_engine(out, engine);
    write_storage(out, storage, engine->prefix_entries);
}
