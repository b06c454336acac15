/* citation.c - see citation.h. */
#include "server/citation.h"

#include <stdlib.h>

#include "proto/base/assert.h"

/* The chunk that all heads together read most, and its mean weight; false: none was read. */
static bool find_most(const struct engine_pick *picks, uint32_t count, uint64_t *chunk,
                      double *weight)
{
    uint32_t groups = 0, heads = 0;
    *weight = 0;
    for (uint32_t i = 0; i < count; i++) {
        double sum = 0;
        for (uint32_t j = 0; j < count; j++)
            if (picks[j].chunk == picks[i].chunk)
                sum += (double)picks[j].weight;
        if (sum > *weight) {
            *weight = sum;
            *chunk = picks[i].chunk;
        }
        groups = picks[i].group >= groups ? picks[i].group + 1 : groups;
        heads = picks[i].head >= heads ? picks[i].head + 1 : heads;
    }
    if (*weight > 0)
        *weight /= (double)groups * heads;
    return *weight > 0;
}

void citations_add(struct citations *citations, const struct engine_pick *picks, uint32_t count,
                   size_t begin, size_t end)
{
    uint64_t chunk = 0;
    double weight;
    if (!find_most(picks, count, &chunk, &weight))
        return;
    struct citation *last = citations->count ? &citations->spans[citations->count - 1] : NULL;
    if (!last || last->chunk != chunk || last->end != begin) {
        if (citations->count == citations->capacity) {
            citations->capacity = citations->capacity ? 2 * citations->capacity : 16;
            citations->spans =
                realloc(citations->spans, citations->capacity * sizeof *citations->spans);
            ASSERT(citations->spans);
        }
        last = &citations->spans[citations->count++];
        *last = (struct citation){.chunk = chunk, .begin = begin};
    }
    last->end = end;
    last->weight += weight;
    last->tokens++;
}

void citations_close(struct citations *citations)
{
    free(citations->spans);
    *citations = (struct citations){0};
}
