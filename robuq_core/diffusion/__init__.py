"""The diffusion process: schedule tables, conversions between predictions, per-row sampler steps, guidance."""
