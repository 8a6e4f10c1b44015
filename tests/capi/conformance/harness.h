/* Helpers for all files of the conformance suite. The suite tests any implementation of sdruntime.h: it uses only the header, a
 * bundle and the `settings` of this file. */
#ifndef HARNESS_H
#define HARNESS_H

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sdruntime/sdruntime.h"

struct settings {
    int32_t isolation;
    const char *bundle, *python, *backend;
};
extern struct settings settings;
extern int faults; /* of the current test */

#define CHECK(condition)                                             \
    do {                                                             \
        if (!(condition)) {                                          \
            ++faults;                                                \
            printf("  %s:%d: %s\n", __FILE__, __LINE__, #condition); \
        }                                                            \
    } while (0)

/* Check that the call succeeds; otherwise print its status and count a fault. */
#define WORKS(call) CHECK(works(call))
int works(sdr_status *status);

/* Check that the call fails with this code and reason, and with a message. Frees the status. */
#define FAILS(call, code, reason) fails(call, code, reason, __FILE__, __LINE__)
void fails(sdr_status *status, int32_t code, int32_t reason, const char *file, int line);

sdr_open_params open_params(void);
sdr_runtime *open_runtime(void); /* returns NULL and counts a fault on failure */
sdr_job_params job_params(void); /* a small image in three steps */
sdr_job *submit(sdr_runtime *runtime, const sdr_job_params *params);
unsigned long sum_of(sdr_job *job); /* checksum of the image; 0 if there is none */

/* A progress callback that blocks in its first call until the gate is opened. `user` is a struct gate. */
struct gate {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    int reached, open, calls, result;
    sdr_job *job;
};
void gate_init(struct gate *gate);
int32_t gate_progress(void *user, sdr_job *job, const sdr_progress *progress);
void gate_wait(struct gate *gate); /* wait until the callback blocks */
void gate_open(struct gate *gate);
int gate_calls(struct gate *gate);
sdr_job *submit_gated(sdr_runtime *runtime, struct gate *gate, int32_t steps);

void arguments_tests(void);
void results_tests(void);
void callbacks_tests(void);
void lifetime_tests(void);
void run_test(const char *name, void (*test)(void));
#define RUN(test) run_test(#test, test)

#endif
