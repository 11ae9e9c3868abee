"""Everything that needs a GPU to be known of the Triton backend, in one run: results first, then times.

    python scripts/gpu_check.py --out gpu_check.json

Parts are independent: one that fails is written down with its traceback, and the next one runs. The report is written
after every part. Ends with 1 if a part failed. ``--rehearse`` runs all of it at tiny sizes in Triton's interpreter,
without a GPU: its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from gpu_checks.check import Check
from gpu_checks.forwards import forward, time_forward
from gpu_checks.launches import time_configs, time_linears, tune
from gpu_checks.ops import attention, dense_linear, rotate_quantize, rows_are_their_own, ternary_linear

from robuq_core.files import replacing


def environment(check: Check) -> dict[str, Any]:
    import triton

    found = {"backend": check.ours.name, "torch": torch.__version__, "triton": triton.__version__}
    if check.on_gpu:
        properties = torch.cuda.get_device_properties(check.device)
        found |= {"gpu": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


PARTS = (
    *(environment, rotate_quantize, ternary_linear, attention, dense_linear, rows_are_their_own, forward),
    *(time_linears, time_forward, time_configs),
    tune,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "gpu_check.json")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU, in Triton's interpreter")
    parser.add_argument("--parts", nargs="+", choices=[part.__name__ for part in PARTS], help="only these")
    parser.add_argument("--tune", action="store_true", help="also measure launch shapes and keep them for this GPU")
    arguments = parser.parse_args()
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which is later
    torch.backends.cuda.matmul.allow_tf32 = False
    check, report = Check(arguments.rehearse), {}
    for part in PARTS:
        if arguments.parts and part.__name__ not in arguments.parts:
            continue
        if part is tune and not (arguments.tune or arguments.parts):
            continue
        began = time.perf_counter()
        try:
            with torch.inference_mode():
                outcome = {"ok": True, **part(check)}
        except Exception:
            outcome = {"ok": False, "error": traceback.format_exc()}
        outcome["seconds"] = round(time.perf_counter() - began, 2)
        report[part.__name__] = outcome
        print(f"{part.__name__}: {'ok' if outcome['ok'] else 'FAILED'} in {outcome['seconds']} s", flush=True)
        if not outcome["ok"]:
            print(outcome["error"], flush=True)
        with replacing(arguments.out) as temporary:
            temporary.write_text(json.dumps(report, indent=1, default=str) + "\n")
    return 0 if all(outcome["ok"] for outcome in report.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
