"""What goes wrong with a model's files."""

from __future__ import annotations

import importlib
from types import ModuleType

from servelab.core.errors import ServeLabError

OTHER_SOURCES = (
    "or take the model from the Hugging Face hub (model.source=hub, with model.repo); "
    "or from files of your own (model=local model.path=FOLDER_OR_GGUF)"
)
"""The two remedies left when one way of getting a model is closed."""


class ModelError(ServeLabError):
    """A model's files are missing, damaged, or hold what we do not support."""


def library(name: str, *, why: str) -> ModuleType:
    """A third-party module, imported when it is first needed.

    Raises:
        ModelError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        raise ModelError(
            f"the Python package {exc.name} is not installed",
            where="model",
            why=why,
            do='pip install -c constraints.txt -e ".[run]"   (in the checkout)',
        ) from exc
