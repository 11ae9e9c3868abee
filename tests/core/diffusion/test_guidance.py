import torch

from robuq_core.diffusion.guidance import guide, guided_channels


def test_official_guides_three_channels_and_diffusers_all() -> None:
    cond, uncond = torch.randn(2, 2, 8, 2, 2).unbind(0)
    scale = torch.tensor([1.5, 4.0])
    full = uncond + scale[:, None, None, None] * (cond - uncond)
    official = guide(cond, uncond, scale, guided_channels(4, "official"))
    torch.testing.assert_close(official[:, :3], full[:, :3])
    assert torch.equal(official[:, 3:], cond[:, 3:])
    diffusers = guide(cond, uncond, scale, guided_channels(4, "diffusers"))
    torch.testing.assert_close(diffusers[:, :4], full[:, :4])
    assert torch.equal(diffusers[:, 4:], cond[:, 4:])
