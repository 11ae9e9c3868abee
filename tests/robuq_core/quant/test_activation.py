import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robuq_core.quant.activation import (
    GAUSSIAN_STEP,
    Grid,
    fake_quantize_activation,
    is_midrise,
    quantize_activation,
)

BITS = st.integers(1, 8)
GRIDS = st.sampled_from(["midrise", "midtread"])

# Mean squared error of the mid-rise quantiser on N(0, 1), from the literature.
PUBLISHED_MSE = {1: 0.36338, 2: 0.11885, 3: 0.03744, 4: 0.01154, 5: 0.00350, 6: 0.00104}


@given(bits=BITS, grid=GRIDS, seed=st.integers(0, 2**16), spread=st.floats(1e-6, 1e6))
def test_codes_are_in_range_and_near(bits: int, grid: Grid, seed: int, spread: float) -> None:
    x = torch.randn(4, 37, generator=torch.Generator().manual_seed(seed)) * spread
    codes, scales = quantize_activation(x, bits, grid)
    q = codes.int()
    if is_midrise(bits, grid):
        assert bool((q % 2 != 0).all())
        assert int(q.abs().max()) <= 2**bits - 1
        step = 2 * scales
        top = (2**bits - 1) * scales
    else:
        assert -(2 ** (bits - 1)) <= int(q.min()) <= int(q.max()) <= 2 ** (bits - 1) - 1
        step, top = scales, (2 ** (bits - 1) - 1) * scales
    inside = x.abs() <= top
    error = (q * scales - x).abs()
    assert bool((error[inside] <= (0.5001 * step).expand_as(x)[inside]).all())


@pytest.mark.parametrize("bits", sorted(PUBLISHED_MSE))
def test_error_on_normal_tokens_is_the_published_one(bits: int) -> None:
    x = torch.randn(64, 16384, generator=torch.Generator().manual_seed(bits))
    codes, scales = quantize_activation(x, bits, "midrise")
    assert float((codes * scales - x).square().mean()) == pytest.approx(PUBLISHED_MSE[bits], rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_other_step_serves_normal_tokens_better(bits: int) -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(7))

    def error(step: float) -> float:
        top = 2**bits - 1
        return float(((torch.floor(x / step) * 2 + 1).clamp(-top, top) * step / 2 - x).square().mean())

    best = error(GAUSSIAN_STEP[bits])
    assert best <= error(GAUSSIAN_STEP[bits] * 1.05)
    assert best <= error(GAUSSIAN_STEP[bits] * 0.95)


def test_a_row_does_not_depend_on_the_others() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    whole, _ = quantize_activation(x, 2)
    alone = torch.cat([quantize_activation(row[None], 2)[0] for row in x])
    assert torch.equal(whole, alone)


@given(bits=BITS, grid=GRIDS)
def test_zero_tokens_stay_zero(bits: int, grid: Grid) -> None:
    codes, scales = quantize_activation(torch.zeros(2, 8), bits, grid)
    assert not (codes * scales).any()


@given(bits=BITS, grid=GRIDS, seed=st.integers(0, 2**16))
def test_fake_quantised_values_are_the_codes_and_gradients_pass(bits: int, grid: Grid, seed: int) -> None:
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    y = fake_quantize_activation(x, bits, grid)
    codes, scales = quantize_activation(x.detach(), bits, grid)
    assert torch.equal(y.detach(), codes * scales)
    upstream = torch.arange(72.0).reshape(3, 24)
    y.backward(upstream)
    assert x.grad is not None
    assert torch.equal(x.grad, upstream)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.8"):
        quantize_activation(torch.ones(1, 4), bits)
