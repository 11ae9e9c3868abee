"""From photos to a packed file and a picture drawn from it, through the console scripts."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from agreement import assert_networks_agree, run_packed, run_training
from synthetic_run import (
    CLASSES,
    PER_CLASS,
    REPOSITORY,
    make_config,
    merged,
    settings,
    state_of,
    tensors_of,
    train,
    write_config,
)
from typer.testing import CliRunner

from robuq_core.checkpoint import read_checkpoint, read_header
from robuq_core.kernels.reference import ReferenceBackend
from robuq_core.models.dit import DiT
from robuq_core.pipeline import Sampler
from train import provenance
from train.cli import app
from train.config import ConfigError, load_config
from train.data import ImageDataset, data_digest
from train.provenance import git_commit, run_provenance
from train.run import Run
from train.stages import export, initialise_class_table
from train.state import StateError

NAMES = ("tench", "goldfish", "great white shark", "tiger shark")


def run(*arguments: str, code: int = 0) -> str:
    """``robuq-train ARGUMENTS``; its standard output, or its standard error where it fails as expected."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Configuration and packed file of a run through all stages."""
    root = tmp_path_factory.mktemp("stages")
    (root / "names.txt").write_text("\n".join(NAMES) + "\n")
    path = write_config(root, {"data": {"class_names": str(root / "names.txt")}, "class_init": "pca"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(root / "train" / "cli.py"), "teacher", "-c", str(path), f"-sseed={root}"])
        run("teacher", "--config", str(path))
        run("qat", "-c", str(path), "--set", "qat.distill_weight=0.5")
    out = root / "out" / "packed.safetensors"
    assert "wrote" in run("export", "-c", str(path), "--out", str(out))
    return path, out


def test_the_packed_file_draws_pictures(trained: tuple[Path, Path]) -> None:
    sampler = Sampler.from_checkpoint(trained[1], backend="reference")
    images = sampler.generate(range(CLASSES), seed=5)
    assert [image.size for image in images] == [(8, 8)] * CLASSES
    assert len({image.tobytes() for image in images}) == CLASSES
    assert sampler.class_names == NAMES
    assert sampler.average_activation_bits == 2


def test_the_packed_file_is_the_averaged_student(trained: tuple[Path, Path]) -> None:
    config = load_config(trained[0], [])
    student = Run(config).student()
    average = tensors_of(state_of(config, "qat"), "ema")
    assert all(torch.equal(value, average[name]) for name, value in student.state_dict().items() if name in average)
    with torch.no_grad():  # the file keeps embedders and final layer in fp16
        for name, parameter in student.named_parameters():
            if not name.startswith("blocks."):
                parameter.copy_(parameter.half().float())
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = (x, torch.tensor([0, 10, 500, 999] * 4), torch.arange(4).repeat(4))
    packed = run_packed(config.model, read_checkpoint(trained[1]), ReferenceBackend(), *inputs)
    assert_networks_agree(packed, run_training(student.eval(), *inputs), 2)


def test_the_header_says_how_the_file_was_made(trained: tuple[Path, Path]) -> None:
    header = read_header(trained[1])
    config = load_config(trained[0], [])
    for stage in ("teacher", "qat"):
        entry = header.provenance[stage]
        assert entry["step"] == 6
        (start,) = entry["history"]
        assert start["from_step"] == 0
        assert start["seed"] == 3
        assert start["data"] == {"name": "photos", "sha256": data_digest(config.data.path)}
        assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?|unknown", start["commit"])
        assert set(start["versions"]) == {"robuq", "torch", "python"}
        assert start["config"]["model"] == config.model.model_dump(mode="json")
        assert start["config"][stage]["steps"] == 6
        assert start["command"] == f"robuq-train teacher -c run.yaml -sseed={trained[0].parent.name}"
    assert header.provenance["qat"]["history"][0]["config"]["qat"]["distill_weight"] == 0.5
    assert (header.model, header.quant, header.sampler) == (config.model, config.quant, config.sampler)


def test_the_header_keeps_no_absolute_path(trained: tuple[Path, Path]) -> None:
    text = read_header(trained[1]).model_dump_json()
    assert str(trained[0].parent) not in text
    assert str(REPOSITORY) not in text
    strings = re.findall(r'"((?:[^"\\]|\\.)*)"', text)
    assert [each for each in strings if re.search(r"(^|[=\s])/\w", each)] == []


def test_a_second_export_writes_the_same_bytes(trained: tuple[Path, Path], tmp_path: Path) -> None:
    export(Run(load_config(trained[0], [])), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == trained[1].read_bytes()


@pytest.mark.parametrize("key", ["quant.activation_bits=3", "quant.grid=midtread", "quant.seed=1"])
def test_export_refuses_another_quantisation_than_was_trained(
    trained: tuple[Path, Path], tmp_path: Path, key: str
) -> None:
    config = load_config(trained[0], [key])
    with pytest.raises(StateError, match=f"trained with {key.partition('=')[0]}"):
        export(Run(config), tmp_path / "never.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("stage", "arguments", "missing"),
    [("qat", [], "teacher"), ("export", ["--out", "x"], "teacher"), ("evaluate", ["--classes", "2"], "teacher")],
)
def test_a_stage_without_the_one_before_says_so(tmp_path: Path, stage: str, arguments: list[str], missing: str) -> None:
    errors = run(stage, "-c", str(write_config(tmp_path)), *arguments, code=2)
    assert errors.startswith("error: ")
    assert f"states/{missing} does not exist: run the stage that writes it first" in errors
    assert len(errors.splitlines()) == 1


def test_an_installation_without_training_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    monkeypatch.delitem(sys.modules, "train.config")
    assert "from a checkout: pip install '.[train]'" in run("teacher", "-c", str(tmp_path / "run.yaml"), code=2)


def test_a_run_dir_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    errors = run("teacher", "-c", str(write_config(tmp_path)), code=2)
    assert f"run_dir {tmp_path / 'run'}: cannot be written to" in errors
    assert len(errors.splitlines()) == 1


def test_class_names_must_be_one_a_class_before_the_student_trains(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    train(config)
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with pytest.raises(ConfigError, match=r"has 2 names but model\.num_classes is 4"):
        train(make_config(tmp_path, {"data": {"class_names": str(tmp_path / "names.txt")}}), "qat")


def table_of(root: Path, dataset: ImageDataset, **changes: object) -> torch.Tensor:
    config = make_config(root, changes)
    torch.manual_seed(0)
    model = DiT(config.model)
    initialise_class_table(model, config, dataset)
    return model.y_embedder.embedding_table.weight.detach()


def photos(classes: int, per_class: int = 1) -> ImageDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (classes * per_class, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageDataset(images, torch.arange(classes).repeat_interleave(per_class))


def test_principal_codes_spread_as_asked_and_leave_the_null_class_at_zero(tmp_path: Path) -> None:
    table = table_of(tmp_path, photos(40), class_init="pca", class_init_std=0.3, model={"num_classes": 40})
    assert table.shape == (41, 24)
    assert table[-1].abs().sum() == 0
    assert float(table[:-1].std()) == pytest.approx(0.3, rel=1e-5)
    deviations = table[:-1].std(dim=0)
    assert bool((deviations[1:] <= deviations[:-1] + 1e-6).all())
    correlation = torch.corrcoef(table[:-1].T) - torch.eye(24)
    assert float(correlation.abs().max()) < 1e-3


def test_classes_with_like_photos_start_with_like_codes(tmp_path: Path) -> None:
    dataset = photos(40)
    dataset.images[1] = dataset.images[0]
    dataset.images[1, :, :2, :2] ^= 8
    table = table_of(tmp_path, dataset, class_init="pca", model={"num_classes": 40})[:-1]
    distance = torch.cdist(table, table) + torch.eye(40) * 1e9
    assert int(distance[0].argmin()) == 1
    assert int(distance[1].argmin()) == 0


def test_principal_codes_do_not_depend_on_the_random_state_or_the_order(tmp_path: Path) -> None:
    dataset = photos(4, PER_CLASS)
    first = table_of(tmp_path, dataset, class_init="pca")
    torch.manual_seed(99)
    order = torch.randperm(len(dataset))
    again = table_of(tmp_path, ImageDataset(dataset.images[order], dataset.labels[order]), class_init="pca")
    assert torch.allclose(first, again, atol=1e-5)


def test_absolute_paths_are_cut_to_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["-c/home/me/run.yaml", "--config=/home/me/run.yaml", "-s", "data.path=/data/x.zip", "a/b.yaml", "/x/y"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/robuq-train", *arguments])
    tree = merged(settings(tmp_path), {"data": {"class_names": "configs/names.txt"}})
    made = run_provenance(make_config(tmp_path, tree), "0")
    assert made["command"] == "robuq-train -crun.yaml --config=run.yaml -s data.path=x.zip a/b.yaml y"
    assert made["config"]["run_dir"] == "run"
    assert made["config"]["data"]["path"] == "photos"
    # A relative path says where in the project the file lies; that is worth keeping.
    assert made["config"]["data"]["class_names"] == "configs/names.txt"
    json.dumps(made)


def test_a_copy_outside_a_checkout_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "provenance.py"
    copy.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(copy))
    assert git_commit() == "unknown"
