"""A worker: one copy of the model in a process of its own. The only module of the server that imports torch.

    python -m server.worker SOCKET WEIGHTS PARENT LEVEL

It takes images from a socket, steps all of them together, encodes the finished ones, and sends the files back. The pool
decides how many it gets: at the start of each step the worker says which images the step will finish, and their
successors arrive while it runs. So an image joins at the next step, leaves when it is done, and no step waits.

Frames it gets: ``load`` (the settings), ``images``, ``cancel``. Frames it sends: ``loaded`` (the model), ``alive``,
``ready``, ``failed``, ``step``, ``image``, ``preview``, ``fault``. Times are seconds of the monotonic clock, which all
processes of a machine share.

One file, since it is one process: its loop, its threads and its socket share the images in progress.
"""

from __future__ import annotations

import base64
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

from robuq_core.errors import UserError
from robuq_core.images import ImageFormat, encode_image
from robuq_core.params import RowSpec
from server.launch import Unpacker, pack
from server.stepping import Stepper

logger = logging.getLogger(__name__)

# Any guidance will do for a warm-up; with one row a size is odd, with two it is even.
_GUIDED, _UNGUIDED = 1.5, 1.0
# The first forward of a size pays for what is set up once; a quick one is run again, to learn its time.
QUICK_S = 1.0
# Steps in which no image comes or leaves are reported together: each report wakes the server, on processors that the
# step could use.
QUIET_S = 0.05
# Between reports of what changes slowly: the speed, memory of the GPU.
SLOW_REPORT_S = 0.5
_RECEIVE = 1 << 18
_PR_SET_PDEATHSIG = 1

_DESCRIBED = (
    *("class_names", "num_classes", "valid_classes", "prediction_type", "can_guide", "image_size"),
    *("backend_name", "average_activation_bits", "weight_bytes", "digest"),
)

Options = dict[str, Any]
MakeSampler = Callable[[Options], Any]


@dataclass(eq=False, slots=True)
class _Image:
    """One image of a request; ``first_step_at`` and ``last_step_at`` are 0 until then."""

    id: int
    spec: RowSpec
    image_format: ImageFormat
    as_base64: bool
    watched: bool
    preview_every: int
    request_id: str
    row: Any = None
    first_step_at: float = 0.0
    last_step_at: float = 0.0
    cancelled: bool = False
    previewing: bool = False


class Worker:
    """Serves one socket until it closes.

    Args:
        make_sampler: a sampler for the options of the ``load`` frame; called in the thread of :meth:`run`.
    """

    def __init__(
        self, sock: socket.socket, make_sampler: MakeSampler, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._socket = sock
        self._make_sampler = make_sampler
        self._clock = clock
        self._unpacker = Unpacker()
        self._sending = threading.Lock()
        self._images: dict[int, _Image] = {}  # that have a step to make, longest in the batch first
        self._decoding: dict[int, _Image] = {}  # that have none, until they are sent
        self._finished: list[_Image] = []  # whose decoding has not begun
        self._previews = 0  # in progress; guarded by _sending
        self._sent_at = self._reported_at = 0.0
        self._load: Options | None = None

    def run(self) -> None:
        """Load, warm up, and serve until the other end of the socket closes."""
        try:
            while self._load is None:
                if not self._receive(wait=True):
                    return
            try:
                self._set_up(self._load)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except (UserError, ValueError) as error:
                self._send({"op": "failed", "kind": "user", "message": str(error)})
            except BaseException as error:
                logger.critical("the model cannot run", exc_info=True)
                message = " ".join(f"{type(error).__name__}: {error}".split())
                self._send({"op": "failed", "kind": "error", "message": message})
            else:
                self._serve()
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server has gone

    # Starting.

    def _set_up(self, options: Options) -> None:
        """Load the model and warm it up."""
        self._sampler = self._make_sampler(options)
        self._send({"op": "loaded", "model": describe(self._sampler)})
        self._stepper = Stepper(options["max_batch_rows"], self._clock, self._send_alive, options["target_step_s"])
        self._embed_settings: bool = options["embed_settings"]
        self._max_previews = 2 * options["max_batch_rows"]
        self._pool = ThreadPoolExecutor(options["decode_threads"], thread_name_prefix="decode")
        began = self._clock()
        self._warm_up(options["max_batch_rows"])
        logger.info("warmed up", extra={"seconds": round(self._clock() - began, 3)})
        self._send({"op": "ready", **self._speed()})

    def _warm_up(self, max_rows: int) -> None:
        """Run every size that a forward should have seen, and the decoder; sizes beyond the memory are skipped."""
        row: Any = None
        for size in self._sampler.warm_up_rows(max_rows):
            if size > self._stepper.budget.rows:
                break
            rows = self._warm_up_rows(size)
            for _ in range(2):
                self._send_alive()
                if faulty := self._stepper.step(self._sampler, rows):
                    raise faulty[0]
                measured = self._stepper.take_measured()
                if sum(seconds for _, seconds in measured) > QUICK_S:
                    break
            row = rows[0]
        self._stepper.budget.restart(*measured[-1])
        self._send_alive()
        encode_image(self._sampler.decode(row), "png")

    def _warm_up_rows(self, size: int) -> list[Any]:
        sampler = self._sampler
        pairs = size // 2 if sampler.can_guide else 0
        guidance = [_GUIDED] * pairs + [_UNGUIDED] * (size - 2 * pairs)
        return [
            sampler.start(RowSpec(i % sampler.valid_classes, i, 2, scale, sampler.defaults.sampler))
            for i, scale in enumerate(guidance)
        ]

    # The loop.

    def _serve(self) -> None:
        batch: list[_Image] = []
        changed = True
        report: Options = {}  # of the latest step, sent with the news of the next
        while True:
            if report and not self._images:
                self._report({"leaving": (), **report})
                report = {}
            received = self._receive(wait=not self._images)
            if received is False:
                return
            if received or changed:
                batch = self._started()
            if batch:
                leaving = [image.id for image in batch if image.spec.steps - image.row.steps_done <= 1]
                measured = report.get("measured", [])
                if leaving or self._finished or len(report) != 1 or self._clock() - self._sent_at > QUIET_S:
                    self._report({"leaving": leaving, **report})
                    measured = []
                report = self._step(batch)
                report["measured"] = [*measured, *report["measured"]]
            changed = len(self._images) != len(batch)

    def _report(self, report: Options) -> None:
        """Send what there is to say of the latest step and the next, then decode what has finished: the last step of an
        image is reported before the image."""
        self._send({"op": "step", **report})
        self._sent_at = self._clock()
        for image in self._finished:
            self._pool.submit(self._deliver, image)
        self._finished = []

    def _started(self) -> list[_Image]:
        """The images of the next step; rows of the new ones are made."""
        for image in [each for each in self._images.values() if each.row is None]:
            try:
                image.row = self._sampler.start(image.spec)
            except Exception as error:
                self._fault(image, error)
        return list(self._images.values())

    def _step(self, batch: list[_Image]) -> Options:
        began = self._clock()
        faulty = self._stepper.step(self._sampler, [image.row for image in batch])
        ended = self._clock()
        measured = self._stepper.take_measured()
        for position, error in faulty.items():
            self._fault(batch[position], error)
        first, progress = [], []
        for image in batch:
            if not image.first_step_at:
                image.first_step_at = began
                first.append(image.id)
            row = image.row
            if image.watched and image.id in self._images:
                progress.append((image.id, row.steps_done))
                self._preview(image)
            if row.done and self._images.pop(image.id, None) is not None:
                image.last_step_at = ended
                self._decoding[image.id] = image
                self._finished.append(image)
        report: Options = {"measured": measured}
        if first:
            report |= {"first": first, "began": began, "ended": ended}
        if progress:
            report["progress"] = progress
        if ended - self._reported_at > SLOW_REPORT_S or self._stepper.budget.admitted != self._reported_budget:
            report |= self._speed()
        return report

    def _speed(self) -> Options:
        """The row budget, the rows a second of full batches, and the memory of the GPU if there is one."""
        budget = self._stepper.budget
        self._reported_at, self._reported_budget = self._clock(), budget.admitted
        speed: Options = {"budget": budget.admitted, "rows_per_s": budget.rows_per_s}
        if (memory := _gpu_memory()) is not None:
            speed["gpu"] = memory
        return speed

    def _fault(self, image: _Image, error: BaseException) -> None:
        logger.error("request failed", exc_info=error, extra={"request_id": image.request_id})
        self._images.pop(image.id, None)
        self._send({"op": "fault", "id": image.id})

    # Finished images and previews, in the threads of the pool.

    def _deliver(self, image: _Image) -> None:
        try:
            if image.cancelled:
                return
            began = self._clock()
            encoded = self._encoded(self._sampler.decode(image.row), image)
            image.row = None
            head = {"op": "image", "id": image.id, "first": image.first_step_at, "last": image.last_step_at}
            self._send({**head, "decode_s": self._clock() - began}, encoded)
        except (BrokenPipeError, ConnectionResetError):
            pass
        except BaseException as error:  # the pool would keep it to itself, and the client would wait for ever
            self._fault(image, error)
        finally:
            self._decoding.pop(image.id, None)

    def _preview(self, image: _Image) -> None:
        """A preview, unless none is due, the one before is in progress, or decoders are behind."""
        row = image.row
        if not image.preview_every or row.done or row.steps_done % image.preview_every or image.previewing:
            return
        if self._previews + len(self._decoding) >= self._max_previews:
            return
        try:
            estimate = self._sampler.estimate(row)
        except Exception:
            logger.warning("a preview failed", exc_info=True, extra={"request_id": image.request_id})
            return
        image.previewing = True
        with self._sending:
            self._previews += 1
        self._pool.submit(self._send_preview, image, row.steps_done, estimate)

    def _send_preview(self, image: _Image, steps_done: int, estimate: Any) -> None:
        frame = b""
        try:
            if not image.cancelled:
                encoded = self._encoded(self._sampler.decode_estimate(estimate), image)
                frame = pack({"op": "preview", "id": image.id, "steps_done": steps_done}, encoded)
        except Exception:
            logger.warning("a preview failed", exc_info=True, extra={"request_id": image.request_id})
        with self._sending, suppress(BrokenPipeError, ConnectionResetError):
            # Before a client can see this one and wait for the next, which the lock keeps from overtaking it.
            image.previewing = False
            self._previews -= 1
            self._socket.sendall(frame)

    def _encoded(self, pixels: Any, image: _Image) -> bytes:
        about = self._sampler.settings_of(image.spec) if self._embed_settings else None
        encoded = encode_image(pixels, image.image_format, about)
        return base64.b64encode(encoded) if image.as_base64 else encoded

    # The socket.

    def _send_alive(self) -> None:
        self._send({"op": "alive"})

    def _send(self, head: Options, body: bytes = b"") -> None:
        frame = pack(head, body)
        with self._sending:
            self._socket.sendall(frame)

    def _receive(self, wait: bool) -> bool | None:
        """Take what has arrived: True if something has, False if the other end has closed, None for nothing."""
        try:
            data = self._socket.recv(_RECEIVE, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        if not data:
            return False
        for head, _ in self._unpacker.feed(data):
            self._handle(head)
        return True

    def _handle(self, head: Options) -> None:
        match head["op"]:
            case "images":
                for fields in head["images"]:
                    spec = fields.pop("spec")
                    spec["guidance_interval"] = tuple(spec["guidance_interval"])
                    self._images[fields["id"]] = _Image(spec=RowSpec(**spec), **fields)
            case "cancel":
                for image_id in head["ids"]:
                    image = self._images.pop(image_id, None) or self._decoding.get(image_id)
                    if image is not None:
                        image.cancelled = True
            case "load":
                self._load = head


def describe(sampler: Any) -> dict[str, Any]:
    """The fields of :class:`server.request.ModelInfo` as plain data."""
    return {name: getattr(sampler, name) for name in _DESCRIBED} | {
        "name": sampler.checkpoint_name,
        "path": str(sampler.path or ""),
        "defaults": sampler.defaults.model_dump(),
        "decoder_name": sampler.decoder.name,
        "decoder_weight_bytes": sampler.decoder.weight_bytes,
    }


def load_sampler(options: Options, weights: int) -> Any:
    """The sampler of one replica. The first worker of a checkpoint reads and verifies the file and stores what it has
    read in the memory file ``weights``; all of them run on what lies there.

    On GPUs each replica has one of its own. On a CPU they divide the threads.

    Raises:
        CheckpointError, DecoderError: the file or its decoder cannot be used. ValueError: the backend cannot.
        UserError: more replicas than there are threads or GPUs.
    """
    import torch

    from robuq_core.kernels.backends import select_backend
    from robuq_core.pipeline import Sampler, load_model

    backend, number, replicas = options["backend"], options["number"], options["replicas"]
    threads = options["threads"]
    device = select_backend(backend, threads).device
    if device.type == "cuda":
        _check(replicas, torch.cuda.device_count(), "GPU(s)")
        placed: dict[str, Any] = {"device": f"cuda:{number}"} if replicas > 1 else {}
    else:
        available = threads or torch.get_num_threads()
        if replicas > 1:
            _check(replicas, available, "CPU thread(s)")
            threads = max(1, available // replicas)
        placed = {}
    if options["store"]:
        os.ftruncate(weights, 0)
        with os.fdopen(os.dup(weights), "wb") as file:
            file.seek(0)
            torch.save(load_model(options["checkpoint"], options["decoder"]), file)
    # Mapped, so that all workers share its pages. Only this program writes the file, so it may be unpickled.
    loaded = torch.load(f"/dev/fd/{weights}", mmap=True, weights_only=False)
    return Sampler.from_loaded(loaded, backend=backend, threads=threads, **placed)


def _check(replicas: int, available: int, what: str) -> None:
    if replicas > available:
        raise UserError(f"--replicas {replicas} is more than the {available} {what} here; give at most {available}")


def _gpu_memory() -> list[int] | None:
    """Bytes of this process on its GPU that tensors take, that the allocator holds, and the most that they took."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return [torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), torch.cuda.max_memory_allocated()]


def die_with(parent: int) -> None:
    """Let the kernel kill this process when ``parent`` ends, however it does (Linux); its socket closes, too."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def main(make_sampler: Callable[[Options, int], Any] = load_sampler, arguments: list[str] | None = None) -> None:
    """Run as a process; ``make_sampler`` gets the options and the descriptor of the memory file."""
    given = sys.argv[1:] if arguments is None else arguments
    descriptor, weights, parent = map(int, given[:3])
    # The server decides when to end; a signal to the whole group is for it alone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with(parent)
    from server.logs import configure_logging
    from server.settings import LogLevel

    configure_logging(cast(LogLevel, given[3]))
    if make_sampler is load_sampler:
        # Most of the start, while the server still imports its own part. What fails here fails again when it loads.
        with suppress(Exception):
            import robuq_core.pipeline  # noqa: F401
    with socket.socket(fileno=descriptor) as sock:
        code = 1
        try:
            Worker(sock, lambda options: make_sampler(options, weights)).run()
            code = 0
        except BaseException:
            logger.critical("worker failed", exc_info=True)
    # Threads that decode, and handlers of libraries at exit, are not waited for.
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main()
