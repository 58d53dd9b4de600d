"""What a source's distributions are, in words: what `fusellm store info` shows."""

from collections.abc import Iterator, Mapping

from fusellm.store.facts import StoreFacts
from fusellm.store.opened import DistributionStore
from fusellm.text_table import counted, few

_KINDS = {
    "tokens": ("block", "read", "ids", "bytes"),
    "kept ids": ("kept", "kept_ids"),
    "probabilities": ("drops", "counts", "tail"),
    "true next token": ("true_log_prob",),
}
"""Columns of a store by what they are for."""


def described(store: DistributionStore) -> dict[str, str]:
    """What a store was made from and how much is in it, by name; only what is known."""
    told, inputs = store.facts, store.facts.identity.inputs
    numbers = few([f"{run.start:,} to {run.stop - 1:,}" for run in store.numbers], 3)
    size = f"{told.bytes / 1e6:,.2f} MB in {counted(f'{told.shards:,}', 'shards')}"
    state = "finished" if told.complete else "unfinished; `fusellm externalize` goes on with it"
    versions = (f"{name} {told.software.get(name, '?')}" for name in ("fusellm", "transformers"))
    rows = {
        "source": told.identity.stage.removeprefix("externalize/"),
        "model": told.model + (f" at {told.revision}" if told.revision else ""),
        "architecture": told.architecture,
        "commit": told.commit and told.commit[:12],
        "weights": f"sha256 {told.weights_sha256[:12]}…",
        "tokenizer": f"{told.vocabulary:,} tokens, {inputs['tokenizer'][:12]}…",
        "corpus": f"{inputs['corpus'][:12]}…",
        "read in": f"{told.dtype}, on {told.device}",
        "kept": _scheme(told),
        "state": state,
        "blocks": f"{told.blocks:,}, {numbers}" if numbers else "0",
        "put aside": told.aside and f"{len(told.aside):,} of them, which have no distributions",
        "tokens": f"{told.tokens:,}",
        "positions": f"{told.positions:,}",
        "kept a position": told.positions and f"{told.kept / told.positions:.2f} tokens",
        "size": f"{size}, {told.bytes / max(told.tokens, 1):.2f} bytes a token",
        "written by": f"{', '.join(versions)}, in {told.seconds:,.0f} s",
    }
    return {name: str(value) for name, value in rows.items() if value}


def _scheme(told: StoreFacts) -> str:
    if told.scheme == "sampled":
        return f"{told.draws} draws at each position, with their counts"
    until = "" if told.mass is None else f", no more than reach {told.mass:g}"
    step = f"log-probabilities to {told.error_nats:.4f} nat"
    return f"the {told.k} most probable tokens{until}, and the mass of the rest; {step}"


def sizes_by_kind(per_token: Mapping[str, float]) -> Iterator[tuple[str, str, str]]:
    """(what columns are for, their names, their bytes a token) of a store's columns."""
    for kind, columns in _KINDS.items():
        there = [name for name in columns if name in per_token]
        yield kind, " ".join(there), f"{sum(per_token[name] for name in there):.2f}"
