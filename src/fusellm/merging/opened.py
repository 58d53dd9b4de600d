"""The models of a merge: found, compared before anything is read of them, and read by tensor."""

import json
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from fusellm.config import ModelSettings
from fusellm.errors import ModelError, NumericsError, StoreError
from fusellm.models.configurations import class_of, method_of, stored_quantization
from fusellm.models.headers import TensorHeader, read_header, require_loadable
from fusellm.models.load import Located, load_tokenizer, locate
from fusellm.models.places import HUB_FAULTS
from fusellm.models.remote_code import code_of
from fusellm.models.weights import INDEX, loaded_files, read_index
from fusellm.recipe_file import RECIPE, open_recipe
from fusellm.store.manifest import MANIFEST, StageFolder
from fusellm.store.run_folder import FUSED, require_no_rounds, trained_folder
from fusellm.tokens.text_ids import rules_of

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that are merged, as safetensors spells them; whatever else is has to be equal."""
_MAKE_ORDINARY = (
    "save it as an ordinary model first: model, tokenizer = fusellm.load_pretrained({name!r}); "
    'model.save_pretrained("FOLDER"); tokenizer.tokenizer.save_pretrained("FOLDER")'
)
_BUFFERS = (r"rotary_emb\.inv_freq$",)  # of older versions of transformers, which computes them now
# Settings that change what the same weights compute, and no tensor's shape.
_COMPUTING = (
    *("num_attention_heads", "num_key_value_heads", "head_dim", "n_head", "n_heads", "num_heads"),
    *("hidden_act", "activation_function", "hidden_activation", "position_embedding_type"),
)
_SAID = ("rope_parameters", "rms_norm_eps", "layer_norm_epsilon", "sliding_window")


@dataclass(frozen=True)
class Opened:
    """A model whose tensors are read one by one.

    Attributes:
        name: as whoever merges calls it.
        located: where it is.
        files: of its weights, by their names.
        stored: of each tensor, under the name that its class has for it: file, name there, header.
        tied: of each head that is another tensor, that other one.
    """

    name: str
    located: Located
    files: dict[str, Path]
    stored: dict[str, tuple[str, str, TensorHeader]]
    tied: dict[str, str]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return load_tokenizer(self.located)

    def header(self, tensor: str) -> TensorHeader | None:
        """Type and shape of a tensor; of a tied head, those of what it is tied to."""
        entry = self.stored.get(self.tied.get(tensor, tensor))
        return None if entry is None else entry[2]

    def read(self, tensor: str) -> torch.Tensor:
        """A tensor as it is stored.

        Raises:
            ModelError: its file is damaged.
            NumericsError: some of it is NaN or infinite.
        """
        file, name, header = self.stored[self.tied.get(tensor, tensor)]
        try:
            with safe_open(self.files[file], "pt") as opened:
                values: torch.Tensor = opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{name} of {self.name} cannot be read from {file} ({error}); fetch it again"
            ) from error
        if header.dtype in FLOATS and not bool(torch.isfinite(values).all()):
            wrong = values.numel() - int(torch.isfinite(values).sum())
            raise NumericsError(
                f"{name} of {self.name} ({file}) has {wrong:,} entries of {values.numel():,} that "
                "are NaN or infinite, and so would be the merged model's; take the model as it was "
                "before it broke"
            )
        return values


def settings_of_place(name: str) -> ModelSettings:
    """What is merged where a user names a model or a run: of a run, its fused model.

    Raises:
        StoreError: the run's fused model is not trained yet.
        ModelError: it comes with code.
    """
    folder = Path(name).expanduser()
    require_no_rounds(folder)
    if (folder / RECIPE).is_file():
        trained = trained_folder(folder, FUSED)
        if not (trained / MANIFEST).exists() or not StageFolder(trained).complete:
            raise StoreError(
                f"the run {name} has no fused model yet; train it with `fusellm run {name}`, or "
                "name a model"
            )
        return ModelSettings(model=str(trained))
    run = run_of(name)
    if run is not None and (folder / MANIFEST).exists() and not StageFolder(folder).complete:
        raise StoreError(f"the training of {name} is unfinished; `fusellm run {run}` goes on")
    settings = ModelSettings(model=name)
    _require_no_code(settings)
    return settings


def _require_no_code(settings: ModelSettings) -> None:
    code = code_of(settings)
    if code:
        raise ModelError(
            f"{settings.model} comes with code of its own ({', '.join(code[:3])}), which a merge "
            "does not run; merge models of an architecture that transformers has"
        )


def require_target(target: ModelSettings, over_base: bool) -> None:
    """Check before any training that what is trained from a target can be merged.

    Args:
        over_base: whether the target is the base that is merged over.

    Raises:
        ModelError: it comes with code; or it is the base, and no model whose tensors can be read.
    """
    _require_no_code(target)
    if over_base:
        open_model(target.model, _as_base(target))


def run_of(name: str) -> Path | None:
    """The run that a place is, or that a trained model's folder belongs to."""
    folder = Path(name).expanduser()
    above = [folder, *folder.absolute().parents[1:2]]
    return next((place for place in above if (place / RECIPE).is_file()), None)


def common_target(names: Sequence[str]) -> ModelSettings | None:
    """The target that all runs of a merge were trained from; None where there is no one target.

    Raises:
        RecipeError: the recipe of a run cannot be read.
    """
    runs = [run_of(name) for name in names]
    targets = [open_recipe(run).target for run in runs if run is not None]
    if not targets or len(targets) < len(names) or any(t != targets[0] for t in targets):
        return None
    return _as_base(targets[0])


def _as_base(target: ModelSettings) -> ModelSettings:
    """The model alone, without how a recipe loads it."""
    kept = {"model", "revision", "gguf_file", "tokenizer", "prefix"}
    return ModelSettings(**target.model_dump(include=kept))


def open_model(name: str, settings: ModelSettings) -> Opened:
    """Find a model and read the headers of its weights; a hub model's files are fetched.

    Raises:
        ModelError: nothing is there, or it is none whose tensors can be merged: adapters, a GGUF
            file, a quantized one, one with tensors missing or damaged.
    """
    located = locate(settings)
    if located.gguf is not None:
        raise ModelError(
            f"{name} is a GGUF file, whose weights are not plain tensors; "
            + _MAKE_ORDINARY.format(name=settings.model)
        )
    if located.adapters is not None:
        raise ModelError(
            f"{name} holds adapters ({located.adapters}), and a merge is of whole weights; "
            + _MAKE_ORDINARY.format(name=settings.model)
        )
    quantized = stored_quantization(located.config)
    if quantized is not None:
        raise ModelError(
            f"{name} is stored quantized ({method_of(quantized)}), and a merge is of plain "
            "numbers; take the model as it was before it was quantized"
        )
    require_loadable(located)
    files = _files(located)
    tensors = {
        tensor: (file, tensor, header)
        for file, path in files.items()
        for tensor, header in read_header(settings.model, path).items()
    }
    tied = _tied(located)
    return Opened(name, located, files, _by_own_names(located, tensors, tied), tied)


def _files(located: Located) -> dict[str, Path]:
    """The files of a model's weights, without their index; fetched from the hub if need be."""
    model, place, commit = located.settings.model, located.place, located.commit
    named = getattr(located.config, "transformers_weights", None)
    try:
        files = loaded_files(model, place, commit, named)
    except ModelError:
        if commit is None:
            raise
        files = _fetched(located, named)
    return {name: path for name, path in files.items() if not name.endswith(INDEX)}


def _fetched(located: Located, named: str | None) -> dict[str, Path]:
    model, place, commit = located.settings.model, located.place, located.commit

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(place, name, revision=commit))

    first = named or "model.safetensors"
    try:
        try:
            files = {first: fetch(first)}
        except HUB_FAULTS:
            if named is not None:
                raise
            first += INDEX
            files = {first: fetch(first)}
        if first.endswith(INDEX):
            files |= {n: fetch(n) for n in sorted(set(read_index(model, files[first]).values()))}
    except HUB_FAULTS as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the weights of {model} could not be fetched from the hub: {reason}; check the "
            "connection, or download it and name its folder"
        ) from error
    return files


def _tied(located: Located) -> dict[str, str]:
    """Heads of a model that are its input embedding, by the names of its class."""
    keys: Any = getattr(class_of(located.config), "_tied_weights_keys", None)
    if not located.config.get_text_config().tie_word_embeddings or not isinstance(keys, dict):
        return {}
    return dict(keys)


def _by_own_names(
    located: Located, tensors: dict[str, tuple[str, str, TensorHeader]], tied: dict[str, str]
) -> dict[str, tuple[str, str, TensorHeader]]:
    """Tensors under the names that `save_pretrained` gives them, without what is never loaded.

    Old files of GPT-2 and others leave out the name that stands before all: `h.0` is
    `transformer.h.0`. Old buffers and a stored copy of a tied head are not loaded.
    """
    kind = class_of(located.config)
    before = f"{kind.base_model_prefix}." if kind is not None and kind.base_model_prefix else ""
    heads = set(getattr(kind, "_tied_weights_keys", None) or ())
    if before and not any(name.startswith(before) for name in tensors):
        tensors = {n if n in heads else before + n: entry for n, entry in tensors.items()}
    unread = _unread(located, list(tensors))
    return {
        name: entry
        for name, entry in tensors.items()
        if name not in unread and not (name in tied and tied[name] in tensors)
    }


def _unread(located: Located, names: Sequence[str]) -> set[str]:
    """Stored buffers that transformers passes over in silence.

    Its patterns fit weights too (`attn.bias` is in `c_attn.bias`): they are for what the model does
    not have, so that it is built, without numbers.
    """
    kind = class_of(located.config)
    patterns = [*_BUFFERS, *(getattr(kind, "_keys_to_ignore_on_load_unexpected", None) or ())]
    fitting = {name for name in names if any(re.search(one, name) for one in patterns)}
    if not fitting or kind is None:
        return fitting
    config = located.config.get_text_config()
    with torch.device("meta"):
        built = kind(deepcopy(config if kind.config_class is type(config) else located.config))
    return fitting.difference(built.state_dict())


def require_alike(models: Sequence[Opened]) -> list[str]:
    """Check that models are of one architecture, one tokenizer, and have the same tensors.

    Returns:
        What differs in their configurations and may be meant, to be said.

    Raises:
        ModelError: they are not; the first difference is told, with both values.
    """
    first, *others = models
    said = [line for other in others for line in _require_one_architecture(first, other)]
    for other in others:
        _require_one_tokenizer(first, other)
    for other in others:
        _require_same_tensors(first, other)
    return said


def _require_one_architecture(first: Opened, other: Opened) -> list[str]:
    kinds = [
        (m.located.config.architectures or [m.located.config.model_type])[0] for m in (first, other)
    ]
    if kinds[0] != kinds[1]:
        raise ModelError(
            f"{first.name} is a {kinds[0]} and {other.name} a {kinds[1]}; a merge is of models of "
            "one architecture. To bring several architectures together, fuse them: `fusellm run`"
        )
    one, two = (m.located.config.get_text_config() for m in (first, other))
    for key in _COMPUTING:
        values = getattr(one, key, None), getattr(two, key, None)
        if values[0] != values[1]:
            raise ModelError(
                f"{key} of {first.name} is {values[0]} and of {other.name} {values[1]}, so that "
                "the same weights mean something else; merge models of one architecture"
            )
    pairs = [(key, getattr(one, key, None), getattr(two, key, None)) for key in _SAID]
    return [
        f"note: {key} of {first.name} is {here} and of {other.name} {there}"
        for key, here, there in pairs
        if here != there
    ]


def _require_one_tokenizer(first: Opened, other: Opened) -> None:
    vocabularies = [model.tokenizer.get_vocab() for model in (first, other)]
    names = f"{first.name} and {other.name}"
    if vocabularies[0] != vocabularies[1]:
        differing = set(vocabularies[0].items()) ^ set(vocabularies[1].items())
        token = min(differing, key=lambda pair: (pair[1], pair[0]))[0]
        ids = [vocabulary.get(token, "none") for vocabulary in vocabularies]
        raise ModelError(
            f"{names} have different tokenizers: {token!r} has the id {ids[0]} in the one and "
            f"{ids[1]} in the other, so that a row of their embeddings would be of two tokens. "
            "Fuse them instead: `fusellm run`"
        )
    if _cutting(first.tokenizer) != _cutting(other.tokenizer):
        raise ModelError(
            f"{names} have different tokenizers: the same tokens, cut by other rules. Give both "
            "the tokenizer.json that they were trained with"
        )


def _cutting(tokenizer: PreTrainedTokenizerBase) -> Any:
    """How a tokenizer cuts text; what it puts around one may differ."""
    rules = json.loads(rules_of(tokenizer))
    return {key: rule for key, rule in rules.items() if key != "post_processor"}


def _require_same_tensors(first: Opened, other: Opened) -> None:
    names = dict.fromkeys([*first.stored, *other.stored])
    for name in names:
        headers = [model.header(name) for model in (first, other)]
        for model, header, having in zip((first, other), headers, (other, first), strict=True):
            if header is None:
                raise ModelError(
                    f"{model.name} has no tensor {name}, and {having.name} has one; merge models "
                    "of one architecture"
                )
        one, two = (header for header in headers if header is not None)
        if one.shape != two.shape:
            raise ModelError(
                f"{name} is {_size(one.shape)} in {first.name} and {_size(two.shape)} in "
                f"{other.name}; merge models of one size (rows of an embedding that were added "
                "later can be cut off with resize_token_embeddings)"
            )
        if (one.dtype in FLOATS) != (two.dtype in FLOATS):
            raise ModelError(
                f"{name} is {one.dtype} in {first.name} and {two.dtype} in {other.name}; take both "
                "as plain numbers"
            )


def _size(shape: Sequence[int]) -> str:
    return " × ".join(f"{n:,}" for n in shape) or "a single number"
