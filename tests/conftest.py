"""What holds for all tests."""

import pytest

from blip2_edu import training


@pytest.fixture(autouse=True)
def train_in_float32(monkeypatch):
    """What a test compares with what does not hang on whether this processor knows bfloat16."""
    monkeypatch.setattr(training, "native_bfloat16", lambda device: False)
