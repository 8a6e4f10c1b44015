"""The samplers of k-diffusion: steps in sigma."""
