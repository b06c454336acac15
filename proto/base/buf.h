/* buf.h - a growing byte buffer.
 * Thread: one owner at a time. Owns its bytes; buf_close frees them.
 * Growth that fails is an assertion: every use has a bound checked before it (proto/limits.h). */
#ifndef PROTO_BASE_BUF_H
#define PROTO_BASE_BUF_H

#include <stddef.h>
#include <stdint.h>

struct buf {
    char *data; /* NULL while nothing was ever reserved */
    size_t size;
    size_t capacity;
};

void buf_init(struct buf *buf);
void buf_close(struct buf *buf);
/* Makes room for `more` further bytes; pointers into data before the call are then invalid. */
void buf_reserve(struct buf *buf, size_t more);
/* `bytes` is copied. */
void buf_append(struct buf *buf, const void *bytes, size_t size);
void buf_append_text(struct buf *buf, const char *text);
void buf_append_format(struct buf *buf, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
/* A number in digits of this base, 2 to 16, at least `digits` of them: what a token costs has no
 * room for formats. */
void buf_append_number(struct buf *buf, uint64_t value, unsigned base, unsigned digits);
/* Drops the first `size` bytes; size <= buf->size. */
void buf_consume(struct buf *buf, size_t size);
/* A terminating NUL behind data[size - 1], not counted in size; returns data. */
const char *buf_text(struct buf *buf);

#endif
