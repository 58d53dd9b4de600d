"""lm_eval's model with less work: against HFLM itself, number by number."""

import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusellm.evaluation.harness.model import LoadedModel, RowsEnd, harness_model
from fusellm.objective.chunked import Head

CONTEXT = 64
PAIRS = [
    ("the model reads", " a text"),
    ("the model reads", " and every token of it is a piece"),
    ("the model reads", " it"),
    ("is it", " yes"),
    ("is it", " no"),
    ("", "class model"),
    ("return value", "\n    print self import"),
    ("naïve café " * 30, "Straße"),
    ("a", " reader" * 20),
]


@pytest.fixture(scope="module", params=["llama", "neox", "mpt"])
def loaded(world: Path, request: pytest.FixtureRequest) -> LoadedModel:
    model = AutoModelForCausalLM.from_pretrained(world / request.param, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(world / request.param)
    return LoadedModel(model.eval(), tokenizer, CONTEXT)


def ours(loaded: LoadedModel, batch_size: int) -> Any:
    return harness_model(loaded, deepcopy(loaded.tokenizer), batch_size)


def theirs(loaded: LoadedModel, batch_size: int) -> Any:
    return HFLM(
        pretrained=loaded.model,
        tokenizer=deepcopy(loaded.tokenizer),
        batch_size=batch_size,
        max_length=loaded.context_tokens,
        softmax_dtype="float32",
    )


def scoring(pairs: Sequence[tuple[str, str]]) -> list[Instance]:
    return [
        Instance("loglikelihood", {}, pair, n, metadata=("own", n, 1))
        for n, pair in enumerate(pairs)
    ]


def writing(prompts: Sequence[str], until: Sequence[str], most: int) -> list[Instance]:
    arguments = {"until": list(until), "max_gen_toks": most, "do_sample": False}
    return [
        Instance("generate_until", {}, (prompt, arguments), n, metadata=("own", n, 1))
        for n, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_nats_are_those_of_lm_eval(loaded: LoadedModel, batch_size: int) -> None:
    """Also of choices that share a prompt, without any prompt, and of texts that are too long."""
    mine = ours(loaded, batch_size).loglikelihood(scoring(PAIRS))
    wanted = theirs(loaded, batch_size).loglikelihood(scoring(PAIRS))
    assert [nats for nats, _ in mine] == pytest.approx([nats for nats, _ in wanted], rel=1e-5)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in wanted]


def test_of_a_continuation_that_is_too_long_the_end_is_scored(loaded: LoadedModel) -> None:
    """HFLM has an assertion there."""
    lm = ours(loaded, 1)
    context, continuation = lm._encode_pair("the", " reader text" * 50)
    assert len(continuation) > CONTEXT
    whole = context + continuation
    (found,) = lm._loglikelihood_tokens([(None, context, continuation)])
    cut = (whole[:-CONTEXT], whole[-CONTEXT:])
    (wanted,) = theirs(loaded, 1)._loglikelihood_tokens([(None, *cut)])
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)


def test_a_continuation_that_is_the_likeliest_is_known(loaded: LoadedModel) -> None:
    (written,) = theirs(loaded, 1).generate_until(writing(["the model"], [], 1))
    pairs = [("the model", written), ("the model", written + "x")]
    found = ours(loaded, 2).loglikelihood(scoring(pairs))
    assert found[0][1] == theirs(loaded, 2).loglikelihood(scoring(pairs))[0][1]


def test_windows_of_long_texts_are_those_of_lm_eval(loaded: LoadedModel) -> None:
    request = Instance(
        "loglikelihood_rolling", {}, ("model text " * 60,), 0, metadata=("own", 0, 1)
    )
    (mine,) = ours(loaded, 2).loglikelihood_rolling([request])
    (wanted,) = theirs(loaded, 2).loglikelihood_rolling([request])
    assert mine == pytest.approx(wanted, rel=1e-5)


def test_logits_are_made_only_where_continuations_are(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    logits = Head.logits

    def counted(self: Head, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(hidden))
        return logits(self, hidden, *rest)

    monkeypatch.setattr(Head, "logits", counted)
    lm = ours(loaded, 4)
    pairs = [("the model reads a text and every token of it", " is"), ("the", " text")]
    lm.loglikelihood(scoring(pairs))
    assert sum(rows) == sum(len(lm._encode_pair(*pair)[1]) for pair in pairs)


def counting(model: Any) -> tuple[list[int], Callable[[], None]]:
    """Counts forward passes, until the second is called."""
    steps: list[int] = []
    hook = model.register_forward_hook(lambda *_: steps.append(1))
    return steps, hook.remove


def test_a_batch_ends_when_each_row_has_met_a_stop_string(loaded: LoadedModel) -> None:
    """HFLM goes on until one string has been met by all; the texts are the same."""
    prompts = ["return value", "class model def import print", "text"]
    lm, most = ours(loaded, 3), 40
    whole = theirs(loaded, 3).generate_until(writing(prompts, [], most))
    # Without U+FFFD: half a character looks like it until the rest has come.
    pieces = [re.findall("[^\ufffd]{4}", text) for text in whole]
    stops = [found[len(found) // 8] for found in pieces]
    requests = writing(prompts, stops, most)
    wanted = theirs(loaded, 3).generate_until(requests)
    steps, remove = counting(loaded.model)
    assert lm.generate_until(requests) == wanted
    remove()
    assert len(steps) < most
    alone = [lm.generate_until(writing([prompt], stops, most))[0] for prompt in prompts]
    assert alone == wanted


def test_rows_end_one_by_one(loaded: LoadedModel) -> None:
    tokenizer = deepcopy(loaded.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    rows = tokenizer(["model text", "model class"], padding=True, return_tensors="pt").input_ids
    ends = RowsEnd(tokenizer, ["class"], prompt_tokens=0)
    assert ends(rows, None).tolist() == [False, True]
    assert RowsEnd(tokenizer, ["class"], rows.shape[1])(rows, None).tolist() == [False, False]
    assert RowsEnd(tokenizer, [], 0)(rows, None).tolist() == [False, False]


def test_sampling_takes_the_settings_that_it_is_given(loaded: LoadedModel) -> None:
    arguments = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 5.0, "top_k": 0}
    request = Instance("generate_until", {}, ("the model", arguments), 0, metadata=("own", 0, 1))
    found = []
    for make in (ours, theirs):
        torch.manual_seed(3)
        found.append(make(loaded, 1).generate_until([request]))
    assert found[0] == found[1]
    torch.manual_seed(4)
    assert ours(loaded, 1).generate_until([request]) != found[0]
