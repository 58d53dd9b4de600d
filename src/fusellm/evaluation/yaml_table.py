"""Tables that modules have beside them as YAML."""

from pathlib import Path
from typing import Any

import yaml


def yaml_table(module: str) -> Any:
    """What the YAML file beside a module says that has the module's name.

    Args:
        module: `__file__` of the module.
    """
    return yaml.safe_load(Path(module).with_suffix(".yaml").read_text(encoding="utf-8"))
