/* pages.cu - the device's copies of K/V pages: a pool under a budget, least recently used first
 * out. The engine names pages by where they lie in host memory.
 *
 * What a kernel needs comes on the context's stream, in front of it. What is asked for ahead comes
 * in batches on a stream of its own; whoever then takes such a slot, for its page or for another,
 * first makes the context's stream wait for the batch. */
#include <stdlib.h>
#include <string.h>

#include "engine/cuda/cuda.h"
#include "engine/cuda/device.cuh"

extern "C" {
#include "proto/base/list.h"
}

#define SLAB_PAGES 64 /* taken from the device at a time: as many as there are, between these */
#define SLAB_PAGES_MOST 1024
#define COPY_THREADS 256
#define COPY_EACH 4 /* words of a thread, on their way at once */
#define COPY_FEW 64 /* pages that a kernel's arguments name */
#define AHEAD 32 /* pages between a hint and what it is for */
#define CACHE_LINE 64
#define BATCH_MOST 1024 /* pages that come ahead together */

/* How a page came: with the kernel that reads it (or somebody has taken it since); on the stream of
 * copies, asked for or predicted. */
enum arrival { COUNTED, ASKED, PREDICTED };

/* A cache line: a slice of rows looks up thousands of them. */
struct slot {
    struct list lru;  /* every slot; the least recently used first */
    const void *page; /* NULL: empty */
    void *data;
    uint64_t stamp; /* of the kernel that reads it */
    uint64_t batch; /* that brings it, of those on the stream of copies */
    enum arrival come;
    struct slot *next; /* in its hash chain */
};
static_assert(sizeof(struct slot) == CACHE_LINE, "a slot's bookkeeping is a cache line");

struct copy {
    void *to;
    const void *from; /* pinned host memory, which the device reads where it lies */
};

/* Pages to copy: a list that the device reads, or few. */
struct copies {
    const struct copy *list; /* NULL: these */
    struct copy few[COPY_FEW];
};

struct cuda_pages {
    struct list lru;
    size_t stride, capacity, count; /* bytes of a page; slots at most; slots there are */
    struct slot **table;
    size_t mask;
    unsigned shift; /* of an address, to about the number of its page */
    void **slabs; /* device memory and slot structs in turn */
    size_t slab_count;
    uint64_t stamp;
    uint64_t hits, misses;
    struct copy *missing; /* to be copied here by cuda_pages_end */
    size_t missing_count, missing_capacity;
    cudaEvent_t began, copied; /* around the last copies from host pages */
    bool waiting;              /* for them: nobody has yet */
    bool timed;                /* they are in copy_ns */
    uint64_t copy_ns;
    /* The stream of copies. */
    cudaStream_t stream;
    cudaEvent_t reached;       /* where the context's stream was */
    cudaEvent_t left, fetched; /* around the last batch */
    struct copy *batch;        /* [BATCH_MOST], pinned */
    uint64_t batches, joined;  /* the last one; the last that the context's stream is behind */
    bool under_way;            /* one that the host has not waited for */
    uint64_t predicted, predicted_hits;
};

/* Host pages lie in rows, and their slots' places in the table as they do: what is taken together
 * then lies on few of the table's own pages. */
static uint64_t number_of(const struct cuda_pages *p, const void *page)
{
    return (uintptr_t)page >> p->shift;
}

static struct slot **chain(const struct cuda_pages *p, const void *page)
{
    return &p->table[number_of(p, page) & p->mask];
}

/* What one row reads, and what one call of the encoder writes, must fit. */
static size_t least_pages(const struct model_config *c)
{
    const size_t row = (size_t)c->retrieval_heads * c->topk;
    return row > CUDA_CHUNKS ? row : CUDA_CHUNKS;
}

static bool grow(struct ops_context *x)
{
    struct cuda_pages *p = x->pages;
    const size_t left = p->capacity - p->count;
    size_t count = p->count < SLAB_PAGES        ? SLAB_PAGES
                   : p->count > SLAB_PAGES_MOST ? SLAB_PAGES_MOST
                                                : p->count;
    count = count < left ? count : left;
    if (!count)
        return false;
    void **slabs = (void **)realloc(p->slabs, (p->slab_count + 2) * sizeof *slabs);
    if (!slabs)
        return false;
    p->slabs = slabs;
    char *data = (char *)cuda_take(x, count * p->stride);
    struct slot *slots = (struct slot *)aligned_alloc(CACHE_LINE, count * sizeof *slots);
    if (!data || !slots) {
        cuda_give(x, data);
        free(slots);
        p->capacity = p->count; /* the device is full: what there is has to do */
        return false;
    }
    slabs[p->slab_count++] = data;
    slabs[p->slab_count++] = slots;
    memset(slots, 0, count * sizeof *slots);
    for (size_t i = 0; i < count; i++) {
        slots[i].data = data + i * p->stride;
        list_push_front(&p->lru, &slots[i].lru);
    }
    p->count += count;
    return true;
}

enum status cuda_pages_open(struct ops_context *x, struct error *err)
{
    struct cuda_pages *p = (struct cuda_pages *)calloc(1, sizeof *p);
    x->pages = p;
    if (!p)
        return error_set(err, STATUS_NO_MEMORY, "out of memory");
    list_init(&p->lru);
    p->stride = (x->page_bytes + 255) / 256 * 256;
    size_t budget = x->page_budget, available = 0, total = 0;
    if (!budget) {
        if (!cuda_check(x, cudaMemGetInfo(&available, &total), "cudaMemGetInfo"))
            return error_set(err, x->failed, "%s", x->failure);
        budget = total / 8; /* the rest is for weights, states and landmarks */
    }
    const size_t least = least_pages(&x->config);
    p->capacity = budget / p->stride;
    if (p->capacity < least)
        return error_set(err, STATUS_INVALID,
                         "the device memory budget of %zu bytes is too small: this model needs at "
                         "least %zu (%zu pages of %zu bytes)",
                         budget, least * p->stride, least, p->stride);
    size_t size = 64;
    while (size < p->capacity)
        size *= 2;
    p->mask = size - 1;
    while (x->page_bytes >> (p->shift + 1))
        p->shift++;
    p->table = (struct slot **)calloc(size, sizeof *p->table);
    if (!p->table)
        return error_set(err, STATUS_NO_MEMORY, "out of memory for the page table");
    p->timed = true;
    cudaEvent_t *const events[] = {&p->began, &p->copied, &p->reached, &p->left, &p->fetched};
    for (size_t i = 0; i < sizeof events / sizeof *events; i++)
        cuda_check(x, cudaEventCreateWithFlags(events[i], cudaEventDefault), "an event");
    cuda_check(x, cudaStreamCreateWithFlags(&p->stream, cudaStreamNonBlocking), "a stream");
    if (x->failed)
        return error_set(err, x->failed, "%s", x->failure);
    p->batch = (struct copy *)cuda_alloc_host(x, BATCH_MOST * sizeof *p->batch);
    if (!p->batch)
        return error_set(err, STATUS_NO_MEMORY, "out of memory for the list of pages to come");
    while (p->count < least)
        if (!grow(x))
            return error_set(err, STATUS_NO_MEMORY, "out of GPU memory for %zu pages", least);
    return STATUS_OK;
}

void cuda_pages_close(struct ops_context *x)
{
    struct cuda_pages *p = x->pages;
    if (!p)
        return;
    if (p->stream) {
        cudaStreamSynchronize(p->stream);
        cudaStreamDestroy(p->stream);
    }
    cuda_free_host(p->batch);
    for (size_t i = 0; i < p->slab_count; i += 2) {
        cudaFree(p->slabs[i]);
        free(p->slabs[i + 1]);
    }
    const cudaEvent_t events[] = {p->began, p->copied, p->reached, p->left, p->fetched};
    for (size_t i = 0; i < sizeof events / sizeof *events; i++)
        if (events[i])
            cudaEventDestroy(events[i]);
    free(p->slabs);
    free(p->table);
    free(p->missing);
    free(p);
    x->pages = NULL;
}

static struct slot *find(const struct cuda_pages *p, const void *page)
{
    struct slot *slot = *chain(p, page);
    while (slot && slot->page != page)
        slot = slot->next;
    return slot;
}

static void empty(struct cuda_pages *p, struct slot *slot)
{
    struct slot **at = chain(p, slot->page);
    while (*at != slot)
        at = &(*at)->next;
    *at = slot->next;
    slot->page = NULL;
}

void cuda_pages_forget(struct ops_context *x, const void *page)
{
    struct slot *slot = find(x->pages, page);
    if (!slot)
        return;
    empty(x->pages, slot);
    list_remove(&slot->lru);
    list_push_front(&x->pages->lru, &slot->lru);
}

void cuda_pages_forget_range(struct ops_context *x, const void *memory, size_t bytes)
{
    struct cuda_pages *p = x->pages;
    for (struct list *node = p->lru.next; node != &p->lru; node = node->next) {
        struct slot *slot = LIST_ENTRY(node, struct slot, lru);
        if (slot->page && (uintptr_t)slot->page - (uintptr_t)memory < bytes)
            empty(p, slot);
    }
}

void cuda_pages_begin(struct ops_context *x)
{
    x->pages->stamp++;
}

/* The context's stream goes on only behind the batch that brings the slot's page. */
static void join(struct ops_context *x, const struct slot *slot)
{
    struct cuda_pages *p = x->pages;
    if (slot->batch <= p->joined)
        return;
    cuda_check(x, cudaStreamWaitEvent(x->stream, p->fetched, 0), "the wait for a copy");
    p->joined = p->batches;
}

static void touch(struct cuda_pages *p, struct slot *slot)
{
    list_remove(&slot->lru);
    list_push_back(&p->lru, &slot->lru);
}

/* A slot for a page that has none; NULL: no room beside those of the stamp, and, with `batch`, of
 * that batch. */
static struct slot *take_new(struct ops_context *x, const void *page, uint64_t batch)
{
    struct cuda_pages *p = x->pages;
    struct slot *slot = LIST_ENTRY(p->lru.next, struct slot, lru);
    if ((slot->page || slot->stamp == p->stamp) && grow(x))
        slot = LIST_ENTRY(p->lru.next, struct slot, lru);
    if (slot->stamp == p->stamp || (batch && slot->batch == batch))
        return NULL;
    if (slot->page)
        empty(p, slot);
    slot->page = page;
    slot->come = COUNTED;
    struct slot **at = chain(p, page);
    slot->next = *at;
    *at = slot;
    touch(p, slot);
    return slot;
}

/* A slot that holds `page`; `*fresh` when its content must still come. */
static struct slot *take(struct ops_context *x, const void *page, bool *fresh)
{
    struct cuda_pages *p = x->pages;
    *fresh = false;
    if (x->failed)
        return NULL;
    struct slot *slot = find(p, page);
    if (!slot)
        *fresh = (slot = take_new(x, page, 0));
    else if (slot->stamp != p->stamp)
        touch(p, slot);
    if (!slot)
        return NULL;
    join(x, slot);
    slot->stamp = p->stamp;
    return slot;
}

/* Notes a page for cuda_pages_end to copy. */
static bool note_missing(struct ops_context *x, void *to, const void *from)
{
    struct cuda_pages *p = x->pages;
    if (p->missing_count == p->missing_capacity) {
        const size_t capacity = p->missing_capacity ? 2 * p->missing_capacity : 256;
        struct copy *missing = (struct copy *)realloc(p->missing, capacity * sizeof *missing);
        if (!missing) {
            cuda_fail(x, STATUS_NO_MEMORY, "out of memory for a step's pages");
            return false;
        }
        p->missing = missing;
        p->missing_capacity = capacity;
    }
    struct copy *copy = &p->missing[p->missing_count++];
    copy->to = to;
    copy->from = from;
    return true;
}

/* Where the page's copy lies; rows share pages, so it may have been taken for this kernel. */
static void *take_page(struct ops_context *x, const void *page)
{
    struct cuda_pages *p = x->pages;
    bool fresh;
    struct slot *slot = take(x, page, &fresh);
    if (!slot)
        return NULL;
    p->hits += !fresh && slot->come != ASKED; /* which was a miss when it was asked for */
    p->misses += fresh;
    p->predicted_hits += slot->come == PREDICTED;
    slot->come = COUNTED;
    if (fresh && !note_missing(x, slot->data, page))
        return NULL;
    return slot->data;
}

/* The page will be taken soon: where it is named, or (`near`, some time after that) its slot comes
 * to the cache. */
static void hint(const struct cuda_pages *p, const void *page, bool near)
{
    struct slot **at = chain(p, page);
    __builtin_prefetch(near ? (const void *)*at : (const void *)at);
}

size_t cuda_pages_take(struct ops_context *x, const void *const *pages, size_t count,
                       const void **data)
{
    struct cuda_pages *p = x->pages;
    for (size_t i = 0; i < count; i++) {
        if (i + 2 * AHEAD < count)
            hint(p, pages[i + 2 * AHEAD], false);
        if (i + AHEAD < count)
            hint(p, pages[i + AHEAD], true);
        data[i] = pages[i] ? take_page(x, pages[i]) : NULL;
        if (pages[i] && !data[i])
            return i;
    }
    return count;
}

void *cuda_pages_create(struct ops_context *x, const void *page)
{
    bool fresh;
    struct slot *slot = take(x, page, &fresh);
    return slot ? slot->data : NULL;
}

/* Whole pages, in words of `T`. Grid: pages x parts of one, so that all of it is under way at once:
 * a read of host memory takes longer than most of what a page's bytes do. */
template <typename T>
static __global__ void __launch_bounds__(COPY_THREADS)
    copy_pages(const __grid_constant__ struct copies copies, uint32_t words)
{
    const struct copy copy = copies.list ? copies.list[blockIdx.x] : copies.few[blockIdx.x];
    const uint32_t first = blockIdx.y * COPY_EACH * COPY_THREADS + threadIdx.x;
    T ahead[COPY_EACH] = {};
#pragma unroll
    for (uint32_t a = 0; a < COPY_EACH; a++)
        if (first + a * COPY_THREADS < words)
            ahead[a] = ((const T *)copy.from)[first + a * COPY_THREADS];
#pragma unroll
    for (uint32_t a = 0; a < COPY_EACH; a++)
        if (first + a * COPY_THREADS < words)
            ((T *)copy.to)[first + a * COPY_THREADS] = ahead[a];
}

/* Counts what the last copies took, once they are done. */
static void count_time(struct cuda_pages *p)
{
    float ms;
    if (p->timed || cudaEventQuery(p->copied) != cudaSuccess)
        return;
    p->timed = true;
    if (cudaEventElapsedTime(&ms, p->began, p->copied) == cudaSuccess)
        p->copy_ns += (uint64_t)(ms * 1e6f);
}

template <typename T>
static void launch_copies_of(struct ops_context *x, cudaStream_t stream,
                             const struct copies &copies, size_t count)
{
    const uint32_t words = (uint32_t)(x->page_bytes / sizeof(T));
    const dim3 grid((unsigned)count, cuda_ceil(words, COPY_EACH * COPY_THREADS));
    CUDA_LAUNCH_ON(x, stream, copy_pages<T>, grid, dim3(COPY_THREADS), 0, copies, words);
}

/* All in one launch, read from where the host keeps them: pages are small, and a copy call for each
 * would cost more than its bytes. `pinned`: the list is. */
static void launch_copies(struct ops_context *x, cudaStream_t stream, const struct copy *list,
                          size_t count, bool pinned)
{
    struct copies copies = {};
    if (count <= COPY_FEW)
        memcpy(copies.few, list, count * sizeof *list);
    else
        copies.list =
            pinned ? list : (const struct copy *)cuda_stage(x, list, count * sizeof *list);
    if (x->page_bytes % sizeof(uint4) == 0)
        launch_copies_of<uint4>(x, stream, copies, count);
    else
        launch_copies_of<uint32_t>(x, stream, copies, count);
}

void cuda_pages_end(struct ops_context *x)
{
    struct cuda_pages *p = x->pages;
    const size_t count = p->missing_count;
    p->missing_count = 0;
    if (x->failed || !count)
        return;
    count_time(p); /* those before; a step that nobody waited for is not counted */
    cuda_check(x, cudaEventRecord(p->began, x->stream), "an event");
    launch_copies(x, x->stream, p->missing, count, false);
    if (!x->failed)
        p->waiting = cuda_check(x, cudaEventRecord(p->copied, x->stream), "an event");
    p->timed = !p->waiting;
}

/* ---- ahead ---- */

extern "C" void cuda_fetched(struct ops_context *x)
{
    struct cuda_pages *p = x->pages;
    if (x->failed || !p->under_way)
        return;
    p->under_way = false;
    p->joined = p->batches;
    float ms;
    if (cuda_check(x, cudaEventSynchronize(p->fetched), "copies of pages to the GPU") &&
        cudaEventElapsedTime(&ms, p->left, p->fetched) == cudaSuccess)
        p->copy_ns += (uint64_t)(ms * 1e6f);
}

/* A page of the batch `count` long; false: no room for it, nor for others. */
static bool add_ahead(struct ops_context *x, const void *page, bool predicted, size_t *count)
{
    struct cuda_pages *p = x->pages;
    struct slot *slot = find(p, page);
    if (slot) {
        touch(p, slot);
        return true;
    }
    if (*count == BATCH_MOST || !(slot = take_new(x, page, p->batches + 1)))
        return false;
    slot->batch = p->batches + 1;
    slot->come = predicted ? PREDICTED : ASKED;
    p->batch[*count].to = slot->data;
    p->batch[(*count)++].from = page;
    p->predicted += predicted;
    p->misses += !predicted;
    return true;
}

extern "C" void cuda_prefetch(struct ops_context *x, const void *const *pages, size_t count,
                              bool predicted)
{
    struct cuda_pages *p = x->pages;
    size_t n = 0;
    if (x->recording) /* the streams would become one recording */
        return;
    cuda_fetched(x); /* the list of the batch before is free */
    if (x->failed)
        return;
    for (size_t i = 0; i < count; i++)
        if (pages[i] && !add_ahead(x, pages[i], predicted, &n))
            break;
    if (!n || x->failed)
        return;
    /* Behind everything that may still read what lay in the slots. */
    cuda_check(x, cudaEventRecord(p->reached, x->stream), "an event");
    cuda_check(x, cudaStreamWaitEvent(p->stream, p->reached, 0), "the wait of a copy");
    cuda_check(x, cudaEventRecord(p->left, p->stream), "an event");
    launch_copies(x, p->stream, p->batch, n, true);
    cuda_check(x, cudaEventRecord(p->fetched, p->stream), "an event");
    p->batches++;
    p->under_way = true;
}

extern "C" bool cuda_holds(const struct ops_context *x, const void *page)
{
    return find(x->pages, page);
}

struct ops_page_stats cuda_page_stats(const struct ops_context *x)
{
    struct ops_page_stats out = {};
    out.capacity = x->pages->capacity;
    out.resident = x->pages->count;
    out.hits = x->pages->hits;
    out.misses = x->pages->misses;
    out.copy_ns = x->pages->copy_ns;
    out.predicted = x->pages->predicted;
    out.predicted_hits = x->pages->predicted_hits;
    return out;
}

void cuda_pages_settle(struct ops_context *x)
{
    struct cuda_pages *p = x->pages;
    if (x->failed || !p->waiting)
        return;
    p->waiting = false;
    if (cuda_check(x, cudaEventSynchronize(p->copied), "copies of pages to the GPU"))
        count_time(p);
}
