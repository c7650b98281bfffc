"""Exercises that a model is asked: what counts as right, and what cannot be asked."""

import pytest
import torch

from nanochat.data.chat import render, with_chat
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.chat import draw_answers, exercise_score
from nanochat.eval.writer import Writer
from nanochat.model.build import build
from nanochat.model.config import GPTConfig
from tasks.exercises import held_out

TOKENIZER = with_chat(Tokenizer("byte", [bytes([i]) for i in range(256)]))


@pytest.fixture(scope="module")
def model():
    config = GPTConfig(
        depth=1,
        width=16,
        head_dim=16,
        n_head=1,
        n_kv_head=1,
        vocab_size=TOKENIZER.vocab_size,
        max_seq_len=32,
    )
    return build(config, "cpu", seed=0)


def question(text):
    return render(TOKENIZER, [{"role": "user", "content": text}], generation_prompt=True)[0]


def test_the_share_of_right_answers_and_its_error(model, monkeypatch):
    """Three of four are answered; blanks around an answer do not count."""
    asked = held_out("copy", 4)
    given = [asked[0].answer, f" {asked[1].answer} ", asked[2].answer + "x", asked[3].answer]
    monkeypatch.setattr(Writer, "texts", lambda self, requests: given)
    model.train()
    score = exercise_score(model, TOKENIZER, asked)
    assert model.training
    assert (score.accuracy, score.n) == (0.75, 4)
    # of the mean of 1, 1, 0, 1
    assert score.stderr == pytest.approx(0.25)
    assert score.in_words() == "75.0% ± 25.0% of 4 exercises answered exactly"


def test_answers_do_not_depend_on_those_beside_them(model):
    questions = [question(text) for text in ("a", "bcd", "ef")]
    together = draw_answers(model, TOKENIZER, questions, seed=3, max_new_tokens=8)
    assert draw_answers(model, TOKENIZER, questions[:1], seed=3, max_new_tokens=8) == together[:1]
    assert [problem for _, problem in together] == ["", "", ""]


def test_a_question_that_fills_the_context(model):
    answers = draw_answers(model, TOKENIZER, [question("x" * 40), question("y")], seed=0)
    assert answers[0][0] is None and "fills the context" in answers[0][1]
    assert answers[1][0] is not None
    score = exercise_score(model, TOKENIZER, [])
    assert (score.accuracy, score.n) == (None, 0)


def test_weights_that_are_not_numbers_are_no_answer(model):
    broken = build(model.config, "cpu", seed=0)
    with torch.no_grad():
        broken.head.weight.fill_(float("nan"))
    score = exercise_score(broken, TOKENIZER, held_out("sum", 2))
    assert score.accuracy is None and "not numbers" in score.reason
    assert score.in_words().startswith("no answers (")
