"""The commands that the pages for people show, README.md and docs/*.md and the rest: found, and cut into words."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "THIRD_PARTY")),
    *sorted((ROOT / "docs").glob("*.md")),
]

SHELL = {"sh", "shell", "bash", "console"}
# Code within a sentence is a command if it begins like one and goes on.
PROGRAMS = (
    r"(?:robuq|robuq-train|robuq-serve|make|docker|kubectl|curl|locust|torchrun|python|pip|pytest|mkdocs|serve|ray"
    r"|tensorboard|hf|helm)"
)
INLINE = re.compile(rf"(?<!`)`({PROGRAMS} [^`\n]+)`(?!`)")
INDENTED = re.compile(rf"^ {{4,}}((?:[A-Z_]+=\S+ )*{PROGRAMS} .+)$", re.M)
FENCE = re.compile(r"^( *)(```+|~~~+) *(\w*)[^\n]*\n(.*?)^\1\2[ \t]*$", re.M | re.S)
SEPARATORS = {"&&", "||", "|", ";", "&"}


@dataclass(frozen=True)
class Command:
    """One simple command: its words, without redirections and variables set in front of it."""

    page: str
    line: int
    words: tuple[str, ...]
    inline: bool = False

    @property
    def text(self) -> str:
        return shlex.join(self.words)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(path: Path) -> Iterator[Block]:
    text = path.read_text()
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        body = re.sub(rf"^{found.group(1)}", "", found.group(4), flags=re.M)
        yield Block(path.relative_to(ROOT).as_posix(), line, found.group(3).lower(), body)


def cut(text: str) -> Iterator[tuple[str, ...]]:
    """The simple commands of a line of shell."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    tokens = iter(lexer)
    for token in tokens:
        if token in SEPARATORS:
            yield tuple(words)
            words = []
        elif set(token) <= set("<>&") and token:
            next(tokens)  # the file of a redirection
            if words and words[-1].isdigit():
                words.pop()  # and the number in front of it
        else:
            words.append(token)
    yield tuple(words)


def simple(page: str, line: int, text: str, inline: bool = False) -> Iterator[Command]:
    for words in cut(text):
        while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0], re.S):
            words = words[1:]
        if words[:2] == ("robuq-serve", "robuq-serve"):  # the end of a docker command: the image, and what runs in it
            words = words[1:]
        if words:
            yield Command(page, line, words, inline)


def logical_lines(block: Block) -> Iterator[tuple[int, str]]:
    """Lines of shell with their numbers: continued lines joined, quotes closed, a console's output left out."""
    pending, start = "", 0
    for number, line in enumerate(block.text.splitlines(), block.line + 1):
        if not pending:
            start = number
            if block.language == "console":
                if not line.startswith("$ "):
                    continue
                line = line[2:]
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        try:
            shlex.split(pending, comments=True)
        except ValueError:  # a quote is open
            pending += "\n"
            continue
        if pending.strip():
            yield start, pending
        pending = ""
    assert not pending, f"{block}: unfinished: {pending}"


def commands(path: Path) -> list[Command]:
    """Every command of a page: in blocks of shell, indented, and within sentences."""
    page = path.relative_to(ROOT).as_posix()
    found: list[Command] = []
    for block in blocks(path):
        if block.language in SHELL:
            for line, text in logical_lines(block):
                found += simple(page, line, text)
    text = path.read_text()
    text = FENCE.sub(lambda match: "\n" * match.group().count("\n"), text)
    text = re.sub(r"<!--.*?-->", lambda match: "\n" * match.group().count("\n"), text, flags=re.S)
    for pattern, inline in ((INLINE, True), (INDENTED, False)):
        for match in pattern.finditer(text):
            found += simple(page, text.count("\n", 0, match.start()) + 1, match.group(1), inline)
    return sorted(found, key=lambda command: command.line)


ALL = [command for path in PAGES for command in commands(path)]
PYTHON = [block for path in PAGES for block in blocks(path) if block.language in ("python", "py")]
