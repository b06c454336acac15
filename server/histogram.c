/* histogram.c - see histogram.h. */
#include "server/histogram.h"

#define STEP_BITS 5
#define BAR 50

_Static_assert(1 << STEP_BITS == HISTOGRAM_STEPS, "the steps of a doubling are its leading bits");

/* Values under HISTOGRAM_STEPS have buckets of their own; above, the leading STEP_BITS + 1 bits
 * tell the bucket. */
static size_t bucket_of(uint64_t ns)
{
    if (ns < HISTOGRAM_STEPS)
        return (size_t)ns;
    const unsigned shift = 63u - (unsigned)__builtin_clzll(ns) - STEP_BITS;
    return (size_t)shift * HISTOGRAM_STEPS + (size_t)(ns >> shift);
}

/* The largest value of a bucket. */
static uint64_t upper(size_t bucket)
{
    if (bucket < 2 * HISTOGRAM_STEPS)
        return bucket;
    const unsigned shift = (unsigned)(bucket / HISTOGRAM_STEPS) - 1;
    return ((uint64_t)(bucket - (size_t)shift * HISTOGRAM_STEPS) + 1) * ((uint64_t)1 << shift) - 1;
}

void histogram_add(struct histogram *h, uint64_t ns)
{
    h->buckets[bucket_of(ns)]++;
    h->count++;
    h->sum += (double)ns;
    if (ns > h->largest)
        h->largest = ns;
}

uint64_t histogram_at(const struct histogram *h, double share)
{
    uint64_t seen = 0;
    for (size_t i = 0; i < HISTOGRAM_BUCKETS; i++) {
        seen += h->buckets[i];
        if (seen && (double)seen >= share * (double)h->count)
            return upper(i) < h->largest ? upper(i) : h->largest;
    }
    return 0;
}

void histogram_time(uint64_t ns, char out[16])
{
    static const char *const units[] = {"ns", "us", "ms", "s"};
    double value = (double)ns;
    size_t unit = 0;
    while (value >= 999.5 && unit < 3) {
        value /= 1000;
        unit++;
    }
    snprintf(out, 16, "%.*f %s",
             !unit || value >= 99.95 ? 0
             : value >= 9.995        ? 1
                                     : 2,
             value, units[unit]);
}

void histogram_print(const struct histogram *h, FILE *out)
{
    uint64_t rows[64] = {0}, most = 0;
    int first = 64, last = -1;
    for (size_t i = 0; i < HISTOGRAM_BUCKETS; i++) {
        if (!h->buckets[i])
            continue;
        const uint64_t value = upper(i);
        const int row = value ? 63 - __builtin_clzll(value) : 0;
        rows[row] += h->buckets[i];
        most = rows[row] > most ? rows[row] : most;
        first = row < first ? row : first;
        last = row;
    }
    for (int row = first; row <= last; row++) {
        char from[16];
        const int bar = (int)((double)rows[row] / (double)most * BAR + 0.5);
        histogram_time((uint64_t)1 << row, from);
        fprintf(out, "  %9s %10llu  ", from, (unsigned long long)rows[row]);
        for (int i = 0; i < bar || (!i && rows[row]); i++)
            fputc('#', out);
        fputc('\n', out);
    }
}
