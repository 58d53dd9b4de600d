"""Arms of the studies of translation: settings of fusion, and what they carry over of whole
distributions, by the pipeline's own code.

T tokens of a block, N of its positions that predict, V a source's vocabulary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from figures import load_encoder
from fusellm.alignment.strategies import STRATEGIES, boundary_aligner
from fusellm.alignment.translation import VocabularyMap
from fusellm.arrays.distributions import Kept
from fusellm.arrays.fused import Fused
from fusellm.arrays.ragged import offsets_of
from fusellm.arrays.tokens import Tokens
from fusellm.config import FusionSettings, ModelSettings
from fusellm.fusion.fuse import Reading, fuse_blocks, rules_of
from fusellm.fusion.pairing import Pairing, pair
from fusellm.models.heads import head_of, hidden_states
from fusellm.models.load import load_model, load_tokenizer, locate
from fusellm.tokens.blocks import cut
from fusellm.tokens.encode import Encoder
from fusellm.zoo.text import DOMAINS, documents
from number_text import number_documents
from script_text import script_documents

ARMS: Mapping[str, Mapping[str, object]] = {
    "partition": {"refine": "none", "token_healing": False},
    "healed": {"refine": "none"},
    "path": {"token_healing": False},
    "refined": {},
    "bytes": {"strategy": "bytes", "token_healing": False},
    "bpm": {"strategy": "bpm"},
    "mined": {"strategy": "mined"},
    "em": {"strategy": "em"},
}
"""By name, settings of `fusion:`. `refined` is the default; `path` is it without healing."""

TEXTS = (*DOMAINS, "numbers", "scripts")
ZOO = ("prose", "python", "cpp")
_MADE_SEED = 7
_WHOLE_VOCABULARY, _MOST_PROBABLE = 60_000, 2_048
LEAST_LOG_PROB = -14.0
"""Of what is taken of a whole distribution. A token of 8,192 that is evenly likely has -9."""


@dataclass(frozen=True)
class Reader:
    """A tokenizer by its name."""

    name: str
    encoder: Encoder

    def tokens(self, text: str, last: bool = False) -> Tokens | None:
        """A block; None where the tokenizer changes the text."""
        (block,) = self.encoder.encode([text], [last])
        if block.ends is None:
            return None
        return Tokens(np.array([0, len(block.ids)]), block.ids, block.ends, block.prefix_tokens)


@dataclass(frozen=True)
class Model(Reader):
    """A model and its tokenizer."""

    network: PreTrainedModel

    @classmethod
    def load(cls, name: str, place: str) -> "Model":
        located = locate(ModelSettings(model=place))
        network = load_model(located, torch.device("cpu"), torch.float32).eval()
        rows = head_of(network).weight.shape[0]
        return cls(name, Encoder(load_tokenizer(located), rows), network)

    @torch.no_grad()
    def log_probs(self, ids: np.ndarray) -> torch.Tensor:
        """[T, V] of one block."""
        hidden = hidden_states(self.network, input_ids=torch.from_numpy(ids)[None])[0]
        logits = head_of(self.network).logits(hidden)[:, : len(self.encoder.vocabulary)]
        return torch.log_softmax(logits, dim=-1)


@dataclass(frozen=True)
class Places:
    """Where models and tokenizers are, by name: those of the zoo, and of two folders.

    Attributes:
        models: place of each model.
        tokenizers: folders of tokenizers without a model.
    """

    models: Mapping[str, str]
    tokenizers: Mapping[str, Path]

    @classmethod
    def of(cls, models: Path | None, tokenizers: Path) -> "Places":
        """What there is."""
        return cls(
            {f"zoo/{name}": f"zoo/{name}" for name in ZOO}
            | {folder.name: str(folder) for folder in _folders(models)},
            {folder.name: folder for folder in _folders(tokenizers)},
        )

    def source(self, name: str) -> Model:
        return Model.load(name, self.models[name])

    def target(self, name: str) -> Reader:
        if name in self.tokenizers:
            return Reader(name, load_encoder(self.tokenizers[name]))
        located = locate(ModelSettings(model=self.models[name]))
        return Reader(name, Encoder(load_tokenizer(located)))

    def pairs(self) -> Iterator[str]:
        """Each target beside each source that is not itself."""
        for target in (*self.models, *self.tokenizers):
            yield from (f"{target}<-{source}" for source in self.models if source != target)


def _folders(place: Path | None) -> list[Path]:
    if place is None or not place.is_dir():
        return []
    return sorted(folder for folder in place.iterdir() if (folder / "tokenizer.json").is_file())


def blocks_of(domain: str, most_bytes: int) -> list[str]:
    """The beginnings of documents: of the corpus' validation part, or made by rules."""
    found, size = [], 0
    made = {"numbers": number_documents, "scripts": script_documents}
    count = most_bytes // 200 + 5
    texts = (
        iter(made[domain](_MADE_SEED, count))
        if domain in made
        else (document.text for document in documents(("validation",), (domain,)))
    )
    for whole in texts:
        text = next(cut(whole, min(1024, most_bytes)))
        found.append(text)
        size += len(text.encode())
        if size >= most_bytes:
            break
    return found


@lru_cache(maxsize=16)  # arms of one map share what its tree has asked the tokenizers
def _map_of(strategy: str, source: Encoder, target: Encoder) -> VocabularyMap:
    return STRATEGIES[strategy].translate(source, target, None)


def kept_of(log_p: torch.Tensor, true_ids: np.ndarray) -> Kept:
    """Distributions [N, V] as a store keeps them: what is likely, the true next tokens, and a tail.

    Args:
        true_ids: [N] the true next tokens.
    """
    true = torch.from_numpy(true_ids)[:, None]
    stays = log_p > LEAST_LOG_PROB
    if log_p.shape[1] > _WHOLE_VOCABULARY:
        likely = torch.zeros_like(stays)
        likely.scatter_(1, torch.topk(log_p, _MOST_PROBABLE, dim=1).indices, True)
        stays &= likely
    stays.scatter_(1, true, True)
    at = stays.nonzero()
    log_probs = log_p[at[:, 0], at[:, 1]]
    offsets = offsets_of(stays.sum(1).numpy())
    tail = 1 - np.add.reduceat(log_probs.double().exp().numpy(), offsets[:-1])
    return Kept(
        offsets,
        at[:, 1].numpy(),
        log_probs.numpy(),
        np.zeros(0, dtype=np.uint8),
        np.maximum(tail, 0).astype(np.float32),
        log_p.gather(1, true)[:, 0].numpy(),
    )


@dataclass(frozen=True)
class Arm:
    """One arm between a source and a target."""

    name: str
    settings: FusionSettings
    map: VocabularyMap
    pairing: Pairing

    @classmethod
    def between(cls, name: str, source: Encoder, target: Encoder) -> "Arm":
        settings = FusionSettings.model_validate({"function": "uniform", **ARMS[name]})
        map_ = _map_of(settings.strategy, source, target)
        return cls(name, settings, map_, pair(source, target, map_, settings))

    def by_boundaries(self, source: Encoder, target: Encoder) -> "Arm":
        """The same with positions that have read the same, whatever its own alignment is."""
        aligner = boundary_aligner(source, target, self.map)
        return replace(self, pairing=replace(self.pairing, aligner=aligner))

    @property
    def reads_the_text(self) -> bool:
        """Whether what it carries over depends on how the text goes on."""
        return self.pairing.tree is not None

    def fused(self, theirs: Tokens, mine: Tokens, kept: Kept) -> tuple[Fused, Reading]:
        """What is carried over, at all target positions of some blocks.

        Args:
            theirs, mine: the blocks as the target and the source read them.
            kept: the source's distributions.
        """
        reading = self.pairing.reading(theirs, mine, kept)
        sizes = np.maximum(mine.ends[mine.offsets[1:] - 1], theirs.ends[theirs.offsets[1:] - 1])
        fused, _, _ = fuse_blocks(theirs, offsets_of(sizes), [reading], rules_of(self.settings))
        return fused, reading
