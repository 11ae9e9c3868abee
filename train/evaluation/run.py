"""Everything that is measured of one model of a run, and the file that keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from robuq_core.files import read_json, replacing
from train import parallel
from train.config import TrainConfig
from train.data import holds_features
from train.evaluation.figures import (
    IMAGENET_CLASSES,
    RunningMoments,
    agreement,
    estimate,
    fid,
    frechet_distance,
    inception_score,
    nearest_labels,
    pixel_agreement,
    precision_and_recall,
)
from train.evaluation.networks import DinoV2, EfficientNetLite0, EvaluationError, FeatureNetwork, Features, Inception
from train.evaluation.reference import GALLERY_PHOTOS, Reference, published_reference, reference
from train.evaluation.samples import (
    SampleSet,
    default_model,
    generate,
    generate_to_disk,
    load_sampler,
    random_classes,
    write_sheet,
)
from train.logs import one_line
from train.run import Run

EFFNET_FEATURES = 1280
_DISTANCES = ("fd_effnet", "fid", "sfid", "fd_dinov2")


def evaluate_run(
    run: Run,
    which: str | None = None,
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

    Every process of a run calls this: each generates its share of the samples and computes their features; the first
    one does the rest.

    Args:
        which: the model of the run; none is the last that it has made. ``checkpoint``: a packed file instead, or a
            kept state of the teacher or student.
        classes, seed: agreement is over this many random classes, one sample each.
        sheet: also write a contact sheet of the first 64 of them there.
        inception: weights of Inception-v3, for FID, sFID, Inception score, precision and recall; by default
            ``evaluation.inception``.
        npz: also write the samples of every seed into this folder, as ADM's evaluation reads them.
        agreement_only: leave out the sets of ``evaluation.samples``, and so every distance.

    Raises EvaluationError if a weight file or library is missing, or the model does not fit the configuration;
    StateError, CheckpointError or DataError if the model or the data cannot be read.
    """
    config = run.config
    chosen = which or ("student" if run.ema is not None else default_model(run))
    if run.ema is not None and chosen == "packed":
        raise EvaluationError("--ema is for the teacher and the student: a packed file holds one average")
    # Before anything is generated: what is missing for the figures at the end is reported at the beginning.
    networks, weights = list[FeatureNetwork](), inception or config.evaluation.inception
    parallel.on_first(lambda: networks.extend(_networks(config, weights, agreement_only)))
    networks = networks or _networks(config, weights, agreement_only)
    sampler, digest = load_sampler(run, chosen, checkpoint)
    settings = config.sampler if checkpoint is None else sampler.defaults
    name = chosen if checkpoint is None else checkpoint.stem
    if run.ema is not None:
        name, digest = f"{name}-ema-{run.ema:g}", f"{digest}-ema-{run.ema:g}"
    batch_size, sets = config.evaluation.batch_size, dict[int, SampleSet]()
    for each in () if agreement_only else config.evaluation.seeds:
        folder = config.run_dir / "evaluation" / "samples" / name / f"seed-{each}"
        count = config.evaluation.samples
        sets[each] = generate_to_disk(
            sampler, folder, count=count, seed=each, batch_size=batch_size, identity=digest, settings=settings
        )
        for network in networks:
            sets[each].store_features(network)

    def measure() -> dict[str, Any]:
        entry: dict[str, Any] = {"model": name, "sha256": digest, "sampler": settings.model_dump(mode="json")}
        if not holds_features(config):
            drawn = random_classes(classes, config.model.valid_classes, seed)
            samples = generate(sampler, drawn, seed, settings, batch_size)
            if sheet is not None:
                write_sheet(samples, sheet)
            photos, fits = reference(run.held_out, networks[0]), config.model.num_classes == IMAGENET_CLASSES
            found = agreement(networks[0](samples), drawn, photos.gallery, classifier=fits)
            # A run on latents keeps no pixels, and its model does not repeat them.
            pixels = {} if config.data.vae else pixel_agreement(samples, drawn, run.held_out.photos(GALLERY_PHOTOS))
            entry["agreement"] = {"seed": seed, **found, **pixels}
        if sets:
            entry |= _distances(run, list(sets.values()), networks)
        for each, samples_of_seed in sets.items() if npz is not None else ():
            samples_of_seed.write_npz(Path(npz or "") / f"{name}-seed{each}.npz")
        _keep(run.path("evaluate"), name, entry)
        return entry

    return parallel.from_first(measure)


def _networks(config: TrainConfig, inception: Path | None, agreement_only: bool) -> list[FeatureNetwork]:
    settings, has_photos = config.evaluation, not holds_features(config)
    found: list[FeatureNetwork] = []
    if has_photos:
        found.append(EfficientNetLite0())
    elif agreement_only or inception is None or settings.reference is None:
        raise EvaluationError(f"data.path {config.data.path} holds latents and no photos to compare with; set "
                              "evaluation.inception and evaluation.reference")  # fmt: skip
    if inception is not None and not agreement_only:
        found.append(Inception(inception))
    if settings.dinov2 is not None and has_photos and not agreement_only:
        found.append(DinoV2(settings.dinov2))
    return found


def _distances(run: Run, sets: list[SampleSet], networks: list[FeatureNetwork]) -> dict[str, Any]:
    settings = run.config.evaluation
    entry: dict[str, Any] = {"samples": settings.samples, "seeds": list(settings.seeds), "figures": {}}
    for network in networks:
        published = settings.reference if network.name == "inception" else None
        photos = reference(run.held_out, network) if published is None else published_reference(published, network)
        by_seed = [set_figures(samples, network, photos) for samples in sets]
        entry["figures"] |= {name: estimate([each[name] for each in by_seed]) for name in by_seed[0]}
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


def set_figures(samples: SampleSet, network: FeatureNetwork, photos: Reference) -> dict[str, float]:
    """The figures of ``samples`` that the features of ``network`` are for, by name; see docs/evaluation.md."""
    pool, spatial = RunningMoments(), RunningMoments()
    kept: list[Features] = []
    right = 0
    for features in samples.features(network):
        pool.add(features.pool)
        if network.name == "effnet":
            wanted = torch.from_numpy(samples.labels[pool.count - len(features) : pool.count])
            right += int((nearest_labels(features.pool, photos.gallery) == wanted).sum())
        elif features.spatial is not None:
            spatial.add(features.spatial)
            kept.append(Features(features.pool, features.logits))
    if network.name != "inception":
        found = {f"fd_{network.name}": frechet_distance(pool.result(), photos.pool)}
        return found | ({"nearest": right / len(samples)} if network.name == "effnet" else {})
    assert photos.spatial is not None
    precision, recall = precision_and_recall(torch.cat([each.pool for each in kept]), photos.gallery.features)
    return {
        "fid": fid(pool.result(), photos.pool),
        "sfid": frechet_distance(spatial.result(), photos.spatial),
        "inception_score": inception_score(torch.cat([each.logits for each in kept])),
        "precision": precision,
        "recall": recall,
    }


def _cautions(config: TrainConfig, photos: int, networks: set[str]) -> list[str]:
    """What a reader must know before comparing the figures with anyone's."""
    cautions, fewest = list[str](), min(config.evaluation.samples, photos)
    if "effnet" in networks:
        cautions.append("fd_effnet is a Fréchet distance on EfficientNet-Lite0 features; it is not FID and no FID "
                        "compares to it")  # fmt: skip
        if fewest <= EFFNET_FEATURES:
            cautions.append(f"{fewest} samples or photos are no more than the {EFFNET_FEATURES} features: the "
                            "covariance is singular and fd_effnet is biased upwards; compare at equal numbers only"
                            )  # fmt: skip
    if networks != {"effnet"} and config.evaluation.samples < 50_000:
        cautions.append("FID, sFID and FD-DINOv2 are usually given of 50,000 samples; of fewer they are higher")
    if len(config.evaluation.seeds) < 2:
        cautions.append("one seed: no interval")
    return cautions


def _keep(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Add ``entry`` to the models of ``path``, and every other's ratio to the teacher where they are comparable."""
    try:
        models = dict(read_json(path)["models"])
    except (OSError, ValueError, KeyError, TypeError):
        models = {}
    models[name] = entry
    ratios = {other: _ratios(found, models["teacher"]) for other, found in models.items()
              if other != "teacher" and "teacher" in models}  # fmt: skip
    content = {"models": models, "ratio_to_teacher": {other: found for other, found in ratios.items() if found}}
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be written ({one_line(error)}); free some space and run again"
                              ) from error  # fmt: skip


def _ratios(entry: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
    """Distances over the teacher's, seed by seed; nothing if the two were measured differently."""
    if any(entry.get(key) != teacher.get(key) for key in ("samples", "seeds", "sampler", "photos")):
        return {}
    found = {}
    for name in _DISTANCES:
        if name in entry.get("figures", {}) and name in teacher.get("figures", {}):
            ours, theirs = (each["figures"][name]["by_seed"] for each in (entry, teacher))
            if all(theirs):
                found[name] = estimate([a / b for a, b in zip(ours, theirs, strict=True)])
    return found
