"""What each task makes of a request: the first latents, and inputs of the UNet."""
