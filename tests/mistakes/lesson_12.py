import math
from html import escape
from statistics import mean, median


def timed(work, times, clock):
    taken = []
    for _ in range(times):
        start = clock()
        work()
        taken.append(clock() - start)
    return taken


def softmax(scores):
    powers = [math.exp(score) for score in scores]
    return [power / sum(powers) for power in powers]


MISTAKES = {
    "check_bar_widths": [
        (softmax, "in percent"),
        (lambda scores: [100 * s / sum(scores) for s in scores], "divided the scores"),
        (lambda scores: [100 * share for share in softmax(scores)], "subtract the largest"),
        (lambda scores: [25.0] * 4, "not a softmax"),
    ],
    "check_paragraph": [
        (lambda q, a: f"<p><b>{q}</b><br>{a}</p>", "in the question"),
        (lambda q, a: f"<p><b>{escape(q)}</b><br>{a}</p>", "in the answer"),
        (lambda q, a: f"<p><b>{escape(escape(q))}</b><br>{escape(a)}</p>", "escaped twice"),
        (lambda q, a: escape(f"<p><b>{q}</b><br>{a}</p>"), "should be <p><b>"),
    ],
    "check_median_latency": [
        (lambda work, times, clock: median(timed(work, times, clock)), "is missing"),
        (lambda work, times, clock: (work(), mean(timed(work, times, clock)))[1], "is the mean"),
        (lambda work, times, clock: median(timed(work, times + 1, clock)), "was counted"),
    ],
}
