"""Lesson 12, the live demo: bars, escaping, honest timing."""

import math
from collections.abc import Callable
from html import escape

from blip2_edu.exercises import Mistake, exercise, expect, noise


@exercise
def check_bar_widths(bar_widths: Callable[[list[float]], list[float]]) -> str:
    """bar_widths(scores) -> percentages, the softmax of the scores."""
    scores = (2 * noise(4)).tolist()
    widths = [float(width) for width in bar_widths(scores)]
    expect(len(widths) == 4, "give one width for each score")
    total = sum(widths)
    expect(abs(total - 1) > 1e-3, "these are shares; the widths are wanted in percent")
    powers = [math.exp(score) for score in scores]
    right = [100 * power / sum(powers) for power in powers]
    shares = [100 * score / sum(scores) for score in scores]
    close = all(abs(a - b) < 1e-6 for a, b in zip(widths, shares, strict=True))
    expect(not close, "you divided the scores by their sum; a softmax divides exponentials")
    expect(abs(total - 100) < 1e-6, f"the widths add up to {total:.1f}, not to 100")
    expect(
        all(abs(a - b) < 1e-6 for a, b in zip(widths, right, strict=True)),
        "the widths add up to 100 but are not a softmax of the scores",
    )
    try:
        large = [float(width) for width in bar_widths([1000.0, 999.0])]
    except Mistake:
        large = [math.nan, math.nan]
    right = 100 / (1 + math.exp(-1))
    expect(abs(large[0] - right) < 1e-6, "large scores overflow: subtract the largest one first")
    return "a softmax in percent that large scores do not break."


@exercise
def check_paragraph(paragraph: Callable[[str, str], str]) -> str:
    """paragraph(question, answer) -> HTML that shows both as they are."""
    plain = paragraph("What is it?", "a dog")
    expect(
        plain.replace(" ", "") == "<p><b>Whatisit?</b><br>adog</p>",
        f"for a plain question the paragraph should be <p><b>...</b><br>...</p>, not {plain}",
    )
    markup = "<i>R&B</i>"
    asked, answered = paragraph(markup, "dog"), paragraph("who", markup)
    expect("<i>" not in asked, "a tag in the question is obeyed instead of shown: escape it")
    expect("<i>" not in answered, "a tag in the answer is obeyed instead of shown: escape it, too")
    expect("&amp;lt;" not in asked + answered, "you escaped twice: the reader would see &lt;")
    right = escape(markup)
    expect(right in asked and right in answered, f"{markup} should be written {right}")
    return "what comes from outside is shown, never obeyed."


@exercise
def check_median_latency(
    median_latency: Callable[[Callable[[], None], int, Callable[[], float]], float],
) -> str:
    """median_latency(work, times, clock) -> median seconds of `times` calls after one more."""
    now, calls = 0.0, 0
    seconds = [50.0, 1.0, 9.0, 2.0, 3.0, 2.5]  # the first call is the slow one

    def work() -> None:
        nonlocal now, calls
        now += seconds[calls] if calls < len(seconds) else 1.0
        calls += 1

    measured = float(median_latency(work, 5, lambda: now))
    expect(calls != 5, "work() was called five times: the call without the clock is missing")
    expect(calls == 6, f"work() was called {calls} times; six are wanted, one without the clock")
    expect(
        abs(measured - 3.5) > 1e-9, "3.5 is the mean; one slow call moves it, so take the median"
    )
    expect(
        abs(measured - 2.75) > 1e-9, "the first, slow call was counted: start the clock after it"
    )
    expect(abs(measured - 2.5) < 1e-9, f"the median of 1, 9, 2, 3 and 2.5 is 2.5, not {measured}")
    return "one call to warm up, then the median."
