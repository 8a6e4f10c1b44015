"""What every backend is, is given and returns."""
