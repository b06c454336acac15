/* config.h - the daemon's settings: flag > environment > file > default, one name for all three.
 * Thread: the main thread, at the start. Owns its strings for the life of the process. */
#ifndef SERVER_CONFIG_H
#define SERVER_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "proto/status.h"

struct config {
    char host[64], data[1024], model[1024], keys[1024], cors_origin[1024];
    char backend[16], memory_dtype[8], landmarks[8], state[8], log_level[8], chat_template[16];
    uint64_t port, threads, running, queue, queue_tokens, connections;
    uint64_t max_stall;                                                 /* milliseconds */
    uint64_t drain_timeout, header_timeout, body_timeout, idle_timeout; /* seconds */
    uint64_t host_memory, device_memory, session_memory, running_memory, map_size; /* bytes */
    uint64_t keep_snapshots, prefix_cache, memory_quota, write_queue;
    uint64_t response_days;
    uint64_t insecure; /* a switch */
};

/* Reads the flags from argv[1] on, then RAMBAD_* of the environment, then the file of --config.
 * `*help` is set by --help. STATUS_INVALID names the setting. */
STATUS_CHECKED enum status config_read(int argc, char **argv, struct config *config, bool *help,
                                       struct error *err);
/* 512M, 2G, 1T, or bytes. */
bool config_parse_bytes(const char *text, uint64_t *out);
/* The text of --help, settings and defaults, to standard output. */
void config_print_help(void);
/* A settings file with every setting, its help and its default, all of it commented out. */
void config_print_example(FILE *file);

#endif
