"""The machine: files, processes, memory, GPUs."""
