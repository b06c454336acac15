/* bench.h - `rambad bench`: what this machine does with a model.
 * Thread: the main thread; starts an engine of its own. Owns nothing. */
#ifndef SERVER_BENCH_H
#define SERVER_BENCH_H

/* Returns the exit code. */
int bench_main(int argc, char **argv);

#endif
