"""TensorRT and TensorRT-RTX: one code path, from TensorRT 10.3 (JetPack 6) to 11.x and TensorRT-RTX 1.x."""
