"""What a source says within its tokens: a world that is known whole, and small ones by hand."""

import numpy as np
import pytest

import worlds
from fusellm.alignment.continuations import Continuations
from fusellm.alignment.strategies import STRATEGIES
from fusellm.arrays.distributions import Kept
from fusellm.arrays.ragged import offsets_of
from fusellm.config import FusionSettings
from fusellm.errors import ArgumentError
from fusellm.fusion.fuse import fuse_blocks, rules_of
from fusellm.fusion.inside import inside, within
from fusellm.fusion.pairing import pair
from fusellm.recipe_file import checked_settings
from known_world import bpe, learnt, said, texts_with_probabilities, tokens_of


@pytest.mark.parametrize(
    ("source", "target"),
    [(("a+b",), ()), ((";+\n", "a+b"), ()), (("a+b", "ab+;"), ("a+b",)), (("a+b", "ab+;"), ())],
)
def test_it_is_what_a_target_that_knows_the_world_says_of_the_longer_tokens(
    source: tuple[str, ...], target: tuple[str, ...]
) -> None:
    """An outcome that is told has what is right for it; what is not told is in the rest."""
    theirs, mine = bpe(*source), bpe(*target)
    world = texts_with_probabilities(4)
    texts, right = list(world), learnt(mine, world)
    read, tokens = tokens_of(mine, texts), tokens_of(theirs, texts)
    kept = said(tokens, learnt(theirs, world), None, 1)
    map_ = STRATEGIES["partition"].translate(theirs, mine, None)
    sizes = offsets_of(np.array([len(text) for text in texts]))
    fused, aligned = [], []
    for asks in (False, True):
        chosen = {"function": "uniform", "refine": "none", "inside_tokens": asks}
        settings = FusionSettings.model_validate(chosen)
        reading = pair(theirs, mine, map_, settings).reading(read, tokens, kept)
        fused.append(fuse_blocks(read, sizes, [reading], rules_of(settings))[0])
        aligned.append(reading.aligned.source)
    assert np.array_equal(*aligned)
    there = fused[0].parts > 0
    assert np.array_equal(fused[1].take(np.flatnonzero(there)).masses, fused[0].masses)
    new = np.flatnonzero((fused[1].parts > 0) & ~there)
    assert len(new) > 5
    for position in new.tolist():
        block = int(np.searchsorted(read.position_offsets, position, side="right")) - 1
        at = position - read.position_offsets[block] + 1
        ids = tuple(read.ids[read.offsets[block] :][:at].tolist())
        expected = np.zeros(map_.outcomes + 1)
        for id_, mass in right[ids].items():
            expected[map_.outcome_of_target[id_]] += mass
        one = fused[1].take(np.array([position]))
        assert one.masses == pytest.approx(expected[one.outcomes], abs=1e-5)
        assert one.rest[0] == pytest.approx(1 - expected[one.outcomes].sum(), abs=1e-5)


def test_where_few_draws_fit_nothing_is_said() -> None:
    """Of 32 draws before `ab` four began with `a`, and then five."""
    theirs, mine = bpe("a+b"), bpe()
    read, tokens = tokens_of(mine, ["ab"]), tokens_of(theirs, ["ab"])
    names = theirs.vocabulary.token_bytes
    ab, a, b = (names.index(token) for token in (b"ab", b"a", b"b"))
    map_ = STRATEGIES["partition"].translate(theirs, mine, None)
    settings = FusionSettings.model_validate({"function": "uniform", "inside_tokens": True})
    for fitting, parts in ((4, 0), (5, 1)):
        counts = np.array([fitting - 1, 1, 32 - fitting, 32], dtype=np.uint8)
        order = np.array([ab, a, b, 0])
        kept = Kept(
            np.array([0, 3, 4]),
            order,
            np.zeros(0, dtype=np.float32),
            counts,
            np.zeros(2, dtype=np.float32),
            np.log(np.array([0.1, 1.0], dtype=np.float32)),
        )
        reading = pair(theirs, mine, map_, settings).reading(read, tokens, kept)
        fused, _, _ = fuse_blocks(read, np.array([0, 2]), [reading], rules_of(settings))
        assert fused.parts[1] == parts
        if parts:  # 0.1 for `ab`; the others share 0.9, of which `a` has 1 of 28
            one = fused.take(np.array([1]))
            spelled = mine.vocabulary.token_bytes[reading.sets[int(one.outcomes[0])][0]]
            assert spelled == b"b"
            assert one.masses[0] == pytest.approx(0.1 / (0.1 + 0.9 / 28), rel=1e-5)


def test_of_the_most_probable_what_was_not_kept_does_not_fit() -> None:
    """Before `ab`, which was not kept and has 0.1, `b` has 0.6. The tail has 0.4, `ab` in it."""
    theirs, mine = bpe("a+b"), bpe()
    read, tokens = tokens_of(mine, ["ab"]), tokens_of(theirs, ["ab"])
    a, b = (theirs.vocabulary.token_bytes.index(letter) for letter in (b"a", b"b"))
    for other, share in ((b, 0.0), (a, 0.6)):
        log = np.log(np.array([0.6, 0.9], dtype=np.float32))
        kept = Kept(
            np.array([0, 1, 2]),
            np.array([other, 0]),
            log,
            np.zeros(0, dtype=np.uint8),
            np.array([0.4, 0.1], dtype=np.float32),
            np.log(np.array([0.1, 0.9], dtype=np.float32)),
        )
        map_ = STRATEGIES["partition"].translate(theirs, mine, None)
        settings = FusionSettings.model_validate({"function": "uniform", "inside_tokens": True})
        reading = pair(theirs, mine, map_, settings).reading(read, tokens, kept)
        fused, _, _ = fuse_blocks(read, np.array([0, 2]), [reading], rules_of(settings))
        one = fused.take(np.array([1]))
        assert one.masses == pytest.approx([0.1 / (0.1 + share)], rel=1e-5)


def test_a_token_whose_space_is_not_in_the_text_is_not_asked() -> None:
    """Llama-2 reads `international` as one token that begins with a space the text has not."""
    theirs, mine = worlds.encoder_of("llama-2"), worlds.encoder_of("raw-bytes")
    for text, asked in (("international", False), ("a returning", True)):
        tokens, read = tokens_of(theirs, [text]), tokens_of(mine, [text])
        places = within(read, tokens)
        count = len(tokens.predicting)
        kept = Kept(
            np.arange(count + 1),
            tokens.ids[tokens.predicting + 1],
            np.zeros(0, dtype=np.float32),
            np.full(count, 32, dtype=np.uint8),
            np.zeros(count, dtype=np.float32),
            np.full(count, np.log(0.9), dtype=np.float32),
        )
        continuations = Continuations(theirs, mine)
        told, _ = inside(places, tokens, kept, kept.distributions(), continuations)
        assert len(places.rows) > 0
        assert bool(len(told.rows)) == asked


def test_without_healing_it_is_refused() -> None:
    with pytest.raises(ArgumentError, match="needs token_healing: true"):
        checked_settings(FusionSettings, {"strategy": "em", "inside_tokens": True})
