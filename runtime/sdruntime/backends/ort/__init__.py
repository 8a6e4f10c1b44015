"""ONNX Runtime, on the CPU or through its CUDA execution provider.

Importing this package turns its telemetry off: since 1.29 the Linux builds can write a device id below the home folder and open
sockets. It reads the variable when it is loaded. A value that you set yourself stays.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
