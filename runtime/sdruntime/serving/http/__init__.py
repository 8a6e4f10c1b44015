"""The HTTP server: a Starlette application over an engine room. It needs the extra `server`."""
