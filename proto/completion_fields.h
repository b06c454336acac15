/* completion_fields.h - fields that every request for text has, read one by one.
 * Thread: any (pure functions). Owns nothing. Private to proto/. */
#ifndef PROTO_COMPLETION_FIELDS_H
#define PROTO_COMPLETION_FIELDS_H

#include "proto/completion_request.h"
#include "proto/json.h"

/* Temperature, penalties, seed, stop strings, bias: what decides which token is taken. */
void completion_read_sampling(struct json_fields *fields, struct completion_request *request);
/* How it is to be served beside others: priority, timeout. */
void completion_read_terms(struct json_fields *fields, struct completion_request *request);
/* Fields that may say what is so anyway, since clients send them: no tools, the usual service.
 * `*parallel_tool_calls` becomes what was said of them; returns "tool_choice", "auto" or "none". */
const char *completion_read_defaults(struct json_fields *fields, bool *parallel_tool_calls);
/* "format" of an answer, which may be of type "text" alone. `name` is of the field. */
void completion_read_format(struct json_fields *fields, const char *name,
                            const struct cJSON *format);
/* The one text of `field` that is not `first` is `second`; whether it is that. */
bool completion_read_choice(struct json_fields *fields, const char *field, const char *first,
                            const char *second);
/* "stream_options" with "include_usage", where `include_usage` is not NULL; obfuscation is not to
 * be had. */
void completion_read_stream_options(struct json_fields *fields, bool *include_usage);
/* "system", "user" or "assistant", as it is rendered; developer is system. `name` is of the field
 * that holds `role` (NULL: it is missing, or no text). "" when it is none. */
const char *completion_read_role(struct json_fields *fields, const char *name, const char *role);

#endif
