"""Compare a bundle with its checkpoint in PyTorch."""
