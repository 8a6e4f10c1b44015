"""ONNX Runtime, on the CPU or through its CUDA execution provider.

Importing this package disables ONNX Runtime's telemetry: since 1.29 the Linux builds can write a device id to the home folder and
open sockets. The library reads the variable when it is loaded. A value that you set yourself is kept.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
