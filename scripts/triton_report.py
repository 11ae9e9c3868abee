"""What each Triton kernel takes on each architecture, compiled ahead of time: a table in Markdown. Needs no GPU."""

from __future__ import annotations

import argparse

import triton

from robuq_core.kernels.triton.aot import SHARED_LIMIT
from robuq_core.kernels.triton.cases import cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--architectures", type=int, nargs="+", default=sorted(SHARED_LIMIT), help="compute capability, 90 for 9.0"
    )
    chosen = parser.parse_args().architectures
    print(f"Triton {triton.__version__}\n")
    print("| kernel | sm | tile | warps | registers | stack, bytes | shared, bytes | tensor cores |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for architecture in chosen:
        for case in cases(architecture):
            result = case.compile(architecture)
            tile = " ".join(f"{name}={value}" for name, value in case.config.blocks.items())
            kinds = ", ".join(sorted(result.tensor_instructions())) or "-"
            numbers = f"{result.registers} | {result.stack} | {result.shared}"
            print(f"| {case.name} | {architecture} | {tile} | {case.config.num_warps} | {numbers} | {kinds} |")


if __name__ == "__main__":
    main()
