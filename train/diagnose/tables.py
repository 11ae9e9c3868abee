"""A diagnosis in the terminal: what quantising costs each layer's output and each head, and where rotation hurts."""

from __future__ import annotations

from rich.table import Table

from train.diagnose.watch import Diagnosis


def layer_table(found: Diagnosis) -> Table:
    """Errors of every layer at its own width, without its rotation and with it."""
    table = Table("layer", "bits", "input error", "output error", "", title="without rotation -> with it")
    for layer in found.layers:
        inputs = (layer.before.error[layer.bits], layer.after.error[layer.bits])
        cells = [f"{before:.4f} -> {after:.4f}" for before, after in (inputs, layer.output_error)]
        table.add_row(layer.name, str(layer.bits), *cells, "rotation hurts" if layer.rotation_hurts else "")
    return table


def head_table(found: Diagnosis) -> Table:
    """Standard deviation of each head's logits and the relative error that 8-bit attention makes in its output."""
    count = max((head.head for head in found.heads), default=-1) + 1
    table = Table("block", *map(str, range(count)), title="heads: sd of the logits, error of 8-bit attention")
    for block in sorted({head.block for head in found.heads}):
        heads = [head for head in found.heads if head.block == block]
        table.add_row(str(block), *(f"{head.logit_sd:.3g}, {head.error:.1%}" for head in heads))
    return table


def rotation_verdict(found: Diagnosis) -> str:
    """One line."""
    hurt = [layer.name for layer in found.layers if layer.rotation_hurts]
    names = f": {', '.join(hurt)}" if hurt else ""
    return f"rotation raises the output error of {len(hurt)} of {len(found.layers)} layers{names}"
