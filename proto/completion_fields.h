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
/* "system", "user" or "assistant", as it is rendered; developer is system. `name` is of the field
 * that holds `role` (NULL: it is missing, or no text). "" when it is none. */
const char *completion_read_role(struct json_fields *fields, const char *name, const char *role);

#endif
