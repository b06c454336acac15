/* metrics_histogram.h - how often something took how long, in the buckets that /metrics shows.
 * Thread: one owner at a time. Owns nothing beyond the struct. */
#ifndef SERVER_METRICS_HISTOGRAM_H
#define SERVER_METRICS_HISTOGRAM_H

#include <stddef.h>
#include <stdint.h>

#define METRICS_BUCKETS 20
#define METRICS_LEAST_S 0.001

/* Bucket i counts what is at most METRICS_LEAST_S * 2^i seconds, the last one everything. */
struct metrics_histogram {
    uint64_t buckets[METRICS_BUCKETS], count;
    double sum;
};

static inline void metrics_observe(struct metrics_histogram *histogram, double seconds)
{
    double limit = METRICS_LEAST_S;
    size_t i = 0;
    for (; i + 1 < METRICS_BUCKETS && seconds > limit; i++)
        limit *= 2;
    histogram->buckets[i]++;
    histogram->count++;
    histogram->sum += seconds;
}

#endif
