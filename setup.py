"""The native CPU kernels. Everything else about the package is in pyproject.toml.

The extension is optional: without a C compiler the package installs and runs on the reference backend.
"""

from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("robuq_core/kernels/native")

setup(
    ext_modules=[
        Extension(
            "robuq_core.kernels._native",
            sources=sorted(path.as_posix() for path in NATIVE.glob("*.c")),
            depends=sorted(path.as_posix() for path in NATIVE.glob("*.h")),
            # No -march: functions carry their instruction set, and one is chosen at run time. No contraction of
            # a * b + c either: where a fused multiply-add is wanted, the source says so.
            # Vectors pass between inlined functions only: their calling convention does not matter (psabi).
            extra_compile_args=[
                *("-std=gnu11", "-O3", "-ffp-contract=off"),
                *("-fvisibility=hidden", "-pthread", "-Wno-psabi"),
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
