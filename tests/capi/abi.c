/* A host compiled with another version of the header: abi BUNDLE PYTHON. With -DNEWER, its structs end in a field `newer`. */
#include <stdio.h>
#include <string.h>

#include "sdruntime/sdruntime.h"

static int faults, calls;

static void expect(const char *what, sdr_status *status, int32_t code, int32_t reason) {
    if (sdr_status_code(status) != code || sdr_status_reason(status) != reason) {
        ++faults;
        printf("%s: %d %d %s\n", what, (int)sdr_status_code(status), (int)sdr_status_reason(status), sdr_status_message(status));
    }
    sdr_status_free(status);
}

static int32_t progress(void *user, sdr_job *job, const sdr_progress *now) {
    (void)user, (void)job;
    faults += now->step != ++calls || now->steps != 3 || now->struct_size < offsetof(sdr_progress, preview) + sizeof now->preview;
#ifdef NEWER
    faults += now->struct_size >= offsetof(sdr_progress, newer) + sizeof now->newer; /* the library lacks this field */
#endif
    return 0;
}

int main(int argc, char **argv) {
    sdr_open_params open;
    sdr_job_params params;
    sdr_result result;
    sdr_runtime *runtime = NULL;
    sdr_job *job = NULL;
    if (argc < 3) return 2;
    memset(&open, 0xff, sizeof open);
    memset(&params, 0xff, sizeof params);
    memset(&result, 0xff, sizeof result);
    sdr_open_params_init(&open, sizeof open);
    sdr_job_params_init(&params, sizeof params);
    sdr_result_init(&result, sizeof result);
    faults += params.steps != 20 || params.guidance != 7.5 || open.log_level != SDR_LOG_INFO || result.seed != 0;
    open.isolation = SDR_ISOLATION_PROCESS;
    open.bundle = argv[1];
    open.python = argv[2];
#ifdef NEWER
    faults += open.newer != 0 || params.newer != 0 || result.newer != 0;
    open.newer = 1;
    expect("a newer field of sdr_open_params", sdr_runtime_open(&open, &runtime), SDR_USAGE, SDR_REASON_BAD_STRUCT);
    open.newer = 0;
#endif
    expect("open", sdr_runtime_open(&open, &runtime), SDR_OK, SDR_REASON_NONE);
    params.prompt = "a red cat";
    params.seed = 7;
    params.steps = 3;
    params.progress = progress;
#ifdef NEWER
    params.newer = 1;
    expect("a newer field of sdr_job_params", sdr_job_submit(runtime, &params, &job), SDR_USAGE, SDR_REASON_BAD_STRUCT);
    params.newer = 0;
#endif
    expect("submit", sdr_job_submit(runtime, &params, &job), SDR_OK, SDR_REASON_NONE);
    expect("wait", sdr_job_wait(job, -1), SDR_OK, SDR_REASON_NONE);
#ifdef NEWER
    result.newer = 99; /* the library does not write fields that it does not know */
#endif
    expect("result", sdr_job_result(job, &result), SDR_OK, SDR_REASON_NONE);
#ifdef NEWER
    faults += result.newer != 99;
#endif
    faults += result.struct_size != sizeof result || result.width != 64 || result.height != 64 || result.seed != 7 || calls != 3;
    faults += result.sampler == NULL || strcmp(result.warnings, "[]") != 0;
    sdr_job_free(job);
    sdr_runtime_free(runtime);
    printf("%d faults\n", faults);
    return faults != 0;
}
