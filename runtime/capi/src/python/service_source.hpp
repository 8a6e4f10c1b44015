// The library's own Python code. It imports sdruntime.serving.service, or reports why that fails.
#pragma once

namespace sdr {

// Defines start(emit, folder) -> (handle, fault). `handle` is the method of a Service, which passes its events to emit(bytes,
// bytes).
constexpr const char *IN_PROCESS_SOURCE = R"python(
def start(emit, folder):
    import sys
    try:
        if folder and folder not in sys.path:
            import site
            site.addsitedir(folder)
        import numpy
        from sdruntime.serving.service import Service
    except BaseException as error:
        places = "".join(f"\n  - {place}" for place in sys.path)
        return None, f"Python {sys.version.split()[0]} ({sys.prefix}): {type(error).__name__}: {error}; searched:{places}"
    def send(message, blob=None):
        emit(message, b"" if blob is None else bytes(blob))
    return Service(send).handle, ""
)python";

// The program of a worker, for `python -c`; its argument is the descriptor. It does not search the current folder for modules.
constexpr const char *WORKER_SOURCE = R"python(
import sys
if sys.path and sys.path[0] == "":
    del sys.path[0]
try:
    import numpy
    from sdruntime.serving.service import main
except BaseException as error:
    import json, os, struct
    places = "".join(f"\n  - {place}" for place in sys.path)
    fault = f"Python {sys.version.split()[0]} ({sys.executable}): {type(error).__name__}: {error}; searched:{places}"
    body = json.dumps({"event": "refused", "code": 3, "reason": "no_runtime", "message": fault}).encode()
    os.write(int(sys.argv[1]), struct.pack("<IIQ", len(body), 0, 0) + body)
    sys.exit(3)
sys.exit(main(sys.argv[1:]))
)python";

}  // namespace sdr
