import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robuq_core.quant.hadamard import BASE_ORDERS, Rotation, decompose_order, hadamard_matrix, random_signs

ORDERS = sorted({base << k for base in BASE_ORDERS for k in range(8) if 1 <= base << k <= 1200} | {1152, 1280, 1536})


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_orthogonal_signs(order: int) -> None:
    h = hadamard_matrix(order)
    assert h.shape == (order, order)
    assert bool((h.abs() == 1).all())
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=h.dtype))


@pytest.mark.parametrize("order", [3, 6, 18, 24 + 1, 100, 0, -4])
def test_orders_without_a_construction_are_refused(order: int) -> None:
    with pytest.raises(ValueError, match="Hadamard"):
        decompose_order(order)


@pytest.mark.parametrize("width", [1, 2, 12, 20, 28, 36, 72, 256, 384, 1152, 1280, 4608])
def test_rotation_is_the_product_with_the_matrix(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    signs = random_signs(width, generator)
    x = torch.randn(3, width, generator=generator)
    expected = (x * signs).double() @ hadamard_matrix(width) / width**0.5
    torch.testing.assert_close(Rotation(width, signs)(x).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("width", "block"), [(384, 128), (1152, 128), (72, 36), (12, 4), (7, 1)])
def test_blocks_are_rotated_each_by_itself(width: int, block: int) -> None:
    generator = torch.Generator().manual_seed(width)
    signs = random_signs(width, generator)
    x = torch.randn(3, width, generator=generator)
    matrix = torch.kron(torch.eye(width // block, dtype=torch.float64), hadamard_matrix(block)) / block**0.5
    expected = (x * signs).double() @ matrix
    torch.testing.assert_close(Rotation(width, signs, block)(x).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", [0, -1, 5, 128])
def test_a_block_that_does_not_divide_the_width_is_refused(block: int) -> None:
    with pytest.raises(ValueError, match=f"divide the width 72, and {block} does not"):
        Rotation(72, block=block)


@given(width=st.sampled_from([12, 20, 28, 36, 40, 96, 128]), rows=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_rotating_both_sides_leaves_a_layer_unchanged(width: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rotation = Rotation(width, random_signs(width, generator))
    x, weight = torch.randn(rows, width, generator=generator), torch.randn(7, width, generator=generator)
    torch.testing.assert_close(rotation(x) @ rotation(weight).T, x @ weight.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rotation(x).norm(dim=1), x.norm(dim=1), atol=1e-4, rtol=1e-4)


def test_signs_are_balanced_and_seeded() -> None:
    first, second = (random_signs(4096, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert set(first.tolist()) == {-1.0, 1.0}
    assert abs(float(first.mean())) < 0.1


@pytest.mark.parametrize("width", [1152, 1536, 4608])
def test_autocast_does_not_reach_the_rotation(width: int) -> None:
    """bf16 has no 1/sqrt(n) of these widths: folded into the matrices it was a gain of up to 0.2%."""
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(width)).bfloat16()
    rotation = Rotation(width)
    with torch.autocast("cpu", torch.bfloat16):
        rotated = rotation(x)
    assert rotated.dtype == torch.float32
    assert torch.equal(rotated, rotation(x.float()))
