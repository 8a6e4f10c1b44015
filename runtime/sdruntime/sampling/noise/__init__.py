"""The noise of an image: what a seed stands for."""
