/* Settings: flag before environment before file before default, one name for all; every refusal
 * names what it refuses. */
#include <ctype.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "server/config.h"

#define ARGS(...) ((char *[]){(char *)"rambad", __VA_ARGS__ __VA_OPT__(, ) NULL})

static struct config config;
static struct error err;

static enum status read_args(char **argv)
{
    bool help;
    int argc = 0;
    while (argv[argc])
        argc++;
    err = (struct error){0};
    return config_read(argc, argv, &config, &help, &err);
}

static void read_well(char **argv)
{
    if (read_args(argv))
        fail_msg("%s", err.message);
}

static void write_file(char path[32], const char *text)
{
    strcpy(path, "/tmp/rambad-config-XXXXXX");
    const int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, strlen(text)), strlen(text));
    close(fd);
}

static int clear(void **state)
{
    (void)state;
    unsetenv("RAMBAD_PORT");
    unsetenv("RAMBAD_HOST_MEMORY");
    unsetenv("RAMBAD_CONFIG");
    unsetenv("RAMBAD_MODEL"); /* a developer may have set it for other tests */
    return 0;
}

static void test_defaults(void **state)
{
    (void)state;
    read_well(ARGS());
    assert_string_equal(config.host, "127.0.0.1");
    assert_int_equal(config.port, 8080);
    assert_int_equal(config.host_memory, UINT64_C(1) << 30);
    assert_int_equal(config.device_memory, 0);
    assert_int_equal(config.map_size, UINT64_C(1) << 40);
    assert_int_equal(config.queue, 256);
    assert_int_equal(config.header_timeout, 10);
}

static void test_precedence(void **state)
{
    (void)state;
    char path[32];
    write_file(path, "# a comment\n"
                     "port = 1001\n"
                     "  host-memory=3M   # and another\r\n"
                     "\n"
                     "queue 7\n");
    read_well(ARGS("--config", path));
    assert_int_equal(config.port, 1001);
    assert_int_equal(config.host_memory, 3 << 20);
    assert_int_equal(config.queue, 7);
    setenv("RAMBAD_PORT", "1002", 1);
    setenv("RAMBAD_HOST_MEMORY", "5KiB", 1);
    setenv("RAMBAD_CONFIG", path, 1);
    read_well(ARGS());
    assert_int_equal(config.port, 1002);
    assert_int_equal(config.host_memory, 5 << 10);
    assert_int_equal(config.queue, 7);
    read_well(ARGS("--port=1003", "--host-memory", "7", "--device-memory", "20G"));
    assert_int_equal(config.port, 1003);
    assert_int_equal(config.host_memory, 7);
    assert_int_equal(config.device_memory, UINT64_C(20) << 30);
    assert_int_equal(config.queue, 7);
    unlink(path);
}

static void test_refusals(void **state)
{
    (void)state;
    static const struct {
        const char *flag, *value, *param;
    } cases[] = {{"--port", "65536", "port"},
                 {"--port", "-1", "port"},
                 {"--port", "80x", "port"},
                 {"--port", "", "port"},
                 {"--port", "99999999999999999999", "port"},
                 {"--host-memory", "12Q", "host-memory"},
                 {"--host-memory", "M", "host-memory"},
                 {"--host-memory", "+1", "host-memory"},
                 {"--host-memory", "99999999T", "host-memory"},
                 {"--device-memory", "half", "device-memory"},
                 {"--backend", "quantum", "backend"},
                 {"--memory-dtype", "fp64", "memory-dtype"},
                 {"--landmarks", "int4", "landmarks"},
                 {"--state", "fp8", "state"},
                 {"--log-level", "loud", "log-level"},
                 {"--data", "", "data"},
                 {"--running", "0", "running"},
                 {"--running", "33", "running"},
                 {"--queue", "0", "queue"},
                 {"--connections", "0", "connections"},
                 {"--header-timeout", "0", "header-timeout"},
                 {"--body-timeout", "0", "body-timeout"},
                 {"--drain-timeout", "100000", "drain-timeout"},
                 {"--threads", "1025", "threads"},
                 {"--cors-origin", "example.com", "cors-origin"},
                 {"--cors-origin", "https://example.com/", "cors-origin"},
                 {"--cors-origin", "https://a.com *", "cors-origin"},
                 {"--cors-origin", "https://", "cors-origin"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (read_args(ARGS((char *)cases[i].flag, (char *)cases[i].value)) != STATUS_INVALID)
            fail_msg("%s %s was taken", cases[i].flag, cases[i].value);
        assert_string_equal(err.param, cases[i].param);
        assert_non_null(strstr(err.message, cases[i].param));
    }
    assert_int_equal(read_args(ARGS("--prot", "80")), STATUS_INVALID);
    assert_non_null(strstr(err.message, "--prot"));
    assert_int_equal(read_args(ARGS("server")), STATUS_INVALID);
    assert_non_null(strstr(err.message, "server"));
    assert_int_equal(read_args(ARGS("--port")), STATUS_INVALID);
    assert_non_null(strstr(err.message, "value"));
    setenv("RAMBAD_PORT", "x", 1);
    assert_int_equal(read_args(ARGS()), STATUS_INVALID);
    assert_non_null(strstr(err.message, "environment"));
    read_well(ARGS("--port", "80")); /* what is overruled does not matter */
}

/* A value of a setting that is not its default; `kind` is how --help calls it. */
static const char *other_value(const char *name, const char *kind)
{
    static const struct {
        const char *of, *value;
    } values[] = {{"backend", "ref"}, {"chat-template", "none"}, {"ADDRESS", "10.1.2.3"},
                  {"ORIGIN", "*"},    {"state", "bf16"},         {"TYPE", "fp32"},
                  {"FORM", "fp8"},    {"LEVEL", "debug"},        {"SIZE", "3G"},
                  {"", "1"}};
    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        if (strcmp(values[i].of, name) == 0 || strcmp(values[i].of, kind) == 0)
            return values[i].value;
    return "3"; /* numbers, and names of files */
}

/* The settings that --help names, one a line: "  --NAME VALUE   what it is". */
static FILE *help_text(void)
{
    FILE *help = tmpfile();
    assert_non_null(help);
    fflush(stdout);
    const int out = dup(STDOUT_FILENO);
    dup2(fileno(help), STDOUT_FILENO);
    config_print_help();
    fflush(stdout);
    dup2(out, STDOUT_FILENO);
    close(out);
    rewind(help);
    return help;
}

/* Every setting means the same as a flag, in the environment and in a file. */
static void test_every_setting(void **state)
{
    (void)state;
    char line[512], path[32];
    size_t count = 0;
    FILE *help = help_text();
    read_well(ARGS());
    const struct config defaults = config;
    while (fgets(line, sizeof line, help)) {
        char name[64], kind[64] = "", variable[80], flag[160], text[160];
        if (sscanf(line, "  --%63[a-z-]%63[ A-Z]", name, kind) < 2)
            continue;
        char *word = kind + strspn(kind, " ");
        word[strspn(line + 5 + strlen(name), "ABCDEFGHIJKLMNOPQRSTUVWXYZ")] = 0;
        const char *value = other_value(name, word);
        snprintf(flag, sizeof flag, "--%s=%s", name, value);
        read_well(ARGS(flag));
        const struct config by_flag = config;
        if (memcmp(&by_flag, &defaults, sizeof defaults) == 0)
            fail_msg("%s changed nothing", flag);
        snprintf(variable, sizeof variable, "RAMBAD_%s", name);
        for (char *p = variable; *p; p++)
            *p = *p == '-' ? '_' : (char)toupper((unsigned char)*p);
        setenv(variable, value, 1);
        read_well(ARGS());
        unsetenv(variable);
        assert_memory_equal(&config, &by_flag, sizeof defaults);
        snprintf(text, sizeof text, "%s = %s\n", name, value);
        write_file(path, text);
        read_well(ARGS("--config", path));
        unlink(path);
        assert_memory_equal(&config, &by_flag, sizeof defaults);
        count++;
    }
    assert_true(count >= 26); /* none was passed over */
    fclose(help);
}

/* The example says what holds without it, of every setting. */
static void test_example(void **state)
{
    (void)state;
    char path[32], row[512], name[64], *text = NULL, *line, *rest;
    size_t size = 0, count = 0, helped = 0;
    FILE *help = help_text();
    while (fgets(row, sizeof row, help))
        helped += strncmp(row, "  --", 4) == 0;
    fclose(help);
    read_well(ARGS());
    const struct config defaults = config;
    FILE *file = open_memstream(&text, &size);
    assert_non_null(file);
    config_print_example(file);
    fclose(file);
    write_file(path, text);
    read_well(ARGS("--config", path));
    unlink(path);
    assert_memory_equal(&config, &defaults, sizeof defaults);
    for (line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        if (sscanf(line, "#%63[a-z-] =", name) < 1)
            continue;
        write_file(path, line + 1);
        read_well(ARGS("--config", path));
        unlink(path);
        assert_memory_equal(&config, &defaults, sizeof defaults);
        count++;
    }
    assert_true(count > 0 && count == helped);
    free(text);
}

static void test_bad_files(void **state)
{
    (void)state;
    char path[32];
    assert_int_equal(read_args(ARGS("--config", "/nonexistent/file")), STATUS_NOT_FOUND);
    assert_int_equal(read_args(ARGS("--config", "/tmp")), STATUS_IO);
    write_file(path, "port = 80\nprot = 81\n");
    assert_int_equal(read_args(ARGS("--config", path)), STATUS_INVALID);
    assert_non_null(strstr(err.message, "line 2"));
    assert_non_null(strstr(err.message, "prot"));
    unlink(path);
    write_file(path, "port =\n");
    assert_int_equal(read_args(ARGS("--config", path)), STATUS_INVALID);
    assert_string_equal(err.param, "port");
    unlink(path);
}

static void test_help(void **state)
{
    (void)state;
    bool help;
    setenv("RAMBAD_PORT", "x", 1); /* whoever asks for help may be in trouble */
    assert_int_equal(config_read(2, ARGS("--help"), &config, &help, &err), STATUS_OK);
    assert_true(help);
    assert_int_equal(config_read(3, ARGS("--port", "-h"), &config, &help, &err), STATUS_INVALID);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_defaults, clear, clear),
        cmocka_unit_test_setup_teardown(test_precedence, clear, clear),
        cmocka_unit_test_setup_teardown(test_refusals, clear, clear),
        cmocka_unit_test_setup_teardown(test_every_setting, clear, clear),
        cmocka_unit_test_setup_teardown(test_example, clear, clear),
        cmocka_unit_test_setup_teardown(test_bad_files, clear, clear),
        cmocka_unit_test_setup_teardown(test_help, clear, clear),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
