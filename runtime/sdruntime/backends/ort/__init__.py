"""ONNX Runtime, on the CPU or through its CUDA execution provider."""
