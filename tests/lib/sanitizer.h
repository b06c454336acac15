/* sanitizer.h - what a test must know of the sanitizer it was built with, and tell it; the daemon
 * of the same tree has the same. */
#ifndef TESTS_LIB_SANITIZER_H
#define TESTS_LIB_SANITIZER_H

/* How many times as much memory the same program touches. AddressSanitizer: a shadow byte for 8,
 * and red zones: at least as much again around what is small. ThreadSanitizer: four shadow cells of
 * 8 bytes and half a word of origin for each 8 bytes (two cells in newer ones). */
#if defined(__SANITIZE_THREAD__)
#define SANITIZER_MEMORY 5.5
#elif defined(__SANITIZE_ADDRESS__)
#define SANITIZER_MEMORY 2.125
#else
#define SANITIZER_MEMORY 1.0
#endif

/* Preloads a library (LD_PRELOAD) into programs that are started from now on. A sanitizer's runtime
 * must be the first that is loaded, so it goes in front. The running test fails when there is no
 * name or no runtime. */
void sanitizer_preload(const char *library);
void sanitizer_preload_nothing(void);

/* Adds to what AddressSanitizer is told (ASAN_OPTIONS) in programs that are started from now on. */
void sanitizer_address_option(const char *option);

#endif
