/* pool.c - see pool.h.
 * A loop is published by raising `generation` (release); workers wait for it, first spinning for
 * some microseconds, as loops follow each other closely inside a step, then on a condition. */
#include "engine/cpu/pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

#define SPINS 4000

struct worker {
    struct pool *pool;
    pthread_t thread;
    uint32_t index;
};

struct pool {
    uint32_t threads; /* and the caller */
    struct worker *workers;
    void (*task)(void *argument, uint32_t index, uint32_t worker);
    void *argument;
    uint32_t count;
    atomic_uint next;       /* index to take */
    atomic_uint busy;       /* workers not done with this generation */
    atomic_uint generation; /* written by the caller, acquired by the workers */
    atomic_bool closing;
    pthread_mutex_t lock;
    pthread_cond_t wake;
};

static inline void relax(void)
{
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
}

static void work(struct pool *pool, uint32_t worker)
{
    uint32_t index;
    while ((index = atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed)) < pool->count)
        pool->task(pool->argument, index, worker);
}

static uint32_t await(struct pool *pool, uint32_t seen)
{
    for (int i = 0; i < SPINS; i++) {
        const uint32_t now = atomic_load_explicit(&pool->generation, memory_order_acquire);
        if (now != seen)
            return now;
        relax();
    }
    pthread_mutex_lock(&pool->lock);
    uint32_t now;
    while ((now = atomic_load_explicit(&pool->generation, memory_order_acquire)) == seen)
        pthread_cond_wait(&pool->wake, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
    return now;
}

static void *worker_main(void *context)
{
    const struct worker *worker = context;
    struct pool *pool = worker->pool;
    uint32_t seen = 0;
    for (;;) {
        seen = await(pool, seen);
        if (atomic_load_explicit(&pool->closing, memory_order_relaxed))
            return NULL;
        work(pool, worker->index);
        /* Release: what the tasks wrote is seen by the caller, who acquires `busy`. */
        atomic_fetch_sub_explicit(&pool->busy, 1, memory_order_release);
    }
}

static void publish(struct pool *pool)
{
    /* Under the lock, or a worker could miss it between its last look and its wait. */
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add_explicit(&pool->generation, 1, memory_order_release);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
}

enum status pool_open(uint32_t threads, struct pool **out)
{
    struct pool *pool = calloc(1, sizeof *pool);
    if (!pool)
        return STATUS_NO_MEMORY;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->workers = calloc(threads, sizeof *pool->workers);
    for (uint32_t i = 1; pool->workers && i < threads; i++) {
        struct worker *worker = &pool->workers[pool->threads];
        *worker = (struct worker){.pool = pool, .index = i};
        if (pthread_create(&worker->thread, NULL, worker_main, worker))
            break;
        pool->threads++;
    }
    if (!pool->workers || pool->threads + 1 != threads) {
        pool_close(pool);
        return STATUS_NO_MEMORY;
    }
    *out = pool;
    return STATUS_OK;
}

void pool_close(struct pool *pool)
{
    atomic_store_explicit(&pool->closing, true, memory_order_relaxed);
    publish(pool);
    for (uint32_t i = 0; i < pool->threads; i++)
        pthread_join(pool->workers[i].thread, NULL);
    pthread_mutex_destroy(&pool->lock);
    pthread_cond_destroy(&pool->wake);
    free(pool->workers);
    free(pool);
}

uint32_t pool_threads(const struct pool *pool)
{
    return pool->threads + 1;
}

void pool_run(struct pool *pool, uint32_t count,
              void (*task)(void *argument, uint32_t index, uint32_t worker), void *argument)
{
    if (count <= 1 || !pool->threads) {
        for (uint32_t i = 0; i < count; i++)
            task(argument, i, 0);
        return;
    }
    pool->task = task;
    pool->argument = argument;
    pool->count = count;
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    atomic_store_explicit(&pool->busy, pool->threads, memory_order_relaxed);
    publish(pool);
    work(pool, 0);
    while (atomic_load_explicit(&pool->busy, memory_order_acquire))
        relax();
}
