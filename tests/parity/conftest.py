"""The tiny model that both executors are told about."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="one side of the comparison runs a model with torch")
pytest.importorskip("tokenizers", reason="the model has a tokenizer")

from servelab.core.testing.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
