import pytest
import torch

from robuq_core.quant.lowrank import lowrank_split, round_to_storage


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
