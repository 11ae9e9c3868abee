import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robuq_core.quant.activation import (
    ActivationRule,
    Grid,
    fake_quantize_activation,
    is_midrise,
    lloyd_max_levels,
    quantize_activation,
)

BITS = st.integers(1, 8)
GRIDS = st.sampled_from(["midrise", "midtread"])

# Mean squared error of the mid-rise quantiser on N(0, 1), from the literature.
PUBLISHED_MSE = {1: 0.36338, 2: 0.11885, 3: 0.03744, 4: 0.01154, 5: 0.00350, 6: 0.00104}

LLOYD_MAX_MSE = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}
RULES = st.sampled_from(["gaussian", "lloyd_max", "minmax"])


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


@pytest.mark.parametrize("bits", range(1, 9))
def test_lloyd_max_levels_are_the_means_of_their_cells(bits: int) -> None:
    levels = np.array(lloyd_max_levels(bits))
    assert len(levels) == 2**bits
    assert bool((np.diff(levels) > 0).all())
    x = np.linspace(-8, 8, 400_001)
    weight = np.exp(-np.square(x) / 2)
    cell = np.digitize(x, (levels[1:] + levels[:-1]) / 2)
    means = np.bincount(cell, x * weight) / np.bincount(cell, weight)
    np.testing.assert_allclose(levels, means, atol=2e-3)


@pytest.mark.parametrize("bits", sorted(LLOYD_MAX_MSE))
def test_lloyd_max_error_on_normal_tokens_is_the_published_one(bits: int) -> None:
    x = torch.randn(64, 16384, generator=torch.Generator().manual_seed(bits))
    error = (fake_quantize_activation(x, bits, rule="lloyd_max") - x).square().mean()
    assert float(error) == pytest.approx(LLOYD_MAX_MSE[bits], rel=0.02)


@given(bits=BITS, rule=RULES, seed=st.integers(0, 2**16), spread=st.floats(1e-6, 1e6))
def test_every_rule_scales_with_its_token_and_has_few_levels(
    bits: int, rule: ActivationRule, seed: int, spread: float
) -> None:
    x = torch.randn(2, 40, generator=torch.Generator().manual_seed(seed))
    y = fake_quantize_activation(x, bits, rule=rule)
    assert all(len(token.unique()) <= 2**bits for token in y)
    # A step that falls on a border may move by rounding; a factor of two moves none.
    torch.testing.assert_close(fake_quantize_activation(x * 2, bits, rule=rule), y * 2, rtol=1e-6, atol=0)
    assert bool(fake_quantize_activation(x * spread, bits, rule=rule).isfinite().all())


@given(bits=BITS, seed=st.integers(0, 2**16))
def test_minmax_keeps_the_extremes_and_errs_by_half_a_step(bits: int, seed: int) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)) + 5
    y = fake_quantize_activation(x, bits, rule="minmax")
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    assert bool(((y - x).abs() <= 0.5001 * (high - low) / (2**bits - 1) + 1e-5).all())
    torch.testing.assert_close(torch.stack(torch.aminmax(y, dim=1, keepdim=True)), torch.stack([low, high]))


@given(bits=BITS, rule=RULES)
def test_every_rule_keeps_zero_tokens_and_passes_gradients(bits: int, rule: ActivationRule) -> None:
    assert not fake_quantize_activation(torch.zeros(2, 8), bits, rule=rule).any()
    x = torch.randn(3, 8, requires_grad=True)
    upstream = torch.arange(24.0).reshape(3, 8)
    fake_quantize_activation(x, bits, rule=rule).backward(upstream)
    assert x.grad is not None
    assert torch.equal(x.grad, upstream)
