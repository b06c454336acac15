/* pool.c - see pool.h.
 * A loop is published as a new `ticket` (release): how many indices it has, and the next to take.
 * Workers wait for one, first spinning for some microseconds, as loops follow each
 * other closely inside a step, then yielding, as the caller may be waiting for this very
 * processor, then on a condition. The loop has ended when every index is done:
 * a worker that the system has put aside, and so took none, is not waited for. */
#include "engine/cpu/pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

#define SPINS 1000 /* then the processor is offered to whoever waits for it, */
#define YIELDS 200 /* so often before a worker sleeps */

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
    _Atomic uint64_t ticket; /* the loop's count, above the next index */
    atomic_uint done;        /* indices of this loop whose task has returned */
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

static bool exhausted(uint64_t ticket)
{
    return (uint32_t)ticket >= ticket >> 32;
}

/* Takes indices until none is left. Taking one is an exchange of the ticket as it stands, so the
 * index is of the loop under way, which cannot end before `done` counts it: `task` and `argument`
 * are that loop's. */
static void work(struct pool *pool, uint32_t worker)
{
    uint64_t ticket = atomic_load_explicit(&pool->ticket, memory_order_acquire);
    while (!exhausted(ticket)) {
        if (!atomic_compare_exchange_weak_explicit(&pool->ticket, &ticket, ticket + 1,
                                                   memory_order_acquire, memory_order_acquire))
            continue;
        pool->task(pool->argument, (uint32_t)ticket, worker);
        /* Release: what the task wrote is seen by the caller, who acquires `done`. */
        atomic_fetch_add_explicit(&pool->done, 1, memory_order_release);
        ticket = atomic_load_explicit(&pool->ticket, memory_order_acquire);
    }
}

static bool idle(struct pool *pool)
{
    return exhausted(atomic_load_explicit(&pool->ticket, memory_order_relaxed)) &&
           !atomic_load_explicit(&pool->closing, memory_order_relaxed);
}

/* Until there is an index to take, or the pool closes. */
static void await(struct pool *pool)
{
    for (int i = 0; i < SPINS + YIELDS; i++) {
        if (!idle(pool))
            return;
        if (i < SPINS)
            relax();
        else
            sched_yield();
    }
    pthread_mutex_lock(&pool->lock);
    while (idle(pool))
        pthread_cond_wait(&pool->wake, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
}

static void *worker_main(void *context)
{
    const struct worker *worker = context;
    struct pool *pool = worker->pool;
    for (;;) {
        await(pool);
        if (atomic_load_explicit(&pool->closing, memory_order_relaxed))
            return NULL;
        work(pool, worker->index);
    }
}

/* Under the lock, or a worker could miss it between its last look and its wait. */
static void publish(struct pool *pool, uint64_t ticket)
{
    pthread_mutex_lock(&pool->lock);
    atomic_store_explicit(&pool->ticket, ticket, memory_order_release);
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
    publish(pool, 0);
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
    atomic_store_explicit(&pool->done, 0, memory_order_relaxed);
    publish(pool, (uint64_t)count << 32);
    work(pool, 0);
    for (int i = 0; atomic_load_explicit(&pool->done, memory_order_acquire) != count; i++) {
        relax();
        if (i > SPINS) /* a worker was put aside with a task in hand: give it a processor */
            sched_yield();
    }
}
