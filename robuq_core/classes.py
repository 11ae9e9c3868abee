"""Class names to class ids, the way people type them: whole names and comma-separated synonyms."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from robuq_core.errors import UserError
from robuq_core.files import read_bounded

MAX_NAME = 1000  # characters of a class name, including synonyms


def normalise(name: str) -> str:
    """Spelling to compare: ignores case, underscores, repeated spaces and the form of letters (NFKC). The dot of a
    capital dotted I is dropped."""
    folded = unicodedata.normalize("NFKC", name).casefold().replace("i\u0307", "i")
    return " ".join(unicodedata.normalize("NFKC", folded).replace("_", " ").split())


def synonyms_of(name: str) -> list[str]:
    """The comma-separated names in ``name``, as written; empty if it is blank."""
    return [part.strip() for part in name.split(",") if part.strip()]


def read_names(path: Path) -> tuple[str, ...]:
    """The names in a text file, one per line, in class order; trailing blank lines are ignored.

    Raises:
        UserError: it cannot be read, is not UTF-8, or has a name longer than :data:`MAX_NAME`.
    """
    try:
        lines = read_bounded(path).decode("utf-8").splitlines()
    except (ValueError, OSError) as error:
        raise UserError(f"cannot read {path} ({error}); give a UTF-8 text file, one class name per line") from error
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_NAME:
            raise UserError(f"cannot read {path}: line {number} has {len(line)} characters; a class name has at most "
                            f"{MAX_NAME}")  # fmt: skip
    return tuple(lines)


class ClassNames:
    """Finds a class by its whole name or by a synonym.

    ``whole`` and ``synonyms``: normalised name to the ids of the classes that have it.
    """

    def __init__(self, names: Sequence[str], num_classes: int) -> None:
        self.names = tuple(names)
        self.num_classes = num_classes
        self.whole: defaultdict[str, list[int]] = defaultdict(list)
        self.synonyms: defaultdict[str, list[int]] = defaultdict(list)
        for class_id, name in enumerate(self.names):
            if not name.strip():
                continue
            self.whole[normalise(name)].append(class_id)
            for synonym in {normalise(part) for part in name.split(",")}:
                self.synonyms[synonym].append(class_id)

    def ids(self, name: str) -> list[int]:
        """Every class that ``name`` may mean; whole names take precedence over synonyms."""
        wanted = normalise(name)
        return list(self.whole.get(wanted) or self.synonyms.get(wanted) or ())

    def resolve(self, class_id: int | str) -> int:
        """The id of a class name; an id is returned unchecked.

        Raises:
            ValueError: unknown or ambiguous name.
        """
        if not isinstance(class_id, str):
            return int(class_id)
        by_id = f"0..{self.num_classes - 1}"
        if not self.num_classes:
            raise ValueError(f"{class_id!r}: this checkpoint has no classes; remove the class")
        if not self.whole:
            raise ValueError(f"{class_id!r}: this checkpoint has no class names; give the class id, {by_id}")
        found = self.ids(class_id)
        if not found:
            raise ValueError(f"{class_id!r} is not a class of this checkpoint; give one of its class names, or the "
                             f"class id, {by_id}")  # fmt: skip
        if len(found) > 1:
            raise ValueError(f"{class_id!r} matches several classes; give one of the ids {', '.join(map(str, found))}")
        return found[0]
