"""A small problem in each language, for trying whether its toolchain works."""

from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Example:
    """A problem as MultiPL-E spells it, with a completion that is right and one that is wrong."""

    prompt: str
    right: str
    wrong: str
    tests: str


_FILE = Path(__file__).with_suffix(".yaml")
EXAMPLES = {key: Example(**told) for key, told in yaml.safe_load(_FILE.read_text("utf-8")).items()}
"""By the keys of `languages.LANGUAGES`."""
