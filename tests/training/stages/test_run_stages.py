"""One command does what the stages do, once; nothing stale is used in silence, and no mistake costs what is done."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from synthetic_run import (
    CLASSES,
    REPOSITORY,
    make_config,
    merged,
    signalled,
    state_of,
    tensors_of,
    train,
    train_signalled,
    write_config,
)
from torch import Tensor
from typer.testing import CliRunner

from robuq_core.checkpoint import read_header
from train import trainer
from train.cli import app
from train.config import ConfigError, TrainConfig, load_config
from train.evaluation import run as evaluation
from train.evaluation.networks import Features
from train.run import Run
from train.sensitivity import Sensitivity, searched_layers
from train.stages import STAGES
from train.state import StateError
from train.trainer import TrainingError

SEARCH = {"allocate": {"average_bits": 2}}
NAMES = [stage.name for stage in STAGES]


class Pixels:
    """Stands in for the feature network: it shrinks images to two by two pixels."""

    name, identity = "effnet", "pixels"

    def __call__(self, images: Tensor) -> Features:
        flat = F.adaptive_avg_pool2d(images, 2).flatten(1)
        return Features(flat, flat)


@pytest.fixture(scope="module", autouse=True)
def pixels_are_features() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "EfficientNetLite0", Pixels)
        yield


def notes_of(config: TrainConfig, redo: tuple[str, ...] = ()) -> dict[str, str]:
    """What a run says of each stage, the last word."""
    notes: list[str] = []
    Run(config, notes.append).until(redo=redo)
    return {name: text for name, _, text in (note.partition(": ") for note in notes)}


def digests(config: TrainConfig) -> dict[str, str]:
    run = Run(config)
    return {name: run.digest(name) for name in NAMES if run.path(name).exists()}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run through all stages, with the search for bits."""
    config = make_config(tmp_path_factory.mktemp("done"), SEARCH)
    notes_of(config)
    return config


@pytest.fixture
def copied(done: TrainConfig, tmp_path: Path) -> Path:
    """A folder with that run in it, to be spoiled."""
    subprocess.run(["cp", "-a", str(done.run_dir), str(done.data.path), str(tmp_path)], check=True)
    return tmp_path


def test_every_stage_leaves_its_file(done: TrainConfig) -> None:
    assert set(digests(done)) == set(NAMES)
    assert all(state_of(done, stage).finished for stage in ("teacher", "warmup", "qat"))
    table = json.loads((done.run_dir / "bits.json").read_text())
    assert table["average_bits"] <= 2
    assert set(table["compared"]) == {"greedy", "uniform"}
    assert (done.run_dir / "bits.png").stat().st_size > 0
    assert set(json.loads((done.run_dir / "evaluation.json").read_text())["models"]) == {"teacher", "packed"}


def test_the_found_bits_reach_the_packed_file(done: TrainConfig) -> None:
    quant = Run(done).quant
    table = json.loads((done.run_dir / "bits.json").read_text())
    assert quant.bits == table["bits"]
    assert len(quant.bits) == 4 * done.model.depth
    header = read_header(done.run_dir / "model.safetensors")
    assert header.quant == quant
    assert header.provenance["qat"]["history"][0]["config"]["quant"]["bits"] == quant.bits
    student = Run(done).student()
    assert {name: student.get_submodule(name).bits for name in quant.bits} == quant.bits


def test_the_configuration_is_kept_and_loads_again(done: TrainConfig) -> None:
    assert load_config(done.run_dir / "config.yaml", []) == done


def test_a_finished_run_is_left_alone(copied: Path) -> None:
    config = make_config(copied, SEARCH)
    notes_of(config)  # the folder has moved, which config.yaml keeps
    before = {path: path.stat().st_mtime_ns for path in config.run_dir.rglob("*") if path.is_file()}
    notes = notes_of(config)
    assert all(text.startswith("up to date") for text in notes.values())
    assert set(notes) == {"prepare", *NAMES}
    assert {path: path.stat().st_mtime_ns for path in config.run_dir.rglob("*") if path.is_file()} == before


def test_the_search_is_a_switch(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    notes = notes_of(config)
    assert {name for name, text in notes.items() if text.startswith("skipped, as")} == {
        "warmup",
        "sensitivity",
        "allocate",
    }
    assert not Run(config).path("warmup").exists()
    assert Run(config).quant == config.quant
    assert read_header(config.run_dir / "model.safetensors").quant.bits == {}


def test_sensitivity_of_the_untrained_student_needs_no_warmup(tmp_path: Path) -> None:
    notes = notes_of(make_config(tmp_path, {**SEARCH, "sensitivity": {"after": "teacher"}}))
    assert notes["warmup"] == "skipped, as nothing starts from it"
    assert not (tmp_path / "run" / "states" / "warmup").exists()
    assert notes["sensitivity"] == "4 layers at 4 widths each, the others at 2 bits"


def test_widths_are_searched_around_the_width_of_the_budget(tmp_path: Path) -> None:
    config = make_config(tmp_path, {"allocate": {"average_bits": 2.6}, "quant": {"activation_bits": 2}})
    for stage in ("teacher", "warmup", "sensitivity", "allocate"):
        train(config, stage)
    assert Sensitivity.load(Run(config).path("sensitivity")).reference_bits == 3
    assert {layer.bits for layer in searched_layers(Run(config).warmed_up()).values()} == {3}
    found = json.loads((config.run_dir / "bits.json").read_text())
    assert set(found["resampled"]["bits"]) == set(found["bits"])
    assert Run(config).quant.activation_bits == 2


def test_a_quantiser_that_is_not_packed_is_measured_as_it_is(tmp_path: Path) -> None:
    notes = notes_of(make_config(tmp_path, {"quant": {"activation": "minmax"}}))
    assert notes["export"] == "skipped, as the packed runtime does not know quant.activation minmax"
    assert notes["evaluate"].startswith("student: ")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sensitivity": {"samples": 4}}, {"sensitivity": "samples 8 is now 4"}),
        ({"sampler": {"steps": 2}}, {"export": r"sampler\.steps 3 is now 2", "evaluate": r"sampler\.steps 3 is now 2"}),
        ({"evaluation": {"samples": 3}}, {"evaluate": r"evaluation\.samples 4 is now 3"}),
    ],
)
def test_short_stages_are_made_again_when_their_inputs_change(
    copied: Path, changes: dict[str, Any], expected: dict[str, str]
) -> None:
    notes: list[str] = []
    config = make_config(copied, merged(SEARCH, changes))
    with suppress(StateError):  # other sensitivities may give other bits, which the student was not trained with
        Run(config, notes.append).until()
    for name, text in expected.items():
        assert any(re.search(rf"^{name}: rebuilt, as .*{text}", note) for note in notes), notes
    assert not any(note.startswith(("teacher: continues", "warmup: continues", "qat: continues")) for note in notes)


@pytest.mark.parametrize(
    ("changes", "stage", "expected"),
    [
        ({"teacher": {"lr": 0.02}}, "teacher", r"trained with teacher\.lr 0\.01, but the configuration says 0\.02"),
        ({"teacher": {"steps": 5}}, "teacher", r"teacher\.steps 6, .* says 5"),
        ({"class_dropout": 0.3}, "teacher", r"class_dropout 0\.1, .* says 0\.3"),
        ({"seed": 4}, "teacher", r"seed 3, .* says 4"),
        ({"data": {"flip_probability": 0}}, "teacher", r"data\.flip_probability"),
        ({"data": {"fit": "adm"}}, "teacher", r"data\.fit resize, .* says adm"),
        ({"quant": {"rank": 4}}, "warmup", r"quant\.rank 2, .* says 4"),
        ({"qat": {"batch_size": 2}}, "qat", r"qat\.batch_size 4, .* says 2"),
        ({"qat": {"warm_start": "warmup"}}, "qat", r"content of qat\.warm_start None"),
    ],
)
def test_long_stages_are_never_thrown_away_unasked(
    copied: Path, changes: dict[str, Any], stage: str, expected: str
) -> None:
    config = make_config(copied, merged(SEARCH, changes))
    before = Run(config).digest(stage)
    with pytest.raises(StateError, match=expected) as caught:
        Run(config, lambda _: None).until()
    assert str(Run(config).path(stage)) in str(caught.value)
    assert f"robuq-train {stage} --redo" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert Run(config).digest(stage) == before


def test_what_is_no_input_changes_nothing(copied: Path) -> None:
    idle = {"teacher": {"save_every": 1, "log_every": 3}, "qat": {"accumulate": 2}, "compile": False}
    (copied / "elsewhere").mkdir()
    (copied / "photos").rename(copied / "elsewhere" / "photos")
    moved = {"data": {"path": str(copied / "elsewhere" / "photos")}}
    notes = notes_of(make_config(copied, merged(merged(SEARCH, idle), moved)))
    assert all(text.startswith("up to date") for text in notes.values())


def test_more_steps_go_on_and_what_follows_must_be_asked_for(copied: Path) -> None:
    config = make_config(copied, merged(SEARCH, {"teacher": {"steps": 8, "lr": 0.005}}))
    notes: list[str] = []
    with pytest.raises(StateError, match=r"warmup: trained with output of teacher .*robuq-train warmup --redo"):
        Run(config, notes.append).until()
    assert "teacher: continues, as teacher.steps 6 is now 8, teacher.lr 0.01 is now 0.005" in notes
    assert state_of(config).step == 8
    with pytest.raises(StateError, match=r"(qat|warmup): made from another .*teacher than .* robuq-train \w+ --redo"):
        train(config, "export")
    notes_of(config, redo=("warmup",))
    assert all(text.startswith("up to date") for text in notes_of(config).values())


def test_redo_makes_a_stage_again_and_all_after_it(copied: Path) -> None:
    config = make_config(copied, SEARCH)
    before = digests(config)
    (config.run_dir / "bits.json").write_text((config.run_dir / "bits.json").read_text().replace("}", " }"))
    notes = notes_of(config, redo=("qat",))
    assert [name for name in NAMES if notes[name].startswith("up to date")] == ["teacher", "warmup", "sensitivity"]
    after = digests(config)
    assert after["teacher"] == before["teacher"]
    assert state_of(config, "qat").history[0]["from_step"] == 0
    assert [json.loads(line)["step"] for line in (config.run_dir / "qat.log.jsonl").read_text().splitlines()] == [
        1, 2, 3, 4, 5, 6
    ]  # fmt: skip


def test_a_file_that_was_tampered_with_is_made_again(copied: Path) -> None:
    config = make_config(copied, SEARCH)
    before = digests(config)
    Run(config).path("sensitivity").write_text("{}")
    (config.run_dir / "model.safetensors").unlink()
    notes: list[str] = []
    Run(config, notes.append).until()
    assert "sensitivity: rebuilt, as sensitivity.json is not the file that it wrote" in notes
    assert "allocate: up to date (bits.json)" in notes
    assert digests(config) == before


def test_bits_of_another_budget_are_not_used(copied: Path) -> None:
    config = make_config(copied, {"allocate": {"average_bits": 3}})
    with pytest.raises(StateError, match=r"found for allocate\.average_bits 2\.0, but the configuration says 3\.0"):
        train(config, "qat")
    (config.run_dir / "bits.json").write_text('{"bits": {"blocks.0.attn.qkv": 99}}')
    with pytest.raises(StateError, match=r"bits\.json: not a bit table"):
        train(config, "qat")
    (config.run_dir / "bits.json").unlink()
    with pytest.raises(StateError, match=r"bits\.json does not exist: run the stage that writes it first"):
        train(config, "qat")


def test_a_state_brings_its_record_along(copied: Path) -> None:
    """Copied alone into another run folder, it is taken for what it is."""
    config = make_config(copied, {"run_dir": str(copied / "other"), "qat": {"lr": 0.5}})
    shutil.copytree(copied / "run" / "states" / "teacher", copied / "other" / "states" / "teacher")
    notes: list[str] = []
    Run(config, notes.append).until("qat")
    assert "teacher: up to date (teacher)" in notes
    with pytest.raises(StateError, match=r"trained with teacher\.lr 0\.01"):
        train(make_config(copied, {"run_dir": str(copied / "other"), "teacher": {"lr": 1.0}}))


def test_a_damaged_record_is_named(copied: Path) -> None:
    config = make_config(copied, SEARCH)
    (config.run_dir / "stages" / "export.json").write_text("[]")
    with pytest.raises(StateError, match=r"export\.json: not a readable record .*; delete it"):
        Run(config, lambda _: None).until()


def test_qat_starts_from_the_warmed_up_student(copied: Path) -> None:
    config = make_config(copied, merged(SEARCH, {"qat": {"warm_start": "warmup", "steps": 1, "lr": 1e-12}}))
    train(config, "qat", redo=True)
    student = Run(config).student()
    warm = Run(config).warmed_up()
    for name, value in student.named_parameters():
        torch.testing.assert_close(value, warm.get_parameter(name), atol=1e-6, rtol=0)


def test_qat_starts_from_a_run_at_other_bits(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = make_config(copied, {"run_dir": str(copied / "a4"), "quant": {"activation_bits": 4}})
    train(other)
    train(other, "qat")
    start = {"qat": {"warm_start": str(copied / "a4" / "states" / "qat"), "steps": 1, "lr": 1e-12}}
    config = make_config(copied, merged(SEARCH, start))
    train(config, "qat", redo=True)
    student = Run(config).student()
    four = Run(other).student()
    for name, value in student.named_parameters():
        torch.testing.assert_close(value, four.get_parameter(name), atol=1e-6, rtol=0)
    with pytest.raises(StateError, match=r"trained with quant\.seed 0, but the configuration says 1"):
        train(make_config(copied, merged(start, {"quant": {"seed": 1}})), "qat", redo=True)
    with pytest.raises(StateError, match=r"qat\.warm_start: .*absent does not exist"):
        train(make_config(copied, {"qat": {"warm_start": str(copied / "absent")}}), "qat", redo=True)


def official_weights(config: TrainConfig, path: Path) -> Path:
    from robuq_core.models.adapters import save_official

    save_official(Run(config).teacher(), path, config.diffusion)
    return path


def test_a_teacher_is_taken_from_elsewhere(done: TrainConfig, tmp_path: Path) -> None:
    weights = official_weights(done, tmp_path / "DiT.pt")
    config = make_config(tmp_path, {"teacher": {"pretrained": str(weights)}})
    notes = notes_of(config)
    assert notes["teacher"] == f"taken from {weights}"
    taken, ours = Run(config).teacher(), Run(done).teacher()
    assert all(torch.equal(value, ours.get_parameter(name)) for name, value in taken.named_parameters())
    assert (
        read_header(config.run_dir / "model.safetensors").provenance["teacher"]["history"][0]["pretrained"] == "DiT.pt"
    )
    assert all(text.startswith(("up to date", "skipped")) for text in notes_of(config).values())
    # Neither the schedule nor the data made these weights.
    idle = {"teacher": {"pretrained": str(weights), "lr": 9.0}, "class_dropout": 0.1}
    Run(make_config(tmp_path, idle), lambda text: notes.update(last=text)).alone("teacher")
    assert notes["last"] == "teacher: up to date (teacher)"
    weights.write_bytes(weights.read_bytes() + b"more")
    with pytest.raises(StateError, match=r"trained with content of teacher\.pretrained"):
        train(config, "teacher")


def test_weights_of_another_shape_are_named(done: TrainConfig, tmp_path: Path) -> None:
    weights = official_weights(done, tmp_path / "DiT.pt")
    config = make_config(tmp_path, {"teacher": {"pretrained": str(weights)}, "model": {"depth": 2}})
    with pytest.raises(ConfigError, match=r"model\.depth is 1 there, not 2; write into the configuration"):
        train(config)
    assert not Run(config).path("teacher").exists()
    with pytest.raises(StateError, match=r"teacher\.pretrained: .*absent does not exist"):
        train(make_config(tmp_path, {"teacher": {"pretrained": str(tmp_path / "absent")}}))


def test_a_loss_that_is_not_finite_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, compute = make_config(tmp_path, {"qat": {"save_every": 1}}), trainer.diffusion_loss
    train(config)
    calls = iter(range(100))

    def spoiled(*arguments: Any) -> Tensor:
        loss = compute(*arguments)
        return loss * float("nan") if next(calls) == 4 else loss

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "diffusion_loss", spoiled)
        with pytest.raises(TrainingError, match=r"loss is nan .* at step 4; lower qat\.lr and run again"):
            Run(config, lambda _: None).until()
    assert state_of(config, "qat").step == 4
    notes: list[str] = []
    Run(make_config(tmp_path, {"qat": {"save_every": 1, "lr": 0.001}}), notes.append).until()
    assert "qat: continues, as qat.lr 0.01 is now 0.001" in notes
    assert state_of(config, "qat").step == 6


@pytest.mark.parametrize("file", ["data/00000.npy", *(stage.writes for stage in STAGES)])
def test_a_full_disk_ends_a_run_in_one_line_and_costs_no_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, done: TrainConfig
) -> None:
    path = write_config(tmp_path, SEARCH)
    config = load_config(path, [])
    victim = Path(file)

    class Full:
        """Fails where the file at stake would be renamed into place, as the last byte does on a full disk."""

        def __init__(self) -> None:
            self.replace = Path.replace

        def __call__(self, source: Path, target: Path) -> Path:
            if file in str(target):
                raise OSError(errno.ENOSPC, "No space left on device", str(target))
            return self.replace(source, target)

    full = Full()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda source, target: full(source, target))
        patch.setattr(Path, "rename", lambda source, target: full(source, target))
        result = CliRunner().invoke(app, ["run", "-c", str(path)])
    assert result.exit_code == 2, result.output
    message = result.stderr.strip().splitlines()
    assert len(message) == 1
    assert "No space left on device" in message[0]
    assert victim.name in message[0]
    assert not (config.run_dir / file).is_file()
    assert not any((config.run_dir / file).glob("*"))
    assert [each for each in config.run_dir.rglob(".*") if each.is_file()] == []
    notes = notes_of(config)
    later = NAMES[NAMES.index(next((s.name for s in STAGES if s.writes == file), "teacher")) :]
    assert not any(notes.get(name, "").startswith("up to date") for name in later)  # training says nothing of its end
    assert all(notes[name].startswith("up to date") for name in NAMES if name not in later)
    # The same bytes as of a run that nothing disturbed, but for what the history says of the machine.
    assert {s: d for s, d in digests(config).items() if s in ("sensitivity", "allocate")} == {
        s: d for s, d in digests(done).items() if s in ("sensitivity", "allocate")
    }


@pytest.mark.slow
@pytest.mark.parametrize("killed_in", ["teacher", "qat"])
def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(
    done: TrainConfig, tmp_path: Path, killed_in: str
) -> None:
    path = write_config(tmp_path, {**SEARCH, killed_in: {"save_every": 1}})
    config = load_config(path, [])
    process = train_signalled("run", path, signalled(killed_in, 3, signal.SIGKILL))
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (config.run_dir / f"{killed_in}.log.jsonl").exists()
    Run(config, lambda _: None).until()
    for name in ("teacher", "qat"):
        assert state_of(config, name).digest == state_of(done, name).digest


def invoke(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_the_command_line_runs_all_and_each(copied: Path) -> None:
    path = str(write_config(copied, SEARCH))
    lines = invoke("run", "-c", path).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["prepare", *NAMES]
    for name in ("teacher", "warmup", "sensitivity", "allocate", "qat", "export"):
        assert invoke(name, "-c", path).startswith(f"{name}: up to date")
    assert "allocate: rerun, as asked" in invoke("allocate", "-c", path, "--redo")
    assert "no such stage; one of teacher, warmup" in invoke("run", "-c", path, "--redo", "pack", code=2)
    assert "allocate.average_bits is null" in invoke("allocate", "-c", path, "-s", "allocate.average_bits=null", code=2)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.path={empty}", "holds no class folder with images"),
        ("data.path={spoiled}", "class_1/bad.png: not a readable image"),
        ("model.num_classes=7", f"has {CLASSES} classes (labels 0..3) but model.num_classes is 7"),
        ("qat.lerning_rate=1", "qat.lerning_rate: unknown key"),
        ("data.class_names={absent}", "data.class_names: cannot read"),
        ("quant.bits={{blocks.0.attn.qkv: 3}}", "quant.bits and allocate.average_bits both choose"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_artefact(tmp_path: Path, override: str, expected: str) -> None:
    path = write_config(tmp_path, SEARCH)
    (tmp_path / "empty").mkdir()
    subprocess.run(["cp", "-a", str(tmp_path / "photos"), str(tmp_path / "spoiled")], check=True)
    (tmp_path / "spoiled" / "class_1" / "bad.png").write_bytes(b"no image")
    places = {name: str(tmp_path / name) for name in ("empty", "spoiled", "absent")}
    errors = invoke("run", "-c", str(path), "-s", override.format(**places), code=2)
    assert len(errors.splitlines()) == 1
    assert errors.startswith("error: ")
    assert expected in errors
    left = {each.name for each in (tmp_path / "run").rglob("*") if each.is_file()}
    assert left <= {"data.lock", "progress.json"}
    assert notes_of(load_config(path, []))["export"].startswith("wrote")


@pytest.mark.slow
def test_two_processes_run_it_together(tmp_path: Path, done: TrainConfig) -> None:
    path = write_config(tmp_path, SEARCH)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [*launch, "-m", "train.cli", "run", "-c", str(path)]
    changed = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, cwd=REPOSITORY, env=changed, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("prepare: 8 images of 4 classes") == 1
    assert result.stdout.count("export: wrote") == 1
    config = load_config(path, [])
    ours, theirs = tensors_of(state_of(config), "ema"), tensors_of(state_of(done), "ema")
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-4, rtol=1e-3)


def test_settings_of_every_stage_are_keys_of_the_configuration(done: TrainConfig) -> None:
    tree: Mapping[str, Any] = done.model_dump(mode="json")
    for stage in STAGES:
        for key in stage.settings(done):
            section, _, leaf = key.partition(".")
            assert section in tree
            assert not leaf or leaf in tree[section]
