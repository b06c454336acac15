/* auth.c - see auth.h. */
#include "server/auth.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/random.h>
#include <unistd.h>

#include "proto/base/sha256.h"
#include "server/config.h"

#define SECRET_BYTES 24 /* 192 random bits: no hash of them can be turned back */
#define LINE_BYTES 256
#define BLANKS " \t\r\n"

struct key {
    char name[LIMITS_ID_BYTES];
    unsigned char hash[SHA256_BYTES];
    uint64_t quota;  /* of the name; 0: not said */
    uint32_t weight; /* of its name's share; 0: not said */
};

struct keys {
    struct key *keys;
    size_t count;
};

struct auth {
    char *path; /* "" for none */
    struct key plain;
    bool has_plain;
    struct keys file;
};

static bool good_name(const char *name)
{
    size_t n = 0;
    while (isalnum((unsigned char)name[n]) || (name[n] && strchr("-_.@", name[n])))
        n++;
    return n && !name[n] && n < LIMITS_ID_BYTES;
}

static bool parse_hash(const char *text, unsigned char hash[SHA256_BYTES])
{
    static const char digits[] = "0123456789abcdef";
    if (strncmp(text, "sha256:", 7) != 0 || strlen(text) != 7 + 2 * SHA256_BYTES)
        return false;
    text += 7;
    for (size_t i = 0; i < SHA256_BYTES; i++) {
        const char *high = strchr(digits, text[2 * i]), *low = strchr(digits, text[2 * i + 1]);
        if (!high || !low)
            return false;
        hash[i] = (unsigned char)((high - digits) << 4 | (low - digits));
    }
    return true;
}

/* What may stand behind a key: "weight=N", "quota=SIZE". */
static bool parse_option(const char *text, struct key *key)
{
    char *end;
    if (strncmp(text, "quota=", 6) == 0)
        return config_parse_bytes(text + 6, &key->quota) && key->quota;
    if (strncmp(text, "weight=", 7) != 0 || !isdigit((unsigned char)text[7]))
        return false;
    const unsigned long number = strtoul(text + 7, &end, 10);
    key->weight = (uint32_t)number;
    return !*end && number >= 1 && number <= LIMITS_WEIGHT;
}

/* One line without its end; false: it is neither empty, a comment, nor a key. */
static bool parse_line(char *line, struct key *key, bool *has_key)
{
    char *rest;
    line[strcspn(line, "#")] = 0;
    const char *name = strtok_r(line, BLANKS, &rest), *hash = strtok_r(NULL, BLANKS, &rest);
    *has_key = name != NULL;
    if (!name)
        return true;
    if (!hash || !good_name(name) || !parse_hash(hash, key->hash))
        return false;
    for (const char *more; (more = strtok_r(NULL, BLANKS, &rest));)
        if (!parse_option(more, key))
            return false;
    memcpy(key->name, name, strlen(name) + 1);
    return true;
}

static enum status add(struct keys *keys, const struct key *key)
{
    struct key *grown = realloc(keys->keys, (keys->count + 1) * sizeof *grown);
    if (!grown)
        return STATUS_NO_MEMORY;
    keys->keys = grown;
    keys->keys[keys->count++] = *key;
    return STATUS_OK;
}

static enum status read_lines(FILE *file, const char *path, struct keys *keys, struct error *err)
{
    char line[LINE_BYTES];
    enum status status = STATUS_OK;
    for (int number = 1; !status && fgets(line, sizeof line, file); number++) {
        struct key key = {0};
        bool has_key;
        if (!parse_line(line, &key, &has_key))
            status = error_set(err, STATUS_INVALID,
                               "%s line %d: not \"NAME sha256:HEX\", which rambad key writes, with "
                               "or without \"weight=N\" and \"quota=SIZE\"",
                               path, number);
        else if (has_key && keys->count == LIMITS_KEYS)
            status = error_set(err, STATUS_INVALID, "%s: more than %d keys", path, LIMITS_KEYS);
        else if (has_key && add(keys, &key))
            status = error_set(err, STATUS_NO_MEMORY, "out of memory");
    }
    if (!status && ferror(file)) /* a folder, for one */
        status = error_set(err, STATUS_IO, "--keys %s cannot be read", path);
    if (!status && !keys->count)
        status = error_set(err, STATUS_INVALID,
                           "there is no key in %s; make one with: rambad key NAME %s", path, path);
    return status;
}

enum status auth_reload(struct auth *auth, struct error *err)
{
    struct keys keys = {0};
    if (!auth->path[0])
        return STATUS_OK;
    FILE *file = fopen(auth->path, "re");
    if (!file)
        return error_set(err, errno == ENOENT ? STATUS_NOT_FOUND : STATUS_IO, "--keys %s: %s",
                         auth->path, strerror(errno));
    const enum status status = read_lines(file, auth->path, &keys, err);
    fclose(file);
    if (status) {
        free(keys.keys);
        return status;
    }
    free(auth->file.keys);
    auth->file = keys;
    return STATUS_OK;
}

enum status auth_open(const char *path, const char *plain, struct auth **out, struct error *err)
{
    struct auth *auth = calloc(1, sizeof *auth);
    if (auth)
        auth->path = strdup(path);
    if (!auth || !auth->path) {
        free(auth);
        return error_set(err, STATUS_NO_MEMORY, "out of memory");
    }
    enum status status = STATUS_OK;
    auth->has_plain = plain && plain[0];
    if (auth->has_plain && strlen(plain) < LIMITS_KEY_BYTES_LEAST)
        status = error_set(err, STATUS_INVALID, "%s: a key has at least %d characters",
                           AUTH_ENVIRONMENT, LIMITS_KEY_BYTES_LEAST);
    if (!status && auth->has_plain) {
        strcpy(auth->plain.name, "environment");
        sha256(plain, strlen(plain), auth->plain.hash);
    }
    if (!status)
        status = auth_reload(auth, err);
    if (status)
        auth_close(auth);
    else
        *out = auth;
    return status;
}

void auth_close(struct auth *auth)
{
    free(auth->file.keys);
    free(auth->path);
    free(auth);
}

bool auth_is_required(const struct auth *auth)
{
    return auth->has_plain || auth->file.count;
}

/* All bytes are looked at, whatever they are. */
static bool same_hash(const unsigned char *a, const unsigned char *b)
{
    volatile unsigned char difference = 0;
    for (size_t i = 0; i < SHA256_BYTES; i++)
        difference = (unsigned char)(difference | (a[i] ^ b[i]));
    return difference == 0;
}

bool auth_key_at(const struct auth *auth, size_t index, const char **name, uint64_t *quota)
{
    if (index >= auth->file.count)
        return false;
    *name = auth->file.keys[index].name;
    *quota = auth->file.keys[index].quota;
    return true;
}

bool auth_check(const struct auth *auth, const char *authorization, char name[LIMITS_ID_BYTES])
{
    unsigned char hash[SHA256_BYTES];
    const struct key *found = NULL;
    if (strncasecmp(authorization, "bearer ", 7) != 0)
        return false;
    const char *token = authorization + 7 + strspn(authorization + 7, " \t");
    size_t size = strlen(token);
    while (size && strchr(" \t", token[size - 1]))
        size--;
    sha256(token, size, hash);
    if (auth->has_plain && same_hash(hash, auth->plain.hash))
        found = &auth->plain;
    for (size_t i = 0; i < auth->file.count; i++) /* to the end, found or not */
        if (same_hash(hash, auth->file.keys[i].hash))
            found = &auth->file.keys[i];
    if (!found)
        return false;
    memcpy(name, found->name, sizeof found->name);
    return true;
}

uint32_t auth_weight(const struct auth *auth, const char *name)
{
    for (size_t i = 0; i < auth->file.count; i++)
        if (auth->file.keys[i].weight && strcmp(auth->file.keys[i].name, name) == 0)
            return auth->file.keys[i].weight;
    return 1;
}

/* ---- rambad key ---- */

static bool write_line(const char *path, const char *name, const unsigned char *hash)
{
    char line[LINE_BYTES];
    const int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd < 0)
        return false;
    size_t size = (size_t)snprintf(line, sizeof line, "%s sha256:", name);
    for (size_t i = 0; i < SHA256_BYTES; i++)
        size += (size_t)snprintf(line + size, sizeof line - size, "%02x", hash[i]);
    line[size++] = '\n';
    const bool good = write(fd, line, size) == (ssize_t)size && fsync(fd) == 0;
    return close(fd) == 0 && good;
}

int auth_key_main(int argc, char **argv)
{
    unsigned char random[SECRET_BYTES], hash[SHA256_BYTES];
    char secret[4 + 2 * SECRET_BYTES] = "rk_";
    if (argc != 3 || !good_name(argv[1])) {
        fprintf(stderr,
                "usage: rambad key NAME FILE\nMakes an API key, adds its hash to FILE for "
                "rambad serve --keys FILE, and prints it: it is not kept.\nNAME, of "
                "letters, digits and -_.@, is whose the memories are; a new key of the "
                "same name sees them too.\nWhen the server is busy, every NAME has an equal part "
                "of its time; one with \" weight=N\"\n(1 to %d) behind a line of its own in FILE "
                "has N parts;\n\" quota=SIZE\" bounds its memories and responses on disk.\nSIGHUP "
                "makes a running server read FILE again.\n",
                LIMITS_WEIGHT);
        return argc == 2 && strcmp(argv[1], "--help") == 0 ? 0 : 2;
    }
    if (getrandom(random, sizeof random, 0) != sizeof random) {
        fprintf(stderr, "rambad: key: no random numbers\n");
        return 1;
    }
    for (size_t i = 0; i < SECRET_BYTES; i++)
        snprintf(secret + 3 + 2 * i, 3, "%02x", random[i]);
    sha256(secret, strlen(secret), hash);
    if (!write_line(argv[2], argv[1], hash)) {
        fprintf(stderr, "rambad: key: %s: %s\n", argv[2], strerror(errno));
        return 1;
    }
    printf("%s\n", secret);
    return 0;
}
