"""A run's folder, read for the report."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fusellm.errors import StoreError
from fusellm.evaluation.measure import SuiteResults, read_suites
from fusellm.models.cards import without_folders
from fusellm.store.files import from_json
from fusellm.store.run_folder import SUITES

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


@dataclass(frozen=True)
class SourceCounts:
    """What became of one source's distributions in one domain; masses are means, 0 to 1."""

    situations: Mapping[str, int]
    mass_kept: float | None
    mass_carried: float | None
    bits_per_byte: float | None
    blocks_left_out: int
    example_left_out: str | None


@dataclass(frozen=True)
class DomainCounts:
    """What fusion counted in one domain, in target positions."""

    blocks: int
    positions: int
    without_source: int
    wins: Mapping[str, int]
    sources: Mapping[str, SourceCounts]


@dataclass(frozen=True)
class ReportedRun:
    """Everything of a run that the report shows."""

    name: str
    recipe: str
    records: list[dict[str, Any]]
    notes: Mapping[str, Any]
    domains: Mapping[str, DomainCounts]
    logs: Mapping[str, Log]
    seconds: Mapping[str, float]
    software: Mapping[str, str]
    suites: list[SuiteResults]

    @property
    def sources(self) -> list[str]:
        """All sources of any domain, in the order of their first mention."""
        return list(
            dict.fromkeys(
                name for domain in self.domains.values() for name in (*domain.sources, *domain.wins)
            )
        )


def read_run(run: Path) -> ReportedRun:
    """Read what the earlier stages have left in a run's folder.

    Raises:
        StoreError: a file that the report cannot do without is missing, or one is damaged.
        EvaluationError: models cannot be compared by a suite, or the extra `eval` is missing.
    """
    results = _required(run, "evaluate/results.json", "evaluate")
    counts = _required(run, "fuse/counts.json", "fuse")
    try:
        records = [dict(record) for record in results["records"]]
        notes = dict(results.get("notes") or {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(run, "evaluate/results.json", "evaluate", error) from None
    try:
        domains = {name: _domain(entry) for name, entry in counts["domains"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(run, "fuse/counts.json", "fuse", error) from None
    recipe_path = run / "recipe.yaml"
    recipe = recipe_path.read_text(encoding="utf-8") if recipe_path.exists() else ""
    manifests = _manifests(run)
    return ReportedRun(
        name=_name(recipe) or run.resolve().name,
        recipe=_to_be_shown(recipe),
        records=records,
        notes=notes,
        domains=domains,
        logs={
            kind: _log(path)
            for kind in ("fused", "clm")
            if (path := run / "train" / kind / "log.jsonl").exists()
        },
        seconds={
            stage: float(manifest["seconds"])
            for stage, manifest in manifests.items()
            if _is_number(manifest.get("seconds"))
        },
        software=_software(manifests),
        suites=read_suites(run / SUITES),
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
    return StoreError(
        f"{run / relative} is not what `fusellm {stage}` writes ({error!r}); "
        f"`fusellm {stage} {run} --redo` writes it again"
    )


def _domain(entry: Mapping[str, Any]) -> DomainCounts:
    return DomainCounts(
        blocks=int(entry["blocks"]),
        positions=int(entry["positions"]),
        without_source=int(entry["without_source"]),
        wins={name: int(count) for name, count in entry["wins"].items()},
        sources={name: _source(counts) for name, counts in entry["sources"].items()},
    )


def _source(entry: Mapping[str, Any]) -> SourceCounts:
    example = entry.get("example_left_out")
    return SourceCounts(
        situations={name: int(count) for name, count in entry["situations"].items()},
        mass_kept=_number(entry.get("mass_kept")),
        mass_carried=_number(entry.get("mass_carried")),
        bits_per_byte=_number(entry.get("bits_per_byte")),
        blocks_left_out=int(entry.get("blocks_left_out") or 0),
        example_left_out=None if example is None else str(example),
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
                    found = (validation if validated else losses).setdefault(name, {})
                    found[step] = (tokens, float(value))
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


def _manifests(run: Path) -> dict[str, dict[str, Any]]:
    """The readable manifests of a run by the name of their stage, in the order of the stages."""
    paths = [
        run / "corpus",
        *sorted((run / "externalize").glob("*")),
        run / "fuse",
        run / "train" / "fused",
        run / "train" / "clm",
        run / "train",
        run / "evaluate",
    ]
    found = {}
    for folder in paths:
        try:
            manifest = from_json((folder / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # nothing on the page depends on one
        if isinstance(manifest, dict):
            found[folder.relative_to(run).as_posix()] = manifest
    return found


def _software(manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The versions of all stages; several, where stages ran with different ones."""
    versions: dict[str, dict[str, None]] = {}
    for manifest in manifests.values():
        software = manifest.get("software")
        if isinstance(software, dict):
            for name, version in software.items():
                versions.setdefault(str(name), {})[str(version)] = None
    return {name: ", ".join(versions[name]) for name in sorted(versions)}


def _to_be_shown(recipe: str) -> str:
    """The recipe without the folders of this machine; nothing where it cannot be read."""
    try:
        parsed = yaml.safe_load(recipe)
    except yaml.YAMLError:
        return ""
    if parsed is None:
        return ""
    return yaml.safe_dump(without_folders(parsed), sort_keys=False, allow_unicode=True)


def _name(recipe: str) -> str | None:
    try:
        parsed = yaml.safe_load(recipe)
    except yaml.YAMLError:
        return None
    name = parsed.get("name") if isinstance(parsed, dict) else None
    return name if isinstance(name, str) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) else None
