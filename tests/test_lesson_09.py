"""Lesson 09: what its notebook defines, against independent ways to compute it."""

import torch
from helpers.lessons import NOTEBOOKS, SOLUTIONS, definitions
from torch.nn.utils.rnn import pad_sequence

from blip2_edu.language import positions

LESSON = definitions(NOTEBOOKS / "09_soft_prompts.ipynb")
SOLVED = definitions(SOLUTIONS / "09_soft_prompts.ipynb")


def test_nearest_tokens_finds_a_word_by_its_direction_alone():
    words = torch.randn(50, 8)
    values, tokens = LESSON["nearest_tokens"](7.0 * words[[3, 41]], words, k=2)
    assert tokens[:, 0].tolist() == [3, 41]
    torch.testing.assert_close(values[:, 0], torch.ones(2))
    assert (values[:, 0] > values[:, 1]).all()


def test_the_fingerprint_sees_one_changed_number():
    network = torch.nn.Linear(3, 2)
    before = LESSON["fingerprint"](network)
    assert LESSON["fingerprint"](network) == before
    with torch.no_grad():
        network.weight[1, 2] += 1e-7
    assert LESSON["fingerprint"](network) != before


def test_the_solutions_are_what_the_package_does():
    rows = [torch.randn(length, 4) for length in (3, 1, 6)]
    embeddings, mask = SOLVED["pad_left"](rows)
    assert torch.equal(embeddings, pad_sequence(rows, batch_first=True, padding_side="left"))
    assert torch.equal(SOLVED["positions_of"](mask), positions(mask))
