"""Lesson 10, stage 2: what learns, exact match, the score of a beam, the nucleus."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from blip2_edu.exercises import exercise, expect, noise


class Bridge(nn.Module):
    """Parts named as BLIP-2's; one name contains that of another part."""

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = nn.ModuleDict({"qformer_like": nn.Linear(2, 2)})
        self.qformer = nn.ModuleDict({"norm": nn.LayerNorm(2), "dense": nn.Linear(2, 2)})
        self.language_projection = nn.Linear(2, 3).requires_grad_(False)
        self.language_model = nn.Linear(3, 5)


@exercise
def check_freeze_all_but(freeze_all_but: Callable[[nn.Module, tuple[str, ...]], list[str]]) -> str:
    """freeze_all_but(model, parts) -> names of the parameters that learn, in the model's order."""
    model, parts = Bridge(), ("qformer", "language_projection")
    names = list(freeze_all_but(model, parts))
    learns = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    everything = [name for name, _ in model.named_parameters()]
    right = [name for name in everything if name.split(".")[0] in parts]
    expect(learns, "nothing learns any more: the chosen parts must not be frozen")
    expect(
        not set(learns) & {name for name in everything if "language_model" in name},
        "the language model still learns: it must be frozen",
    )
    expect(
        "image_encoder.qformer_like.weight" not in learns,
        "a layer of the image encoder learns: compare the whole name of the part, not a piece",
    )
    expect(
        "language_projection.weight" in learns,
        "the projection was frozen before and still is: set requires_grad to True for what learns",
    )
    expect(learns == right, f"these should learn: {', '.join(right)}")
    expect(names == learns, "the right parameters learn, but the names you return are others")
    return "Q-Former and projection learn, and nothing else."


@exercise
def check_exact_match(exact_match: Callable[[list[str], list[str]], float]) -> str:
    """exact_match(answers, truths) -> percent."""

    def share(answer: str, truth: str) -> float:
        return float(exact_match([answer, "no"], [truth, "yes"]))

    expect(share("blue", "blue") != 0.5, "the share should be in percent: 50, not 0.5")
    expect(share("blue", "blue") == 50, "one of two is right: that is 50 percent")
    expect(share("Blue", "blue") == 50, "case should not matter")
    expect(share("blue", "Blue") == 50, "the right answers must be made alike as well")
    expect(share("blue.", "blue") == 50, "punctuation should not matter")
    expect(share("a  star ", "a star") == 50, "more spaces than one are one space")
    expect(share("the star", "star") == 50, "articles should not matter")
    expect(share("str", "star") == 0, "you removed letters inside words: articles are whole words")
    expect(share("a red star", "star") == 0, "an answer that contains the right one is not it")
    expect(share("red star", "star red") == 0, "the order of words counts")
    return "alike but for case, punctuation, articles and spaces."


@exercise
def check_beam_score(beam_score: Callable[[Tensor, float], float]) -> str:
    """beam_score(log_probabilities (T,), length_penalty) -> one number."""
    values = -noise(5).abs() - 0.1
    total, length = values.sum().item(), len(values)

    def near(found: float, expected: float) -> bool:
        return abs(float(found) - expected) < 1e-4 * max(1, abs(expected))

    doubled = beam_score(values, 2.0)
    expect(not near(doubled, total * length**2), "you multiplied: divide by length ** penalty")
    expect(not near(doubled, total / length), "the penalty changes nothing: it is an exponent")
    expect(not near(doubled, total / (2 * length)), "the penalty is an exponent, not a factor")
    expect(not near(doubled, (total / length) ** 2), "raise the length to the power, not the mean")
    expect(
        not near(doubled, values.exp().sum().item() / length**2),
        "these are probabilities: sum their logarithms",
    )
    for penalty in (2.0, 1.0, 0.0, -1.0):
        expect(
            near(beam_score(values, penalty), total / length**penalty),
            f"for penalty {penalty} it should be sum / length ** {penalty}",
        )
    return "the sum of logarithms, tempered by length."


@exercise
def check_nucleus(nucleus: Callable[[Tensor, float], Tensor]) -> str:
    """nucleus(probabilities (V,), top_p) -> boolean mask (V,)."""
    known = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    mask = nucleus(known, 0.6)
    expect(mask.shape == known.shape, f"the shape should be {tuple(known.shape)}")
    expect(mask.dtype == torch.bool, "the mask should be boolean")
    expect(mask.any(), "nothing is left: top_p is a share of all probability, not of one token's")
    expect(
        mask.tolist() != [False, True, False, False, False],
        "the token that crosses the line is missing: 0.4 alone is less than 0.6",
    )
    expect(
        mask.tolist() != [True, True, True, False, False],
        "you added up in the given order: sort by probability first",
    )
    expect(
        mask.tolist() != [True, True, False, False, False],
        "this mask is still sorted: put it back into the order of the vocabulary",
    )
    expect(
        mask.tolist() == [False, True, False, True, False],
        "of 0.1, 0.4, 0.05, 0.3, 0.15 the nucleus of 0.6 is 0.4 and 0.3",
    )
    expect(nucleus(known, 0.1).sum() == 1, "with a small top_p the likeliest token alone is left")
    for top_p in (0.3, 0.72, 0.95):
        random = (2 * noise(40)).softmax(dim=0)
        values, order = random.sort(descending=True)
        right = torch.zeros(40, dtype=torch.bool)
        right[order[values.cumsum(dim=0) - values < top_p]] = True
        expect(
            torch.equal(nucleus(random, top_p), right), f"wrong for top_p = {top_p} of 40 tokens"
        )
    return "the smallest set of likeliest tokens that reaches top_p."
