"""The command: every kind of model, one file of results, and what ends in one clear line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from stand_in import PixelNetwork
from synthetic_run import CLASSES, make_config, train, write_config, write_idx
from tiny import write_tiny
from typer.testing import CliRunner

from robuq_core.checkpoint import read_header
from robuq_core.pipeline import Sampler
from train.cli import app
from train.config import TrainConfig, load_config
from train.evaluation import run as module
from train.evaluation.samples import generate, load_sampler
from train.run import Run
from train.stages import export

SETS = {
    "evaluation": {"samples": 6, "seeds": [0, 1, 2], "batch_size": 4},
    "qat": {"ema_decay": 0.1, "more_ema_decays": [0.5]},
}


def measure(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["evaluate", "-c", str(path), *arguments])


def entry_of(path: Path, *arguments: str) -> dict[str, Any]:
    result = measure(path, *arguments)
    assert result.exit_code == 0, result.output
    entry: dict[str, Any] = json.loads(result.stdout[result.stdout.index("{") :])
    return entry


@pytest.fixture
def pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EfficientNetLite0", PixelNetwork)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainConfig]:
    """A run with a teacher, a student and a packed file."""
    root = tmp_path_factory.mktemp("trained")
    config = make_config(root, SETS)
    train(config)
    train(config, "qat")
    export(Run(config), config.run_dir / "model.safetensors")
    return root / "run.yaml", config


@pytest.mark.usefixtures("pixels")
def test_a_further_average_is_measured_and_packed_under_its_name(
    trained: tuple[Path, TrainConfig], tmp_path: Path
) -> None:
    path, config = trained
    entry = entry_of(path, "--model", "student", "--ema", "0.5")
    assert entry["model"] == "student-ema-0.5"
    assert (config.run_dir / "evaluation" / "samples" / "student-ema-0.5").is_dir()
    packed = {}
    for arguments in ((), ("--ema", "0.5")):
        out = tmp_path / f"{len(arguments)}.safetensors"
        done = CliRunner().invoke(app, ["export", "-c", str(path), "--out", str(out), *arguments])
        assert done.exit_code == 0, done.output
        packed[arguments] = Sampler.from_checkpoint(out).generate([0], 1)[0].tobytes()
    assert len(set(packed.values())) == 2
    for command, said in ((["export"], "--ema needs --out"), (["evaluate", "--model", "packed"], "holds one average")):
        refused = CliRunner().invoke(app, [*command, "-c", str(path), "--ema", "0.5"])
        assert refused.exit_code == 2
        assert said in " ".join(refused.stderr.split())


@pytest.mark.usefixtures("pixels")
def test_teacher_student_and_packed_file_go_through_one_interface(trained: tuple[Path, TrainConfig]) -> None:
    path, config = trained
    entries: dict[str, Any] = {}
    for model in ("teacher", "student", "packed"):
        entries[model] = entry_of(path, "--model", model)
    kept = json.loads((config.run_dir / "evaluation.json").read_text())
    assert {name: kept["models"][name] for name in entries} == entries
    assert len({entry["sha256"] for entry in entries.values()}) == 3
    for entry in entries.values():
        figures = entry["figures"]
        assert set(figures) == {"fd_effnet", "nearest"}
        low, high = figures["fd_effnet"]["interval"]
        assert 0 <= low < figures["fd_effnet"]["mean"] < high
        assert len(set(figures["fd_effnet"]["by_seed"])) == 3
        assert entry["agreement"]["samples"] == CLASSES
        assert entry["agreement"]["top1"] is None  # these are not ImageNet's classes
        assert 0 <= entry["agreement"]["pixel_nearest"] <= 1
        assert 5 < entry["agreement"]["psnr"] < 40
        assert any("not FID" in caution for caution in entry["cautions"])
        assert any("singular" in caution for caution in entry["cautions"])
    ratios = kept["ratio_to_teacher"]
    assert {"student", "packed"} <= set(ratios) <= {"student", "packed", "student-ema-0.5"}
    by_seed = np.array(entries["packed"]["figures"]["fd_effnet"]["by_seed"])
    base = np.array(entries["teacher"]["figures"]["fd_effnet"]["by_seed"])
    assert ratios["packed"]["fd_effnet"]["by_seed"] == pytest.approx((by_seed / base).tolist())
    # The packed file is the student: fp16 embedders and rounding apart, the same samples.
    assert ratios["packed"]["fd_effnet"]["mean"] == pytest.approx(ratios["student"]["fd_effnet"]["mean"], rel=0.05)


@pytest.mark.usefixtures("pixels")
def test_no_ratio_to_a_teacher_that_was_measured_otherwise(trained: tuple[Path, TrainConfig]) -> None:
    path, config = trained
    assert measure(path, "--model", "teacher").exit_code == 0
    assert measure(path, "--model", "packed", "--set", "evaluation.samples=5").exit_code == 0
    assert "packed" not in json.loads((config.run_dir / "evaluation.json").read_text())["ratio_to_teacher"]


@pytest.mark.usefixtures("pixels")
def test_a_protocol_sets_what_published_figures_use(trained: tuple[Path, TrainConfig]) -> None:
    """``--set`` still overrides it."""
    path, _ = trained
    arguments = ["--protocol", "ddpm-cfg-1.5", "--set", "sampler.steps=2", "--set", "evaluation.samples=5"]
    entry = entry_of(path, "--model", "teacher", *arguments)
    assert entry["sampler"] == {"sampler": "ddpm", "steps": 2, "guidance_scale": 1.5}
    assert (entry["samples"], entry["seeds"]) == (5, [0])


@pytest.mark.usefixtures("pixels")
def test_the_last_model_of_the_run_is_the_default(trained: tuple[Path, TrainConfig], tmp_path: Path) -> None:
    path, config = trained
    sheet, folder = tmp_path / "sheets" / "packed.png", tmp_path / "npz"
    result = measure(path, "--sheet", str(sheet), "--npz", str(folder), "--seed", "1")
    assert result.exit_code == 0, result.output
    assert '"model": "packed"' in result.stdout
    assert Image.open(sheet).size == (8 * (96 + 2) + 2, 96 + 4)
    assert sorted(file.name for file in folder.iterdir()) == [f"packed-seed{seed}.npz" for seed in range(3)]
    with np.load(folder / "packed-seed2.npz") as archive:
        assert archive["arr_0"].shape == (6, config.model.input_size, config.model.input_size, 3)
        assert np.bincount(archive["arr_1"], minlength=CLASSES).max() == 2


@pytest.mark.usefixtures("pixels")
def test_agreement_alone_draws_no_sets(trained: tuple[Path, TrainConfig], tmp_path: Path) -> None:
    path, config = trained
    packed = config.run_dir / "model.safetensors"
    arguments = ["--checkpoint", str(packed), "--classes", "2", "--agreement-only", "--set", f"run_dir={tmp_path}"]
    entry = entry_of(path, *arguments)
    assert entry["model"] == "model"
    assert entry["agreement"]["samples"] == 2
    assert "figures" not in entry
    assert not (tmp_path / "evaluation" / "samples").exists()


@pytest.mark.usefixtures("pixels")
def test_a_grey_model_is_compared_with_images_that_it_was_not_trained_on(tmp_path: Path) -> None:
    random, labels = np.random.default_rng(0), np.arange(4 * CLASSES) % CLASSES
    for prefix, level in (("train", 0), ("t10k", 200)):
        images = random.integers(level, level + 56, (len(labels), 8, 8), dtype=np.uint8)
        write_idx(tmp_path / "grey", prefix, images, labels)
    data = {"path": str(tmp_path / "grey")}
    path = write_config(tmp_path, {**SETS, "model": {"in_channels": 1}, "data": data})
    config = load_config(path, [])
    train(config)
    train(config, "qat")
    export(Run(config), config.run_dir / "model.safetensors")
    assert read_header(config.run_dir / "model.safetensors").decoder == "pixels"
    found = {}
    for split in ("train", "test"):
        found[split] = entry_of(path, "--model", "packed", "--set", f"evaluation.split={split}")
    # What hardly was trained is grey, and so nearer to the dark images than to the bright ones.
    assert found["train"]["agreement"]["psnr"] > found["test"]["agreement"]["psnr"] + 3
    assert found["train"]["figures"]["fd_effnet"]["mean"] < found["test"]["figures"]["fd_effnet"]["mean"]
    assert "training_images" not in found["train"]
    assert found["test"]["training_images"]["photos"] == SETS["evaluation"]["samples"]
    # Dark images are farther from bright ones than what is grey.
    real, drawn = found["test"]["training_images"]["fd_effnet"], found["test"]["figures"]["fd_effnet"]["mean"]
    assert real > drawn > 0
    # Both stay prepared, and training does not take one for the other.
    assert {folder.name for folder in config.run_dir.glob("data*")} >= {"data", "data-test"}
    assert float(Run(config).photos().images[:].float().mean()) < 60


def test_samples_of_the_teacher_depend_on_their_seed_alone(trained: tuple[Path, TrainConfig]) -> None:
    sampler, _ = load_sampler(Run(trained[1]), "teacher")
    samples = generate(sampler, [0, 1, 2, 3], seed=4)
    assert samples.shape == (4, 3, 8, 8)
    assert samples.min() >= -1
    assert samples.max() <= 1
    # Not bit for bit: the plain network's matrix products round by the size of the batch.
    assert float((generate(sampler, [2], seed=6)[0] - samples[2]).abs().max()) <= 2 / 127.5
    assert float((generate(sampler, [2], seed=7)[0] - samples[2]).abs().max()) > 2 / 127.5


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.safetensors")
    result = measure(write_config(tmp_path), "--checkpoint", str(tmp_path / "tiny.safetensors"))
    assert result.exit_code == 2
    assert "16 px and 10 classes" in " ".join(result.stderr.split())
    assert not (tmp_path / "run" / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "pupil"], "choose one of teacher, student, packed"),
        (["--model", "packed"], "no such file"),
        (["--model", "teacher"], "states/teacher does not exist"),
        (["--inception", "absent.pth"], "--inception"),
        (["--protocol", "slow"], "ddpm-cfg-1.5, ddpm-cfg-4.0, quick"),
    ],
)
def test_what_is_missing_is_said_in_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    result = measure(write_config(tmp_path), *arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert len(result.stderr.splitlines()) <= 4
