"""What models have written in answer to prompts, on disk: a row a prompt, in the corpus' order."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from fusellm.store.layout import Layout
from fusellm.store.manifest import StageFolder
from fusellm.store.tables import Columns, Shard, shard_names, write_table
from fusellm.store.writer import StageWriter

ANSWERS_SCHEMA = pa.schema(
    [
        ("block", pa.int64()),
        ("document", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.large_string()),
        ("ends", pa.bool_()),
        ("tokens", pa.int32()),
    ]
)
ANSWERS = Layout((ANSWERS_SCHEMA,))


class GeneratedAnswer(NamedTuple):
    """What a model wrote.

    Attributes:
        document: that it answers.
        prompt: digest of what was asked.
        text: of it, without the prompt; nothing of a prompt that could not be read.
        ends: whether the model has ended it.
        tokens: that it wrote.
    """

    document: str
    prompt: str
    text: str
    ends: bool
    tokens: int


def write_answers(
    writer: StageWriter, name: str, first: int, answers: Sequence[GeneratedAnswer]
) -> None:
    """Write a shard.

    Args:
        first: number of its first prompt.
    """
    columns: Columns = {
        "block": np.arange(first, first + len(answers)),
        "document": [one.document for one in answers],
        "prompt": [one.prompt for one in answers],
        "answer": [one.text for one in answers],
        "ends": [one.ends for one in answers],
        "tokens": [one.tokens for one in answers],
    }
    counts = {
        "prompts": len(answers),
        "tokens": sum(one.tokens for one in answers),
        "empty": sum(not one.text.strip() for one in answers),
        "cut": sum(bool(one.text.strip()) and not one.ends for one in answers),
    }
    write_table(writer, name, columns, ANSWERS_SCHEMA, counts)


def read_answers(run: Path, entry: int) -> Iterator[GeneratedAnswer]:
    """The answers to an entry of the corpus, by its number, that say something; in order.

    Raises:
        StoreError: they are missing, unfinished or damaged.
    """
    folder = StageFolder(run / "generate" / str(entry))
    folder.require_complete(f"fusellm generate {run}")
    for name in shard_names(folder, "answers-"):
        shard = Shard(folder, name, ANSWERS)
        for row in (shard.block(n) for n in range(len(shard))):
            if row["answer"].strip():
                told = row["document"], row["prompt"], row["answer"]
                yield GeneratedAnswer(*told, bool(row["ends"]), int(row["tokens"]))
