"""Answers of a model to conversations, drawn together, and how many of them are right."""

from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.data.chat import render
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.engine import Request, Sampling
from nanochat.eval.writer import Writer
from nanochat.model.decoder import Decoder
from tasks.core import standard_error
from tasks.exercises import Exercise

# of an answer, where the context has room for them
ANSWER_TOKENS = 256
# answers that are drawn together
SLOTS = 8


def draw_answers(
    model: Decoder,
    tokenizer: Tokenizer,
    questions: Sequence[Sequence[int]],
    seed: int,
    *,
    temperature: float = 0.8,
    max_new_tokens: int = ANSWER_TOKENS,
) -> list[tuple[str | None, str]]:
    """For each question (answer, ""), or (None, why there is none).

    questions: ids of conversations that end with the start of an answer, as chat.render() gives
    them. The model's train or eval mode is restored. Question i is answered with its own seed, so
    that an answer does not depend on those beside it. temperature 0: the likeliest tokens."""
    was_training = model.training
    model.eval()
    answers: list[tuple[str | None, str]] = [(None, "")] * len(questions)
    try:
        requests = {}
        for i, ids in enumerate(questions):
            room = model.config.max_seq_len - len(ids)
            if room < 1:
                answers[i] = (None, f"the question fills the context with its {len(ids)} tokens")
                continue
            sampling = Sampling(temperature=temperature, top_k=50, seed=(seed + i) % 2**63)
            requests[i] = Request(tuple(map(int, ids)), min(room, max_new_tokens), sampling)
        with Writer(model, tokenizer, slots=SLOTS) as writer:
            texts = writer.texts(list(requests.values()))
        for i, text in zip(requests, texts, strict=True):
            answers[i] = (text, "")
    except Exception as error:
        # of any kind: no sample is worth the run
        problem = f"{type(error).__name__}: {error}"
        return [(None, problem)] * len(questions)
    finally:
        model.train(was_training)
    return answers


@dataclass(frozen=True)
class ExerciseScore:
    """Share of n exercises with the right answer, and its standard error; None with a reason if
    they could not be asked."""

    accuracy: float | None
    stderr: float | None
    n: int
    reason: str = ""

    def in_words(self) -> str:
        """For the screen."""
        if self.accuracy is None:
            return f"no answers ({self.reason})"
        spread = "" if self.stderr is None else f" ± {self.stderr:.1%}"
        return f"{self.accuracy:.1%}{spread} of {self.n} exercises answered exactly"


def exercise_score(
    model: Decoder, tokenizer: Tokenizer, exercises: Sequence[Exercise]
) -> ExerciseScore:
    """Ask every exercise, with the likeliest tokens as the answer."""
    questions = [
        render(tokenizer, exercise.messages()[:1], generation_prompt=True)[0]
        for exercise in exercises
    ]
    # a longer answer is wrong: it need not be drawn to its end
    longest = max((len(tokenizer.encode(one.answer)) for one in exercises), default=0) + 2
    answers = draw_answers(
        model, tokenizer, questions, seed=0, temperature=0.0, max_new_tokens=longest
    )
    reasons = [problem for text, problem in answers if text is None]
    if reasons:
        return ExerciseScore(None, None, len(exercises), reasons[0])
    right = [
        int(exercise.is_solved_by(text))
        for exercise, (text, _) in zip(exercises, answers, strict=True)
    ]
    n = len(right)
    return ExerciseScore(sum(right) / n if n else None, standard_error(right), n)
