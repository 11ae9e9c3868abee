"""RobuQ's runtime: diffusion transformers with ternary weights and low-bit activations (W1.58Ax).

Knows neither HTTP (``server``) nor training (``train``).
"""

__version__ = "0.1.0"
