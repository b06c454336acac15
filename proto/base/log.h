/* log.h - one JSON object a line on standard error.
 * Thread: any; a line is one write. Owns nothing.
 * log_event(LOG_INFO, "listening", "host", LOG_STR, host, "port", LOG_INT, (int64_t)8080, NULL) */
#ifndef PROTO_BASE_LOG_H
#define PROTO_BASE_LOG_H

#include <stdbool.h>

enum log_level { LOG_DEBUG, LOG_INFO, LOG_WARN, LOG_ERROR };
enum log_kind { LOG_STR, LOG_INT, LOG_NUM, LOG_BOOL };

/* Lines under this level are not written. Default LOG_INFO. Call before other threads start. */
void log_set_level(enum log_level level);
/* "debug", "info", "warn", "error"; false when it is none of them. */
bool log_parse_level(const char *text, enum log_level *level);

/* Triples of key (const char *), enum log_kind, value (const char *, int64_t, double, or int for
 * LOG_BOOL), then NULL. Strings are escaped; a NULL string is written as null. */
void log_event(enum log_level level, const char *event, ...) __attribute__((sentinel));

#endif
