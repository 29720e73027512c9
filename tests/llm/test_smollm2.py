"""``LLM()`` as it comes, and the how-to, with real weights; skipped if they cannot be had."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from servelab import LLM, SamplingParams
from servelab.core.errors import ServeLabError

FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module", autouse=True)
def _weights() -> None:
    from importlib.resources import files

    import yaml

    from servelab.core.config import ModelConfig
    from servelab.plugins.executors.checkpoint.find import find

    text = files("servelab.configs").joinpath("model/smollm2_135m.yaml").read_text(encoding="utf-8")
    try:
        find(ModelConfig.model_validate(yaml.safe_load(text)))
    except ServeLabError as exc:
        if "could not be downloaded" not in exc.what and "pip is not installed" not in exc.what:
            raise
        pytest.skip(f"{exc.what}: {exc.why}")


def test_as_it_comes() -> None:
    with LLM() as llm:
        assert llm.max_model_len == 8192
        greedy = SamplingParams(temperature=0, max_tokens=16)
        [one] = llm.generate("The capital of France is", greedy)
        assert one.text.startswith(" Paris.")
        [answer] = llm.chat([{"role": "user", "content": "What is the capital of France?"}], greedy)
        assert (answer.text, answer.finish_reason) == ("The capital of France is Paris.", "stop")
        chunks = list(llm.stream("The capital of France is", greedy))
        assert "".join(chunk.text for chunk in chunks) == one.text


def test_the_how_to_runs(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (repository / "docs/howto/use_from_python.md").read_text(encoding="utf-8")
    blocks = FENCE.findall(page)
    assert len(blocks) >= 5
    space: dict[str, Any] = {"__name__": "shown"}
    for code in blocks:
        exec(compile(code, "use_from_python.md", "exec"), space)
    assert "Paris" in capsys.readouterr().out
