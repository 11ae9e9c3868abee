"""Everything that is measured of one model of a run, and the file that keeps it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from robuq_core.config import SamplerConfig
from robuq_core.files import read_json, replacing
from robuq_core.pipeline import Sampler
from train import parallel
from train.config import TrainConfig
from train.data import holds_features
from train.evaluation.figures import (
    IMAGENET_CLASSES,
    Estimate,
    Reference,
    agreement,
    dinov2_figures,
    effnet_figures,
    frechet_distance,
    inception_figures,
    pixel_agreement,
    ratio,
)
from train.evaluation.networks import DinoV2, EfficientNetLite0, EvaluationError, FeatureNetwork, Inception
from train.evaluation.reference import GALLERY_PHOTOS, published_reference, reference
from train.evaluation.samples import (
    SampleSet,
    Which,
    default_model,
    generate,
    generate_to_disk,
    load_sampler,
    random_classes,
    write_sheet,
)
from train.logs import one_line
from train.run import Run

Measure = Callable[[SampleSet, FeatureNetwork, Reference], dict[str, float]]
_TEACHER = "teacher"
_MEASURES: dict[str, Measure] = {
    "effnet": effnet_figures, "inception": inception_figures, "dinov2": dinov2_figures,
}  # fmt: skip
EFFNET_FEATURES = 1280


def evaluate_run(
    run: Run,
    which: Which | None = None,
    *,
    checkpoint: Path | None = None,
    classes: int = 200,
    seed: int = 0,
    sheet: Path | None = None,
    inception: Path | None = None,
    npz: Path | None = None,
    agreement_only: bool = False,
) -> dict[str, Any]:
    """Measure one model, add it to ``run_dir/evaluation.json`` and return its entry.

    Every process of a run calls this: each generates its share of the samples, and the first one measures them.

    Args:
        which: the model of the run; none is the last that it has made. ``checkpoint``: a packed file instead, or a
            kept state of the teacher or student.
        classes, seed: agreement is over this many random classes, one sample each.
        sheet: also write a contact sheet of the first 64 of them there.
        inception: weights of Inception-v3, for FID, sFID, Inception score, precision and recall; by default
            ``evaluation.inception``.
        npz: also write the samples of every seed into this folder, as ADM's evaluation reads them.
        agreement_only: leave out the sets of ``evaluation.samples``, and so every distance.

    Raises:
        EvaluationError: a weight file or library is missing, or the model does not fit the configuration. StateError,
            CheckpointError, DataError: the model or the data cannot be read.
    """
    config = run.config
    chosen = which or ("student" if run.ema is not None else default_model(run))
    if run.ema is not None and chosen == "packed":
        raise EvaluationError("--ema is for the teacher and the student: a packed file holds one average")
    weights = inception or config.evaluation.inception
    has_photos = not holds_features(config)
    spectators: list[FeatureNetwork] = []  # of the first process, which measures

    def load_networks() -> None:
        # Before anything is generated: what is missing for the figures at the end is reported at the beginning.
        if has_photos:
            spectators.append(EfficientNetLite0())
        elif agreement_only or weights is None or config.evaluation.reference is None:
            raise EvaluationError(f"data.path {config.data.path} holds latents and no photos to compare with; set "
                                  "evaluation.inception and evaluation.reference")  # fmt: skip
        if weights is not None and not agreement_only:
            spectators.append(Inception(weights))
        if config.evaluation.dinov2 is not None and has_photos and not agreement_only:
            spectators.append(DinoV2(config.evaluation.dinov2))

    parallel.on_first(load_networks)
    sampler, digest = load_sampler(run, chosen, checkpoint)
    settings = config.sampler if checkpoint is None else sampler.defaults
    name = chosen if checkpoint is None else checkpoint.stem
    if run.ema is not None:
        name, digest = f"{name}-ema-{run.ema:g}", f"{digest}-ema-{run.ema:g}"
    seeds = () if agreement_only else config.evaluation.seeds
    sets = [_samples(config, sampler, settings, name, digest, each) for each in seeds]

    def measure() -> dict[str, Any]:
        entry: dict[str, Any] = {"model": name, "sha256": digest, "sampler": settings.model_dump(mode="json")}
        if has_photos:
            found = _agreement(run, sampler, settings, spectators[0], classes, seed, sheet)
            entry["agreement"] = {"seed": seed, **found}
        if sets:
            entry |= _distances(run, sets, spectators)
        if npz is not None:
            for each, samples in zip(seeds, sets, strict=True):
                samples.write_npz(npz / f"{name}-seed{each}.npz")
        _keep(run.path("evaluate"), name, entry)
        return entry

    return parallel.from_first(measure)


def _distances(run: Run, sets: list[SampleSet], networks: list[FeatureNetwork]) -> dict[str, Any]:
    settings = run.config.evaluation
    entry: dict[str, Any] = {"samples": settings.samples, "seeds": list(settings.seeds), "figures": {}}
    for network in networks:
        published = settings.reference if network.name == "inception" else None
        photos = reference(run.held_out, network) if published is None else published_reference(published, network)
        entry["figures"] |= _over_seeds(_MEASURES[network.name], sets, network, photos)
        if network.name == "inception":
            entry["reference"] = "data.path" if published is None else published.name
        entry.setdefault("photos", photos.pool.count)
        if network.name == "effnet" and run.held_out is not run:
            # Real, and of the same families, unlike the held-out ones: a model can hardly come nearer.
            trained = reference(run, network, settings.samples).pool
            distance = frechet_distance(trained, photos.pool)
            entry["training_images"] = {"fd_effnet": distance, "photos": trained.count}
    entry["cautions"] = _cautions(run.config, entry["photos"], {network.name for network in networks})
    return entry


def _agreement(
    run: Run,
    sampler: Sampler,
    settings: SamplerConfig,
    network: FeatureNetwork,
    count: int,
    seed: int,
    sheet: Path | None,
) -> dict[str, Any]:
    config = run.config
    classes = random_classes(count, config.model.valid_classes, seed)
    samples = generate(sampler, classes, seed, settings, config.evaluation.batch_size)
    if sheet is not None:
        write_sheet(samples, sheet)
    fits = config.model.num_classes == IMAGENET_CLASSES
    photos = reference(run.held_out, network)
    found = agreement(network(samples), classes, photos.gallery, classifier=fits)
    # A run on latents keeps no pixels, and its model does not repeat them.
    if config.data.vae is None:
        found |= pixel_agreement(samples, classes, run.held_out.photos(GALLERY_PHOTOS))
    return found


def _samples(
    config: TrainConfig, sampler: Sampler, settings: SamplerConfig, name: str, digest: str, seed: int
) -> SampleSet:
    return generate_to_disk(
        sampler,
        config.run_dir / "evaluation" / "samples" / name / f"seed-{seed}",
        count=config.evaluation.samples,
        seed=seed,
        batch_size=config.evaluation.batch_size,
        identity=digest,
        settings=settings,
    )


def _over_seeds(measure: Measure, sets: list[SampleSet], network: FeatureNetwork, photos: Reference) -> dict[str, Any]:
    by_seed = [measure(samples, network, photos) for samples in sets]
    return {name: Estimate(tuple(each[name] for each in by_seed)).as_dict() for name in by_seed[0]}


def _cautions(config: TrainConfig, photos: int, networks: set[str]) -> list[str]:
    """What a reader must know before comparing the figures with anyone's."""
    cautions = []
    fewest = min(config.evaluation.samples, photos)
    if "effnet" in networks:
        cautions.append("fd_effnet is a Fréchet distance on EfficientNet-Lite0 features; it is not FID and no FID "
                        "compares to it")  # fmt: skip
        if fewest <= EFFNET_FEATURES:
            cautions.append(
                f"{fewest} samples or photos are no more than the {EFFNET_FEATURES} features: the covariance is "
                "singular and fd_effnet is biased upwards; compare at equal numbers only"
            )
    if networks != {"effnet"} and config.evaluation.samples < 50_000:
        cautions.append("FID, sFID and FD-DINOv2 are usually given of 50,000 samples; of fewer they are higher")
    if len(config.evaluation.seeds) < 2:
        cautions.append("one seed: no interval")
    return cautions


def _keep(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Add ``entry`` to the models of ``path``, and every other's ratio to the teacher where they are comparable."""
    models = read_entries(path)
    models[name] = entry
    ratios = {other: _ratios(found, models[_TEACHER]) for other, found in models.items() if _TEACHER in models}
    content = {"models": models, "ratio_to_teacher": {other: found for other, found in ratios.items() if found}}
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise EvaluationError(
            f"{path}: cannot be written ({one_line(error)}); free some space and run again"
        ) from error


def read_entries(path: Path) -> dict[str, Any]:
    """The entries of an earlier ``evaluation.json``, by model; none if it is missing or not one."""
    try:
        models = read_json(path)["models"]
        return dict(models)
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _ratios(entry: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
    """Distances over the teacher's, seed by seed; nothing if the two were measured differently."""
    alike = all(entry.get(key) == teacher.get(key) for key in ("samples", "seeds", "sampler", "photos"))
    if entry is teacher or not alike:
        return {}
    found = {}
    for name in ("fd_effnet", "fid", "sfid", "fd_dinov2"):
        if name in entry.get("figures", {}) and name in teacher.get("figures", {}):
            estimate = ratio(entry["figures"][name]["by_seed"], teacher["figures"][name]["by_seed"])
            if estimate is not None:
                found[name] = estimate.as_dict()
    return found
