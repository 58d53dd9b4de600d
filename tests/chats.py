"""Conversations, chat templates of three families, and small models that have them."""

import json
import random
from pathlib import Path
from typing import Any

import fusellm
from fusellm.tokens.conversation import Conversation

TEMPLATES = Path(__file__).parents[1] / "recipes" / "templates"
LLAMA, CHATML, GEMMA = (
    (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    for name in ("llama-3", "chatml", "gemma")
)
FAMILIES = {
    "llama": ("zoo/prose", LLAMA, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "chatml": ("zoo/python", CHATML, ("<|im_start|>", "<|im_end|>")),
    "gemma": ("zoo/cpp", GEMMA, ("<start_of_turn>", "<end_of_turn>")),
}
ENDS = {"llama": "<|eot_id|>", "chatml": "<|im_end|>", "gemma": "<end_of_turn>"}
_WORDS = [
    "the",
    "list",
    "of",
    "values",
    "is",
    "returned",
    "by",
    "a",
    "function",
    "when",
    "an",
    "index",
    "falls",
    "outside",
    "of",
    "it",
]


def make_models(folder: Path) -> None:
    """A model of the zoo with the tokens and the template of each family, in folders."""
    for name, (zoo, template, special) in FAMILIES.items():
        model, encoder = fusellm.load_pretrained(zoo, device="cpu")
        tokenizer = encoder.tokenizer
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        tokenizer.chat_template = template
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def asked(*said: str, **more: Any) -> Conversation:
    """Questions and answers in turn, of which all answers are learnt."""
    roles = ("user", "assistant")
    messages = tuple({"role": roles[n % 2], "content": text} for n, text in enumerate(said))
    return Conversation(messages, tuple(range(1, len(said), 2)), **more)


def records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Records of conversations of one to four turns."""
    chance = random.Random(seed)

    def say(words: int) -> str:
        return " ".join(chance.choice(_WORDS) for _ in range(words)).capitalize() + "."

    return [
        {
            "messages": [
                {"role": role, "content": say(chance.randint(4, 20))}
                for _ in range(chance.randint(1, 4))
                for role in ("user", "assistant")
            ]
        }
        for _ in range(count)
    ]


def write_records(path: Path, rows: list[dict[str, Any]]) -> Path:
    """As lines of JSON."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
