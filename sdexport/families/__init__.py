"""The components of each model family, and the modules that are traced."""
