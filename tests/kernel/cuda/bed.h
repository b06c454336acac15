/* bed.h - one shape on two backends, ref and CUDA: weights and data in both worlds, and verdicts on
 * what CUDA made of them. Thread: main. A bed owns its contexts and its weights' host memory; what
 * random_floats, to_host and widen return is the caller's, to be freed.
 *
 * Tolerances. Wide (fp32) differs from ref by the order of its sums: a relative error of a few
 * units of 2^-24 times the square root of their length, so 2e-5 of the norm leaves room for
 * thousands of terms. With bf16, each input of a product is rounded by at most 2^-9 of itself; a
 * naive computation with the same roundings errs by about sqrt(stages) 2^-9, and twice that is
 * allowed, doubled again where a nonlinearity (softmax, gated norm) stands behind it. Of a Mamba
 * block's states each number has its own bound, too (tests/lib/mamba_bounds.h). */
#ifndef TESTS_KERNEL_CUDA_BED_H
#define TESTS_KERNEL_CUDA_BED_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/ops.h"

/* ---- random numbers: a bed's seed begins them anew ---- */

uint32_t random_below(uint32_t n);
float random_normal(void); /* about normal, of variance 1 */
float *random_floats(size_t count, float scale);

/* ---- a bed ---- */

struct bed {
    /* Set by the caller; `name` is borrowed. */
    const char *name;
    uint64_t seed;
    struct model_config config;
    bool wide, fp8, states_bf16; /* fp32; fp8: landmarks */
    /* Set by bed_open. */
    const struct ops *ref, *cuda;
    struct ops_context *ref_context, *cuda_context;
    void *owned[256]; /* host memory of weights */
    size_t owned_count;
};

/* Opens both backends; a device_bytes of 0 is the backend's own choice. Returns what opening CUDA
 * returned: after a failure there is nothing to close. */
enum status bed_open(struct bed *b, uint32_t max_rows, size_t device_bytes, struct error *err);
void bed_close(struct bed *b);

/* A bf16 weight in both worlds: what bf16 holds is the same number in both precisions. */
struct ops_tensor weight(struct bed *b, uint32_t rows, uint32_t cols, float mean, float scale,
                         struct ops_tensor *device);

/* The same for a `struct bed *b` at hand. */
#define WEIGHT(host, device, rows, cols, mean, scale) \
    (host) = weight(b, rows, cols, mean, scale, &(device))
#define MATRIX(host, device, rows, cols) \
    WEIGHT(host, device, rows, cols, 0, 1 / sqrtf((float)(cols)))

/* Device memory, with a copy of `data` unless that is NULL; given back by `release`. */
void *to_device(struct bed *b, const void *data, size_t bytes);
float *to_host(struct bed *b, const void *memory, size_t count);
void release(struct bed *b, void *memory);

/* `count` elements of host memory in the bed's dtype, fp32 or bf16. */
float *widen(const struct bed *b, const void *memory, size_t count);
void to_dtype(const struct bed *b, const float *from, size_t count, void *memory);

/* `n` segments of counts[i] rows, one behind the other; `segments` is written and borrowed. */
struct ops_rows make_rows(const uint32_t *counts, uint32_t n, uint64_t position,
                          struct ops_segment *segments);

/* ---- verdicts: one line each, counted ---- */

extern int checks, failures;

/* It fails, too, where the device reports an error. */
void verdict(const struct bed *b, const char *what, bool passed, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* ||got - want|| / ||want|| against `bound`; NaN and infinity never pass. No element may be far off
 * either: by more than 16 times what a typical one may be, and `bound` of its own size, since what
 * is rounded are products as large as itself (the largest of a state are many times a typical
 * one). */
void compare(const struct bed *b, const char *what, const float *got, const float *want,
             size_t count, double bound);

/* ||got - want|| / ||want|| against `bound`, and each number against its own of `bounds`. */
void compare_within(const struct bed *b, const char *what, const float *got, const float *want,
                    size_t count, double bound, const float *bounds);

/* Bit for bit. */
void same(const struct bed *b, const char *what, const void *got, const void *want, size_t bytes);

/* The relative error that `stages` products behind each other may have. */
double error_bound(const struct bed *b, double stages);

#endif
