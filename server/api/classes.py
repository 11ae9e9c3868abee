"""Class names to class ids, the way people type them."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Sequence

from server.api.errors import ApiError, invalid


def _normalise(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


class ClassIndex:
    """Finds a class by its whole name or by one of its comma-separated synonyms."""

    def __init__(self, class_names: Sequence[str], num_classes: int) -> None:
        self.names = tuple(class_names)
        self.num_classes = num_classes
        self._whole: defaultdict[str, list[int]] = defaultdict(list)
        self._synonyms: defaultdict[str, list[int]] = defaultdict(list)
        for class_id, name in enumerate(self.names):
            if not name.strip():
                continue
            self._whole[_normalise(name)].append(class_id)
            for synonym in {_normalise(part) for part in name.split(",")}:
                self._synonyms[synonym].append(class_id)

    def name(self, class_id: int) -> str:
        """Its name; empty where the checkpoint knows none."""
        return self.names[class_id] if class_id < len(self.names) else ""

    def resolve(self, class_id: int | None, class_name: str | None) -> int:
        """The class id of a request that has one of the two, or the 422 that tells why there is none."""
        if class_id is not None:
            if class_id >= self.num_classes:
                raise invalid("class_id", f"class_id must be an integer from 0 to {self.num_classes - 1}")
            return class_id
        assert class_name is not None
        wanted = _normalise(class_name)
        found = self._whole.get(wanted) or self._synonyms.get(wanted)
        if not found:
            raise self._unknown(wanted)
        if len(found) > 1:
            ids = ", ".join(map(str, found))
            raise invalid("class_name", f"class_name fits several classes; give one of these as class_id: {ids}")
        return found[0]

    def _unknown(self, wanted: str) -> ApiError:
        if not self._whole:
            return invalid("class_name", "this checkpoint has no class names; give class_id")
        close = difflib.get_close_matches(wanted, self._synonyms, n=5, cutoff=0.6)
        if not close:  # a part of a name is no close match by edits
            close = sorted(name for name in self._synonyms if wanted in name)[:5]
        hint = f"; close are: {', '.join(close)}" if close else ""
        return invalid("class_name", f"class_name is not a class of this checkpoint{hint}")
