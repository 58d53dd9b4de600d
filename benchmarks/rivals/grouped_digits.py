"""A fourth small model, whose tokenizer has the digits of a number in groups of up to three.

The zoo's tokenizers have hardly any token of several digits, as those of many models; GPT-NeoX's
has 2,016, Llama-3's and GPT-4's 1,100. This one has all groups of one, two and three digits, with a
space before them and without. It is trained as the zoo's specialists are: a Llama that knows prose
best, and has seen some numbers.
"""

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fusellm.progress import Progress
from fusellm.stages.zoo import trained
from fusellm.zoo.specialists import Specialist, save
from fusellm.zoo.text import Document, documents, drop_near_duplicates
from number_text import number_documents

PIECES = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPECIALIST = Specialist(
    "digits", "prose", "llama", "byte_level_bpe", 8192, train_bytes=5_000_000, seed=3
)
NUMBERS_SEED = 1
"""Of the numbers that it has seen; others are trained and measured on."""
_END_OF_TEXT = "<|endoftext|>"
_OF_NUMBERS, _OF_TOKENIZER_TEXT = 0.01, 4_000_000  # the more it has seen, the less it can learn
_GROUP_REPEATS = 60


def make(folder: Path, quick: bool, progress: Progress) -> None:
    """Train tokenizer and model, if the folder is not there yet; some ten minutes on one core."""
    if folder.exists():
        return
    specialist = replace(SPECIALIST, train_bytes=16_000) if quick else SPECIALIST
    texts = _documents(quick)
    tokenizer = grouping_bpe(_tokenizer_texts(texts, quick), specialist.tokenizer_size)
    model, _ = trained(specialist, tokenizer, texts, "the model of grouped digits", progress)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    card = f"A small model with digits in groups, made by {Path(__file__).name}.\n"
    save(specialist, model, tokenizer, part, card)
    part.rename(folder)


def grouping_bpe(texts: Iterator[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """BPE over bytes, as GPT-NeoX's but for numbers, of which it takes three digits at a time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[_END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=16,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END_OF_TEXT)


def groups_of_digits(tokenizer: PreTrainedTokenizerFast) -> int:
    """How many of its tokens are two or three digits, with a space before them or without."""
    return sum(bool(re.fullmatch(r"Ġ?\d{2,3}", token)) for token in tokenizer.get_vocab())


def _documents(quick: bool) -> list[Document]:
    """The zoo's part of the built-in corpus, and numbers, which count as prose."""
    if quick:
        found = list(islice(documents(("zoo",), ("prose", "python")), 120))
    else:
        kept_apart = documents(("train", "validation", "held_out"))
        found, _ = drop_near_duplicates(kept_apart, list(documents(("zoo",))))
    prose = sum(len(d.text.encode()) for d in found if d.domain == "prose")
    wanted = min(prose, SPECIALIST.train_bytes) * _OF_NUMBERS
    return found + [
        Document(f"numbers/{n}", "prose", "zoo", text)
        for n, text in enumerate(numbers_of(NUMBERS_SEED, int(wanted)))
    ]


def numbers_of(seed: int, most_bytes: int) -> list[str]:
    """Documents with many numbers, of that many bytes in all or a little less."""
    count, found = 64, number_documents(seed, 64)
    while sum(len(text.encode()) for text in found) < most_bytes:
        count *= 2
        found = number_documents(seed, count)
    chosen: list[str] = []
    size = 0
    for text in found:
        size += len(text.encode())
        if size > most_bytes and chosen:
            break
        chosen.append(text)
    return chosen


def _tokenizer_texts(texts: Sequence[Document], quick: bool) -> Iterator[str]:
    """Half of it prose; and every group of digits, so often that it becomes a token."""
    for domain in dict.fromkeys(document.domain for document in texts):
        left = _OF_TOKENIZER_TEXT // (2 if domain == "prose" else 4)
        for document in texts:
            if document.domain == domain and left > 0:
                left -= len(document.text.encode())
                yield document.text
    groups = [f"{n:0{digits}d}" for digits in (1, 2, 3) for n in range(10**digits)]
    for _ in range(2 if quick else _GROUP_REPEATS):
        yield " ".join(groups)
        yield ",".join(groups)
