/* metrics.h - counters and histograms of the loop's side, and the text of /metrics.
 * Thread: the loop. Owns nothing beyond the struct. */
#ifndef SERVER_METRICS_H
#define SERVER_METRICS_H

#include <stddef.h>
#include <stdint.h>

#include "proto/base/buf.h"
#include "server/engine_thread.h"
#include "server/metrics_histogram.h"
#include "storage/storage.h"

#define METRICS_ROUTES 256

struct metrics {
    struct {
        const char *handler;
        int status;
        uint64_t count;
    } requests[METRICS_ROUTES];
    size_t request_kinds;
    uint64_t prompt_tokens, cached_tokens, completion_tokens, appended_tokens, appended_bytes;
    uint64_t forks, disconnects, expired, expired_responses, quota_refusals;
    struct metrics_histogram first_token, whole;
};

void metrics_init(struct metrics *metrics);
/* `handler` lives for ever. */
void metrics_request(struct metrics *metrics, const char *handler, int status);
/* Prometheus text, version 0.0.4. */
void metrics_write(const struct metrics *metrics, const struct engine_thread_stats *engine,
                   const struct storage_stats *storage, size_t connections, struct buf *out);

#endif
