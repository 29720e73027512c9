"""A tiny real model, for tokens that must not depend on who schedules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.schedulers.test_composed import Keep, run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer of one word per id."""
    import tokenizers
    from tests.torch.models import llama
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    where = tmp_path_factory.mktemp("tiny")
    llama(3).save_pretrained(where)
    words = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w96", unk_token="w0").save_pretrained(where)
    return where


@pytest.fixture
def real(tiny: Path) -> Callable[..., Keep]:
    """Serve the requests of ``test_composed`` with it under a scheduler; more settings of its executor."""

    def make(scheduler: Any, **executor: Any) -> Keep:
        return run(
            scheduler=scheduler,
            kernel="sdpa",
            executor={"name": "torch", "num_kv_pages": 26, **executor},
            engine={"max_model_len": 96},
            model={"name": "t", "source": "path", "path": str(tiny), "dtype": "float64"},
        )

    return make
