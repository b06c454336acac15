/* picked.cu - the pages of a retrieval's picks, named once for each chunk and not for every row
 * that reads it: rows pick the same few chunks over and over. A kernel marks what was picked, in a
 * bit map over the chunks of each segment; the host says where the page of each marked chunk lies,
 * in the order of the marks; a second kernel gives each pick the page of its chunk, which it finds
 * by the number of marks in front of it. */
#include <stdlib.h>
#include <string.h>

#include "engine/cuda/cuda.h"
#include "engine/cuda/device.cuh"

#define MARK_THREADS 256
#define MARK_BLOCKS 128 /* for a segment, at most */
#define MARK_BITS 64    /* of a word */

struct picked_segment {
    uint32_t row, count;
    uint64_t first; /* of its words */
};

struct cuda_marks {
    struct picked_segment *segments; /* [max_rows] */
    uint32_t segment_count, row_count, longest;
    size_t words, capacity;
    uint64_t *marks, *device_marks; /* [words]; the first is pinned */
    /* Marks in front of each word, [words], and device pages of all marked chunks; the first is
     * pinned. */
    char *names, *device_names;
    const void **pages; /* [max_rows, Hr, K] on the device */
};

/* Of the segment blockIdx.y. */
template <typename F>
static __device__ __forceinline__ void for_picks(const struct picked_segment &s, uint32_t per_row,
                                                 const F &visit)
{
    const size_t from = (size_t)s.row * per_row, end = from + (size_t)s.count * per_row;
    for (size_t i = from + blockIdx.x * MARK_THREADS + threadIdx.x; i < end;
         i += gridDim.x * MARK_THREADS)
        visit(i);
}

/* Grid: MARK_BLOCKS at most x segments. */
static __global__ void __launch_bounds__(MARK_THREADS)
    mark_picks(const struct picked_segment *segments, uint32_t per_row, const uint64_t *chunks,
               const float *weights, uint64_t *marks)
{
    const struct picked_segment s = segments[blockIdx.y];
    for_picks(s, per_row, [&](size_t i) {
        unsigned long long *word = (unsigned long long *)marks + s.first + chunks[i] / MARK_BITS;
        const unsigned long long mark = 1ull << chunks[i] % MARK_BITS;
        /* Most are there already, and those that write a word wait for each other. */
        if (weights[i] > 0 && !(*(volatile unsigned long long *)word & mark))
            atomicOr(word, mark);
    });
}

/* Grid: MARK_BLOCKS at most x segments. */
static __global__ void __launch_bounds__(MARK_THREADS)
    place_picks(const struct picked_segment *segments, uint32_t per_row, const uint64_t *chunks,
                const float *weights, const uint64_t *marks, const uint32_t *before,
                const void *const *names, const void **pages)
{
    const struct picked_segment s = segments[blockIdx.y];
    for_picks(s, per_row, [&](size_t i) {
        const void *page = NULL;
        if (weights[i] > 0) {
            const uint64_t word = s.first + chunks[i] / MARK_BITS;
            const uint64_t below = marks[word] & ((1ull << chunks[i] % MARK_BITS) - 1);
            page = names[before[word] + (uint32_t)__popcll(below)];
        }
        pages[i] = page;
    });
}

bool cuda_picked_open(struct ops_context *x)
{
    const size_t picks = (size_t)x->max_rows * x->config.retrieval_heads * x->config.topk;
    struct cuda_marks *p = x->marks = (struct cuda_marks *)calloc(1, sizeof *p);
    if (!p)
        return false;
    p->segments = (struct picked_segment *)calloc(x->max_rows, sizeof *p->segments);
    p->pages = (const void **)cuda_take(x, picks * sizeof *p->pages);
    return p->segments && p->pages;
}

static void release_words(struct cuda_marks *p)
{
    cuda_free_host(p->marks);
    cuda_free_host(p->names);
    cudaFree(p->device_marks);
    cudaFree(p->device_names);
    p->marks = p->device_marks = NULL;
    p->names = p->device_names = NULL;
    p->capacity = 0;
}

void cuda_picked_close(struct ops_context *x)
{
    struct cuda_marks *p = x->marks;
    if (!p)
        return;
    release_words(p);
    if (p->pages)
        cudaFree(p->pages);
    free(p->segments);
    free(p);
    x->marks = NULL;
}

/* Where the pages lie in `names`. */
static size_t names_offset(const struct cuda_marks *p)
{
    return (p->words * sizeof(uint32_t) + sizeof(void *) - 1) / sizeof(void *) * sizeof(void *);
}

static bool reserve_words(struct ops_context *x)
{
    struct cuda_marks *p = x->marks;
    const size_t picks = (size_t)x->max_rows * x->config.retrieval_heads * x->config.topk;
    if (p->words <= p->capacity)
        return true;
    const size_t words = p->words + p->words / 2 + 1024;
    const size_t bytes = (words + 1) * sizeof(uint32_t) + (picks + 1) * sizeof(void *);
    release_words(p);
    p->marks = (uint64_t *)cuda_alloc_host(x, words * sizeof *p->marks);
    p->device_marks = (uint64_t *)cuda_take(x, words * sizeof *p->marks);
    p->names = (char *)cuda_alloc_host(x, bytes);
    p->device_names = (char *)cuda_take(x, bytes);
    if (!p->marks || !p->device_marks || !p->names || !p->device_names) {
        cuda_fail(x, STATUS_NO_MEMORY, "out of memory for marks of %zu chunks", words * MARK_BITS);
        return false;
    }
    p->capacity = words;
    return true;
}

static dim3 grid_of(const struct ops_context *x)
{
    const struct cuda_marks *p = x->marks;
    const uint64_t picks = (uint64_t)p->longest * x->config.retrieval_heads * x->config.topk;
    const uint32_t blocks = cuda_ceil(picks, MARK_THREADS);
    return dim3(blocks < MARK_BLOCKS ? blocks : MARK_BLOCKS, p->segment_count);
}

static const struct picked_segment *stage_picked(struct ops_context *x)
{
    const struct cuda_marks *p = x->marks;
    return (const struct picked_segment *)cuda_stage(x, p->segments,
                                                     p->segment_count * sizeof *p->segments);
}

void cuda_mark_picks(struct ops_context *x, const struct ops_rows *rows,
                     const struct ops_landmarks *landmarks)
{
    struct cuda_marks *p = x->marks;
    p->words = 0;
    p->longest = 0;
    p->segment_count = rows->segment_count;
    p->row_count = rows->row_count;
    for (uint32_t i = 0; i < rows->segment_count; i++) {
        const struct ops_segment *segment = &rows->segments[i];
        p->segments[i] = (struct picked_segment){segment->row, segment->count, p->words};
        p->words += cuda_ceil(landmarks[i].count, MARK_BITS);
        p->longest = segment->count > p->longest ? segment->count : p->longest;
    }
    if (x->failed || !p->words || !reserve_words(x))
        return;
    cuda_check(x,
               cudaMemsetAsync(p->device_marks, 0, p->words * sizeof *p->device_marks, x->stream),
               "cudaMemset");
    CUDA_LAUNCH(x, mark_picks, grid_of(x), dim3(MARK_THREADS), 0, stage_picked(x),
                x->config.retrieval_heads * x->config.topk, x->pick_chunks, x->pick_weights,
                p->device_marks);
    cuda_copy_out(x, p->marks, p->device_marks, p->words * sizeof *p->marks);
}

extern "C" const uint64_t *cuda_picked(const struct ops_context *x, uint32_t segment)
{
    const struct cuda_marks *p = x->marks;
    return x->failed || !p->words ? NULL : p->marks + p->segments[segment].first;
}

extern "C" bool cuda_name_picked(struct ops_context *x, const void *const *pages, size_t count)
{
    struct cuda_marks *p = x->marks;
    cuda_begin(x);
    cuda_pages_begin(x);
    const void **names = (const void **)(p->names + names_offset(p));
    const bool room = cuda_pages_take(x, pages, count, names) == count;
    cuda_pages_end(x);
    if (!room || x->failed) {
        cuda_pages_settle(x); /* the caller may change its pages from here on */
        return false;
    }
    uint32_t marks = 0;
    for (size_t i = 0; i < p->words; i++) {
        ((uint32_t *)p->names)[i] = marks;
        marks += (uint32_t)__builtin_popcountll(p->marks[i]);
    }
    ASSERT(marks == count);
    cuda_copy_in(x, p->device_names, p->names, names_offset(p) + count * sizeof *names);
    CUDA_LAUNCH(x, place_picks, grid_of(x), dim3(MARK_THREADS), 0, stage_picked(x),
                x->config.retrieval_heads * x->config.topk, x->pick_chunks, x->pick_weights,
                p->device_marks, (const uint32_t *)p->device_names,
                (const void *const *)(p->device_names + names_offset(p)), p->pages);
    return !x->failed;
}

const void *const *cuda_picked_pages(const struct ops_context *x, uint32_t row_count)
{
    ASSERT(row_count == x->marks->row_count);
    return x->marks->pages;
}
