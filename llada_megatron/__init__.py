"""Turns autoregressive Mixture-of-Experts language models into block-diffusion language models."""

__version__ = "0.1.0"
