import pytest
import torch

from robuq_core.config import ModelConfig
from robuq_core.models.dit import DiT, patchify, sincos_positions, unpatchify
from robuq_core.models.presets import PRESETS, preset

SMALL = ModelConfig(input_size=8, patch_size=4, in_channels=3, hidden_size=24, depth=2, num_heads=2, num_classes=5)


def test_xl_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = DiT(preset("DiT-XL/2"))
    assert sum(p.numel() for p in model.parameters()) + model.pos_embed.numel() == 675_129_632


def test_a_new_model_outputs_zero_and_blocks_are_the_identity() -> None:
    model = DiT(SMALL)
    x = torch.randn(2, 3, 8, 8)
    assert not model(x, torch.tensor([0, 999]), torch.tensor([0, 5])).any()
    tokens, c = torch.randn(2, 4, 24), torch.randn(2, 24)
    assert torch.equal(model.blocks[0](tokens, c), tokens)


@pytest.mark.parametrize("patch", [2, 4])
def test_patches_are_a_strided_convolution_and_back(patch: int) -> None:
    images = torch.randn(2, 3, 8, 8)
    weight = torch.randn(5, 3, patch, patch)
    by_conv = torch.nn.functional.conv2d(images, weight, stride=patch).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patchify(images, patch) @ weight.flatten(1).T, by_conv, atol=1e-4, rtol=1e-4)
    channel_last = patchify(images, patch).reshape(2, -1, 3, patch, patch).permute(0, 1, 3, 4, 2).flatten(2)
    assert torch.equal(unpatchify(channel_last, patch, 3), images)


def test_positions_code_x_in_the_first_half() -> None:
    grid = sincos_positions(16, 3).reshape(3, 3, 16)
    assert torch.equal(grid[0, :, :8], grid[2, :, :8])
    assert torch.equal(grid[:, 0, 8:], grid[:, 2, 8:])
    assert not torch.equal(grid[0, 0], grid[0, 1])


def test_presets_are_named_and_unknown_ones_listed() -> None:
    assert preset("DiT-B/4").hidden_size == 768
    assert set(PRESETS) >= {f"DiT-{size}/{patch}" for size in ("XL", "L", "B", "S") for patch in (2, 4, 8)}
    with pytest.raises(ValueError, match="DiT-XL/2"):
        preset("DiT-G/2")
