"""Quality of quantized models: figures against transformers in float64, and the runs that report them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from math import exp
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from tests.metrics.schema import problems
from tests.torch.models import llama, widen
from tests.torch.quantizers import Plain

from servelab.core.compose import Run, compose
from servelab.core.config import QualityConfig, validate
from servelab.core.corpus import part
from servelab.core.errors import CapabilityError, ConfigError, ServeLabError
from servelab.core.hookspecs import hookimpl
from servelab.core.quality import Comparison, Tally, evaluation_windows
from servelab.core.records import QualityBegan, QualityMeasured, Record, RunFinished
from servelab.core.registry import Registry
from servelab.core.spec import PluginSpec

VOCAB = 97


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama whose tokenizer has one token per byte value below 97 (others are unknown)."""
    import tokenizers
    from tokenizers import Regex, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    where = tmp_path_factory.mktemp("tiny")
    llama(3).save_pretrained(where)
    words = tokenizers.Tokenizer(models.WordLevel({chr(32 + i): i for i in range(VOCAB)}, unk_token=" "))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="~", unk_token=" ").save_pretrained(where)
    return where


class Keep:
    def __init__(self, stop_after: int = 0) -> None:
        self.records: list[Record] = []
        self.stop_after = stop_after

    @hookimpl
    def servelab_on_record(self, record: Record) -> None:
        self.records.append(record)
        if self.stop_after and len(self.of(QualityMeasured)) == self.stop_after:
            self.stop_after = 0
            raise KeyboardInterrupt

    def of(self, kind: type[Record]) -> list[Any]:
        return [r for r in self.records if isinstance(r, kind)]


class Weakly:
    """Two short requests."""

    def __init__(self) -> None:
        from tests.torch.test_executor import Given

        self._given = Given([(1, 2, 3, 4, 5), tuple(range(17))], None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._given, name)


@pytest.fixture
def composed(folder: Path, tmp_path: Path) -> Iterator[Any]:
    runs: list[Run] = []

    def make(plain: Plain | None = None, stop_after: int = 0, **sections: Any) -> tuple[Run, Keep]:
        registry, keep = Registry.load(), Keep(stop_after)
        provides = frozenset({"workload.prompt_ids", "workload.truth"})
        given = PluginSpec(name="given", factory="t:g", provides=provides)
        registry.add("workload", given, factory=lambda c, x: Weakly())
        registry.add("observer", PluginSpec(name="keep", factory="t:k"), factory=lambda c, x: keep)
        if plain is not None:
            registry.add("quant", PluginSpec(name="plain", factory="t:p"), factory=lambda c, x: plain)
            sections.setdefault("quant", "plain")
        raw = {
            "scheduler": "vllm_v1",
            "kvcache": "paged",
            "kernel": "sdpa",
            "cost": "scripted",
            "executor": {"name": "torch", "num_kv_pages": 32},
            "workload": "given",
            "task": "bench",
            "observers": ["report", "keep"],
            "clock": {"name": "virtual"},
            "model": {"name": "tiny", "source": "path", "path": str(folder), "dtype": "float64"},
            "quality": {"max_tokens": 600, "window": 100},
            **sections,
        }
        run = compose(validate(raw, registry), registry, run_dir=tmp_path)
        runs.append(run)
        return run, keep

    yield make
    for run in runs:
        run.executor.close()


def noisy(w: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(w.shape[0])
    return w * (1 + 0.05 * torch.randn(w.shape, generator=generator, dtype=w.dtype))


# ------------------------------------------------------------------ figures


def test_figures_are_those_of_transformers(composed: Any, folder: Path) -> None:
    """KL, agreement and perplexity by their definitions, from transformers' logits in float64."""
    from transformers import AutoModelForCausalLM

    run, _ = composed(Plain(noisy))
    windows = [[Random(i).randrange(VOCAB) for _ in range(n)] for i, n in enumerate((100, 57, 2))]
    found = list(run.executor.compare({"a": run.quantizer}, windows))
    reference = widen(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    other = widen(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if name.endswith("proj.weight"):
                weight.copy_(noisy(weight))
    for ids, compared in zip(windows, found, strict=True):
        with torch.inference_mode():
            p, q = (m(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for m in (reference, other))
        truth = torch.tensor(ids[1:])[:, None]
        one = compared["a"]
        assert one.kl == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), abs=1e-9)
        assert one.agreements == int((p.argmax(-1) == q.argmax(-1)).sum())
        assert one.nll == pytest.approx(-float(q.gather(-1, truth).sum()))
        assert one.reference_nll == pytest.approx(-float(p.gather(-1, truth).sum()))
        assert len(one.kl) == len(ids) - 1


def test_a_tally_adds_windows_up() -> None:
    tally = Tally()
    tally.add(Comparison(kl=[0.1, 0.3], agreements=1, nll=4.0, reference_nll=2.0))
    tally.add(Comparison(kl=[0.2], agreements=1, nll=2.0, reference_nll=1.0))
    figures = tally.figures()
    assert (figures["tokens"], figures["windows"]) == (3, 2)
    assert figures["kl_mean"] == pytest.approx(0.2)
    assert figures["kl_max"] == 0.3
    assert figures["kl_p99"] == pytest.approx(0.2 + 0.98 * 0.1)
    assert figures["top1_agreement"] == pytest.approx(2 / 3)
    assert (figures["perplexity"], figures["reference_perplexity"]) == pytest.approx((exp(2), exp(1)))


class Letters:
    """One token per character."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


@pytest.mark.parametrize(
    ("max_tokens", "window", "longest", "expected"),
    [
        (8192, 1024, 4096, (8, 1024)),
        (8192, 1024, 256, (32, 256)),
        (500, 1024, 4096, (1, 500)),
        (2, 16, 9, (1, 2)),
    ],
)
def test_windows(max_tokens: int, window: int, longest: int, expected: tuple[int, int]) -> None:
    config = QualityConfig(max_tokens=max_tokens, window=window)
    windows = evaluation_windows(Letters(), config, longest)  # type: ignore[arg-type]
    assert (len(windows), len(windows[0])) == expected
    assert {len(w) for w in windows} == {expected[1]}
    whole = "\n\n".join(topic.text for topic in part("evaluation"))
    at = [whole.index("".join(map(chr, w))) for w in windows]
    assert at == sorted(at) and all(b - a >= expected[1] for a, b in pairwise(at))
    if len(at) > 1:
        assert at[-1] > len(whole) * (1 - 1.5 / len(at)), "spread over the whole text"


def test_all_of_the_text_at_most() -> None:
    whole = "\n\n".join(topic.text for topic in part("evaluation"))
    windows = evaluation_windows(Letters(), QualityConfig(max_tokens=10**9, window=1000), 10**6)  # type: ignore[arg-type]
    assert len(windows) == len(whole) // 1000


def test_a_window_of_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2: the first token is not predicted"):
        QualityConfig(max_tokens=1)
    with pytest.raises(ConfigError, match="windows of 1 tokens"):
        evaluation_windows(Letters(), QualityConfig(), 1)  # type: ignore[arg-type]


# ------------------------------------------------------------------ runs


def test_a_quantized_run_reports_its_quality(composed: Any, tmp_path: Path, capsys: Any) -> None:
    run, keep = composed(Plain(noisy))
    run.task.run(run)
    measured = keep.of(QualityMeasured)
    assert [m.windows for m in measured] == list(range(1, 7))
    assert measured[-1].tokens == measured[-1].total == 6 * 99
    assert keep.records.index(measured[0]) > max(i for i, r in enumerate(keep.records) if r.ev == "finished")
    result = json.loads((tmp_path / "results.json").read_text())
    quality = result["servelab"]["quality"]["plain"]
    assert quality["kl_mean"] == measured[-1].kl_mean > 0
    assert quality["linear_bytes"] == quality["reference_linear_bytes"]
    assert problems(result) == []
    assert "reference_weights: none" in result["servelab"]["stamps"]
    info = result["servelab"]["info"]
    assert result["tokenizer_id"] == info["model"] == info["tokenizer"]
    assert info["quality"]["corpus"]["part"] == "evaluation"
    out = capsys.readouterr().out
    assert "Reference weights: none" in out and "flatter" not in out
    row = next(line for line in out.splitlines() if line.startswith("  plain"))
    assert f"{measured[-1].kl_mean:.5f}" in row and "594" in row


def test_weights_as_they_are_have_no_divergence(composed: Any) -> None:
    run, keep = composed(Plain())
    run.task.run(run)
    last = keep.of(QualityMeasured)[-1]
    assert (last.kl_max, last.top1_agreement) == (pytest.approx(0, abs=1e-12), 1.0)
    assert last.perplexity == pytest.approx(last.reference_perplexity)


def test_an_unquantized_run_measures_nothing(composed: Any, capsys: Any) -> None:
    run, keep = composed()
    run.task.run(run)
    assert not keep.of(QualityMeasured)
    assert "quality" not in run.info and "quality" not in capsys.readouterr().out


def test_measuring_can_be_switched_off(composed: Any, tmp_path: Path, capsys: Any) -> None:
    run, keep = composed(Plain(), quality={"max_tokens": 0})
    run.task.run(run)
    assert not keep.of(QualityMeasured)
    result = json.loads((tmp_path / "results.json").read_text())
    assert problems(result) == []
    assert result["servelab"]["info"]["quality"]["why"] == "quality.max_tokens=0"
    assert "quality: not measured (quality.max_tokens=0)" in capsys.readouterr().out


def test_it_says_when_it_begins_and_nothing_where_nobody_listens(composed: Any) -> None:
    run, keep = composed(Plain(noisy))
    run.task.run(run)
    (began,) = keep.of(QualityBegan)
    assert (began.labels, began.total) == (["plain"], 594)
    run, _ = composed(Plain(noisy), observers=[])
    run.executor.compare = None
    run.task.run(run)


def test_figures_are_made_so_many_times_at_most(composed: Any) -> None:
    run, keep = composed(Plain(), quality={"max_tokens": 60 * 16, "window": 16})
    run.task.run(run)
    measured = keep.of(QualityMeasured)
    assert 20 <= len(measured) <= 50
    assert (measured[-1].windows, measured[-1].tokens) == (60, 60 * 15)


def test_prices_that_do_not_know_the_quantizer_are_stamped(composed: Any) -> None:
    virtual, _ = composed(Plain())
    wall, _ = composed(Plain(), clock={"name": "wall"})
    stamp = "prices: cost 'scripted' prices quantized linears as unquantized ones"
    assert stamp in virtual.info["stamps"] and stamp not in wall.info["stamps"]


def test_stopped_while_measuring_the_serving_is_kept(composed: Any, tmp_path: Path, capsys: Any) -> None:
    run, keep = composed(Plain(noisy), stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        run.task.run(run)
    (end,) = keep.of(RunFinished)
    assert end.status == "interrupted"
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["completed"] == 2
    assert result["servelab"]["quality"]["plain"]["tokens"] == 2 * 99
    assert "198 of 594" in capsys.readouterr().out


def test_logits_that_are_not_numbers_are_named(composed: Any) -> None:
    run, _ = composed(Plain(lambda w: w * torch.inf))
    run.task.config = None
    with pytest.raises(ServeLabError) as error:
        for window in run.executor.compare({"broken": run.quantizer}, [[1, 2, 3]]):
            from servelab.core.quality import _check

            _check("broken", window["broken"])
    assert "quantizer 'broken' gives logits that are not numbers" in str(error.value)


# ------------------------------------------------------------------ composition


def test_a_format_that_nobody_runs_is_refused_before_weights_are_read(composed: Any) -> None:
    plain = Plain()
    plain.reason = "its codes are for another device"
    model = {"name": "tiny", "source": "path", "path": "/nowhere", "dtype": "float64"}
    shape = {"layers": 1, "hidden": 8, "heads": 1, "kv_heads": 1, "head_dim": 8, "ffn": 8, "vocab": 9}
    with pytest.raises(CapabilityError, match="nobody runs the format w64a16 of quant 'plain'") as error:
        composed(plain, model={**model, **shape, "max_position": 64})
    assert "q_proj, 8 outputs of 8 inputs" in str(error.value)
    assert "its codes are for another device" in str(error.value)


@pytest.mark.parametrize("needs", ["quant.calibrated", "quant.transform", "quant.streams"])
def test_what_the_executor_does_not_do_yet_is_refused(composed: Any, needs: str) -> None:
    registry = Registry.load()
    spec = PluginSpec(name="wants", factory="t:w", provides=frozenset({needs}))
    registry.add("quant", spec, factory=lambda c, x: Plain())
    raw = {
        "scheduler": "vllm_v1",
        "kvcache": "paged",
        "kernel": "sdpa",
        "cost": "scripted",
        "executor": "torch",
        "workload": "chat",
        "task": "bench",
        "model": {"name": "tiny", "source": "path", "path": "/nowhere"},
        "quant": "wants",
    }
    with pytest.raises(CapabilityError, match=f"executor 'torch' conflicts with '{needs}'"):
        compose(validate(raw, registry), registry)


# ------------------------------------------------------------------ task=quality


def test_several_quantizers_as_one_table_and_one_plot(composed: Any, tmp_path: Path, capsys: Any) -> None:
    task = {"name": "quality", "quantizers": ["w8a16", {"name": "w4a16", "group_size": [16]}, "w8a8"]}
    run, keep = composed(task=task)
    worst = run.task.run(run)
    last = {r.label: r for r in keep.of(QualityMeasured)}
    assert list(last) == ["w8a16", "w4a16 (group_size=[16])", "w8a8"]
    assert worst == max(r.kl_mean for r in last.values())
    assert last["w8a16"].kl_mean < last["w8a8"].kl_mean < last["w4a16 (group_size=[16])"].kl_mean
    assert last["w8a16"].linear_bytes < last["w8a16"].reference_linear_bytes / 7  # of float64
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "latency" not in out
    assert all(any(line.startswith(f"  {label}") for line in out.splitlines()) for label in last)
    result = json.loads((tmp_path / "results.json").read_text())
    assert problems(result) == []
    info = result["servelab"]["info"]
    assert info["quality"]["quantizers"]["w4a16 (group_size=[16])"]["group_size"] == [16]


def test_the_task_needs_no_memory_for_the_longest_request(composed: Any) -> None:
    """It serves nothing."""
    few = {"name": "torch", "num_kv_pages": 1}
    with pytest.raises(CapabilityError, match="KV memory cannot hold one request"):
        composed(executor=few)
    run, keep = composed(executor=few, task={"name": "quality", "quantizers": ["w8a16"]})
    run.task.run(run)
    assert keep.of(QualityMeasured)[-1].tokens == 594


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"task": {"name": "quality", "quantizers": ["w8a16", "w8a16"]}}, "w8a16 is listed twice"),
        ({"task": {"name": "quality", "quantizers": ["w8a17"]}}, "unknown quant 'w8a17'"),
        (
            {"task": {"name": "quality", "quantizers": [{"name": "w4a16", "group_size": 0}]}},
            r"task.quantizers\[0\].group_size: .* 2, 4, 6",
        ),
        (
            {"task": {"name": "quality", "quantizers": [{"name": "w4a16", "group_size": 128}]}},
            "no group size divides the inputs of model.layers.0.self_attn.q_proj",
        ),
        ({"task": "quality", "quant": "w8a16"}, "task 'quality' compares task.quantizers"),
        ({"task": "quality", "quality": {"max_tokens": 0}}, "nothing to read"),
    ],
)
def test_what_task_quality_refuses(composed: Any, sections: dict[str, Any], message: str) -> None:
    run, keep = composed(**sections)
    closed: list[bool] = []
    close, run.executor.close = run.executor.close, lambda: closed.append(True)
    with pytest.raises(ConfigError, match=message):
        run.task.run(run)
    assert closed == [True] and not keep.records, "refused before anything ran"
    run.executor.close = close
