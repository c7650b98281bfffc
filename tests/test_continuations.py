"""Preference pairs made of text."""

import re

from tasks.continuations import ANSWER_WORDS, PROMPT_WORDS, continuations

WORDS = PROMPT_WORDS + ANSWER_WORDS
TEXT = " ".join(f"w{i}" for i in range(10 * WORDS + 5))
LINES = "\n".join(f"line {i}\tof it" for i in range(60))


def test_a_pair_goes_on_or_has_the_same_words_in_disorder():
    for text in (TEXT, LINES):
        pairs = continuations([text, "too short"], 5, seed=1)
        assert pairs == continuations([text, "too short"], 5, seed=1) and len(pairs) == 5
        for pair in pairs:
            assert len(pair.prompt.split()) == PROMPT_WORDS
            assert re.search(re.escape(pair.prompt) + r"\s+" + re.escape(pair.chosen), text)
            assert pair.chosen != pair.rejected
            assert sorted(pair.chosen.split()) == sorted(pair.rejected.split())
            # the blanks stay where they were
            assert re.findall(r"\s+", pair.chosen) == re.findall(r"\s+", pair.rejected)


def test_places_are_all_taken_once_and_alike():
    assert len(continuations([TEXT], 100, seed=0)) == 10
    everywhere = {pair.prompt for seed in range(40) for pair in continuations([TEXT], 2, seed)}
    assert len(everywhere) == 10
    assert continuations([TEXT], 2, seed=0) != continuations([TEXT], 2, seed=1)


def test_words_that_are_all_the_same_have_no_other_order():
    assert continuations(["again " * 100], 3, seed=0) == []
