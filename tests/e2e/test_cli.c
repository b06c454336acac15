/* The command line against the real daemon: in pipes, on a terminal, through a crash of the server,
 * and the exit codes of both programs. */
#include <fcntl.h>
#include <pty.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/lib/daemon.h"
#include "tests/lib/store_helper.h"

#define MODEL "tests/golden/wide-stickbreaking-topk8"
/* Seconds of work for the model, so that there is a midst, and what `ramba` calls it. */
#ifdef __SANITIZE_THREAD__
#define FILE_BYTES 49152
#define FILE_NAMED "48.0 KiB"
#define TOKENS_NAMED "49,152"
#else
#define FILE_BYTES 120000
#define FILE_NAMED "117 KiB"
#define TOKENS_NAMED "120,000"
#endif

static struct daemon daemon_;
static char *folder, book[1024];

/* A script with `ramba` and `rambad` as commands and $BOOK; its standard output. Returns its exit
 * code. */
static int sh(struct buf *out, const char *format, ...) __attribute__((format(printf, 2, 3)));
static int sh(struct buf *out, const char *format, ...)
{
    char script[1024];
    va_list args;
    va_start(args, format);
    const int begin = snprintf(script, sizeof script,
                               "ramba() { \"$RAMBA_BIN\" \"$@\"; }\n"
                               "rambad() { \"$RAMBAD_BIN\" \"$@\"; }\n");
    vsnprintf(script + begin, sizeof script - (size_t)begin, format, args);
    va_end(args);
    out->size = 0;
    const int code =
        daemon_run(&daemon_, (const char *const[]){"/bin/sh", "-c", script, NULL}, out);
    while (out->size && out->data[out->size - 1] == '\n')
        out->size--;
    buf_text(out);
    return code;
}

static struct client_memory memory(const char *id)
{
    return daemon_get_memory(&daemon_, id);
}

static void test_pipes(void **state)
{
    (void)state;
    struct buf out, answer;
    char id[LIMITS_ID_BYTES];
    buf_init(&out);
    buf_init(&answer);
    /* Standard output is the id and nothing else. */
    assert_int_equal(sh(&out, "printf 'a raven on a tower' | ramba append --new --name bird -"), 0);
    assert_int_equal(out.size, 28);
    assert_memory_equal(out.data, "mem_", 4);
    snprintf(id, sizeof id, "%s", out.data);
    assert_int_equal(memory(id).text_bytes, 18);
    assert_string_equal(memory(id).name, "bird");
    /* A slow pipe, by name. */
    assert_int_equal(sh(&out, "(printf ab; sleep 0.2; printf cd) | ramba append bird -"), 0);
    assert_int_equal(memory(id).text_bytes, 22);
    assert_int_equal(sh(&out, "ramba ls | grep -c \"^%s .* bird$\"", id), 0);
    assert_string_equal(out.data, "1");
    /* A question from a pipe is answered like one on the line, and leaves no trace. */
    assert_int_equal(sh(&out, "echo 'Who is there?' | ramba ask bird - --max-tokens 8"), 0);
    assert_int_equal(sh(&answer, "ramba ask bird Who is there? --max-tokens 8"), 0);
    assert_string_equal(out.data, answer.data);
    assert_int_equal(memory(id).text_bytes, 22);
    assert_int_equal(
        sh(&out, "ramba ask bird 'Who?' --sources --max-tokens 8 | grep -c '^read most:'"), 0);
    assert_int_equal(sh(&out, "ramba ask --write bird 'Who?' --max-tokens 8"), 0);
    const uint64_t asked = memory(id).text_bytes;
    assert_true(asked >= 22 + strlen("\nQuestion: Who?\nAnswer:"));
    /* A chat in a pipe: each line is a turn. */
    assert_int_equal(sh(&out, "printf 'hello\\n\\nagain' | ramba chat bird --max-tokens 4"), 0);
    const char turn[] = "\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n";
    assert_true(memory(id).text_bytes >= asked + 2 * strlen(turn));
    assert_int_equal(sh(&out, "ramba show bird | grep '^text'"), 0);
    buf_close(&out);
    buf_close(&answer);
}

static void test_forks(void **state)
{
    (void)state;
    struct buf out;
    char id[LIMITS_ID_BYTES], copy[LIMITS_ID_BYTES];
    buf_init(&out);
    assert_int_equal(sh(&out, "printf 'one past' | ramba append --new -"), 0);
    snprintf(id, sizeof id, "%s", out.data);
    assert_int_equal(sh(&out, "ramba fork %s --name twin", id), 0);
    snprintf(copy, sizeof copy, "%s", out.data);
    assert_string_equal(memory(copy).parent, id);
    assert_int_equal(sh(&out, "printf ', two futures' | ramba append twin -"), 0);
    assert_int_equal(memory(id).text_bytes, 8);
    assert_int_equal(memory(copy).text_bytes, 21);
    assert_int_equal(sh(&out, "ramba new --name twin && ramba show twin 2>/dev/null"), 2);
    /* One that is missing does not keep the others. */
    assert_int_equal(sh(&out, "ramba rm mem_none %s %s 2>/dev/null", id, copy), 4);
    assert_int_equal(sh(&out, "ramba ls | grep -c '%s\\|%s'", id, copy), 1);
    assert_int_equal(sh(&out, "ramba rm twin"), 0);
    buf_close(&out);
}

/* Another name, and whatever else was noted stays. */
static void test_rename(void **state)
{
    (void)state;
    char id[LIMITS_ID_BYTES], path[64];
    static const char noted[] = "{\"metadata\":{\"name\":\"crow\",\"shelf\":\"7\"}}";
    struct buf out;
    buf_init(&out);
    assert_int_equal(sh(&out, "ramba new"), 0);
    snprintf(id, sizeof id, "%s", out.data);
    assert_int_equal(sh(&out, "ramba rename %s finch", id), 0);
    assert_string_equal(memory(id).name, "finch");
    snprintf(path, sizeof path, "/v1/memories/%s", id);
    assert_int_equal(
        daemon_call(&daemon_, "PATCH", path, "application/json", noted, sizeof noted - 1, &out),
        200);
    assert_int_equal(sh(&out, "ramba rename crow rook"), 0);
    assert_int_equal(daemon_call(&daemon_, "GET", path, NULL, NULL, 0, &out), 200);
    assert_non_null(strstr(buf_text(&out), "\"shelf\":\"7\""));
    assert_string_equal(memory(id).name, "rook");
    assert_int_equal(sh(&out, "ramba rename crow jay 2>/dev/null"), 4);
    assert_int_equal(sh(&out, "ramba rm rook"), 0);
    buf_close(&out);
}

/* What stands under a file's name stays until a new export is whole; a pipe gets it as it comes. */
static void test_exports(void **state)
{
    (void)state;
    struct buf out;
    buf_init(&out);
    assert_int_equal(sh(&out, "echo 'a raven' | ramba append --new --name bird2 -"), 0);
    assert_int_equal(sh(&out,
                        "cd %s && ramba export bird2 kept && cp kept first &&"
                        " ramba export bird2 - | cmp - kept && ramba export bird2 /dev/null &&"
                        " test -c /dev/null && ! ramba export mem_none kept 2>/dev/null &&"
                        " (ulimit -f 0; trap '' XFSZ; ramba export bird2 kept) 2>&1 |"
                        " grep -q 'cannot write kept.part' && cmp kept first &&"
                        " ! test -e kept.part && echo again | ramba append bird2 - &&"
                        " ramba export bird2 kept && ! cmp -s kept first",
                        folder),
                     0);
    assert_int_equal(sh(&out, "ramba rm bird2"), 0);
    buf_close(&out);
}

/* A conversation is a memory, too: what is listed can be named. */
static void test_conversation(void **state)
{
    (void)state;
    char id[LIMITS_ID_BYTES];
    struct buf out;
    buf_init(&out);
    assert_int_equal(
        daemon_call(&daemon_, "POST", "/v1/conversations", "application/json", "{}", 2, &out), 200);
    assert_int_equal(sh(&out, "ramba ls | grep -o '^conv_[0-9a-f]*'"), 0);
    snprintf(id, sizeof id, "%s", out.data);
    assert_int_equal(sh(&out, "ramba show %s | grep '^id  *%s$'", id, id), 0);
    assert_int_equal(sh(&out, "ramba rm %s", id), 0);
    assert_int_equal(sh(&out, "ramba show %s 2>/dev/null", id), 4);
    buf_close(&out);
}

static void test_exit_codes(void **state)
{
    (void)state;
    static const struct {
        const char *script;
        int code;
    } cases[] = {{"ramba --version", 0},
                 {"ramba --help", 0},
                 {"ramba ask --help", 0},
                 {"ramba", 2},
                 {"ramba fly", 2},
                 {"ramba ls extra", 2},
                 {"ramba append", 2},
                 {"ramba append mem_none", 2},
                 {"ramba append --skip x mem_none $BOOK", 2},
                 {"ramba ask mem_none", 2},
                 {"ramba ask --max-tokens 0 mem_none q", 2},
                 {"ramba rename mem_none", 2},
                 {"ramba rename mem_none new", 4},
                 {"ramba export mem_none", 2},
                 {"ramba --url http://127.0.0.1:1 ls", 3},
                 {"RAMBA_URL=http://127.0.0.1:1 ramba ls", 3},
                 {"ramba show mem_none", 4},
                 {"ramba show 'no such name'", 4},
                 {"ramba ask mem_none q", 4},
                 {"ramba append mem_none /dev/null", 4},
                 {"ramba append --new /no/such/file", 1},
                 {"ramba append --new /tmp", 1},
                 {"ramba --help > /dev/full", 1}};
    struct buf out;
    buf_init(&out);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const int code = sh(&out, "BOOK=%s\n%s 2>/dev/null", book, cases[i].script);
        if (code != cases[i].code)
            print_message("%s\n", cases[i].script);
        assert_int_equal(code, cases[i].code);
    }
    buf_close(&out);
}

/* What the daemon's program says and how it ends, where it does not serve. */
static void test_daemon_program(void **state)
{
    (void)state;
    static const struct {
        const char *script;
        int code;
        const char *says; /* on either output */
    } cases[] = {
        {"rambad --version", 0, "rambad " RAMBAD_VERSION},
        {"rambad serve --version", 0, "rambad " RAMBAD_VERSION},
        {"rambad --help", 0, "--host-memory SIZE"},
        {"rambad serve --help", 0, "RAMBAD_HOST_MEMORY"},
        {"rambad bench --help", 0, "--lengths"},
        {"rambad bench --url --help", 0, "--clients"},
        {"rambad config >$F/conf && rambad --config $F/conf --data $F/data --port 0", 1,
         "in use by"},
        {"rambad check --help", 0, "usage: rambad check DIR"},
        {"rambad check", 2, "usage: rambad check DIR"},
        {"rambad check /no/such/folder", 1, "/no/such/folder"},
        {"rambad repair --help", 0, "usage: rambad repair DIR [--yes]"},
        {"rambad repair /no/such/folder", 1, "no store in /no/such/folder"},
        {"rambad repair $F/data --yes", 1, "in use by process"},
        {"rambad dance", 2, "\"dance\" is no command"},
        {"rambad --prot 80", 2, "--prot"},
        {"RAMBAD_PORT=http rambad", 2, "port: \"http\" is not a whole number"},
        {"rambad --config /no/such/file", 2, "/no/such/file"},
        {"rambad --model /no/such/model --data $F/other", 1, "/no/such/model"},
        {"rambad --model " MODEL " --data $F/data --port 0", 1, "in use by process"},
        {"cp -r " MODEL " $F/talks; echo '{\"chat_template\":\"{{ messages }}\"}' "
         ">$F/talks/tokenizer_config.json; rambad --model $F/talks --data $F/other --port 0",
         1, "--chat-template names"},
        {"rambad --model $F/talks --chat-template alpaca --data $F/other --port 0", 1,
         "--chat-template alpaca: it is one of chatml, llama-2"},
        {"rambad --model " MODEL " --data $F/other --host nowhere", 1,
         "nowhere is not an IP address"},
        {"rambad --model " MODEL " --data $F/other --port ${RAMBA_URL##*:}", 1,
         "address already in"},
    };
    struct buf out;
    buf_init(&out);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const int code = sh(&out, "F=%s; unset RAMBAD_CONFIG\n%s 2>&1", folder, cases[i].script);
        if (code != cases[i].code || !strstr(out.data, cases[i].says))
            fail_msg("%s: exit code %d\n%s", cases[i].script, code, out.data);
    }
    buf_close(&out);
}

/* On a terminal: a bar with what is done, the rate, the time left. */
static void test_progress(void **state)
{
    (void)state;
    struct buf out;
    struct winsize size = {.ws_row = 24, .ws_col = 120};
    char block[4096];
    int terminal, how;
    buf_init(&out);
    fflush(NULL);
    const pid_t pid = forkpty(&terminal, NULL, NULL, &size);
    assert_true(pid >= 0);
    if (pid == 0) {
        const char *program = getenv("RAMBA_BIN");
        execl(program, program, "--url", daemon_.url, "append", "--new", book, (char *)NULL);
        _exit(127);
    }
    for (ssize_t got; (got = read(terminal, block, sizeof block)) > 0;)
        buf_append(&out, block, (size_t)got);
    close(terminal);
    assert_int_equal(waitpid(pid, &how, 0), pid);
    assert_true(WIFEXITED(how) && WEXITSTATUS(how) == 0);
    const char *text = buf_text(&out);
    const char *bar = strstr(text, "\r\033[K[");
    assert_non_null(bar);
    assert_non_null(strstr(bar, "#-"));
    assert_non_null(strstr(bar, "%  "));
    assert_non_null(strstr(bar, " of " FILE_NAMED));
    assert_non_null(strstr(bar, " tokens/s, "));
    assert_non_null(strstr(bar, " left"));
    const char *end = strstr(text, "added " FILE_NAMED ", " TOKENS_NAMED " tokens in ");
    assert_non_null(end);
    assert_non_null(strstr(end, "\nmem_"));
    buf_close(&out);
}

/* The command goes on after a server that was killed and came back. */
static void test_server_dies(void **state)
{
    (void)state;
    struct buf out, whole, chunks;
    char id[LIMITS_ID_BYTES], command[1200];
    int how;
    buf_init(&out);
    buf_init(&whole);
    buf_init(&chunks);
    assert_int_equal(sh(&out, "ramba append --new %s 2>/dev/null", book), 0);
    daemon_read_chunks(&daemon_, out.data, &whole);
    daemon_create_memory(&daemon_, NULL, id);
    snprintf(command, sizeof command, "exec \"$RAMBA_BIN\" append %s %s >/dev/null 2>&1", id, book);
    fflush(NULL);
    const pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        setenv("RAMBA_URL", daemon_.url, 1);
        execl("/bin/sh", "sh", "-c", command, (char *)NULL);
        _exit(127);
    }
    while (memory(id).text_bytes < FILE_BYTES / 4) /* in the midst of it */
        usleep(1000);
    daemon_kill(&daemon_);
    usleep(300000);
    daemon_start(&daemon_);
    assert_int_equal(waitpid(pid, &how, 0), pid);
    assert_true(WIFEXITED(how) && WEXITSTATUS(how) == 0);
    assert_int_equal(memory(id).text_bytes, FILE_BYTES);
    daemon_read_chunks(&daemon_, id, &chunks);
    assert_int_equal(chunks.size, whole.size);
    assert_memory_equal(chunks.data, whole.data, whole.size);
    buf_close(&out);
    buf_close(&whole);
    buf_close(&chunks);
}

/* Ctrl-C says what is kept and how to go on, and that works. */
static void test_interrupt(void **state)
{
    (void)state;
    struct buf out;
    char id[LIMITS_ID_BYTES], log[1100];
    int how;
    buf_init(&out);
    daemon_create_memory(&daemon_, NULL, id);
    snprintf(log, sizeof log, "%s/interrupt.log", folder);
    fflush(NULL);
    const pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        const char *program = getenv("RAMBA_BIN");
        const int fd = open(log, O_WRONLY | O_CREAT, 0600);
        dup2(fd, STDERR_FILENO);
        setenv("RAMBA_URL", daemon_.url, 1);
        execl(program, program, "append", id, book, (char *)NULL);
        _exit(127);
    }
    while (memory(id).text_bytes == 0)
        usleep(1000);
    kill(pid, SIGINT);
    assert_int_equal(waitpid(pid, &how, 0), pid);
    assert_true(WIFEXITED(how) && WEXITSTATUS(how) == 1);
    assert_int_equal(sh(&out, "sed -n 's/^go on with: //p' %s", log), 0);
    assert_memory_equal(out.data, "ramba append --skip ", 20);
    char again[1100];
    snprintf(again, sizeof again, "%s", out.data);
    assert_int_equal(sh(&out, "%s 2>/dev/null", again), 0);
    assert_int_equal(memory(id).text_bytes, FILE_BYTES);
    buf_close(&out);
}

static int setup(void **state)
{
    char data[1024];
    (void)state;
    setenv("RAMBA_BIN", "build/ramba", 0);
    setenv("RAMBAD_BIN", "build/rambad", 0);
    folder = store_helper_folder();
    snprintf(data, sizeof data, "%s/data", folder);
    snprintf(book, sizeof book, "%s/book.txt", folder);
    FILE *file = fopen(book, "w");
    assert_non_null(file);
    for (size_t i = 0; i < FILE_BYTES / 8; i++)
        fprintf(file, "%07zu\n", i * 7919 % 10000000);
    assert_int_equal(fclose(file), 0);
    daemon_init(&daemon_, MODEL, folder, "data");
    daemon_start(&daemon_);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    if (daemon_.pid)
        daemon_stop(&daemon_);
    daemon_check(&daemon_);
    store_helper_remove(folder);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pipes),          cmocka_unit_test(test_forks),
        cmocka_unit_test(test_rename),         cmocka_unit_test(test_exports),
        cmocka_unit_test(test_conversation),   cmocka_unit_test(test_exit_codes),
        cmocka_unit_test(test_daemon_program), cmocka_unit_test(test_progress),
        cmocka_unit_test(test_server_dies),    cmocka_unit_test(test_interrupt),
    };
    daemon_choose_tests();
    return cmocka_run_group_tests(tests, setup, teardown);
}
