"""Export components from PyTorch to ONNX, each in its own process."""
