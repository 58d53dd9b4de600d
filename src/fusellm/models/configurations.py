"""A model's config.json: read, and whether it is of a causal language model."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer

from fusellm.config import ModelSettings
from fusellm.errors import ModelError
from fusellm.models.places import not_found
from fusellm.models.remote_code import not_trusted
from fusellm.models.weights import require_content

_CONTEXT_KEYS = ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length")
_FAULTS = (
    AttributeError,
    ImportError,
    KeyError,
    OSError,
    RecursionError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
_UNQUANTIZED = "Install what it names, or take the model as it was before it was quantized"
_LAYERS = re.compile(r"(?i)layers?$")
_MOST_LAYERS = 10_000  # an architecture is built before its weights are looked at
# Ends of the names of classes that see both sides of a token, or say something else than tokens;
# several of them have a causal twin, which would be loaded in silence.
_NOT_CAUSAL = (
    "ForMaskedLM",
    "ForMultipleChoice",
    "ForPreTraining",
    "ForQuestionAnswering",
    "ForSequenceClassification",
    "ForTokenClassification",
)


def read_configuration(settings: ModelSettings, place: str, runs_code: bool) -> PretrainedConfig:
    """The configuration of a causal language model.

    Args:
        place: folder, or name on the hub.
        runs_code: whether code that comes with it may run.

    Raises:
        ModelError: there is none, it is of another kind of model, or of an architecture that the
            installed transformers does not have, or comes with code that is not trusted.
    """
    require_content(settings.model, Path(place) / "config.json")
    try:
        raw, _ = PretrainedConfig.get_config_dict(place, revision=settings.revision)
        _require_sizes(settings.model, raw)
        config: PretrainedConfig = AutoConfig.from_pretrained(
            place, revision=settings.revision, trust_remote_code=runs_code
        )
    except _FAULTS as error:
        raise ModelError(_why_not_read(settings, place, error)) from error
    _require_causal(settings.model, config)
    return config


def _require_sizes(model: str, config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if isinstance(value, Mapping):
            _require_sizes(model, value)
        elif _LAYERS.search(key) and isinstance(value, int) and value > _MOST_LAYERS:
            raise _wrong_size(model, key, value, "more than any model")
        elif key in _CONTEXT_KEYS and isinstance(value, int) and value < 1:
            raise _wrong_size(model, key, value, "a context without tokens")


def _wrong_size(model: str, key: str, value: int, what: str) -> ModelError:
    return ModelError(
        f"the config.json of {model} has {key}: {value:,}, {what}; take the config.json that "
        "belongs to its weights"
    )


def class_of(config: PretrainedConfig) -> Any:
    """The class that AutoModelForCausalLM loads; None if it comes with the model."""
    if type(config).__module__.startswith("transformers_modules"):
        return None
    try:
        registered: Any = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        return None
    if not isinstance(registered, list | tuple):
        return registered
    named = {one.__name__: one for one in registered}
    return next((named[n] for n in config.architectures or () if n in named), registered[0])


def context_tokens(config: PretrainedConfig) -> int | None:
    """The longest input; None where the architecture has no limit."""
    text = config.get_text_config()
    return next((int(v) for key in _CONTEXT_KEYS if (v := getattr(text, key, None))), None)


def adds_router_loss(config: PretrainedConfig) -> bool:
    """Whether a mixture of experts adds a loss of its router to that of its predictions."""
    text = config.get_text_config()
    weight = getattr(text, "router_aux_loss_coef", None)
    return bool(getattr(text, "output_router_logits", False)) and weight != 0


def stored_quantization(config: PretrainedConfig) -> dict[str, Any] | None:
    """What config.json says of how weights are stored quantized; None where they are not."""
    for part in (config, config.get_text_config()):
        stored = getattr(part, "quantization_config", None)
        if stored is not None:
            return dict(stored if isinstance(stored, dict) else stored.to_dict())
    return None


def method_of(stored: Mapping[str, Any]) -> str:
    """The name of a quantization."""
    return str(stored.get("quant_method", "unknown"))


def require_quantizer(model: str, stored: Mapping[str, Any]) -> None:
    """Check that transformers can load weights that are stored quantized.

    Raises:
        ModelError: it does not have the method, or a package is missing.
    """
    cannot = f"{model} is stored quantized ({method_of(stored)}), and cannot be loaded so"
    try:
        quantizer = AutoHfQuantizer.from_config(dict(stored))
    except (ImportError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{cannot}: {_first_sentence(error)}. {_UNQUANTIZED}") from error
    try:
        quantizer.validate_environment(device_map=None, dtype=None)
    except ImportError as error:
        raise ModelError(f"{cannot}: {_first_sentence(error)}. {_UNQUANTIZED}") from error
    except (RuntimeError, ValueError):  # no such GPU here, and there may be where it is loaded
        return


def _first_sentence(error: Exception) -> str:
    """What transformers says of a quantization, without its list of all that there are."""
    return " ".join(str(error).split()).split(" - supported types")[0][:300].rstrip(".")


def _require_causal(model: str, config: PretrainedConfig) -> None:
    named = list(config.architectures or [type(config).__name__.removesuffix("Config")])
    what = f"{model} is a {named[0]}"
    wanted = "fusellm reads causal language models, which say what comes next; take one of these"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{what}, an encoder with a decoder; {wanted}")
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return  # code that comes with the model
    if class_of(config) is None or all(name.endswith(_NOT_CAUSAL) for name in named):
        raise ModelError(f"{what}; {wanted}")


def _why_not_read(settings: ModelSettings, place: str, error: Exception) -> str:
    model, reason = settings.model, " ".join(str(error).split())
    untrusted = not_trusted(error, f"model {model}")
    if untrusted is not None:
        return untrusted
    unknown = re.search(r"has model type `([^`]*)`", reason)
    if unknown:
        return (
            f"{model} is of the model type {unknown[1]!r}, which the installed transformers "
            f"({transformers.__version__}) does not have; a newer one may: "
            "pip install --upgrade transformers"
        )
    if "`model_type` key" in reason:
        return (
            f"the config.json of {model} has no model_type, so that its architecture is not told; "
            "take the config.json that came with the model"
        )
    if Path(place).is_dir():
        reason = f"{type(error).__name__}: {reason[:300]}{'…' if len(reason) > 300 else ''}"
        return f"the config.json of {model} cannot be used: {reason}; fetch it again"
    where = model if settings.revision is None else f"{model} at {settings.revision}"
    cure = "; name its file, as gguf_file: NAME.gguf" if "gguf" in model.lower() else ""
    return f"{not_found(f'model {where}', error)}{cure}"
