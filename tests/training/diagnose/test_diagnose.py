"""The command on a run: each kind of model, the report as a page of its own, and bad input."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from synthetic_run import make_config, train, write_config
from tiny import write_tiny
from typer.testing import CliRunner

from robuq_core.quant.activation import fake_quantize_activation
from robuq_core.quant.hadamard import Rotation
from train.cli import app
from train.config import TrainConfig
from train.diagnose import watch as module
from train.diagnose.run import diagnosis_of
from train.diagnose.watch import Diagnosis, LayerDiagnosis, LayerInput, LayerWatch
from train.evaluation.samples import MODELS
from train.run import Run
from train.stages import export

LAYERS = ["adaLN_modulation.1", "attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    root = tmp_path_factory.mktemp("trained")
    config = make_config(root, {"sensitivity": {"samples": 6, "batch_size": 4}})
    train(config)
    train(config, "qat")
    export(Run(config), config.run_dir / "model.safetensors")
    return config


class Page(HTMLParser):
    """Checks that elements nest, and keeps what a reader meets."""

    VOID = frozenset({"meta", "path", "use", "br", "link", "rect", "circle", "line"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.identifiers: list[str] = []
        self.links: list[str] = []
        self.pictures = 0
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.pictures += tag == "svg"
        self.links += [named["href"] or ""] if tag == "a" else []
        self.identifiers += [named["id"] or ""] if "id" in named else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def check_layers(found: Diagnosis) -> None:
    assert sorted(layer.name for layer in found.layers) == [f"blocks.0.{name}" for name in LAYERS]
    for layer in found.layers:
        for shape in (layer.before, layer.after):
            assert shape.tokens == (6 if "adaLN" in layer.name else 24)
            assert shape.values == layer.width * shape.tokens
            assert all(0 < b < a < 1 for a, b in pairwise(shape.error[bits] for bits in range(1, 8)))


def test_every_kind_of_model_is_seen(trained: TrainConfig) -> None:
    found = {which: diagnosis_of(trained, which) for which in MODELS}
    for each in found.values():
        check_layers(each)
        assert {(head.block, head.head) for head in each.heads} == {(0, i) for i in range(trained.model.num_heads)}
        assert all(0 < head.error < 0.1 and head.logit_sd > 0 for head in each.heads)
        assert each.source.startswith("6 noised training images")
    assert diagnosis_of(trained, "student") == found["student"]  # the inputs and the tokens picked are fixed
    assert found["teacher"].layers[0].before != found["student"].layers[0].before
    # The packed file is the student but for rounding: its layers look alike.
    for ours, packed in zip(found["student"].layers, sorted_as(found["student"], found["packed"]), strict=True):
        assert (ours.bits, ours.rotation_block) == (packed.bits, packed.rotation_block)
        assert packed.after.error[2] == pytest.approx(ours.after.error[2], rel=0.1)


def sorted_as(first: Diagnosis, other: Diagnosis) -> list[LayerDiagnosis]:
    by_name = {layer.name: layer for layer in other.layers}
    return [by_name[layer.name] for layer in first.layers]


def test_the_report_is_a_page_of_its_own(trained: TrainConfig) -> None:
    config = Path(trained.run_dir).parent / "run.yaml"
    result = CliRunner().invoke(app, ["diagnose", "-c", str(config)])
    assert result.exit_code == 0, result.output
    report = trained.run_dir / "diagnosis" / "packed.html"
    assert str(report) in result.stdout.replace("\n", "")
    assert "output error" in result.stdout
    assert "rotation raises" in result.stdout
    found = json.loads(report.with_suffix(".json").read_text())
    assert sorted(layer["name"] for layer in found["layers"]) == [f"blocks.0.{name}" for name in LAYERS]
    text = report.read_text()
    page = Page(text)
    assert page.pictures == len(LAYERS)
    assert {link.removeprefix("#") for link in page.links} <= set(page.identifiers)
    sections = [name for name in page.identifiers if name.startswith("layer-")]
    assert len(sections) == len(set(sections)) == len(LAYERS)
    for layer in found["layers"]:
        assert f"{layer['after']['error']['2']:.5f}" in page.words
    assert "<script" not in text
    outside = re.findall(r'(?:href|src)="(?!#)([^"]*)"|url\((?!#)([^)]*)\)|@import', text)
    assert outside == []
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"#0[1-4]0[1-4]0[1-4]", text)  # every stand-in colour is the page's own by now


def test_without_photos_the_model_draws_its_own_inputs(trained: TrainConfig, tmp_path: Path) -> None:
    config = trained.model_copy(update={"data": trained.data.model_copy(update={"path": tmp_path / "absent"})})
    for found in (
        diagnosis_of(config, checkpoint=config.run_dir / "model.safetensors"),
        diagnosis_of(config, "student"),
    ):
        assert found.source == "4 images drawn by the model itself, at all 3 steps of ddim"
        assert {layer.before.tokens for layer in found.layers if "adaLN" not in layer.name} == {2 * 4 * 4 * 3}


def test_no_more_than_some_tokens_of_a_forward_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENS_A_FORWARD", 10)
    weights = (torch.randn(5, 32, generator=torch.Generator().manual_seed(1)),) * 2
    inputs = {name: LayerInput(32, Rotation(32), 2, "midrise", "gaussian", lambda: weights) for name in ("a", "b")}

    def watched(seed: int) -> LayerWatch:
        watch = LayerWatch(inputs, 2, seed)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            tokens = torch.randn(40, 32, generator=generator)
            watch("a", tokens)
            watch("b", tokens)
        return watch

    first, again, other = (watched(seed).result("m", "s") for seed in (0, 0, 1))
    assert first.layers[0].before.tokens == 30
    assert first == again
    assert first.layers[0].before != other.layers[0].before
    assert first.layers[0].before != first.layers[1].before  # each layer picks tokens of its own


def _watched(tokens: torch.Tensor, weight: torch.Tensor) -> LayerDiagnosis:
    rotation = Rotation(64)
    rotated = rotation(weight)
    watch = LayerWatch({"a": LayerInput(64, rotation, 2, "midrise", "gaussian", lambda: (rotated, rotated))}, 1, 0)
    watch("a", tokens)
    return watch.result("m", "s").layers[0]


def test_the_error_of_the_output_shows_where_rotation_hurts() -> None:
    """Two outlier channels: with weights of usual size rotation helps, with weights as small as they are large, not.

    The error of the input calls rotation better in both."""
    generator = torch.Generator().manual_seed(0)
    tokens, weight = (torch.randn(rows, 64, generator=generator) for rows in (200, 32))
    tokens[:, :2] *= 30
    usual = _watched(tokens, weight)
    weight[:, :2] /= 30
    small = _watched(tokens, weight)
    assert not usual.rotation_hurts
    assert small.rotation_hurts
    for layer in (usual, small):
        assert layer.after.error[2] < layer.before.error[2]
    lost = tokens - fake_quantize_activation(tokens, 2)
    expected = float((lost @ weight.T).square().sum() / (tokens @ weight.T).square().sum())
    assert small.output_error[0] == pytest.approx(expected, rel=1e-3)


def test_a_head_is_reported_with_the_spread_of_its_logits_and_its_error() -> None:
    watch = LayerWatch({}, 2, 0)
    qkv = torch.randn(6, 128, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    qkv[:, :, 0, 1] *= 3
    watch.attention("blocks.4.attn.qkv", qkv.flatten(2))
    calm, sharp = watch.heads()
    assert (calm.block, calm.head, sharp.head) == (4, 0, 1)
    assert calm.logit_sd == pytest.approx(1, rel=0.1)
    assert sharp.logit_sd == pytest.approx(3, rel=0.1)
    assert 0.002 < calm.error < 0.02


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.safetensors")
    config = write_config(tmp_path)
    result = CliRunner().invoke(
        app, ["diagnose", "-c", str(config), "--checkpoint", str(tmp_path / "tiny.safetensors")]
    )
    assert result.exit_code == 2
    assert "not of the configured model" in " ".join(result.stderr.split())
    assert not (tmp_path / "run" / "diagnosis").exists()


def test_a_missing_state_is_said(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["diagnose", "-c", str(write_config(tmp_path)), "--model", "student"])
    assert result.exit_code == 2
    assert "states/qat does not exist" in " ".join(result.stderr.split())
