import pytest

from robuq_core.quant.bits import average_bits


def test_average_is_weighted_by_macs() -> None:
    # The paper's A2 allocation, in quarters of a block: 671 of 672.
    macs = {"qkv": 3, "proj": 1, "fc1": 4, "fc2": 4}
    assert average_bits({"qkv": 3, "proj": 1, "fc1": 2, "fc2": 1}, macs) == pytest.approx((9 + 1 + 8 + 4) / 12)


def test_empty_and_unknown_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        average_bits({}, {})
    with pytest.raises(ValueError, match="no MAC count for layers b"):
        average_bits({"a": 1, "b": 2}, {"a": 1})
