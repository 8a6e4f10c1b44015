"""A bundle held to its checkpoint in PyTorch."""
