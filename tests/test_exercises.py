"""Every check of every lesson: the blank, the solution, and planted mistakes.

A lesson's check `check_x` judges the function `x` (or the value `x`) of the notebook; its solution
is the `x` of the notebook in `solutions/`; typical mistakes are in `tests/mistakes/`.
"""

import importlib
import inspect
import random
import re
from collections.abc import Callable
from typing import get_origin

import nbformat
import pytest
import torch
from helpers.lessons import LESSONS, SOLUTIONS, code_cells, definitions

from blip2_edu.exercises import Verdict, attempted, exercise, expect, noise

WITH_CHECKS = [path for path in LESSONS if path.stem[:2] != "00"]
names = [path.stem for path in WITH_CHECKS]


def checks_of(path) -> dict:
    module = importlib.import_module(f"blip2_edu.exercises.lesson_{path.stem[:2]}")
    return {name: value for name, value in vars(module).items() if name.startswith("check_")}


def mistakes_of(path) -> dict:
    """By name of the check: pairs of a wrong attempt and words that the verdict must hold."""
    return importlib.import_module(f"mistakes.lesson_{path.stem[:2]}").MISTAKES


@pytest.mark.parametrize("path", WITH_CHECKS, ids=names)
def test_a_lesson_has_three_exercises_and_uses_each_check_once(path):
    checks = checks_of(path)
    assert len(checks) >= 3
    code = "\n".join(code_cells(path))
    for name in checks:
        assert len(re.findall(rf"\b{name}\(", code)) == 1, name


@pytest.mark.parametrize("path", WITH_CHECKS, ids=names)
def test_every_exercise_tells_difficulty_minutes_hint_and_answers(path):
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    exercises = re.findall(
        r"\*\*Exercise (\d+)\*\* \*\((easy|medium|hard), (\d+) minutes?\)\*", text
    )
    assert [int(number) for number, _, _ in exercises] == list(range(1, len(exercises) + 1))
    assert len(exercises) == len(checks_of(path))
    assert len(re.findall(r"<summary>Hint", text)) >= len(exercises)
    assert f"solutions/{path.name}" in text
    assert "## Questions to think about" in text
    assert "## What you learned" in text
    assert "**In the paper**" in text


@pytest.mark.parametrize("path", WITH_CHECKS, ids=names)
def test_blanks_are_not_attempted(path):
    verdicts = [
        "".join(str(output.get("data", {}).get("text/plain", "")) for output in cell.outputs)
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "code" and re.search(r"^check_\w+\(", cell.source, re.MULTILINE)
    ]
    assert verdicts == ["Not attempted yet."] * len(checks_of(path))


@pytest.mark.parametrize("path", WITH_CHECKS, ids=names)
def test_solutions_pass(path):
    solutions = SOLUTIONS / path.name
    assert sorted(re.findall(r"\bcheck_\w+(?=\()", "\n".join(code_cells(solutions)))) == sorted(
        checks_of(path)
    )
    for cell in nbformat.read(solutions, as_version=4).cells:
        if cell.cell_type == "code" and re.search(r"^check_\w+\(", cell.source, re.MULTILINE):
            assert cell.outputs[-1].data["text/plain"].startswith("Passed: "), cell.source


@pytest.mark.parametrize("path", WITH_CHECKS, ids=names)
def test_solutions_given_as_functions_pass_again(path):
    solved = definitions(SOLUTIONS / path.name)
    for name, check in checks_of(path).items():
        if name.removeprefix("check_") in solved:  # an answer that is a value was judged above
            verdict = check(solved[name.removeprefix("check_")])
            assert verdict.passed, (name, verdict)


@pytest.mark.parametrize("path", WITH_CHECKS, ids=names)
def test_planted_mistakes_are_named(path):
    checks, mistakes = checks_of(path), mistakes_of(path)
    assert set(mistakes) == set(checks)
    for name, planted in mistakes.items():
        assert len(planted) >= 2, name
        for wrong, words in planted:
            verdict = checks[name](wrong)
            assert verdict.passed is False, (name, words, verdict)
            assert words in verdict.message, (name, words, verdict)


@pytest.mark.parametrize("path", WITH_CHECKS, ids=names)
def test_every_check_says_what_it_takes(path):
    for name, check in checks_of(path).items():
        assert check.__doc__.startswith(f"{name.removeprefix('check_')}("), name
        signature = inspect.signature(check)
        (attempt,) = signature.parameters.values()
        assert attempt.name == name.removeprefix("check_")
        assert get_origin(attempt.annotation) is Callable, name
        assert signature.return_annotation is str, name


@pytest.mark.parametrize("path", WITH_CHECKS, ids=names)
def test_all_that_is_random_in_a_check_comes_from_noise(path):
    module = importlib.import_module(f"blip2_edu.exercises.lesson_{path.stem[:2]}")
    others = r"import random|torch\.(?:rand|normal|bernoulli)|Generator|manual_seed|nn\.init"
    assert re.findall(others, inspect.getsource(module)) == []


def test_a_check_draws_the_same_again_and_leaves_the_students_numbers_alone():
    @exercise
    def check_drawn(drawn: Callable[[torch.Tensor], str]) -> str:
        first, second = noise(3), noise(3)
        expect(not torch.equal(first, second), "twice the same")
        return drawn(first + second)

    def drawn(x):
        return f"{x.tolist()} {torch.rand(1).item()}"

    torch.manual_seed(1)
    after = torch.rand(2)
    torch.manual_seed(1)
    random.seed(1)
    once = check_drawn(drawn)
    assert once.passed and check_drawn(drawn) == once
    assert torch.equal(torch.rand(2), after)
    assert random.random() == random.Random(1).random()


@exercise
def check_double(double):
    expect(double(3) != 9, "squared")
    expect(double(3) == 6, "twice 3 is 6")
    return "doubled"


def test_the_machinery():
    assert check_double(lambda x: 2 * x) == Verdict(True, "doubled")
    assert repr(check_double(lambda x: x**2)) == "Not yet: squared"
    assert repr(check_double(lambda x: None)) == "Not attempted yet."
    assert check_double(None).passed is None
    assert "ZeroDivisionError" in check_double(lambda x: x / 0).message


def test_a_class_is_handed_on_as_it_is():
    @exercise
    def check_class(Attempt):
        return attempted(Attempt().x)

    assert check_class(type("A", (), {"x": "fine"})).message == "fine"
    assert check_class(type("A", (), {"x": None})).passed is None
