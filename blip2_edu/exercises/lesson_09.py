"""Lesson 09, soft prompts: labels, left padding, positions, one step of prompt tuning."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from blip2_edu.exercises import attempted, exercise, expect, noise


@exercise
def check_labels_of_row(labels_of_row: Callable[[int, list[int], int], list[int]]) -> str:
    """labels_of_row(prompt_length, text_ids, end_id) -> labels of prompt, text and end."""
    length, text, end = 5, [17, 4, 99], 2
    labels = list(labels_of_row(length, text, end))
    expect(
        labels.count(-100) > 0, "nothing is -100: the model would be asked which token a query is"
    )
    expect(
        labels != [-100] * length + text, "the end token is missing: the model never learns to stop"
    )
    expect(
        labels != [-100] * (length + 1) + text[1:] + [end],
        "the first token of the text is not scored: the prompt has to predict it",
    )
    expect(
        labels != [-100] * (length - 1) + text + [end],
        "you shifted by one already; the loss does that itself",
    )
    right = [-100] * length + text + [end]
    expect(
        len(labels) == len(right), f"the row has {len(right)} positions, your labels {len(labels)}"
    )
    expect(labels == right, f"for a prompt of 5, text {text} and end 2 they are {right}")
    return "only the text and its end are learned."


@exercise
def check_pad_left(pad_left: Callable[[list[Tensor]], tuple[Tensor, Tensor]]) -> str:
    """pad_left(rows of (L_i, E)) -> embeddings (B, L, E) and mask (B, L)."""
    rows = [noise(length, 6) for length in (2, 5, 3)]
    embeddings, mask = pad_left(rows)
    attempted(embeddings)
    expect(embeddings.shape == (3, 5, 6), f"(3, 5, 6) is wanted, not {tuple(embeddings.shape)}")
    expect(mask.shape == (3, 5), f"the mask should be (3, 5), not {tuple(mask.shape)}")
    mask = mask.long()
    expect(
        mask[0].tolist() != [1, 1, 0, 0, 0],
        "this is padding on the right: a text would start behind a gap",
    )
    expect(mask.tolist() != [[1, 1, 1, 0, 0]] + mask[1:].tolist(), "the mask is upside down")
    expect(mask[0].tolist() != [1] * 5, "the mask hides nothing: padding must be 0 in it")
    right = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    expect(torch.equal(mask, right), "the mask does not say where the real vectors are")
    for i, row in enumerate(rows):
        expect(
            torch.equal(embeddings[i, 5 - len(row) :], row),
            "the mask is right, but the vectors are not where it says they are",
        )
    return "real vectors at the end, padding in front."


@exercise
def check_positions_of(positions_of: Callable[[Tensor], Tensor]) -> str:
    """positions_of(mask (B, L)) -> positions (B, L), 0 at the first real vector."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    found = positions_of(mask)
    expect(found.shape == mask.shape, f"the shape should stay {tuple(mask.shape)}")
    expect((found >= 0).all(), "padding got a negative position: no embedding has that")
    real = [row[kept.bool()].tolist() for row, kept in zip(found, mask, strict=True)]
    expect(real[0] != [2, 3, 4], "you counted the padding: the first real vector has position 0")
    expect(real[1] != [1, 2, 3, 4, 5], "you count from 1; positions start at 0")
    expect(
        real == [[0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3]],
        f"a row with 3 real vectors behind 2 of padding should have 0, 1, 2; you have {real[0]}",
    )
    return "what is real is counted, from 0."


@exercise
def check_prompt_step(
    prompt_step: Callable[[Callable[[Tensor], Tensor], Tensor, float], Tensor],
) -> str:
    """prompt_step(loss_of, prompt (1, Q, E), learning_rate) -> the prompt one step further."""
    model = nn.Linear(4, 1)  # stands for the frozen language model
    prompt = noise(1, 3, 4)
    before = prompt.clone()

    def loss_of(prompt: Tensor) -> Tensor:
        return model(prompt).square().mean()

    after = prompt_step(loss_of, prompt, 0.1)
    expect(torch.equal(prompt, before), "the prompt you were given has changed: work on a clone")
    expect(
        all(p.grad is None for p in model.parameters()),
        "the model's parameters got gradients: ask for the prompt's alone",
    )
    expect(after.shape == prompt.shape, f"the shape should stay {tuple(prompt.shape)}")
    expect(not after.requires_grad, "a graph hangs behind the result: detach it")
    moving = before.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(moving), moving)
    expect(not torch.allclose(after, before), "the prompt has not moved")
    expect(
        not torch.allclose(after, before + 0.1 * gradient),
        "this goes uphill: subtract the gradient",
    )
    expect(not torch.allclose(after, before - gradient), "you left out the learning rate")
    expect(torch.allclose(after, before - 0.1 * gradient), "this is not prompt - rate x gradient")
    return "one step downhill, and nothing else moved."
