#include "proto/base/buf.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "proto/base/assert.h"

void buf_init(struct buf *buf)
{
    *buf = (struct buf){0};
}

void buf_close(struct buf *buf)
{
    free(buf->data);
    *buf = (struct buf){0};
}

void buf_reserve(struct buf *buf, size_t more)
{
    ASSERT(more < SIZE_MAX / 4 - buf->size);
    size_t need = buf->size + more;
    if (need <= buf->capacity)
        return;
    size_t capacity = buf->capacity ? buf->capacity : 256;
    while (capacity < need)
        capacity *= 2;
    buf->data = realloc(buf->data, capacity);
    ASSERT(buf->data);
    buf->capacity = capacity;
}

void buf_append(struct buf *buf, const void *bytes, size_t size)
{
    if (size == 0)
        return;
    buf_reserve(buf, size);
    memcpy(buf->data + buf->size, bytes, size);
    buf->size += size;
}

void buf_append_text(struct buf *buf, const char *text)
{
    buf_append(buf, text, strlen(text));
}

void buf_append_format(struct buf *buf, const char *format, ...)
{
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    const size_t room = buf->capacity - buf->size; /* mostly enough: then once is all */
    const int length = vsnprintf(room ? buf->data + buf->size : NULL, room, format, args);
    va_end(args);
    ASSERT(length >= 0);
    if ((size_t)length >= room) {
        buf_reserve(buf, (size_t)length + 1);
        vsnprintf(buf->data + buf->size, (size_t)length + 1, format, again);
    }
    va_end(again);
    buf->size += (size_t)length;
}

void buf_append_number(struct buf *buf, uint64_t value, unsigned base, unsigned digits)
{
    char text[64];
    size_t at = sizeof text;
    ASSERT(base >= 2 && base <= 16 && digits <= sizeof text);
    do
        text[--at] = "0123456789abcdef"[value % base];
    while ((value /= base) || sizeof text - at < digits);
    buf_append(buf, text + at, sizeof text - at);
}

void buf_consume(struct buf *buf, size_t size)
{
    ASSERT(size <= buf->size);
    if (size == 0)
        return;
    memmove(buf->data, buf->data + size, buf->size - size);
    buf->size -= size;
}

const char *buf_text(struct buf *buf)
{
    buf_reserve(buf, 1);
    buf->data[buf->size] = 0;
    return buf->data;
}
