/* json.h - what the JSON files of proto/ share: checked parsing, and text written as JSON.
 * Thread: any (pure functions). Owns nothing. The cJSON part is private to proto/. */
#ifndef PROTO_JSON_H
#define PROTO_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/base/buf.h"
#include "proto/status.h"

/* A JSON string with its quotes. Bytes that are no UTF-8 become U+FFFD. */
void json_append_string(struct buf *out, const char *text, size_t size);
/* Whether `text` is UTF-8 from its first byte to its last. */
bool json_is_utf8(const char *text, size_t size);
/* null for what JSON cannot hold. */
void json_append_number(struct buf *out, double value);

struct cJSON;
/* A JSON object, alone in `text`. STATUS_INVALID says where it goes wrong. */
STATUS_CHECKED enum status json_parse_object(const char *text, size_t size, struct cJSON **root,
                                             struct error *err);

/* Reads fields one by one; the first thing wrong is kept in `status` and `err`. A field that is
 * absent or null leaves `*out` as it is. */
struct json_fields {
    const struct cJSON *root;
    struct error *err;
    enum status status;
};
void json_read_bool(struct json_fields *fields, const char *name, bool *out);
void json_read_count(struct json_fields *fields, const char *name, uint64_t min, uint64_t max,
                     uint64_t *out);
void json_read_number(struct json_fields *fields, const char *name, double min, double max,
                      double *out);
/* `out` has room for `room` bytes, the terminator among them. */
void json_read_text(struct json_fields *fields, const char *name, char *out, size_t room);
/* "metadata": an object of at most 16 pairs of short strings, as JSON text, malloced; NULL when it is
 * absent, null, or wrong. */
char *json_read_metadata(struct json_fields *fields);
void json_fail(struct json_fields *fields, enum status status, const char *name, const char *what);
/* Refuses fields outside `names` (NULL at its end), by name. */
void json_refuse_others(struct json_fields *fields, const char *const *names);

#endif
