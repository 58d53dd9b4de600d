"""Pages of the documentation as what their reader does: the code blocks, and what these need.

A comment on the lines directly before a block, which no reader sees, is a *mark*:

    <!-- needs: a GPU -->                  not run here; NEEDS has what may stand there, and why
    <!-- fragment of: recipe -->           of a YAML block: a part of a recipe, from its top; or of
                                           recipe.corpus.documents, of study.arms, or of chat:
                                           a recipe whose text is generated
    <!-- file: study.yaml -->              of a YAML block: it is written to this file
    <!-- prepare: cp recipe.yaml my.yaml -->   a command that is run before the block, unseen

and one for a whole page, wherever it stands in it:

    <!-- setup: tiny-run -->               worlds that test_documentation.py makes
    <!-- setup: tiny-run as my-run, a -->  the same with its run under further names

A block without a mark is run (bash, python) or read (yaml). Blocks of `text`, `json` and `jinja`
are shown only.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
)

NEEDS = {
    "a hub": "models or data of the Hugging Face hub",
    "a network": "packages or files that are downloaded",
    "a browser": "a window, and somebody who closes it",
    "a GPU": "devices that CI does not have",
    "several machines": "a cluster",
    "real models": "gigabytes of weights that lie in a folder",
    "benchmark data": "data of benchmarks that lie in a folder",
    "minutes": "longer than a test may take",
    "hours": "much longer",
}
SHELLS = ("bash", "sh", "console")
SHOWN = ("", "text", "json", "jinja")
LANGUAGES = (*SHELLS, *SHOWN, "python", "yaml")
MARKS = ("needs", "fragment of", "file", "prepare", "setup")

_COMMENT = re.compile(r"<!--\s*([a-z ]+):\s*(.*?)\s*-->", re.DOTALL)
_HEREDOC = re.compile(r"<<-?\s*(['\"]?)(\w+)\1([^\n]*)\n.*?\n\s*\2(?=\n|$)", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A code block of a page, with its marks."""

    page: str
    line: int
    language: str
    text: str
    marks: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def mark(self, name: str) -> str | None:
        return dict(self.marks).get(name)

    @property
    def is_run(self) -> bool:
        return self.language in (*SHELLS, "python") and self.mark("needs") is None

    @property
    def shell(self) -> str:
        """What a shell runs: of a console what stands after its prompts."""
        if self.language != "console":
            return self.text
        return "\n".join(line[2:] for line in self.text.splitlines() if line.startswith("$ "))


def blocks(page: str) -> list[Block]:
    """The code blocks of a page, in order; MyST's directives are none."""
    found: list[Block] = []
    marks: list[tuple[str, str]] = []
    for token in MarkdownIt("commonmark").parse((ROOT / page).read_text("utf-8")):
        if token.type == "html_block":
            marks += [(name, value) for name, value in _COMMENT.findall(token.content)]
        elif token.type in ("fence", "code_block"):
            assert token.map is not None
            language = token.info if token.type == "fence" else "indented"
            if not language.startswith("{"):
                found.append(Block(page, token.map[0] + 1, language, token.content, tuple(marks)))
            marks = []
        elif not token.type.endswith("_close"):
            marks = []
    return found


def setup(page: str) -> tuple[str, list[str]] | None:
    """The world that a page asks for, and further names of its run."""
    found = re.findall(r"<!--\s*setup:\s*(.*?)\s*-->", (ROOT / page).read_text("utf-8"))
    if not found:
        return None
    name, _, names = found[0].partition(" as ")
    return name, [one.strip() for one in names.split(",") if one.strip()]


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell script, each as its words; what is fed to them is left out."""
    text = _HEREDOC.sub(lambda found: found[3], text).replace("\\\n", " ")
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.commenters = "#"
        words: list[str] = []
        for word in lexer:
            if set(word) <= set("();<>|&"):
                yield words
                words = []
            else:
                words.append(word)
        yield words


def inline_commands(page: str) -> Iterator[list[str]]:
    """Commands of fusellm that stand in a sentence, as code."""
    text = re.sub(r"^ *```.*?^ *```", "", (ROOT / page).read_text("utf-8"), flags=re.M | re.S)
    for found in re.findall(r"`((?:\.venv/bin/)?fusellm [^`]+)`", text):
        yield from commands(re.sub(r"\s+", " ", found))
