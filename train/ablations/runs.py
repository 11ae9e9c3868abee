"""The pieces of a study, each kept in a file that the digest of its settings names: network, teacher, widths, runs.

A piece that is there is read, not made again, so a study that was interrupted goes on where it stopped, and one whose
configuration changed makes what the change touches.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robuq_core.checkpoint import layer_macs
from robuq_core.config import QuantConfig
from robuq_core.files import read_json, replacing
from robuq_core.models.dit import DiT
from robuq_core.models.quant_linear import quantize_model
from train.ablations.config import AllocationSpec, ClassifierConfig, RunSpec, TeacherSpec
from train.ablations.dataset import GreyImages, load_grey_images, to_unit
from train.ablations.network import FeatureClassifier, load_network, prepare_network, readable
from train.ablations.training import DivergedError, draw_samples, train_model
from train.allocate import METHODS, Allocation, allocate
from train.evaluation.frechet import Moments, frechet_distance_of_moments
from train.sensitivity import Sensitivity, fixed_batch, measure_sensitivity

SHOWN_SAMPLES = 20  # of each run, kept as one strip of PNG


@dataclass(frozen=True)
class RunResult:
    """What a run came to. ``distance`` null: it diverged. ``agreement``: share of samples that the classifier puts in
    the class they were drawn for. ``loss``: diffusion loss over the last tenth of the steps."""

    distance: float | None
    agreement: float
    loss: float | None
    seconds: float


@dataclass(frozen=True)
class Workplace:
    """The study's folder and data; small enough to be sent to another process."""

    folder: Path
    data: Path
    classifier: ClassifierConfig

    def path(self, kind: str, digest: str, suffix: str) -> Path:
        return self.folder / kind / f"{digest}{suffix}"

    def images(self) -> GreyImages:
        return _images(self.data)

    def network(self, spec_digest: str) -> tuple[FeatureClassifier, Moments, float]:
        """The feature network, the training images' moments, and its accuracy on the test images."""
        return _network(self, spec_digest)

    def teacher(self, spec: TeacherSpec) -> DiT:
        """The trained teacher: read, or trained first."""
        path = self.path("teacher", spec.digest, ".pt")
        model = _new_model(spec)
        if path.exists():
            with readable(path):
                model.load_state_dict(torch.load(path, weights_only=True))
            return model.eval()
        path.parent.mkdir(parents=True, exist_ok=True)
        state = path.with_suffix(".state")
        train_model(
            model,
            self.images(),
            spec.stage,
            spec.diffusion,
            class_dropout=spec.class_dropout,
            seed=0,
            state_path=state,
        )
        with replacing(path) as temporary:
            torch.save(model.state_dict(), temporary)
        state.unlink(missing_ok=True)
        return model


@lru_cache(maxsize=1)
def _images(folder: Path) -> GreyImages:
    return load_grey_images(folder)


@lru_cache(maxsize=1)
def _network(place: Workplace, digest: str) -> tuple[FeatureClassifier, Moments, float]:
    data = place.images()
    path = place.path("network", digest, ".pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = prepare_network(data, place.classifier, path)
    network, reference = load_network(content, data.train.shape[-1], data.num_classes)
    return network, reference, float(content["accuracy"])


def _new_model(spec: TeacherSpec) -> DiT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DiT(spec.model)


def network_digest(spec: RunSpec) -> str:
    return f"{spec.classifier.digest}-{spec.teacher.data.removeprefix('crc32:')}"


def measure(place: Workplace, spec: RunSpec, images: Tensor, classes: Tensor | None = None) -> tuple[float, float]:
    """Distance of ``images`` from the training images, and the classifier's agreement with ``classes``."""
    network, reference, _ = place.network(network_digest(spec))
    moments, verdicts = network.moments_and_verdicts(images)
    agreement = 0.0 if classes is None else float((verdicts == classes).float().mean())
    return frechet_distance_of_moments(moments, reference), agreement


def floor_distance(place: Workplace, spec: RunSpec) -> float:
    """Distance of as many unseen real images as a run has samples: what no model beats but by chance."""
    return measure(place, spec, to_unit(place.images().test[: spec.samples]))[0]


def result_path(place: Workplace, spec: RunSpec) -> Path:
    return place.path("runs", spec.digest, ".json")


def strip_path(place: Workplace, spec: RunSpec) -> Path:
    return place.path("runs", spec.digest, ".png")


def read_result(place: Workplace, spec: RunSpec) -> RunResult | None:
    """The result of a run that is done; none if it is not."""
    path = result_path(place, spec)
    if not path.exists():
        return None
    with readable(path):
        return RunResult(**read_json(path)["result"])


def run(place: Workplace, spec: RunSpec) -> RunResult:
    """Train, draw and measure one run, unless its result is there."""
    done = read_result(place, spec)
    if done is not None:
        return done
    started = time.perf_counter()
    model = place.teacher(spec.teacher)
    if spec.quant is not None:
        model = quantize_model(model, spec.quant)
    model.train()
    state = place.path("runs", spec.digest, ".state")
    state.parent.mkdir(parents=True, exist_ok=True)
    loss: float | None
    distance: float | None
    try:
        loss = train_model(
            model,
            place.images(),
            spec.stage,
            spec.teacher.diffusion,
            class_dropout=spec.teacher.class_dropout,
            seed=spec.seed + 1,  # the teacher's batches came from seed 0
            state_path=state,
            teacher=place.teacher(spec.teacher) if spec.stage.distill_weight else None,
        )
        distance, agreement = _measure_samples(place, spec, model)
    except DivergedError:
        distance, agreement, loss = None, 0.0, None
    result = RunResult(distance, agreement, loss, time.perf_counter() - started)
    write_json(result_path(place, spec), {"spec": spec.model_dump(mode="json"), "result": asdict(result)})
    state.unlink(missing_ok=True)
    return result


def _measure_samples(place: Workplace, spec: RunSpec, model: DiT) -> tuple[float, float]:
    samples, classes = draw_samples(model, spec.samples, spec.seed, spec.sampler, spec.teacher.diffusion)
    if not bool(samples.isfinite().all()):
        raise DivergedError("samples are not finite")
    pixels = ((samples[:SHOWN_SAMPLES, 0] + 1) * 127.5).round().to(torch.uint8).numpy()
    with replacing(strip_path(place, spec)) as temporary:
        Image.fromarray(np.concatenate(list(pixels), axis=1)).save(temporary, format="PNG")
    return measure(place, spec, samples, classes)


@dataclass(frozen=True)
class RowAllocation:
    """The sensitivities of one row at one average width, and what each method made of them."""

    sensitivity: Sensitivity
    allocations: dict[str, Allocation]


def allocation_path(place: Workplace, spec: AllocationSpec) -> Path:
    return place.path("widths", spec.digest, ".json")


def read_allocation(place: Workplace, spec: AllocationSpec) -> RowAllocation | None:
    path = allocation_path(place, spec)
    if not path.exists():
        return None
    with readable(path):
        content = read_json(path)
        allocations = {method: Allocation(**each) for method, each in content["allocations"].items()}
        return RowAllocation(Sensitivity.model_validate(content["sensitivity"]), allocations)


def find_widths(place: Workplace, spec: AllocationSpec) -> RowAllocation:
    """Warm a student up, measure its layers and allocate by every method, unless that is done."""
    done = read_allocation(place, spec)
    if done is not None:
        return done
    data, diffusion = place.images(), spec.teacher.diffusion
    student = quantize_model(place.teacher(spec.teacher), spec.quant)
    if spec.warmup is not None:
        train_model(student, data, spec.warmup, diffusion, class_dropout=spec.teacher.class_dropout, seed=1)
    sensitivity = spec.sensitivity
    rows = torch.arange(sensitivity.samples) % len(data.train)
    batches = [
        fixed_batch(to_unit(data.train[index]), data.train_labels[index], 0, i, diffusion.prediction_type)
        for i, index in enumerate(torch.split(rows, sensitivity.batch_size))
    ]
    width = spec.quant.activation_bits
    measured = measure_sensitivity(
        student,
        place.teacher(spec.teacher),
        batches,
        diffusion,
        bits=sensitivity.bits,
        reference_bits=width,
    )
    losses, macs = measured.rise[sensitivity.metric], layer_macs(spec.teacher.model)
    found: dict[str, Allocation] = {method: allocate(losses, macs, width, method) for method in METHODS}
    write_json(allocation_path(place, spec), {
        "spec": spec.model_dump(mode="json"),
        "sensitivity": measured.model_dump(mode="json"),
        "allocations": {method: each.as_dict() for method, each in found.items()},
    })  # fmt: skip
    return RowAllocation(measured, found)


def with_widths(quant: QuantConfig, bits: dict[str, int]) -> QuantConfig:
    """``quant`` with ``bits``; entries equal to its own width are left out, so that equal runs have equal digests."""
    own = {name: width for name, width in bits.items() if width != quant.activation_bits}
    return quant.model_copy(update={"bits": own})


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
