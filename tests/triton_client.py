"""NVIDIA's own client, run by the Python of the tests' server: triton_client.py GRPC_PORT, a task as JSON on standard input.

    {"model": "fox", "requests": [{"PROMPT": …}, …]}     all requests in one stream
    {…, "after": N}                                      and the stream is cancelled after N responses

It prints {"events": [[number of the request, STEP or image or error], …]}.
"""

from __future__ import annotations

import base64
import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as client

TYPES = {"SEED": "UINT64", "STEPS": "INT32", "SIZE": "INT32", "GUIDANCE": "FP64", "STRENGTH": "FP64"}
KINDS = {"UINT64": np.uint64, "INT32": np.int32, "FP64": np.float64}
WAIT = 120.0


def tensors(request: dict[str, Any]) -> list[Any]:
    inputs = []
    for name, value in request.items():
        kind = TYPES.get(name, "BYTES")
        array = np.array([value.encode()], object) if kind == "BYTES" else np.atleast_1d(np.array(value, KINDS[kind]))
        inputs.append(client.InferInput(name, array.shape, kind))
        inputs[-1].set_data_from_numpy(array)
    return inputs


def run(port: int, task: dict[str, Any]) -> dict[str, Any]:
    received: queue.Queue[tuple[Any, Any]] = queue.Queue()
    server = client.InferenceServerClient(f"127.0.0.1:{port}")
    server.start_stream(lambda result, error: received.put((result, error)))
    for k, request in enumerate(task["requests"]):
        server.async_stream_infer(task["model"], tensors(request), request_id=str(k), enable_empty_final_response=True)
    events: list[list[Any]] = []
    finals = 0
    while finals < len(task["requests"]) and len(events) < task.get("after", 10**9):
        result, error = received.get(timeout=WAIT)
        if error is not None:
            events.append([None, {"error": error.message()}])
            finals += 1
            continue
        response = result.get_response()
        number = int(response.id)
        arrays = {output.name: result.as_numpy(output.name) for output in response.outputs}
        if "STEP" in arrays:
            events.append([number, arrays["STEP"].tolist()])
        elif "INFO" in arrays:
            image = arrays["PNG"][0] if "PNG" in arrays else arrays["IMAGE"].tobytes()
            events.append([number, {"image": base64.b64encode(image).decode(), "info": json.loads(arrays["INFO"][0])}])
        finals += response.parameters["triton_final_response"].bool_param
    server.stop_stream(cancel_requests="after" in task)
    server.close()
    return {"events": events}


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), json.loads(sys.stdin.read()))))
