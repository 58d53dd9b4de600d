"""What can be known of a run before a model is loaded: its files, its text, and what fits."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusellm.config import CorpusSettings, Recipe
from fusellm.corpus.look import EntryFacts
from fusellm.corpus.sample import first_blocks
from fusellm.errors import CorpusError, IdentityError, ModelError, StoreError, TokenizerError
from fusellm.models.headers import weight_problems
from fusellm.models.load import describe, require_packages
from fusellm.models.readers import Reader
from fusellm.progress import Progress
from fusellm.store.blocks import Block, encode_blocks, open_corpus, read_part, read_shard
from fusellm.store.identity import Identity
from fusellm.store.manifest import check_identity
from fusellm.store.tables import shard_names
from fusellm.tokens.sample import Sample, sample

# A block has no more tokens than bytes, but for what its tokenizer puts before it, EOS and a dummy
# prefix.
_MORE_THAN_BYTES = 2
# What an entry of a distribution takes on disk, and how many of 32 draws are distinct: measured on
# the demo (docs/results.md).
_BYTES_PER_KEPT = 2.3
_DISTINCT_DRAWS = 0.65
BYTES_PER_TOKEN = 3.5
"""Of text, where no tokenizer was asked."""
_PLAIN = frozenset(("text", "jsonl", "json", "csv", "tsv"))  # files as large as their text
_SAMPLED_SHARDS, _SAMPLED_BLOCKS = 32, 512


def require_models(readers: Mapping[str, Reader]) -> None:
    """Check every model's packages, and its files by their headers.

    Raises:
        ModelError: something is missing or wrong, of all models that it is in a sentence each.
    """
    problems: list[str] = []
    for located in {r.located.fingerprint: r.located for r in readers.values()}.values():
        try:
            require_packages(located)
        except ModelError as error:
            problems.append(str(error))
        else:
            problems += weight_problems(located)
    if problems:
        raise ModelError("; ".join(problems))


def try_text(
    recipe: Recipe, run: Path, readers: Mapping[str, Reader], cut: bool
) -> dict[str, Sample]:
    """Check what the tokenizers make of the text, before any model is loaded for it.

    Args:
        cut: whether the corpus has been.

    Returns:
        What each made of some blocks.

    Raises:
        TokenizerError, CorpusError: as `try_tokenizers`, `require_tried_fit` and
            `require_measurable` do.
    """
    blocks = blocks_of(run, recipe.corpus, cut)
    samples = try_tokenizers(readers, blocks, recipe.externalize.changed_share)
    if cut:
        require_measurable(run, readers)
    else:
        require_tried_fit(readers, samples, recipe.corpus)
    return samples


def is_same(folder: Path, identity: Identity, progress: Progress) -> bool:
    """Whether a stage's folder was made from this identity; else what `run` would say is said."""
    try:
        check_identity(folder, identity)
    except IdentityError as error:
        progress.say(f"`fusellm run` would stop: {error}")
        return False
    return True


def blocks_of(run: Path, corpus: CorpusSettings, cut: bool) -> list[Block]:
    """Some blocks to try tokenizers on, from all over the corpus where it has been cut.

    Args:
        cut: whether it has.
    """
    if not cut:
        return first_blocks(corpus)
    folder = open_corpus(run)
    names = [name for part in ("train-", "held_out-") for name in shard_names(folder, part)]
    chosen = names[:: math.ceil(len(names) / _SAMPLED_SHARDS)]
    of_each = math.ceil(_SAMPLED_BLOCKS / len(chosen))
    blocks: list[Block] = []
    for name in chosen:
        own = read_shard(folder, name)
        blocks += own[:: math.ceil(len(own) / of_each)]
    return blocks


def try_tokenizers(
    readers: Mapping[str, Reader], blocks: Sequence[Block], share: float
) -> dict[str, Sample]:
    """How much of some blocks each tokenizer can read.

    Args:
        share: `externalize.changed_share`.

    Raises:
        TokenizerError: one changes more of them than that.
    """
    texts = [block.text for block in blocks]
    samples = {
        name: sample(encode_blocks(reader.encoder, blocks), texts)
        for name, reader in readers.items()
    }
    for name, one in samples.items():
        if one.changed_share > share:
            why = f" ({one.reason})" if one.reason else ""
            says, cure = (
                (f"{name!r} can learn nothing from", "Lower corpus.block_bytes, take another model")
                if one.too_long
                else (f"the tokenizer of {name!r} changes", "Take a model that keeps text as it is")
            )
            raise TokenizerError(
                f"{says} {one.changed} of {one.blocks} blocks that were tried, more than "
                f"externalize.changed_share: {share:g} allows, and these could not be used; the "
                f"first begins {one.example!r}{why}. {cure}, or raise that share"
            )
    return samples


def require_tried_fit(
    readers: Mapping[str, Reader], tried: Mapping[str, Sample], corpus: CorpusSettings
) -> None:
    """Check that the blocks that were tried fit every model's context.

    Raises:
        CorpusError: one does not.
    """
    for name, one in tried.items():
        context = readers[name].located.context_tokens
        if context is not None and one.longest > context and not corpus.has_conversations:
            raise CorpusError(
                f"the longest block that was tried has {one.longest} tokens for {name!r}, whose "
                f"context is {context}; lower corpus.block_bytes (now {corpus.block_bytes})"
            )


def require_measurable(run: Path, readers: Mapping[str, Reader]) -> None:
    """Check that models can be compared on the held-out text, before any is trained.

    Raises:
        CorpusError: of a domain no block can be read by all of them.
    """
    blocks = read_part(open_corpus(run), "held_out")
    read = {
        name: [tokens.ends is not None for tokens in encode_blocks(reader.encoder, blocks)]
        for name, reader in readers.items()
    }
    require_comparable([block.domain for block in blocks], read)


def require_comparable(domains: Sequence[str], read: Mapping[str, Sequence[bool]]) -> None:
    """Check that of each domain there is a held-out block that all models can read.

    Args:
        domains: of each block.
        read: by model, whether its tokenizer leaves each block as it is.

    Raises:
        CorpusError: there is none.
    """
    for domain in dict.fromkeys(domains):
        own = {
            name: [can for can, of in zip(rows, domains, strict=True) if of == domain]
            for name, rows in read.items()
        }
        if not any(all(block) for block in zip(*own.values(), strict=True)):
            unread = [name for name, rows in own.items() if not any(rows)]
            raise CorpusError(
                f"no held-out block of domain {domain!r} can be read by all of {', '.join(read)}"
                + (f" ({', '.join(unread)} can read none at all)" if unread else "")
                + ": some tokenizer changes its text; leave that model or that domain out"
            )


def _every_block_fits(reader: Reader, block_bytes: int | None) -> bool:
    """Whether it is known; blocks that have been cut have been looked at, but for conversations."""
    if reader.encoder.said_around:
        return reader.located.context_tokens is None
    return block_bytes is None or fits(reader, block_bytes)


def fits(reader: Reader, block_bytes: int) -> bool:
    """Whether blocks of at most so many bytes are sure to fit a model's context."""
    context = reader.located.context_tokens
    if context is None:
        return True
    return block_bytes + reader.encoder.prefix_tokens + _MORE_THAN_BYTES <= context


def require_fits(
    run: Path, name: str, reader: Reader, corpus: CorpusSettings, progress: Progress
) -> None:
    """Check that every block fits a model's context; conversations are read as far as it goes.

    Args:
        name: of the source, or "target".

    Raises:
        CorpusError: one does not.
    """
    context = reader.located.context_tokens
    if corpus.has_conversations:
        return
    folder = open_corpus(run)
    names = shard_names(folder)
    longest_bytes = max(folder.shards[n]["counts"]["longest_bytes"] for n in names)
    if context is None or fits(reader, longest_bytes):
        return
    with progress.start(f"checking lengths for {name}", len(names), "shards") as bar:
        for shard in names:
            require_blocks_fit(name, reader, read_shard(folder, shard), corpus)
            bar.advance()


def require_blocks_fit(
    name: str, reader: Reader, blocks: Sequence[Block], corpus: CorpusSettings
) -> None:
    """Check that blocks fit a model's context.

    Args:
        name: of the model.

    Raises:
        CorpusError: one does not.
    """
    context = reader.located.context_tokens
    if context is None:
        return
    encoded = encode_blocks(reader.encoder, blocks)
    for block, tokens in zip(blocks, encoded, strict=True):
        if len(tokens.ids) > context:
            raise CorpusError(
                f"block {block.number} (document {block.document!r}) has {len(tokens.ids)} tokens "
                f"for {name!r}, whose context is {context}; lower corpus.block_bytes (now "
                f"{corpus.block_bytes})"
            )


def described(
    readers: Mapping[str, Reader], tried: Mapping[str, Sample], block_bytes: int | None
) -> dict[str, Any]:
    """Models and their tokenizers, for `check`.

    Args:
        tried: what each tokenizer made of some blocks.
        block_bytes: of blocks that are still to be cut; None where all are known to fit.
    """
    models = {}
    for name, reader in readers.items():
        encoder = reader.encoder
        models[name] = describe(reader.located) | {
            "tokens": len(encoder.vocabulary),
            "every_block_fits": _every_block_fits(reader, block_bytes),
            "conversations": bool(encoder.said_around),
            "blocks_tried": tried[name].blocks,
            "blocks_changed": tried[name].changed,
            "blocks_cut": tried[name].cut,
            "longest_tried": tried[name].longest,
            "put_before": [encoder.spelled(id_) for id_ in encoder.vocabulary.prefix_ids],
        }
    return models


def projected_store_bytes(recipe: Recipe, entries: Sequence[EntryFacts]) -> int | None:
    """What a run's distributions will take on disk, roughly.

    Args:
        entries: of `corpus.documents`; files that are not packed say how much text there is at
            most, where the corpus has no budget.

    Returns:
        None where neither says it.
    """
    corpus, settings = recipe.corpus, recipe.externalize
    of_files = sum(entry.bytes for entry in entries)
    are_plain = all(entry.kinds and entry.kinds.keys() <= _PLAIN for entry in entries)
    text_bytes = corpus.train_bytes or (of_files if are_plain else 0)
    tokens = corpus.train_tokens or text_bytes / BYTES_PER_TOKEN
    sampled = settings.scheme == "sampled"
    kept = settings.draws * _DISTINCT_DRAWS if sampled else 2 * settings.k
    return int(tokens * _BYTES_PER_KEPT * kept * (len(recipe.sources) + 1)) or None


def require_disk(checked: Mapping[str, Any]) -> None:
    """Check that a run's distributions fit the disk that its folder is on.

    Args:
        checked: what `Pipeline.check` says.

    Raises:
        StoreError: they do not.
    """
    projected, free = checked["projected_store_bytes"], checked["free_bytes"]
    if projected is not None and projected > free:
        raise StoreError(
            f"the run needs about {gigabytes(projected)} and {checked['run']} has "
            f"{gigabytes(free)} free; give another --out, or lower corpus.train_bytes or "
            "externalize.draws"
        )


def gigabytes(size: float) -> str:
    """A size in bytes, for people.

    >>> gigabytes(1_234_567_890)
    '1.23 GB'
    """
    return f"{size / 1e9:.2f} GB"
