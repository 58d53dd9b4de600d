"""A small problem in each language, for trying whether its toolchain works."""

from dataclasses import dataclass

from fusellm.evaluation.yaml_table import yaml_table


@dataclass(frozen=True)
class Example:
    """A problem as MultiPL-E spells it, with a completion that is right and one that is wrong."""

    prompt: str
    right: str
    wrong: str
    tests: str


EXAMPLES = {key: Example(**told) for key, told in yaml_table(__file__).items()}
"""By the keys of `languages.LANGUAGES`."""
