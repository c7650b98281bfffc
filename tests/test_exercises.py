"""Exercises with exact answers."""

import itertools

import pytest

from tasks.exercises import HELD_OUT, TASKS, TRAIN, Exercise, exercises, held_out, split_of

# worked by hand, from the question alone
SOLVERS = {
    "sum": lambda question: str(eval(question.removesuffix("="))),
    "reverse": lambda question: " ".join(question.split()[:0:-1]),
    "sort": lambda question: " ".join(sorted(question.split()[1:])),
    "copy": lambda question: question.split(" ", 1)[1],
}


def first(task, split, n):
    return list(itertools.islice(exercises(task, split), n))


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right_and_the_same_every_time(task):
    for split in (TRAIN, HELD_OUT):
        made = first(task, split, 300)
        assert made == first(task, split, 300)
        assert [one.answer for one in made] == [SOLVERS[task](one.question) for one in made]
        assert {split_of(one.question) for one in made} == {split}


@pytest.mark.parametrize("task", TASKS)
def test_held_out_questions_are_new_and_never_trained_on(task):
    questions = [one.question for one in held_out(task, 400)]
    assert len(questions) == len(set(questions)) == 400
    assert not set(questions) & {one.question for one in first(task, TRAIN, 20_000)}


def test_a_small_task_ends():
    """Of 10,000 sums about one in ten is held out."""
    assert 800 < len(held_out("sum", 5000)) < 1200


def test_what_counts_as_solved():
    one = Exercise("1 + 1 =", "2")
    assert one.is_solved_by("2") and one.is_solved_by(" 2\n")
    assert not one.is_solved_by("2.") and not one.is_solved_by("") and not one.is_solved_by("22")
    assert [message["role"] for message in one.messages()] == ["user", "assistant"]
