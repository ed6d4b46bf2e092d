"""Composable, controllable latent diffusion in JAX."""
