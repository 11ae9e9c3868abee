"""A run: its configuration, its folder, its data opened once, and which of its stages are up to date.

Files below ``run_dir``: ``data/`` (prepared samples), ``states/teacher``, ``states/warmup`` and ``states/qat``
(:mod:`train.state`) with ``STAGE.log.jsonl``, ``sensitivity.json``, ``bits.json``, ``model.safetensors``,
``evaluation.json``, ``config.yaml`` (as last used) and ``stages/`` (what each short stage was made from).

One comparison decides whether a stage is up to date: its inputs, recorded when it ran, with its inputs now. Inputs are
settings, digests of the data, and digests of what earlier stages wrote. A short stage that is not up to date is
rebuilt; one that trains continues if only its schedule changed, and is otherwise refused with the way out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from contextlib import nullcontext
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError

from robuq_core.classes import read_names
from robuq_core.config import QuantConfig
from robuq_core.errors import UserError
from robuq_core.files import read_json, replacing
from robuq_core.models.dit import DiT
from robuq_core.models.quant_linear import quantize_model
from train.config import ConfigError, TrainConfig
from train.data import (
    BatchSource,
    Dataset,
    ImageDataset,
    Index,
    data_digest,
    fingerprint,
    image_size,
    load_dataset,
    open_dataset,
    prepare,
)
from train.logs import one_line
from train.parallel import from_first, on_first
from train.provenance import Record, changes, described, settings_of, unfit_changes
from train.sensitivity import FixedBatch, fixed_set
from train.stages import BY_NAME, STAGES, Stage, at_search_width, quant_settings
from train.state import State, StateError, file_digest, find_state, latest_state, locked, read_state
from train.trainer import meaning_of_weights

Note = Callable[[str], None]


class Run:
    """The stages of one configuration, in one folder. Of several processes each makes the same run.

    Args:
        note: receives one line for everything that is done or left as it is.
        ema: decay of the average whose weights the models have, one of ``more_ema_decays``; default: ``ema_decay``.
        base: another run, of the same data and model, whose prepared data and teacher this one uses.
    """

    def __init__(
        self, config: TrainConfig, note: Note = print, base: Run | None = None, ema: float | None = None
    ) -> None:
        self.config: TrainConfig = config
        self.folder: Path = config.run_dir
        self.base, self.ema, self._note = base, ema, note
        self._fingerprint: Callable[[Path], str] = cache(fingerprint) if base is None else base._fingerprint

    def note(self, text: str) -> None:
        """Pass one line on, from the first process."""
        on_first(partial(self._note, text))

    # The data.

    @cached_property
    def index(self) -> Index:
        """The prepared data, brought up to date when first asked for."""
        if self.base is not None:
            return self.base.index
        return prepare(self.config, self._note, self._fingerprint)

    @cached_property
    def dataset(self) -> Dataset:
        """The prepared samples, mapped into memory."""
        return self.base.dataset if self.base is not None else open_dataset(self.config, self.index)

    @cached_property
    def held_out(self) -> Run:
        """This run on the part of the data that samples are compared with, ``evaluation.split``."""
        split = self.config.evaluation.split
        if split == self.config.data.split:
            return self
        data = self.config.data.model_copy(update={"split": split})
        other = Run(self.config.model_copy(update={"data": data}), lambda _: None)
        other._fingerprint = self._fingerprint
        return other

    def photos(self, count: int | None = None) -> ImageDataset:
        """The data in pixels, at the size that the model generates: all, or ``count`` of them at random.

        Of a run on pixels they are the prepared ones, mapped; of a run on latents they are read again: give ``count``.
        Raises DataError if the data cannot be used, or are latents of another program.
        """
        data = self.config.data
        if data.vae is None:
            assert isinstance(self.dataset, ImageDataset)
            return self.dataset if count is None else self.dataset.some(count)
        size, classes = image_size(self.config), self.config.model.num_classes
        return load_dataset(data.path, size, classes, data.split, data.fit, count)

    def fixed_points(
        self, samples: int, batch_size: int, seed: int, device: torch.device | str = "cpu"
    ) -> list[FixedBatch]:
        """Noised images, never mirrored, at timesteps spread over the process: the same ones in every call."""
        source = BatchSource(self.dataset, 0.0, batch_size, seed)
        return fixed_set(source, samples, seed, device, self.config.diffusion.prediction_type)

    # What the stages write, and the models in it.

    def path(self, stage: str) -> Path:
        """The file, or folder of states, that ``stage`` writes."""
        if self.base is not None and stage == "teacher":
            return self.base.path(stage)
        return self.folder / BY_NAME[stage].writes

    def digest(self, stage: str) -> str:
        """What identifies the output of ``stage``. Raises StateError if it does not exist."""
        path = self.path(stage)
        if BY_NAME[stage].trains:
            return latest_state(path).digest
        if not path.is_file():
            raise StateError(f"{path} does not exist: run the stage that writes it first")
        return file_digest(path)

    def teacher(self, state: Path | None = None) -> DiT:
        """The full-precision model with the averaged weights of the latest state, or of the one at ``state``."""
        model = DiT(self.config.model)
        self._state("teacher", state).load_average(model, meaning_of_weights(self.config), self.ema)
        return model

    def student(self, state: Path | None = None) -> DiT:
        """The fake-quantised model with the averaged weights of the latest state, or of the one at ``state``."""
        return self._student(self._state("qat", state), self.quant)

    def warmed_up(self) -> DiT:
        """The student of the warm-up, every layer at the width that others are searched around."""
        return self._student(latest_state(self.path("warmup")), at_search_width(self.config).quant)

    def _state(self, stage: str, folder: Path | None) -> State:
        return latest_state(self.path(stage)) if folder is None else read_state(folder)

    def quantized(self, model: DiT, quant: QuantConfig) -> DiT:
        """The student that ``model``, in full precision, becomes, in place."""
        return quantize_model(model, quant)

    def _student(self, state: State, quant: QuantConfig) -> DiT:
        model = self.quantized(DiT(self.config.model), quant)
        state.load_average(model, {**meaning_of_weights(self.config), **quant_settings(quant)}, self.ema)
        return model

    @property
    def quant(self) -> QuantConfig:
        """``quant`` with the activation width of every layer as the run found it: ``bits.json``, if it searches.

        Raises StateError if there is no usable ``bits.json``, or one of another budget or method than is configured.
        """
        config, path = self.config, self.path("allocate")
        if config.allocate.average_bits is None:
            return config.quant
        try:
            table = read_json(path)
            quant = config.quant.model_validate({**config.quant.model_dump(), "bits": table["bits"]})
            made = {"average_bits": table["budget_bits"], "method": table["method"]}
        except FileNotFoundError as error:
            raise StateError(f"{path} does not exist: run the stage that writes it first") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StateError(f"{path}: not a bit table; delete it and run the allocate stage again") from error
        for key, found in made.items():
            if found != (wanted := getattr(config.allocate, key)):
                raise StateError(f"{path}: found for allocate.{key} {found}, but the configuration says {wanted}; run "
                                 "the allocate stage again")  # fmt: skip
        return quant

    @property
    def resolved(self) -> TrainConfig:
        """The configuration with :attr:`quant` in it."""
        return self.config.model_copy(update={"quant": self.quant})

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names in ``data.class_names``, one per class; empty if none are configured.

        Raises ConfigError if the file cannot be read, or does not have one name for each class.
        """
        path, classes = self.config.data.class_names, self.config.model.num_classes
        if path is None:
            return ()
        try:
            names = read_names(path)
        except UserError as error:
            raise ConfigError(f"data.class_names: {error}") from error
        if len(names) != classes:
            raise ConfigError(f"data.class_names: {path} has {len(names)} names but model.num_classes is {classes}")
        return names

    # Running stages.

    def until(self, last: str = "evaluate", redo: Collection[str] = ()) -> Run:
        """Run every stage that the configuration calls for, in order, up to ``last``; returns the run.

        ``redo``: stages to rerun, with all that follow the first of them. Raises the error of the first stage that
        fails; those before it are kept.
        """
        _ = self.class_names  # export needs them: better a clear error now than after the training
        self.prepare()
        again = False
        for stage in STAGES:
            again = again or stage.name in redo
            if self.base is not None and stage.name == "teacher":
                continue
            if (reason := stage.skipped(self.config)) is None:
                self._bring_up_to_date(stage, again)
            else:
                self.note(f"{stage.name}: skipped, as {reason}")
            if stage.name == last:
                break
        return self

    def prepare(self) -> None:
        """Bring the prepared data up to date."""
        notes: list[str] = []  # of the first process

        def listen(text: str) -> None:
            notes.append(text)
            self._note(text)

        if self.base is None:
            self.index = prepare(self.config, listen, self._fingerprint)
        on_first(lambda: self._keep_config(self.config))
        if from_first(lambda: not notes):
            index = self.index
            self.note(f"prepare: up to date ({index.count} {index.kind} in {len(index.shards)} shards)")

    def alone(self, name: str, redo: bool = False) -> Run:
        """Run one stage from what the stages before it left; returns the run.

        Raises StateError if what they left was not made from one another, or the stage's own error.
        """
        on_first(lambda: self.check_lineage(BY_NAME[name]))
        self._bring_up_to_date(BY_NAME[name], redo)
        return self

    def _bring_up_to_date(self, stage: Stage, redo: bool) -> None:
        _ = self.class_names
        config = stage.resolve(self)
        inputs = self._inputs(stage, config)
        if not from_first(lambda: self._begin(stage, config, inputs, redo)):
            return
        if stage.trains or stage.together:
            stage.work(self, config, inputs)
        else:
            on_first(lambda: self._work_alone(stage, config, inputs))
        if not stage.trains:  # a state keeps its inputs itself
            on_first(lambda: self._write_record(stage, inputs))

    def _work_alone(self, stage: Stage, config: TrainConfig, inputs: dict[str, Any]) -> None:
        try:
            stage.work(self, config, inputs)
        except (OSError, SafetensorError) as error:
            raise StateError(f"{self.path(stage.name)}: cannot be written ({one_line(error)}); free some space and run "
                             "again") from error  # fmt: skip

    def _inputs(self, stage: Stage, config: TrainConfig) -> dict[str, Any]:
        """Everything that the result of ``stage`` depends on, by name."""
        found: dict[str, Any] = {f"output of {name}": self.digest(name) for name in stage.reads(config)}
        found.update(settings_of(config, *stage.settings(config)))
        if stage.on_data(config):
            found.update({f"data.{key}": value for key, value in self.index.made_with.items()})
            found["content of data.path"] = self.index.digests["data"]
            found["content of data.vae"] = self.index.digests.get("vae")
        for key, path in stage.starts_from(self).items():
            found[f"content of {key}"] = None if path is None else _content(key, path)
        as_read_back: dict[str, Any] = json.loads(json.dumps(found))  # tuples are lists
        return as_read_back

    # Records.

    def _record_path(self, stage: Stage) -> Path:
        return self.folder / "stages" / f"{stage.name}.json"

    def _record(self, stage: Stage) -> Record | None:
        """What the output of ``stage`` was made from; none if there is none."""
        if stage.trains:
            state = find_state(self.path(stage.name))
            return None if state is None else Record(inputs=state.inputs, output=state.digest, finished=state.finished)
        path = self._record_path(stage)
        try:
            return Record.model_validate_json(path.read_bytes()) if self.path(stage.name).exists() else None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValidationError) as error:
            raise StateError(f"{path}: not a readable record ({one_line(error)}); delete it, and the stage is rebuilt"
                             ) from error  # fmt: skip

    def _write_record(self, stage: Stage, inputs: dict[str, Any]) -> None:
        record = Record(inputs=inputs, output=self.digest(stage.name))
        _write(self._record_path(stage), json.dumps(record.model_dump(mode="json"), indent=1) + "\n")

    def _begin(self, stage: Stage, config: TrainConfig, inputs: dict[str, Any], redo: bool) -> bool:
        """Whether there is work to do."""
        path, name = self.path(stage.name), stage.name
        if redo:
            self._forget(stage)
            self.note(f"{name}: rerun, as asked")
        record = self._record(stage)
        if record is not None:
            changed = changes(record.inputs, inputs)
            intact = record.output == self.digest(name)
            if record.finished and intact and not changed:
                self.note(f"{name}: up to date ({path.name})")
                return False
            if stage.trains and (bad := unfit_changes(name, changed, record.finished)):
                raise StateError(f"{path}: trained with {bad}; restore the configuration it was made with, or start "
                                 f"the stage again with robuq-train {name} --redo")  # fmt: skip
            if changed:
                self.note(f"{name}: {'continues' if stage.trains else 'rebuilt'}, as {described(changed)}")
            elif not intact:
                self.note(f"{name}: rebuilt, as {path.name} is not the file that it wrote")
        self._keep_config(config)
        return True

    def _forget(self, stage: Stage) -> None:
        """Remove what ``stage`` wrote, unless another process is at it."""
        path, logs = self.path(stage.name), (self.folder / f"{stage.name}.{end}" for end in ("log.jsonl", "wandb"))
        with locked(path) if stage.trains else nullcontext():
            for each in (path, self._record_path(stage), *logs, self.folder / "tensorboard" / stage.name):
                if each.is_dir():
                    shutil.rmtree(each, ignore_errors=True)
                else:
                    each.unlink(missing_ok=True)

    def check_lineage(self, stage: Stage) -> None:
        """Check that every output that ``stage`` stands on was made from the outputs that are there now.

        Raises StateError if one was made from another; the message names the stage to run.
        """
        for maker in (BY_NAME[name] for name in stage.reads(self.config)):
            record = self._record(maker)
            for parent in maker.reads(self.config):
                made_from = None if record is None else record.inputs.get(f"output of {parent}")
                if made_from is not None and self.path(parent).exists() and made_from != self.digest(parent):
                    raise StateError(f"{self.path(maker.name)}: made from another {self.path(parent)} than the one "
                                     f"there now; run robuq-train {maker.name} --redo first")  # fmt: skip
            self.check_lineage(maker)

    def _keep_config(self, config: TrainConfig) -> None:
        """Keep the resolved configuration beside what it made; its history is in the states."""
        path = self.folder / "config.yaml"
        text = "# What this folder was last made with, every key spelled out.\n"
        text += yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)
        try:
            unchanged = path.exists() and path.read_text() == text
        except OSError as error:
            raise StateError(f"run_dir {self.folder}: cannot be read ({error})") from error
        if not unchanged:
            _write(path, text)


def _write(path: Path, text: str) -> None:
    try:
        with replacing(path) as temporary:
            temporary.write_text(text)
    except OSError as error:
        raise StateError(f"run_dir {path.parent}: cannot be written to ({one_line(error)})") from error


def _content(key: str, path: Path) -> str:
    if not path.exists():
        raise StateError(f"{key}: {path} does not exist")
    return read_state(path).digest if (path / "state.json").exists() else data_digest(path)
