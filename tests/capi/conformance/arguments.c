/* Invalid arguments. */
#include "harness.h"

static void versions(void) {
    CHECK(strcmp(sdr_version(), SDR_VERSION) == 0);
    CHECK(sdr_abi_version() >> 16 == SDR_ABI_MAJOR);
    CHECK(sdr_abi_version() >= ((uint32_t)SDR_ABI_MAJOR << 16 | SDR_ABI_MINOR));
}

static void null_handles(void) {
    sdr_runtime *runtime = NULL;
    sdr_job *job = NULL;
    sdr_open_params open = open_params();
    sdr_job_params params = job_params();
    sdr_result result;
    const uint8_t *bytes;
    size_t size;
    const char *json;
    sdr_result_init(&result, sizeof result);
    FAILS(sdr_runtime_describe(NULL, &json), SDR_USAGE, SDR_REASON_BAD_HANDLE);
    CHECK(json == NULL);
    FAILS(sdr_runtime_close(NULL), SDR_USAGE, SDR_REASON_BAD_HANDLE);
    FAILS(sdr_job_submit(NULL, &params, &job), SDR_USAGE, SDR_REASON_BAD_HANDLE);
    CHECK(job == NULL);
    FAILS(sdr_job_poll(NULL, NULL, NULL, NULL), SDR_USAGE, SDR_REASON_BAD_HANDLE);
    FAILS(sdr_job_wait(NULL, 0), SDR_USAGE, SDR_REASON_BAD_HANDLE);
    FAILS(sdr_job_cancel(NULL), SDR_USAGE, SDR_REASON_BAD_HANDLE);
    FAILS(sdr_job_result(NULL, &result), SDR_USAGE, SDR_REASON_BAD_HANDLE);
    FAILS(sdr_job_rgb(NULL, &bytes, &size), SDR_USAGE, SDR_REASON_BAD_HANDLE);
    FAILS(sdr_job_copy_rgb(NULL, NULL, 0, 0, &size), SDR_USAGE, SDR_REASON_BAD_HANDLE);
    FAILS(sdr_job_png(NULL, &bytes, &size), SDR_USAGE, SDR_REASON_BAD_HANDLE);
    FAILS(sdr_runtime_open(NULL, &runtime), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    FAILS(sdr_runtime_open(&open, NULL), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    sdr_runtime_free(NULL);
    sdr_job_free(NULL);
    sdr_status_free(NULL);
    sdr_open_params_init(NULL, 100);
    sdr_job_params_init(NULL, 100);
    sdr_result_init(NULL, 100);
    CHECK(sdr_status_code(NULL) == SDR_OK && sdr_status_reason(NULL) == SDR_REASON_NONE && !*sdr_status_message(NULL));
}

static void null_outputs(void) {
    sdr_runtime *runtime = open_runtime();
    sdr_job_params params = job_params();
    sdr_job *job = submit(runtime, &params);
    const uint8_t *bytes;
    size_t size;
    WORKS(sdr_job_wait(job, -1));
    FAILS(sdr_runtime_describe(runtime, NULL), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    FAILS(sdr_job_submit(runtime, NULL, &job), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    CHECK(job == NULL);
    FAILS(sdr_job_submit(runtime, &params, NULL), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    job = submit(runtime, &params);
    WORKS(sdr_job_wait(job, -1));
    WORKS(sdr_job_poll(job, NULL, NULL, NULL));
    FAILS(sdr_job_result(job, NULL), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    FAILS(sdr_job_rgb(job, NULL, &size), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    FAILS(sdr_job_rgb(job, &bytes, NULL), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    FAILS(sdr_job_png(job, NULL, NULL), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    FAILS(sdr_job_copy_rgb(job, NULL, 10, 0, &size), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    FAILS(sdr_job_copy_rgb(job, NULL, 0, 0, NULL), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    sdr_job_free(job);
    sdr_runtime_free(runtime);
}

static void foreign_and_freed_handles(void) {
    int local = 0;
    const char *json;
    sdr_runtime *runtime = open_runtime();
    sdr_job_params params = job_params();
    sdr_job *job = submit(runtime, &params);
    sdr_status *status = sdr_job_wait(NULL, 0);
    /* a handle of another type, an address, a number */
    FAILS(sdr_runtime_describe((sdr_runtime *)(void *)job, &json), SDR_USAGE, SDR_REASON_BAD_HANDLE);
    FAILS(sdr_job_wait((sdr_job *)(void *)runtime, 0), SDR_USAGE, SDR_REASON_BAD_HANDLE);
    FAILS(sdr_job_wait((sdr_job *)(void *)&local, 0), SDR_USAGE, SDR_REASON_BAD_HANDLE);
    CHECK(sdr_status_code((sdr_status *)(void *)job) == SDR_USAGE);
    CHECK(sdr_status_reason((sdr_status *)(void *)&local) == SDR_REASON_BAD_HANDLE);
    /* freed, and freed twice */
    sdr_status_free(status);
    CHECK(sdr_status_code(status) == SDR_USAGE && *sdr_status_message(status));
    sdr_status_free(status);
    sdr_job_free(job);
    sdr_job_free(job);
    FAILS(sdr_job_wait(job, -1), SDR_USAGE, SDR_REASON_BAD_HANDLE);
    FAILS(sdr_job_cancel(job), SDR_USAGE, SDR_REASON_BAD_HANDLE);
    sdr_runtime_free(runtime);
    sdr_runtime_free(runtime);
    FAILS(sdr_runtime_describe(runtime, &json), SDR_USAGE, SDR_REASON_BAD_HANDLE);
    FAILS(sdr_runtime_close(runtime), SDR_USAGE, SDR_REASON_BAD_HANDLE);
    FAILS(sdr_job_submit(runtime, &params, &job), SDR_USAGE, SDR_REASON_BAD_HANDLE);
}

static void struct_sizes(void) {
    union {
        sdr_job_params params;
        unsigned char bytes[sizeof(sdr_job_params) + 64];
    } longer;
    sdr_open_params open = open_params();
    sdr_runtime *runtime = NULL;
    sdr_job_params params;
    sdr_job *job = NULL;
    sdr_result result;
    const uint32_t sizes[] = {0, 4, 1u << 20, UINT32_MAX};
    size_t k;
    for (k = 0; k < 4; ++k) {
        open.struct_size = sizes[k];
        FAILS(sdr_runtime_open(&open, &runtime), SDR_USAGE, SDR_REASON_BAD_STRUCT);
    }
    runtime = open_runtime();
    for (k = 0; k < 4; ++k) {
        params = job_params();
        params.struct_size = sizes[k];
        FAILS(sdr_job_submit(runtime, &params, &job), SDR_USAGE, SDR_REASON_BAD_STRUCT);
    }
    /* from a newer header: accepted if its new fields have their defaults */
    memset(&longer, 0xff, sizeof longer);
    sdr_job_params_init(&longer.params, sizeof longer);
    CHECK(longer.params.struct_size == sizeof longer);
    longer.params.prompt = "a red cat";
    longer.params.steps = 2;
    job = submit(runtime, &longer.params);
    WORKS(sdr_job_wait(job, -1));
    memset(&result, 0xff, sizeof result);
    for (k = 0; k < 4; ++k) {
        result.struct_size = sizes[k];
        if (sizes[k] != 4) FAILS(sdr_job_result(job, &result), SDR_USAGE, SDR_REASON_BAD_STRUCT);
    }
    /* an older header's result: nothing beyond its end is written */
    sdr_result_init(&result, sizeof result);
    result.struct_size = (uint32_t)offsetof(sdr_result, seed);
    result.seed = 99;
    WORKS(sdr_job_result(job, &result));
    CHECK(result.width > 0 && result.seed == 99);
    sdr_job_free(job);
    longer.bytes[sizeof longer - 1] = 1;
    FAILS(sdr_job_submit(runtime, &longer.params, &job), SDR_USAGE, SDR_REASON_BAD_STRUCT);
    CHECK(job == NULL);
    params = job_params();
    params.reserved = 1;
    FAILS(sdr_job_submit(runtime, &params, &job), SDR_USAGE, SDR_REASON_BAD_STRUCT);
    sdr_runtime_free(runtime);
}

static void texts_that_are_not_utf8(void) {
    static const char *const bad[] = {"\xff", "a\x80", "\xc0\xaf", "\xed\xa0\x80", "\xf5\x80\x80\x80", "\xe2\x82"};
    sdr_runtime *runtime = open_runtime(), *none = NULL;
    sdr_job *job = NULL;
    size_t k;
    for (k = 0; k < sizeof bad / sizeof *bad; ++k) {
        const char **fields[5];
        sdr_job_params params;
        sdr_open_params open = open_params();
        size_t field;
        for (field = 0; field < 5; ++field) {
            params = job_params();
            fields[0] = &params.prompt, fields[1] = &params.negative, fields[2] = &params.sampler, fields[3] = &params.schedule;
            fields[4] = &params.options;
            *fields[field] = bad[k];
            FAILS(sdr_job_submit(runtime, &params, &job), SDR_USAGE, SDR_REASON_BAD_TEXT);
        }
        open.bundle = bad[k];
        FAILS(sdr_runtime_open(&open, &none), SDR_USAGE, SDR_REASON_BAD_TEXT);
        open = open_params();
        open.device = bad[k];
        FAILS(sdr_runtime_open(&open, &none), SDR_USAGE, SDR_REASON_BAD_TEXT);
        open = open_params();
        open.python = bad[k];
        FAILS(sdr_runtime_open(&open, &none), SDR_USAGE, SDR_REASON_BAD_TEXT);
    }
    sdr_runtime_free(runtime);
}

static void options_that_are_not_an_object(void) {
    static const char *const bad[] = {
        "", "{", "[]", "{\"a\":1,}", "{\"a\":1}x", "{\"a\":1,\"a\":2}", "{a:1}", "{\"a\":01}", "{\"a\":\"\\ud800\"}", "nul"};
    sdr_runtime *runtime = open_runtime(), *none = NULL;
    sdr_open_params open = open_params();
    sdr_job_params params = job_params();
    sdr_job *job = NULL;
    char deep[2002];
    size_t k;
    for (k = 0; k < sizeof bad / sizeof *bad; ++k) {
        params.options = open.options = bad[k];
        FAILS(sdr_job_submit(runtime, &params, &job), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
        FAILS(sdr_runtime_open(&open, &none), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    }
    memset(deep, '[', 2000);
    memcpy(deep, "{\"a\":", 5);
    deep[2000] = 0;
    params.options = deep;
    FAILS(sdr_job_submit(runtime, &params, &job), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    open.options = "{\"threads\": 2}"; /* sdr_open_params has a field for it */
    FAILS(sdr_runtime_open(&open, &none), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    sdr_runtime_free(runtime);
}

static void bundles_that_do_not_open(void) {
    sdr_open_params open = open_params();
    sdr_runtime *runtime = NULL;
    open.bundle = "/nonexistent/bundle";
    FAILS(sdr_runtime_open(&open, &runtime), SDR_BUNDLE, SDR_REASON_NONE);
    CHECK(runtime == NULL);
    open.bundle = NULL;
    FAILS(sdr_runtime_open(&open, &runtime), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    open = open_params();
    open.isolation = 7;
    FAILS(sdr_runtime_open(&open, &runtime), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    open = open_params();
    open.threads = -1;
    FAILS(sdr_runtime_open(&open, &runtime), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    open = open_params();
    open.python = "/nonexistent/python";
    FAILS(sdr_runtime_open(&open, &runtime), SDR_ENVIRONMENT, SDR_REASON_NO_PYTHON);
    open = open_params();
    open.stream = &open;
    if (settings.isolation == SDR_ISOLATION_PROCESS) FAILS(sdr_runtime_open(&open, &runtime), SDR_USAGE, SDR_REASON_UNSUPPORTED);
}

static void settings_out_of_range(void) {
    sdr_runtime *runtime = open_runtime();
    sdr_job_params params = job_params();
    sdr_job *job = NULL;
    uint8_t image[3 * 64 * 64] = {0};
    const double zero = 0.0;
    params.prompt = NULL;
    FAILS(sdr_job_submit(runtime, &params, &job), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    params = job_params();
    params.guidance = zero / zero;
    FAILS(sdr_job_submit(runtime, &params, &job), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    params = job_params();
    params.width = 64;
    FAILS(sdr_job_submit(runtime, &params, &job), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    params.height = -64;
    FAILS(sdr_job_submit(runtime, &params, &job), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    params = job_params();
    params.image = image;
    FAILS(sdr_job_submit(runtime, &params, &job), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    params.image_width = params.image_height = 64;
    params.image_stride = 3 * 64 - 1;
    FAILS(sdr_job_submit(runtime, &params, &job), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    params.image_stride = SIZE_MAX / 2 + 1;
    FAILS(sdr_job_submit(runtime, &params, &job), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    params.image_stride = SIZE_MAX;
    FAILS(sdr_job_submit(runtime, &params, &job), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    params.image_height = 1;
    FAILS(sdr_job_submit(runtime, &params, &job), SDR_USAGE, SDR_REASON_BAD_ARGUMENT);
    params = job_params();
    params.device_buffer = image;
    if (settings.isolation == SDR_ISOLATION_PROCESS)
        FAILS(sdr_job_submit(runtime, &params, &job), SDR_USAGE, SDR_REASON_UNSUPPORTED);
    /* errors that only the engines detect are reported by sdr_job_wait */
    params = job_params();
    params.steps = 0;
    job = submit(runtime, &params);
    FAILS(sdr_job_wait(job, -1), SDR_USAGE, SDR_REASON_NONE);
    FAILS(sdr_job_wait(job, -1), SDR_USAGE, SDR_REASON_NONE);
    sdr_job_free(job);
    params = job_params();
    params.sampler = "no such sampler";
    job = submit(runtime, &params);
    FAILS(sdr_job_wait(job, -1), SDR_USAGE, SDR_REASON_NONE);
    sdr_job_free(job);
    sdr_runtime_free(runtime);
}

void arguments_tests(void) {
    RUN(versions);
    RUN(null_handles);
    RUN(null_outputs);
    RUN(foreign_and_freed_handles);
    RUN(struct_sizes);
    RUN(texts_that_are_not_utf8);
    RUN(options_that_are_not_an_object);
    RUN(bundles_that_do_not_open);
    RUN(settings_out_of_range);
}
