#include "tests/kernel/cuda/bed.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "engine/bf16.h"
#include "proto/base/assert.h"

static uint64_t random_state;

uint32_t random_below(uint32_t n)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((random_state >> 33) % n);
}

/* The sum of four uniform numbers. */
float random_normal(void)
{
    float sum = 0;
    for (int i = 0; i < 4; i++)
        sum += (float)random_below(1u << 20) / (1 << 20) - 0.5f;
    return sum * 1.7320508f;
}

float *random_floats(size_t count, float scale)
{
    float *out = malloc((count + 1) * sizeof *out);
    ASSERT(out);
    for (size_t i = 0; i < count; i++)
        out[i] = random_normal() * scale;
    return out;
}

enum status bed_open(struct bed *b, uint32_t max_rows, size_t device_bytes, struct error *err)
{
    random_state =
        b->seed * 0x9e3779b97f4a7c15u + (b->fp8 ? 2 : b->wide) + (b->states_bf16 ? 4 : 0);
    b->ref = ops_ref();
    b->cuda = ops_cuda();
    b->owned_count = 0;
    struct ops_options options = {.config = &b->config,
                                  .threads = 1,
                                  .max_rows = max_rows,
                                  .memory_dtype = b->wide ? OPS_FP32 : OPS_BF16,
                                  .device_memory_bytes = device_bytes,
                                  .states_bf16 = b->states_bf16};
    ASSERT(!b->ref->open(&options, &b->ref_context, err));
    options.landmarks_fp8 = b->fp8;
    const enum status status = b->cuda->open(&options, &b->cuda_context, err);
    if (status)
        b->ref->close(b->ref_context);
    return status;
}

void bed_close(struct bed *b)
{
    b->cuda->close(b->cuda_context);
    b->ref->close(b->ref_context);
    for (size_t i = 0; i < b->owned_count; i++)
        free(b->owned[i]);
}

struct ops_tensor weight(struct bed *b, uint32_t rows, uint32_t cols, float mean, float scale,
                         struct ops_tensor *device)
{
    const size_t count = (size_t)rows * cols;
    uint16_t *data = malloc(count * sizeof *data + 1);
    ASSERT(data && b->owned_count < sizeof b->owned / sizeof *b->owned);
    for (size_t i = 0; i < count; i++)
        data[i] = bf16_from_float(mean + scale * random_normal());
    b->owned[b->owned_count++] = data;
    const struct ops_tensor host = {.data = data, .dtype = OPS_BF16, .rows = rows, .cols = cols};
    *device = host;
    struct error err;
    if (b->cuda->place(b->cuda_context, device, &err)) {
        printf("placing a weight failed: %s\n", err.message);
        exit(1);
    }
    return host;
}

void *to_device(struct bed *b, const void *data, size_t bytes)
{
    void *memory = b->cuda->alloc(b->cuda_context, bytes);
    ASSERT(memory);
    if (data)
        b->cuda->copy(b->cuda_context, memory, data, bytes);
    return memory;
}

float *to_host(struct bed *b, const void *memory, size_t count)
{
    float *out = malloc((count + 1) * sizeof *out);
    ASSERT(out);
    for (size_t i = 0; i < count; i++)
        out[i] = NAN;
    b->cuda->copy(b->cuda_context, out, memory, count * sizeof *out);
    return out;
}

void release(struct bed *b, void *memory)
{
    b->cuda->release(b->cuda_context, memory);
}

float *widen(const struct bed *b, const void *memory, size_t count)
{
    float *out = malloc((count + 1) * sizeof *out);
    ASSERT(out);
    for (size_t i = 0; i < count; i++)
        out[i] =
            b->wide ? ((const float *)memory)[i] : bf16_to_float(((const uint16_t *)memory)[i]);
    return out;
}

void to_dtype(const struct bed *b, const float *from, size_t count, void *memory)
{
    for (size_t i = 0; i < count; i++) {
        if (b->wide)
            ((float *)memory)[i] = from[i];
        else
            ((uint16_t *)memory)[i] = bf16_from_float(from[i]);
    }
}

struct ops_rows make_rows(const uint32_t *counts, uint32_t n, uint64_t position,
                          struct ops_segment *segments)
{
    uint32_t row = 0;
    for (uint32_t i = 0; i < n; i++) {
        segments[i] = (struct ops_segment){.row = row, .count = counts[i], .position = position};
        row += counts[i];
        position += 7;
    }
    return (struct ops_rows){.segments = segments, .segment_count = n, .row_count = row};
}

int checks, failures;

void verdict(const struct bed *b, const char *what, bool passed, const char *format, ...)
{
    char text[256];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    struct error err = {0};
    const bool broken = b->cuda->check(b->cuda_context, &err) != STATUS_OK;
    checks++;
    failures += !passed || broken;
    printf("%-4s %-4s %-30s %-22s seed %-6llu %s%s%s\n", passed && !broken ? "ok" : "FAIL",
           b->wide  ? "fp32"
           : b->fp8 ? "fp8"
                    : "bf16",
           b->name, what, (unsigned long long)b->seed, text, broken ? "; BROKEN: " : "",
           broken ? err.message : "");
    fflush(stdout);
}

void compare(const struct bed *b, const char *what, const float *got, const float *want,
             size_t count, double bound)
{
    double off = 0, norm = 0, worst = 0;
    size_t worst_at = 0, bad = 0, first_bad = count;
    for (size_t i = 0; i < count; i++) {
        const double difference = fabs((double)got[i] - (double)want[i]);
        off += difference * difference;
        norm += (double)want[i] * (double)want[i];
        if (!(difference <= worst)) {
            worst = difference;
            worst_at = i;
        }
    }
    const double typical = sqrt(norm / (double)(count ? count : 1));
    for (size_t i = 0; i < count; i++) {
        const double allowed = bound * (16 * typical + fabs((double)want[i]));
        if (!(fabs((double)got[i] - (double)want[i]) <= allowed)) {
            first_bad = first_bad == count ? i : first_bad;
            bad++;
        }
    }
    const double relative = norm > 0 ? sqrt(off / norm) : off;
    const bool passed = relative <= bound && !bad;
    if (passed)
        verdict(b, what, true, "error %.1e (allowed %.1e), worst %.1e", relative, bound, worst);
    else
        verdict(b, what, false,
                "error %.2e (allowed %.1e), worst %.2e at %zu (got %g, want %g), %zu of %zu far "
                "off, the first at %zu",
                relative, bound, worst, worst_at, (double)got[worst_at], (double)want[worst_at],
                bad, count, first_bad);
}

void compare_within(const struct bed *b, const char *what, const float *got, const float *want,
                    size_t count, double bound, const float *bounds)
{
    double off = 0, norm = 0, share = 0;
    size_t at = 0, bad = 0;
    for (size_t i = 0; i < count; i++) {
        const double difference = fabs((double)got[i] - (double)want[i]);
        off += difference * difference;
        norm += (double)want[i] * (double)want[i];
        bad += !(difference <= bounds[i]);
        if (!(difference <= share * bounds[i])) {
            share = difference / bounds[i];
            at = i;
        }
    }
    const double relative = norm > 0 ? sqrt(off / norm) : off;
    verdict(b, what, relative <= bound && !bad,
            "error %.1e (allowed %.1e), worst %.2f of its own bound (%zu: got %g, want %g), %zu of "
            "%zu far off",
            relative, bound, share, at, (double)got[at], (double)want[at], bad, count);
}

void same(const struct bed *b, const char *what, const void *got, const void *want, size_t bytes)
{
    size_t at = 0;
    while (at < bytes && ((const char *)got)[at] == ((const char *)want)[at])
        at++;
    verdict(b, what, at == bytes, at == bytes ? "same bits" : "byte %zu of %zu differs", at, bytes);
}

double error_bound(const struct bed *b, double stages)
{
    return b->wide ? 2e-5 : 4 * sqrt(stages) / 512;
}
