"""The weights of a checkpoint: their files, and where each tensor lies in them."""
