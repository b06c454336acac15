/* fuzz_settings.c - any bytes as the file of settings and as the file of keys: read, or refused by
 * name, and a key of the file opens what it should.
 *
 * Input: a byte that chooses which, then the file. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "proto/base/assert.h"
#include "server/auth.h"
#include "server/config.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void read_settings(char *path)
{
    static struct config config;
    struct error err = {0};
    bool help = false;
    char name[] = "rambad", flag[] = "--config";
    char *argv[] = {name, flag, path, NULL};
    memset(&config, 0, sizeof config);
    const enum status status = config_read(3, argv, &config, &help, &err);
    ASSERT(status == STATUS_OK || status == STATUS_INVALID || status == STATUS_NOT_FOUND);
    ASSERT((status != STATUS_OK) == (err.message[0] != 0));
    if (status)
        return;
    ASSERT(strlen(config.host) < sizeof config.host && config.host[0]);
    ASSERT(strlen(config.data) < sizeof config.data && config.data[0]);
    ASSERT(config.port <= 65535 && config.insecure <= 1);
}

static void read_keys(const char *path)
{
    struct auth *auth = NULL;
    struct error err = {0};
    char name[LIMITS_ID_BYTES] = "";
    const enum status status = auth_open(path, NULL, &auth, &err);
    ASSERT(status == STATUS_OK || status == STATUS_INVALID);
    ASSERT((status != STATUS_OK) == (err.message[0] != 0));
    if (status)
        return;
    ASSERT(auth_is_required(auth));
    ASSERT(!auth_check(auth, "Bearer nobody has this key", name));
    ASSERT(!auth_check(auth, "", name));
    ASSERT(!auth_reload(auth, &err));
    auth_close(auth);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char path[64];
    if (!size)
        return 0;
    const int fd = memfd_create("settings", 0);
    ASSERT(fd >= 0 && write(fd, data + 1, size - 1) == (ssize_t)(size - 1));
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (data[0] & 1)
        read_keys(path);
    else
        read_settings(path);
    close(fd);
    return 0;
}
