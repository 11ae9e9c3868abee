import torch
import torch.nn.functional as F

from robuq_core.quant.attention import quantize_signed, quantized_attention


def _heads(seed: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(3, 2, 4, 16, 24, generator=torch.Generator().manual_seed(seed)).unbind(0))


def test_eight_bits_stay_close_to_full_precision() -> None:
    q, k, v = _heads(0)
    exact = F.scaled_dot_product_attention(q, k, v)
    assert float((quantized_attention(q, k, v) - exact).norm() / exact.norm()) < 0.02


def test_codes_are_symmetric_eight_bit_integers() -> None:
    codes, scale = quantize_signed(_heads(1)[0], (-1,))
    assert torch.equal(codes, codes.round())
    assert float(codes.abs().amax(dim=-1).min()) == 127.0
    assert scale.shape == (2, 4, 16, 1)


def test_an_image_does_not_depend_on_the_others() -> None:
    q, k, v = _heads(2)
    both = quantized_attention(q, k, v)
    # A probability next to the edge of its cell may move, by one 255th: few do.
    apart = (both[:1] - quantized_attention(q[:1], k[:1], v[:1])).abs()
    assert float((apart > 1e-6 * float(v.abs().max())).float().mean()) < 0.02
    assert float(apart.max()) <= 2 * float(v.abs().max()) / 255


def test_gradients_reach_all_three() -> None:
    q, k, v = (x.requires_grad_() for x in _heads(3))
    quantized_attention(q, k, v).square().sum().backward()
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) and bool(x.grad.any()) for x in (q, k, v))
