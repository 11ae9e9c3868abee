import pytest
import torch

from robuq_core.quant.lowrank import lowrank_split, round_to_storage, truncated_svd


@pytest.mark.parametrize("rank", [0, 1, 4, 11])
def test_parts_add_up_and_the_product_is_the_best(rank: int) -> None:
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(rank))
    a, b, residual = lowrank_split(weight, rank)
    assert a.shape == (20, rank)
    assert b.shape == (rank, 12)
    torch.testing.assert_close(a @ b + residual, weight, atol=1e-5, rtol=1e-5)
    rest = torch.linalg.svdvals(weight)[rank:].square().sum().sqrt()
    torch.testing.assert_close(residual.norm(), rest, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(a.norm(dim=0), b.norm(dim=1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rank", [-1, 12, 99])
def test_ranks_that_leave_no_residual_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="rank must be"):
        lowrank_split(torch.randn(20, 12), rank)


def test_storage_rounding_is_bf16_with_identity_gradient() -> None:
    factor = torch.randn(5, 3, requires_grad=True)
    rounded = round_to_storage(factor)
    assert torch.equal(rounded.detach(), factor.detach().bfloat16().float())
    rounded.sum().backward()
    assert torch.equal(factor.grad, torch.ones(5, 3))


def test_zero_init_leaves_the_weight_whole_and_can_learn() -> None:
    weight = torch.randn(20, 12)
    a, b, residual = lowrank_split(weight, 4, "zero", torch.Generator().manual_seed(1))
    assert (a.shape, b.shape) == ((20, 4), (4, 12))
    assert torch.equal(residual, weight)
    assert not a.any()
    # The gradient of A is made of B x: it must not be zero too.
    assert bool(b.any(dim=1).all())
    assert torch.equal(b, lowrank_split(weight, 4, "zero", torch.Generator().manual_seed(1))[1])


@pytest.mark.parametrize("shape", [(576, 640), (640, 576)])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_large_matrices_lose_hardly_more_than_the_best_approximation(shape: tuple[int, int], decay: float) -> None:
    generator = torch.Generator().manual_seed(1)
    u, s, vh = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    spectrum = s * torch.arange(1, len(s) + 1) ** -decay
    matrix = u * spectrum @ vh
    left, values, right = truncated_svd(matrix, 16)
    assert bool((values.diff() <= 0).all())
    best = spectrum[16:].square().sum()
    lost = (matrix - left * values @ right).square().sum()
    assert float(best) <= float(lost) * (1 + 1e-9)
    assert float(lost) < 1.003 * float(best)
    eye = torch.eye(16, dtype=torch.float64)
    torch.testing.assert_close(left.T @ left, eye)
    torch.testing.assert_close(right @ right.T, eye)
    again = truncated_svd(matrix, 16)
    assert all(torch.equal(one, other) for one, other in zip((left, values, right), again, strict=True))
