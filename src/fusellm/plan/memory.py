"""What a device holds while a model reads or is trained, by the model's shapes.

Training holds weights W, the optimizer's state O, and at its most either all that autograd keeps of
a batch with the buffers of the objective, A + C, or the gradients G, which take the place of A as
the backward pass gives it up. Where several batches make a step, G stays:

    W + O + max(A + C, G),  or  W + O + G + A + C;  with FSDP over n processes W, O, G are over n

P parameters; B rows of T tokens in a batch; d hidden size, V vocabulary.
"""

import math
from collections.abc import Mapping

import torch
from transformers import TrainingArguments

from fusellm.config import LoraSettings, ModelSettings, Recipe
from fusellm.models.load import default_device
from fusellm.objective.chunked import rows_of_chunk
from fusellm.plan.shapes import Shapes
from fusellm.preflight import BYTES_PER_TOKEN
from fusellm.reading.batches import default_batch_tokens
from fusellm.store.planned import MemoryParts
from fusellm.training.arguments import is_sharded

_QUANTIZED = {"8bit": 1.0, "4bit": 0.55}  # with their scales
_OPTIMIZERS = (  # bytes of state for each parameter that is trained, by how the name begins
    ("adamw_torch_8bit", 2),
    ("adamw_torch_4bit", 1),
    ("rmsprop_bnb_8bit", 1),
    ("rmsprop_8bit", 1),
    ("ademamix_8bit", 3),
    ("paged_ademamix_8bit", 3),
    ("ademamix", 12),
    ("paged_ademamix", 12),
    ("lomo", 0),
    ("adalomo", 0),
    ("adamw_8bit", 2),
    ("adamw_bnb_8bit", 2),
    ("paged_adamw_8bit", 2),
    ("lion_8bit", 1),
    ("paged_lion_8bit", 1),
    ("adafactor", 0),
    ("sgd", 0),
    ("lion", 4),
    ("paged_lion", 4),
    ("rmsprop", 4),
    ("adagrad", 4),
    ("", 8),
)


def of_reading(settings: ModelSettings, shapes: Shapes, recipe: Recipe) -> MemoryParts:
    """What a source holds while it reads.

    Of its activations there is one layer's at a time, of its logits a chunk's.
    """
    weights = shapes.parameters * width_of(settings)
    on_gpu = default_device().type == "cuda"
    batch = recipe.externalize.batch_tokens or default_batch_tokens(on_gpu)
    a_layer = shapes.kept / max(shapes.layers, 1) * batch / shapes.row_tokens
    chunk = rows_of_chunk(shapes.rows, shapes.width, on_gpu)
    return MemoryParts(
        weights,
        activations=a_layer * width_of(settings) / 4,
        objective=2.0 * 4 * chunk * shapes.rows,
    )


def width_of(settings: ModelSettings) -> float:
    """Bytes of a weight as a model is read."""
    if settings.quantization is not None:
        return _QUANTIZED[settings.quantization]
    dtype: torch.dtype = getattr(torch, settings.dtype)
    return dtype.itemsize


def of_training(
    shapes: Shapes, recipe: Recipe, arguments: TrainingArguments, processes: int
) -> MemoryParts:
    """What a device holds while the target is trained."""
    row_tokens = row_tokens_of(recipe)
    lora, half = recipe.training.lora, arguments.bf16 or arguments.fp16
    trained = trained_parameters(shapes, lora)
    held = 4.0 if lora is None or lora.modules_to_save else width_of(recipe.target)
    weights = held * shapes.parameters + 4.0 * trained * (lora is not None)
    sharded = is_sharded(arguments)
    if half and held == 4:  # autocast keeps copies of what it multiplies by
        weights += 2.0 * (shapes.parameters - shapes.rows * shapes.width)
    rows = arguments.per_device_train_batch_size
    width = 2 if half or held < 4 else 4
    kept = shapes.kept * rows * row_tokens / shapes.row_tokens * width / 4
    positions = rows * row_tokens
    if checkpoints_activations(arguments):  # of each layer its input, and one layer whole at a time
        inputs = positions * shapes.width * width * shapes.layers
        kept = inputs + kept / max(shapes.layers, 1)
    on_gpu = default_device().type == "cuda"
    chunk = min(rows_of_chunk(shapes.rows, shapes.width, on_gpu), positions)
    head = 0.0 if lora is not None else 4.0 * shapes.rows * shapes.width
    objective = 2.0 * 4 * chunk * shapes.rows + 4.0 * positions * shapes.width + head
    return MemoryParts(
        weights=weights,
        gradients=4.0 * trained * (2 if processes > 1 and not sharded else 1),  # buckets of DDP
        optimizer=optimizer_bytes(arguments) * trained,
        activations=kept,
        objective=objective,
        sharded=processes if sharded else 1,
        accumulates=arguments.gradient_accumulation_steps > 1,
    )


def row_tokens_of(recipe: Recipe) -> int:
    """T, tokens of a full row that the target is trained on; of blocks roughly."""
    if recipe.training.rows == "packed":
        return recipe.training.row_tokens
    return math.ceil(recipe.corpus.block_bytes / BYTES_PER_TOKEN)


def checkpoints_activations(arguments: TrainingArguments) -> bool:
    """Whether activations are made again in the backward pass, by Trainer or by FSDP."""
    by_fsdp = arguments.fsdp_config if isinstance(arguments.fsdp_config, dict) else {}
    return bool(arguments.gradient_checkpointing or by_fsdp.get("activation_checkpointing"))


def trained_parameters(shapes: Shapes, lora: LoraSettings | None) -> float:
    """How many parameters have gradients; of adapters as if all linear layers had one."""
    return float(shapes.parameters if lora is None else lora.r * shapes.linear)


def optimizer_bytes(arguments: TrainingArguments) -> int:
    """Bytes of an optimizer's state for each parameter that is trained."""
    name = str(getattr(arguments.optim, "value", arguments.optim))
    return next(size for begins, size in _OPTIMIZERS if name.startswith(begins))


def checkpoint_bytes(
    recipe: Recipe, arguments: Mapping[str, TrainingArguments], shapes: Shapes
) -> float:
    """Most bytes on disk of one training's checkpoints, until it is done.

    A new one is there before an old one goes, and the best one may be kept besides.
    """
    trained = trained_parameters(shapes, recipe.training.lora)
    most = 0.0
    for one in arguments.values():
        if str(getattr(one.save_strategy, "value", one.save_strategy)) == "no":
            continue
        size = (4 + optimizer_bytes(one)) * trained
        saves = 1 / one.save_steps if 0 < one.save_steps < 1 else 1.0
        kept = one.save_total_limit or math.ceil(saves)
        most = max(most, size * (kept + 1 + (recipe.training.keep == "best")))
    return most
