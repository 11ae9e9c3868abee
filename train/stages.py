"""The stages of a run: what each reads, depends on and does. :mod:`train.run` decides which of them run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from robuq_core.checkpoint import Description, Header, write_checkpoint
from robuq_core.config import DecoderKind, QuantConfig, StrictModel
from robuq_core.files import replacing
from robuq_core.models.dit import DiT
from robuq_core.models.shapes import layer_macs
from train.config import ConfigError, StageConfig, TrainConfig
from train.data import BatchSource, Dataset
from train.parallel import on_first, training_device
from train.provenance import run_provenance
from train.state import EMA, Saver, State, exclusive, latest_state, read_state
from train.trainer import Trainer, meaning_of_weights

if TYPE_CHECKING:
    from train.run import Run

Inputs = dict[str, Any]

# What every training stage depends on besides its own section.
_TRAINING = ("seed", "class_dropout", "model", "diffusion.prediction_type", "data.flip_probability", "precision")


@dataclass(frozen=True)
class Stage:
    """One step from outputs of earlier stages to an output of its own.

    Attributes:
        writes: the file, or folder of states, below ``run_dir``.
        work: does it, for the configuration that ``resolve`` gives.
        reads: the stages whose outputs it reads. settings: the keys that the result depends on.
        trains: long work of all processes, which continues from saved states and is never discarded unasked.
        together: other work that all processes share.
        on_data: whether it reads the data. starts_from: files from elsewhere, by the key that names them.
        skipped: why a configuration does not call for it, if it does not.
    """

    name: str
    writes: str
    work: Callable[[Run, TrainConfig, Inputs], None]
    reads: Callable[[TrainConfig], tuple[str, ...]]
    settings: Callable[[TrainConfig], tuple[str, ...]]
    trains: bool = False
    together: bool = False
    on_data: Callable[[TrainConfig], bool] = lambda config: True
    starts_from: Callable[[Run], dict[str, Path | None]] = lambda run: {}
    resolve: Callable[[Run], TrainConfig] = lambda run: run.config
    skipped: Callable[[TrainConfig], str | None] = lambda config: None


def at_search_width(config: TrainConfig) -> TrainConfig:
    """``config`` with the uniform width that widths are searched around: the one nearest to the budget, if any.

    The warm-up trains at it, and sensitivities are measured with all other layers at it.
    """
    budget = config.allocate.average_bits
    if budget is None:
        return config
    quant = config.quant.model_copy(update={"activation_bits": math.floor(budget + 0.5)})
    return config.model_copy(update={"quant": quant})


def quant_settings(quant: QuantConfig, *without: str) -> dict[str, Any]:
    """The settings that give the weights of a student their meaning, by dotted key."""
    tree = quant.model_dump(mode="json")
    return {f"quant.{key}": value for key, value in tree.items() if key not in without}


# teacher


def train_teacher(run: Run, config: TrainConfig, inputs: Inputs) -> None:
    pretrained = config.teacher.pretrained
    if pretrained is not None:
        on_first(lambda: _take_over(run, config, pretrained, inputs))
        return
    torch.manual_seed(config.seed)
    model = DiT(config.model)
    initialise_class_table(model, config, run.dataset)
    _train(run, config, "teacher", model, inputs)


def _take_over(run: Run, config: TrainConfig, path: Path, inputs: Inputs) -> None:
    """Save weights from elsewhere as the state of a teacher that no step was trained on.

    Raises ConfigError if they are not as ``model`` and ``diffusion`` say, WeightsError if the file cannot be read, or
    says that its network predicts something else.
    """
    from robuq_core.models.adapters import read_weights

    # A folder says what it holds; an official file may not.
    known: dict[str, Any] = {}
    if not path.is_dir():
        known = {"num_heads": config.model.num_heads, "prediction": config.diffusion.prediction_type,
                 "num_classes": config.model.num_classes}  # fmt: skip
        if config.diffusion.prediction_type == "flow":
            known["flavour"] = config.model.flavour
    weights = read_weights(path, **known)
    different = _differences("model", config.model, weights.config)
    if weights.diffusion is not None and weights.layout != "official":  # whose process says nothing of clipping
        different += _differences("diffusion", config.diffusion, weights.diffusion)
    if different:
        raise ConfigError(f"teacher.pretrained {path}: {'; '.join(different)}; write into the configuration what the "
                          "weights are")  # fmt: skip
    model, saver = weights.model(), Saver()
    history = [{"from_step": 0, "pretrained": path.name, **run_provenance(config, None)}]
    folder, made_from = run.path("teacher") / "step-0000000", {**meaning_of_weights(config), **inputs}
    with exclusive(run.path("teacher")):
        state = State(folder=folder, step=0, finished=True, inputs=made_from, history=history)
        average = {f"ema.{name}": value for name, value in EMA(model, 0).shadow.items()}
        saver.save(state, {**{f"model.{name}": value for name, value in model.state_dict().items()}, **average})
        saver.wait()
    run.note(f"teacher: taken from {path}")


def _differences(section: str, ours: StrictModel, theirs: StrictModel) -> list[str]:
    there = theirs.model_dump()
    return [
        f"{section}.{key} is {there[key]} there, not {value}"
        for key, value in ours.model_dump().items()
        if there[key] != value
    ]


@torch.no_grad()
def initialise_class_table(model: DiT, config: TrainConfig, dataset: Dataset) -> None:
    """Spread the class table as ``class_init`` asks: Gaussian, or principal components of the class means.

    ``pca`` gives classes with like images like codes, so that what is learnt of one serves the others. The
    components are weighted by the fourth root of their standard deviation: the leading ones still lead, and the
    fine ones stay above the noise of a 4-bit adaLN input. Overall spread: ``class_init_std``.
    """
    table = model.y_embedder.embedding_table.weight
    if config.class_init == "normal":
        torch.nn.init.normal_(table, std=config.class_init_std)
        return
    means = _class_means(dataset, config.model.num_classes)
    u, s, _ = torch.linalg.svd(means - means.mean(dim=0), full_matrices=False)
    kept = min(table.shape[1], int((s > 1e-9 * s[0]).sum()))  # below that share of the first it is rounding noise
    # The SVD leaves each component's sign open; fix it, so that a run does not depend on the LAPACK build.
    u = u * u.gather(0, u.abs().argmax(dim=0, keepdim=True)).sign()
    codes = (u[:, :kept] * s[:kept] ** 0.25).float()
    table.zero_()
    table[: len(codes), :kept] = codes / codes.std() * config.class_init_std


def _class_means(dataset: Dataset, classes: int, batch: int = 256) -> Tensor:
    """Float64 ``[classes, values of a sample]``."""
    sums = torch.zeros(classes, dataset.means(slice(1)).numel(), dtype=torch.float64)
    for first in range(0, len(dataset), batch):
        rows = slice(first, first + batch)
        sums.index_add_(0, dataset.labels[rows], dataset.means(rows).flatten(1).double())
    return sums / torch.bincount(dataset.labels, minlength=classes).clamp(min=1)[:, None]


# warmup and qat


def train_warmup(run: Run, config: TrainConfig, inputs: Inputs) -> None:
    _train(run, config, "warmup", run.quantized(run.teacher(), config.quant), inputs)


def train_qat(run: Run, config: TrainConfig, inputs: Inputs) -> None:
    student = run.quantized(run.teacher(), config.quant)
    start = warm_start(run)
    if start is not None and not any(run.path("qat").glob("step-*")):
        state = read_state(start) if (start / "state.json").exists() else latest_state(start)
        # Whatever widths it was trained at: not of another model, rotation or low-rank branch.
        same = quant_settings(config.quant, "activation_bits", "adaln_bits", "bits")
        state.load_average(student, {**meaning_of_weights(config), **same})
        run.note(f"qat: starts from {state.folder}")
    _train(run, config, "qat", student, inputs)


def warm_start(run: Run) -> Path | None:
    """The state, or folder of states, that QAT starts from in place of the teacher, if it does."""
    start = run.config.qat.warm_start
    return start if start is None or isinstance(start, Path) else run.path("warmup")


def _train(run: Run, config: TrainConfig, name: str, model: DiT, inputs: Inputs) -> None:
    stage: StageConfig = getattr(config, name)
    teacher = run.teacher() if name != "teacher" and stage.distill_weight else None
    watch = None
    if stage.eval_every is not None:
        from train.watch import Watch

        watch = Watch(run, config, name)
    with exclusive(run.path(name)):
        source = BatchSource(run.dataset, config.data.flip_probability, stage.batch_size, config.seed)
        Trainer(config, stage, model, source, run.path(name), teacher=teacher, inputs=inputs, watch=watch).run()


# sensitivity and allocate


def measure(run: Run, config: TrainConfig, inputs: Inputs) -> None:
    from train.sensitivity import measure_sensitivity

    settings = config.sensitivity
    student = run.warmed_up() if settings.after == "warmup" else run.quantized(run.teacher(), config.quant)
    device = training_device()
    batches = run.fixed_points(settings.samples, settings.batch_size, config.seed, device)
    found = measure_sensitivity(student.to(device), run.teacher().to(device), batches, config.diffusion,
                                bits=settings.bits, reference_bits=config.quant.activation_bits,
                                guidance_scale=settings.guidance_scale)  # fmt: skip
    found.save(run.path("sensitivity"))
    run.note(f"sensitivity: {len(found.rise['teacher_mse'])} layers at {len(settings.bits)} widths each, the others at "
             f"{found.reference_bits} bits")  # fmt: skip


def choose_bits(run: Run, config: TrainConfig, inputs: Inputs) -> None:
    from rich.console import Console

    from train.allocate import METHODS, AllocationError, allocate, layer_table, plot_allocations, resample, type_table
    from train.sensitivity import Sensitivity

    budget, path = config.allocate.average_bits, run.path("allocate")
    if budget is None:
        raise ConfigError("allocate.average_bits is null: set the average that the layers share, or skip this stage")
    measured = Sensitivity.load(run.path("sensitivity"))
    losses = measured.rise[config.sensitivity.metric]
    macs = layer_macs(config.model)
    chosen = allocate(losses, macs, budget, config.allocate.method)
    compared = [chosen]
    for method in METHODS:
        if method != chosen.method:
            with suppress(AllocationError):  # uniform may have no width that fits
                compared.append(allocate(losses, macs, budget, method))
    others = {each.method: asdict(each) for each in compared[1:]}
    interval = resample(measured.by_batch[config.sensitivity.metric], measured.batch_sizes, macs, chosen)
    tree = {**asdict(chosen), "compared": others, "resampled": asdict(interval)}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(tree, indent=1) + "\n")
    plot_allocations(compared, path.with_suffix(".png"))
    console = Console()
    console.print(layer_table(compared, interval))
    console.print(type_table(compared))
    run.note(f"allocate: {chosen.average_bits:.3f} bits on average, of at most {budget}; {interval.summary}")


# export and evaluate


def export(run: Run, path: Path) -> Header:
    """Pack the student into ``path``; the header says how it was made.

    Raises StateError without a usable state of qat and the teacher, ConfigError for class names that do not fit.
    """
    states = {name: latest_state(run.path(name)) for name in ("teacher", "qat")}
    provenance = {name: {"step": state.step, "history": state.history} for name, state in states.items()}
    draws: DecoderKind = "pixels" if run.config.data.vae is None else "latent"
    about = Description(run.quant, run.config.diffusion, run.config.sampler, run.class_names, provenance, draws)
    return write_checkpoint(path, run.student(), about)


def pack(run: Run, config: TrainConfig, inputs: Inputs) -> None:
    path = run.path("export")
    export(run, path)
    run.note(f"export: wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")


def evaluate(run: Run, config: TrainConfig, inputs: Inputs) -> None:
    from train.evaluation.run import evaluate_run

    for which in ("teacher", "packed" if is_packable(config) else "student"):
        entry = evaluate_run(run, which)
        figures = ", ".join(f"{name} {each['mean']:.4g}" for name, each in entry["figures"].items())
        run.note(f"evaluate: {which}: {figures}")


# The table of stages: what each depends on.


def is_packable(config: TrainConfig) -> bool:
    """Whether the packed runtime knows the configured quantiser; the others are for study alone."""
    return config.quant.activation == "gaussian"


def _teacher_settings(config: TrainConfig) -> tuple[str, ...]:
    if config.teacher.pretrained is not None:
        return ("model", "diffusion.prediction_type")
    return (*_TRAINING, "class_init", "class_init_std", "teacher")


def _no_search(config: TrainConfig) -> str | None:
    searched = config.allocate.average_bits is not None
    return None if searched else "allocate.average_bits is null: every layer has quant.activation_bits"


def _no_warmup(config: TrainConfig) -> str | None:
    searched = config.allocate.average_bits is not None and config.sensitivity.after == "warmup"
    return None if searched or config.qat.warm_start == "warmup" else "nothing starts from it"


def _not_packable(config: TrainConfig) -> str | None:
    activation = config.quant.activation
    return None if is_packable(config) else f"the packed runtime does not know quant.activation {activation}"


STAGES = (
    Stage("teacher", "states/teacher", train_teacher, trains=True,
          reads=lambda config: (), settings=_teacher_settings,
          on_data=lambda config: config.teacher.pretrained is None,
          starts_from=lambda run: {"teacher.pretrained": run.config.teacher.pretrained}),
    Stage("warmup", "states/warmup", train_warmup, trains=True,
          reads=lambda config: ("teacher",), settings=lambda config: (*_TRAINING, "quant", "warmup"),
          resolve=lambda run: at_search_width(run.config), skipped=_no_warmup),
    Stage("sensitivity", "sensitivity.json", measure,
          reads=lambda config: ("teacher", "warmup") if config.sensitivity.after == "warmup" else ("teacher",),
          settings=lambda config: ("seed", "model", "diffusion.prediction_type", "quant", "sensitivity.bits",
                                   "sensitivity.samples", "sensitivity.batch_size", "sensitivity.after",
                                   "sensitivity.guidance_scale"),
          resolve=lambda run: at_search_width(run.config), skipped=_no_search),
    Stage("allocate", "bits.json", choose_bits,
          reads=lambda config: ("sensitivity",), settings=lambda config: ("model", "allocate", "sensitivity.metric"),
          on_data=lambda config: False, skipped=_no_search),
    Stage("qat", "states/qat", train_qat, trains=True,
          reads=lambda config: ("teacher", "warmup") if config.qat.warm_start == "warmup" else ("teacher",),
          settings=lambda config: (*_TRAINING, "quant", "qat"), resolve=lambda run: run.resolved,
          starts_from=lambda run: {"qat.warm_start": warm_start(run)}),
    Stage("export", "model.safetensors", pack,
          reads=lambda config: ("teacher", "qat"),
          settings=lambda config: ("model", "quant", "diffusion", "sampler", "data.class_names"),
          on_data=lambda config: False, resolve=lambda run: run.resolved, skipped=_not_packable),
    Stage("evaluate", "evaluation.json", evaluate, together=True,
          reads=lambda config: ("teacher", "export" if is_packable(config) else "qat"),
          settings=lambda config: ("model", "diffusion", "sampler", "evaluation")),
)  # fmt: skip
BY_NAME = {stage.name: stage for stage in STAGES}
