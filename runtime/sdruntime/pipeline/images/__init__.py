"""Images: pixels and files."""
