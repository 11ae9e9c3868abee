import copy
from pathlib import Path

import pytest
import torch
from tiny import TINY, tiny_model

from robuq_core.config import DiffusionConfig, QuantConfig
from robuq_core.models.dit import DiT
from robuq_core.models.quant_linear import QuantLinear, quantize_model
from train.allocate import allocate
from train.sensitivity import (
    FixedBatch,
    Sensitivity,
    SensitivityError,
    fixed_batch,
    measure_sensitivity,
    searched_layers,
)

BITS = (1, 2, 4)


def _pair() -> tuple[DiT, DiT]:
    torch.manual_seed(0)
    teacher = DiT(TINY)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.06)
    return quantize_model(copy.deepcopy(teacher), QuantConfig(activation_bits=3, rank=4)), teacher.eval()


def _batches(count: int = 2, size: int = 8) -> list[FixedBatch]:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(count, size, 3, 16, 16, generator=generator) * 2 - 1
    return [fixed_batch(each, torch.arange(size) % 10, 1, i, "epsilon") for i, each in enumerate(images)]


@pytest.fixture(scope="module")
def measured() -> Sensitivity:
    student, teacher = _pair()
    return measure_sensitivity(student, teacher, _batches(), DiffusionConfig(), bits=BITS, reference_bits=2)


def test_only_the_main_linears_are_measured_at_every_width(measured: Sensitivity) -> None:
    expected = {f"blocks.{i}.{kind}" for i in range(2) for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    for table in measured.rise.values():
        assert set(table) == expected
        assert all(set(row) == set(BITS) for row in table.values())
    assert measured.samples == 16


def test_more_bits_lose_less_and_the_reference_nothing(measured: Sensitivity) -> None:
    assert all(row[2] == 0 for table in measured.rise.values() for row in table.values())
    totals = {b: sum(row[b] for row in measured.rise["teacher_mse"].values()) for b in BITS}
    assert totals[1] > totals[2] > totals[4]


def test_an_entry_is_what_a_forward_with_that_one_width_gives(measured: Sensitivity) -> None:
    student, teacher = _pair()
    for layer in searched_layers(student).values():
        layer.bits = 2
    searched_layers(student)["blocks.1.mlp.fc2"].bits = 4
    with torch.inference_mode():
        errors = [
            (student.eval()(b.x_t, b.timesteps, b.classes) - teacher(b.x_t, b.timesteps, b.classes))[:, :3].square()
            for b in _batches()
        ]
    rise = float(torch.cat(errors).mean()) - measured.base["teacher_mse"]
    tolerance = 1e-5 * measured.base["teacher_mse"]  # a difference of means in float32
    assert measured.rise["teacher_mse"]["blocks.1.mlp.fc2"][4] == pytest.approx(rise, abs=tolerance)


def test_fixed_points_repeat_and_cover_the_process() -> None:
    first, again = _batches(1, 50)[0], _batches(1, 50)[0]
    assert torch.equal(first.x_t, again.x_t)
    assert bool((first.timesteps.diff() == 20).all())
    assert not torch.equal(first.noise, fixed_batch(first.x0, first.classes, 1, 1, "epsilon").noise)


def test_tables_are_kept_whole_and_feed_the_allocation(measured: Sensitivity, tmp_path: Path) -> None:
    path = tmp_path / "run" / "sensitivity.json"
    measured.save(path)
    assert Sensitivity.load(path) == measured
    macs = {name: 3 if name.endswith("qkv") else 1 for name in measured.rise["teacher_mse"]}
    found = allocate(measured.rise["teacher_mse"], macs, 2)
    assert found.average_bits <= 2
    path.write_text("{}")
    with pytest.raises(SensitivityError, match=r"sensitivity\.json: not a sensitivity table"):
        Sensitivity.load(path)
    with pytest.raises(SensitivityError, match="run the sensitivity stage first"):
        Sensitivity.load(tmp_path / "none.json")


def test_what_cannot_be_measured_is_refused() -> None:
    student, teacher = _pair()
    with pytest.raises(SensitivityError, match="not quantised"):
        measure_sensitivity(teacher, teacher, _batches(1), DiffusionConfig(), bits=(1,), reference_bits=2)
    with pytest.raises(SensitivityError, match="no sample"):
        measure_sensitivity(student, teacher, [], DiffusionConfig(), bits=(1,), reference_bits=2)
    broken = tiny_model()
    layer = broken.get_submodule("blocks.0.mlp.fc1")
    assert isinstance(layer, QuantLinear)
    torch.nn.init.constant_(layer.bias, float("nan"))
    with pytest.raises(SensitivityError, match="not finite"):
        measure_sensitivity(broken, teacher, _batches(1), DiffusionConfig(), bits=(1,), reference_bits=2)


def test_rises_are_the_means_of_their_batches(measured: Sensitivity) -> None:
    assert measured.batch_sizes == (8, 8)
    for metric, table in measured.rise.items():
        for name, row in table.items():
            for width, rise in row.items():
                assert rise == pytest.approx(sum(measured.by_batch[metric][name][width]) / 2, rel=1e-9, abs=1e-12)


def test_guidance_multiplies_what_differs_between_the_halves() -> None:
    student, teacher = _pair()
    plain, guided = (
        measure_sensitivity(
            student, teacher, _batches(1), DiffusionConfig(), bits=(1,), reference_bits=2, guidance_scale=scale
        )
        for scale in (1.0, 4.0)
    )
    assert guided.guidance_scale == 4
    assert guided.base["diffusion_loss"] == plain.base["diffusion_loss"]
    assert guided.base["teacher_mse"] > plain.base["teacher_mse"]
    assert guided.rise["teacher_mse"] != plain.rise["teacher_mse"]
