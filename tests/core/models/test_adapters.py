"""Weights of other code bases come in with their meaning and go out bit for bit."""

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import assert_floats_agree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from official_dit import forward, positions, random_state
from safetensors.torch import save_file
from tiny import TINY, tiny_model, write_tiny

from robuq_core.config import DiffusionConfig, ModelConfig
from robuq_core.models.adapters import (
    load_dit,
    places,
    read_weights,
    save_diffusers,
    save_official,
)
from robuq_core.models.adapters_files import WeightsError
from robuq_core.models.dit import DiT
from robuq_core.models.presets import preset

SMALL = {"width": 64, "depth": 2, "patch": 2, "channels": 4, "classes": 7, "side": 3}
# What the tensors alone do not say.
SAID: dict[str, Any] = {"prediction": "epsilon", "num_classes": 7, "num_heads": 1}


def load_small(path: Path, **options: Any) -> tuple[ModelConfig, DiT]:
    return load_dit(path, **{**SAID, **options})


def _random_dit(config: ModelConfig, seed: int = 0) -> DiT:
    torch.manual_seed(seed)
    model = DiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def _same(first: DiT, second: DiT) -> bool:
    one, other = dict(first.named_parameters()), dict(second.named_parameters())
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _saved(tmp_path: Path, tree: object) -> Path:
    path = tmp_path / "weights.pt"
    torch.save(tree, path)
    return path


def test_published_checkpoints_have_these_keys() -> None:
    official, diffusers = (
        {key for place in places(preset("DiT-XL/2"), layout).values() for key in place.keys}
        for layout in ("official", "diffusers")
    )
    assert len(official) + 1 == 292  # and pos_embed
    assert len(diffusers) == 538
    assert {"x_embedder.proj.weight", "blocks.27.attn.qkv.bias", "y_embedder.embedding_table.weight"} <= official
    assert {"pos_embed.proj.bias", "transformer_blocks.0.attn1.to_v.weight", "proj_out_1.weight"} <= diffusers
    assert "transformer_blocks.27.norm1.emb.timestep_embedder.linear_2.bias" in diffusers


@pytest.mark.parametrize("heads", [1, 4])
def test_official_weights_compute_what_the_equations_say(tmp_path: Path, heads: int) -> None:
    state = random_state(**SMALL)
    config, model = load_small(_saved(tmp_path, state), num_heads=heads)
    assert config == ModelConfig(
        input_size=6, patch_size=2, in_channels=4, hidden_size=64, depth=2, num_heads=heads, num_classes=7
    )
    x, timesteps, classes = torch.randn(4, 4, 6, 6), torch.tensor([0, 1, 500, 999]), torch.tensor([0, 3, 6, 7])
    with torch.no_grad():
        expected = forward(state, x, timesteps, classes, heads=heads)
        assert_floats_agree(model(x, timesteps, classes), expected)


def test_the_average_of_a_training_checkpoint_is_preferred(tmp_path: Path) -> None:
    raw, averaged = random_state(**SMALL, seed=1), random_state(**SMALL, seed=2)
    arguments = argparse.Namespace(model="DiT-XL/2", image_size=256)
    tree = {"model": raw, "ema": averaged, "opt": {"state": {}, "param_groups": []}, "args": arguments}
    path = _saved(tmp_path, tree)
    _, model = load_small(path)
    assert torch.equal(model.get_parameter("blocks.1.mlp.fc2.bias"), averaged["blocks.1.mlp.fc2.bias"])
    del tree["ema"]
    _, model = load_small(_saved(tmp_path, tree))
    assert torch.equal(model.get_parameter("blocks.1.mlp.fc2.bias"), raw["blocks.1.mlp.fc2.bias"])


def test_heads_follow_the_published_sizes_or_are_asked_for(tmp_path: Path) -> None:
    published = _saved(tmp_path, random_state(**{**SMALL, "width": 384}))
    assert load_small(published, num_heads=None)[0].num_heads == 6
    path = _saved(tmp_path, random_state(**{**SMALL, "width": 48}))
    with pytest.raises(WeightsError, match="how many attention heads a width of 48"):
        load_small(path, num_heads=None)
    assert load_small(path, num_heads=4)[0].num_heads == 4
    with pytest.raises(WeightsError, match="multiple of num_heads 5"):
        load_small(path, num_heads=5)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    heads=st.sampled_from([1, 2, 4]),
    patch=st.sampled_from([1, 2, 4]),
    channels=st.sampled_from([3, 4]),
    depth=st.integers(1, 3),
    classes=st.integers(1, 12),
    learn_sigma=st.booleans(),
    scale=st.sampled_from([1.0, 0.5, 100.0]),
)
def test_round_trips_are_exact(
    tmp_path_factory: pytest.TempPathFactory,
    heads: int,
    patch: int,
    channels: int,
    depth: int,
    classes: int,
    learn_sigma: bool,
    scale: float,
) -> None:
    folder = tmp_path_factory.mktemp("round")
    config = ModelConfig(
        input_size=4 * patch, patch_size=patch, in_channels=channels, hidden_size=16, depth=depth, num_heads=heads,
        num_classes=classes, learn_sigma=learn_sigma, position_scale=scale,
    )  # fmt: skip
    model = _random_dit(config)
    save_official(model, folder / "model.pt")
    loaded_config, loaded = load_dit(folder / "model.pt")
    assert loaded_config == config
    assert _same(loaded, model)
    assert torch.equal(loaded.pos_embed, model.pos_embed)
    if scale != 1:
        with pytest.raises(WeightsError, match="position_scale of 1"):
            save_diffusers(model, folder / "pipeline")
        return
    save_diffusers(loaded, folder / "pipeline")
    diffusers_config, again = load_dit(folder / "pipeline")
    assert diffusers_config == config.model_copy(update={"flavour": "diffusers"})
    assert _same(again, model)
    save_official(again, folder / "again.pt")
    first, second = (torch.load(folder / name)["ema"] for name in ("model.pt", "again.pt"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("side", [1, 16])
def test_half_precision_weights_are_widened(tmp_path: Path, dtype: torch.dtype, side: int) -> None:
    state = random_state(**{**SMALL, "side": side})
    halved = {key: value.to(dtype) for key, value in state.items()}
    save_file(halved, tmp_path / "half.safetensors")
    config, model = load_small(tmp_path / "half.safetensors")
    assert config.position_scale == 1
    assert torch.equal(model.pos_embed, state["pos_embed"])  # the exact table, not the rounded one
    for key in ("blocks.0.attn.qkv.weight", "final_layer.linear.bias"):
        assert model.get_parameter(key).dtype is torch.float32
        assert torch.equal(model.get_parameter(key), halved[key].float())


def _state(folder: Path, model: DiT, **settings: object) -> Path:
    """A training state of this project."""
    folder.mkdir()
    save_file(
        {f"ema.{name}": parameter.detach() for name, parameter in model.named_parameters()}, folder / "0.safetensors"
    )
    history = [{"config": {"model": model.config.model_dump(), "diffusion": {}, **settings}}]
    (folder / "state.json").write_text(json.dumps({"history": history}))
    return folder


def test_weights_of_this_projects_training_come_in(tmp_path: Path) -> None:
    model = _random_dit(TINY.model_copy(update={"position_scale": 100.0}))
    _state(tmp_path / "step-9", _random_dit(TINY, seed=1))
    _state(tmp_path / "step-10", model, diffusion={"prediction_type": "v_prediction"})
    weights = read_weights(tmp_path)
    assert weights.config == model.config
    assert weights.diffusion == DiffusionConfig(prediction_type="v_prediction")
    loaded = weights.model()
    assert _same(loaded, model)
    assert torch.equal(loaded.pos_embed, model.pos_embed)
    (tmp_path / "step-10" / "state.json").write_text('{"history": []}')
    with pytest.raises(WeightsError, match="step-10: not a whole training state"):
        read_weights(tmp_path)


def test_loaded_weights_are_not_tied_to_the_file(tmp_path: Path) -> None:
    path = _saved(tmp_path, random_state(**SMALL))
    before = path.read_bytes()
    _, model = load_small(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert path.read_bytes() == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.attn.proj.bias"), r"1 missing \(blocks\.1\.attn\.proj\.bias\)"),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 unknown \(extra\)"),
        (lambda s: s.pop("x_embedder.proj.weight"), r"x_embedder\.proj\.weight is missing"),
        (lambda s: s.pop("pos_embed"), "pos_embed is missing, and only it gives the size"),
        (lambda s: s.update({"blocks.1.mlp.fc1.weight": torch.zeros(3, 64)}), r"fc1\.weight is \(3, 64\)"),
        (lambda s: s["pos_embed"].add_(0.1), "not DiT's sin-cos table .* learned positions are not supported$"),
        (lambda s: s.update(pos_embed=s["pos_embed"].long()), "not DiT's sin-cos table"),
        (lambda s: s.update(pos_embed=s["pos_embed"][:, :8]), "not DiT's sin-cos table"),
        (lambda s: s.update(pos_embed=positions(32, 3)), "not DiT's sin-cos table"),
        (lambda s: s.update({"t_embedder.mlp.0.bias": torch.zeros(64, dtype=torch.int64)}), "not floating point"),
        (lambda s: s.update({"note": "hello"}), "note is no tensor"),
    ],
)
def test_foreign_tensors_are_named(tmp_path: Path, change: object, message: str) -> None:
    state = random_state(**SMALL)
    change(state)  # type: ignore[operator]
    with pytest.raises(WeightsError, match=message):
        load_small(_saved(tmp_path, state))


class _Stranger:
    """An object that plain weights have no need of."""


def test_unusable_files_give_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        load_dit(tmp_path / "absent.pt")
    whole = _saved(tmp_path, random_state(**SMALL))
    data = bytearray(whole.read_bytes())
    data[len(data) // 2] ^= 0x40
    (tmp_path / "damaged.pt").write_bytes(data)
    with pytest.raises(WeightsError, match="checksum"):
        load_dit(tmp_path / "damaged.pt")
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 3])
    with pytest.raises(WeightsError, match="not a file of plain torch weights"):
        load_dit(tmp_path / "cut.pt")
    write_tiny(tmp_path / "packed.safetensors")
    with pytest.raises(WeightsError, match="a packed checkpoint"):
        load_dit(tmp_path / "packed.safetensors")
    with pytest.raises(WeightsError, match=r"not a file of plain torch weights .*_Stranger") as refused:
        load_small(_saved(tmp_path, {"model": _Stranger()}))
    assert "weights_only" not in str(refused.value)
    with pytest.raises(WeightsError, match="not a state dict"):
        load_small(_saved(tmp_path, [torch.zeros(1)]))


def test_quantised_models_are_not_written(tmp_path: Path) -> None:
    for write in (save_official, save_diffusers):
        with pytest.raises(WeightsError, match="a quantised model"):
            write(tiny_model(), tmp_path / "out")
    with pytest.raises(WeightsError, match="a quantised student"):
        load_dit(_state(tmp_path / "student", tiny_model()))
    assert [entry.name for entry in tmp_path.iterdir()] == ["student"]


def test_files_of_old_torch_are_read(tmp_path: Path) -> None:
    state, buffer = random_state(**SMALL), io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    (tmp_path / "old.pt").write_bytes(buffer.getvalue())
    _, model = load_small(tmp_path / "old.pt")
    assert torch.equal(model.get_parameter("final_layer.linear.weight"), state["final_layer.linear.weight"])
