/* pack_state.cu - rounds a state to its packed form, and back: see packed.h. Eight threads a block
 * of numbers, eight numbers a thread: their 120 bits are 15 whole bytes, which are put together and
 * taken apart in shared memory, so that the words come and go in rows. */
#include "engine/cuda/cuda.h"
#include "engine/cuda/device.cuh"

extern "C" {
#include "engine/packed.h"
}

#define THREADS 256
#define EACH 8 /* numbers of a thread */
#define LANES (PACKED_BLOCK / EACH)
#define GROUP (THREADS * EACH / PACKED_BLOCK) /* blocks of a thread block */

static __device__ float power_of_two(int e)
{
    return __uint_as_float((unsigned)(e + 127) << 23);
}

/* As CPUs write it; a product of the device's has other bits. */
static __device__ float no_number(void)
{
    return __uint_as_float(0x7fc00000u);
}

static __device__ int scale_of(unsigned largest)
{
    if (largest >= 0x7f800000u)
        return PACKED_NOT_FINITE;
    int e = (int)(largest >> 23) - 127 - (PACKED_BITS - 2);
    if (e < PACKED_LEAST_E)
        return PACKED_LEAST_E;
    if (rintf(__uint_as_float(largest) * power_of_two(-e)) > PACKED_MOST)
        e++;
    return e > PACKED_MOST_E ? PACKED_NOT_FINITE : e;
}

static __global__ void __launch_bounds__(THREADS)
    pack(float *state, size_t count, size_t blocks, unsigned char *words, signed char *scales)
{
    __shared__ __align__(8) unsigned char staged[GROUP * PACKED_WORD_BYTES];
    const size_t first = (size_t)blockIdx.x * GROUP;
    const size_t block = first + threadIdx.x / LANES;
    const size_t at = ((size_t)blockIdx.x * THREADS + threadIdx.x) * EACH;
    float x[EACH];
    unsigned largest = 0;
    for (int i = 0; i < EACH; i++) {
        x[i] = at + i < count ? state[at + i] : 0;
        const unsigned magnitude = __float_as_uint(x[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    for (int step = LANES / 2; step; step /= 2) {
        const unsigned other = __shfl_xor_sync(CUDA_ALL_LANES, largest, step);
        largest = other > largest ? other : largest;
    }
    const int e = scale_of(largest);
    const bool good = e != PACKED_NOT_FINITE;
    const float up = good ? power_of_two(-e) : 0, down = good ? power_of_two(e) : 0;
    unsigned long long four[2] = {0, 0};
    for (int i = 0; i < EACH; i++) {
        const int q = good ? (int)rintf(x[i] * up) : 0;
        if (at + i < count)
            state[at + i] = good ? (float)q * down : no_number();
        four[i / 4] |= (unsigned long long)((unsigned)q & ((1u << PACKED_BITS) - 1))
                       << (i % 4 * PACKED_BITS);
    }
    const unsigned long long low = four[0] | four[1] << 60, high = four[1] >> 4;
    unsigned char *to = staged + threadIdx.x * PACKED_BITS;
    for (int i = 0; i < 8; i++)
        to[i] = (unsigned char)(low >> 8 * i);
    for (int i = 0; i < 7; i++)
        to[8 + i] = (unsigned char)(high >> 8 * i);
    if (threadIdx.x % LANES == 0 && block < blocks)
        scales[block] = (signed char)e;
    __syncthreads();
    /* A block's words are a multiple of 8 bytes, and so is where they begin. */
    const size_t here = blocks - first < GROUP ? blocks - first : GROUP;
    const unsigned *from = (const unsigned *)staged;
    unsigned *out = (unsigned *)(words + first * PACKED_WORD_BYTES);
    for (size_t i = threadIdx.x; i < here * PACKED_WORD_BYTES / 4; i += THREADS)
        out[i] = from[i];
}

static __global__ void __launch_bounds__(THREADS)
    unpack(const unsigned char *words, const signed char *scales, size_t count, size_t blocks,
           float *state)
{
    __shared__ __align__(8) unsigned char staged[GROUP * PACKED_WORD_BYTES];
    const size_t first = (size_t)blockIdx.x * GROUP;
    const size_t block = first + threadIdx.x / LANES;
    const size_t at = ((size_t)blockIdx.x * THREADS + threadIdx.x) * EACH;
    const size_t here = blocks - first < GROUP ? blocks - first : GROUP;
    const unsigned *from = (const unsigned *)(words + first * PACKED_WORD_BYTES);
    for (size_t i = threadIdx.x; i < here * PACKED_WORD_BYTES / 4; i += THREADS)
        ((unsigned *)staged)[i] = from[i];
    __syncthreads();
    if (block >= blocks)
        return;
    const unsigned char *mine = staged + threadIdx.x * PACKED_BITS;
    unsigned long long four[2] = {0, 0};
    for (int i = 0; i < 8; i++)
        four[0] |= (unsigned long long)mine[i] << 8 * i;
    for (int i = 0; i < 7; i++)
        four[1] |= (unsigned long long)mine[8 + i] << 8 * i;
    four[1] = four[1] << 4 | four[0] >> 60;
    const int e = scales[block];
    const bool good = e != PACKED_NOT_FINITE;
    const float scale = good ? power_of_two(e) : 0;
    for (int i = 0; i < EACH; i++) {
        const unsigned bits = (unsigned)(four[i / 4] >> i % 4 * PACKED_BITS);
        const int q = (int)(bits << (32 - PACKED_BITS)) >> (32 - PACKED_BITS);
        if (at + i < count)
            state[at + i] = good ? (float)q * scale : no_number();
    }
}

extern "C" void cuda_pack_state(struct ops_context *x, float *state, size_t count, void *packed)
{
    const size_t blocks = packed_blocks(count);
    unsigned char *words = (unsigned char *)packed;
    CUDA_LAUNCH(x, pack, cuda_ceil(blocks, GROUP), THREADS, 0, state, count, blocks, words,
                (signed char *)words + blocks * PACKED_WORD_BYTES);
}

extern "C" void cuda_unpack_state(struct ops_context *x, const void *packed, size_t count,
                                  float *state)
{
    const size_t blocks = packed_blocks(count);
    const unsigned char *words = (const unsigned char *)packed;
    CUDA_LAUNCH(x, unpack, cuda_ceil(blocks, GROUP), THREADS, 0, words,
                (const signed char *)words + blocks * PACKED_WORD_BYTES, count, blocks, state);
}
