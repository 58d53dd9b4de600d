"""GGUF files and tokenizers beside a model: read as their folders, or refused with the cure."""

import itertools
import json
import math
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import ggufs
from conftest import code, prose
from fusellm.cli.main import main
from fusellm.config import ModelSettings
from fusellm.errors import FusellmError, IdentityError, ModelError
from fusellm.models import gguf
from fusellm.models.gguf import GgufHeader, Value, model_header
from fusellm.models.gguf_rules import RULES
from fusellm.models.gguf_tokenizer import tokenizer_of
from fusellm.models.load import (
    describe,
    load_model,
    load_tokenizer,
    locate,
    require_packages,
    weights_digest,
)
from fusellm.models.readers import reader_of
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.recipe_file import check_recipe, load_recipe, resolve_paths
from fusellm.store.manifest import StageFolder
from fusellm.tokens.encode import Encoder
from hubs import FIRST, SECOND, put_in_cache
from worlds import SHARED, TRICKY, layout_of

CPU = torch.device("cpu")
VOCABULARIES: dict[str, Callable[[], ggufs.Vocabulary]] = {
    "llama": lambda: ggufs.byte_level("smollm"),
    "qwen2": lambda: ggufs.byte_level("qwen2"),
    "gemma3": lambda: ggufs.sentencepiece(prefix=False),
    "sentencepiece": lambda: ggufs.sentencepiece(prefix=True),
}
TEXTS = [
    "in 2024, 3.14\n\n\n   and  \t x",
    "naïve e\u0301 中文 привет ½²\r\n",
    "<|endoftext|> <call> </s> [PAD401]  IT'S don't",
    "    def f(x):\n        return x ** 2\n",
    *(prose(n) for n in range(900, 904)),
    *(code(n) for n in range(900, 904)),
    *TRICKY,
]


class Said(Silent):
    """Keeps what a user is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def pipeline(world: Path, run: Path, *changes: str, said: Silent | None = None) -> Pipeline:
    recipe = load_recipe(world / "recipe.yaml", changes)
    return Pipeline(resolve_paths(recipe, world), run, said or Silent())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Makes (GGUF file, folder of the same model), each once."""
    root, known = tmp_path_factory.mktemp("gguf"), {}

    def make(architecture: str, kind: str = "F32", tied: bool = True) -> tuple[Path, Path]:
        name = f"{architecture}-{kind}{'' if tied else '-untied'}"
        if name not in known:
            vocabulary = VOCABULARIES[architecture]()
            model = ggufs.tiny(architecture, vocabulary.rows, tied)
            path = ggufs.write(root / f"{name}.gguf", model, vocabulary.fields, kind)
            known[name] = path, ggufs.folder_of(root / name, model, vocabulary, kind)
        return known[name]

    return make


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small Llama with some metadata changed; None leaves a key out."""
    vocabulary = VOCABULARIES["llama"]()

    def write(name: str = "small.gguf", **settings: Any) -> Path:
        fields = vocabulary.fields | settings.pop("fields", {})
        tensors, shapes = settings.pop("tensors", {}), settings.pop("shapes", {})
        model = ggufs.tiny("llama", settings.pop("rows", vocabulary.rows), **shapes)
        return ggufs.write(tmp_path / name, model, fields, tensors=tensors, **settings)

    return write


def fault_of(path: Path | str, **settings: Any) -> str:
    """The one line that a model is refused with, before its weights are loaded."""
    with pytest.raises(FusellmError) as caught:
        reader_of(ModelSettings(model=str(path), **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The same model


@pytest.mark.parametrize(
    ("architecture", "kind", "tied"),
    [
        ("llama", "F32", True),
        ("llama", "Q8_0", False),
        ("qwen2", "F16", True),
        ("qwen2", "Q8_0", False),
        ("gemma3", "Q8_0", True),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_has_the_weights_and_the_settings_of_its_folder(
    made: Any, architecture: str, kind: str, tied: bool, dtype: str
) -> None:
    path, folder = made(architecture, kind, tied)
    one, other = (locate(ModelSettings(model=str(p), dtype=dtype)) for p in (path, folder))
    mine, theirs = load_model(one, CPU), load_model(other, CPU)
    weights, wanted = mine.state_dict(), theirs.state_dict()
    assert weights.keys() == wanted.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, wanted[name]), name
    assert one.context_tokens == other.context_tokens == 512
    settings, theirs_too = mine.config.to_dict(), theirs.config.to_dict()
    not_in_a_file = {"_name_or_path", "initializer_range"}
    for key in theirs_too.keys() - not_in_a_file:
        if key.endswith("token_id"):
            continue
        found, expected = settings[key], theirs_too[key]
        assert found == (pytest.approx(expected) if isinstance(expected, float) else expected), key


@pytest.mark.parametrize(
    ("architecture", "kind", "dtype"),
    [
        ("llama", "Q8_0", "float32"),
        ("qwen2", "F16", "bfloat16"),
        ("gemma3", "F32", "float32"),
    ],
)
def test_a_file_gives_the_shards_of_its_folder(
    world: Path, made: Any, tmp_path: Path, architecture: str, kind: str, dtype: str
) -> None:
    shards = []
    for n, model in enumerate(made(architecture, kind)):
        run = tmp_path / f"run{n}"
        changes = (f"sources.0.model={model}", f"sources.0.dtype={dtype}")
        pipeline(world, run, *changes).execute(["corpus", "externalize/first"])
        files = sorted((run / "externalize" / "first").glob("*.arrow"))
        shards.append({path.name: path.read_bytes() for path in files})
    assert len(shards[0]) > 1
    assert shards[0] == shards[1]


@pytest.mark.parametrize("architecture", VOCABULARIES)
def test_a_file_cuts_text_as_its_folder_does(architecture: str, made: Any, tmp_path: Path) -> None:
    vocabulary = VOCABULARIES[architecture]()
    model = ggufs.tiny("llama", vocabulary.rows)
    path = ggufs.write(tmp_path / "model.gguf", model, vocabulary.fields)
    mine = reader_of(ModelSettings(model=str(path))).encoder
    theirs = Encoder(vocabulary.tokenizer)
    for one, other in zip(
        mine.encode(TEXTS, [True] * len(TEXTS)),
        theirs.encode(TEXTS, [True] * len(TEXTS)),
        strict=True,
    ):
        assert one.ids.tolist() == other.ids.tolist()
        assert (one.ends is None) == (other.ends is None)
        assert one.ends is None or one.ends.tolist() == other.ends.tolist()
    assert len(mine.vocabulary) == len(theirs.vocabulary)


def test_a_file_is_known_by_its_bytes(made: Any, tmp_path: Path) -> None:
    path, folder = made("llama", "Q8_0")
    located = locate(ModelSettings(model=str(path)))
    copy = tmp_path / "other-name.gguf"
    copy.write_bytes(path.read_bytes())
    in_folder = locate(ModelSettings(model=str(tmp_path), gguf_file=copy.name))
    assert in_folder.fingerprint == located.fingerprint
    assert located.fingerprint != locate(ModelSettings(model=str(folder))).fingerprint
    assert describe(in_folder)["gguf_file"] == copy.name
    assert "gguf_file" not in describe(located)
    assert describe(located)["architecture"] == "LlamaForCausalLM"
    digest = weights_digest(located)
    assert len(digest) == 64
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    changed = locate(ModelSettings(model=str(copy)))
    assert changed.fingerprint != located.fingerprint
    assert weights_digest(changed) != digest


@pytest.mark.usefixtures("hub")
def test_a_file_of_a_hub_repository(made: Any, hub: Path, tmp_path: Path) -> None:
    path, folder = made("llama", "Q8_0")
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "tiny.gguf").write_bytes(path.read_bytes())
    put_in_cache(hub, repository, FIRST)
    settings = ModelSettings(model="someone/tiny", gguf_file="tiny.gguf")
    located = locate(settings)
    assert located.commit == FIRST
    assert located.fingerprint == locate(ModelSettings(model=str(path))).fingerprint
    wanted = load_model(locate(ModelSettings(model=str(folder))), CPU).state_dict()
    found = load_model(located, CPU).state_dict()
    assert all(torch.equal(weight, wanted[name]) for name, weight in found.items())
    (repository / "tiny.gguf").write_bytes(made("llama", "F32")[0].read_bytes())
    put_in_cache(hub, repository, SECOND)  # `main` moves on
    assert locate(settings).commit == SECOND
    pinned = settings.model_copy(update={"revision": FIRST})
    assert locate(pinned).fingerprint == located.fingerprint
    assert "other.gguf of someone/tiny could not be found" in fault_of(
        "someone/tiny", gguf_file="other.gguf"
    )
    assert "as gguf_file: NAME.gguf" in fault_of("someone/tiny-GGUF")


def test_a_file_is_spread_as_a_folder_is(made: Any) -> None:
    path, folder = made("llama", "Q8_0")
    one, other = (
        load_model(locate(ModelSettings(model=str(p), device_map={"": "cpu"})), CPU)
        for p in (path, folder)
    )
    wanted = other.state_dict()
    assert all(torch.equal(weight, wanted[name]) for name, weight in one.state_dict().items())
    with pytest.raises(ModelError, match=r"Disk offload is not supported .* GGUF"):
        load_model(locate(ModelSettings(model=str(path), device_map={"": "disk"})), CPU)


def test_a_whole_run_from_a_file_ends_in_an_ordinary_model(
    world: Path, made: Any, tmp_path: Path
) -> None:
    path, folder = made("qwen2", "Q8_0", False)
    run = tmp_path / "run"
    target = (f"target.model={path.parent}", f"target.gguf_file={path.name}")
    changes = (*target, f"sources.1.model={path}", "sources.1.dtype=bfloat16")
    whole = pipeline(world, run, *changes)
    whole.execute(["corpus", "externalize", "fuse", "train", "evaluate"])
    fused = run / "train" / "fused"
    config = json.loads((fused / "config.json").read_text())
    assert "quantization_config" not in config
    assert str(tmp_path) not in (fused / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(fused)
    assert model.config.architectures == ["Qwen2ForCausalLM"]
    start = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert any(not torch.equal(w, start[name]) for name, w in model.state_dict().items())
    tokenizer, wanted = AutoTokenizer.from_pretrained(fused), VOCABULARIES["qwen2"]().tokenizer
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == wanted(text)["input_ids"], text
    results = json.loads((run / "evaluate" / "results.json").read_text())
    assert {row["model"] for row in results["records"]} >= {"second", "target", "fused"}
    again = pipeline(world, run, *changes)
    again.execute(["externalize", "fuse", "train", "evaluate"])  # all is there, and is the same


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_saved_tokenizer_is_read_back_as_it_was(
    made: Any, tmp_path: Path, architecture: str
) -> None:
    """transformers has classes of its own for these, with other rules."""
    located = locate(ModelSettings(model=str(made(architecture)[0])))
    load_model(located, CPU).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(located)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"], text


def test_adapters_of_a_file_are_found_with_it(world: Path, made: Any, tmp_path: Path) -> None:
    path, _ = made("llama", "Q8_0", False)
    run = tmp_path / "run"
    lora = "training.lora={r: 2, merge: false}"
    whole = pipeline(world, run, f"target.model={path}", lora, "training.clm_baseline=false")
    whole.execute(["corpus", "externalize", "fuse", "train", "evaluate"])
    adapters = json.loads((run / "train" / "fused" / "adapter_config.json").read_text())
    assert adapters["base_model_name_or_path"] == str(path)
    assert load_model(locate(ModelSettings(model=str(run / "train" / "fused"))), CPU)


def test_models_are_evaluated_from_a_file(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = made("llama", "Q8_0")
    command = ["fusellm", "evaluate", str(path), str(folder), "--suite", "smoke", "--limit", "4"]
    command += ["--out", str(tmp_path), "--json"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        main()
    found = capsys.readouterr()
    assert not stop.value.code, found.err
    (suite,) = json.loads(found.out)["suites"]
    assert suite["models"] == [str(path), str(folder)]
    for task in suite["tasks"]:
        one, other = (task["scores"][model] for model in suite["models"])
        assert one == other


def test_a_tokenizer_is_compared_from_a_file(
    made: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = made("llama")
    command = ["fusellm", "tokenizers", str(path), str(folder), "--json", "--text", __file__]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        main()
    found = json.loads(capsys.readouterr().out)
    assert not stop.value.code
    (domain,) = found["domains"]
    assert domain["situations"]["same"] == domain["positions"]


# How positions are rotated


def rope_of(path: Path) -> dict[str, Any]:
    return dict(locate(ModelSettings(model=str(path))).config.rope_parameters)


def factors(base: float, count: int, most: float) -> np.ndarray:
    """What llama.cpp's converter writes for Llama 3.1: by how much each frequency is divided."""
    found = []
    for n in range(count):
        wavelength = 2 * math.pi * base ** (n / count)
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192:
            found.append(most)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            found.append(1 / ((1 - smooth) / most + smooth))
    return np.array(found)


def test_frequencies_of_llama_3_1_are_those_of_the_file(small: Any) -> None:
    base, wanted = 500_000.0, factors(500_000.0, 8, 32.0)
    assert len(set(wanted)) == 3  # kept, between, and divided
    shapes = {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_theta": base}
    path = small(tensors={"rope_freqs.weight": wanted}, shapes=shapes)
    rope = rope_of(path)
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("llama3", 32.0, base)
    model: Any = load_model(locate(ModelSettings(model=str(path))), CPU)
    found = model.model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(found, base ** -(np.arange(8) / 8) / wanted, rtol=1e-5)


def test_each_kind_of_layer_has_the_base_that_the_file_says(tmp_path: Path) -> None:
    """transformers reads one of the two, and for some architectures none."""
    vocabulary = VOCABULARIES["gemma3"]()
    bases = {"gemma3.rope.freq_base": 12_345.0, "gemma3.rope.freq_base_swa": 678.0}
    path = ggufs.write(
        tmp_path / "bases.gguf", ggufs.tiny("gemma3", vocabulary.rows), vocabulary.fields | bases
    )
    rope = rope_of(path)
    assert rope["full_attention"]["rope_theta"] == 12_345.0
    assert rope["sliding_attention"]["rope_theta"] == 678.0


def test_a_linear_scaling_is_taken_over(small: Any) -> None:
    scaled = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    rope = rope_of(small(fields=scaled))
    assert (rope["rope_type"], rope["factor"]) == ("linear", 4.0)
    assert rope_of(small("plain.gguf"))["rope_type"] == "default"


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, "scales positions by yarn"),
        ({"tensors": {"rope_factors_long.weight": np.ones(4)}}, "scales positions by longrope"),
        ({"tensors": {"rope_freqs.weight": np.array([1, 2, 3, 4])}}, "that are not Llama 3.1's"),
        ({"fields": {"llama.rope.dimension_count": 4}}, "rope.dimension_count"),
    ],
)
def test_an_unknown_rotation_is_refused(small: Any, changes: dict[str, Any], part: str) -> None:
    if part == "rope.dimension_count":
        vocabulary = VOCABULARIES["qwen2"]()
        model = ggufs.tiny("qwen2", vocabulary.rows)
        fields = vocabulary.fields | {"qwen2.rope.dimension_count": 4}
        path = ggufs.write(small().with_name("part.gguf"), model, fields)
        part = "rotates 4 of a head's 8 dimensions, and transformers 8"
    else:
        path = small(**changes)
    fault = fault_of(path)
    assert part in fault
    assert fault.endswith("give the model as a folder of safetensors")


def test_the_largest_gemma_has_a_scale_of_its_own(tmp_path: Path) -> None:
    """The real one has 5,376 columns and 32 heads of 128, and divides scores by √168."""
    vocabulary = VOCABULARIES["gemma3"]()
    scales = {}
    for layers in (2, 62):
        sizes = {"num_hidden_layers": layers, "hidden_size": 96, "intermediate_size": 32}
        model = ggufs.tiny("gemma3", vocabulary.rows, **sizes)
        path = ggufs.write(tmp_path / f"{layers}.gguf", model, vocabulary.fields)
        scales[layers] = locate(ModelSettings(model=str(path))).config.query_pre_attn_scalar
    assert scales == {2: 16, 62: 24}


# Words of pre-tokenization

PIECES = {
    "gpt-2": "I|'ve| 1234| foo|_|bar|()|\n  | x| naïve| 中文|!!",
    "smollm": "I|'ve| |1|2|3|4| foo|_|bar|()|\n  | x| naïve| 中文|!!",
    "qwen2": "I|'ve| |1|2|3|4| foo|_bar|()\n|  | x| naïve| 中文|!!",
    "llama-bpe": "I|'ve| |123|4| foo|_bar|()\n|  | x| naïve| 中文|!!",
    "gpt-4o": "I've| |123|4| foo|_bar|()\n|  | x| naïve| 中文|!!",
    "tekken": "I|'ve| |1|2|3|4| foo|_bar|()\n|  | x| naïve| 中文|!!",
    "bloom": "I've| 1234| foo_bar|()\n  | x| naïve| 中文|!!",
    "falcon": "I|'|ve| |123|4| foo|_|bar|()|\n  | x| naïve| 中文|!!",
    "deepseek-coder": "I|'|ve| |1|2|3|4| foo|_|bar|()|\n|  | x| naïve| |中文|!!",
    "deepseek-llm": "I|'|ve| |1|2|3|4| foo|_|bar|()|\n|  | x| na|ï|ve| |中文|!!",
}
ALIKE = {
    "phi-2": "gpt-2",
    "mpt": "gpt-2",
    "olmo": "gpt-2",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "deepseek-r1-qwen": "qwen2",
    "stablelm2": "qwen2",
    "qwen35": "qwen2",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "dbrx": "llama-bpe",
}
COMPOSING = {"mpt", "olmo", "command-r", "qwen2", "deepseek-r1-qwen", "stablelm2", "qwen35"}


@pytest.mark.parametrize("word", RULES)
def test_a_word_cuts_text_into_the_pieces_of_its_original(word: str) -> None:
    text = "I've 1234 foo_bar()\n   x naïve 中文!!"
    found = RULES[word].pre_tokenizer.pre_tokenize_str(text)
    pieces = [text[start:end] for _, (start, end) in found]
    golden = PIECES[ALIKE.get(word, word)].split("|")
    assert pieces == golden
    assert "".join(golden) == text
    normalizer = RULES[word].normalizer
    assert (normalizer is not None and normalizer.normalize_str("e\u0301") == "é") == (
        word in COMPOSING
    )


def test_whole_pieces_go_before_merges_where_the_original_does_so(small: Any) -> None:
    """Llama 3 has tokens that no merges lead to."""
    vocabulary = VOCABULARIES["llama"]()
    tokens = list(vocabulary.fields["tokenizer.ggml.tokens"])
    free = next(n for n, token in enumerate(tokens) if token.startswith("[PAD"))
    tokens[free] = "zqzq"
    types = [*vocabulary.fields["tokenizer.ggml.token_type"][:free], 1, 5, 5]
    fields = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    for word, whole in {"smollm": False, "llama-bpe": True, "gpt-2": False, "tekken": True}.items():
        path = small(f"{word}.gguf", fields=fields | {"tokenizer.ggml.pre": word})
        ids = load_tokenizer(locate(ModelSettings(model=str(path))))("zqzq")["input_ids"]
        assert (ids == [free]) == whole


@pytest.mark.parametrize(("word", "file"), [("gpt-2", "gpt2"), ("mpt", "gpt-neox-20b")])
def test_a_real_byte_level_tokenizer_from_what_a_file_would_say(word: str, file: str) -> None:
    if not (SHARED / "tokenizers" / file).is_dir():
        pytest.skip(f"needs {SHARED / 'tokenizers' / file}, which is not part of the project")
    layout = layout_of(file)
    ids = dict(layout["model"]["vocab"])
    added = {token["content"]: token for token in layout["added_tokens"]}
    ids |= {content: token["id"] for content, token in added.items()}
    tokens = sorted(ids, key=ids.__getitem__)
    types = [
        ggufs.NORMAL if t not in added
        else ggufs.CONTROL if added[t]["special"]
        else ggufs.USER_DEFINED
        for t in tokens
    ]  # fmt: skip
    merges = [m if isinstance(m, str) else " ".join(m) for m in layout["model"]["merges"]]
    mine = _tokenizer(model="gpt2", pre=word, tokens=tokens, token_type=types, merges=merges)
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(layout)))
    _cut_alike(mine, theirs)


@pytest.mark.parametrize("file", ["llama-2", "mistral"])
def test_a_real_sentencepiece_model_from_what_a_file_would_say(file: str) -> None:
    folder = SHARED / "tokenizers" / file
    if not folder.is_dir():
        pytest.skip(f"needs {folder}, which is not part of the project")
    layout = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = sorted(layout["model"]["vocab"], key=layout["model"]["vocab"].__getitem__)
    types = [ggufs.UNKNOWN, ggufs.CONTROL, ggufs.CONTROL, *[ggufs.BYTE] * 256]
    types += [ggufs.NORMAL] * (len(tokens) - len(types))
    runs = [n for n, token in enumerate(tokens) if len(token) > 1 and set(token) == {"▁"}]
    scores = [0.0] * 259 + [259.0 - n for n in range(259, len(tokens))]
    for n in runs:  # as their tokenizer.model has them
        scores[n] = -1e9
    mine = _tokenizer(model="llama", pre="default", tokens=tokens, token_type=types, scores=scores)
    _cut_alike(
        mine, PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(layout)))
    )


def _tokenizer(**fields: Any) -> Any:
    values = {f"tokenizer.ggml.{key}": Value(value, 8) for key, value in fields.items()}
    return tokenizer_of(GgufHeader(Path("made.gguf"), values, {}))


def _cut_alike(mine: Any, theirs: Any) -> None:
    chance = random.Random(0)
    mixed = ["".join(chance.choices(TEXTS, k=3)) for _ in range(200)]
    for text in [*TEXTS, *mixed, Path(__file__).read_text(encoding="utf-8")]:
        found, wanted = (
            t(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            for t in (mine, theirs)
        )
        assert found == wanted, text


def spm(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's algorithm: join the neighbours of the best score, the leftmost first."""
    parts = list(text)
    while True:
        pairs = [
            (-scores[a + b], n)
            for n, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in scores
        ]
        if not pairs:
            return parts
        _, n = min(pairs)
        parts[n : n + 2] = [parts[n] + parts[n + 1]]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_is_cut_by_scores(small: Any, prefix: bool) -> None:
    vocabulary = ggufs.sentencepiece(prefix)
    path = ggufs.write(
        small().with_name("spm.gguf"), ggufs.tiny("llama", vocabulary.rows), vocabulary.fields
    )
    tokenizer: Any = load_tokenizer(locate(ModelSettings(model=str(path))))
    fields = {key.rsplit(".", 1)[1]: value for key, value in vocabulary.fields.items()}
    known = zip(fields["tokens"], fields["scores"], fields["token_type"], strict=True)
    scores = {token: score for token, score, type_ in known if type_ == ggufs.NORMAL}
    letters = {token for token in scores if len(token) == 1}
    tried = 0
    for n in range(40):
        text = " ".join(prose(n).split())
        marked = ("▁" if prefix else "") + text.replace(" ", "▁")
        if set(marked) <= letters:
            tried += 1
            assert tokenizer.tokenize(text) == spm(marked, scores)
    assert tried > 10
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id == 1


def test_scores_that_say_nothing_leave_the_order_of_the_ids(small: Any) -> None:
    """Some converters write one score for all tokens, in the order of their ranks."""
    vocabulary = ggufs.sentencepiece(True)
    fields = dict(vocabulary.fields)
    scores = fields["tokenizer.ggml.scores"]
    order = [*range(259), *sorted(range(259, len(scores)), key=lambda n: -scores[n])]
    for key in ("tokens", "token_type"):
        values = fields[f"tokenizer.ggml.{key}"]
        fields[f"tokenizer.ggml.{key}"] = [values[n] for n in order]
    fields["tokenizer.ggml.scores"] = [-1000.0] * len(scores)
    path = ggufs.write(small().with_name("spm.gguf"), ggufs.tiny("llama", vocabulary.rows), fields)
    mine = load_tokenizer(locate(ModelSettings(model=str(path))))
    for text in TEXTS:
        assert mine.tokenize(text) == vocabulary.tokenizer.tokenize(text)


# A tokenizer beside the model


def test_a_tokenizer_is_read_in_place_of_the_models_own(
    world: Path, made: Any, small: Any, tmp_path: Path
) -> None:
    _, folder = made("llama")
    path = small(fields={"tokenizer.ggml.pre": "never-heard"})
    fault = fault_of(path)
    assert "by the rules 'never-heard', which are not known here" in fault
    assert "`tokenizer:` with a folder or a hub name" in fault
    beside = reader_of(ModelSettings(model=str(path), tokenizer=str(folder)))
    assert beside.encoder.rules == reader_of(ModelSettings(model=str(folder))).encoder.rules
    bare = tmp_path / "bare"
    load_model(locate(ModelSettings(model=str(folder))), CPU).save_pretrained(bare)
    assert "give a folder with a tokenizer.json, for a model as `tokenizer:`" in fault_of(bare)
    assert reader_of(ModelSettings(model=str(bare), tokenizer=str(folder))).encoder.rules
    other = fault_of(path, tokenizer=str(made("qwen2")[1]))
    assert f"is not that of {path}: id " in other


def test_a_tokenizer_counts_where_it_is_set(world: Path, made: Any, tmp_path: Path) -> None:
    _, folder = made("llama")
    run = tmp_path / "run"
    plain = (f"sources.0.model={folder}", f"target.model={folder}")
    pipeline(world, run, *plain).execute(["corpus", "externalize", "fuse"])
    before = {p: p.read_bytes() for p in sorted(run.rglob("manifest.json"))}
    identity = StageFolder(run / "externalize" / "first").identity
    assert set(identity.settings) == {"externalize", "dtype", "seed"}
    assert set(identity.inputs) == {"weights", "tokenizer", "corpus"}
    same = pipeline(world, run, *plain, f"sources.0.tokenizer={folder}")
    same.execute(["corpus", "externalize", "fuse"])  # goes on: it cuts text in the same way
    assert {p: p.read_bytes() for p in sorted(run.rglob("manifest.json"))} == before
    layout = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    layout["pre_tokenizer"] = layout["pre_tokenizer"]["pretokenizers"][1]  # digits in runs
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text(json.dumps(layout), encoding="utf-8")
    config = (folder / "tokenizer_config.json").read_text(encoding="utf-8")
    (other / "tokenizer_config.json").write_text(config, encoding="utf-8")
    changed = pipeline(world, run, *plain, f"sources.0.tokenizer={other}")
    with pytest.raises(IdentityError, match=r"externalize/first .*input tokenizer was"):
        changed.execute(["externalize"])
    target = pipeline(world, tmp_path / "t", *plain, f"target.tokenizer={other}")
    target.execute(["corpus", "externalize", "fuse", "train", "evaluate"])
    saved = AutoTokenizer.from_pretrained(tmp_path / "t" / "train" / "fused")
    assert saved.backend_tokenizer.to_str() == Tokenizer.from_str(json.dumps(layout)).to_str()


def test_places_of_files_and_tokenizers_are_made_absolute(made: Any) -> None:
    path, folder = made("llama")
    recipe = {
        "name": "places",
        "target": {"model": path.name, "tokenizer": folder.name},
        "sources": [
            {"name": "a", "model": "owner/name", "gguf_file": "x.gguf", "tokenizer": "owner/name"},
            {"name": "b", "model": "zoo/prose", "tokenizer": "zoo/prose"},
        ],
        "corpus": {"documents": [{"builtin": "prose"}]},
    }
    found = resolve_paths(check_recipe(recipe, "here"), path.parent)
    assert (found.target.model, found.target.tokenizer) == (str(path), str(folder))
    assert (found.sources[0].model, found.sources[0].tokenizer) == ("owner/name", "owner/name")
    assert (found.sources[1].model, found.sources[1].tokenizer) == ("zoo/prose", "zoo/prose")


def test_a_head_needs_a_row_for_every_token_that_a_text_can_have(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = VOCABULARIES["llama"]()
    tokenizer: Any = vocabulary.tokenizer
    count = len(tokenizer)
    few = tmp_path / "few"
    ggufs.folder_of(few, ggufs.tiny("llama", count - 1), vocabulary, "F32")
    message = f"has {count - 1} rows in its head and {count} tokens in its tokenizer"
    assert message in fault_of(few)
    for command in (
        ["evaluate", str(few), "--suite", "smoke", "--out", str(tmp_path / "out")],
        ["tokenizers", str(few), str(few)],
    ):
        monkeypatch.setattr(sys, "argv", ["fusellm", *command])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 1
        assert message in capsys.readouterr().err
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    enough = tmp_path / "enough"
    ggufs.folder_of(enough, ggufs.tiny("llama", count), vocabulary, "F32")
    reader = reader_of(ModelSettings(model=str(enough)))
    assert len(reader.encoder.vocabulary) == count
    uncut = Encoder(load_tokenizer(reader.located))
    assert len(uncut.vocabulary) == count + 1
    texts = ["an <image> here", "x"]
    for one, other in zip(
        reader.encoder.encode(texts, [True] * 2), uncut.encode(texts, [True] * 2), strict=True
    ):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.ids.max() < count


# What is said


def test_a_model_tuned_for_dialogue_is_told_of(world: Path, small: Any, tmp_path: Path) -> None:
    chat = small(fields={"tokenizer.chat_template": "{{ messages }}"})
    said = Said()
    run = pipeline(world, tmp_path / "run", f"sources.1.model={chat}", said=said)
    run.check()
    note = "note: second has a chat template, as models tuned for dialogue have; here plain text"
    assert [line.startswith(note) for line in said.lines] == [True]
    run.execute(["corpus"])
    assert len(said.lines) == 1
    run.execute(["externalize"])
    assert len(said.lines) == 2
    run.execute(["externalize"])  # nothing is left to read
    assert len(said.lines) == 2
    quiet = Said()
    pipeline(world, tmp_path / "quiet", "sources.1.model=zoo/prose", said=quiet).check()
    assert quiet.lines == []


# What is refused


def test_a_missing_package_is_named_before_anything_is_read(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = made("llama")
    require_packages(locate(ModelSettings(model=str(path))))
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    for fault in (
        fault_of(path),
        fault_of("/no/such.gguf"),
        fault_of("someone/tiny", gguf_file="x.gguf"),
    ):
        assert "needs the package gguf: pip install 'fusellm[gguf]'" in fault


def test_bad_files_are_refused_with_the_cure(small: Any, tmp_path: Path) -> None:
    good = small().read_bytes()

    def written(data: bytes, name: str = "bad.gguf") -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    def fields(**changes: Any) -> str:
        given = {key.replace("__", "."): value for key, value in changes.items()}
        return fault_of(small("changed.gguf", fields=given))

    header = model_header(tmp_path / "small.gguf")
    begin = min(tensor.start for tensor in header.tensors.values())
    assert "is no GGUF file: it begins with b'PK" in fault_of(written(b"PK\x03\x04" + good[4:]))
    assert "is no GGUF file: it has 3 bytes" in fault_of(written(b"GGU"))
    assert "is GGUF of version 1" in fault_of(written(good[:4] + struct.pack("<I", 1) + good[8:]))
    swapped = good[:4] + struct.pack(">I", 3) + good[8:]
    assert "little-endian numbers" in fault_of(written(swapped))
    for end in (40, begin // 2, begin - 40):
        assert "is truncated or damaged: its header" in fault_of(written(good[:end]))
    cut = fault_of(written(good[:-1]))
    assert "is truncated or damaged: " in cut
    assert f"of {len(good) - 1}; download it again" in cut
    split = fault_of(written(good, "m-00002-of-00003.gguf"))
    assert "is part 2 of 3 of a model in a split GGUF" in split
    assert "`gguf-split --merge FIRST-PART.gguf WHOLE.gguf`" in split
    assert "one of 2 parts of a model in a split GGUF" in fields(split__count=2)
    assert "split" not in str(small("m-00001-of-00001.gguf"))
    reader_of(ModelSettings(model=str(tmp_path / "m-00001-of-00001.gguf")))
    vision = "holds the vision part of a model"
    assert vision in fields(general__type="mmproj")
    assert vision in fields(**{"llama.vision.block_count": 4})
    assert "holds no model but 'adapter'" in fields(general__type="adapter")
    assert "does not say how its tokenizer cuts text" in fields(tokenizer__ggml__pre="default")
    assert "does not say how its tokenizer cuts text" in fields(tokenizer__ggml__pre=None)
    assert "tokenizer of the kind 'bert'" in fields(tokenizer__ggml__model="bert")
    assert "holds no tokenizer" in fields(tokenizer__ggml__tokens=None)
    assert "has no merges" in fields(tokenizer__ggml__merges=None)
    assert "merges that do not fit" in fields(tokenizer__ggml__merges=["zzz yyy"])


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("xlama", "has the architecture 'xlama', which transformers does not dequantize (it does "),
        ("gemma", "has the architecture 'gemma'"),
        ("t5", "is a t5, which is no decoder-only language model"),
        ("clip", "holds the vision part of a model (clip, model)"),
    ],
)
def test_architectures_that_cannot_be_read_are_refused(small: Any, name: str, part: str) -> None:
    path = small()
    own = struct.pack("<Q", 5) + b"llama"
    assert own in path.read_bytes()
    other = struct.pack("<Q", len(name)) + name.encode()
    path.write_bytes(path.read_bytes().replace(own, other, 1))
    fault = fault_of(path)
    assert part in fault
    assert name in ("t5", "clip") or "llama" in fault


def test_places_that_hold_no_file_are_refused_with_the_cure(
    made: Any, tmp_path: Path, small: Any
) -> None:
    path, folder = made("llama")
    alone = small()
    assert f"name the file: model: {alone}" in fault_of(alone.parent)
    assert "there is no GGUF file ./none.gguf; check the path" in fault_of("./none.gguf")
    assert "leave gguf_file: x.gguf out" in fault_of(path, gguf_file="x.gguf")
    assert "has no x.gguf; its GGUF files: small.gguf" in fault_of(alone.parent, gguf_file="x.gguf")
    assert "no name of a GGUF file" in fault_of(alone.parent, gguf_file="x.bin")
    assert "leave that out" in fault_of(path, quantization="4bit")
    assert "is a file; give the folder that it is in, or a .gguf file" in fault_of(
        folder / "config.json"
    )
    assert "there is no folder" in fault_of(path, tokenizer="/no/such")


def test_weights_of_an_unknown_quantization_are_refused(small: Any) -> None:
    path = small()
    header = model_header(path)
    data = path.read_bytes()
    name = b"token_embd.weight"
    at = data.index(name) + len(name) + 4 + 16
    assert struct.unpack_from("<I", data, at) == (header.tensors[name.decode()].kind,)
    path.write_bytes(data[:at] + struct.pack("<I", 4) + data[at + 4 :])
    fault = fault_of(path)
    assert "weights of the quantization 4" in fault
    assert "pip install --upgrade gguf" in fault


def test_a_damaged_header_is_never_taken_for_a_model(small: Any) -> None:
    """Whatever bytes it has, one line says so."""
    path = small()
    good = path.read_bytes()
    end = min(tensor.start for tensor in model_header(path).tensors.values())
    chance = random.Random(0)
    for _ in range(150):
        data = bytearray(good)
        for _ in range(chance.randint(1, 6)):
            data[chance.randrange(4, min(end, 4000))] = chance.randrange(256)
        path.write_bytes(data)
        fault = None
        try:
            reader_of(ModelSettings(model=str(path)))
        except FusellmError as error:  # anything else fails the test
            fault = str(error)
        assert fault is None or "\n" not in fault


def test_a_model_error_is_one_line(small: Any) -> None:
    with pytest.raises(ModelError):
        locate(ModelSettings(model=str(small(fields={"general.type": "imatrix"}))))
