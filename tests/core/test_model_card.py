"""The card says what the weights are, what they cost without training, and how to get the runtime."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from tiny import TINY, write_tiny

from robuq_core.checkpoint import read_header
from robuq_core.convert import pack_untrained, untrained_quant
from robuq_core.inspection import inspect_checkpoint
from robuq_core.model_card import model_card
from robuq_core.models.adapters import save_official
from robuq_core.models.dit import DiT


def card_of(path: Path) -> ModelCard:
    return ModelCard(model_card(inspect_checkpoint(path), path.name, "mit"))


def packed_untrained(folder: Path, planes: int, std: float = 0.15) -> Path:
    torch.manual_seed(0)
    model = DiT(TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    save_official(model, folder / "model.pt")
    pack_untrained(folder / "model.pt", folder / "tiny.safetensors", untrained_quant(planes, rank=4), num_heads=4)
    return folder / "tiny.safetensors"


@pytest.mark.parametrize(
    ("planes", "weights"),
    [(1, "ternary weights"), (2, "weights of 9 levels (2 ternary planes)"), (3, "weights of 27 levels")],
)
def test_only_one_plane_is_called_ternary(tmp_path: Path, planes: int, weights: str) -> None:
    card = card_of(packed_untrained(tmp_path, planes))
    assert f"**{weights}" in card.text
    assert ({"ternary", "1.58-bit"} <= set(card.data.tags)) == (planes == 1)


def test_weights_that_were_not_trained_are_introduced_as_such(tmp_path: Path) -> None:
    path = packed_untrained(tmp_path, 1)
    error = read_header(path).provenance["relative_error_on_random_inputs"]
    text = card_of(path).text
    warning = text[text.index("> **Not trained**") : text.index("| network |")]
    assert f"on random inputs its predictions are {error:.1%} (RMS) off those of the original." in warning
    write_tiny(path)
    assert "Not trained" not in card_of(path).text


def test_nothing_is_claimed_of_a_network_that_predicts_zeros(tmp_path: Path) -> None:
    text = card_of(packed_untrained(tmp_path, 3, std=0)).text
    assert "the error of its predictions against the original could not be measured" in text
    assert "0.0%" not in text
