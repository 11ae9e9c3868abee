"""Both packed forms return every pattern, and refuse what is not theirs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robuq_core.quant.packing import (
    pack_base3,
    pack_planar,
    planar_from_base3,
    planar_width,
    unpack_planar,
)


def unpack_base3(packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    return unpack_planar(planar_from_base3(packed, shape), shape[1])


@st.composite
def ternary_matrices(draw: st.DrawFn) -> torch.Tensor:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 300))
    seed = draw(st.integers(0, 2**32 - 1))
    return torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


@settings(deadline=None, max_examples=60)
@given(ternary_matrices())
def test_both_forms_round_trip(codes: torch.Tensor) -> None:
    shape = (codes.shape[0], codes.shape[1])
    assert torch.equal(unpack_planar(pack_planar(codes), shape[1]), codes)
    assert torch.equal(planar_from_base3(pack_base3(codes), shape), pack_planar(codes))


def test_every_base3_byte_round_trips_and_bytes_are_the_stated_sum() -> None:
    packed = torch.arange(243, dtype=torch.uint8)
    codes = unpack_base3(packed, (243, 5))
    assert torch.equal(pack_base3(codes), packed)
    assert torch.equal(((codes.int() + 1) * 3 ** torch.arange(5)).sum(dim=1), packed.int())


def test_base3_is_flat_row_major_and_padded_with_code_zero() -> None:
    codes = torch.tensor([[-1, 1, 0], [1, -1, -1]], dtype=torch.int8)
    assert pack_base3(codes).tolist() == [0 + 2 * 3 + 1 * 9 + 2 * 27 + 0 * 81, 0 + 3 + 9 + 27 + 81]


def test_planar_byte_holds_four_planes_of_its_group() -> None:
    codes = torch.zeros(1, 130, dtype=torch.int8)
    codes[0, [5, 69]] = 1
    codes[0, [37, 129]] = -1
    packed = pack_planar(codes)
    assert packed.shape == (1, planar_width(130)) == (1, 64)
    assert packed[0, 5] == 0b01_10_00_10
    assert packed[0, 33] == 0b01_01_01_00
    assert packed[0, 34] == 0b01_01_01_01


@pytest.mark.parametrize("length", [0, 1, 3])
def test_base3_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=r"needs 2 uint8 bytes"):
        unpack_base3(torch.zeros(length, dtype=torch.uint8), (2, 3))


def test_a_byte_that_base3_never_writes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.\.242, found 243"):
        unpack_base3(torch.tensor([1, 243], dtype=torch.uint8), (2, 5))


def test_planar_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[N, 32\]"):
        unpack_planar(torch.zeros(2, 64, dtype=torch.uint8), 128)


@pytest.mark.parametrize("pack", [pack_base3, pack_planar])
def test_codes_that_are_not_ternary_are_refused(pack) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="-1, 0 or 1"):
        pack(torch.tensor([[0, 2]], dtype=torch.int8))
    with pytest.raises(ValueError, match="int8 matrix"):
        pack(torch.zeros(4, dtype=torch.int8))
