/* document.h - proto/openapi.yaml as the tests read it: its operations, the statuses that each
 * documents and which of them an answer has had; and the properties of its schemas.
 * Thread: the test's, document_check apart. Owns what it read until document_close. What is not there fails the test.
 *
 * The file is read as it is laid out: a path is a line of two spaces, a method of four, a status or
 * a schema's property of eight. */
#ifndef TESTS_LIB_DOCUMENT_H
#define TESTS_LIB_DOCUMENT_H

#include <stdbool.h>

#include "proto/base/buf.h"

#define DOCUMENT_OPERATIONS 64
#define DOCUMENT_STATUSES 24

struct operation {
    char method[8], path[64]; /* "{}" for an id */
    int statuses[DOCUMENT_STATUSES];
    bool reached[DOCUMENT_STATUSES];
    int status_count;
    bool is_open; /* takes no key */
};

struct document {
    struct buf text;
    struct operation operations[DOCUMENT_OPERATIONS];
    int operation_count;
};

void document_open(struct document *document);
void document_close(struct document *document);
/* NULL: there is none. */
struct operation *document_find(struct document *document, const char *method, const char *path);
bool document_has(const struct operation *operation, int status);
/* The operation has answered with this status, which must be documented. */
void document_reach(struct operation *operation, int status);
/* Its path with `id` in the hole (of two, "a/b" has one for each), and the query behind it. */
void document_path(const struct operation *operation, const char *id, const char *query,
                   char path[256]);
/* An answer of the server, whose status the document must have for what was called, if that is an
 * operation. Any thread; not where the document is not at hand. */
void document_check(const char *method, const char *path, int status);
/* Appends the properties of a schema, "name " each; those of the schema it is all of, too. */
void document_properties(const struct document *document, const char *schema, struct buf *out);

#endif
