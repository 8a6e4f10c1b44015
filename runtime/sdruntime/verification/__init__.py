"""Whether engines compute what PyTorch computed."""
