import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robuq_core.quant.ternary import ternarize, ternary_fake_quantize


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
            assert float(alpha[c]) == pytest.approx(np.abs(row[kept]).mean(), rel=2**-11)


def test_gaussian_weights_match_the_published_statistics() -> None:
    weight = torch.randn(64, 8192, generator=torch.Generator().manual_seed(0))
    codes, alpha = ternarize(weight)
    assert float((codes == 0).float().mean()) == pytest.approx(0.310, abs=0.003)
    assert float(alpha.mean()) == pytest.approx(1.068, abs=0.005)
    assert float((weight - codes * alpha[:, None]).square().mean()) == pytest.approx(0.213, abs=0.003)
    _, absmean = ternarize(weight, "absmean")
    assert float((weight - codes * absmean[:, None]).square().mean()) == pytest.approx(0.263, abs=0.004)


def test_scales_are_storable_in_fp16() -> None:
    _, alpha = ternarize(torch.randn(9, 33, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(alpha.half().float(), alpha)


def test_zero_rows_are_zero() -> None:
    codes, alpha = ternarize(torch.zeros(3, 8))
    assert not codes.any()
    assert not alpha.any()


def test_unknown_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="weight_scale"):
        ternarize(torch.ones(1, 2), "median")  # type: ignore[arg-type]


def test_gradient_passes_straight_through_clamped() -> None:
    weight = torch.randn(2, 3, requires_grad=True)
    upstream = torch.tensor([[0.5, -3.0, 1.0], [2.0, -0.25, 0.0]])
    ternary_fake_quantize(weight).backward(upstream)
    assert weight.grad is not None
    assert torch.equal(weight.grad, upstream.clamp(-1, 1))
