"""Images for many callers: a queue, and a service for hosts that are not Python."""
