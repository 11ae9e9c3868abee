"""What a client sees. Knows no torch, and the model only as the engine's sampler."""
