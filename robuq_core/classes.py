"""Class names to class ids, the way people type them: whole names and comma-separated synonyms."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from robuq_core.errors import UserError
from robuq_core.files import read_bounded

# Characters of a class name, synonyms and all.
MAX_NAME = 1000


def normalise(name: str) -> str:
    """What two spellings of a name have in common: no case, no underscores, single spaces, and one form of each letter
    (NFKC). The dot of a capital I is dropped, which lower case has anyway."""
    folded = unicodedata.normalize("NFKC", name).casefold().replace("i\u0307", "i")
    return " ".join(unicodedata.normalize("NFKC", folded).replace("_", " ").split())


def synonyms_of(name: str) -> list[str]:
    """The names that ``name`` lists with commas, as they are written; none where it is blank."""
    return [part.strip() for part in name.split(",") if part.strip()]


def read_names(path: Path) -> tuple[str, ...]:
    """The names in a text file, one a line, in the order of the classes; blank lines at its end are none.

    Raises:
        UserError: it cannot be read, is not UTF-8, or has a name longer than :data:`MAX_NAME`.
    """
    try:
        lines = read_bounded(path).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}; give a text file, one class name a line") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a text file, one class name a line") from error
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_NAME:
            raise UserError(f"cannot read {path}: line {number} has {len(line)} characters; at most {MAX_NAME} make a "
                            "class name")  # fmt: skip
    return tuple(lines)


class ClassNames:
    """Finds a class by its whole name or by one of its synonyms.

    ``whole`` and ``synonyms``: normalised names to the ids of the classes that have them.
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
        """Every class that ``name`` may mean: a whole name wins over a synonym."""
        wanted = normalise(name)
        return list(self.whole.get(wanted) or self.synonyms.get(wanted) or ())

    def resolve(self, class_id: int | str) -> int:
        """The id that an id or a name stands for; an id is not looked up.

        Raises:
            ValueError: no class has that name, or several have.
        """
        if not isinstance(class_id, str):
            return int(class_id)
        if not self.num_classes:
            raise ValueError(f"{class_id!r}: this checkpoint has no classes; name none")
        if not self.whole:
            raise ValueError(f"{class_id!r}: this checkpoint has no class names; give the class id, "
                             f"0..{self.num_classes - 1}")  # fmt: skip
        found = self.ids(class_id)
        if not found:
            raise ValueError(f"{class_id!r} is not a class of this checkpoint; give one of its class names, "
                             f"or the class id, 0..{self.num_classes - 1}")  # fmt: skip
        if len(found) > 1:
            raise ValueError(f"{class_id!r} fits several classes; give one of the ids {', '.join(map(str, found))}")
        return found[0]
