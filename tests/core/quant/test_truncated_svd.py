import pytest
import torch

from robuq_core.quant.lowrank import truncated_svd


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


@pytest.mark.parametrize("rank", [1, 7, 20])
def test_small_matrices_are_exact(rank: int) -> None:
    matrix = torch.randn(20, 33, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    u, s, vh = truncated_svd(matrix, rank)
    assert (u.shape, s.shape, vh.shape) == ((20, rank), (rank,), (rank, 33))
    expected = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(s, expected[:rank])
    torch.testing.assert_close((matrix - u * s @ vh).square().sum(), expected[rank:].square().sum(), atol=1e-9, rtol=0)
