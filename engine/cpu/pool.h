/* pool.h - the engine's CPU workers: one parallel loop at a time, run to its end.
 * Thread: pool_run from the engine's thread alone, which works along as worker 0.
 * Owns its threads. Private to cpu/. */
#ifndef ENGINE_CPU_POOL_H
#define ENGINE_CPU_POOL_H

#include <stdint.h>

#include "proto/status.h"

struct pool;

/* `threads` >= 1 workers, the caller of pool_run among them. STATUS_NO_MEMORY. */
STATUS_CHECKED enum status pool_open(uint32_t threads, struct pool **out);
void pool_close(struct pool *pool);
uint32_t pool_threads(const struct pool *pool);
/* Calls task(argument, index, worker) once for each index in [0, count), spread over the workers;
 * returns when all have returned. Tasks of one loop do not depend on each other. */
void pool_run(struct pool *pool, uint32_t count,
              void (*task)(void *argument, uint32_t index, uint32_t worker), void *argument);

#endif
