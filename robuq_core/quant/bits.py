"""The bit table of a model: layer name -> activation bits, and its MAC-weighted average, eq. (6)."""

from __future__ import annotations

from collections.abc import Mapping


def average_bits(bits: Mapping[str, int], macs: Mapping[str, int]) -> float:
    """``sum_l MAC_l b_l / sum_l MAC_l`` over the layers of ``bits``.

    Raises:
        ValueError: no layer, or a layer without MACs.
    """
    if not bits:
        raise ValueError("the bit table is empty")
    missing = sorted(set(bits) - set(macs))
    if missing:
        raise ValueError(f"no MAC count for layers {', '.join(missing)}")
    total = sum(macs[name] for name in bits)
    return sum(macs[name] * width for name, width in bits.items()) / total
