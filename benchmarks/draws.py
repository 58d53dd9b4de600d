"""How near what is kept of a distribution is to the whole one, on a model's own logits.

    python benchmarks/draws.py [--model NAME] [--positions N] [--text FILE …] [--quick] [--json]

A model reads text, 20,000 positions of it. Of each distribution p what each scheme keeps is held
against all of it: the k most probable tokens, their rest as one outcome (`bucket`, as it is stored)
or left out and the others scaled up (the paper's); and n draws.

    SCHEME_mass      mass of the tokens that are kept
    SCHEME_ids       how many are kept (of buckets and draws; the paper's has as many as a bucket)
    SCHEME_bytes     bytes a position in the store, of what is kept alone (likewise)
    SCHEME_kl        KL(kept ‖ p) in nats; a bucket's mass is spread as the learner's own
    SCHEME_cosine    between the gradient that a learner gets and that of the whole distribution,
                     summed over 1,024 positions: the mean over such batches, and
    SCHEME_spread    their standard deviation
    SCHEME_single    the same of single positions, the mean

The learner q is the same model where it has read at most 32 tokens; the first 32 of a block, where
it knows as much as the model, are left out. The gradient of the objective
to its logits is q − p, and to a linear layer under the head Wᵀ(q − p) hᵀ, a sum over positions: the
cosine is of that [d, d] matrix. What is random in draws cancels in the sum; what a top k leaves out
does not.
"""

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from figures import command_line, show
from fusellm import load_pretrained
from fusellm.arrays.distributions import Kept
from fusellm.config import ExternalizeSettings
from fusellm.models.heads import head_of
from fusellm.objective.chunked import Head
from fusellm.reading.batches import read_blocks
from fusellm.reading.draws import systematic_draws
from fusellm.reading.selection import Selected, kept_of_host
from fusellm.store.externalized import kept_columns, source_schema
from fusellm.store.tables import encode_table
from fusellm.tokens.blocks import cut
from fusellm.tokens.encode import Encoded, Encoder

_STDLIB = Path(sysconfig.get_paths()["stdlib"])
_CONTEXT, _BATCH, _ROWS = 32, 1024, 32
_BLOCK_BYTES = 2048
KEEP, DRAWS = (10, 32, 64, 128), (8, 16, 32, 64)


@dataclass
class Seen:
    """Sums of one scheme over positions."""

    mass: float = 0.0
    kl: float = 0.0
    single: float = 0.0
    gradient: torch.Tensor | None = None
    cosines: list[float] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)


def hidden_of(model: PreTrainedModel, rows: Sequence[np.ndarray]) -> torch.Tensor:
    """[N, d] float32 of all positions that predict, row by row."""
    by_row: dict[int, torch.Tensor] = {}

    def use(batch: list[int], hidden: torch.Tensor, _: torch.Tensor) -> None:
        parts = hidden.float().split([len(rows[n]) - 1 for n in batch])
        by_row.update(zip(batch, parts, strict=True))

    for _ in read_blocks(model, rows, None, use):
        pass
    return torch.cat([by_row[n] for n in range(len(rows)) if n in by_row])


def short(rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The same positions, each within a row of at most `_CONTEXT` of them.

    >>> [row.tolist() for row in short([np.arange(40)])][-1]
    [32, 33, 34, 35, 36, 37, 38, 39]
    """
    starts = range(0, max(map(len, rows)), _CONTEXT)
    pieces = [row[a : a + _CONTEXT + 1] for row in rows for a in starts]
    return [piece for piece in pieces if len(piece) > 1]


def spelled(texts: Sequence[str], encoder: Encoder, positions: int) -> list[Encoded]:
    """Blocks of text with so many positions, or all that there are."""
    pieces = [piece for text in texts for piece in cut(text, _BLOCK_BYTES)]
    encoded, seen = [], 0
    for block in encoder.encode(pieces, [False] * len(pieces)):
        if block.ends is not None and len(block.ids) > 1 and seen < positions:
            encoded.append(block)
            seen += len(block.ids) - 1
    return encoded


class Measured:
    """What was seen of all schemes, chunk by chunk."""

    def __init__(self, head: Head, vocabulary: int) -> None:
        self.head = head.widened()
        self.vocabulary = min(vocabulary, len(head.weight))
        self.weight = self.head.weight[: self.vocabulary].float()
        names = [f"top{k}{with_}" for k in KEEP for with_ in ("", "_bucket")]
        self.seen = {name: Seen() for name in (*names, *(f"draws{n}" for n in DRAWS))}
        self.whole: torch.Tensor | None = None
        self.positions = 0

    @torch.no_grad()
    def add(self, hidden: torch.Tensor, learner: torch.Tensor, shift: torch.Tensor) -> None:
        """Some positions, as the model and the learner have read them."""
        p = torch.softmax(self.head.logits(hidden)[:, : self.vocabulary], dim=-1)
        q = torch.softmax(self.head.logits(learner)[:, : self.vocabulary], dim=-1)
        of_p, of_q = p @ self.weight, q @ self.weight
        exact = of_q - of_p
        self.whole = _added(self.whole, exact.T @ learner)
        best = torch.topk(p, max(KEEP), dim=-1)
        for k in KEEP:
            ids, mass = best.indices[:, :k], best.values[:, :k]
            rest = (1 - mass.sum(-1, keepdim=True)).clamp_min(0)
            scaled = mass / mass.sum(-1, keepdim=True)
            kl = (scaled * (scaled / mass).log()).sum(-1)
            self._note(f"top{k}", ids, mass, scaled, of_q, exact, learner, kl)
            own = q.gather(1, ids)
            of_rest = rest / (1 - own.sum(-1, keepdim=True)).clamp_min(1e-12)
            spread = (of_rest * q).scatter_(1, ids, 0)
            kl = (spread * (spread.clamp_min(1e-30) / p.clamp_min(1e-30)).log()).sum(-1)
            base = of_q - of_rest * (of_q - self._of(ids, own))
            self._note(f"top{k}_bucket", ids, mass, mass, base, exact, learner, kl)
            self._keep(f"top{k}_bucket", best.indices[:, :k], best.values[:, :k], rest)
        for n in DRAWS:
            ids = systematic_draws(p, shift, n).long()
            drawn = torch.zeros_like(p).scatter_add_(1, ids, torch.full(ids.shape, 1 / n))
            kl = (drawn * (drawn.clamp_min(1e-30) / p.clamp_min(1e-30)).log()).sum(-1)
            mass = (p * (drawn > 0)).sum(-1, keepdim=True)
            share = torch.full(ids.shape, 1 / n)
            self._note(f"draws{n}", ids, mass, share, of_q, exact, learner, kl)
            self._keep(f"draws{n}", ids, p[:, :0], torch.zeros(len(p), 1))
        self.positions += len(p)

    def _of(self, ids: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        """[C, d] rows of the head, weighted."""
        return torch.einsum("ck,ckd->cd", mass, self.weight[ids])

    def _note(
        self,
        name: str,
        ids: torch.Tensor,
        mass: torch.Tensor,
        taught: torch.Tensor,
        base: torch.Tensor,
        exact: torch.Tensor,
        learner: torch.Tensor,
        kl: torch.Tensor,
    ) -> None:
        """Add what a scheme keeps.

        Args:
            taught: mass of each of `ids` in what is learnt.
            base: what the gradient is without these.
        """
        seen = self.seen[name]
        gradient = base - self._of(ids, taught)
        seen.mass += float(mass.sum())
        seen.kl += float(kl.sum())
        seen.single += float(torch.cosine_similarity(gradient, exact).sum())
        seen.gradient = _added(seen.gradient, gradient.T @ learner)

    def _keep(self, name: str, ids: torch.Tensor, mass: torch.Tensor, rest: torch.Tensor) -> None:
        """Remember what the store would have."""
        count = torch.full((len(ids),), ids.shape[1], dtype=torch.int32)
        true = torch.full((len(ids),), -1.0)
        selected = Selected(ids.int(), mass.log(), count, rest[:, 0], true)
        self.seen[name].kept.append(kept_of_host(selected, _settings(name)))

    def end_batch(self) -> None:
        """Compare the sums of a batch, and begin another one."""
        assert self.whole is not None
        for seen in self.seen.values():
            assert seen.gradient is not None
            cosine = torch.cosine_similarity(seen.gradient.ravel(), self.whole.ravel(), dim=0)
            seen.cosines.append(float(cosine))
            seen.gradient = None
        self.whole = None


def _added(sum_: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    return more if sum_ is None else sum_ + more


def _settings(name: str) -> ExternalizeSettings:
    number = int("".join(filter(str.isdigit, name)))
    if name.startswith("draws"):
        return ExternalizeSettings(scheme="sampled", draws=number)
    return ExternalizeSettings(scheme="top", k=number, mass=None)


def stored_bytes(name: str, kept: Kept, vocabulary: int) -> float:
    """Bytes a position of a shard of the store, in rows of 512 positions."""
    settings = _settings(name)
    sampled = settings.scheme == "sampled"
    positions = len(kept.tail)
    columns = kept_columns(kept, np.append(np.arange(0, positions, 512), positions), sampled)
    most = settings.draws if sampled else settings.k
    schema = source_schema(vocabulary, settings.scheme, most)
    own = pa.schema([column for column in schema if column.name in columns])
    return len(encode_table(columns, own).data) / positions


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="zoo/python", help="a folder, a hub name, zoo/NAME")
    parser.add_argument("--positions", type=int, default=20_000, help="to read (%(default)s)")
    parser.add_argument("--dtype", default="float32", help="of its weights (%(default)s)")
    parser.add_argument(
        "--text", type=Path, nargs="*", help="UTF-8 files; Python's standard library if not given"
    )
    arguments = parser.parse_args()
    files = arguments.text or sorted(_STDLIB.glob("*.py"))[::5]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    model, encoder = load_pretrained(arguments.model, dtype=arguments.dtype, device="cpu")
    model.eval()
    encoded = spelled(texts, encoder, 2_048 if arguments.quick else arguments.positions)
    rows = [block.ids for block in encoded]
    hidden, learner = hidden_of(model, rows), hidden_of(model, short(rows))
    measured = Measured(head_of(model), len(encoder.vocabulary))
    later = torch.cat([torch.arange(len(row) - 1) >= _CONTEXT for row in rows])
    hidden, learner = hidden[later], learner[later]
    if len(hidden) < _BATCH:
        parser.error(f"{len(hidden):,} positions are left of this text; {_BATCH:,} are needed")
    shift = torch.rand(len(hidden), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dtype = measured.head.weight.dtype
    for start in range(0, len(hidden) - _BATCH + 1, _BATCH):  # whole batches
        for first in range(start, start + _BATCH, _ROWS):
            here = slice(first, first + _ROWS)
            measured.add(hidden[here].to(dtype), learner[here].to(dtype), shift[here])
        measured.end_batch()
    found: dict[str, float] = {"positions": measured.positions}
    for name, seen in measured.seen.items():
        found[f"{name}_mass"] = seen.mass / measured.positions
        found[f"{name}_kl"] = seen.kl / measured.positions
        found[f"{name}_single"] = seen.single / measured.positions
        found[f"{name}_cosine"] = float(np.mean(seen.cosines))
        found[f"{name}_spread"] = float(np.std(seen.cosines))
        if seen.kept:
            kept = Kept.concat(seen.kept)
            found[f"{name}_ids"] = len(kept.ids) / measured.positions
            found[f"{name}_bytes"] = stored_bytes(name, kept, measured.vocabulary)
    show(found, arguments.json)


if __name__ == "__main__":
    main()
