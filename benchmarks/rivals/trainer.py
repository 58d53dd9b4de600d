"""Training on a rival's loss, on the rows, in the order and by the optimizer of a run.

The source reads each batch beside the target; nothing of it is stored. With R the rival's loss, a
mean over its C pieces of text, N the predicted tokens of a batch and K of them in pieces,

    L = 1/N · ( Σ CE over tokens in no piece + λ · Σ CE over tokens in pieces + (1 − λ) · K · R )

so that, as in fusellm's own objective, a token has the weights λ and 1 − λ where the source says
something, and 1 where it does not. With λ = 1 this is CLM. Losses of one position a piece count
that position alone (K = C); those of whole pieces all of theirs.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fusellm.config import Recipe
from fusellm.models.heads import head_of, hidden_states
from fusellm.models.load import load_model, locate
from fusellm.models.readers import encoder_of
from fusellm.objective.chunked import Head
from fusellm.objective.divergence import CROSS_ENTROPY
from fusellm.objective.schedule import LambdaSchedule
from fusellm.progress import Progress
from fusellm.reading.batches import read_blocks
from fusellm.store.blocks import Block, open_corpus, read_part
from fusellm.store.run_folder import CLM, checkpoints_folder, trained_folder
from fusellm.tokens.encode import Encoder
from fusellm.training.arguments import training_arguments
from fusellm.training.callbacks import Watch
from fusellm.training.checkpoints import last_checkpoint
from fusellm.training.collator import BatchCounts
from fusellm.training.forward import IGNORED
from fusellm.training.model import load_target
from fusellm.training.nan_report import Blame
from fusellm.training.rows import Rows, stored_blocks
from fusellm.training.run_trainer import ObjectiveTrainer
from fusellm.training.stop import Stop
from fusellm.training.validation import Validation
from rivals.chunks import Chunks, chunks_of, sums
from rivals.hybrid import hybrid_loss, matched_tokens
from rivals.projection import chunk_means, projected, projection_loss, projection_matrix
from rivals.span import span_loss

_WINDOW_ELEMENTS = 1 << 26  # of both models' log-probabilities that are there at a time


@dataclass(frozen=True)
class Said:
    """What a model says at its positions: [P, V] log-probabilities, [P] of the true next tokens."""

    log_probs: torch.Tensor
    true: torch.Tensor

    @classmethod
    def of(cls, head: Head, hidden: torch.Tensor, true_ids: torch.Tensor) -> "Said":
        """From [P, d] hidden states and [P] true next tokens."""
        log_probs = torch.log_softmax(head.logits(hidden), dim=-1)
        return cls(log_probs, log_probs.gather(1, true_ids[:, None])[:, 0])


@dataclass(frozen=True)
class Rival:
    """A rival's loss.

    Attributes:
        loss: of what target and source say, and the pieces; a mean over these.
        whole: whether it is of all positions of a piece, not of its first alone.
    """

    loss: Callable[[Said, Said, Chunks], torch.Tensor]
    whole: bool


Pair = tuple[Encoder, Encoder, int, int]
"""Source and target, and the rows of their heads."""


def _projection(pair: Pair) -> Rival:
    matrix = projection_matrix(*pair)

    def loss(target: Said, source: Said, chunks: Chunks) -> torch.Tensor:
        first = target.log_probs[chunks.target[:, 0]], source.log_probs[chunks.source[:, 0]]
        return projection_loss(projected(first[0], matrix), first[1])

    return Rival(loss, whole=False)


def _projection_of_means(pair: Pair) -> Rival:
    matrix = projection_matrix(*pair)

    def loss(target: Said, source: Said, chunks: Chunks) -> torch.Tensor:
        carried = projected(target.log_probs, matrix)
        means = chunk_means(carried, source.log_probs, chunks.target, chunks.source)
        return projection_loss(*means)

    return Rival(loss, whole=True)


def _hybrid(pair: Pair, beta: float = 0.0) -> Rival:
    matched = matched_tokens(*pair)

    def loss(target: Said, source: Said, chunks: Chunks) -> torch.Tensor:
        first = chunks.target[:, 0], chunks.source[:, 0]
        rest = (
            sums(target.true, chunks.target) - target.true[first[0]],
            sums(source.true, chunks.source) - source.true[first[1]],
        )
        rows = target.log_probs[first[0]], source.log_probs[first[1]]
        return hybrid_loss(*rows, matched, *rest, beta=beta)

    return Rival(loss, whole=True)


def _span(_: Pair) -> Rival:
    def loss(target: Said, source: Said, chunks: Chunks) -> torch.Tensor:
        return span_loss(sums(target.true, chunks.target), sums(source.true, chunks.source))

    return Rival(loss, whole=True)


RIVALS: dict[str, Callable[[Pair], Rival]] = {
    "projection": _projection,
    "projection-means": _projection_of_means,
    "hybrid": _hybrid,
    "hybrid-jsd": lambda pair: _hybrid(pair, beta=0.5),
    "span": _span,
}


class SourceBeside:
    """The source, as it reads the blocks of a batch."""

    def __init__(
        self, model: PreTrainedModel, source: Encoder, target: Encoder, blocks: Sequence[Block]
    ) -> None:
        texts, last = [b.text for b in blocks], [b.last for b in blocks]
        self._model, self.head = model, head_of(model).widened()
        self._ids: dict[int, np.ndarray] = {}
        self._chunks: dict[int, Chunks] = {}
        self._targets: dict[int, int] = {}
        read = source.encode(texts, last), target.encode(texts, last)
        for block, own, other in zip(blocks, *read, strict=True):
            self._ids[block.number] = own.ids if own.ends is not None else own.ids[:0]
            self._chunks[block.number] = chunks_of(other.ends, own.ends)
            self._targets[block.number] = len(other.ids) - 1

    def chunks(self, numbers: Sequence[int]) -> Chunks:
        """The pieces of some blocks, whose positions stand one after another."""
        return Chunks.joined(
            [self._chunks[n] for n in numbers],
            [self._targets[n] for n in numbers],
            [max(0, len(self._ids[n]) - 1) for n in numbers],
        )

    def read(self, numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """([Q, d] hidden states, [Q] true next tokens) of some blocks."""
        ids = [self._ids[n] for n in numbers]

        def keep(
            _: list[int], hidden: torch.Tensor, true: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return hidden, true

        width = self.head.weight.shape[1]
        none = torch.zeros((0, width)), torch.zeros(0, dtype=torch.int64)
        found = dict.fromkeys(range(len(ids)), none)
        for batch, (hidden, true) in read_blocks(self._model, ids, None, keep):
            lengths = [len(ids[n]) - 1 for n in batch]
            for n, *rows in zip(batch, hidden.split(lengths), true.split(lengths), strict=True):
                found[n] = rows[0], rows[1]
        parts = [found[n] for n in range(len(ids))]
        return torch.cat([h.float() for h, _ in parts]), torch.cat([t for _, t in parts])


@dataclass(frozen=True)
class Sums:
    """Of a batch: the weighted sum of all losses, and unweighted CE and rival's loss, in nats."""

    total: torch.Tensor
    clm: torch.Tensor
    rival: torch.Tensor


def rival_losses(
    hidden: torch.Tensor,
    head: Head,
    labels: torch.Tensor,
    source: tuple[torch.Tensor, Head, torch.Tensor],
    chunks: Chunks,
    rival: Rival,
    lambda_: float,
) -> Sums:
    """The sums of the module's first lines, not yet divided by N.

    Where both models' log-probabilities would be large, they are made a run of pieces after the
    other, and made anew for the gradient.

    Args:
        hidden: [P, d] the target's at the positions that predict.
        labels: [P] their true next tokens.
        source: [Q, d] the source's hidden states, its head, and [Q] its true next tokens.
    """
    source_hidden, source_head, source_ids = source
    most = _WINDOW_ELEMENTS // (len(head.weight) + len(source_head.weight))
    windows = chunks.windows(len(hidden), most)
    scale = chunks.covered / max(1, len(chunks)) if rival.whole else 1.0

    def one(hidden: torch.Tensor, labels: torch.Tensor, said: Said, own: Chunks) -> Any:
        target = Said.of(head, hidden, labels)
        weight = torch.ones_like(target.true)
        weight[_covered(own, rival)] = lambda_
        rivals = target.true.new_zeros(())
        if len(own):
            rivals = rival.loss(target, said, own) * len(own) * scale
        return -(weight * target.true).sum(), -target.true.sum(), rivals

    parts = []
    for of_target, of_source, pieces in windows:
        with torch.no_grad():
            said = Said.of(source_head, source_hidden[of_source], source_ids[of_source])
        own = chunks[pieces].from_places(of_target.start, of_source.start)
        given = hidden[of_target], labels[of_target], said, own
        one_of = one(*given) if len(windows) == 1 else checkpoint(one, *given, use_reentrant=False)
        parts.append(torch.stack(one_of))
    weighted, clm, rivals = torch.stack(parts).sum(0)
    return Sums(weighted + (1 - lambda_) * rivals, clm.detach(), rivals.detach())


def _covered(chunks: Chunks, rival: Rival) -> torch.Tensor:
    """Positions of the target that have the weight λ."""
    if not rival.whole:
        return chunks.target[:, 0]
    spans = [torch.arange(first, end) for first, end in chunks.target.tolist()]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *spans])


class RivalTrainer(ObjectiveTrainer):
    """A run's trainer, on a rival's loss."""

    beside: SourceBeside
    rival: Rival

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, by the λ of the step."""
        counts: BatchCounts = inputs["counts"]
        self._lambda = self.lambda_at(self.state.global_step)
        base: Any = self.accelerator.unwrap_model(model)
        names = ("input_ids", "attention_mask", "position_ids")
        with self.accelerator.autocast():
            hidden = hidden_states(base, **{n: inputs[n] for n in names if n in inputs})
        labels = inputs["labels"][:, 1:]
        predicted = labels != IGNORED
        chunks = self.beside.chunks(counts.blocks)
        source_hidden, source_ids = self.beside.read(counts.blocks)
        losses = rival_losses(
            hidden[:, :-1][predicted].float(),
            head_of(base),
            labels[predicted],
            (source_hidden, self.beside.head, source_ids),
            chunks,
            self.rival,
            self._lambda,
        )
        covered = chunks.covered if self.rival.whole else len(chunks)
        self._loss_log.add(replace(counts, fused=covered), losses.clm, losses.rival)
        count = counts.predicted if num_items_in_batch is None else num_items_in_batch
        return losses.total / count


def train_rival(recipe: Recipe, run: Path, name: str, progress: Progress) -> Path:
    """Train the target of a run on a rival's loss, or go on with it; the model's folder.

    The run has a corpus and the target's tokens. The recipe's first source is read.
    """
    folder = trained_folder(run, name)
    if folder.exists():
        return folder
    located = locate(recipe.target), locate(recipe.sources[0])
    target, source = (encoder_of(one) for one in located)
    checkpoints = checkpoints_folder(run, name)
    chosen = training_arguments(recipe, checkpoints, CLM)
    resume_from = last_checkpoint(checkpoints, progress)
    torch.manual_seed(chosen.seed)
    model = load_target(located[0], None, chosen.device)
    corpus = open_corpus(run)
    where = chosen.seed, len(target.vocabulary), target.prefix_tokens
    rows = Rows(stored_blocks(run, corpus, False, *where), chosen.seed)
    if recipe.training.rows == "packed":
        rows = rows.pack(recipe.training.row_tokens, longer_alone=True)
    stop = Stop()
    trainer = RivalTrainer(
        model,
        chosen,
        rows,
        LambdaSchedule(recipe.objective.lambda_),
        CROSS_ENTROPY,
        Validation(target, read_part(corpus, "validation"), recipe),
        Blame(corpus, checkpoints),
        stop,
    )
    read_by = load_model(located[1], chosen.device)
    trainer.beside = SourceBeside(read_by, source, target, read_part(corpus, "train"))
    heads = len(trainer.beside.head.weight), len(head_of(model).weight)
    trainer.rival = RIVALS[name]((source, target, *heads))
    with progress.start(f"training {name}", 0, "steps") as bar, stop:
        trainer.add_callback(Watch(bar, None, stop))
        trainer.train(resume_from_checkpoint=resume_from)
        trainer.require_finite()
    _save(folder, model, target, trainer.records())
    shutil.rmtree(checkpoints, ignore_errors=True)
    return folder


def _save(
    folder: Path, model: PreTrainedModel, target: Encoder, log: Sequence[dict[str, Any]]
) -> None:
    """An ordinary model and its log, whole or not there."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.config.use_cache = True
    model.save_pretrained(part)
    target.tokenizer.save_pretrained(part)
    lines = "".join(json.dumps(line) + "\n" for line in log)
    (part / "log.jsonl").write_text(lines, encoding="utf-8")
    part.rename(folder)
