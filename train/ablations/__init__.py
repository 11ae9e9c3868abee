"""Ablation studies: rows of overrides of one training run, trained, measured and compared."""
