"""Class names to class ids, the way people type them: whole names, synonyms, and a ranked search."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from robuq_core.classes import ClassNames, normalise
from server.errors import ApiError, invalid

# Least similarity (difflib's ratio) that counts as a slip of the pen.
FUZZY_CUTOFF = 0.7
MAX_HINTS = 5


class ClassIndex(ClassNames):
    """Finds a class by its whole name, by a synonym, or by a part of either."""

    def name(self, class_id: int) -> str:
        return self.names[class_id] if class_id < len(self.names) else ""

    def has_name(self, name: str) -> bool:
        return normalise(name) in self.synonyms

    def search(self, query: str, limit: int) -> list[int]:
        """Class ids that ``query`` may mean, the best first; all of them in order if it is blank.

        Rank: the id itself, a whole name, a name's beginning, a word's beginning, any part; the shorter name first on
        a tie. If no name holds it, those that are spelt much like it.
        """
        wanted = normalise(query)
        if not wanted:
            return list(range(min(limit, self.num_classes)))
        found: dict[int, None] = {}
        if wanted.isascii() and wanted.isdigit() and int(wanted[:9]) < self.num_classes:
            found[int(wanted[:9])] = None
        for synonym in self._ranked(wanted):
            found.update(dict.fromkeys(self.synonyms[synonym]))
            if len(found) >= limit:
                break
        return list(found)[:limit]

    def of_request(self, class_id: int | None, class_name: str | None) -> int:
        """The class id of a request that has at most one of the two, or the 422 that says why there is none.

        0 where the model has no classes, and the request names none.
        """
        if not self.num_classes:
            for field, value in (("class_id", class_id), ("class_name", class_name)):
                if value is not None:
                    raise invalid(field, f"{field}: this model has no classes; remove the field")
            return 0
        if class_id is not None:
            if class_id >= self.num_classes:
                raise invalid("class_id", f"class_id must be an integer from 0 to {self.num_classes - 1}")
            return class_id
        if class_name is None:
            raise invalid("class_id", "give class_id or class_name")
        return self.by_name(class_name, "class_name", "give one of these as class_id")

    def by_name(self, name: str, field: str, instead: str) -> int:
        """The class of that whole name or synonym; else the 422 for ``field``, with what to do ``instead``."""
        found = self.ids(name)
        if not found:
            raise self._unknown(normalise(name), field)
        if len(found) > 1:
            raise invalid(field, f"{field} fits several classes; {instead}: {', '.join(map(str, found))}")
        return found[0]

    def _unknown(self, wanted: str, field: str) -> ApiError:
        if not self.whole:
            return invalid(field, "this checkpoint has no class names; give the class id")
        close = [synonym for synonym, _ in zip(self._ranked(wanted), range(MAX_HINTS), strict=False)]
        hint = f"; did you mean: {', '.join(close)}" if close else ""
        return invalid(field, f"{field} is not a class of this checkpoint{hint}")

    def _ranked(self, wanted: str) -> Iterator[str]:
        tiers: tuple[list[str], ...] = ([], [], [], [])
        for synonym in self.synonyms:
            position = synonym.find(wanted)
            if position < 0:
                continue
            if position == 0:
                tiers[0 if len(synonym) == len(wanted) else 1].append(synonym)
            else:
                tiers[2 if f" {wanted}" in synonym else 3].append(synonym)
        for tier in tiers:
            yield from sorted(tier, key=lambda synonym: (len(synonym), synonym))
        if not any(tiers):
            yield from difflib.get_close_matches(wanted, self.synonyms, n=len(self.synonyms) or 1, cutoff=FUZZY_CUTOFF)
