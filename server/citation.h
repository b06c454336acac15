/* citation.h - which passage each stretch of an answer was read from.
 * Thread: one owner at a time. Owns its spans until citations_close. */
#ifndef SERVER_CITATION_H
#define SERVER_CITATION_H

#include "engine/engine.h"

/* Neighbouring tokens that read the same chunk most. */
struct citation {
    uint64_t chunk;
    size_t begin, end; /* characters of the answer */
    double weight;     /* of the chunk, added up over the tokens */
    uint32_t tokens;
};

struct citations {
    struct citation *spans;
    size_t count, capacity;
};

/* A token that stands at characters [begin, end) of the answer, and what it read. */
void citations_add(struct citations *citations, const struct engine_pick *picks, uint32_t count,
                   size_t begin, size_t end);
void citations_close(struct citations *citations);

#endif
