"""Models merged into one folder, tensor by tensor: of each never more than one tensor in memory."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from fusellm.config import ModelSettings
from fusellm.errors import ArgumentError, ModelError, NumericsError
from fusellm.merging.card import merge_card
from fusellm.merging.methods import merge_tensors
from fusellm.merging.opened import (
    FLOATS,
    Opened,
    common_target,
    open_model,
    require_alike,
    settings_of_place,
)
from fusellm.merging.settings import METHODS, MergeSettings, settings_of
from fusellm.merging.written import (
    BYTES,
    Plan,
    require_free,
    require_room,
    whole_folder,
    write_weights,
)
from fusellm.models.headers import TensorHeader
from fusellm.models.places import HUB_FAULTS
from fusellm.progress import Bar, Progress, Silent
from fusellm.store.files import from_json

_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class MergedModel:
    """What a merge has made.

    Attributes:
        folder: of the model.
        settings: the method, and the numbers that it read.
        base: what was merged over, where the method has a base.
        tensors, parameters: how many there are.
    """

    folder: Path
    settings: MergeSettings
    base: str | None
    tensors: int
    parameters: int


def merge_models(
    models: Sequence[str | PathLike[str]],
    out: str | PathLike[str],
    *,
    method: str,
    base: str | PathLike[str] | None = None,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    scale: float | None = None,
    t: float | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
) -> MergedModel:
    """Merge the weights of models of one architecture and one tokenizer into a new folder.

    Config, generation config and tokenizer are those of the first model, the numbers' types those
    of the base, or of the first model without one. Computed in float32.

    Args:
        models: two or more: folders, names on the hub, zoo/NAME, or runs, which stand for their
            fused models.
        out: the folder, which is not there or empty. It is there whole, or not at all.
        method: linear, slerp, task_arithmetic, ties, dare_linear, dare_ties or sce
            (`fusellm.merging.methods` has the equations and their sources).
        base: what all were trained from. Of runs that have one target it is that.
        weights: one a model; if None, 1 each.
        density: share of the entries that is kept (ties, dare_linear, dare_ties, sce).
        scale: λ, which what is added to the base is multiplied by; if None, 1.
        t: of slerp; 0 is the first model, 1 the second.
        seed: of what DARE draws.
        progress: shown how far it is; if None, nothing is.

    Raises:
        ArgumentError: a number that the method does not read or that is out of its range, too few
            models, or no base.
        ModelError: a model is not there or cannot be merged, or they are not of one kind.
        NumericsError: a tensor has NaN or infinity in it, or would get it.
        StoreError: there is something in `out`, or it cannot be written; a run is unfinished.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     merged = merge_models(["zoo/prose"] * 2, f"{folder}/merged", method="linear")
    ...     sorted(path.name for path in merged.folder.glob("*.safetensors"))
    ['model.safetensors']
    """
    names, shown = [fspath(model) for model in models], progress or Silent()
    settings = settings_of(
        method, len(names), weights=weights, density=density, scale=scale, t=t, seed=seed
    )
    place = require_free(Path(out))
    merge = _opened(settings, names, None if base is None else fspath(base), shown)
    require_room(place, merge.plan)
    total = sum(_entries(header) for file in merge.plan.values() for header in file.values())
    with whole_folder(place) as folder:
        with shown.start(f"merging by {method}", total, "weights") as bar:
            write_weights(folder, merge.plan, lambda name: merge.tensor(name, bar))
        _write_rest(folder, merge)
    count = sum(len(file) for file in merge.plan.values())
    over = None if merge.base is None else merge.base.name
    return MergedModel(place, settings, over, count, total)


def _opened(
    settings: MergeSettings, names: Sequence[str], base: str | None, progress: Progress
) -> "_Merge":
    """The models of a merge, found and compared; no numbers are read yet."""
    over = _base_of(settings, names, base, progress)
    models = [open_model(name, settings_of_place(name)) for name in names]
    opened_base = None if over is None else open_model(*over)
    for line in require_alike(models if opened_base is None else [*models, opened_base]):
        progress.say(f"{line}; the merged model has that of {names[0]}")
    return _Merge(settings, models, opened_base)


def _base_of(
    settings: MergeSettings, names: Sequence[str], given: str | None, progress: Progress
) -> tuple[str, ModelSettings] | None:
    """The base by its name and how it is found, where a method has one.

    Raises:
        ArgumentError: the method needs one and none is known, or it has none.
    """
    method = settings.method
    if not settings.over_base:
        if given is not None:
            takers = ", ".join(name for name, one in METHODS.items() if one.over_base)
            raise ArgumentError(
                f"--base {given} has no meaning with {method}, which merges models as they are; "
                f"leave it out, or take one of {takers}"
            )
        return None
    if given is not None:
        return given, settings_of_place(given)
    target = common_target(names)
    if target is None:
        raise ArgumentError(
            f"{method} merges what models have learnt over a base, and none is given; name the "
            "model that all were trained from with --base (only of runs with one target it is "
            "known)"
        )
    progress.say(f"the base is {target.model}, which all of the runs were trained from")
    return target.model, target


class _Merge:
    """The merged model: its tensors before they are made, and each one made when it is written."""

    def __init__(
        self, settings: MergeSettings, models: Sequence[Opened], base: Opened | None
    ) -> None:
        self.settings, self.models, self.base = settings, models, base
        self.reference = models[0] if base is None else base
        self.plan = self._plan()

    def _plan(self) -> Plan:
        """As the first model's files; a head that only others have for themselves comes last."""
        first = self.models[0]
        everyone = [*self.models, *([self.base] if self.base is not None else [])]
        names = dict.fromkeys(name for model in (first, *everyone) for name in model.stored)
        plan: dict[str, dict[str, TensorHeader]] = {file: {} for file in first.files}
        last = next(reversed(plan))
        for name in names:
            file = first.stored[name][0] if name in first.stored else last
            header = self.reference.header(name)
            assert header is not None, "require_alike has looked"
            if header.dtype not in BYTES:
                raise ModelError(
                    f"{name} of {self.reference.name} is stored as {header.dtype}, which cannot be "
                    "merged; take the model in float32, float16 or bfloat16"
                )
            plan[file][name] = header
        return {file: tensors for file, tensors in plan.items() if tensors}

    @property
    def unties(self) -> bool:
        """Whether the head of the first model is its embedding, and another model's is not."""
        return any(name in file for file in self.plan.values() for name in self.models[0].tied)

    def tensor(self, name: str, bar: Bar) -> torch.Tensor:
        """One tensor of the result.

        Raises:
            ModelError: its file is damaged, or it is no float and not equal in all models.
            NumericsError: it is or becomes NaN or infinite.
        """
        header = self.reference.header(name)
        assert header is not None, "of the plan"
        tensors = [model.read(name) for model in self.models]
        base = None if self.base is None else self.base.read(name)
        if header.dtype not in FLOATS:
            for model, tensor in zip(self.models, tensors, strict=True):
                if not torch.equal(tensor, tensors[0] if base is None else base):
                    raise ModelError(
                        f"{name} is {header.dtype} and not equal in {self.reference.name} and "
                        f"{model.name}; only floating-point numbers are merged"
                    )
            merged = tensors[0]
        else:
            floats = [tensor.float() for tensor in tensors]
            over = None if base is None else base.float()
            merged = merge_tensors(self.settings, floats, over, name).to(FLOATS[header.dtype])
            if not bool(torch.isfinite(merged).all()):
                raise NumericsError(
                    f"{name} of the merged model would be infinite in {header.dtype}; take smaller "
                    "weights or --lambda, or models in bfloat16 or float32"
                )
        bar.advance(merged.numel())
        return merged


def _entries(header: TensorHeader) -> int:
    return torch.Size(header.shape).numel()


def _write_rest(folder: Path, merge: _Merge) -> None:
    """Write what belongs to a model beside its weights."""
    first = merge.models[0]
    config = from_json(_file(first, "config.json").read_text(encoding="utf-8"))
    _write_json(folder / "config.json", _config_of(config, merge))
    try:
        generation = from_json(_file(first, _GENERATION).read_text(encoding="utf-8"))
        _write_json(folder / _GENERATION, generation)
    except HUB_FAULTS:
        pass  # many have none
    first.tokenizer.save_pretrained(folder)
    card = merge_card(merge.settings, merge.models, merge.base)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _file(model: Opened, name: str) -> Path:
    """A file of a model; of the hub's, the one of the commit that all else is of."""
    located = model.located
    if located.commit is None:
        return Path(located.place, name)
    return Path(hf_hub_download(located.place, name, revision=located.commit))


def _config_of(config: dict[str, Any], merge: _Merge) -> dict[str, Any]:
    """The first model's, with the type of the merged numbers and the truth about the head."""
    sizes: dict[str, int] = {}
    for header in (header for file in merge.plan.values() for header in file.values()):
        if header.dtype in FLOATS:
            sizes[header.dtype] = sizes.get(header.dtype, 0) + _entries(header)
    dtype = str(FLOATS[max(sizes, key=sizes.__getitem__)]).removeprefix("torch.")
    changes: dict[str, Any] = {"dtype": dtype}
    if merge.unties:
        changes["tie_word_embeddings"] = False
    text = config.get("text_config")
    inner = {"text_config": _changed(text, changes)} if isinstance(text, dict) else {}
    return _changed(config, changes) | inner


def _changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "torch_dtype"} | changes


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
