"""Conversations, trained on: fused against plain training, the same search for both.

    python benchmarks/chat_training.py --out DIR [--seeds 2] [--quick] [--json]

The three models of the zoo, each with the special tokens and the template of a family (the target
Llama 3's kind), on conversations about functions of installed packages, without those that the zoo
has been trained on (`benchmarks/chat.py` says how they are made). It is a study: finished trainings
in DIR are kept, and `DIR/study/study.md` is its page. Bits per byte are of what the assistant says.

    clm, fused         bits per byte of held-out answers, mean over the seeds
    fused_less_clm     the difference; fused_low, fused_high its 95 % interval over conversations
    MODEL_before       bits per byte of the target and of the sources as they are
"""

import hashlib
import json
import sysconfig
import tempfile
from pathlib import Path

import yaml

from chat import ZOO, conversations_of, template_of
from figures import command_line, show
from fusellm import load_pretrained
from fusellm.cli.console import STDERR, Terminal
from fusellm.evaluation.compare.statistics import MEAN
from fusellm.study.run import run_study

_READ_BY_THE_ZOO = ("numpy", "torch", "transformers")
_FEW_STEPS = {"max_steps": 3, "validations": 1}


def installed_files() -> list[Path]:
    """Modules of packages that the zoo has not been trained on, in the order of a hash."""
    place = Path(sysconfig.get_paths()["purelib"])
    files = [
        file
        for file in place.glob("**/*.py")
        if file.relative_to(place).parts[0] not in _READ_BY_THE_ZOO
        and not {"tests", "test", "testing"} & set(file.parts)
    ]
    names = {file: str(file.relative_to(place)).encode() for file in files}
    return sorted(files, key=lambda file: hashlib.sha256(names[file]).digest())


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
    asked = conversations_of(installed_files(), 60 if quick else 1000)
    lines = [json.dumps({"messages": list(one.messages)}) + "\n" for one in asked]
    (folder / "chat.jsonl").write_text("".join(lines), encoding="utf-8")
    recipe = {
        "name": "chat-zoo",
        "target": models["zoo/prose"],
        "sources": [
            {"name": "python", "model": models["zoo/python"]},
            {"name": "cpp", "model": models["zoo/cpp"]},
        ],
        "corpus": {
            "documents": [{"files": "chat.jsonl", "messages": "messages", "domain": "chat"}],
            "block_bytes": 1536,
            "validation_share": 0.05,
            "held_out_share": 0.1,
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
    study = {
        "name": "chat",
        "recipe": "recipe.yaml",
        "seeds": [*range(seeds)],
        "rates": [2.0e-3] if quick else [3.0e-4, 1.0e-3, 3.0e-3],
        "arms": {"clm": {"train": "clm"}, "fused": {}},
    }
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
        figures[f"{pair.arm}_less_{pair.other}"] = told.value
        if told.low is not None and told.high is not None:
            figures |= {f"{pair.arm}_low": told.low, f"{pair.arm}_high": told.high}
    show(figures, arguments.json, ".4f")


if __name__ == "__main__":
    main()
