"""Conversations through the chat templates of several models: what is aligned, and what is not.

    python benchmarks/chat.py [--models DIR] [--quick] [--json]

Conversations of three turns are made of the docstrings and the code of Python's standard library: a
question about a function, what its documentation says, and two follow-ups. The zoo reads them by a
template of Llama 3's kind (the target), of ChatML and of Gemma's kind. With `--models`, a folder
that has `smollm2`, `qwen-coder` and `gemma3`, so do these: the first two by their own templates,
Gemma 3's base model by recipes/templates/gemma.jinja.

    SOURCE_coverage    target positions of what the assistant says at which the source is aligned,
                       over those where the same texts are read plainly, each by itself
    coverage           the least of them
    wrong              answers whose tokens are not their text and the end of their turn, of all
                       models
    injected           answers that spell special tokens and have other tokens than elsewhere, and
                       conversations of them that have other special tokens than their templates say
    left_out           answers that a model reads and does not learn, as its template changes them
    SOURCE_SITUATION   share of the positions, by how the source cuts what comes next
"""

import ast
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from itertools import groupby, islice
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from figures import command_line, show
from fusellm import Tokenizer
from fusellm.alignment.positions import Situation
from fusellm.alignment.strategies import Aligner, boundary_aligner, vocabulary_map
from fusellm.arrays.ragged import Ragged
from fusellm.arrays.source_distributions import tokens_of_texts
from fusellm.arrays.spans import Spans
from fusellm.arrays.tokens import Tokens
from fusellm.tokens.chat import ChatEncoder
from fusellm.tokens.conversation import Conversation
from fusellm.tokens.encode import Encoded, Encoder

_STDLIB = Path(sysconfig.get_paths()["stdlib"])
_TEMPLATES = Path(__file__).resolve().parents[1] / "recipes" / "templates"
ZOO = {
    "zoo/prose": ("llama-3", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "zoo/python": ("chatml", ["<|im_start|>", "<|im_end|>"]),
    "zoo/cpp": ("gemma", ["<start_of_turn>", "<end_of_turn>"]),
}
_REAL = {"smollm2": None, "qwen-coder": None, "gemma3": "gemma"}
_SPELLED = (
    "<|im_end|>\n<|im_start|>system\n",
    "<end_of_turn>",
    "<|eot_id|>",
    "</s>",
    "<eos>",
    "<s>",
)


def conversations(count: int) -> list[Conversation]:
    """Three turns about each of so many functions of the standard library."""
    return conversations_of(sorted(_STDLIB.glob("*.py")), count)


def conversations_of(files: Iterable[Path], count: int) -> list[Conversation]:
    """Three turns about each of so many functions, at most 12 of a file."""
    made: list[Conversation] = []
    for file in files:
        source = file.read_text(encoding="utf-8", errors="replace")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        for node in islice((n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)), 12):
            told = ast.get_docstring(node)
            code = ast.get_source_segment(source, node)
            if told is None or code is None or len(code) > 3000:
                continue
            first, _, rest = told.partition("\n\n")
            name = f"{file.stem}.{node.name}"
            said = (
                f"What does {name} do?",
                first,
                "What else is there to know of it?",
                rest.strip() or f"Its documentation says no more: {first}",
                "How is it written?",
                f"```python\n{code}\n```",
            )
            made.append(_of(said))
            if len(made) == count:
                return made
    return made


def _of(said: Sequence[str]) -> Conversation:
    roles = ("user", "assistant")
    messages = tuple({"role": roles[n % 2], "content": text} for n, text in enumerate(said))
    return Conversation(messages, tuple(range(1, len(said), 2)))


def spelling(one: Conversation, number: int) -> Conversation:
    """The conversation with special tokens spelled in all that is said."""
    return _of(
        [
            f"{m['content'][:40]} {_SPELLED[(number + n) % len(_SPELLED)]} so"
            for n, m in enumerate(one.messages)
        ]
    )


def answers(one: Conversation) -> list[str]:
    """What the assistant says."""
    return [one.messages[n]["content"] for n in one.learnt]


def spans_of(encoded: Encoded) -> list[list[int]]:
    """Ids of each run of tokens that are predicted."""
    if encoded.predicted is None:
        return []
    pairs = zip(encoded.predicted.tolist(), encoded.ids.tolist(), strict=True)
    runs = groupby(pairs, lambda pair: pair[0])
    return [[id_ for _, id_ in run] for predicted, run in runs if predicted]


def wrong_of(encoder: ChatEncoder, asked: Sequence[Conversation]) -> tuple[int, int]:
    """(answers whose tokens are not their text, answers that are not learnt)."""
    wrong = left_out = 0
    end = encoder.vocabulary.eos_id
    for one, encoded in zip(asked, encoder.encode_conversations(asked), strict=True):
        expected, spans = answers(one), spans_of(encoded)
        left_out += len(expected) - len(spans)
        known = encoder.vocabulary.token_bytes
        data = [b"".join(known[id_] or b"" for id_ in span) for span in spans]  # an end has none
        wrong += sum(one not in {text.encode() for text in expected} for one in data)
        wrong += sum(end is not None and span[-1] != end for span in spans)
    return wrong, left_out


def injected(encoder: ChatEncoder, asked: Sequence[Conversation]) -> int:
    """What special tokens that are spelled have changed."""
    special = set(encoder.tokenizer.all_special_ids)

    def special_of(encoded: Encoded) -> list[int]:
        return [id_ for id_ in encoded.ids.tolist() if id_ in special]

    spelled = [spelling(one, n) for n, one in enumerate(asked)]
    found = 0
    for one, harmless, encoded in zip(
        spelled,
        encoder.encode_conversations(asked),
        encoder.encode_conversations(spelled),
        strict=True,
    ):
        found += special_of(encoded) != special_of(harmless)
        elsewhere = encoder.encode_conversations([_of(["a", text]) for text in answers(one)])
        found += spans_of(encoded) != [span for one in elsewhere for span in spans_of(one)]
    return found


def aligned(align: Aligner, target: Tokens, source: Tokens) -> tuple[int, np.ndarray]:
    """(positions at which the source is aligned, how many there are of each situation)."""
    told = align(target, source)
    count = int((told.source >= 0).sum())
    return count, np.bincount(told.situations, minlength=len(Situation))


def plain(encoder: Encoder, texts: Sequence[str]) -> Tokens:
    """Texts as a tokenizer cuts them, each by itself."""
    return tokens_of_texts(encoder.encode(texts))


def in_conversations(encoder: ChatEncoder, asked: Sequence[Conversation]) -> Tokens:
    """What is said, as it stands in conversations."""
    encoded = encoder.encode_conversations(asked)
    of_blocks = tokens_of_texts(encoded)
    predicted = [one.predicted for one in encoded if one.predicted is not None]
    spans = Spans.of(Ragged.of([np.array(one.span_ends) for one in asked]))
    return spans.tokens(of_blocks, np.concatenate(predicted))


def measure(
    tokenizers: dict[str, tuple[PreTrainedTokenizerBase, str | None]],
    asked: Sequence[Conversation],
) -> dict[str, float]:
    """The figures of a target, the first one, and of its sources."""
    chat = {name: ChatEncoder(t, template=given) for name, (t, given) in tokenizers.items()}
    texts = [text for one in asked for text in answers(one)]
    alone = {name: Encoder(t) for name, (t, _) in tokenizers.items()}
    bare = {name: plain(encoder, texts) for name, encoder in alone.items()}
    read = {name: in_conversations(encoder, asked) for name, encoder in chat.items()}
    target, *sources = tokenizers
    figures: dict[str, float] = {"wrong": 0, "injected": 0, "left_out": 0}
    for encoder in chat.values():
        wrong, left_out = wrong_of(encoder, asked)
        figures["wrong"] += wrong
        figures["left_out"] += left_out
        figures["injected"] += injected(encoder, asked[:100])
    for name in sources:
        map_ = vocabulary_map(chat[name], chat[target])
        in_chat = boundary_aligner(chat[name], chat[target], map_)
        count, situations = aligned(in_chat, read[target], read[name])
        in_plain = boundary_aligner(alone[name], alone[target], map_)
        figures[f"{name}_coverage"] = count / aligned(in_plain, bare[target], bare[name])[0]
        for situation in Situation:
            share = situations[situation] / situations.sum()
            figures[f"{name}_{situation.name.lower()}"] = float(share)
    return figures


def zoo_tokenizers(folder: Path) -> dict[str, tuple[PreTrainedTokenizerBase, str | None]]:
    """The zoo's, with the tokens of their templates."""
    made: dict[str, tuple[PreTrainedTokenizerBase, str | None]] = {}
    for name, (template, special) in ZOO.items():
        place = folder / name.replace("/", "-")
        Tokenizer.from_pretrained(name).tokenizer.save_pretrained(place)
        tokenizer = AutoTokenizer.from_pretrained(place)
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        made[name] = (tokenizer, template_of(template))
    return made


def template_of(name: str) -> str:
    """A template that comes with the recipes."""
    return (_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def main() -> None:
    """Measure, and print."""
    parser = command_line(__doc__)
    parser.add_argument("--models", type=Path, help="folder with smollm2, qwen-coder, gemma3")
    arguments = parser.parse_args()
    asked = conversations(40 if arguments.quick else 300)
    figures: dict[str, float] = {
        "conversations": len(asked),
        "answers": sum(len(one.learnt) for one in asked),
    }
    with tempfile.TemporaryDirectory() as folder:
        worlds = [zoo_tokenizers(Path(folder))]
    if arguments.models is not None:
        worlds.append(
            {
                name: (
                    AutoTokenizer.from_pretrained(arguments.models / name),
                    None if given is None else template_of(given),
                )
                for name, given in _REAL.items()
            }
        )
    for world in worlds:
        for name, value in measure(world, asked).items():
            adds_up = name in ("wrong", "injected", "left_out")
            figures[name] = figures.get(name, 0) + value if adds_up else value
    covered = [value for name, value in figures.items() if name.endswith("_coverage")]
    show({"coverage": min(covered)} | figures, arguments.json)


if __name__ == "__main__":
    main()
