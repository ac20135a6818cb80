"""Wrong attempts at the exercises of lesson 10, and words that their verdicts must hold."""

import re

import torch


def learning(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def freeze_by(chosen, back=True):
    def freeze(model, parts):
        for name, parameter in model.named_parameters():
            if back or not chosen(name, parts):
                parameter.requires_grad_(chosen(name, parts))
        return learning(model)

    return freeze


def by_part(name, parts):
    return name.split(".")[0] in parts


def right_but_named_wrong(model, parts):
    freeze_by(by_part)(model, parts)
    return list(parts)


def match_by(same, factor=100):
    def exact_match(answers, truths):
        pairs = list(zip(answers, truths, strict=True))
        return factor * sum(same(a, t) for a, t in pairs) / len(pairs)

    return exact_match


def bare(text):
    return " ".join(re.sub(r"[^\w\s]", "", text.lower()).split())


def without_letters(text):
    return bare(text).replace("the", "").replace("an", "").replace("a", "").strip()


def without_articles(text):
    return [word for word in bare(text).split() if word not in ("a", "an", "the")]


def nucleus_by(inside, sort=True, back=True):
    def nucleus(p, top_p):
        values, order = p.sort(descending=True) if sort else (p, torch.arange(len(p)))
        kept = inside(values, top_p)
        if not back:
            return kept
        mask = torch.zeros_like(kept)
        mask[order[kept]] = True
        return mask

    return nucleus


def until_crossed(values, top_p):
    return values.cumsum(dim=0) - values < top_p


MISTAKES = {
    "check_freeze_all_but": [
        (lambda model, parts: learning(model), "the language model still learns"),
        (freeze_by(lambda name, parts: False), "nothing learns"),
        (freeze_by(lambda name, parts: any(p in name for p in parts)), "not a piece"),
        (freeze_by(by_part, back=False), "was frozen before"),
        (
            freeze_by(lambda name, parts: by_part(name, parts) and "norm" not in name),
            "should learn",
        ),
        (right_but_named_wrong, "names you return"),
    ],
    "check_exact_match": [
        (match_by(lambda a, t: a == t, 1), "in percent"),
        (match_by(lambda a, t: True), "one of two"),
        (match_by(lambda a, t: a == t), "case"),
        (match_by(lambda a, t: a.lower() == t), "right answers must be made alike"),
        (match_by(lambda a, t: a.lower() == t.lower()), "punctuation"),
        (match_by(lambda a, t: re.sub(r"[.]", "", a.lower()) == t.lower()), "one space"),
        (match_by(lambda a, t: bare(a) == bare(t)), "articles should not matter"),
        (match_by(lambda a, t: without_letters(a) == without_letters(t)), "inside words"),
        (match_by(lambda a, t: set(without_articles(t)) <= set(without_articles(a))), "contains"),
        (match_by(lambda a, t: set(without_articles(t)) == set(without_articles(a))), "order"),
    ],
    "check_beam_score": [
        (lambda x, p: x.sum() * len(x) ** p, "you multiplied"),
        (lambda x, p: x.mean(), "changes nothing"),
        (lambda x, p: x.sum() / (p * len(x)), "not a factor"),
        (lambda x, p: x.mean() ** p, "not the mean"),
        (lambda x, p: x.exp().sum() / len(x) ** p, "probabilities"),
        (lambda x, p: x.sum() - p * len(x), "should be sum"),
    ],
    "check_nucleus": [
        (lambda p, top_p: p >= top_p, "nothing is left"),
        (lambda p, top_p: p.sort(descending=True).values[:2], "the shape"),
        (lambda p, top_p: (p > 0.2).float(), "boolean"),
        (nucleus_by(lambda v, top_p: v.cumsum(dim=0) <= top_p), "crosses the line"),
        (nucleus_by(until_crossed, back=False), "still sorted"),
        (nucleus_by(lambda v, top_p: v.cumsum(dim=0) <= top_p, sort=False), "given order"),
        (lambda p, top_p: p > 0.2, "with a small top_p"),
    ],
}
