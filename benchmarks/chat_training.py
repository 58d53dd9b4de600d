"""Conversations, trained on: fused against plain training, the same search for both.

    python benchmarks/chat_training.py --out DIR [--seeds 2] [--quick] [--json]

The three models of the zoo, each with the special tokens and the template of a family (the target
Llama 3's kind), on conversations about Python files and C++ headers of the built-in corpus that the
zoo has not read: somebody asks for the middle of a file, and twice for more. It is a study:
finished trainings in DIR are kept, and `DIR/study/study.md` is its page. Bits per byte are of what
the assistant says.

    ARM                bits per byte of held-out answers, mean over the seeds: `clm`, `fused`, from
                       one source alone, and these two merged (FuseChat's way)
    A_less_B           a difference; A_less_B_low and _high its 95 % interval over conversations
    MODEL_before       bits per byte of the target and of the sources as they are
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from chat import ZOO, template_of
from figures import command_line, show
from fusellm import load_pretrained
from fusellm.cli.console import STDERR, Terminal
from fusellm.config import CorpusSettings
from fusellm.corpus.documents import BuiltinReader
from fusellm.corpus.parts import Text
from fusellm.evaluation.compare.statistics import MEAN
from fusellm.study.run import run_study

_FEW_STEPS = {"max_steps": 3, "validations": 1}
_PIECE_BYTES, _PIECES = 320, 3
_DOMAINS = ("python", "cpp")
_SPLITS = {"train": "train", "validation": "validation", "held_out": "test"}


def write_conversations(folder: Path, most: int | None) -> None:
    """Conversations about documents of the built-in corpus: a folder a domain, a file a part.

    No near-duplicate of a document is in another part.
    """
    documents = [{"builtin": domain} for domain in _DOMAINS]
    reader = BuiltinReader(
        CorpusSettings.model_validate({"documents": documents}), Terminal(STDERR)
    )
    for domain in _DOMAINS:
        write_domain(folder / domain, reader.texts(domain, Counter()), most)


def write_domain(folder: Path, texts: Iterable[Text], most: int | None) -> None:
    """The conversations of a domain."""
    parts: dict[str, list[str]] = {part: [] for part in _SPLITS}
    for document in texts:
        pieces = pieces_of(document.text)
        start = len(pieces) // 3  # a file's beginning is licences and imports, learnt by heart
        pieces = pieces[start : start + _PIECES]
        asked = [f"Show me {document.name}, from a third of it.", *["Go on."] * (_PIECES - 1)]
        messages = [
            {"role": role, "content": content}
            for question, piece in zip(asked, pieces, strict=False)
            for role, content in (("user", question), ("assistant", piece))
        ]
        if messages:
            parts[document.part].append(json.dumps({"messages": messages}) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for part, lines in parts.items():
        text = "".join(lines[:most])
        (folder / f"{_SPLITS[part]}.jsonl").write_text(text, encoding="utf-8")


def pieces_of(text: str) -> list[str]:
    """Some lines at a time, without the line end behind them, which templates may strip."""
    pieces, own = [], ""
    for line in text.splitlines(keepends=True):
        own += line
        if len(own) >= _PIECE_BYTES:
            pieces.append(own.strip())
            own = ""
    return [piece for piece in (*pieces, own.strip()) if piece]


def make_models(folder: Path) -> dict[str, str]:
    """The zoo's models with the tokens and templates of three families; their folders."""
    places = {}
    for name, (template, special) in ZOO.items():
        place = folder / name.replace("/", "-")
        places[name] = str(place)
        if (place / "config.json").exists():
            continue
        model, encoder = load_pretrained(name, device="cpu")
        tokenizer = encoder.tokenizer
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        tokenizer.chat_template = template_of(template)
        model.resize_token_embeddings(len(tokenizer))
        tokenizer.save_pretrained(place)
        model.save_pretrained(place)
    return places


def write_study(folder: Path, seeds: int, quick: bool) -> Path:
    """Models, conversations, a recipe and a study in a folder; the study's file."""
    folder.mkdir(parents=True, exist_ok=True)
    models = make_models(folder / "models")
    if not (folder / _DOMAINS[-1] / "test.jsonl").exists():
        write_conversations(folder, 30 if quick else None)
    documents = []
    for domain in _DOMAINS:
        splits = {f"{part}_split": _SPLITS[part] for part in ("validation", "held_out")}
        place = str((folder / domain).absolute())
        entry = {"hub": place, "messages": "messages", "domain": domain, **splits}
        documents.append(entry)
    recipe = {
        "name": "chat-zoo",
        "target": models["zoo/prose"],
        "sources": [
            {"name": "python", "model": models["zoo/python"]},
            {"name": "cpp", "model": models["zoo/cpp"]},
        ],
        "corpus": {
            "documents": documents,
            "block_bytes": 1152,  # which even a token a byte fits
            "train_bytes": 800_000,
            "validation_bytes": 20_000,
            "held_out_bytes": 120_000,
            "shard_blocks": 64,
        },
        "objective": {"lambda": 0.3},
        "training": {
            "num_train_epochs": 1,
            "lr_scheduler_type": "linear",
            "warmup_steps": 10,
            "weight_decay": 0.1,
            "rows": "packed",
            "row_tokens": 1152,
            "per_device_train_batch_size": 2,
            "validations": 2,
        }
        | (_FEW_STEPS if quick else {}),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    study: dict[str, Any] = {
        "name": "chat",
        "recipe": "recipe.yaml",
        "seeds": [*range(seeds)],
        "rates": [2.0e-3] if quick else [1.0e-4, 5.0e-4, 2.0e-3, 5.0e-3],
        "arms": {
            "clm": {"train": "clm"},
            "fused": {},
            "only-python": {"sources": ["python"], "rates": [2.0e-3]},
            "only-cpp": {"sources": ["cpp"], "rates": [2.0e-3]},
            "merged": {"merge": {"of": ["only-python", "only-cpp"], "method": "linear"}},
            "merged-sce": {"merge": {"of": ["only-python", "only-cpp"], "method": "sce"}},
        },
        "compare": [["fused", "merged"], ["fused", "merged-sce"]],
    }
    if quick:
        study["arms"], study["compare"] = {"clm": {"train": "clm"}, "fused": {}}, []
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return file


def main() -> None:
    """Train, and print."""
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path, help="the study's folder; a temporary one with --quick")
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.out is None and not arguments.quick:
        parser.error("--out: name a folder, which is gone on with")
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary)
        seeds = 1 if arguments.quick else arguments.seeds
        file = write_study(out, seeds, arguments.quick)
        results = run_study(file, out / "study", progress=Terminal(STDERR))
    figures = {arm: one.by_task[MEAN].value for arm, one in results.arms.items()}
    for name in ("target", "python", "cpp"):
        figures[f"{name}_before"] = results.untrained[name][MEAN].value
    for pair in results.differences:
        told = pair.by_task[MEAN]
        name = f"{pair.arm}_less_{pair.other}"
        figures[name] = told.value
        if told.low is not None and told.high is not None:
            figures |= {f"{name}_low": told.low, f"{name}_high": told.high}
    show(figures, arguments.json, ".4f")


if __name__ == "__main__":
    main()
