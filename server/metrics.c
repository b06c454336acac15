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

/* The head of a metric. Those whose name ends in _total only grow. */
static void write_head(struct buf *out, const char *name, const char *help)
{
    const size_t size = strlen(name);
    const bool grows = size > 6 && strcmp(name + size - 6, "_total") == 0;
    buf_append_format(out, "# HELP rambad_%s %s\n# TYPE rambad_%s %s\n", name, help, name,
                      grows ? "counter" : "gauge");
}

/* One without labels. */
struct metric {
    const char *name, *help;
    double value;
};

static void write_metrics(struct buf *out, const struct metric *metrics, size_t count)
{
    for (const struct metric *m = metrics; m < metrics + count; m++) {
        write_head(out, m->name, m->help);
        buf_append_format(out, "rambad_%s %.17g\n", m->name, m->value);
    }
}

/* One with a label, for each of its values. */
struct labelled {
    const char *label;
    double value;
};

static void write_labelled(struct buf *out, const char *name, const char *help, const char *label,
                           const struct labelled *values, size_t count)
{
    write_head(out, name, help);
    for (const struct labelled *v = values; v < values + count; v++)
        buf_append_format(out, "rambad_%s{%s=\"%s\"} %.17g\n", name, label, v->label, v->value);
}

#define WRITE_METRICS(out, metrics) write_metrics(out, metrics, sizeof(metrics) / sizeof *(metrics))

#define WRITE_LABELLED(out, name, help, label, values) \
    write_labelled(out, name, help, label, values, sizeof(values) / sizeof *(values))

/* What waits and what is at work, how long that took, and what it did to the others. */
static void write_jobs(struct buf *out, const struct engine_thread_stats *s)
{
    static const char *const states[ENGINE_THREAD_STATES] = {
        "queued", "opening", "prefill", "forking", "decode", "committing", "aborting"};
    struct labelled by_state[ENGINE_THREAD_STATES];
    for (size_t i = 0; i < ENGINE_THREAD_STATES; i++)
        by_state[i] = (struct labelled){states[i], (double)s->states[i]};
    const struct labelled refused[] = {{"requests", (double)s->refused_requests},
                                       {"tokens", (double)s->refused_tokens}};
    const struct labelled timeouts[] = {{"queue", (double)s->timeouts_queued},
                                        {"engine", (double)s->timeouts_running}};
    const struct metric plain[] = {
        {"jobs_running", "Requests on the engine now.", (double)s->running},
        {"jobs_waiting", "Requests in the queue.", (double)s->waiting},
        {"queue_tokens", "Tokens of prompts in the queue.", (double)s->waiting_tokens},
        {"running_memory_bytes", "Of the sessions at work.", (double)s->running_bytes},
        {"running_memory_max_bytes", "What they may take.", (double)s->running_bytes_max},
        {"max_stall_seconds", "What token_gap_seconds shall not exceed.", s->max_stall},
        {"stalls_total", "Tokens that came later than that.", (double)s->stalls},
    };
    WRITE_METRICS(out, plain);
    WRITE_LABELLED(out, "jobs", "Requests with the engine, by what they do.", "state", by_state);
    WRITE_LABELLED(out, "refused_total",
                   "Requests sent away with 429, by what there was too much of in the queue.",
                   "reason", refused);
    WRITE_LABELLED(out, "timeouts_total", "Requests whose timeout passed, by where.", "where",
                   timeouts);
    write_histogram(out, "queue_seconds", "Time in the queue.", &s->queue);
    write_histogram(out, "prefill_seconds", "Time for the prompt.", &s->prefill);
    write_histogram(out, "per_token_seconds", "Between tokens of a request, its mean.",
                    &s->per_token);
    write_histogram(out, "token_gap_seconds", "Between two tokens of a sequence, each.",
                    &s->token_gap);
}

/* Where chunks' keys and values were found: a GPU's memory, RAM, the store. */
static void write_tiers(struct buf *out, const struct engine_stats *e)
{
    const struct labelled resident[] = {{"device", (double)e->device_pages},
                                        {"host", (double)e->pages_resident}};
    const struct labelled capacity[] = {{"device", (double)e->device_page_capacity},
                                        {"host", (double)e->page_capacity}};
    /* What is nowhere else is on disk. */
    const struct labelled hits[] = {{"device", (double)e->device_page_hits},
                                    {"host", (double)e->page_hits},
                                    {"disk", (double)e->page_misses}};
    const struct labelled misses[] = {{"device", (double)e->device_page_misses},
                                      {"host", (double)e->page_misses}};
    const struct labelled bytes[] = {{"host", (double)e->device_copy_bytes},
                                     {"disk", (double)e->page_read_bytes}};
    const struct labelled seconds[] = {{"host", (double)e->device_copy_ns * 1e-9},
                                       {"disk", (double)e->page_read_ns * 1e-9}};
    WRITE_LABELLED(out, "pages_resident", "Chunk pages there now.", "tier", resident);
    WRITE_LABELLED(out, "pages_capacity", "Chunk pages that may be.", "tier", capacity);
    WRITE_LABELLED(out, "page_hits_total", "Chunks wanted that were found there.", "tier", hits);
    WRITE_LABELLED(out, "page_misses_total", "Chunks wanted that the next tier had to give.",
                   "tier", misses);
    const struct labelled expected[] = {{"host", (double)e->device_pages_expected},
                                        {"disk", (double)e->pages_expected}};
    const struct labelled expected_hits[] = {{"host", (double)e->device_pages_expected_hits},
                                             {"disk", (double)e->pages_expected_hits}};
    WRITE_LABELLED(out, "page_expected_total",
                   "Chunks brought from there because the token before had read them.", "tier",
                   expected);
    WRITE_LABELLED(out, "page_expected_hits_total", "Those that a token then read.", "tier",
                   expected_hits);
    WRITE_LABELLED(out, "page_read_bytes_total", "Bytes that went from there to the tier above.",
                   "tier", bytes);
    WRITE_LABELLED(out, "page_read_seconds_total", "Time that this took.", "tier", seconds);
}

static void write_engine(struct buf *out, const struct engine_thread_stats *s)
{
    const struct engine_stats *e = &s->engine;
    write_jobs(out, s);
    const struct labelled resumes[] = {{"ram", (double)s->resumes_ram},
                                       {"disk", (double)s->resumes_disk},
                                       {"empty", (double)s->resumes_empty}};
    const struct labelled snapshots[] = {{"full", (double)s->snapshots_full},
                                         {"rounded", (double)s->snapshots_rounded}};
    const struct labelled snapshot_bytes[] = {{"full", (double)s->snapshot_full_bytes},
                                              {"rounded", (double)s->snapshot_rounded_bytes}};
    const struct metric plain[] = {
        {"sessions_idle", "Memories kept in RAM between turns.", (double)s->sessions_idle},
        {"sessions_idle_bytes", "What they take.", (double)s->sessions_idle_bytes},
        {"prefix_hits_total", "Requests without a memory that went on from an earlier one.",
         (double)s->prefix_hits},
        {"prefix_misses_total", "Those that could not.", (double)s->prefix_misses},
        {"prefix_saved_tokens_total", "Tokens that hits did not read again.",
         (double)s->prefix_tokens},
        {"prefix_evictions_total", "Conversations that made room.", (double)s->prefix_evictions},
        {"prefix_entries", "Conversations and branches kept.", (double)s->prefix_entries},
        {"prefix_bytes", "What they take on disk.", (double)s->prefix_bytes},
        {"prefill_tokens_total", "Tokens of prompts and appends read.", (double)s->prefill_tokens},
        {"steps_total", "Engine steps.", (double)s->steps},
        {"step_rows_total", "Tokens that went through them.", (double)s->step_rows},
        {"step_seconds_total", "Time inside them.", (double)s->step_ns * 1e-9},
        {"chunks_encoded_total", "Chunk memories made.", (double)e->chunks_encoded},
        {"landmark_bytes", "Landmarks in RAM.", (double)e->landmark_bytes},
        {"pages_pinned", "Chunk pages that wait for the disk or are in use.",
         (double)e->pages_pinned},
        {"page_evictions_total", "Pages that made room.", (double)e->page_evictions},
        {"picks_total", "On a GPU: chunks that tokens read, which came one at a time.",
         (double)e->picks},
        {"picks_repeated_total", "Those that the token before had read, too.",
         (double)e->picks_repeated},
        {"steps_divided_total", "Steps whose sequences with missing pages went after the others.",
         (double)e->steps_divided},
    };
    WRITE_METRICS(out, plain);
    WRITE_LABELLED(out, "resumes_total", "Memories taken up again, by where from.", "tier",
                   resumes);
    WRITE_LABELLED(out, "snapshots_total",
                   "Snapshots given to the disk; turns end with a rounded one.", "state",
                   snapshots);
    WRITE_LABELLED(out, "snapshot_bytes_total", "Bytes of them.", "state", snapshot_bytes);
    write_tiers(out, e);
}

static void write_storage(struct buf *out, const struct storage_stats *s, uint64_t prefixes)
{
    const struct metric plain[] = {
        {"memories", "Memories on disk.",
         s->memories > prefixes ? (double)(s->memories - prefixes) : 0},
        {"map_used_bytes", "Of the store's file.", (double)s->map_used_bytes},
        {"map_bytes", "What it may grow to.", (double)s->map_bytes},
        {"branches_to_collect", "Deleted, and not all of it freed yet.",
         (double)s->branches_to_collect},
        {"writer_queue_bytes", "Waiting for the writer.", (double)s->queue_bytes},
        {"commits_total", "Group commits.", (double)s->commits},
        {"commit_seconds_total", "Time inside them.", (double)s->commit_ns * 1e-9},
        {"chunks_written_total", "Chunks on disk.", (double)s->chunks_written},
    };
    WRITE_METRICS(out, plain);
}

void metrics_write(const struct metrics *m, const struct engine_thread_stats *engine,
                   const struct storage_stats *storage, size_t connections, struct buf *out)
{
    write_head(out, "requests_total", "Requests answered.");
    for (size_t i = 0; i < m->request_kinds; i++)
        buf_append_format(out, "rambad_requests_total{handler=\"%s\",status=\"%d\"} %llu\n",
                          m->requests[i].handler, m->requests[i].status,
                          (unsigned long long)m->requests[i].count);
    const struct metric plain[] = {
        {"connections", "Open connections.", (double)connections},
        {"prompt_tokens_total", "Prompt tokens.", (double)m->prompt_tokens},
        {"cached_tokens_total", "Tokens that a memory already held.", (double)m->cached_tokens},
        {"completion_tokens_total", "Generated tokens.", (double)m->completion_tokens},
        {"appended_tokens_total", "Tokens appended to memories.", (double)m->appended_tokens},
        {"appended_bytes_total", "Bytes appended to memories.", (double)m->appended_bytes},
        {"forks_total", "Forks of memories.", (double)m->forks},
        {"expired_total", "Memories that were deleted at their end.", (double)m->expired},
        {"expired_responses_total",
         "Stored responses that were deleted because nothing went on from them.",
         (double)m->expired_responses},
        {"quota_refusals_total", "Requests that a quota on disk ended.", (double)m->quota_refusals},
        {"disconnects_total", "Requests whose client went away before the answer.",
         (double)m->disconnects},
    };
    WRITE_METRICS(out, plain);
    write_histogram(out, "first_token_seconds", "From the request to its first token.",
                    &m->first_token);
    write_histogram(out, "request_seconds", "From the request to its last byte.", &m->whole);
    write_engine(out, engine);
    write_storage(out, storage, engine->prefix_entries);
}
