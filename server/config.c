/* config.c - see config.h. */
#include "server/config.h"

#include <ctype.h>
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/limits.h"
#include "server/cors.h"

enum kind { TEXT, COUNT, BYTES, SWITCH };

struct setting {
    const char *name, *value, *fallback, *help; /* value: how --help calls it */
    enum kind kind;
    size_t offset, size;
};

#define TEXT_OF_(number) #number
#define TEXT_OF(number) TEXT_OF_(number)
#define FIELD(member) offsetof(struct config, member), sizeof((struct config *)0)->member

static const struct setting settings[] = {
    {"host", "ADDRESS", "127.0.0.1", "address to listen on; 0.0.0.0 for every one", TEXT,
     FIELD(host)},
    {"port", "N", "8080", "port to listen on; 0 for any that is free", COUNT, FIELD(port)},
    {"keys", "FILE", "", "API keys, written by rambad key; SIGHUP reads them again", TEXT,
     FIELD(keys)},
    {"insecure", "", "0", "listen beyond this machine without keys", SWITCH, FIELD(insecure)},
    {"cors-origin", "ORIGIN", "", "web pages that may call: origins with commas between, or *",
     TEXT, FIELD(cors_origin)},
    {"data", "DIR", "data", "folder of the memories; one daemon at a time", TEXT, FIELD(data)},
    {"model", "DIR", "engine/models/ramba-20m",
     "folder with config.json, model.safetensors, tokenizer.json", TEXT, FIELD(model)},
    {"chat-template", "NAME", "",
     "chatml, llama-2, llama-3, mistral, mistral-v1, gemma, phi-3, zephyr or none; without it the "
     "model folder's",
     TEXT, FIELD(chat_template)},
    {"backend", "NAME", "auto", "auto, cuda, cpu, or ref (slow and plain)", TEXT, FIELD(backend)},
    {"threads", "N", "0", "CPU workers of the engine; 0 for every CPU", COUNT, FIELD(threads)},
    {"host-memory", "SIZE", "1G", "RAM for chunk pages; the rest stays on disk", BYTES,
     FIELD(host_memory)},
    {"device-memory", "SIZE", "0", "a GPU's copies of chunk pages; 0 for an eighth of its memory",
     BYTES, FIELD(device_memory)},
    {"session-memory", "SIZE", "1G", "RAM for memories kept open between turns", BYTES,
     FIELD(session_memory)},
    {"memory-dtype", "TYPE", "bf16", "bf16 or fp32: how chunk memories are kept", TEXT,
     FIELD(memory_dtype)},
    {"landmarks", "FORM", "bf16",
     "fp8: a GPU keeps them in half the memory and scores the best few again in bf16", TEXT,
     FIELD(landmarks)},
    {"state", "TYPE", "fp32",
     "fp32 or bf16: how recurrent states are kept; bf16 decodes many sequences faster on a GPU",
     TEXT, FIELD(state)},
    {"running", "N", TEXT_OF(LIMITS_RUNNING), "sequences generated at once, at most 32", COUNT,
     FIELD(running)},
    {"queue", "N", TEXT_OF(LIMITS_QUEUE_REQUESTS), "requests that may wait; then 429", COUNT,
     FIELD(queue)},
    {"queue-tokens", "N", "4194304", "tokens of prompts that may wait; then 429", COUNT,
     FIELD(queue_tokens)},
    {"max-stall", "MS", "0",
     "between two tokens, for what is read in beside them; 0 for 250 on CPUs, 50 on a GPU", COUNT,
     FIELD(max_stall)},
    {"running-memory", "SIZE", "0", "RAM for what is at work; the rest waits; 0 for half of it all",
     BYTES, FIELD(running_memory)},
    {"map-size", "SIZE", "1T", "what the store's file may grow to", BYTES, FIELD(map_size)},
    {"write-queue", "SIZE", "256M", "RAM for what waits for the disk; then 429", BYTES,
     FIELD(write_queue)},
    {"keep-snapshots", "N", "4", "turns of a memory that can be forked for nothing", COUNT,
     FIELD(keep_snapshots)},
    {"prefix-cache", "SIZE", "2G",
     "of disk, for going on with requests that name no memory; 0: keeps nothing of them", BYTES,
     FIELD(prefix_cache)},
    {"response-days", "DAYS", "30",
     "a stored response stays so long after its memory was last used, or it was made where that is "
     "gone; 0: for ever",
     COUNT, FIELD(response_days)},
    {"memory-quota", "SIZE", "0", "disk that one memory may take; 0 for any", BYTES,
     FIELD(memory_quota)},
    {"connections", "N", TEXT_OF(LIMITS_CONNECTIONS), "open at once; then 503", COUNT,
     FIELD(connections)},
    {"header-timeout", "SECONDS", TEXT_OF(LIMITS_HEADER_TIMEOUT_S),
     "for a request's head to arrive; then 408", COUNT, FIELD(header_timeout)},
    {"body-timeout", "SECONDS", TEXT_OF(LIMITS_BODY_TIMEOUT_S),
     "without a byte of its body; then 408", COUNT, FIELD(body_timeout)},
    {"idle-timeout", "SECONDS", TEXT_OF(LIMITS_IDLE_TIMEOUT_S), "for a connection between requests",
     COUNT, FIELD(idle_timeout)},
    {"drain-timeout", "SECONDS", "30", "after SIGTERM, for running requests to end", COUNT,
     FIELD(drain_timeout)},
    {"log-level", "LEVEL", "info", "debug, info, warn or error", TEXT, FIELD(log_level)},
};
#define TIMEOUT_MAX 86400
#define SETTINGS (sizeof settings / sizeof *settings)

bool config_parse_bytes(const char *text, uint64_t *out)
{
    char *end;
    errno = 0;
    const unsigned long long number = strtoull(text, &end, 10);
    if (!isdigit((unsigned char)*text) || errno)
        return false;
    static const char units[] = "KMGT";
    unsigned shift = 0;
    if (*end) {
        const char *unit = strchr(units, toupper((unsigned char)*end));
        if (!unit)
            return false;
        shift = 10 * (unsigned)(unit - units + 1);
        end++;
        if (*end == 'i')
            end++;
        if (*end == 'B')
            end++;
    }
    if (*end || (number << shift) >> shift != number)
        return false;
    *out = (uint64_t)number << shift;
    return true;
}

static enum status set(struct config *config, const struct setting *s, const char *value,
                       const char *where, struct error *err)
{
    char *field = (char *)config + s->offset;
    if (s->kind == TEXT) {
        if ((!*value && *s->fallback) || strlen(value) >= s->size)
            return error_set_param(err, STATUS_INVALID, s->name, "%s %s: empty or too long", where,
                                   s->name);
        memcpy(field, value, strlen(value) + 1);
        return STATUS_OK;
    }
    uint64_t number = 0;
    char *end;
    errno = 0;
    bool good = s->kind == BYTES ? config_parse_bytes(value, &number)
                                 : (number = strtoull(value, &end, 10),
                                    isdigit((unsigned char)*value) && !*end && !errno);
    good = good && (s->kind != SWITCH || number <= 1);
    if (!good)
        return error_set_param(err, STATUS_INVALID, s->name,
                               s->kind == BYTES ? "%s %s: \"%s\" is not a size such as 512M or 2G"
                               : s->kind == SWITCH ? "%s %s: \"%s\" is neither 1 nor 0"
                                                   : "%s %s: \"%s\" is not a whole number",
                               where, s->name, value);
    memcpy(field, &number, sizeof number);
    return STATUS_OK;
}

static enum status read_environment(struct config *config, bool *given, struct error *err)
{
    for (size_t i = 0; i < SETTINGS; i++) {
        char name[64] = "RAMBAD_";
        size_t at = strlen(name);
        for (const char *p = settings[i].name; *p; p++)
            name[at++] = *p == '-' ? '_' : (char)toupper((unsigned char)*p);
        name[at] = 0;
        const char *value = getenv(name);
        if (!value || given[i])
            continue;
        const enum status status = set(config, &settings[i], value, "environment:", err);
        if (status)
            return status;
        given[i] = true;
    }
    return STATUS_OK;
}

static size_t find(const char *name, size_t size)
{
    size_t i = 0;
    while (i < SETTINGS &&
           (strlen(settings[i].name) != size || strncmp(settings[i].name, name, size) != 0))
        i++;
    return i;
}

/* "name = value" a line; # begins a comment. */
static enum status read_file(const char *path, struct config *config, bool *given,
                             struct error *err)
{
    FILE *file = fopen(path, "re");
    if (!file)
        return error_set(err, STATUS_NOT_FOUND, "--config %s: %s", path, strerror(errno));
    char line[2048];
    enum status status = STATUS_OK;
    for (int number = 1; !status && fgets(line, sizeof line, file); number++) {
        line[strcspn(line, "#\r\n")] = 0;
        char *name = line + strspn(line, " \t");
        if (!*name)
            continue;
        const size_t size = strcspn(name, " \t=");
        char *value = name + size;
        value += strspn(value, " \t=");
        size_t end = strlen(value);
        while (end && isspace((unsigned char)value[end - 1]))
            value[--end] = 0;
        const size_t at = find(name, size);
        if (at == SETTINGS)
            status = error_set(err, STATUS_INVALID, "%s line %d: no setting \"%.*s\"", path, number,
                               (int)size, name);
        else if (!given[at])
            status = set(config, &settings[at], value, path, err);
    }
    if (!status && ferror(file)) /* a folder, for one */
        status = error_set(err, STATUS_IO, "--config %s cannot be read", path);
    fclose(file);
    return status;
}

static enum status read_flags(int argc, char **argv, struct config *config, bool *given,
                              const char **file, bool *help, struct error *err)
{
    for (int i = 1; i < argc; i++) {
        const char *flag = argv[i];
        if (strcmp(flag, "--help") == 0 || strcmp(flag, "-h") == 0) {
            *help = true;
            return STATUS_OK;
        }
        if (strncmp(flag, "--", 2) != 0)
            return error_set(err, STATUS_INVALID, "\"%s\" is no command and no flag; see --help",
                             flag);
        const size_t size = strcspn(flag + 2, "=");
        const bool is_file = size == 6 && strncmp(flag + 2, "config", 6) == 0;
        const size_t at = find(flag + 2, size);
        if (at == SETTINGS && !is_file)
            return error_set(err, STATUS_INVALID, "there is no flag %s; see --help", flag);
        const bool is_switch = !is_file && settings[at].kind == SWITCH;
        const char *value = flag[2 + size] == '=' ? flag + 3 + size : is_switch ? "1" : argv[++i];
        if (!value)
            return error_set(err, STATUS_INVALID, "%s needs a value", flag);
        if (is_file) {
            *file = value;
            continue;
        }
        const enum status status = set(config, &settings[at], value, "flag", err);
        if (status)
            return status;
        given[at] = true;
    }
    return STATUS_OK;
}

static bool one_of(const char *text, const char *const *choices)
{
    while (*choices && strcmp(*choices, text) != 0)
        choices++;
    return *choices != NULL;
}

static enum status check(const struct config *c, struct error *err)
{
    static const char *const backends[] = {"auto", "cpu", "ref", "cuda", NULL};
    static const char *const dtypes[] = {"bf16", "fp32", NULL};
    static const char *const landmarks[] = {"bf16", "fp8", NULL};
    static const char *const levels[] = {"debug", "info", "warn", "error", NULL};
    if (c->port > 65535)
        return error_set_param(err, STATUS_INVALID, "port", "port: at most 65535");
    if (!one_of(c->backend, backends))
        return error_set_param(err, STATUS_INVALID, "backend",
                               "backend: auto, cuda, cpu or ref, not %s", c->backend);
    if (!one_of(c->memory_dtype, dtypes))
        return error_set_param(err, STATUS_INVALID, "memory-dtype",
                               "memory-dtype: bf16 or fp32, not %s", c->memory_dtype);
    if (!one_of(c->state, dtypes))
        return error_set_param(err, STATUS_INVALID, "state", "state: bf16 or fp32, not %s",
                               c->state);
    if (!one_of(c->landmarks, landmarks))
        return error_set_param(err, STATUS_INVALID, "landmarks", "landmarks: bf16 or fp8, not %s",
                               c->landmarks);
    if (!one_of(c->log_level, levels))
        return error_set_param(err, STATUS_INVALID, "log-level",
                               "log-level: debug, info, warn or error, not %s", c->log_level);
    if (!cors_is_list(c->cors_origin))
        return error_set_param(err, STATUS_INVALID, "cors-origin",
                               "cors-origin: * or origins such as https://example.com, not %s",
                               c->cors_origin);
    const struct {
        const char *name;
        uint64_t value, min, max;
    } ranges[] = {{"threads", c->threads, 0, 1024},
                  {"running", c->running, 1, LIMITS_RUNNING},
                  {"queue", c->queue, 1, 65536},
                  {"queue-tokens", c->queue_tokens, 1, (uint64_t)1 << 40},
                  {"max-stall", c->max_stall, 0, 600000},
                  {"connections", c->connections, 1, 65536},
                  {"header-timeout", c->header_timeout, 1, TIMEOUT_MAX},
                  {"body-timeout", c->body_timeout, 1, TIMEOUT_MAX},
                  {"idle-timeout", c->idle_timeout, 1, TIMEOUT_MAX},
                  {"drain-timeout", c->drain_timeout, 0, TIMEOUT_MAX},
                  {"response-days", c->response_days, 0, 36500}};
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++)
        if (ranges[i].value < ranges[i].min || ranges[i].value > ranges[i].max)
            return error_set_param(err, STATUS_INVALID, ranges[i].name, "%s: from %llu to %llu",
                                   ranges[i].name, (unsigned long long)ranges[i].min,
                                   (unsigned long long)ranges[i].max);
    return STATUS_OK;
}

enum status config_read(int argc, char **argv, struct config *config, bool *help, struct error *err)
{
    bool given[SETTINGS] = {false};
    const char *file = getenv("RAMBAD_CONFIG");
    *help = false;
    memset(config, 0, sizeof *config);
    enum status status = STATUS_OK;
    for (size_t i = 0; i < SETTINGS && !status; i++)
        status = set(config, &settings[i], settings[i].fallback, "default", err);
    if (!status)
        status = read_flags(argc, argv, config, given, &file, help, err);
    if (!status && !*help)
        status = read_environment(config, given, err);
    if (!status && !*help && file)
        status = read_file(file, config, given, err);
    if (!status && !*help)
        status = check(config, err);
    return status;
}

/* What stands over a setting in --help and in the example, up to the next one named here. */
static const char *heading(const char *name)
{
    static const struct {
        const char *first, *text;
    } headings[] = {{"host", "Where it listens, and to whom"},
                    {"data", "Memories and model"},
                    {"backend", "Engine"},
                    {"running", "Requests at once"},
                    {"map-size", "Disk"},
                    {"connections", "Connections, the end, the log"}};
    for (size_t i = 0; i < sizeof headings / sizeof *headings; i++)
        if (strcmp(headings[i].first, name) == 0)
            return headings[i].text;
    return NULL;
}

void config_print_help(void)
{
    printf("rambad - a memory server for long conversations and documents\n\n"
           "  rambad [serve] [--NAME VALUE ...]   serve the HTTP API\n"
           "  rambad config                       print an example of a settings file\n"
           "  rambad key NAME FILE                make an API key\n"
           "  rambad check DIR                    verify every record of a data folder\n"
           "  rambad repair DIR [--yes]           drop what check finds wrong\n"
           "  rambad bench --url URL              load a running server, print its latencies\n"
           "  rambad bench                        measure the engine on this machine: minutes\n"
           "  rambad --version | --help\n\n"
           "Settings, as a flag (--host-memory 4G), in the environment (RAMBAD_HOST_MEMORY=4G) or\n"
           "in a file of \"host-memory = 4G\" lines (--config FILE); the first of these wins. In\n"
           "brackets what holds without it. A SIZE is in bytes, or with K, M, G or T behind it.\n");
    for (const struct setting *s = settings; s < settings + SETTINGS; s++) {
        const char *above = heading(s->name);
        if (above)
            printf("\n%s\n", above);
        printf(*s->fallback ? "  --%s %s%*s%s (%s)\n" : "  --%s %s%*s%s\n", s->name, s->value,
               (int)(26 - strlen(s->name) - strlen(s->value)), "", s->help, s->fallback);
    }
    printf("\nSIGTERM finishes or commits what runs, then ends; a second one ends at once.\n"
           "RAMBAD_API_KEY, in the environment alone, is one key more beside those of --keys.\n");
}

void config_print_example(FILE *file)
{
    fprintf(file, "# Settings of rambad, for --config FILE or RAMBAD_CONFIG=FILE. Each line shows "
                  "what holds\n# without it: take the # away and change it.\n");
    for (const struct setting *s = settings; s < settings + SETTINGS; s++) {
        const char *above = heading(s->name);
        if (above)
            fprintf(file, "\n# ---- %s ----\n", above);
        fprintf(file, "\n# %s\n#%s = %s\n", s->help, s->name, s->fallback);
    }
}
