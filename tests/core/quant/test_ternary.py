import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robuq_core.quant.ternary import ternarize, ternary_fake_quantize, ternary_planes


@given(rows=st.integers(1, 6), columns=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_rule_of_equation_3(rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    codes, alpha = ternarize(weight)
    for c, row in enumerate(weight.double().numpy()):
        tau = 0.5 * np.abs(row).mean()
        kept = np.abs(row) >= tau
        # Values within rounding of the threshold may go either way.
        clear = np.abs(np.abs(row) - tau) > 1e-6
        assert np.array_equal(codes[c].numpy()[clear], (np.sign(row) * kept)[clear])
        if clear.all():
            assert float(alpha[c]) == pytest.approx(np.abs(row[kept]).mean(), rel=2**-11, abs=2**-25)


def test_gaussian_weights_match_the_published_statistics() -> None:
    weight = torch.randn(64, 8192, generator=torch.Generator().manual_seed(0))
    codes, alpha = ternarize(weight)
    assert float((codes == 0).float().mean()) == pytest.approx(0.310, abs=0.003)
    assert float(alpha.mean()) == pytest.approx(1.068, abs=0.005)
    assert float((weight - codes * alpha[:, None]).square().mean()) == pytest.approx(0.213, abs=0.003)
    _, absmean = ternarize(weight, "absmean")
    assert float((weight - codes * absmean[:, None]).square().mean()) == pytest.approx(0.263, abs=0.004)


def test_unknown_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="weight_scale"):
        ternarize(torch.ones(1, 2), "median")  # type: ignore[arg-type]


def test_gradient_passes_straight_through_clamped() -> None:
    weight = torch.randn(2, 3, requires_grad=True)
    upstream = torch.tensor([[0.5, -3.0, 1.0], [2.0, -0.25, 0.0]])
    ternary_fake_quantize(weight).backward(upstream)
    assert weight.grad is not None
    assert torch.equal(weight.grad, upstream.clamp(-1, 1))


@given(rows=st.integers(1, 5), columns=st.integers(1, 40), planes=st.sampled_from([2, 3]), seed=st.integers(0, 2**16))
def test_planes_are_a_uniform_grid_in_balanced_ternary(rows: int, columns: int, planes: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    codes, alpha = ternary_planes(weight, planes)
    assert codes.dtype is torch.int8
    assert codes.shape == (planes, rows, columns)
    assert set(codes.unique().tolist()) <= {-1, 0, 1}
    assert torch.equal(alpha.half().float(), alpha)
    powers = 3.0 ** torch.arange(planes - 1, -1, -1)
    torch.testing.assert_close(alpha, powers[:, None] * alpha[-1], rtol=2e-3, atol=3**planes * 2**-25)
    # Each weight has its nearest level, but for what fp16 takes off the scales.
    step, levels = alpha[-1].double(), (codes.double() * powers[:, None, None]).sum(0)
    distance = (weight / step[:, None] - levels).abs()
    assert bool(((distance <= 0.5 + 0.01) | (levels.abs() == (3**planes - 1) // 2)).all())


@pytest.mark.parametrize(("planes", "mse"), [(1, 0.2127), (2, 0.0308), (3, 0.0047)])
def test_error_of_planes_on_normal_weights(planes: int, mse: float) -> None:
    weight = torch.randn(64, 8192, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 0.02):
        quantized = ternary_fake_quantize(weight * scale, planes=planes) / scale
        assert float((weight - quantized).square().mean()) == pytest.approx(mse, rel=0.02)


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_zero_rows_are_zero(planes: int) -> None:
    assert not any(part.any() for part in ternary_planes(torch.zeros(3, 8), planes))


def test_other_numbers_of_planes_are_refused() -> None:
    for planes in (0, 4):
        with pytest.raises(ValueError, match=r"weight_planes must be 1\.\.3"):
            ternary_planes(torch.ones(1, 2), planes)
