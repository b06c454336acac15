/* histogram.h - how long things took, in nanoseconds: any number of values in a fixed size, each to
 * about 3%.
 * Thread: one owner at a time. Owns nothing beyond the struct. All zeros is an empty one. */
#ifndef SERVER_HISTOGRAM_H
#define SERVER_HISTOGRAM_H

#include <stdint.h>
#include <stdio.h>

#define HISTOGRAM_STEPS 32 /* of each doubling */
#define HISTOGRAM_BUCKETS (HISTOGRAM_STEPS * 60)

struct histogram {
    uint64_t buckets[HISTOGRAM_BUCKETS];
    uint64_t count, largest;
    double sum;
};

void histogram_add(struct histogram *histogram, uint64_t ns);
/* The value that `share` (0 to 1) of all values do not exceed; 0 of an empty one. */
uint64_t histogram_at(const struct histogram *histogram, double share);
/* A bar for each doubling that has values. */
void histogram_print(const struct histogram *histogram, FILE *out);
/* "340 us", "1.20 ms", "12.0 s": at most 15 characters. */
void histogram_time(uint64_t ns, char out[16]);

#endif
