"""What a stored distribution costs, what it loses, and what it teaches.

    python benchmarks/store.py sizes       bytes a token and source, and error, of each scheme
    python benchmarks/store.py frontier    bytes against what the kept part teaches
    python benchmarks/store.py epochs      the same draws in every epoch, or others in each

sizes: small models are trained for minutes, or taken from --models where they were kept, with the
tokenizers beside the project (Llama-2's, V = 32,000; GPT-NeoX's, 50,277), and read Python, prose
and C++ that they have not seen; so do the models of the zoo. A shard is encoded as the stage does
it, token ids, boundaries, tail and true token included, and read back.

    bytes_over_authors   top 10 over the authors' columns (float16 logits and int64 ids as lists of
                         lists, float16 cross-entropy) written with `datasets`, real tokens only and
                         without their token ids; most of the vocabularies of 32,000 to 50,277
    error_nats           largest |read − written| of a log-probability, of kept tokens, true tokens
                         and tails, over all models and schemes
    MODEL_SCHEME_bytes, …_kept, …_parquet    bytes a token, kept ids a token, bytes of the same as
                         Parquet with lists of int32 and float32
    …_arrow_over_parquet, …_arrow_read_speed_over_parquet
                         bytes, and speed of reading, of the store's columns as Arrow over the same
                         columns as Parquet

frontier: the same tokenizer, one source (zoo/python), a target that knows prose, λ = 0.5, Python
for a fixed budget; validation bits per byte of Python for each scheme, written and read back, and
for the whole distribution, which is never stored.

epochs: the frontier's lesson with half of its text (--blocks), over 1, 2 and 4 epochs: draws as
they are stored, the same in each epoch (`fixed`), and draws made with another seed for each
(`anew`), which no store has; CLM and the whole distribution beside them. NAME_E_bits_per_byte.

`--quick` takes under 40 seconds (a zoo model, a little text, no training for sizes), `--json`
prints one flat object of figures.
"""

import random
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from rich.console import Console
from rich.progress import track
from transformers import GPTNeoXForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from figures import add_tokenizers, command_line, load_encoder, show
from fusellm.arrays.distributions import Kept
from fusellm.config import ExternalizeSettings, ModelSettings
from fusellm.evaluation.text.nats import blocks_nats, by_domain
from fusellm.models.heads import head_of, hidden_states
from fusellm.models.load import load_model, load_tokenizer, locate
from fusellm.objective.chunked import objective
from fusellm.objective.outcomes import Outcomes
from fusellm.reading.batches import pad, plan_batches
from fusellm.reading.source_reader import Read, SourceReader
from fusellm.reading.worker import columns_of_tokens
from fusellm.store.blocks import Block
from fusellm.store.externalized import kept_columns, kept_of, source_layout
from fusellm.store.identity import Identity
from fusellm.store.layout import Layout
from fusellm.store.tables import BATCH_BLOCKS, EncodedShard, Shard, encode_table, write_encoded
from fusellm.store.writer import StageWriter
from fusellm.tokens.blocks import cut
from fusellm.tokens.encode import Encoded, Encoder
from fusellm.zoo.specialists import BLOCK_BYTES, Specialist, train
from fusellm.zoo.text import Document, documents

_STDLIB = Path(sysconfig.get_paths()["stdlib"])
_CPU = torch.device("cpu")
_SCREEN = Console(stderr=True)
SCHEMES = {
    "top10": ExternalizeSettings(scheme="top", k=10, mass=None),
    "top32": ExternalizeSettings(scheme="top", k=32, mass=None),
    "mass99": ExternalizeSettings(scheme="top", k=32, mass=0.99),
    "draws16": ExternalizeSettings(scheme="sampled", draws=16),
    "draws32": ExternalizeSettings(scheme="sampled", draws=32),
    "draws64": ExternalizeSettings(scheme="sampled", draws=64),
}
_TRAINED = {"llama-2": "llama", "gpt-neox-20b": "gpt_neox"}


def texts(part: str, domains: Sequence[str], blocks: int, seed: int = 0) -> list[Block]:
    """Blocks of a part of the built-in corpus, in random order."""
    found = []
    for domain in domains:
        pool = [
            Block(0, document.name, domain, False, text)
            for document in documents([part], [domain])
            for text in cut(document.text, BLOCK_BYTES)
        ]
        random.Random(seed).shuffle(pool)
        found += pool[: blocks // len(domains)]
    random.Random(seed).shuffle(found)
    return found


def little_text(blocks: int) -> list[Block]:
    """Blocks of Python's standard library, read in no time."""
    files = sorted(_STDLIB.glob("*.py"))
    found = [
        Block(0, file.name, "python", False, text)
        for file in files[::7]
        for text in cut(file.read_text(encoding="utf-8", errors="replace"), BLOCK_BYTES)
    ]
    random.Random(0).shuffle(found)
    return found[:blocks]


# What it costs and what it loses


@dataclass(frozen=True)
class Reading:
    """One model's tokens of the same blocks."""

    reader_of: PreTrainedModel
    vocabulary: int
    blocks: list[Block]
    encoded: list[Encoded]

    @classmethod
    def of(cls, model: PreTrainedModel, encoder: Encoder, blocks: list[Block]) -> "Reading":
        """Tokenize the blocks."""
        blocks = [replace(block, number=n) for n, block in enumerate(blocks)]
        encoded = encoder.encode([b.text for b in blocks], [b.last for b in blocks])
        return cls(model, len(encoder.vocabulary), blocks, encoded)

    def read(self, settings: ExternalizeSettings, seed: int = 0) -> Read:
        """Run the model; `seed`: of the draws."""
        reader = SourceReader(self.reader_of, self.vocabulary, settings, seed)
        return reader.read([block.text for block in self.blocks], self.encoded)

    def encode(self, read: Read, settings: ExternalizeSettings) -> EncodedShard:
        """The shard that the stage would write."""
        columns = columns_of_tokens(self.blocks, self.encoded, read.usable)
        kept = kept_columns(read.kept, read.position_offsets, settings.scheme == "sampled")
        return encode_table(columns | kept, self.layout(settings).schemas[0])

    def layout(self, settings: ExternalizeSettings) -> Layout:
        """What the shard must be."""
        most = settings.draws if settings.scheme == "sampled" else settings.k
        return source_layout(self.vocabulary, settings.scheme, most)


def read_back(encoded: EncodedShard, layout: Layout) -> list[Kept]:
    """What a reader gets, a record batch at a time, each checked."""
    with (
        tempfile.TemporaryDirectory() as place,
        StageWriter.open(Path(place), Identity("externalize", {}, {})) as folder,
    ):
        write_encoded(folder, "train-00000.arrow", encoded)
        shard = Shard(folder, "train-00000.arrow", layout)
        return [kept_of(columns) for columns in shard.batches()]


def error_nats(written: Kept, read: list[Kept]) -> float:
    """Largest difference of a log-probability."""
    true = np.concatenate([part.true_log_prob for part in read])
    worst = float(np.abs(true - written.true_log_prob).max())
    if written.sampled:
        return worst
    log_probs = np.concatenate([part.log_probs for part in read])
    tail = np.concatenate([part.tail for part in read])
    counted = written.tail > 0
    of_tail = np.abs(np.log(tail[counted]) - np.log(written.tail[counted]))
    return max(
        worst,
        float(np.abs(log_probs - written.log_probs).max()),
        float(of_tail.max(initial=0.0)),
    )


def authors_bytes(kept: Kept, lengths: Sequence[int]) -> int:
    """The authors' columns written with `datasets`: of a top 10, without padding."""
    rows = np.diff(kept.offsets)[0]
    values = kept.log_probs.astype(np.float16).reshape(-1, rows)
    ids = kept.ids.astype(np.int64).reshape(-1, rows)
    loss = (-kept.true_log_prob).astype(np.float16)
    ends = np.cumsum([0, *lengths])
    features = datasets.Features(
        {
            "per_step_logits": datasets.List(datasets.List(datasets.Value("float16"))),
            "per_step_indices": datasets.List(datasets.List(datasets.Value("int64"))),
            "metric_ce": datasets.List(datasets.Value("float16")),
        }
    )

    def columns(array: np.ndarray) -> list[np.ndarray]:
        return [array[a:b] for a, b in pairwise(ends)]

    table = {
        "per_step_logits": [list(x) for x in columns(values)],
        "per_step_indices": [list(x) for x in columns(ids)],
        "metric_ce": columns(loss),
    }
    with tempfile.TemporaryDirectory() as place:
        datasets.Dataset.from_dict(table, features=features).save_to_disk(place)
        return sum(file.stat().st_size for file in Path(place).glob("*.arrow"))


def parquet_bytes(kept: Kept, lengths: Sequence[int]) -> int:
    """The same as Parquet with lists of int32 and float32, as pyarrow writes it by default."""
    entries = kept.offsets[np.cumsum([0, *lengths])]

    def lists(offsets: np.ndarray, values: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))

    values = kept.counts if kept.sampled else kept.log_probs.astype(np.float32)
    positions = np.cumsum([0, *lengths])
    table = pa.table(
        {
            "kept": lists(positions, np.diff(kept.offsets).astype(np.int32)),
            "ids": lists(entries, kept.ids.astype(np.int32)),
            "values": lists(entries, values),
            "tail": lists(positions, kept.tail),
            "true_log_prob": lists(positions, kept.true_log_prob),
        }
    )
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return int(sink.getvalue().size)


def over_parquet(shard: EncodedShard) -> dict[str, float]:
    """The same columns in both formats: Parquet's best for them is byte streams split, then zstd.

    Both are read record batch by record batch, all columns, without a checksum.
    """
    table = pyarrow.ipc.open_file(pa.BufferReader(shard.data)).read_all()
    table = pa.table({name: table[name] for name in table.column_names if name != "read"})
    sink, arrow = pa.BufferOutputStream(), pa.BufferOutputStream()
    codec = pa.Codec("zstd", compression_level=6)
    options = pyarrow.ipc.IpcWriteOptions(compression=codec)
    with pyarrow.ipc.new_file(arrow, table.schema, options=options) as out:
        out.write_table(table, max_chunksize=BATCH_BLOCKS)
    lists = [name for name in table.column_names if name != "block"]
    pyarrow.parquet.write_table(
        table,
        sink,
        row_group_size=BATCH_BLOCKS,
        compression="zstd",
        compression_level=6,
        use_dictionary=False,
        column_encoding={f"{name}.list.item": "BYTE_STREAM_SPLIT" for name in lists},
    )
    parquet, plain = sink.getvalue(), arrow.getvalue()

    def read_parquet() -> None:
        file = pyarrow.parquet.ParquetFile(pa.BufferReader(parquet), pre_buffer=False)
        for n in range(file.num_row_groups):
            file.read_row_group(n, use_threads=False)

    def read_arrow() -> None:
        options = pyarrow.ipc.IpcReadOptions(use_threads=False)
        file = pyarrow.ipc.open_file(pa.BufferReader(plain), options=options)
        for n in range(file.num_record_batches):
            file.get_batch(n)

    def least_seconds(work: Callable[[], None]) -> float:
        return min(_seconds(work) for _ in range(5))

    return {
        "arrow_over_parquet": plain.size / parquet.size,
        "arrow_read_speed_over_parquet": least_seconds(read_parquet) / least_seconds(read_arrow),
    }


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def sizes_of(name: str, reading: Reading) -> dict[str, float]:
    """Figures of one model."""
    found: dict[str, float] = {}
    tokens = sum(len(block.ids) for block in reading.encoded)
    for scheme, settings in track(SCHEMES.items(), f"{name}: schemes", console=_SCREEN):
        read = reading.read(settings)
        began = time.perf_counter()
        shard = reading.encode(read, settings)
        seconds = time.perf_counter() - began
        lengths = np.diff(read.position_offsets).tolist()
        key = f"{name}_{scheme}"
        found[f"{key}_bytes"] = len(shard.data) / tokens
        found[f"{key}_kept"] = len(read.kept.ids) / tokens
        found[f"{key}_parquet"] = parquet_bytes(read.kept, lengths) / tokens
        found[f"{key}_error_nats"] = error_nats(
            read.kept, read_back(shard, reading.layout(settings))
        )
        found[f"{key}_encoded_tokens_per_second"] = tokens / seconds
        if scheme in ("top10", "draws32"):
            found |= {f"{key}_{name}": value for name, value in over_parquet(shard).items()}
        if scheme == "top10":
            found[f"{name}_authors_bytes"] = authors_bytes(read.kept, lengths) / tokens
            found[f"{name}_over_authors"] = found[f"{key}_bytes"] / found[f"{name}_authors_bytes"]
    return found


def trained(
    name: str, tokenizer: Path, folder: Path, train_bytes: int
) -> tuple[PreTrainedModel, Encoder]:
    """A small model with a real tokenizer, trained here once."""
    encoder = load_encoder(tokenizer)
    place = folder / name
    if not (place / "config.json").exists():
        specialist = Specialist(
            name, "python", _TRAINED[name], "", len(encoder.vocabulary), train_bytes
        )
        _train(specialist, encoder, list(documents(["zoo"])), place)
    return load_model(locate(ModelSettings(model=str(place))), _CPU), encoder


def _train(specialist: Specialist, encoder: Encoder, text: Sequence[Document], place: Path) -> None:
    tokenizer = encoder.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    steps = train(specialist, tokenizer, text)
    for trained_model, step in steps:
        model = trained_model
        if step.step % 50 == 0 or step.step == step.steps:
            _SCREEN.print(
                f"{specialist.name}: step {step.step} of {step.steps}, "
                f"{step.loss_nats:.3f} nats, {step.seconds:.0f} s"
            )
    model.save_pretrained(place)
    encoder.tokenizer.save_pretrained(place)


def zoo(name: str) -> tuple[PreTrainedModel, Encoder]:
    """A model of the zoo."""
    located = locate(ModelSettings(model=f"zoo/{name}"))
    return load_model(located, _CPU), Encoder(load_tokenizer(located))


def sizes(quick: bool, models: Path, tokenizers: Path) -> dict[str, float]:
    """Figures of all models."""
    if quick:
        found = sizes_of("python", Reading.of(*zoo("python"), little_text(48)))
        large = ["python"]
    else:
        blocks = texts("train", ("prose", "python", "cpp"), 384)
        found = {}
        for name in ("prose", "python", "cpp"):
            found |= sizes_of(name, Reading.of(*zoo(name), blocks))
        large = [name for name in _TRAINED if (tokenizers / name).exists()]
        for name in large:
            found |= sizes_of(
                name, Reading.of(*trained(name, tokenizers / name, models, 4_000_000), blocks)
            )
    return {
        "bytes_over_authors": max(found[f"{name}_over_authors"] for name in large),
        "error_nats": max(v for key, v in found.items() if key.endswith("_error_nats")),
    } | found


# What it teaches


class _Lesson:
    """A fixed budget of Python for a target, with or without the source's distributions."""

    def __init__(self, quick: bool, models: Path, blocks: int) -> None:
        self.source, self.encoder = zoo("python")
        place = models / "frontier-target"
        if not (place / "config.json").exists():
            specialist = Specialist(
                "frontier-target", "prose", "gpt_neox", "", 8192, 20_000 if quick else 8_000_000
            )
            text = [
                Document(block.document, "prose", "zoo", block.text) for block in little_text(40)
            ]
            text = text if quick else list(documents(["zoo"]))
            _train(specialist, self.encoder, text, place)
        self._place = place
        if quick:
            learned, self.validation = little_text(40)[:24], little_text(40)[24:]
        else:
            learned = texts("train", ["python"], blocks)
            self.validation = texts("validation", ["python"], 200)
        rows = self.encoder.encode([b.text for b in learned], [False] * len(learned))
        self.rows = [row for row in rows if row.ends is not None and len(row.ids) > 1]
        self.texts = [
            b.text
            for b, row in zip(learned, rows, strict=True)
            if row.ends is not None and len(row.ids) > 1
        ]
        self.tokens = sum(len(row.ids) for row in self.rows)

    def before(self) -> dict[str, float]:
        """What is known before any training."""
        return {
            "tokens": float(self.tokens),
            "source": self.bits_per_byte(self.source),
            "target_before": self.bits_per_byte(self.target().eval()),
        }

    def target(self) -> PreTrainedModel:
        """The target before training."""
        return GPTNeoXForCausalLM.from_pretrained(self._place)

    def stored(self, settings: ExternalizeSettings, seed: int = 0) -> tuple[list[Kept], float]:
        """(each row's distributions, written and read back; bytes a token)."""
        blocks = [Block(n, "", "python", False, text) for n, text in enumerate(self.texts)]
        reading = Reading(self.source, len(self.encoder.vocabulary), blocks, self.rows)
        shard = reading.encode(reading.read(settings, seed), settings)
        found: list[Kept] = []
        lengths = iter([len(row.ids) - 1 for row in self.rows])
        for part in read_back(shard, reading.layout(settings)):
            start = 0
            while start < len(part.tail):
                stop = start + next(lengths)
                found.append(_rows(part, start, stop))
                start = stop
        return found, len(shard.data) / self.tokens

    def teach(
        self,
        kept: Sequence[list[Kept]],
        clm_weight: float,
        rate: float,
        seed: int,
        renormalize: bool = False,
        whole: bool = False,
        epochs: int = 1,
    ) -> float:
        """Validation bits per byte after the budget; each epoch has the next of `kept`, in turn."""
        torch.manual_seed(seed)
        model = self.target().train()
        batches = plan_batches([len(row.ids) for row in self.rows], 2048)
        order = random.Random(seed)
        plan = [
            (epoch, batch)
            for epoch in range(epochs)
            for batch in order.sample(batches, len(batches))
        ]
        optimizer = torch.optim.AdamW(model.parameters(), rate, (0.9, 0.95), weight_decay=0.1)
        for step, (epoch, batch) in enumerate(plan):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 10) * (1 - step / len(plan))
            ids, mask = pad([self.rows[n].ids for n in batch], _CPU)
            predicted = mask[:, 1:].bool()
            hidden = hidden_states(model, input_ids=ids, attention_mask=mask)[:, :-1][predicted]
            labels, head = ids[:, 1:][predicted], head_of(model)
            if whole:
                with torch.no_grad():
                    theirs = hidden_states(self.source, input_ids=ids, attention_mask=mask)
                    p = head_of(self.source).logits(theirs[:, :-1][predicted]).softmax(-1)
                log_q = head.logits(hidden).log_softmax(-1)
                clm = -log_q.gather(1, labels[:, None]).sum()
                total = clm_weight * clm - (1 - clm_weight) * (p * log_q).sum()
            else:
                outcomes = None
                if kept:
                    now = kept[epoch % len(kept)]
                    outcomes = _outcomes([now[n] for n in batch], renormalize)
                total = objective(hidden, head, labels, outcomes, clm_weight).total
            (total / len(labels)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return self.bits_per_byte(model.eval())

    def bits_per_byte(self, model: PreTrainedModel) -> float:
        """Of Python's validation blocks."""
        blocks = self.validation
        encoded = self.encoder.encode([b.text for b in blocks], [False] * len(blocks))
        lengths = [len(block.text.encode()) for block in blocks]
        nats = blocks_nats(model, encoded, lengths, None)
        return by_domain(["python"] * len(blocks), nats)["python"]


def _rows(kept: Kept, start: int, stop: int) -> Kept:
    """Positions [start, stop)."""
    first, last = kept.offsets[start], kept.offsets[stop]
    return Kept(
        kept.offsets[start : stop + 1] - first,
        kept.ids[first:last],
        kept.log_probs[first:last] if len(kept.log_probs) else kept.log_probs,
        kept.counts[first:last] if len(kept.counts) else kept.counts,
        kept.tail[start:stop],
        kept.true_log_prob[start:stop],
    )


def _outcomes(rows: list[Kept], renormalize: bool) -> Outcomes:
    lengths = np.concatenate([np.diff(row.offsets) for row in rows])
    mass = np.concatenate([row.masses() for row in rows])
    rest = np.concatenate([row.tail for row in rows])
    part = np.repeat(np.arange(len(lengths)), lengths)
    if renormalize:
        mass = mass / np.bincount(part, weights=mass)[part]
        rest = np.zeros_like(rest)
    every = torch.arange(len(mass))
    return Outcomes(
        torch.ones(len(lengths), dtype=torch.bool),
        torch.arange(len(lengths)),
        torch.from_numpy(rest.astype(np.float32)),
        torch.from_numpy(part),
        torch.from_numpy(mass.astype(np.float32)),
        every,
        torch.from_numpy(np.concatenate([row.ids for row in rows]).astype(np.int64)),
    )


class _Arm(NamedTuple):
    """A way of teaching: CLM, whole distributions, or what is kept of them."""

    name: str
    kept: Sequence[list[Kept]] = ()
    epochs: int = 1
    renormalize: bool = False

    def best(self, lesson: _Lesson, quick: bool, seeds: int) -> dict[str, float]:
        """The figures at the best learning rate: means over seeds."""
        rates = (1e-3,) if quick else (3e-4, 1e-3, 3e-3)
        weight, whole = 1.0 if self.name.startswith("clm") else 0.5, self.name.startswith("whole")
        scores = []
        for rate in rates:
            values = [
                lesson.teach(self.kept, weight, rate, seed, self.renormalize, whole, self.epochs)
                for seed in range(seeds)
            ]
            scores.append((statistics.mean(values), rate, values))
            _SCREEN.print(f"{self.name} at {rate:g}: " + " ".join(f"{v:.4f}" for v in values))
        best, rate, values = min(scores)
        found = {f"{self.name}_bits_per_byte": best, f"{self.name}_learning_rate": rate}
        if seeds > 1:
            found[f"{self.name}_deviation"] = statistics.stdev(values)
        return found


def frontier(quick: bool, models: Path, seeds: int, blocks: int = 500) -> dict[str, float]:
    """Figures of all schemes: the best of the learning rates for each, mean over seeds."""
    lesson = _Lesson(quick, models, blocks)
    found = lesson.before()
    for arm in (_Arm("clm"), _Arm("whole")):
        found |= arm.best(lesson, quick, seeds)
    schemes = {"top10": SCHEMES["top10"], "draws16": SCHEMES["draws16"]} if quick else SCHEMES
    for name, settings in schemes.items():
        kept, found[f"{name}_bytes"] = lesson.stored(settings)
        found |= _Arm(name, [kept]).best(lesson, quick, seeds)
        if name == "top10":
            scaled = _Arm("top10_renormalized", [kept], renormalize=True)
            found |= scaled.best(lesson, quick, seeds)
    return found


def epochs(quick: bool, models: Path, seeds: int, blocks: int = 250) -> dict[str, float]:
    """Figures of text that comes again, with the same draws and with others."""
    lesson, most = _Lesson(quick, models, blocks), 2 if quick else 4
    found = lesson.before()
    sets: dict[int, list[list[Kept]]] = {}
    for draws in (8,) if quick else (8, 32):
        settings = ExternalizeSettings(scheme="sampled", draws=draws)
        sets[draws] = [lesson.stored(settings, seed)[0] for seed in range(most)]
    for times in (1, 2, 4)[: most // 2 + 1]:
        arms = [_Arm(f"clm_{times}", (), times), _Arm(f"whole_{times}", (), times)]
        for draws, kept in sets.items():
            arms.append(_Arm(f"draws{draws}_fixed_{times}", kept[:1], times))
            if times > 1:
                arms.append(_Arm(f"draws{draws}_anew_{times}", kept, times))
        for arm in arms:
            found |= arm.best(lesson, quick, seeds)
    return found


def main() -> None:
    """Measure, and print."""
    parser = command_line(__doc__)
    add_tokenizers(parser)
    parser.add_argument("what", choices=("sizes", "frontier", "epochs"), nargs="?", default="sizes")
    parser.add_argument("--models", type=Path, help="folder to keep trained models in")
    parser.add_argument("--seeds", type=int, default=2, help="of trainings")
    parser.add_argument("--blocks", type=int, help="of 1,024 bytes, to train on")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as place:
        models = arguments.models or Path(place)
        if arguments.what == "sizes":
            figures = sizes(arguments.quick, models, arguments.tokenizers)
        else:
            taught = frontier if arguments.what == "frontier" else epochs
            seeds = 1 if arguments.quick else arguments.seeds
            asked = {"blocks": arguments.blocks} if arguments.blocks else {}
            figures = taught(arguments.quick, models, seeds, **asked)
    show(figures, arguments.json, ",.4f")


if __name__ == "__main__":
    main()
