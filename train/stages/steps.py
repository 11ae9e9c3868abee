"""What each stage of a run reads, does and writes.

Order and staleness are :mod:`train.stages.run`'s business, the numbers those of the modules that are called here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from robuq_core.checkpoint import Description, Header, layer_macs, write_checkpoint
from robuq_core.config import DecoderKind, StrictModel
from robuq_core.files import replacing
from robuq_core.models.dit import DiT
from robuq_core.models.quant_linear import quantize_model
from train.config import ConfigError, StageConfig, TrainConfig
from train.data import BatchSource, Dataset, data_digest, open_dataset, prepare
from train.parallel import on_first
from train.provenance import run_provenance
from train.stages.class_table import initialise_class_table
from train.stages.models import (
    at_search_width,
    bits_path,
    load_student,
    load_teacher,
    load_warmup,
    packed_path,
    qat_path,
    read_class_names,
    resolved,
    sensitivity_path,
    teacher_path,
    warm_start,
    warmup_path,
)
from train.stages.records import file_digest, settings_of
from train.state import StateError, exclusive, load_state, save_state
from train.trainer import Trainer

Note = Callable[[str], None]

# What every training stage depends on besides its own section.
_TRAINING = ("seed", "class_dropout", "model", "diffusion.prediction_type", "data.flip_probability",
             "data.colour_jitter", "data.supersample", "precision")  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One step from files of the run folder to others.

    ``reads`` and ``settings``: files of earlier stages and configuration keys that the result depends on. ``trains``:
    long work that nothing throws away unasked, that continues from a saved state, and that many processes share.
    ``together``: other work that they share.
    ``starts_from``: the key of a file from elsewhere, and that file. ``resolve``: the configuration that it works on.
    """

    name: str
    writes: str
    reads: Callable[[TrainConfig], list[Path]]
    settings: Callable[[TrainConfig], tuple[str, ...]]
    work: Callable[[TrainConfig, Note], None]
    trains: bool = False
    together: bool = False
    on_data: Callable[[TrainConfig], bool] = lambda config: True
    starts_from: Callable[[TrainConfig], tuple[str, Path | None]] | None = None
    resolve: Callable[[TrainConfig], TrainConfig] = lambda config: config

    def output(self, config: TrainConfig) -> Path:
        return config.run_dir / self.writes

    def inputs(self, config: TrainConfig, note: Note) -> dict[str, Any]:
        """Everything that the result depends on, by name; prepares the data if the stage needs them.

        Raises:
            UserError: a file of an earlier stage is missing, or the data cannot be used.
        """
        found: dict[str, Any] = {path.name: file_digest(path) for path in self.reads(config)}
        found.update(settings_of(config, *self.settings(config)))
        if self.on_data(config):
            index = prepare(config, note)
            found.update({f"data.{key}": value for key, value in index.made_with.items()})
            found["content of data.path"] = index.digests["data"]
            found["content of data.vae"] = index.digests.get("vae")
        if self.starts_from is not None:
            key, path = self.starts_from(config)
            found[f"content of {key}"] = None if path is None else _start_digest(key, path)
        return found


def _start_digest(key: str, path: Path) -> str:
    if not path.exists():
        raise StateError(f"{key}: {path} does not exist")
    return data_digest(path) if path.is_dir() else file_digest(path)


def warm_start_path(config: TrainConfig) -> Path | None:
    """The state that QAT starts from in place of the teacher, if it does."""
    start = config.qat.warm_start
    return start if start is None or isinstance(start, Path) else warmup_path(config)


def train_teacher_now(config: TrainConfig, note: Note) -> None:
    read_class_names(config)  # export needs them: better said now than after the training
    pretrained = config.teacher.pretrained
    if pretrained is not None:
        on_first(lambda: _take_over(config, pretrained, note))
        return
    dataset = open_dataset(config, prepare(config, note))
    torch.manual_seed(config.seed)
    model = DiT(config.model)
    initialise_class_table(model, config, dataset)
    _train(config, config.teacher, teacher_path(config), model, dataset)


def _take_over(config: TrainConfig, path: Path, note: Note) -> None:
    """Write ``teacher.pt`` from weights of elsewhere, as a state that no step was trained on.

    Raises:
        ConfigError: they are of another shape than ``model``, or of another process than ``diffusion``.
        WeightsError: the file cannot be read, or says that its network predicts something else.
    """
    from robuq_core.models.adapters import read_weights

    # A folder says what it holds; an official file may not.
    said: dict[str, Any] = {}
    if not path.is_dir():
        said = {"num_heads": config.model.num_heads, "prediction": config.diffusion.prediction_type,
                "num_classes": config.model.num_classes}  # fmt: skip
        if config.diffusion.prediction_type == "flow":
            said["flavour"] = config.model.flavour
    weights = read_weights(path, **said)
    different = _differences("model", config.model, weights.config)
    if weights.diffusion is not None and weights.layout != "official":  # whose process says nothing of clipping
        different += _differences("diffusion", config.diffusion, weights.diffusion)
    if different:
        raise ConfigError(f"teacher.pretrained {path}: {'; '.join(different)}; write into the configuration what the "
                          "weights are")  # fmt: skip
    model = weights.model()
    averaged = {name: value.detach() for name, value in model.named_parameters()}
    history = [{"from_step": 0, "pretrained": path.name, **run_provenance(config)}]
    save_state(teacher_path(config), step=0, model=model.state_dict(), ema=averaged, optimiser={},
               history=history)  # fmt: skip
    note(f"teacher: taken from {path}")


def _differences(section: str, ours: StrictModel, theirs: StrictModel) -> list[str]:
    there = theirs.model_dump()
    return [
        f"{section}.{key} is {there[key]} there, not {value}"
        for key, value in ours.model_dump().items()
        if there[key] != value
    ]


def warmup_now(config: TrainConfig, note: Note) -> None:
    read_class_names(config)
    student = quantize_model(load_teacher(config), config.quant)
    _train_student(config, config.warmup, warmup_path(config), student, note)


def qat_now(config: TrainConfig, note: Note) -> None:
    read_class_names(config)
    student = quantize_model(load_teacher(config), config.quant)
    start = warm_start_path(config)
    if start is not None and not qat_path(config).exists():
        warm_start(config, student, start)
        note(f"qat: starts from {start}")
    _train_student(config, config.qat, qat_path(config), student, note)


def _train_student(config: TrainConfig, stage: StageConfig, path: Path, student: DiT, note: Note) -> None:
    teacher = load_teacher(config) if stage.distill_weight else None
    _train(config, stage, path, student, open_dataset(config, prepare(config, note)), teacher)


def _train(
    config: TrainConfig, stage: StageConfig, path: Path, model: DiT, dataset: Dataset, teacher: DiT | None = None
) -> None:
    source = BatchSource(dataset, config.data, config.model.input_size, stage.batch_size, config.seed)
    with exclusive(path):
        Trainer(config, stage, model, source, path, teacher).run()


def sensitivity_now(config: TrainConfig, note: Note) -> None:
    from train.sensitivity import fixed_set, measure_sensitivity

    if config.sensitivity.after == "teacher":
        student = quantize_model(load_teacher(config), config.quant)
    else:
        student = load_warmup(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = config.sensitivity
    # The points are to be those of the data, not of their augmentation.
    still = config.data.model_copy(update={"flip_probability": 0.0, "colour_jitter": 0.0})
    dataset = open_dataset(config, prepare(config, note))
    source = BatchSource(dataset, still, config.model.input_size, settings.batch_size, config.seed)
    batches = fixed_set(source, settings.samples, config.seed, device, config.diffusion.prediction_type)
    found = measure_sensitivity(student.to(device), load_teacher(config).to(device), batches, config.diffusion,
                                bits=settings.bits, reference_bits=config.quant.activation_bits,
                                guidance_scale=settings.guidance_scale)  # fmt: skip
    found.save(sensitivity_path(config))
    note(f"sensitivity: {len(found.rise['teacher_mse'])} layers at {len(settings.bits)} widths each, the others at "
         f"{found.reference_bits} bits")  # fmt: skip


def allocate_now(config: TrainConfig, note: Note) -> None:
    from rich.console import Console

    from train.allocate import METHODS, AllocationError, allocate, layer_table, resample, type_table
    from train.allocation_plot import plot_allocations
    from train.sensitivity import Sensitivity

    budget = config.allocate.average_bits
    if budget is None:
        raise ConfigError(
            "allocate.average_bits is null: set the average that the layers share, or leave this stage out"
        )
    measured = Sensitivity.load(sensitivity_path(config))
    losses = measured.rise[config.sensitivity.metric]
    macs = layer_macs(config.model)
    chosen = allocate(losses, macs, budget, config.allocate.method)
    compared = [chosen]
    for method in METHODS:
        if method != chosen.method:
            with suppress(AllocationError):  # uniform may have no width that fits
                compared.append(allocate(losses, macs, budget, method))
    others = {each.method: each.as_dict() for each in compared[1:]}
    interval = resample(measured.by_batch[config.sensitivity.metric], measured.batch_sizes, macs, chosen)
    tree = {**chosen.as_dict(), "compared": others, "resampled": asdict(interval)}
    with replacing(bits_path(config)) as temporary:
        temporary.write_text(json.dumps(tree, indent=1) + "\n")
    plot_allocations(compared, bits_path(config).with_suffix(".png"))
    console = Console()
    console.print(layer_table(compared, interval))
    console.print(type_table(compared))
    note(f"allocate: {chosen.average_bits:.3f} bits on average, of at most {budget}; {interval.summary}")


def export(config: TrainConfig, path: Path) -> Header:
    """Pack the student into ``path``; the header says how it was made.

    Raises:
        StateError: no usable ``qat.pt`` or ``teacher.pt``. ConfigError: class names that do not fit the model.
    """
    model, student = load_student(config)
    teacher_state = load_state(teacher_path(config))
    provenance = {
        "teacher": {"step": teacher_state["step"], "history": teacher_state["history"]},
        "qat": student,
    }
    quant, names = resolved(config).quant, read_class_names(config)
    draws: DecoderKind = "pixels" if config.data.vae is None else "latent"
    about = Description(quant, config.diffusion, config.sampler, names, provenance, draws)
    return write_checkpoint(path, model, about)


def export_now(config: TrainConfig, note: Note) -> None:
    path = packed_path(config)
    export(config, path)
    note(f"export: wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")


def evaluate_now(config: TrainConfig, note: Note) -> None:
    from train.evaluation.run import evaluate_run

    for which in ("teacher", "packed" if is_packable(config) else "student"):
        entry = evaluate_run(config, which)
        figures = ", ".join(f"{name} {each['mean']:.4g}" for name, each in entry["figures"].items())
        on_first(partial(note, f"evaluate: {which}: {figures}"))


def is_packable(config: TrainConfig) -> bool:
    """Whether the packed runtime knows the configured quantiser; the others are for study alone."""
    return config.quant.activation == "gaussian"


def _evaluate_reads(config: TrainConfig) -> list[Path]:
    return [teacher_path(config), packed_path(config) if is_packable(config) else qat_path(config)]


def _teacher_settings(config: TrainConfig) -> tuple[str, ...]:
    if config.teacher.pretrained is not None:
        return ("model", "diffusion.prediction_type")
    return (*_TRAINING, "class_init", "class_init_std", "teacher")


def _sensitivity_reads(config: TrainConfig) -> list[Path]:
    warm = [warmup_path(config)] if config.sensitivity.after == "warmup" else []
    return [teacher_path(config), *warm]


def _qat_reads(config: TrainConfig) -> list[Path]:
    warm = [warmup_path(config)] if config.qat.warm_start == "warmup" else []
    return [teacher_path(config), *warm]


STAGES = (
    Stage(
        "teacher",
        "teacher.pt",
        reads=lambda config: [],
        settings=_teacher_settings,
        work=train_teacher_now,
        trains=True,
        on_data=lambda config: config.teacher.pretrained is None,
        starts_from=lambda config: ("teacher.pretrained", config.teacher.pretrained),
    ),
    Stage(
        "warmup",
        "warmup.pt",
        reads=lambda config: [teacher_path(config)],
        settings=lambda config: (*_TRAINING, "quant", "warmup"),
        work=warmup_now,
        trains=True,
        resolve=at_search_width,
    ),
    Stage(
        "sensitivity",
        "sensitivity.json",
        reads=_sensitivity_reads,
        settings=lambda config: ("seed", "model", "diffusion.prediction_type", "quant", "sensitivity.bits",
                                 "sensitivity.samples", "sensitivity.batch_size", "sensitivity.after",
                                 "sensitivity.guidance_scale"),
        work=sensitivity_now,
        resolve=at_search_width,
    ),
    Stage(
        "allocate",
        "bits.json",
        reads=lambda config: [sensitivity_path(config)],
        settings=lambda config: ("model", "allocate", "sensitivity.metric"),
        work=allocate_now,
        on_data=lambda config: False,
    ),
    Stage(
        "qat",
        "qat.pt",
        reads=_qat_reads,
        settings=lambda config: (*_TRAINING, "quant", "qat"),
        work=qat_now,
        trains=True,
        starts_from=lambda config: ("qat.warm_start", warm_start_path(config)),
        resolve=resolved,
    ),
    Stage(
        "export",
        "model.safetensors",
        reads=lambda config: [teacher_path(config), qat_path(config)],
        settings=lambda config: ("model", "quant", "diffusion", "sampler", "data.class_names"),
        work=export_now,
        on_data=lambda config: False,
        resolve=resolved,
    ),
    Stage(
        "evaluate",
        "evaluation.json",
        reads=_evaluate_reads,
        settings=lambda config: ("model", "diffusion", "sampler", "evaluation"),
        work=evaluate_now,
        together=True,
    ),
)  # fmt: skip
BY_NAME = {stage.name: stage for stage in STAGES}
