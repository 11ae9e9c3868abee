"""One command for a rare GPU: what must be known of the Triton backend, most valuable first.

    python scripts/gpu_run.py a          # 400 s: correct, repeatable, times, memory, an image, a server, training
    python scripts/gpu_run.py b          # 300 s: tunes launch shapes and times forwards with the table

Each job is a process with a time limit of its own: one that hangs or ends in a CUDA error costs the others nothing.
What a job finds is appended to ``$OUT/results.jsonl`` at once, what it prints to ``$OUT/log.txt``. Ends with 1 if a job
failed. ``--rehearse`` runs every job at tiny sizes on a CPU: kernels in the emulator of the tests, networks on a CPU
backend; its times mean nothing.

A machine that has torch, Triton and little else can be given the rest as wheels. Beforehand, where a registry can be
reached (the wheels are 3 MB; name the version of Python that the GPU machine has)::

    pip download --only-binary=:all: --python-version 3.12 --no-deps -d .whl -c constraints.txt \\
        pydantic pydantic_core annotated_types typing_inspection fastapi starlette uvicorn httptools \\
        pydantic_settings python-dotenv annotated-doc h11 anyio idna click opentelemetry-api

and on the GPU machine, from the root of the repository::

    python3 -m pip install -q --no-index --no-deps --target .site .whl/*.whl
    export OUT=$PWD/out PYTHONPATH=$PWD/.site:$PWD && timeout 420 python3 scripts/gpu_run.py a
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPILERS = max(1, min(14, (os.cpu_count() or 1) - 2))
SLOWER = 10  # how much longer a job may take in a rehearsal


@dataclass(frozen=True)
class Job:
    """A function of :mod:`gpu_jobs` and the seconds it may take. ``needed``: the run ends if it fails. ``share``: I/N,
    the I-th of N shares of a job that can be split."""

    name: str
    seconds: float
    needed: bool = False
    share: str = "0/1"


Stage = tuple[Job, ...]


def shares(name: str, seconds: float, count: int) -> Stage:
    return tuple(Job(name, seconds, share=f"{i}/{count}") for i in range(count))


SMOKE, SERVER, FORWARDS = Job("smoke", 60, needed=True), Job("server", 60), Job("forwards", 60)
# Jobs of one stage run at the same time, so what is to be timed well has one of its own.
FIRST: tuple[Stage, ...] = (
    *((Job("machine", 25),), (SMOKE,), shares("compile", 60, COMPILERS)),
    shares("layers", 60, 8) + shares("attention", 60, 3) + shares("rows", 60, 2),
    (Job("repeats", 25), Job("graphs", 40)),
    *((job,) for job in (Job("ops", 60), FORWARDS, Job("forwards_fp32", 40), Job("forwards_bf16", 70))),
    (SERVER, Job("image", 60), Job("sanitizer", 60)),
    *((job,) for job in (Job("counters", 50), Job("training", 50))),
)
# The second forwards are for the spread.
SECOND: tuple[Stage, ...] = tuple((job,) for job in (SMOKE, Job("tune", 110), FORWARDS, FORWARDS, SERVER))
PARTS = {"a": (400, FIRST), "b": (300, SECOND)}


class Run:
    """One part, into folder ``out``."""

    def __init__(self, out: Path, rehearse: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.rehearse, self.slower = out, rehearse, SLOWER if rehearse else 1
        paths = [*filter(None, [os.environ.get("PYTHONPATH")]), ROOT, ROOT / "scripts", ROOT / "tests"]
        self.environment = {
            "TRITON_CACHE_DIR": str(Path(tempfile.gettempdir(), "robuq-gpu-run")),
            **os.environ,
            "OUT": str(out),
            "ROBUQ_CACHE_DIR": str(out),
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
        }

    def record(self, **found: object) -> None:
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(found) + "\n")

    def command(self, job: Job) -> list[str]:
        command = [sys.executable, __file__, "job", job.name, "--share", job.share, "--out", str(self.out)]
        return [*command, "--rehearse"] if self.rehearse else command

    def run(self, job: Job, seconds: float) -> bool:
        """Whether it ended well within ``seconds``."""
        began = time.monotonic()
        with (self.out / "log.txt").open("a") as log:
            process = subprocess.Popen(
                self.command(job), cwd=ROOT, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            try:
                code: int | str = process.wait(max(1.0, seconds))
            except subprocess.TimeoutExpired:
                code = "out of time"
            finally:
                # With what it has started, such as a server.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        taken = round(time.monotonic() - began, 1)
        self.record(job=job.name, event="end", code=code, seconds=taken)
        print(f"{job.name}: {'ok' if code == 0 else f'FAILED ({code})'} in {taken} s", flush=True)
        return code == 0

    def part(self, stages: Iterable[Stage], seconds: float) -> bool:
        """Whether every job ended well."""
        deadline, good = time.monotonic() + seconds * self.slower, True
        for stage in filter(None, stages):
            left = deadline - time.monotonic()
            if left < 5:
                self.record(event="stopped", reason="no time left")
                return False
            with ThreadPoolExecutor(len(stage)) as pool:
                ended = list(
                    pool.map(lambda job, left=left: self.run(job, min(self.slower * job.seconds, left)), stage)
                )
            good &= all(ended)
            if any(job.needed and not ok for job, ok in zip(stage, ended, strict=True)):
                self.record(event="stopped", reason="a needed job failed")
                return False
        return good


def run_job(name: str, out: Path, rehearse: bool, share: str) -> None:
    """In this process; in a rehearsal, kernels run in the emulator of the tests."""
    import torch
    from gpu_jobs import JOBS
    from gpu_jobs.context import Context
    from ptx.driver import emulated

    with emulated(90) if rehearse else contextlib.nullcontext(), torch.inference_mode():
        context = Context(name, out, rehearse, *map(int, share.split("/")))
        try:
            JOBS[name](context)
        except Exception as error:
            context.record(event="error", error=repr(error)[:1500])
            raise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "job"])
    parser.add_argument("name", nargs="?", help="after 'job': run one here, in this process")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-run")))
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--jobs", nargs="+", help="only these")
    parser.add_argument("--share", default="0/1", help="I/N: the I-th of N shares of a job that can be split")
    arguments = parser.parse_args()
    if arguments.part == "job":
        run_job(arguments.name, arguments.out, arguments.rehearse, arguments.share)
        return 0
    run, (seconds, stages) = Run(arguments.out.resolve(), arguments.rehearse), PARTS[arguments.part]
    run.record(event="start", part=arguments.part, rehearse=arguments.rehearse)
    chosen = (tuple(job for job in stage if not arguments.jobs or job.name in arguments.jobs) for stage in stages)
    return 0 if run.part(chosen, seconds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
