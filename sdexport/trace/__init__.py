"""A component in PyTorch becomes ONNX, in a process of its own."""
