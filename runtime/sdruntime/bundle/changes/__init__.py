"""Changes to a bundle on disk that other processes use at the same time."""
