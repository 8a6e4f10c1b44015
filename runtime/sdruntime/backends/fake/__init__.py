"""Engines that compute nothing: the seam's fake, for tests and for measuring what the runtime itself costs."""
