"""From a request to an image."""
