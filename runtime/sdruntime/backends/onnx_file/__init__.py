"""ONNX files read without the onnx package: their graph, and where their weights lie."""
