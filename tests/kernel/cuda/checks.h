/* checks.h - what is checked of each op of the CUDA backend: against ref, and that a part alone
 * gives the same bits. Thread: main. Each makes its own weights and data, and says what it found.
 */
#ifndef TESTS_KERNEL_CUDA_CHECKS_H
#define TESTS_KERNEL_CUDA_CHECKS_H

#include "tests/kernel/cuda/bed.h"

#define CHECK_SEGMENTS 128 /* at most, of one call */

void check_ends(struct bed *b); /* embed, logits */
void check_many_logits(struct bed *b, uint32_t count);
void check_draw(struct bed *b);
void check_pack(struct bed *b);

/* n segments of counts[i] rows, with states as the bed has them. */
void check_mamba(struct bed *b, const uint32_t *counts, uint32_t n);

/* `count` chunks against ref, and `many` in one call against these. */
void check_encode(struct bed *b, uint32_t count, uint32_t many); /* chunks */

/* n segments of counts[i] rows, which see about chunks[i] landmarks. */
void check_retrieve(struct bed *b, const uint32_t *counts, const uint64_t *chunks, uint32_t n);

/* That many rows, and `copies` of them in one call. */
void check_hsa(struct bed *b, uint32_t row_count, uint32_t copies);

/* Attention alone of that many rows in one call, `times` times, against few rows at a time: with
 * rows enough that blocks of the form of many rows each go through several groups. What they carry
 * over from one to the next shows in no fewer rows, and what hangs on which warp comes first not in
 * every call. */
void check_hsa_often(struct bed *b, uint32_t row_count, uint32_t times);

#endif
