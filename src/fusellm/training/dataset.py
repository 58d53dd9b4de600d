"""Text with its fused distributions, as a dataset and as batches, for anyone's training."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusellm.config import Recipe
from fusellm.errors import ArgumentError, StoreError
from fusellm.fusion.texts import FusedDistributions
from fusellm.models.readers import reader_of
from fusellm.recipe_file import open_recipe
from fusellm.store.blocks import open_corpus
from fusellm.store.fused import open_fused, read_sets
from fusellm.store.run_folder import RECIPE
from fusellm.tokens.chat import ChatEncoder
from fusellm.tokens.encode import Encoder
from fusellm.training.collator import Collator, OutcomeTable
from fusellm.training.rows import Blocks, Rows, stored_blocks, with_context


class _FusedInMemory:
    """Blocks that `fusellm.fuse` has made."""

    def __init__(self, fused: FusedDistributions) -> None:
        self._fused = fused
        self._prefix_tokens = fused.encoder.prefix_tokens
        lengths = [len(block.ids) for block in fused.encoded]
        self.lengths = np.array(lengths, dtype=np.int64)
        self.predicted = self.lengths - max(self._prefix_tokens, 1)
        self._is_chat = isinstance(fused.encoder, ChatEncoder)
        if self._is_chat:  # of one that the target cannot read nothing is learnt
            learnt = [block.predicted for block in fused.encoded]
            self.predicted = np.array([0 if one is None else int(one.sum()) for one in learnt])
        self.windows = np.zeros(len(lengths), dtype=np.int64)

    def block(self, number: int) -> dict[str, Any]:
        """The columns of one block."""
        block, context = self._fused.encoded[number], None
        if self._is_chat:
            learnt = block.predicted
            context = np.ones(len(block.ids), dtype=np.bool_) if learnt is None else ~learnt
        return with_context(self._fused.block(number), self._prefix_tokens, context)


class FusedDataset(Rows):
    """Rows of text with fused distributions; a `torch.utils.data.Dataset`.

    `FusionCollator` makes batches of them, and `FusionTrainer` trains on them. A row is a list of
    texts: one, or as many as `pack` puts into it.

    Attributes:
        table: the outcomes of the distributions as sets of target ids.
        encoder: the tokenizer that the ids are of.

    >>> from fusellm import Tokenizer, fuse, load_pretrained, read_distributions
    >>> texts = ["for item in items:", "import the module"]
    >>> model, tokenizer = load_pretrained("zoo/python")
    >>> read = {"python": read_distributions(model, tokenizer, texts)}
    >>> dataset = FusedDataset(fuse(texts, Tokenizer.from_pretrained("zoo/prose"), read))
    >>> dataset
    FusedDataset(2 texts, 12 tokens of 'zoo/prose')
    >>> batch = FusionCollator(dataset)([dataset[0], dataset[1]])
    >>> batch["input_ids"].shape, batch["labels"].shape, sorted(batch)
    (torch.Size([2, 7]), torch.Size([2, 7]), ['attention_mask', 'counts', 'input_ids', 'labels', \
'outcomes'])
    """

    table: OutcomeTable
    encoder: Encoder

    def __init__(
        self,
        source: FusedDistributions | str | os.PathLike[str],
        *,
        row_tokens: int | None = None,
        seed: int | None = None,
        renormalize: bool = False,
        temperature: float = 1.0,
    ) -> None:
        """Open what was fused.

        Args:
            source: what `fusellm.fuse` gave, or a run (its folder, or a `fusellm.Run`) whose stage
                fuse is finished. Of a run the recipe says what there is besides: its seed, how what
                was not kept is counted, and whether rows are packed.
            row_tokens: put several texts into each row of at most so many tokens, which the longest
                one may have. (By a run's recipe, a longer block has a row of its own.)
            seed: of the order in which they are put there, and of the windows that a large store
                is read in; 0 if not given, or a run's own.
            renormalize: scale away what was not kept, as the paper does, in place of one more
                outcome; for distributions in memory.
            temperature: flatten them by it, and give a `Divergence` with the same; only where they
                are renormalized and of single tokens (strategies `bytes`, `mined`, `em`).

        Raises:
            ArgumentError: it is neither, there is nothing to predict, a text is longer than a row,
                or settings do not go together.
            StoreError: the run is unfinished or damaged.
        """
        if isinstance(source, FusedDistributions):
            blocks: Blocks = _FusedInMemory(source)
            if not (blocks.predicted > 0).any():
                raise ArgumentError("there is nothing to predict: no text has two tokens")
            if temperature != 1.0 and not renormalize:
                raise ArgumentError("a temperature is for distributions with renormalize=True")
            table = OutcomeTable(source.sets, renormalize, temperature)
            self._take(blocks, table, source.encoder, seed or 0)
        elif isinstance(source, str | os.PathLike):
            run = Path(source)
            if renormalize or temperature != 1.0:
                raise ArgumentError(
                    "renormalize and temperature of a run are its recipe's: objective.rest and "
                    "objective.temperature"
                )
            if not (run / RECIPE).is_file():
                raise StoreError(f"{run} is no run: it has no {RECIPE}; check the path")
            recipe = open_recipe(run)
            trusted = bool(getattr(source, "trusted", False))
            chat = recipe.corpus.has_conversations
            encoder = reader_of(recipe.target, trusted, chat).encoder
            self._open(recipe, run, encoder, seed, row_tokens)
            return
        else:
            raise ArgumentError(
                f"a run or what fusellm.fuse gives is needed, and this is a {type(source).__name__}"
            )
        if row_tokens is not None:
            self.pack(row_tokens)

    def __repr__(self) -> str:
        texts, rows = sum(len(row) for row in self.rows), len(self)
        packed = f" in {rows:,} packed rows" if self.packed else ""
        return (
            f"{type(self).__name__}({texts:,} texts{packed}, {sum(self.row_tokens()):,} tokens of "
            f"{self.encoder.tokenizer.name_or_path!r})"
        )

    @classmethod
    def of_run(cls, recipe: Recipe, run: Path, encoder: Encoder, seed: int) -> "FusedDataset":
        """That of a run whose recipe and target's tokenizer are at hand."""
        dataset = cls.__new__(cls)
        dataset._open(recipe, run, encoder, seed)
        return dataset

    def _open(
        self,
        recipe: Recipe,
        run: Path,
        encoder: Encoder,
        seed: int | None,
        row_tokens: int | None = None,
    ) -> None:
        seed = recipe.seed if seed is None else seed
        folder, objective = open_fused(run), recipe.objective
        sets = [read_sets(folder, source.name) for source in recipe.sources]
        table = OutcomeTable(sets, objective.rest == "renormalize", objective.temperature)
        where = seed, len(encoder.vocabulary), encoder.prefix_tokens
        self._take(stored_blocks(run, open_corpus(run), True, *where), table, encoder, seed)
        if row_tokens is not None:
            self.pack(row_tokens)
        elif recipe.training.rows == "packed":
            self.pack(recipe.training.row_tokens, longer_alone=True)

    def _take(self, blocks: Blocks, table: OutcomeTable, encoder: Encoder, seed: int) -> None:
        super().__init__(blocks, seed)
        self.table, self.encoder = table, encoder


class FusionCollator(Collator):
    """Batches of a `FusedDataset`: ids, labels, and the fused distributions of what is predicted.

    A batch has `input_ids` and `labels` [B, T] int64 (labels are the ids themselves, not shifted,
    and -100 where nothing is predicted), `attention_mask` [B, T] or, of packed rows, `position_ids`
    [B, T]; `outcomes`, which `fusion_loss` takes as it is; and `counts`, of its tokens.
    """

    def __init__(self, dataset: Rows) -> None:
        """Make batches of this dataset's rows; of rows without distributions, without them.

        Raises:
            ArgumentError: it is no dataset of ours.
        """
        if not isinstance(dataset, Rows):
            raise ArgumentError(
                f"dataset is a {type(dataset).__name__}; give a fusellm.FusedDataset"
            )
        super().__init__(getattr(dataset, "table", None), dataset.packed)
        self._dataset = dataset

    def __call__(self, rows: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """The batch of some rows."""
        self._packed = self._dataset.packed  # which may have been packed since
        return super().__call__(rows)
