"""Lesson 12: what its notebook defines does what the lesson says."""

import io

from helpers.lessons import NOTEBOOKS, definitions
from PIL import Image


def test_the_notebook_times_the_median_and_not_the_first_call():
    median_seconds = definitions(NOTEBOOKS / "12_live_demo.ipynb")["median_seconds"]
    calls = []
    assert 0 <= median_seconds(lambda: calls.append(1), times=5) < 1
    assert len(calls) == 6


def test_a_file_is_made_of_an_image():
    file_of = definitions(NOTEBOOKS / "12_live_demo.ipynb")["file_of"]
    data = file_of(Image.new("RGB", (4, 3)), format="PNG")
    assert Image.open(io.BytesIO(data)).size == (4, 3)
