"""Parity with diffusers' own DiT, and folders that it and this project read alike."""

import json
from pathlib import Path

import pytest
import torch
from agreement import assert_floats_agree
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from robuq_core.checkpoint import Header
from robuq_core.config import DiffusionConfig, ModelConfig, QuantConfig, SamplerConfig, SamplerName
from robuq_core.models.adapters import load_dit, read_weights, save_diffusers
from robuq_core.models.adapters_files import WeightsError
from robuq_core.models.dit import DiT, position_table
from robuq_core.pipeline import RowSpec, Sampler

CONFIG = ModelConfig(
    input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=3, num_heads=4, num_classes=10, flavour="diffusers"
)


def _theirs(seed: int = 0) -> DiTTransformer2DModel:
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    blocks = model.transformer_blocks
    for block in blocks[1:]:
        block.norm1.emb.load_state_dict(blocks[0].norm1.emb.state_dict())
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _theirs().save_pretrained(tmp_path / "transformer")
    return tmp_path


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(5, 4, 8, 8), torch.tensor([0, 1, 250, 998, 999]), torch.tensor([0, 3, 9, 10, 4])


@torch.no_grad()
def test_the_forward_is_diffusers(folder: Path) -> None:
    config, model = load_dit(folder / "transformer")
    assert config == CONFIG
    x, timesteps, classes = _inputs()
    expected = _theirs()(x, timestep=timesteps, class_labels=classes).sample
    assert_floats_agree(model(x, timesteps, classes), expected)
    # The flavour is what makes it so: the same weights with the authors' numerics are another network.
    official = DiT(config.model_copy(update={"flavour": "official"}))
    official.load_state_dict(model.state_dict())
    assert not torch.allclose(official(x, timesteps, classes), expected, atol=1e-2)


class _Plain:
    def __init__(self, model: DiT) -> None:
        self.forward = model


def _sampler(model: DiT, config: ModelConfig) -> Sampler:
    header = Header(
        format_version=1, model=config, quant=QuantConfig(), diffusion=DiffusionConfig(), sampler=SamplerConfig(),
        decoder="pixels", tensors={},
    )  # fmt: skip
    return Sampler(_Plain(model), header, checkpoint_name="plain", backend_name="torch", weight_bytes=0)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("step", [0, 3])
def test_a_ddim_step_is_diffusers(folder: Path, guidance: float, step: int) -> None:
    config, model = load_dit(folder)
    sampler = _sampler(model, config)
    name: SamplerName = "ddim"
    row = sampler.start(RowSpec(class_id=3, seed=5, steps=4, guidance_scale=guidance, sampler=name))
    row.steps_done = step
    x, timestep = row.x.clone(), torch.tensor([row.timestep])

    transformer, scheduler = _theirs(), DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
    # Four steps from 999 to 0 are 333 apart, which is the stride that diffusers takes in three.
    scheduler.set_timesteps(3)
    cond = transformer(x[None], timestep=timestep, class_labels=torch.tensor([3])).sample[:, :4]
    uncond = transformer(x[None], timestep=timestep, class_labels=torch.tensor([10])).sample[:, :4]
    expected = scheduler.step(uncond + guidance * (cond - uncond), row.timestep, x[None])

    sampler.step([row])
    assert_floats_agree(row.x, expected.prev_sample[0])
    assert_floats_agree(row.previous_x0, expected.pred_original_sample[0])


def _rewrite(path: Path, **changes: object) -> None:
    tree = json.loads(path.read_text())
    tree.update(changes)
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize("options", [{}, {"safe_serialization": False}])
def test_every_form_that_diffusers_saves_is_read(tmp_path: Path, options: dict[str, object]) -> None:
    theirs = _theirs()
    theirs.save_pretrained(tmp_path, **options)
    _rewrite(tmp_path / "config.json", _class_name="Transformer2DModel", attention_type="default")
    _, model = load_dit(tmp_path)
    block, state = model.blocks[2], theirs.state_dict()
    query, _, value = block.attn.qkv.weight.chunk(3)
    assert torch.equal(query, state["transformer_blocks.2.attn1.to_q.weight"])
    assert torch.equal(value, state["transformer_blocks.2.attn1.to_v.weight"])


def test_diffusers_runs_what_was_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DiT(CONFIG).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=32)
    vae.save_pretrained(tmp_path / "vae")
    names = tuple(f"name {i}" for i in range(10))
    save_diffusers(model, tmp_path / "out", class_names=names, vae=tmp_path / "vae")
    pipeline = DiTPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.get_label_ids(["name 7"]) == [7]
    assert not pipeline.scheduler.config.clip_sample
    x, timesteps, classes = _inputs()
    with torch.no_grad():
        result = pipeline.transformer.eval()(x, timestep=timesteps, class_labels=classes).sample
        assert_floats_agree(result, model(x, timesteps, classes))
    images = pipeline([3], num_inference_steps=2, guidance_scale=1.0, output_type="np").images
    assert images.shape[0] == 1
    weights = read_weights(tmp_path / "out")
    assert weights.class_names == names
    with pytest.raises(WeightsError, match="exists already"):
        save_diffusers(model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "vae"]


@pytest.mark.parametrize(("change", "message"), [(1.0, "bias differs"), (torch.nan, "bias holds NaN")])
def test_unequal_embedders_are_refused(tmp_path: Path, change: float, message: str) -> None:
    theirs = _theirs()
    with torch.no_grad():
        theirs.transformer_blocks[2].norm1.emb.timestep_embedder.linear_1.bias[5] += change
    theirs.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=rf"blocks\.2\.norm1\.emb\.timestep_embedder\.linear_1\.{message}"):
        load_dit(tmp_path)


def _with_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(path), **tensors}, path)


@pytest.mark.parametrize("key", ["pos_embed", "pos_embed.pos_embed"])
def test_positions_in_a_folder_are_compared(folder: Path, key: str) -> None:
    table = position_table(CONFIG)[None]
    _with_tensors(folder, {key: table.half()})
    assert torch.equal(load_dit(folder)[1].pos_embed, table)
    for positions, message in (
        (table + 0.1, "not DiT's sin-cos table"),
        (position_table(CONFIG.model_copy(update={"position_scale": 2.0}))[None], "not DiT's sin-cos table"),
        (table[:, :9], r"pos_embed is \(1, 9, 48\), but .* need \(1, 16, 48\)"),
    ):
        _with_tensors(folder, {key: positions.clone()})
        with pytest.raises(WeightsError, match=message):
            load_dit(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "_class_name 'UNet2DModel' is not supported"),
        ({"norm_type": "ada_norm_single"}, "norm_type"),
        ({"norm_eps": 1e-6}, "norm_eps"),
        ({"out_channels": 5}, "out_channels 5"),
        ({"num_layers": 10**9}, "1000000000 layers, the weights have 3"),
        ({"sample_size": 7}, "multiple of patch_size"),
        ({"num_embeds_ada_norm": 11}, r"embedding_table\.weight is \(11, 48\)"),
    ],
)
def test_other_models_are_named(folder: Path, changes: dict[str, object], message: str) -> None:
    _rewrite(folder / "transformer" / "config.json", **changes)
    with pytest.raises(WeightsError, match=message):
        load_dit(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta_schedule": "scaled_linear"}, "beta_schedule 'scaled_linear' is not supported"),
        ({"trained_betas": [1e-4] * 1000}, r"trained_betas \[0\.0001, .{0,60}\.\.\.\] is not supported: Input"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True is not supported"),
        ({"thresholding": True}, "thresholding True is not supported"),
        ({"clip_sample": True, "clip_sample_range": 3.0}, "clip_sample_range 3.0 .* with clip_sample it must be 1"),
    ],
)
def test_other_processes_are_named(folder: Path, changes: dict[str, object], message: str) -> None:
    DDIMScheduler(**{"clip_sample": False, **changes}).save_pretrained(folder / "scheduler")
    with pytest.raises(WeightsError, match=message) as refused:
        load_dit(folder)
    assert "\n" not in str(refused.value)
    DDIMScheduler(prediction_type="v_prediction", clip_sample=True, beta_end=0.02).save_pretrained(folder / "scheduler")
    assert read_weights(folder).diffusion == DiffusionConfig(prediction_type="v_prediction", clip_sample=True)
    assert read_weights(folder / "transformer").diffusion is None


def test_incomplete_folders_are_named(folder: Path) -> None:
    with pytest.raises(WeightsError, match="num_heads is 4 in the file, not 3"):
        load_dit(folder, num_heads=3)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(WeightsError, match="tensors of diffusers"):
        load_dit(weights)
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    with pytest.raises(WeightsError, match="rename the variant"):
        load_dit(folder)
    (folder / "transformer" / "config.json").unlink()
    with pytest.raises(WeightsError, match="give a diffusers pipeline folder"):
        load_dit(folder)
