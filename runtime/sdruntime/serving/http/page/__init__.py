"""The web page at `/`: its files, and the two routes that it needs besides `/v1/jobs`."""
