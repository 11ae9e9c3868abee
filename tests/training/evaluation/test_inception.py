"""The adapter to torch-fidelity: its own part on stand-ins, the rest where the library can be imported."""

import importlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from train.evaluation import networks as inception
from train.evaluation.figures import (
    Moments,
    RunningMoments,
    fid,
    frechet_distance,
    inception_score,
    precision_and_recall,
)
from train.evaluation.networks import DinoV2, EvaluationError, Inception


def library_is_there() -> bool:
    try:
        importlib.import_module("torch_fidelity")
    except (ImportError, RuntimeError):
        return False
    return True


with_library = pytest.mark.skipif(not library_is_there(), reason="torch-fidelity or its torchvision is not installed")


def moments(features: Tensor) -> Moments:
    running = RunningMoments()
    running.add(features)
    return running.result()


def normal(seed: int, count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


class StandInExtractor(nn.Module):
    """The library's extractor as this project uses it, five layers deep; checks what it is handed."""

    def __init__(self, name: str, features: list[str], feature_extractor_weights_path: Any) -> None:
        super().__init__()
        assert features == ["2048", "logits_unbiased"]
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Conv2d(3, 8, 1)
        self.fc = nn.Linear(8, 12)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        assert images.dtype == torch.uint8
        maps = torch.relu(self.Mixed_6d.branch1x1(images / 255))
        pool = maps.mean(dim=(2, 3))
        return pool, self.fc(pool)


class StandInLibrary:
    FeatureExtractorInceptionV3 = StandInExtractor


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights for the stand-in, which takes the library's place."""
    monkeypatch.setattr(inception, "library", lambda module: StandInLibrary)
    extractor = StandInExtractor.__new__(StandInExtractor)
    nn.Module.__init__(extractor)
    extractor.Mixed_6d = nn.Module()
    extractor.Mixed_6d.branch1x1 = nn.Conv2d(3, 8, 1)
    extractor.fc = nn.Linear(8, 12)
    path = tmp_path / "weights.pth"
    torch.save(extractor.state_dict(), path)
    return path


def test_features_pass_through_the_interface_in_batches(weights: Path) -> None:
    network = Inception(weights)
    levels = torch.randint(0, 256, (70, 3, 4, 4), dtype=torch.uint8)
    features = network(levels.float() / 127.5 - 1)
    assert features.spatial is not None
    assert (features.pool.shape, features.logits.shape, features.spatial.shape) == ((70, 8), (70, 12), (70, 7 * 16))
    expected = network.network.Mixed_6d.branch1x1(levels / 255)[:, :7].flatten(1)
    torch.testing.assert_close(features.spatial, expected)
    alone = network(levels[50:51].float() / 127.5 - 1)
    torch.testing.assert_close(features.pool[50:51], alone.pool)
    assert alone.spatial is not None
    torch.testing.assert_close(features.spatial[50:51], alone.spatial)


class Planted:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('unpickled')",)


def test_a_file_that_holds_code_is_refused_unopened(weights: Path) -> None:
    with weights.open("wb") as stream:
        pickle.dump(Planted(), stream)
    with pytest.raises(EvaluationError, match="not a file of weights"):
        Inception(weights)


def test_weights_of_another_network_are_refused(weights: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(3)}, weights)
    with pytest.raises(EvaluationError, match=r"not the weights of this Inception-v3.*--inception"):
        Inception(weights)


def test_a_missing_file_says_what_to_give(weights: Path) -> None:
    with pytest.raises(EvaluationError, match=r"no such file; give .*weights-inception-2015-12-05"):
        Inception(weights.parent / "absent.pth")


def test_a_missing_library_names_the_extra_and_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(EvaluationError, match=r"--inception needs torch-fidelity.*pip install '\.\[fid\]'"):
        Inception(tmp_path / "weights.pth")


def test_too_few_samples_for_a_manifold_are_said() -> None:
    with pytest.raises(EvaluationError, match=r"more than 3.*evaluation\.samples"):
        precision_and_recall(torch.zeros(3, 2), torch.zeros(9, 2))


@with_library
def test_the_librarys_fid_is_the_frechet_distance() -> None:
    a, b = normal(0, 400, 12), normal(1, 300, 12) * 1.5 + 0.5
    assert fid(moments(a), moments(b)) == pytest.approx(frechet_distance(moments(a), moments(b)), rel=1e-9)


@with_library
def test_the_score_of_even_certainty_is_the_number_of_classes() -> None:
    certain = torch.eye(10).repeat(1000, 1) * 100
    assert inception_score(certain) == pytest.approx(10, rel=0.01)
    assert inception_score(torch.zeros(1000, 10)) == pytest.approx(1)


@with_library
def test_manifolds_of_hand_made_points() -> None:
    line = torch.arange(8.0)[:, None]  # balls reach 2 (in the middle) or 3 (at the ends) to either side
    assert precision_and_recall(line, line) == (1.0, 1.0)
    far = line + 100
    assert precision_and_recall(far, line) == (0.0, 0.0)
    # Samples at 9.5, 9.6 .. lie within 3 of 7; their own balls are too small to reach any photo.
    beside = torch.linspace(9.5, 9.9, 5)[:, None]
    assert precision_and_recall(beside, line) == (1.0, 0.0)
    half = torch.cat([beside, beside + 100])
    assert precision_and_recall(half, line)[0] == 0.5


@with_library
@pytest.mark.slow
def test_the_librarys_network_takes_weights_from_a_file(tmp_path: Path) -> None:
    extractor = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    build, load = extractor.FeatureExtractorInceptionV3, nn.Module.load_state_dict
    path = tmp_path / "weights.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # its constructor wants weights before there are any
        patch.setattr(nn.Module, "load_state_dict", lambda *_: None)
        torch.save({}, path)
        random = build("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    assert nn.Module.load_state_dict is load
    torch.save(random.state_dict(), path)
    network = Inception(path)
    images = torch.rand(3, 3, 40, 40) * 2 - 1
    features = network(images)
    assert features.spatial is not None
    assert (features.pool.shape, features.logits.shape, features.spatial.shape) == ((3, 2048), (3, 1008), (3, 2023))
    assert float(features.pool.std()) > 0
    seen: list[Tensor] = []
    network.network.get_submodule("Mixed_6d").register_forward_hook(lambda module, inputs, output: seen.append(output))
    features = network(images)
    assert features.spatial is not None
    # The branch comes first in the block's output: the two definitions of the spatial features that are around agree.
    torch.testing.assert_close(seen[0][:, :7].flatten(1).float(), features.spatial)


def dino_weights(width: int = 128, depth: int = 2, side: int = 16) -> dict[str, Tensor]:
    """Of a DINOv2 of one or two heads, drawn; names and shapes as in the authors' files."""
    shapes = {"cls_token": (1, 1, width), "mask_token": (1, width), "pos_embed": (1, side**2 + 1, width),
              "patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,),
              "norm.weight": (width,), "norm.bias": (width,)}  # fmt: skip
    for i in range(depth):
        for name, shape in (("attn.qkv", (3 * width, width)), ("attn.proj", (width, width)),
                            ("mlp.fc1", (4 * width, width)), ("mlp.fc2", (width, 4 * width)),
                            ("norm1", (width,)), ("norm2", (width,))):  # fmt: skip
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        shapes |= {f"blocks.{i}.ls1.gamma": (width,), f"blocks.{i}.ls2.gamma": (width,)}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_dinov2_is_a_vision_transformer(tmp_path: Path) -> None:
    """Its blocks are torch's own encoder layers once their layer scale is folded into the last weights."""
    weights = dino_weights()
    torch.save(weights, tmp_path / "dino.pth")
    images = torch.rand(3, 3, 224, 224) * 2 - 1
    found = DinoV2(tmp_path / "dino.pth")(images)
    assert found.logits.shape == (3, 0)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((images + 1) / 2 - mean[:, None, None]) / deviation[:, None, None]
    patches = nn.functional.conv2d(pixels, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], 14)
    x = torch.cat([weights["cls_token"].expand(3, -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
    x = x + weights["pos_embed"]
    for i in range(2):
        own = {name.split(".", 2)[2]: value for name, value in weights.items() if name.startswith(f"blocks.{i}.")}
        layer = nn.TransformerEncoderLayer(128, 2, 512, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True).eval()
        scaled = {
            "self_attn.in_proj_weight": own["attn.qkv.weight"], "self_attn.in_proj_bias": own["attn.qkv.bias"],
            "linear1.weight": own["mlp.fc1.weight"], "linear1.bias": own["mlp.fc1.bias"],
        }  # fmt: skip
        for name, source, gamma in (("self_attn.out_proj", "attn.proj", "ls1"), ("linear2", "mlp.fc2", "ls2")):
            scaled[f"{name}.weight"] = own[f"{gamma}.gamma"][:, None] * own[f"{source}.weight"]
            scaled[f"{name}.bias"] = own[f"{gamma}.gamma"] * own[f"{source}.bias"]
        scaled |= {
            f"{name}.{part}": own[f"{name}.{part}"] for name in ("norm1", "norm2") for part in ("weight", "bias")
        }
        layer.load_state_dict(scaled)
        with torch.no_grad():
            x = layer(x)
    expected = nn.functional.layer_norm(x[:, 0], (128,), weights["norm.weight"], weights["norm.bias"], 1e-6)
    torch.testing.assert_close(found.pool, expected, atol=1e-4, rtol=1e-4)


def test_the_positions_of_larger_images_are_resized(tmp_path: Path) -> None:
    weights = {**dino_weights(side=37), "pos_embed": torch.ones(1, 37**2 + 1, 128)}
    torch.save(weights, tmp_path / "large.pth")
    torch.save({**weights, "pos_embed": torch.ones(1, 16**2 + 1, 128)}, tmp_path / "small.pth")
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    large, small = (DinoV2(tmp_path / f"{name}.pth")(images).pool for name in ("large", "small"))
    torch.testing.assert_close(large, small, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; give the authors'"),
        (b"not a file of weights", "not a file of weights"),
        ({"cls_token": torch.zeros(1, 1, 64)}, "not the weights of a DINOv2"),
        ({**dino_weights(depth=1), "register_tokens": torch.zeros(1, 4, 128)}, "not the weights of a DINOv2"),
        ({name: value for name, value in dino_weights().items() if "norm1" not in name}, "not the weights of a DINOv2"),
    ],
)
def test_dinov2_without_its_weights_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "dino.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(EvaluationError, match=message):
        DinoV2(path)
