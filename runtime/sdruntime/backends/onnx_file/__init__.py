"""Read ONNX files without the onnx package: their graph, and where their weights are stored."""
