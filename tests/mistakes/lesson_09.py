import torch
from torch.nn.utils.rnn import pad_sequence


def pad(side):
    def wrong(rows):
        mask = pad_sequence([torch.ones(len(r)) for r in rows], True, padding_side=side)
        return pad_sequence(rows, True, padding_side=side), mask

    return wrong


def vectors_right_mask_left(rows):
    return pad("right")(rows)[0], pad("left")(rows)[1]


def no_mask(rows):
    padded = pad("left")(rows)[0]
    return padded, torch.ones(padded.shape[:2])


def gradient_of(loss_of, prompt):
    moving = prompt.clone().requires_grad_()
    return torch.autograd.grad(loss_of(moving), moving)[0]


def all_gradients(loss_of, prompt, rate):
    moving = prompt.clone().requires_grad_()
    loss_of(moving).backward()
    return (moving - rate * moving.grad).detach()


def in_place(loss_of, prompt, rate):
    prompt -= rate * gradient_of(loss_of, prompt)
    return prompt


MISTAKES = {
    "check_labels_of_row": [
        (lambda n, text, end: [0] * n + text + [end], "which token a query is"),
        (lambda n, text, end: [-100] * n + text, "never learns to stop"),
        (lambda n, text, end: [-100] * (n - 1) + text + [end], "shifted by one already"),
        (lambda n, text, end: text + [end], "nothing is -100"),
        (lambda n, text, end: [-100] * (n + 1) + text[1:] + [end], "is not scored"),
    ],
    "check_pad_left": [
        (pad("right"), "padding on the right"),
        (vectors_right_mask_left, "not where it says"),
        (no_mask, "hides nothing"),
    ],
    "check_positions_of": [
        (lambda mask: torch.arange(mask.shape[1]).expand_as(mask), "counted the padding"),
        (lambda mask: mask.cumsum(dim=1), "count from 1"),
        (lambda mask: mask.cumsum(dim=1) - 1, "negative position"),
    ],
    "check_prompt_step": [
        (lambda f, p, rate: p + rate * gradient_of(f, p), "uphill"),
        (lambda f, p, rate: p - gradient_of(f, p), "learning rate"),
        (all_gradients, "parameters got gradients"),
        (in_place, "has changed"),
        (lambda f, p, rate: p.clone(), "has not moved"),
    ],
}
