#include "proto/base/log.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define LINE_BYTES 4096 /* a longer line is cut in its last value, so that it stays valid JSON */

static const char *const names[] = {"debug", "info", "warn", "error"};
static _Atomic enum log_level lowest = LOG_INFO;

struct line {
    char text[LINE_BYTES];
    size_t size;
};

void log_set_level(enum log_level level)
{
    lowest = level;
}

bool log_parse_level(const char *text, enum log_level *level)
{
    for (int i = 0; i < 4; i++) {
        if (strcmp(text, names[i]) == 0) {
            *level = (enum log_level)i;
            return true;
        }
    }
    return false;
}

/* Keeps eight bytes for the closing quote and brace and for a six-byte escape in flight. */
static void put(struct line *line, const char *text, size_t size)
{
    if (line->size + size < LINE_BYTES - 8) {
        memcpy(line->text + line->size, text, size);
        line->size += size;
    }
}

static void put_string(struct line *line, const char *text)
{
    if (!text) {
        put(line, "null", 4);
        return;
    }
    put(line, "\"", 1);
    for (; *text && line->size < LINE_BYTES - 32; text++) {
        unsigned char c = (unsigned char)*text;
        char escape[8];
        if (c == '"' || c == '\\') {
            escape[0] = '\\';
            escape[1] = (char)c;
            put(line, escape, 2);
        } else if (c < 0x20) {
            put(line, escape, (size_t)snprintf(escape, sizeof escape, "\\u%04x", c));
        } else {
            put(line, text, 1);
        }
    }
    line->text[line->size++] = '"';
}

static void put_value(struct line *line, enum log_kind kind, va_list *args)
{
    char number[40];
    int size = 0;
    switch (kind) {
    case LOG_STR:
        put_string(line, va_arg(*args, const char *));
        return;
    case LOG_INT:
        size = snprintf(number, sizeof number, "%" PRId64, va_arg(*args, int64_t));
        break;
    case LOG_NUM: {
        double value = va_arg(*args, double);
        size = isfinite(value) ? snprintf(number, sizeof number, "%.6g", value)
                               : snprintf(number, sizeof number, "null");
        break;
    }
    case LOG_BOOL:
        size = snprintf(number, sizeof number, "%s", va_arg(*args, int) ? "true" : "false");
        break;
    }
    put(line, number, (size_t)size);
}

void log_event(enum log_level level, const char *event, ...)
{
    if (level < lowest)
        return;
    struct line line = {.size = 0};
    struct timespec now;
    struct tm utc;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    char head[96];
    size_t size = strftime(head, sizeof head, "{\"time\":\"%Y-%m-%dT%H:%M:%S", &utc);
    size += (size_t)snprintf(head + size, sizeof head - size, ".%03ldZ\",\"level\":\"%s\",\"event\":",
                             now.tv_nsec / 1000000, names[level]);
    put(&line, head, size);
    put_string(&line, event);
    va_list args;
    va_start(args, event);
    for (const char *key; (key = va_arg(args, const char *)) != NULL;) {
        enum log_kind kind = (enum log_kind)va_arg(args, int);
        if (line.size + strlen(key) + 48 > LINE_BYTES - 32)
            break; /* what does not fit is left out whole */
        put(&line, ",", 1);
        put_string(&line, key);
        put(&line, ":", 1);
        put_value(&line, kind, &args);
    }
    va_end(args);
    memcpy(line.text + line.size, "}\n", 2);
    line.size += 2;
    ssize_t written = write(STDERR_FILENO, line.text, line.size);
    (void)written; /* there is nowhere to report that standard error is gone */
}
