"""The numerics of W1.58Ax, each defined once: training and runtime both call these functions.

Knows torch and nothing else: no model, no file format, no HTTP. Arguments out of range, and widths
without a Hadamard matrix, raise ValueError.
"""
