"""Thread pools of the native backend: one for each object, freed with it, usable after a fork and at exit."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from layer_cases import make_linear, tokens
from waiting import until

from robuq_core.kernels import cpu
from robuq_core.kernels.cpu import CpuBackend, NativeUnavailableError, load_library
from robuq_core.kernels.pack_layer import pack_layer

try:
    load_library()
except NativeUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)

LAYER = pack_layer(make_linear(96, 256, bits=2, rank=2))
X = tokens(200, 96)
linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")


def run(backend: CpuBackend) -> torch.Tensor:
    return backend.ternary_linear(backend.rotate_quantize(X, LAYER), LAYER)


def thread_ids() -> set[str]:
    return {task.name for task in Path("/proc/self/task").iterdir()}


@linux
def test_threads_start_with_the_first_op_and_end_with_the_object() -> None:
    gc.collect()  # what other tests left
    before = thread_ids()
    backend = CpuBackend(threads=4)
    assert thread_ids() <= before
    run(backend)
    own = thread_ids() - before
    assert len(own) == 3
    del backend
    gc.collect()
    until(lambda: not own & thread_ids())  # a joined thread is listed for a moment more


@linux
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="asks for the processors of a thread")
def test_threads_keep_off_the_processor_of_the_caller() -> None:
    allowed = os.sched_getaffinity(0)
    gc.collect()
    before = thread_ids()
    backend = CpuBackend(threads=3)
    run(backend)
    own = [os.sched_getaffinity(int(task)) for task in thread_ids() - before]
    assert len(own) == 2
    for processors in own:
        assert len(allowed - processors) == (1 if len(allowed) > 1 else 0)
    assert os.sched_getaffinity(0) == allowed


def test_backends_run_side_by_side_with_equal_results() -> None:
    expected = run(CpuBackend(threads=1))
    wrong = []

    def replica() -> None:
        for _ in range(20):  # objects come and go while others work
            backend = CpuBackend(threads=2)
            wrong.extend(i for i in range(10) if not torch.equal(run(backend), expected))

    replicas = [threading.Thread(target=replica) for _ in range(4)]
    for thread in replicas:
        thread.start()
    for thread in replicas:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


def test_a_copy_has_its_own_pool() -> None:
    backend = CpuBackend(threads=3, isa="plain")
    for other in (copy.deepcopy(backend), pickle.loads(pickle.dumps(backend))):
        assert (other.threads, other.isa) == (3, "plain")
        assert other._handle != backend._handle
        assert torch.equal(run(other), run(backend))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_uses_the_backend_and_frees_it() -> None:
    program = """
import os, sys, threading
sys.path[:0] = sys.argv[1:]
from test_cpu_pool import CpuBackend, run, torch

torch.set_num_threads(1)
backend, unused = CpuBackend(threads=3), CpuBackend(threads=2)
expected = run(backend)
busy = threading.Event()
noise = threading.Thread(target=lambda: [(run(backend), busy.set()) for _ in range(300)])
noise.start()
busy.wait()
for _ in range(10):  # forks while another thread is in an op
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(run(backend), expected) and torch.equal(run(unused), expected) else 3)
    assert os.waitpid(child, 0)[1] == 0
noise.join()
child = os.fork()
if child == 0:
    del backend, unused
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(run(backend), expected)
"""
    run_program(program)


def test_exit_does_not_wait_for_a_daemon_thread_in_an_op() -> None:
    # The bare library: torch's own functions may abort a daemon thread that outlives the interpreter.
    program = """
import sys, threading
sys.path[:0] = sys.argv[1:]
from test_cpu_pool import CpuBackend, torch

backend, started = CpuBackend(threads=3), threading.Event()
x, weight, bias, y = torch.randn(200, 256), torch.randn(512, 256), torch.randn(512), torch.empty(200, 512)
pointers = [t.data_ptr() for t in (x, weight, bias, y)]
def work():
    while True:
        assert backend._library.robuq_linear(backend._handle, *pointers[:3], 200, 256, 512, pointers[3]) == 0
        started.set()
threading.Thread(target=work, daemon=True).start()
started.wait()
"""
    run_program(program)


def run_program(program: str) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-c", program, str(here.parents[2]), str(here.parents[1]), str(here)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_INTERFACE", -1)
    load_library.cache_clear()
    try:
        with pytest.raises(NativeUnavailableError, match="another version of the source"):
            load_library()
    finally:
        load_library.cache_clear()
