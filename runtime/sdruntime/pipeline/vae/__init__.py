"""Run the VAE: on a whole image, or on tiles of it."""
