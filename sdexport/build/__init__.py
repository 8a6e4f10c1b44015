"""Build a bundle from a checkpoint."""
