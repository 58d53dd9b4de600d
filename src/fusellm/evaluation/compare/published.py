"""What the paper's authors published, to set beside one's own table.

Models of 7 B parameters, continued on 1.8 B tokens, measured by other evaluators (open-instruct,
lm-evaluation-harness 0.3.0, bigcode-evaluation-harness, OpenCompass): directions can be compared
with these figures, values cannot.
"""

from collections.abc import Mapping, Sequence

from fusellm.evaluation.yaml_table import yaml_table

SOURCE = "github.com/18907305772/FuseAI, FuseLLM/README.md, commit 0f232e0; arXiv 2401.10491"

_TABLE = yaml_table(__file__)

MODELS: tuple[str, ...] = tuple(_TABLE["models"])
"""Two sources, target (the third source), CLM baseline, fused."""

PUBLISHED: Mapping[str, Mapping[str, Sequence[float]]] = _TABLE["suites"]
"""By suite and task: the points of each of `MODELS`."""
