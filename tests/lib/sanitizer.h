/* sanitizer.h - what a test that measures memory must know of the sanitizer it was built with; the
 * daemon of the same tree has the same. */
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

/* It brings its own malloc, so that none can be preloaded in front of it. */
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define SANITIZER_HAS_MALLOC 1
#else
#define SANITIZER_HAS_MALLOC 0
#endif

#endif
