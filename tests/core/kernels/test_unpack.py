"""The native way from base 3 to planar against the one in torch, which is the law."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robuq_core.kernels import unpack
from robuq_core.kernels.cpu import NativeUnavailableError, load_library
from robuq_core.quant import packing


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 7), columns=st.integers(1, 400), seed=st.integers(0, 2**32 - 1))
def test_native_is_the_law(rows: int, columns: int, seed: int) -> None:
    load_library()  # built where the tests run: else the law would be compared with itself
    codes = torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = packing.pack_base3(codes)
    planar = unpack.planar_from_base3(packed, (rows, columns))
    assert torch.equal(planar, packing.planar_from_base3(packed, (rows, columns)))
    assert torch.equal(packing.unpack_planar(planar, columns), codes)


def test_a_part_of_a_mapping_will_do() -> None:
    packed = torch.arange(200, dtype=torch.uint8)
    for part in (packed[3:30], packed[199:]):
        shape = (1, 5 * len(part))
        assert torch.equal(unpack.planar_from_base3(part, shape), packing.planar_from_base3(part, shape))


@pytest.mark.parametrize("packed", [torch.zeros(2, dtype=torch.uint8), torch.full((1,), 243, dtype=torch.uint8),
                                    torch.zeros(1, dtype=torch.int8)])  # fmt: skip
def test_what_is_not_base_3_is_refused(packed: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="ternary"):
        unpack.planar_from_base3(packed, (1, 5))


def test_without_the_library_it_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise NativeUnavailableError("not built")

    monkeypatch.setattr(unpack, "load_library", absent)
    codes = torch.tensor([[1, 0, -1, 1, 1, 0, -1]], dtype=torch.int8)
    packed = packing.pack_base3(codes)
    assert torch.equal(unpack.planar_from_base3(packed, (1, 7)), packing.pack_planar(codes))
