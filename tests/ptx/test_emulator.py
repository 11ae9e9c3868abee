"""The emulator itself, on small programs: what instructions compute, and which mistakes are noticed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ptx.machine import run
from ptx.memory import Heap
from ptx.program import PtxError, parse

HEAD = """
.version 8.4
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(.param .u64 .ptr .global .align 1 k_param_0, .param .u32 k_param_1)
.reqntid 64
{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<40>;
	.reg .b64 %rd<9>;
	ld.param.b64 %rd1, [k_param_0];  // a comment
	mov.u32 %r1, %tid.x;
	mov.u32 %r2, %ctaid.x;
	shl.b32 %r3, %r1, 2;
	cvt.u64.u32 %rd2, %r3;
	add.s64 %rd3, %rd1, %rd2;
	mov.b32 %r4, global_smem;
	add.s32 %r5, %r4, %r3;
"""
# Of the thread 32 further on, in another warp, and of the next thread of the same warp.
ACROSS = "xor.b32 %r6, %r3, 128; add.s32 %r6, %r6, %r4;"
NEXT = "xor.b32 %r6, %r3, 4; add.s32 %r6, %r6, %r4;"
READ, STORE = "ld.shared.b32 %r7, [%r6];", "st.shared.b32 [%r5], %r1;"
KEEP = "st.global.b32 [%rd3], %r7;"


def execute(body: str, data: Any = None, blocks: int = 1, value: int = 0) -> tuple[np.ndarray, Counter[str]]:
    """The program on 64 words of global memory (two blocks share them), and the faults."""
    faults: Counter[str] = Counter()
    heap = Heap(faults)
    words = np.zeros(64, np.uint32) if data is None else np.asarray(data)
    at = heap.add(words.nbytes)
    heap.data[at : at + words.nbytes] = words.view(np.uint8)
    heap.valid[at : at + words.nbytes] = True
    program = parse(f"{HEAD}{body}\n\tret;\n}}\n")
    run(program, heap, {"k_param_0": at, "k_param_1": value}, (blocks, 1, 1), 1024, faults)
    return heap.data[at : at + words.nbytes].view(words.dtype).copy(), faults


def computed(instruction: str, inputs: np.ndarray, out: type = np.uint32) -> np.ndarray:
    """``instruction`` from %r8 (each thread's input) into %r7."""
    found, faults = execute(f"ld.global.b32 %r8, [%rd3]; {instruction} {KEEP}", inputs.astype(inputs.dtype))
    assert not faults
    return found.view(out)


WORDS = np.random.default_rng(0).integers(0, 2**32, 64, dtype=np.uint32)
FLOATS = np.concatenate([np.random.default_rng(1).normal(size=60) * 100, [0.5, -1.5, 2.5, -0.0]]).astype(np.float32)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("bfe.u32 %r7, %r8, 5, 7;", lambda x: x >> 5 & 127),
        ("bfe.s32 %r7, %r8, 3, 1;", lambda x: np.where(x >> 3 & 1, 2**32 - 1, 0)),
        ("bfe.u32 %r7, %r8, 28, 9;", lambda x: x >> 28),
        ("shr.s32 %r7, %r8, 40;", lambda x: np.where(x >> 31, 2**32 - 1, 0)),
        ("shl.b32 %r7, %r8, 33;", lambda x: x * 0),
        ("prmt.b32 %r7, %r8, 0, 0x3B10;", lambda x: x & 0xFF00FFFF | np.where(x >> 31, 0xFF0000, 0)),
        ("div.s32 %r7, %r8, 1000;", lambda x: np.trunc(x.astype(np.int32) / 1000).astype(np.int64)),
        ("rem.s32 %r7, %r8, 1000;", lambda x: np.fmod(x.astype(np.int32), 1000).astype(np.int64)),
        ("bfi.b32 %r7, 5, %r8, 4, 3;", lambda x: x & ~np.uint32(0x70) | 0x50),
        ("add.s16x2 %r7, %r8, 65539;", lambda x: (x.view(np.uint16) + np.tile([3, 1], 64).astype("u2")).view("u4")),
        ("shfl.sync.bfly.b32 %r7, %r8, 16, 31, -1;", lambda x: x[np.arange(64) ^ 16]),
        ("shfl.sync.idx.b32 %r7, %r8, 3, 31, -1;", lambda x: x[np.arange(64) // 32 * 32 + 3]),
        ("mov.b32 {%rs1, %rs2}, %r8; mov.b32 %r7, {%rs2, %rs1};", lambda x: x >> 16 | x << 16),
        ("{ .reg .b32 t; shr.u32 t, %r8, 2; and.b32 %r7, t, 3; }", lambda x: x >> 2 & 3),
        ("setp.lt.s32 %p1, %r8, 0; selp.b32 %r7, 1, 2, %p1;", lambda x: np.where(x >> 31, 1, 2)),
        ("setp.gt.u32 %p1, %r1, 9; mov.b32 %r7, 0; @%p1 mov.b32 %r7, 5;", lambda x: np.where(np.arange(64) > 9, 5, 0)),
    ],
)
def test_integer_instructions(instruction: str, expected: Callable[[np.ndarray], Any]) -> None:
    assert np.array_equal(computed(instruction, WORDS), np.asarray(expected(WORDS)).astype(np.uint32))


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("fma.rn.f32 %r7, %r8, %r8, 0f3F800000;", lambda x: (x.astype(np.float64) ** 2 + 1).astype(np.float32)),
        ("max.f32 %r7, %r8, 0f3F800000;", lambda x: np.maximum(x, 1)),
        ("cvt.rmi.f32.f32 %r7, %r8;", np.floor),
        ("cvt.rni.s32.f32 %r9, %r8; cvt.rn.f32.s32 %r7, %r9;", np.rint),
        ("cvt.rn.bf16.f32 %rs1, %r8; cvt.f32.bf16 %r7, %rs1;", lambda x: (x.view(np.uint32) + 0x7FFF + (
            x.view(np.uint32) >> 16 & 1) & 0xFFFF0000).astype(np.uint32).view(np.float32)),
        ("cvt.rn.f16x2.f32 %r9, 0f00000000, %r8; mov.b32 {%rs1, %rs2}, %r9; cvt.f32.f16 %r7, %rs1;",
         lambda x: x.astype(np.float16).astype(np.float32)),
        ("setp.nan.f32 %p1, %r8, %r8; selp.f32 %r7, 0f3F800000, %r8, %p1;", lambda x: x),
    ],
)  # fmt: skip
def test_float_instructions(instruction: str, expected: Callable[[np.ndarray], Any]) -> None:
    assert np.array_equal(computed(instruction, FLOATS, np.float32), expected(FLOATS))


def noticed(body: str, kind: str, **options: Any) -> bool:
    """Whether the faults are there, and all of this kind."""
    faults = execute(body, **options)[1]
    assert all(kind in fault for fault in faults), faults
    return bool(faults)


def test_reads_and_writes_of_another_warp_need_a_barrier() -> None:
    for barrier, races in (("", True), ("bar.warp.sync -1;", True), ("bar.sync 0;", False)):
        # After all was written and another barrier: write, then read; read, then write.
        begin = f"{STORE} bar.sync 0; {ACROSS}"
        assert noticed(f"{begin} add.s32 %r1, %r1, 1; {STORE} {barrier} {READ} {KEEP}", "read races") == races
        assert noticed(f"{begin} {READ} {barrier} {STORE} {KEEP}", "write races with a read") == races
        two = f"{begin} st.shared.b32 [%r6], %r1; {barrier} add.s32 %r1, %r1, 64; {STORE}"
        assert noticed(two, "write races with a write") == races


def test_threads_of_one_warp_need_a_barrier_of_the_warp() -> None:
    for barrier, races in (("", True), ("bar.warp.sync -1;", False), ("bar.sync 0;", False)):
        assert noticed(f"{STORE} {barrier} {NEXT} {READ} {KEEP}", "read races") == races


def test_a_threads_own_values_and_equal_ones_need_none() -> None:
    assert not execute(f"{STORE} add.s32 %r6, %r5, 0; {READ} {KEEP} add.s32 %r1, %r1, 1; {STORE}")[1]
    assert not execute("st.shared.b32 [global_smem], 7;")[1]
    assert noticed("st.shared.b32 [global_smem], %r1;", "different values")


def test_what_was_never_written_is_noticed() -> None:
    assert noticed(f"add.s32 %r6, %r5, 0; {READ} {KEEP}", "never written")


def test_copies_arrive_when_they_are_waited_for() -> None:
    copy = "cp.async.ca.shared.global [%r5], [%rd3], 4; cp.async.commit_group;"
    wait = "cp.async.wait_group 0;"
    data = np.arange(64, dtype=np.uint32) * 3
    found, faults = execute(f"{copy} {wait} bar.sync 0; {ACROSS} {READ} {KEEP}", data)
    assert not faults
    assert np.array_equal(found, data[np.arange(64) ^ 32])
    assert noticed(f"{STORE} {copy} bar.sync 0; {ACROSS} {READ} {KEEP}", "unfinished cp.async", data=data)
    assert noticed(f"{copy} {STORE} {wait}", "unfinished cp.async", data=data)
    assert noticed(f"{copy} {wait} {ACROSS} {READ} {KEEP}", "read races", data=data)
    # A copy into what another warp may still read.
    late = f"{STORE} bar.sync 0; {ACROSS} {READ} {copy} {wait} {KEEP}"
    assert noticed(late, "write races with a read", data=data)


def test_blocks_that_depend_on_their_order_are_noticed() -> None:
    assert noticed("st.global.b32 [%rd3], %r2;", "store different values at one address", blocks=2)
    assert not execute("st.global.b32 [%rd3], 5;", blocks=2)[1]
    other = "st.global.b32 [%rd3], 5; xor.b32 %r3, %r3, %r2; cvt.u64.u32 %rd2, %r3; add.s64 %rd3, %rd1, 0;"
    assert noticed(f"{other} ld.global.b32 %r7, [%rd3];", "another block", blocks=2)


def test_atomics_count_every_thread_of_every_block() -> None:
    found, faults = execute("atom.global.add.u32 %r7, [%rd1], 1;", blocks=3)
    assert not faults
    assert found[0] == 3 * 64


def test_blocks_may_branch_apart_and_threads_may_not() -> None:
    branch = "setp.eq.b32 %p1, {}, 0; mov.b32 %r7, 1; @%p1 bra $L1; mov.b32 %r7, 2;"
    branch += "$L1: atom.global.add.u32 %r8, [%rd3], %r7;"
    found, _ = execute(branch.format("%r2"), blocks=3)
    assert (found == 5).all()
    with pytest.raises(PtxError, match="branch apart"):
        execute(branch.format("%r1"))


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("ld.global.b32 %r7, [%rd3+4];", "outside of the tensors"),
        ("st.global.b32 [%rd3+-4], %r1;", "outside of the tensors"),
        ("ld.global.b32 %r7, [%rd3+2];", "misaligned"),
        ("st.shared.v4.b32 [%r5], {%r1, %r1, %r1, %r1};", "misaligned"),
        ("st.shared.b32 [%r5+1000], %r1;", "shared memory"),
        ("tcgen05.mma.cta_group::1.kind::i8 [%r1], %rd1, %rd1, %r1, 0;", "tcgen05.mma"),
        ("bar.sync 1, 32;", "bar.sync 1, 32"),
        ("atom.global.add.f32 %r7, [%rd1], %r1;", "atom.global.add.f32"),
    ],
)
def test_what_a_gpu_would_refuse_and_what_is_not_supported_is_named(body: str, named: str) -> None:
    with pytest.raises(PtxError, match=named):
        execute(body)
