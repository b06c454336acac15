/* answer.h - what tests look up in the server's JSON and event streams.
 * Thread: the test's. Owns nothing. What is not there fails the running test. */
#ifndef TESTS_LIB_ANSWER_H
#define TESTS_LIB_ANSWER_H

#include <cjson/cJSON.h>

#include "tests/lib/wire.h"

/* "choices.0.text": names and indexes; NULL when it is not there. */
const cJSON *answer_at(const cJSON *json, const char *path);
const char *answer_text(const cJSON *json, const char *path);
double answer_number(const cJSON *json, const char *path);
/* The events of a stream, as one JSON array; the last was [DONE]. Delete it. */
cJSON *answer_events(const struct wire_answer *answer);

#endif
