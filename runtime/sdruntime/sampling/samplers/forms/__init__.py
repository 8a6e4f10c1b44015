"""Samplers of models that were trained in another form than DDPM: rectified flows, and EDM's preconditioning."""
