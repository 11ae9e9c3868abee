"""The native update has the bits of the reference, whatever mix of rows it takes a step on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robuq_core.diffusion.samplers import Coefficients
from robuq_core.diffusion.update import RowStep, UpdatingBackend, guide, guided_channels, update
from robuq_core.kernels.cpu import CpuBackend, NativeUnavailableError

CHANNELS = 4
FACTORS = st.floats(-3, 3, width=32)


@pytest.fixture(scope="module")
def native() -> CpuBackend:
    try:
        return CpuBackend(threads=1)
    except NativeUnavailableError as missing:
        pytest.skip(str(missing))


def tensor(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(
    rows=st.lists(
        st.tuples(st.tuples(*[FACTORS] * 8), st.none() | st.floats(0, 20, width=32), st.booleans(), st.booleans()),
        min_size=1,
        max_size=5,
    ),
    side=st.sampled_from([1, 3, 8, 17]),
    clip=st.booleans(),
    guided=st.integers(1, CHANNELS),
    out_channels=st.sampled_from([CHANNELS, 2 * CHANNELS]),
)
def test_the_native_update_is_the_reference_to_the_bit(
    native: CpuBackend,
    rows: list[tuple[tuple[float, ...], float | None, bool, bool]],
    side: int,
    clip: bool,
    guided: int,
    out_channels: int,
) -> None:
    shape = (CHANNELS, side, side)
    steps = [
        RowStep(
            Coefficients(*factors),
            scale,
            multistep,
            tensor(20 + i, *shape) if noisy else None,
        )
        for i, (factors, scale, multistep, noisy) in enumerate(rows)
    ]
    x, previous = tensor(1, len(rows), *shape), tensor(3, len(rows), *shape)
    output = tensor(2, len(rows) + sum(step.scale is not None for step in steps), out_channels, side, side)
    assert isinstance(native, UpdatingBackend)
    expected = update(x, previous, output, steps, clip, guided)
    found = native.update(x, previous, output, steps, clip, guided)
    assert all(map(torch.equal, found, expected))
    for i in range(len(rows)):  # and a row alone has the bits that it has among others
        before = len(rows) + sum(step.scale is not None for step in steps[:i])
        own = output[[i, before]] if steps[i].scale is not None else output[[i]]
        alone = native.update(x[i : i + 1], previous[i : i + 1], own, steps[i : i + 1], clip, guided)
        assert all(torch.equal(one[0], many[i]) for one, many in zip(alone, found, strict=True))


@pytest.mark.parametrize("clip", [False, True])
def test_values_that_are_not_finite_stay_so(native: CpuBackend, clip: bool) -> None:
    output = torch.zeros(1, CHANNELS, 2, 2)
    output[0, 0, 0, 0] = float("nan")
    step = RowStep(Coefficients(*[1.0] * 8))
    for advance in (update, native.update):
        following, x0 = advance(*torch.zeros(2, 1, CHANNELS, 2, 2), output, [step], clip, CHANNELS)
        assert bool(following[0, 0, 0, 0].isnan())
        assert bool(x0[0, 0, 0, 0].isnan())


def test_an_output_of_another_size_is_refused(native: CpuBackend) -> None:
    guided = RowStep(Coefficients(*[1.0] * 8), scale=2.0)
    with pytest.raises(ValueError, match="output"):
        native.update(*torch.zeros(3, 1, CHANNELS, 2, 2), [guided], False, CHANNELS)


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
