#include "server/unreadable.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static char message[4600];

/* What the kernel could not read has no other way to tell. */
static void on_bus_error(int number)
{
    (void)number;
    (void)!write(STDERR_FILENO, message, strlen(message));
    _exit(1);
}

void unreadable_watch(const char *data)
{
    struct sigaction action = {.sa_handler = on_bus_error};
    snprintf(
        message, sizeof message,
        "rambad: a page of a mapped file cannot be read: data.mdb in %.4000s, or a file of the "
        "model, was cut short, or the disk fails. Nothing was written over; look at the disk, "
        "or take a copy of the folder that is whole.\n",
        data);
    sigaction(SIGBUS, &action, NULL);
}
