"""Training of W1.58Ax diffusion transformers: data -> teacher -> QAT -> export -> evaluate.

Writes what ``robuq_core`` runs; knows nothing of HTTP.
"""
