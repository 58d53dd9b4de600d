"""What the paper's authors published, to set beside one's own table.

Models of 7 B parameters, continued on 1.8 B tokens, measured by other evaluators (open-instruct,
lm-evaluation-harness 0.3.0, bigcode-evaluation-harness, OpenCompass): directions can be compared
with these figures, values cannot.
"""

from collections.abc import Mapping
from dataclasses import dataclass

SOURCE = "github.com/18907305772/FuseAI, FuseLLM/README.md, commit 0f232e0; arXiv 2401.10491"

MODELS = ("OpenLLaMA-7B", "MPT-7B", "Llama-2-7B", "Llama-2-CLM-7B", "FuseLLM-7B")
"""Two sources, target (the third source), CLM baseline, fused."""


@dataclass(frozen=True)
class Published:
    """One task or one suite's mean, with the points of each of `MODELS`."""

    task: str
    points: tuple[float, float, float, float, float]


_BBH = (Published("mean of 27 tasks", (33.87, 33.38, 39.70, 40.44, 41.75)),)

PUBLISHED: Mapping[str, tuple[Published, ...]] = {
    "bbh": _BBH,
    "bbh_harness": _BBH,
    "commonsense": (
        Published("ARC-easy", (69.70, 70.12, 74.58, 74.54, 75.04)),
        Published("ARC-challenge", (41.38, 42.15, 46.33, 46.50, 47.44)),
        Published("BoolQ", (72.29, 74.74, 77.71, 76.88, 78.13)),
        Published("HellaSwag", (74.53, 76.25, 76.00, 76.57, 76.78)),
        Published("OpenBookQA", (41.00, 42.40, 44.20, 44.80, 45.40)),
    ),
    "multiple": (Published("mean of 10 languages", (18.11, 17.26, 14.63, 14.83, 15.56)),),
    "textgen": (
        Published("TriviaQA", (39.96, 28.89, 52.46, 53.14, 54.49)),
        Published("DROP", (22.31, 23.54, 27.25, 28.51, 28.97)),
        Published("LAMBADA", (70.31, 70.08, 73.28, 73.45, 73.72)),
        Published("IWSLT2017", (5.51, 5.49, 6.48, 6.91, 6.75)),
        Published("SciBench", (0.68, 0.88, 0.14, 0.94, 1.65)),
    ),
}
