"""Letters and digits of many typefaces as a data set: 62 classes of grey images, whole families held out.

    python scripts/glyphs.py --out data/glyphs /usr/share/fonts
    python scripts/glyphs.py --out data/glyphs @fonts.txt         # one path a line

Reads TrueType and OpenType faces. A face is skipped if it lacks a character, draws pictures in place of letters (or
letters that hardly anybody would read), or repeats another face. Writes IDX files, which ``data.path`` reads: ``train``
and, of the families that are held out, ``test``; and ``faces.json``, which holds the outcome for every face.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import string
import struct
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from robuq_core.errors import UserError
from robuq_core.files import replacing

# The classes, in this order.
CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
# Drawn this many times as large and averaged down, so that no hint bends a stroke to the pixels.
_SUPERSAMPLE = 4
# White around the tallest and the widest character of a face, as a share of the side.
_MARGIN = 1 / 16
# A face is of letters if at least this share of its characters is nearest to the mean of the same character.
_LEGIBLE = 0.5
# Two faces are one if their images differ by less than this mean square, of a full scale of 1.
_SAME = 1e-3
_SUFFIXES = {".ttf", ".otf"}
# Noncharacters: what a face draws for them is what it draws for every character that it lacks.
_ABSENT = "\uffff\ufffe"


@dataclass(frozen=True)
class Face:
    """A face and its ``images``, uint8 ``[62, S, S]``, black on white."""

    path: Path
    family: str
    style: str
    images: np.ndarray

    @property
    def group(self) -> str:
        """What is held out together: faces whose family names begin with the same word."""
        return self.family.split()[0].casefold()


def draw_face(path: Path, side: int) -> Face | str:
    """The characters of a font file, or why it is skipped.

    All on one baseline at one size, the largest at which the tallest and the widest fit; each centred in its width.
    """
    canvas = side * _SUPERSAMPLE
    room = canvas * (1 - 2 * _MARGIN)
    try:
        probe = ImageFont.truetype(path, canvas)
        missing = {_ink(probe, character) for character in _ABSENT}
        boxes = []
        for character in CHARACTERS:
            ink = _ink(probe, character)
            if ink in missing or not ink[1]:
                return f"lacks {character}"
            boxes.append(probe.getbbox(character, anchor="ls"))
        left, top, right, bottom = np.array(boxes).T
        scale = room / max(bottom.max() - top.min(), (right - left).max())
        font = ImageFont.truetype(path, max(1, int(canvas * scale)))
        baseline = (canvas - (bottom.max() + top.min()) * scale) / 2
        images = [_draw(font, character, canvas, baseline) for character in CHARACTERS]
        family, style = probe.getname()
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"
    if not family:
        return "has no family name"
    return Face(path, family, style or "", np.stack(images))


def _ink(font: ImageFont.FreeTypeFont, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    pixels = bytes(mask)
    return mask.size, pixels if any(pixels) else b""


def _draw(font: ImageFont.FreeTypeFont, character: str, canvas: int, baseline: float) -> np.ndarray:
    image = Image.new("L", (canvas, canvas), 255)
    left, _, right, _ = font.getbbox(character, anchor="ls")
    ImageDraw.Draw(image).text(((canvas - left - right) / 2, baseline), character, fill=0, font=font, anchor="ls")
    return np.asarray(image.reduce(_SUPERSAMPLE))


def font_files(paths: Sequence[Path]) -> list[Path]:
    """The font files among ``paths`` and in the folders there, sorted.

    Raises:
        UserError: a path does not exist, or there is no font file.
    """
    found: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist")
        found |= {each for each in path.rglob("*") if each.suffix.lower() in _SUFFIXES} if path.is_dir() else {path}
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: no {' or '.join(sorted(_SUFFIXES))} file there")
    return sorted(found)


def legible(faces: Sequence[Face]) -> list[bool]:
    """Whether most characters of a face look more like themselves, on average over all faces, than like others."""
    if not faces:
        return []
    images = np.stack([face.images for face in faces]).reshape(len(faces), len(CHARACTERS), -1).astype(np.float32)
    means = images.mean(axis=0)
    means = means - means.mean(axis=1, keepdims=True)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    # A pixel's mean over the character takes no part: it is the same for all means.
    right = [((each @ means.T).argmax(axis=1) == np.arange(len(CHARACTERS))).mean() for each in images]
    return [share >= _LEGIBLE for share in right]


def repeats(faces: Sequence[Face]) -> list[Face | None]:
    """For each face the earlier one that it repeats, if any."""
    if not faces:
        return []
    flat = np.stack([face.images for face in faces]).reshape(len(faces), -1).astype(np.float32) / 255
    squares = np.square(flat).sum(axis=1)
    kept: list[int] = []
    found: list[Face | None] = []
    for i, row in enumerate(flat):
        errors = (squares[kept] + squares[i] - 2 * flat[kept] @ row) / flat.shape[1]
        same = bool(len(errors)) and errors.min() < _SAME
        found.append(faces[kept[int(errors.argmin())]] if same else None)
        if not same:
            kept.append(i)
    return found


def is_held_out(group: str, share: float) -> bool:
    """Whether a group of families is: by its name alone, so that other faces beside it change nothing."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:4], "big") < share * 2**32


def write_idx(folder: Path, prefix: str, faces: Sequence[Face]) -> None:
    """Images and labels of ``faces`` as the IDX files of one split; the same faces give the same bytes."""
    images = np.concatenate([face.images for face in faces])
    labels = np.tile(np.arange(len(CHARACTERS), dtype=np.uint8), len(faces))
    for name, array in ((f"{prefix}-images-idx3-ubyte.gz", images), (f"{prefix}-labels-idx1-ubyte.gz", labels)):
        header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        with replacing(folder / name) as temporary:
            temporary.write_bytes(gzip.compress(header + array.tobytes(), 6, mtime=0))


def make(paths: Sequence[Path], folder: Path, side: int, held_out: float) -> Counter[str]:
    """Write the data set of the fonts at ``paths`` to ``folder``; returns how many faces there are of each outcome,
    by its first word.

    Raises:
        UserError: no font can be used, or all or none of their families would be held out.
    """
    drawn = {path: draw_face(path, side) for path in font_files(paths)}
    outcomes: dict[Path, str] = {path: found for path, found in drawn.items() if isinstance(found, str)}
    faces = [face for face in drawn.values() if isinstance(face, Face)]
    outcomes |= {face.path: "unlike most letters" for face, fine in zip(faces, legible(faces), strict=True) if not fine}
    faces = [face for face in faces if face.path not in outcomes]
    # Trained faces first: of two that are the same, the one that is held out goes.
    faces.sort(key=lambda face: (is_held_out(face.group, held_out), face.path))
    parts: dict[str, list[Face]] = {"train": [], "test": []}
    for face, other in zip(faces, repeats(faces), strict=True):
        split = "test" if is_held_out(face.group, held_out) else "train"
        outcomes[face.path] = split if other is None else f"repeats {other.path}"
        if other is None:
            parts[split].append(face)
    for split, chosen in parts.items():
        if not chosen:
            raise UserError(f"no face is left for the split {split}: give more fonts, or another --held-out")
    folder.mkdir(parents=True, exist_ok=True)
    write_idx(folder, "train", parts["train"])
    write_idx(folder, "t10k", parts["test"])
    names = {face.path: {"family": face.family, "style": face.style} for face in faces}
    table = {str(path): {**names.get(path, {}), "outcome": outcomes[path]} for path in sorted(outcomes)}
    with replacing(folder / "faces.json") as temporary:
        temporary.write_text(json.dumps({"side": side, "held_out": held_out, "faces": table}, indent=1) + "\n")
    return Counter(outcome.partition(" ")[0] for outcome in outcomes.values())


def main() -> None:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary, fromfile_prefix_chars="@")
    parser.add_argument(
        "fonts", type=Path, nargs="+", help="font files, folders of them, and @FILE with one path a line"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the IDX files")
    parser.add_argument("--side", type=int, default=32, help="pixels a side (default: 32)")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the families, by name (default: 0.1)")
    options = parser.parse_args()
    try:
        counts = make(options.fonts, options.out, options.side, options.held_out)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{options.out}: " + ", ".join(f"{outcome} {count}" for outcome, count in counts.most_common()))


if __name__ == "__main__":
    main()
