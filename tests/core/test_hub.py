"""Files, folders and ids of the hub to one packed file; the folder that is uploaded, and its card."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import httpx
import huggingface_hub
import huggingface_hub.errors as hub_errors
import pytest
import torch
from autoencoders import save_autoencoder_tiny, write_latent
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny import TINY, write_tiny
from typer.testing import CliRunner

from robuq_core import cli as robuq
from robuq_core.checkpoint import CheckpointError, read_header
from robuq_core.config import QuantConfig
from robuq_core.convert import pack_untrained, untrained_quant
from robuq_core.export_hub import ExportError, export_hub, model_card
from robuq_core.hub import BUNDLED, bundled_checkpoint, resolve_checkpoint
from robuq_core.inspection import inspect_checkpoint
from robuq_core.models.adapters import save_official
from robuq_core.models.dit import DiT
from robuq_core.pipeline import Sampler

pytestmark = pytest.mark.usefixtures("one_thread")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/tiny"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "tiny.safetensors"
    write_tiny(path, quant=QuantConfig(rank=4, bits={"blocks.1.mlp.fc1": 3}))
    return path


@pytest.fixture
def cache(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub library's cache after a download of an export, as it lies on the disk; without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--someone--tiny"
    export_hub(checkpoint, repository / "snapshots" / COMMIT, licence="mit")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path / "cache"


# Of the package.


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_checkpoint_goes_by_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    path = resolve_checkpoint(name)
    assert path == resolve_checkpoint(Path(name)) == bundled_checkpoint(name)
    assert {path.name for path in path.parent.glob("*.safetensors")} == set(BUNDLED.values())
    assert read_header(path).class_names
    # What exists here comes first.
    Path(name).touch()
    assert resolve_checkpoint(name) == Path(name)


# Local.


def test_local_paths_come_first(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    shutil.copy(checkpoint, tmp_path / "someone" / "tiny")
    assert resolve_checkpoint("someone/tiny") == Path("someone/tiny")
    assert resolve_checkpoint(str(checkpoint)) == checkpoint
    assert resolve_checkpoint(None) == bundled_checkpoint()
    # A missing file is reported by its reader, not looked for on the hub.
    assert resolve_checkpoint("runs/absent.safetensors") == Path("runs/absent.safetensors")


def test_a_folder_with_one_packed_file_among_others(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(checkpoint, tmp_path / "model.safetensors")
    save_file(load_file(checkpoint), tmp_path / "foreign.safetensors")
    (tmp_path / "notes.txt").write_text("none of yours")
    assert resolve_checkpoint(tmp_path) == tmp_path / "model.safetensors"
    assert Sampler.from_checkpoint(tmp_path, backend="reference").checkpoint_name == "model"


def test_folders_that_hold_no_single_packed_file(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no packed"):
        resolve_checkpoint(tmp_path)
    (tmp_path / "short.safetensors").write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        resolve_checkpoint(tmp_path)
    for name in ("a", "b"):
        shutil.copy(checkpoint, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"several packed checkpoints \(a\.safetensors, b\.safetensors\)"):
        resolve_checkpoint(tmp_path)


# From the hub.


def test_an_id_is_read_from_the_librarys_cache(cache: Path) -> None:
    path = resolve_checkpoint(REPO)
    assert path == cache / "models--someone--tiny" / "snapshots" / COMMIT / "tiny.safetensors"
    assert resolve_checkpoint(f"{REPO}@main") == resolve_checkpoint(f"{REPO}@{COMMIT}") == path
    assert read_header(path).model == TINY


@pytest.mark.parametrize("config", [{"_class_name": "DiTTransformer2DModel"}, {"library_name": "robuq"}, []])
def test_other_repositories_are_refused_before_their_weights_are_fetched(cache: Path, config: object) -> None:
    (cache / "models--someone--tiny" / "snapshots" / COMMIT / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="someone/tiny: not a RobuQ checkpoint"):
        resolve_checkpoint(REPO)


def test_a_repository_without_its_checkpoint(cache: Path) -> None:
    (cache / "models--someone--tiny" / "snapshots" / COMMIT / "tiny.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names tiny\.safetensors, which is not in the repository"):
        resolve_checkpoint(REPO)


@pytest.mark.usefixtures("cache")
def test_offline_and_not_in_the_cache_is_one_error() -> None:
    with pytest.raises(CheckpointError, match=r"someone/tiny@v2: .* the hub cannot be reached nor is it in the cache"):
        resolve_checkpoint(f"{REPO}@v2")


def test_only_the_checkpoint_of_one_commit_is_downloaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, folder = [], cache / "models--someone--tiny" / "snapshots" / COMMIT

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_checkpoint(f"{REPO}@main") == folder / "tiny.safetensors"
    # Whatever is uploaded to the branch meanwhile, the second download is of the commit of the first.
    assert asked == [
        (REPO, "main", ["config.json"]),
        (REPO, COMMIT, ["config.json", "tiny.safetensors", "vae/*"]),
    ]


@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [
        (hub_errors.RepositoryNotFoundError, 404, "no such file or folder, and no such repository on the hub"),
        (hub_errors.RevisionNotFoundError, 404, "the repository has no such revision"),
        (hub_errors.GatedRepoError, 403, "the hub only serves approved accounts"),
        (hub_errors.HfHubHTTPError, 401, "the hub refuses access; run hf auth login, or check HF_TOKEN"),
        (hub_errors.HfHubHTTPError, 500, "the hub cannot be reached nor is it in the cache"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], status: int, message: str
) -> None:
    error = kind("refused", response=httpx.Response(status, request=httpx.Request("GET", "https://hub.example")))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=error))
    with pytest.raises(CheckpointError, match=f"^someone/tiny@v9: .*{message}") as refused:
        resolve_checkpoint(f"{REPO}@v9")
    assert "\n" not in str(refused.value)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"someone/tiny: .*; from a checkout: pip install '\.\[hub\]'"):
        resolve_checkpoint(REPO)


# The folder to upload.


def test_the_folder_holds_card_configuration_and_the_same_file(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "export"
    assert export_hub(checkpoint, folder, licence="cc-by-nc-4.0") == folder / "README.md"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "tiny.safetensors"]
    assert (folder / "tiny.safetensors").read_bytes() == checkpoint.read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert (config["library_name"], config["checkpoint"]) == ("robuq", "tiny.safetensors")
    assert config["quant"]["bits"] == {"blocks.1.mlp.fc1": 3}
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def test_the_card_is_one_that_the_hub_reads(checkpoint: Path, tmp_path: Path) -> None:
    card = ModelCard.load(export_hub(checkpoint, tmp_path / "export", licence="mit"))
    assert (card.data.license, card.data.library_name) == ("mit", "robuq")
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert "ternary" in card.data.tags
    header = read_header(checkpoint)
    for expected in (
        "# tiny",
        f"{header.average_activation_bits:.2f}-bit activations",
        f"{checkpoint.stat().st_size:,} bytes",
        "**ternary weights and ",
        "| 0 | 2 | 2 | 2 | 2 | 4 |",
        "| 1 | 2 | 2 | 3 | 2 | 4 |",
        "robuq-serve --checkpoint tiny.safetensors",
        '"seed": 0',
        "Weights: `mit`",
    ):
        assert expected in card.text, expected
    assert not any(word in card.text for word in ("vae", "Not trained"))


@pytest.mark.parametrize(
    ("planes", "std", "weights"),
    [(1, 0.15, "ternary weights"), (2, 0, "weights of 9 levels (2 ternary planes)"), (3, 0.15, "weights of 27 levels")],
)
def test_the_card_of_untrained_weights_says_so(tmp_path: Path, planes: int, std: float, weights: str) -> None:
    model, path = DiT(TINY), tmp_path / "tiny.safetensors"
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    save_official(model, tmp_path / "model.pt")
    result = pack_untrained(tmp_path / "model.pt", path, untrained_quant(planes, rank=4))
    card = ModelCard(model_card(inspect_checkpoint(path), path.name, "mit"))
    assert f"**{weights}" in card.text
    assert ({"ternary", "1.58-bit"} <= set(card.data.tags)) == (planes == 1)
    warning = card.text[card.text.index("> **Not trained**") : card.text.index("| network |")]
    error = f"{result.relative_error:.1%} (RMS) off" if result.relative_error else "could not be measured"
    assert error in warning


def test_the_card_of_latents_names_the_decoder(tmp_path: Path) -> None:
    write_latent(tmp_path / "latent.safetensors")
    card = export_hub(tmp_path / "latent.safetensors", tmp_path / "export", licence="mit").read_text()
    for expected in ("autoencoder", "`vae`", "latents of 4 channels", "'.[vae]'"):
        assert expected in card
    # As the card says: beside the file, under that name.
    save_autoencoder_tiny(tmp_path / "export" / "vae")
    assert Sampler.from_checkpoint(tmp_path / "export", backend="reference").decoder.name == "vae"


def test_the_python_of_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path / "tiny.safetensors")
    export_hub(tmp_path / "tiny.safetensors", tmp_path / "export", licence="mit")
    monkeypatch.chdir(tmp_path / "export")
    blocks = (tmp_path / "export" / "README.md").read_text().split("```python\n")[1:]
    assert len(blocks) == 2
    for block in blocks:
        names: dict[str, object] = {}
        exec(block.split("```")[0].replace("num_inference_steps=25", "num_inference_steps=2"), names)
        assert names["image"].size == (16, 16)  # type: ignore[attr-defined]


def test_a_former_export_is_replaced_and_keeps_what_others_put_there(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    write_tiny(tmp_path / "older.safetensors")
    export_hub(tmp_path / "older.safetensors", folder, licence="mit")
    (folder / "samples.png").write_bytes(b"mine")
    export_hub(checkpoint, folder, licence="mit")
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "tiny.safetensors", "samples.png"}


def test_a_folder_with_other_things_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"library_name": "diffusers", "checkpoint": "x.safetensors"}')
    with pytest.raises(ExportError, match="not an empty folder, and not a former export"):
        export_hub(checkpoint, tmp_path, licence="mit")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def damaged(checkpoint: Path, folder: Path) -> Path:
    whole = checkpoint.read_bytes()
    (folder / "damaged.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    return folder / "damaged.safetensors"


@pytest.mark.parametrize(
    ("source", "licence", "error", "message"),
    [
        (lambda checkpoint, folder: checkpoint, None, ExportError, "give --license, such as"),
        (lambda checkpoint, folder: checkpoint, "All rights reserved", ExportError, "not a licence"),
        (lambda checkpoint, folder: checkpoint, "", ExportError, "not a licence"),
        (damaged, "mit", CheckpointError, "damaged"),
    ],
)
def test_what_cannot_be_exported_leaves_nothing_behind(
    checkpoint: Path,
    tmp_path: Path,
    source: Callable[[Path, Path], Path],
    licence: str | None,
    error: type[Exception],
    message: str,
) -> None:
    path = source(checkpoint, tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        export_hub(path, tmp_path / "export", licence=licence)
    assert sorted(tmp_path.iterdir()) == before


def test_the_command(checkpoint: Path, tmp_path: Path) -> None:
    def run(*words: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(robuq.app, [str(word) for word in words], env={"COLUMNS": "200"})
        return result.exit_code, result.stdout, result.stderr

    folder = tmp_path / "export"
    code, printed, hint = run("export-hub", checkpoint, folder, "--license", "apache-2.0")
    assert (code, printed.strip()) == (0, str(folder / "README.md"))
    assert "hf upload" in hint
    assert run("inspect", folder)[0] == 0
    for words, told in (
        ((checkpoint, tmp_path / "other"), "give --license"),
        ((checkpoint, tmp_path, "--license", "mit"), "not an empty folder"),
        ((tmp_path / "none.safetensors", tmp_path / "other", "--license", "mit"), "no such file"),
    ):
        code, _, errors = run("export-hub", *words)
        assert (code, len(errors.splitlines()), told in errors) == (2, 1, True), errors
    assert not (tmp_path / "other").exists()
