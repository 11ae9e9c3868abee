"""Every kind of DiT trains, quantised too, and is exported as what it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_run import make_config, merged, train

from robuq_core.checkpoint import read_header
from robuq_core.config import DiffusionConfig
from robuq_core.models.adapters import save_official
from robuq_core.pipeline import Sampler
from train.config import ConfigError, TrainConfig
from train.evaluation.samples import balanced_classes, load_sampler
from train.run import Run

FLOW: dict[str, Any] = {
    "model": {"flavour": "sit"},
    "diffusion": {"prediction_type": "flow", "clip_sample": False},
}
KINDS: dict[str, tuple[dict[str, Any], tuple[int, bool, str, float]]] = {
    "flow": (FLOW, (4, True, "euler", 1.5)),
    "repa": (merged(FLOW, {"model": {"flavour": "repa"}}), (4, True, "euler", 1.5)),
    "no dropout": ({"class_dropout": 0}, (4, False, "ddim", 1.0)),
    "unconditional": ({"model": {"num_classes": 0}}, (0, True, "ddim", 1.0)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_each_kind_is_exported_as_what_it_is(tmp_path: Path, kind: str) -> None:
    changes, (classes, null_class, sampler, scale) = KINDS[kind]
    config = make_config(tmp_path, changes)
    for stage in ("teacher", "warmup", "sensitivity", "qat", "export"):
        train(config, stage)
    path = config.run_dir / "model.safetensors"
    header = read_header(path)
    assert (header.model.num_classes, header.model.null_class) == (classes, null_class)
    assert (header.sampler.sampler, header.sampler.guidance_scale) == (sampler, scale)
    assert header.tensors["y_embedder.embedding_table.weight"].shape[0] == classes + null_class
    assert header.diffusion == config.diffusion
    packed = Sampler.from_checkpoint(path)
    ids = balanced_classes(2, packed.valid_classes, 0)
    pictures = packed.generate(ids, seed=1)
    student, _ = load_sampler(Run(config), "student")
    assert [picture.size for picture in pictures] == [picture.size for picture in student.generate(ids, seed=1)]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"class_dropout": 0.1, "model": {"null_class": False}}, "null_class"),
        ({"class_dropout": 0, "model": {"null_class": True}}, "null_class"),
        ({"class_dropout": 0.1, "model": {"num_classes": 0}}, "class_dropout"),
        ({"class_dropout": 0, "sensitivity": {"guidance_scale": 2}}, r"sensitivity\.guidance_scale"),
        ({"class_dropout": 0, "sampler": {"guidance_scale": 2}}, r"sampler\.guidance_scale"),
        (merged(FLOW, {"sampler": {"sampler": "ddim"}}), r"sampler\.sampler"),
        ({"sampler": {"sampler": "heun"}}, r"sampler\.sampler"),
        ({"model": {"num_classes": 0}, "class_init": "pca"}, "class_init"),
    ],
)
def test_settings_that_contradict_each_other_are_named(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        make_config(tmp_path, changes)


@pytest.mark.parametrize(("flavour", "wrong"), [("sit", "repa"), ("repa", "sit")])
def test_weights_of_a_flow_are_trained_on(tmp_path: Path, flavour: str, wrong: str) -> None:
    def config_for(root: Path, flavour: str, weights: Path | None) -> TrainConfig:
        model = {"model": {"flavour": flavour}, "teacher": {"pretrained": None if weights is None else str(weights)}}
        return make_config(root, merged(FLOW, model))

    made = config_for(tmp_path, flavour, None)
    train(made)
    teacher = Run(made).teacher()
    save_official(teacher, tmp_path / "weights.pt", made.diffusion)
    taken = config_for(tmp_path / "taken", flavour, tmp_path / "weights.pt")
    train(taken, "teacher")
    assert all(
        torch.equal(value, Run(taken).teacher().get_parameter(name)) for name, value in teacher.named_parameters()
    )
    with pytest.raises(Exception, match="flavour"):
        train(config_for(tmp_path / "other", wrong, tmp_path / "weights.pt"), "teacher")
    save_official(teacher, tmp_path / "noise.pt", DiffusionConfig())
    with pytest.raises(Exception, match="prediction"):
        train(config_for(tmp_path / "noise", flavour, tmp_path / "noise.pt"), "teacher")


def test_a_folder_of_images_without_classes_is_enough(tmp_path: Path) -> None:
    config = make_config(tmp_path, {"model": {"num_classes": 0}})
    photos = Path(config.data.path)
    for file in sorted(photos.glob("*/*")):
        file.rename(photos / f"{file.parent.name}-{file.name}")
    train(config, "teacher")
    with pytest.raises(Exception, match=r"data\.path"):
        train(make_config(tmp_path, {"run_dir": str(tmp_path / "again")}), "teacher")
