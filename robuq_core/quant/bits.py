"""The bit table of a model: layer name -> activation bits, and its MAC-weighted average, eq. (6)."""

from __future__ import annotations

from collections.abc import Mapping


def average_bits(bits: Mapping[str, int], macs: Mapping[str, int]) -> float:
    """``sum_l MAC_l b_l / sum_l MAC_l`` over the layers of ``bits``, all of which ``macs`` names."""
    return sum(macs[name] * width for name, width in bits.items()) / sum(macs[name] for name in bits)
