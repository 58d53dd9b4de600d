"""A run's folder, read for the report."""

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, TypeAdapter, ValidationError

from fusellm.config.yaml_text import read_yaml
from fusellm.errors import RecipeError, StoreError
from fusellm.evaluation.measure import SuiteResults, read_suites
from fusellm.evaluation.text.intervals import Record
from fusellm.models.cards import without_folders
from fusellm.store.continuations import ContinuedTexts, continuations_of
from fusellm.store.files import from_json
from fusellm.store.identity import digest
from fusellm.store.manifest import MANIFEST, Manifest, first_fault, read_manifest
from fusellm.store.planned import plan_of
from fusellm.store.run_folder import RECIPE, SUITES
from fusellm.store.usage import usage_of

LOSSES = ("clm_loss", "fusion_loss")


@dataclass
class Curve:
    """Values over tokens."""

    tokens: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Log:
    """One training: losses (nats per token) and validation (bits per byte), by name."""

    losses: Mapping[str, Curve]
    validation: Mapping[str, Curve]


_Measured = Annotated[float | None, BeforeValidator(lambda value: _number(value))]


@dataclass(frozen=True)
class SourceCounts:
    """What became of one source's distributions in one domain; masses are means, 0 to 1."""

    situations: dict[str, int]
    mass_kept: _Measured = None
    mass_carried: _Measured = None
    bits_per_byte: _Measured = None
    blocks_left_out: int = 0
    example_left_out: str | None = None


@dataclass(frozen=True)
class DomainCounts:
    """What fusion counted in one domain, in target positions."""

    blocks: int
    positions: int
    without_source: int
    wins: dict[str, int]
    sources: dict[str, SourceCounts]


@dataclass(frozen=True)
class PlanAndFact:
    """A stage as `fusellm plan` had it, and as it was; None for what is not known.

    Attributes:
        seconds, bytes, memory: (planned, measured).
    """

    stage: str
    seconds: tuple[float | None, float | None]
    bytes: tuple[float | None, float | None]
    memory: tuple[float | None, float | None]


_DOMAINS, _RECORDS = TypeAdapter(dict[str, DomainCounts]), TypeAdapter(list[Record])


@dataclass(frozen=True)
class ReportedRun:
    """Everything of a run that the report shows."""

    name: str
    recipe: str
    records: list[Record]
    notes: Mapping[str, Any]
    domains: Mapping[str, DomainCounts]
    logs: Mapping[str, Log]
    seconds: Mapping[str, float]
    software: Mapping[str, str]
    suites: list[SuiteResults]
    plan: list[PlanAndFact] = field(default_factory=list)
    continuations: ContinuedTexts | None = None

    @property
    def sources(self) -> list[str]:
        """All sources of any domain, in the order of their first mention."""
        return list(
            dict.fromkeys(
                name for domain in self.domains.values() for name in (*domain.sources, *domain.wins)
            )
        )

    def read_in(self, source: str) -> dict[str, SourceCounts]:
        """The counts of a source, by domain, where it was read."""
        return {
            name: domain.sources[source]
            for name, domain in self.domains.items()
            if source in domain.sources
        }

    @property
    def examples(self) -> list[tuple[str, str, str]]:
        """Source, domain, and the one block named as left out."""
        return [
            (source, name, counts.example_left_out)
            for source in self.sources
            for name, counts in self.read_in(source).items()
            if counts.example_left_out is not None
        ]


def read_run(run: Path, alone: bool = True) -> ReportedRun:
    """Read what the earlier stages have left in a run's folder.

    Args:
        alone: whether its suites, its plan and what its models write are read too, which are not
            shown beside others.

    Raises:
        StoreError: a file that the report cannot do without is missing, or one is damaged.
        EvaluationError: models cannot be compared by a suite, or the extra `eval` is missing.
    """
    results = _required(run, "evaluate/results.json", "evaluate")
    counts = _required(run, "fuse/counts.json", "fuse")
    try:
        records = _RECORDS.validate_python(results["records"])
        notes = dict(results.get("notes") or {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(run, "evaluate/results.json", "evaluate", error) from None
    try:
        domains = _DOMAINS.validate_python(counts["domains"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(run, "fuse/counts.json", "fuse", error) from None
    recipe = read_recipe(run)
    name = recipe.get("name") if isinstance(recipe, dict) else None
    manifests = _manifests(run)
    return ReportedRun(
        name=name if name and isinstance(name, str) else run.resolve().name,
        recipe=_to_be_shown(recipe),
        records=records,
        notes=notes,
        domains=domains,
        logs={
            kind: _log(path)
            for kind in ("fused", "clm")
            if (path := run / "train" / kind / "log.jsonl").exists()
        },
        seconds={stage: manifest.seconds for stage, manifest in manifests.items()},
        software=_software(manifests.values()),
        suites=read_suites(run / SUITES) if alone else [],
        plan=_plan_and_fact(run, manifests) if alone else [],
        continuations=continuations_of(run) if alone else None,
    )


def _required(run: Path, relative: str, stage: str) -> Any:
    path = run / relative
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(
            f"there is no {path}, which the report needs; `fusellm {stage} {run}` writes it"
        ) from None
    except ValueError as error:
        raise _damaged(run, relative, stage, error) from None


def _damaged(run: Path, relative: str, stage: str, error: Exception) -> StoreError:
    why = first_fault(error) if isinstance(error, ValidationError) else repr(error)
    return StoreError(
        f"{run / relative} is not what `fusellm {stage}` writes ({why}); "
        f"`fusellm {stage} {run} --redo` writes it again"
    )


def _log(path: Path) -> Log:
    """A log; of lines that a resumed training wrote again, the later ones count."""
    losses: dict[str, dict[int, tuple[float, float]]] = {}
    validation: dict[str, dict[int, tuple[float, float]]] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            entry = from_json(line)
            step, tokens = int(entry["step"]), float(entry["tokens"])
            validated = entry.get("validation")
            named = validated or {name: entry.get(name) for name in LOSSES}
            for name, value in named.items():
                if _is_number(value):
                    points = (validation if validated else losses).setdefault(name, {})
                    points[step] = (tokens, float(value))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if index == len(lines) - 1:
                break  # cut off while it was written
            raise StoreError(
                f"{path}, line {index + 1}, is no log line ({error!r}); remove it"
            ) from None
    return Log(
        {name: _curve(points) for name, points in losses.items()},
        {name: _curve(points) for name, points in validation.items()},
    )


def _curve(points: Mapping[int, tuple[float, float]]) -> Curve:
    ordered = [points[step] for step in sorted(points)]
    return Curve([tokens for tokens, _ in ordered], [value for _, value in ordered])


def _manifests(run: Path) -> dict[str, Manifest]:
    """The readable manifests of a run by the name of their stage, in the order of the stages."""
    sources = sorted(path.relative_to(run).as_posix() for path in (run / "externalize").glob("*"))
    manifests = {}
    for name in ("corpus", *sources, "fuse", "train/fused", "train/clm", "evaluate"):
        with suppress(StoreError):  # nothing on the page depends on one
            manifests[name] = read_manifest(run / name / MANIFEST)
    return manifests


def _plan_and_fact(run: Path, manifests: Mapping[str, Manifest]) -> list[PlanAndFact]:
    """What was planned of each stage that is finished, beside what it took."""
    plan, usage = plan_of(run), usage_of(run)
    if plan is None or plan.made_for != _recipe_digest(run):
        return []  # it was of another recipe
    rows = []
    for stage in plan.stages:
        manifest, used = manifests.get(stage.name), usage.get(stage.name)
        if manifest is None or not manifest.complete:
            continue
        size = sum(int(shard["bytes"]) for shard in manifest.shards.values())
        memory = None if used is None else used.device_memory
        rows.append(
            PlanAndFact(
                stage.name,
                (stage.seconds, manifest.seconds),
                (stage.bytes, float(size)),
                (stage.memory, memory),
            )
        )
    return rows


def _recipe_digest(run: Path) -> str | None:
    try:
        return digest((run / RECIPE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def _software(manifests: Iterable[Manifest]) -> dict[str, str]:
    """The versions of all stages; several, where stages ran with different ones."""
    versions: dict[str, dict[str, None]] = {}
    for manifest in manifests:
        for name, version in manifest.software.items():
            versions.setdefault(name, {})[version] = None
    return {name: ", ".join(versions[name]) for name in sorted(versions)}


def _to_be_shown(recipe: Any) -> str:
    """The recipe without the folders of this machine; nothing where there is none."""
    shown = without_folders(recipe)
    return "" if shown is None else yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)


def read_recipe(run: Path) -> Any:
    """What the recipe says; None where it cannot be read."""
    try:
        return read_yaml((run / RECIPE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecipeError):
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) else None
