"""A file is taken for what it is, or its reader is asked: never for another kind of DiT."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from official_dit import random_state
from torch import Tensor

from robuq_core.config import DiffusionConfig, ModelConfig
from robuq_core.models.adapters import Weights, load_dit, read_weights, save_diffusers, save_official
from robuq_core.models.adapters_files import WeightsError
from robuq_core.models.dit import DiT

SHAPE = {"width": 64, "depth": 2, "patch": 2, "channels": 4, "side": 3}
REPA_ARGS = {"model": "SiT-XL/2", "enc_type": "dinov2-vit-b", "path_type": "linear", "prediction": "v"}
SIT_ARGS = {"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity"}


def table(rows: int) -> dict[str, Tensor]:
    return random_state(**SHAPE, classes=rows - 1)


def saved(folder: Path, tree: object, name: str = "weights.pt") -> Path:
    torch.save(tree, folder / name)
    return folder / name


def trained(folder: Path, rows: int = 8, **arguments: Any) -> Path:
    return saved(folder, {"ema": table(rows), "args": Namespace(**{"num_classes": 7, **arguments})})


def read(path: Path, **options: Any) -> Weights:
    return read_weights(path, **{"num_heads": 1, **options})


def kind(path: Path, **options: Any) -> tuple[str, str]:
    weights = read(path, **options)
    assert weights.diffusion is not None
    return weights.diffusion.prediction_type, weights.config.flavour


KINDS: list[tuple[dict[str, Any] | None, str, dict[str, Any], tuple[str, str]]] = [
    ({"model": "DiT-XL/2"}, "weights.pt", {}, ("epsilon", "official")),
    (SIT_ARGS, "weights.pt", {}, ("flow", "sit")),
    ({"model": "SiT-B/4"}, "weights.pt", {}, ("flow", "sit")),
    (REPA_ARGS, "weights.pt", {}, ("flow", "repa")),
    (None, "DiT-XL-2-256x256.pt", {}, ("epsilon", "official")),
    (None, "SiT-XL-2-256x256.pt", {}, ("flow", "sit")),
    (None, "repa-sit-b.pt", {}, ("flow", "repa")),
    (None, "SiT-XL-2-256x256.pt", {"prediction": "v_prediction"}, ("v_prediction", "official")),
    (None, "weights.pt", {"prediction": "epsilon"}, ("epsilon", "official")),
    (None, "weights.pt", {"prediction": "flow"}, ("flow", "sit")),
    (None, "weights.pt", {"prediction": "flow", "flavour": "repa"}, ("flow", "repa")),
]
REFUSED: list[tuple[dict[str, Any] | None, str, dict[str, Any], str]] = [
    ({"model": "DiT-XL/2"}, "weights.pt", {"prediction": "flow"}, "prediction is epsilon in the file, not flow"),
    (SIT_ARGS, "weights.pt", {"prediction": "epsilon"}, "prediction is flow in the file, not epsilon"),
    (REPA_ARGS, "weights.pt", {"flavour": "sit"}, "flavour is repa in the file, not sit"),
    ({**SIT_ARGS, "path_type": "GVP"}, "weights.pt", {}, r"args\.path_type"),
    ({**SIT_ARGS, "prediction": "score"}, "weights.pt", {}, r"args\.prediction"),
    *(
        (None, f"{name}.pt", {}, "--prediction")
        for name in ("weights", "dit-or-sit", "repa-vs-dit", "transit", "audit")
    ),
]


def written(folder: Path, arguments: dict[str, Any] | None, name: str) -> Path:
    state = table(8)
    return saved(folder, state if arguments is None else {"ema": state, "args": Namespace(**arguments)}, name)


@pytest.mark.parametrize(("arguments", "name", "options", "expected"), KINDS)
def test_arguments_of_training_the_name_or_the_caller_say_the_kind(
    tmp_path: Path, arguments: dict[str, Any] | None, name: str, options: dict[str, Any], expected: tuple[str, str]
) -> None:
    assert kind(written(tmp_path, arguments, name), num_classes=7, **options) == expected


@pytest.mark.parametrize(("arguments", "name", "options", "message"), REFUSED)
def test_a_file_is_never_taken_for_another_kind(
    tmp_path: Path, arguments: dict[str, Any] | None, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        read(written(tmp_path, arguments, name), num_classes=7, **options)


def test_what_repa_trains_beside_the_network_is_left_alone(tmp_path: Path) -> None:
    state = table(8)
    beside = {f"projectors.0.{i}.weight": torch.zeros(3, 3) for i in (0, 2, 4)}
    path = saved(tmp_path, {**state, **beside})
    assert kind(path, num_classes=7) == ("flow", "repa")
    legacy = {key.replace("blocks.1.", "decoder_blocks.0."): value for key, value in state.items()}
    _, model = load_dit(saved(tmp_path, {**legacy, **beside}), num_classes=7, num_heads=1)
    for name in ("blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight"):
        assert torch.equal(model.get_parameter(name), state[name])


@pytest.mark.parametrize(
    ("path_to_it", "prefix"),
    [(("state_dict",), "module."), (("ema_model",), "model."), (("delta",), ""), (("state_dict_ema",), "module."),
     (("ema", "state_dict"), "ema_model.module."), (("model",), "")],
)  # fmt: skip
def test_wrappers_are_removed(tmp_path: Path, path_to_it: tuple[str, ...], prefix: str) -> None:
    state = table(8)
    tree: Any = {f"{prefix}{key}": value for key, value in state.items()}
    for key in reversed(path_to_it):
        tree = {key: tree, "step": 3}
    _, model = load_dit(saved(tmp_path, tree), prediction="epsilon", num_classes=7, num_heads=1)
    assert torch.equal(model.get_parameter("blocks.1.mlp.fc2.bias"), state["blocks.1.mlp.fc2.bias"])


@pytest.mark.parametrize(
    ("rows", "said", "expected"),
    [
        (8, 7, (7, True)),
        (7, 7, (7, False)),
        (1001, None, (1000, True)),
        (1000, None, (1000, False)),
        (1000, 999, (999, True)),
        (2, 1, (1, True)),
        (1, None, (0, True)),
        (1, 1, (0, True)),
    ],
)
def test_rows_of_the_class_table(tmp_path: Path, rows: int, said: int | None, expected: tuple[int, bool]) -> None:
    flat = read(saved(tmp_path, table(rows), "dit.pt"), num_classes=said).config
    assert (flat.num_classes, flat.null_class) == expected
    if said is not None:
        by_arguments = read(trained(tmp_path, rows, model="DiT-S/2", num_classes=said)).config
        assert (by_arguments.num_classes, by_arguments.null_class) == expected
    assert flat.can_guide == (expected[0] > 0 and expected[1])


def test_rows_that_may_mean_either_are_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path, table(10), "dit.pt")
    with pytest.raises(WeightsError, match=r"10 rows.*--classes"):
        read(path)
    for wrong in (8, 11):
        with pytest.raises(WeightsError, match=f"num_classes {wrong}"):
            read(path, num_classes=wrong)


@pytest.mark.parametrize(
    ("prediction", "classes", "null_class", "flavour"),
    [("epsilon", 5, True, "official"), ("v_prediction", 5, False, "sit"), ("sample", 0, True, "repa"),
     ("flow", 5, False, "repa"), ("flow", 0, True, "official"), ("flow", 5, True, "sit")],
)  # fmt: skip
def test_the_official_form_written_here_says_all_of_it(
    tmp_path: Path, prediction: Any, classes: int, null_class: bool, flavour: Any
) -> None:
    config = ModelConfig(
        input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=classes, null_class=null_class, flavour=flavour
    )
    save_official(DiT(config), tmp_path / "x.pt", DiffusionConfig(prediction_type=prediction))
    weights = read_weights(tmp_path / "x.pt")
    assert weights.config == config
    assert weights.diffusion == DiffusionConfig(prediction_type=prediction)


def test_diffusers_has_no_flow_and_no_table_without_a_null_row(tmp_path: Path) -> None:
    shape = {"input_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2}
    with pytest.raises(WeightsError, match="flow"):
        save_diffusers(DiT(ModelConfig(**shape)), tmp_path / "a", diffusion=DiffusionConfig(prediction_type="flow"))
    with pytest.raises(WeightsError, match="no class"):
        save_diffusers(DiT(ModelConfig(**shape, num_classes=3, null_class=False)), tmp_path / "b")
    save_diffusers(DiT(ModelConfig(**shape, num_classes=0)), tmp_path / "c")
    assert read_weights(tmp_path / "c").config.num_classes == 0
    with pytest.raises(WeightsError, match="prediction"):
        read_weights(tmp_path / "c", prediction="flow")
    scheduler = tmp_path / "c" / "scheduler" / "scheduler_config.json"
    scheduler.write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    with pytest.raises(WeightsError, match="_class_name"):
        read_weights(tmp_path / "c")


def test_a_mapping_that_holds_itself_ends(tmp_path: Path) -> None:
    tree: dict[str, Any] = {"step": 1}
    tree["ema"] = tree
    with pytest.raises(WeightsError, match=r"weights\.pt"):
        read(saved(tmp_path, tree))


@pytest.mark.parametrize("classes", ["7", -1, 7.0, [7], 10**30, torch.ones(3)])
def test_arguments_that_are_no_number_of_classes_say_nothing(tmp_path: Path, classes: Any) -> None:
    with pytest.raises(WeightsError, match="--classes"):
        read(trained(tmp_path, model="DiT-S/2", num_classes=classes))
