/* assert.h - invariants that hold in release builds too.
 * Thread: any. Owns nothing.
 * A failed ASSERT is a programmer's error: it prints where and aborts; sessions come back from disk. */
#ifndef PROTO_BASE_ASSERT_H
#define PROTO_BASE_ASSERT_H

__attribute__((noreturn)) void assert_failed(const char *expression, const char *file, int line);

#define ASSERT(x) ((x) ? (void)0 : assert_failed(#x, __FILE__, __LINE__))

#endif
