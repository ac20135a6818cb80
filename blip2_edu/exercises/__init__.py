"""The checks behind the exercises, one module a lesson: they name the mistake, not only see it.

A blank exercise is "not attempted yet" and stops nothing, so that a lesson runs unsolved from top
to bottom. A check is written like this:

    @exercise
    def check_double(double: Callable[[Tensor], Tensor]) -> str:
        x = noise(4)
        expect(not same(double(x), x**2), "you squared instead of doubling")
        expect(same(double(x), x + x), "twice x is x + x")
        return "any number, doubled"

What is random in a check comes from `noise`, ids and orders too: `noise(5).argsort()`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_generator = torch.Generator()  # behind `noise`; every check starts it anew


@dataclass(frozen=True)
class Verdict:
    """`passed` is None where nothing was attempted; shown in a notebook as one line of text."""

    passed: bool | None
    message: str

    def __repr__(self) -> str:
        opening = {True: "Passed: ", False: "Not yet: ", None: ""}[self.passed]
        return opening + self.message


class Mistake(Exception):
    """An attempt is wrong; the message names the likely mistake."""


class NotAttempted(Exception):
    """A blank was left blank."""


def expect(condition: Any, mistake: str) -> None:
    """Go on if `condition` is true; else the verdict is "Not yet" with the words of `mistake`."""
    if not condition:
        raise Mistake(mistake)


def attempted(value: Any) -> Any:
    """Hand `value` on, unless it is what a blank leaves: None or `...`."""
    if value is None or value is ...:
        raise NotAttempted
    return value


def noise(*shape: int) -> Tensor:
    """Standard normal numbers: others at every call, and the same whenever the check runs again.

    The student's random numbers neither change them nor are changed.
    """
    return torch.randn(shape, generator=_generator)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in shape and, to 1e-5, in numbers."""
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-5)


def in_a_line(error: Exception) -> str:
    """The kind of an error and its message on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def exercise(check: Callable[[Any], str]) -> Callable[[Any], Verdict]:
    """Turn `check` into a function that always returns a Verdict, whatever the attempt does.

    check   gets the attempt, a value or a function whose results it may use at once (what returns
            None was not attempted; a class it calls itself, see `attempted`). It raises Mistake,
            mostly by `expect`, or returns what the attempt has shown.
    """

    @wraps(check)
    def checked(attempt: Any) -> Verdict:
        def call(*arguments: Any, **options: Any) -> Any:
            try:
                return attempted(attempt(*arguments, **options))
            except (NotAttempted, NotImplementedError):
                raise NotAttempted from None
            except Exception as error:  # the student's code may raise anything
                raise Mistake(f"your code stops with {in_a_line(error)}") from error

        try:
            is_function = callable(attempt) and not isinstance(attempt, type)
            _generator.manual_seed(0)
            # New layers and the student's code may draw as well. `torch.manual_seed` would seed the
            # GPUs, too, and their state is not put back.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                return Verdict(True, check(call if is_function else attempted(attempt)))
        except NotAttempted:
            return Verdict(None, "Not attempted yet.")
        except Mistake as mistake:
            return Verdict(False, str(mistake))
        except Exception as error:  # of what kind an answer is nobody can foresee
            return Verdict(False, f"what it gives cannot be used: {in_a_line(error)}")

    return checked
