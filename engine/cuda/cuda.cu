/* cuda.cu - the CUDA backend: the device, its memory, what failed, the table. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine/cuda/cuda.h"
#include "engine/cuda/device.cuh"
#include "engine/cuda/encode.cuh"
#include "engine/cuda/mamba.cuh"
#include "engine/cuda/retrieve.cuh"

extern "C" {
#include "engine/bf16.h"
#include "proto/base/hash.h"
#include "proto/base/log.h"
}

#define HOST_HEAD 256                 /* in front of host memory: its size */
#define HUGE_PAGE ((size_t)2 << 20)   /* of the host's memory, where it has them */
#define STAGE_BYTES ((size_t)8 << 20) /* several slices' pages: each refill waits */
#define STAGE_WAYS 8

/* ---- failures ---- */

void cuda_fail(struct ops_context *x, enum status status, const char *format, ...)
{
    if (x->failed)
        return;
    va_list args;
    va_start(args, format);
    vsnprintf(x->failure, sizeof x->failure, format, args);
    va_end(args);
    x->failed = status;
    log_event(LOG_ERROR, "cuda_failed", "message", LOG_STR, x->failure, NULL);
}

bool cuda_check(struct ops_context *x, cudaError_t error, const char *what)
{
    if (error != cudaSuccess)
        cuda_fail(x, error == cudaErrorMemoryAllocation ? STATUS_NO_MEMORY : STATUS_INTERNAL,
                  "the GPU failed in %s: %s", what, cudaGetErrorString(error));
    return error == cudaSuccess;
}

void cuda_launched(struct ops_context *x, const char *kernel)
{
    cudaError_t error = cudaGetLastError();
    x->idle = false;
    if (x->fail_launch && (!x->fail_kernel || strstr(kernel, x->fail_kernel)) &&
        --x->fail_launch == 0)
        error = cudaErrorLaunchFailure;
    cuda_check(x, error, kernel);
}

/* ---- memory ---- */

void *cuda_take(struct ops_context *x, size_t bytes)
{
    void *memory = NULL;
    if (x->failed)
        return NULL;
    cudaError_t error = cudaMalloc(&memory, bytes ? bytes : 1);
    if (error == cudaSuccess && x->fail_alloc && --x->fail_alloc == 0) {
        cudaFree(memory);
        error = cudaErrorMemoryAllocation;
    }
    if (error == cudaErrorMemoryAllocation) {
        cudaGetLastError(); /* an allocation that fails is not a broken device */
        return NULL;
    }
    if (!cuda_check(x, error, "cudaMalloc"))
        return NULL;
    if (!cuda_check(x, cudaMemsetAsync(memory, 0, bytes, x->stream), "cudaMemset")) {
        cudaFree(memory);
        return NULL;
    }
    return memory;
}

void cuda_give(struct ops_context *x, void *memory)
{
    if (memory)
        cuda_check(x, cudaFree(memory), "cudaFree"); /* waits for the work that uses it */
}

static void *cuda_alloc(struct ops_context *x, size_t bytes)
{
    return cuda_take(x, bytes);
}

/* Pages of `bytes` bytes, huge ones where the system has them: from 16 MB on they come and are
 * pinned two or three times as fast as the small ones that cudaHostAlloc takes. */
static char *map_pages(size_t bytes)
{
    char *const all = (char *)mmap(NULL, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED)
        return NULL;
    const size_t before = (HUGE_PAGE - (uintptr_t)all % HUGE_PAGE) % HUGE_PAGE;
    if (before)
        munmap(all, before);
    munmap(all + before + bytes, HUGE_PAGE - before);
    madvise(all + before, bytes, MADV_HUGEPAGE); /* a hint */
    return all + before;
}

static size_t host_bytes(size_t bytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return (HOST_HEAD + bytes + page - 1) / page * page;
}

void *cuda_alloc_host(struct ops_context *x, size_t bytes)
{
    const size_t all = host_bytes(bytes);
    char *memory = x->failed ? NULL : map_pages(all);
    if (!memory)
        return NULL;
    const cudaError_t error = cudaHostRegister(memory, all, cudaHostRegisterPortable);
    if (error != cudaSuccess)
        munmap(memory, all);
    if (error == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        return NULL;
    }
    if (!cuda_check(x, error, "cudaHostRegister"))
        return NULL;
    *(size_t *)memory = bytes;
    return memory + HOST_HEAD;
}

void cuda_free_host(void *memory)
{
    char *const head = memory ? (char *)memory - HOST_HEAD : NULL;
    if (!head)
        return;
    const size_t all = host_bytes(*(size_t *)head);
    cudaHostUnregister(head);
    munmap(head, all);
}

static void cuda_release_host(struct ops_context *x, void *memory)
{
    if (!memory)
        return;
    cuda_wait(x); /* for kernels that read it */
    cuda_fetched(x);
    cuda_pages_forget_range(x, memory, *(size_t *)((char *)memory - HOST_HEAD));
    cuda_free_host(memory);
}

void cuda_wait(struct ops_context *x)
{
    if (!x->failed)
        cuda_check(x, cudaStreamSynchronize(x->stream), "the work of this step");
}

/* After every copy. */
static bool copied(struct ops_context *x, cudaError_t error, const char *what)
{
    x->idle = false;
    if (x->fail_copy && --x->fail_copy == 0)
        error = cudaErrorLaunchFailure;
    return cuda_check(x, error, what);
}

void cuda_copy_out(struct ops_context *x, void *host, const void *device, size_t bytes)
{
    if (!x->failed)
        copied(x, cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, x->stream),
               "a copy from the GPU");
}

void cuda_copy_in(struct ops_context *x, void *device, const void *host, size_t bytes)
{
    if (!x->failed)
        copied(x, cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, x->stream),
               "a copy to the GPU");
}

static bool on_device(struct ops_context *x, const void *memory)
{
    cudaPointerAttributes attributes;
    return cuda_check(x, cudaPointerGetAttributes(&attributes, memory), "a look at a pointer") &&
           attributes.type == cudaMemoryTypeDevice;
}

/* Between device buffers the stream's order is enough; the host has to wait. */
static void cuda_copy(struct ops_context *x, void *to, const void *from, size_t bytes)
{
    if (x->failed || !bytes)
        return;
    const bool inside = on_device(x, to) && on_device(x, from);
    if (x->failed)
        return;
    copied(x, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, x->stream), "a copy");
    if (!inside)
        cuda_wait(x);
}

/* ---- staging ---- */

static bool stage_open(struct ops_context *x, size_t bytes)
{
    x->stage_host = (char *)cuda_alloc_host(x, bytes);
    x->stage_device = (char *)cuda_take(x, bytes);
    x->stage_bytes = bytes;
    x->stage_used = 0;
    return x->stage_host && x->stage_device;
}

static void free_retired(struct ops_context *x)
{
    for (uint32_t i = 0; i < x->retired_count; i += 2) {
        cuda_free_host(x->retired[i]);
        cudaFree(x->retired[i + 1]);
    }
    x->retired_count = 0;
}

void cuda_begin(struct ops_context *x)
{
    if (x->failed || (x->stage_used <= x->stage_bytes / 2 && !x->retired_count))
        return;
    cuda_wait(x); /* copies out of the buffer and kernels that read its twin are done */
    x->stage_used = 0;
    x->stage_epoch++;
    if (!x->failed)
        free_retired(x);
}

/* Where an array is remembered, or is to be: in its set of STAGE_WAYS, so that the tables of many
 * sequences do not drive each other out from step to step. */
static struct cuda_staged *find_staged(struct ops_context *x, uint64_t hash, const void *data,
                                       size_t bytes)
{
    struct cuda_staged *set = &x->staged[hash % (CUDA_STAGED / STAGE_WAYS) * STAGE_WAYS];
    struct cuda_staged *free_way = &set[(hash >> 32) % STAGE_WAYS]; /* any, if all are in use */
    for (size_t i = 0; i < STAGE_WAYS; i++) {
        if (set[i].epoch != x->stage_epoch)
            free_way = &set[i];
        else if (set[i].hash == hash && set[i].bytes == bytes &&
                 memcmp(set[i].host, data, bytes) == 0)
            return &set[i];
    }
    free_way->epoch = 0;
    return free_way;
}

void *cuda_stage(struct ops_context *x, const void *data, size_t bytes)
{
    if (x->failed)
        return NULL;
    const uint64_t hash = hash64(data, bytes, 0);
    struct cuda_staged *known = find_staged(x, hash, data, bytes);
    if (known->epoch)
        return known->device;
    if (bytes > x->stage_bytes - x->stage_used) {
        ASSERT(x->retired_count < 2 * CUDA_RETIRED);
        x->retired[x->retired_count++] = x->stage_host;
        x->retired[x->retired_count++] = x->stage_device;
        const size_t larger = 2 * (x->stage_bytes > bytes ? x->stage_bytes : bytes);
        if (!stage_open(x, larger)) {
            cuda_fail(x, STATUS_NO_MEMORY, "out of memory for %zu bytes between host and GPU",
                      larger);
            return NULL;
        }
    }
    char *host = x->stage_host + x->stage_used, *device = x->stage_device + x->stage_used;
    x->stage_used += (bytes + 255) / 256 * 256;
    if (x->stage_used > x->stage_bytes)
        x->stage_used = x->stage_bytes;
    memcpy(host, data, bytes);
    cuda_copy_in(x, device, host, bytes);
    if (x->failed)
        return NULL;
    *known = (struct cuda_staged){hash, x->stage_epoch, bytes, host, device};
    return device;
}

struct cuda_segment *cuda_segments(struct ops_context *x, const struct ops_rows *rows)
{
    struct cuda_segment *segments = (struct cuda_segment *)calloc(
        rows->segment_count ? rows->segment_count : 1, sizeof *segments);
    if (!segments) {
        cuda_fail(x, STATUS_NO_MEMORY, "out of memory for a step's segments");
        return NULL;
    }
    for (uint32_t i = 0; i < rows->segment_count; i++) {
        segments[i].row = rows->segments[i].row;
        segments[i].count = rows->segments[i].count;
        segments[i].position = rows->segments[i].position;
    }
    return segments;
}

/* ---- weights ---- */

/* Vectors become floats; matrices what products take. */
static void *convert(const struct ops_tensor *t, bool floats, size_t *bytes)
{
    const size_t count = (size_t)t->rows * t->cols;
    *bytes = count * (floats ? 4 : 2);
    void *out = malloc(*bytes ? *bytes : 1);
    if (!out)
        return NULL;
    for (size_t i = 0; i < count; i++) {
        const float value = t->dtype == OPS_FP32 ? ((const float *)t->data)[i]
                                                 : bf16_to_float(((const uint16_t *)t->data)[i]);
        if (floats)
            ((float *)out)[i] = value;
        else
            ((uint16_t *)out)[i] = bf16_from_float(value);
    }
    return out;
}

static enum status cuda_place(struct ops_context *x, struct ops_tensor *tensor, struct error *err)
{
    const bool floats = x->wide || tensor->rows == 1;
    const enum ops_dtype dtype = floats ? OPS_FP32 : OPS_BF16;
    const void *from = tensor->data;
    void *converted = NULL;
    size_t bytes = (size_t)tensor->rows * tensor->cols * (floats ? 4 : 2);
    if (x->placed_count == x->placed_capacity) {
        const size_t capacity = x->placed_capacity ? 2 * x->placed_capacity : 256;
        void **grown = (void **)realloc(x->placed, capacity * sizeof *grown);
        if (!grown)
            return error_set(err, STATUS_NO_MEMORY, "out of memory for the weights");
        x->placed = grown;
        x->placed_capacity = capacity;
    }
    if (dtype != tensor->dtype) {
        converted = convert(tensor, floats, &bytes);
        if (!converted)
            return error_set(err, STATUS_NO_MEMORY, "out of memory for the weights");
        from = converted;
    }
    void *device = cuda_take(x, bytes);
    if (device) {
        x->placed[x->placed_count++] = device;
        if (cuda_check(x, cudaMemcpyAsync(device, from, bytes, cudaMemcpyHostToDevice, x->stream),
                       "a copy of weights to the GPU"))
            cuda_wait(x); /* the memory it comes from is ours no longer */
    }
    free(converted);
    if (x->failed)
        return error_set(err, x->failed, "%s", x->failure);
    if (!device)
        return error_set(err, STATUS_NO_MEMORY,
                         "the weights do not fit the GPU's memory; use --backend cpu");
    tensor->data = device;
    tensor->dtype = dtype;
    return STATUS_OK;
}

/* ---- opening ---- */

static bool take_memory(struct ops_context *x)
{
    const struct model_config *c = &x->config;
    const size_t rows = x->max_rows, d = c->hidden_size, element = x->wide ? 4 : 2;
    const size_t picks = rows * c->retrieval_heads * c->topk;
    /* Every running sequence may end in a block that is not full; the plain form's have 64 rows. */
    const size_t timed = rows + (size_t)LIMITS_RUNNING * CUDA_BLOCK_TOKENS;
    const size_t blocks = rows / 64 + LIMITS_RUNNING;
    x->normed = cuda_take(x, rows * d * element);
    x->mixed = cuda_take(x, rows * c->inner_size * element);
    x->projected = (float *)cuda_take(x, rows * c->proj_size * 4);
    x->conv = (float *)cuda_take(x, rows * c->conv_size * 4);
    x->scanned = (float *)cuda_take(x, rows * c->inner_size * 4);
    x->scales = (float *)cuda_take(x, rows * 4);
    x->arrived = (uint32_t *)cuda_take(x, rows * sizeof *x->arrived);
    x->dt = (float *)cuda_take(x, timed * c->mamba_heads * 4);
    x->decay = (float *)cuda_take(x, timed * c->mamba_heads * 4);
    x->states = (float *)cuda_take(x, blocks * c->inner_size * c->state_size * 4);
    x->query = (float *)cuda_take(x, rows * c->retrieval_dim * 4);
    x->query_narrow = x->wide ? NULL : cuda_take(x, rows * c->retrieval_dim * 2);
    x->pick_chunks = (uint64_t *)cuda_take(x, picks * sizeof *x->pick_chunks);
    x->pick_weights = (float *)cuda_take(x, picks * sizeof *x->pick_weights);
    x->draw_weights =
        (uint64_t *)cuda_take(x, (size_t)CUDA_DRAWS * c->vocab_size * sizeof *x->draw_weights);
    x->drawn = (int32_t *)cuda_take(x, CUDA_DRAWS * sizeof *x->drawn);
    return x->normed && x->mixed && x->projected && x->conv && x->scanned && x->scales &&
           x->arrived && x->dt && x->decay && x->states && x->query &&
           (x->wide || x->query_narrow) && x->pick_chunks && x->pick_weights && x->draw_weights &&
           x->drawn && cuda_picked_open(x) && cuda_encode_open(x) && cuda_codes_open(x) &&
           stage_open(x, STAGE_BYTES);
}

static void cuda_close(struct ops_context *x)
{
    if (x->stream)
        cudaStreamSynchronize(x->stream);
    cuda_step_close(x);
    cuda_pages_close(x);
    cuda_codes_close(x);
    cuda_encode_close(x);
    cuda_picked_close(x);
    cuda_products_close(x);
    void *all[] = {x->scales,       x->arrived,      x->normed,     x->mixed,       x->projected,
                   x->conv,         x->scanned,      x->dt,         x->decay,       x->states,
                   x->query,        x->query_narrow, x->candidates, x->pick_chunks, x->pick_weights,
                   x->stage_device, x->draw_weights, x->drawn};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i])
            cudaFree(all[i]);
    free_retired(x);
    cuda_free_host(x->stage_host);
    for (size_t i = 0; i < x->placed_count; i++)
        cudaFree(x->placed[i]);
    free(x->placed);
    if (x->stream)
        cudaStreamDestroy(x->stream);
    free(x);
}

/* RAMBAD_CUDA_FAULT=alloc:N, copy:N or launch:N makes the N-th allocation, copy or launch from here
 * on fail, launch:N:KERNEL the N-th launch of that kernel. */
static void read_fault(struct ops_context *x)
{
    const char *fault = getenv("RAMBAD_CUDA_FAULT");
    if (fault && strncmp(fault, "alloc:", 6) == 0)
        x->fail_alloc = atol(fault + 6);
    if (fault && strncmp(fault, "copy:", 5) == 0)
        x->fail_copy = atol(fault + 5);
    if (fault && strncmp(fault, "launch:", 7) == 0) {
        const char *kernel = strchr(fault + 7, ':');
        x->fail_launch = atol(fault + 7);
        x->fail_kernel = kernel ? kernel + 1 : NULL; /* the environment stays */
    }
}

/* What the kernels that run here were compiled for. Code for older GPUs may run on newer ones, too
 * (its PTX), but lacks the waits of kernels that begin early, and code for sm_90 what sm_90a alone
 * has: its kernels of that kind are empty. */
enum made_for { MADE_FOR_OLDER, MADE_FOR_90, MADE_FOR_90A };
#ifdef __CUDACC__
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define MADE_FOR MADE_FOR_90A
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define MADE_FOR MADE_FOR_90
#else
#define MADE_FOR MADE_FOR_OLDER
#endif
static __device__ int code_is_for = MADE_FOR;

static int made_for(void)
{
    int out = MADE_FOR_OLDER;
    const bool known = cudaMemcpyFromSymbol(&out, code_is_for, sizeof out) == cudaSuccess;
    cudaGetLastError();
    return known ? out : MADE_FOR_OLDER;
}
#else
static int made_for(void)
{
    return MADE_FOR_90;
}
#endif

cudaError_t cuda_know_device(struct ops_context *x, cudaDeviceProp *device)
{
    const cudaError_t error = cudaGetDeviceProperties(device, 0);
    if (error != cudaSuccess)
        return error;
    x->multiprocessors = device->multiProcessorCount;
    x->shared_most = device->sharedMemPerBlockOptin;
    x->early = device->major >= 9 && made_for() >= MADE_FOR_90;
    x->hopper = x->early && made_for() == MADE_FOR_90A;
    return cudaSuccess;
}

/* Chooses the device and makes the stream. */
static enum status open_device(struct ops_context *x, struct error *err)
{
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || !count) {
        cudaGetLastError();
        return error_set(err, STATUS_UNSUPPORTED, "no NVIDIA GPU can be used here: %s",
                         error != cudaSuccess ? cudaGetErrorString(error) : "none found");
    }
    cudaDeviceProp device;
    error = cudaSetDevice(0);
    if (error == cudaSuccess)
        error = cuda_know_device(x, &device);
    if (error == cudaSuccess && device.major < 8)
        return error_set(err, STATUS_UNSUPPORTED,
                         "the GPU %s has compute capability %d.%d; 8.0 or later is needed",
                         device.name, device.major, device.minor);
    if (error == cudaSuccess)
        error = cudaStreamCreateWithFlags(&x->stream, cudaStreamNonBlocking);
    if (error != cudaSuccess)
        return error_set(err, STATUS_UNSUPPORTED, "the GPU cannot be used: %s",
                         cudaGetErrorString(error));
    snprintf(x->description, sizeof x->description, "cuda (%.100s, %s%s%s)", device.name,
             x->wide ? "fp32" : "bf16", x->fp8 ? ", landmarks fp8" : "",
             x->states_bf16 ? ", states bf16" : "");
    return STATUS_OK;
}

static enum status cuda_open(const struct ops_options *options, struct ops_context **out,
                             struct error *err)
{
    const struct model_config *c = options->config;
    if (c->retrieval_dim < 2)
        return error_set(err, STATUS_UNSUPPORTED,
                         "the CUDA backend needs a retrieval_dim of at least 2");
    if (options->landmarks_fp8 && options->memory_dtype == OPS_FP32)
        return error_set(err, STATUS_INVALID, "landmarks in fp8 stand for bf16 ones, not for fp32");
    if (options->states_bf16 && !cuda_mamba_keeps_bf16(c))
        return error_set(
            err, STATUS_INVALID,
            "the CUDA backend keeps states in bf16 for a state_size of 64 or 128 and a "
            "conv_kernel of 4");
    struct ops_context *x = (struct ops_context *)calloc(1, sizeof *x);
    if (!x)
        return error_set(err, STATUS_NO_MEMORY, "out of memory");
    x->config = *c;
    x->wide = options->memory_dtype == OPS_FP32;
    x->fp8 = options->landmarks_fp8;
    x->states_bf16 = options->states_bf16;
    x->max_rows = options->max_rows;
    x->page_bytes = (size_t)2 * c->chunk_tokens * c->kv_heads * c->head_dim * (x->wide ? 4 : 2);
    x->page_budget = options->device_memory_bytes;
    x->stage_epoch = 1;
    read_fault(x);
    enum status status = open_device(x, err);
    if (!status)
        status = cuda_products_open(x, err);
    if (!status)
        status = cuda_pages_open(x, err);
    if (!status)
        status = cuda_step_open(x, err);
    if (!status && !take_memory(x))
        status = error_set(err, STATUS_NO_MEMORY,
                           "out of GPU memory for activations of %u rows; use smaller slices or "
                           "--backend cpu",
                           x->max_rows);
    if (status) {
        cuda_close(x);
        return status;
    }
    *out = x;
    return STATUS_OK;
}

static size_t cuda_device_bytes(struct ops_context *x)
{
    size_t available = 0, total = 0;
    return cuda_check(x, cudaMemGetInfo(&available, &total), "cudaMemGetInfo") ? total - available
                                                                               : 0;
}

static const char *cuda_describe(const struct ops_context *x)
{
    return x->description;
}

static enum status cuda_check_failed(struct ops_context *x, struct error *err)
{
    if (!x->idle)
        cuda_wait(x);
    return x->failed ? error_set(err, x->failed, "%s", x->failure) : STATUS_OK;
}

static struct ops make_table(void)
{
    struct ops table = {};
    table.name = "cuda";
    table.open = cuda_open;
    table.close = cuda_close;
    table.describe = cuda_describe;
    table.check = cuda_check_failed;
    table.place = cuda_place;
    table.alloc = cuda_alloc;
    table.release = cuda_give;
    table.alloc_host = cuda_alloc_host;
    table.release_host = cuda_release_host;
    table.host_wrote = cuda_pages_forget;
    table.page_stats = cuda_page_stats;
    table.prefetch = cuda_prefetch;
    table.fetched = cuda_fetched;
    table.holds = cuda_holds;
    table.device_bytes = cuda_device_bytes;
    table.narrow_bytes = cuda_narrow_bytes;
    table.narrow_landmarks = cuda_narrow_landmarks;
    table.copy = cuda_copy;
    table.pack_state = cuda_pack_state;
    table.unpack_state = cuda_unpack_state;
    table.embed = cuda_embed;
    table.mamba = cuda_mamba;
    table.encode_chunks = cuda_encode_chunks;
    table.retrieve = cuda_retrieve;
    table.picked = cuda_picked;
    table.name_picked = cuda_name_picked;
    table.hsa_query = cuda_hsa_query;
    table.hsa_attend = cuda_hsa_attend;
    table.hsa_out = cuda_hsa_out;
    table.step_begin = cuda_step_begin;
    table.part_begin = cuda_part_begin;
    table.part_end = cuda_part_end;
    table.keep_rows = cuda_keep_rows;
    table.draw = cuda_draw;
    table.logits = cuda_logits;
    return table;
}

extern "C" const struct ops *ops_cuda(void)
{
    static const struct ops table = make_table();
    return &table;
}
