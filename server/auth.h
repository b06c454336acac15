/* auth.h - API keys: who may ask, and whose a memory is.
 * Thread: the loop. Owns the table of keys.
 *
 * A key has a name, which is what memories belong to: a key may be replaced, or two of one name be
 * good side by side, and nothing is lost. Of a key only the hash is kept. */
#ifndef SERVER_AUTH_H
#define SERVER_AUTH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/limits.h"
#include "proto/status.h"

struct auth;

#define AUTH_ENVIRONMENT "RAMBAD_API_KEY" /* one key, as it is; it is named "environment" */

/* Keys of the file `path` ("": none), lines of "NAME sha256:HEX [weight=N] [quota=SIZE]", # begins a
 * comment; and `plain` (NULL or "": none), copied. STATUS_NOT_FOUND, STATUS_INVALID (a line; no key
 * in the file; a plain one that is too short), STATUS_IO, STATUS_NO_MEMORY. */
STATUS_CHECKED enum status auth_open(const char *path, const char *plain, struct auth **out,
                                     struct error *err);
/* Reads the file again. After a failure the keys are what they were. */
STATUS_CHECKED enum status auth_reload(struct auth *auth, struct error *err);
void auth_close(struct auth *auth);

/* Whether there are keys at all: if not, everybody may ask. */
bool auth_is_required(const struct auth *auth);
/* `authorization` is the header's value. Takes as long for a wrong key as for a good one. */
/* The keys, one after the other; false: there is no such many. `*quota`: what all memories of that
 * name may take on disk, in bytes; 0: as the other keys of the name say, or as much as there is. */
bool auth_key_at(const struct auth *auth, size_t index, const char **name, uint64_t *quota);
bool auth_check(const struct auth *auth, const char *authorization, char name[LIMITS_ID_BYTES]);

/* Its weight, of its first line that says one; 1. */
uint32_t auth_weight(const struct auth *auth, const char *name);

/* `rambad key NAME FILE`: makes a key, adds its hash to the file and prints it. The exit code. */
int auth_key_main(int argc, char **argv);

#endif
