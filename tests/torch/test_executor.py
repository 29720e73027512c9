"""Whole runs of tiny random models: tokens do not depend on how they were scheduled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.torch.models import llama, widen

from servelab.core.compose import Run, compose
from servelab.core.config import validate
from servelab.core.errors import ConfigError, PluginError, ServeLabError, WorkloadError
from servelab.core.facts import ModelFacts
from servelab.core.hookspecs import hookimpl
from servelab.core.layout import KVLayout
from servelab.core.plan import Background, StepPlan, Tokens
from servelab.core.records import (
    Planned,
    Record,
    RequestFinished,
    RequestPreempted,
    StepDone,
    TokensEmitted,
    TransferEnded,
    TransferStarted,
)
from servelab.core.registry import Registry
from servelab.core.request import Arrival, RequestSpec, Truth
from servelab.core.sampling import SamplingParams
from servelab.core.spec import PluginSpec
from servelab.core.testing.fakes import RandomPlans
from servelab.plugins.executors.checkpoint import find
from servelab.plugins.kvcache.paged import Paged, PagedConfig

PROMPTS = (5, 17, 30, 1, 12, 44, 23, 9)
OUTPUTS = (12, 3, 20, 25, 1, 9, 16, 30)
SHAPE = {
    "name": "t",
    "layers": 3,
    "hidden": 48,
    "heads": 6,
    "kv_heads": 2,
    "head_dim": 8,
    "ffn": 80,
    "vocab": 97,
    "max_position": 256,
    "dtype": "float64",
}
"""The tiny model's, for executors that have no files to read it from."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama as transformers saves it, with a tokenizer of one word per id."""
    import tokenizers
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    where = tmp_path_factory.mktemp("tiny")
    model = llama(3)
    model.save_pretrained(where)
    words = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w96", unk_token="w0").save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    rng = Random(1)
    return [tuple(rng.randrange(96) for _ in range(n)) for n in PROMPTS]


@pytest.fixture(scope="module")
def greedy(folder: Path, prompts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """What transformers answers in float64, one prompt at a time, from the whole text for every token."""
    from transformers import AutoModelForCausalLM

    model = widen(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    out = []
    with torch.inference_mode():
        for prompt, n in zip(prompts, OUTPUTS, strict=True):
            ids = list(prompt)
            for _ in range(n):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            out.append(tuple(ids[len(prompt) :]))
    return out


class Given:
    """Prompts all at once, each with its true length and its own way of sampling."""

    def __init__(self, prompts: Sequence[Sequence[int] | None], params: SamplingParams | None) -> None:
        self.prompts, self.params = prompts, params
        self.truths: Sequence[int] | None = OUTPUTS

    def arrivals(self) -> Iterator[Arrival]:
        for i, prompt in enumerate(self.prompts):
            spec = RequestSpec(
                id=f"r{i}",
                prompt_tokens=PROMPTS[i],
                max_new_tokens=40,
                prompt_ids=prompt,
                sampling=self.params,
            )
            yield Arrival(i * 1000, spec, Truth(self.truths[i]) if self.truths else None)

    def react(self, finished: RequestFinished) -> tuple[()]:
        return ()

    def describe(self) -> dict[str, Any]:
        return {}


class Keep:
    """Every record; hooks of tokens so that they are sent."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.tokens: dict[str, list[int]] = {}

    @hookimpl
    def servelab_on_record(self, record: Record) -> None:
        self.records.append(record)

    @hookimpl
    def servelab_on_tokens_emitted(self, record: TokensEmitted) -> None:
        self.tokens.setdefault(record.request, []).extend(record.tokens)

    def outputs(self) -> list[tuple[int, ...]]:
        return [tuple(self.tokens[f"r{i}"]) for i in range(len(PROMPTS))]

    def plans(self) -> list[Any]:
        return [(r.t_ns, r.work, r.preempted, r.deferred) for r in self.records if isinstance(r, Planned)]

    def count(self, kind: type[Record]) -> int:
        return sum(isinstance(r, kind) for r in self.records)


Compose = Callable[..., tuple[Run, Keep]]


@pytest.fixture
def composed(folder: Path, prompts: list[tuple[int, ...]]) -> Iterator[Compose]:
    """A run of the tiny model; sections may be changed, ``executor`` too."""
    runs: list[Run] = []

    def make(
        given: Given | None = None,
        policy: object | None = None,
        extra: Mapping[str, tuple[PluginSpec, Any, Any]] | None = None,
        **sections: Any,
    ) -> tuple[Run, Keep]:
        registry, keep = Registry.load(), Keep()
        traffic = given or Given(prompts, None)
        spec = PluginSpec(
            name="given",
            factory="tests:given",
            provides=frozenset({"workload.prompt_ids", "workload.truth"}),
        )
        registry.add("workload", spec, factory=lambda c, ctx: traffic)
        registry.add("observer", PluginSpec(name="keep", factory="t:k"), factory=lambda c, ctx: keep)
        for kind, (plugin, factory, config) in (extra or {}).items():
            registry.add(kind, replace(plugin, config="t:c"), factory=factory, config=config)
        if policy is not None:
            registry.add("scheduler", PluginSpec(name="mine", factory="t:s"), factory=lambda c, x: policy)
            sections["scheduler"] = "mine"
        raw: dict[str, Any] = {
            "seed": 5,
            "scheduler": "vllm_v1",
            "kvcache": {"name": "paged", "page_tokens": 4},
            "kernel": "sdpa",
            "cost": "scripted",
            "workload": "given",
            "task": "bench",
            "observers": ["keep"],
            "clock": {"name": "virtual"},
            "model": {"name": "t", "source": "path", "path": str(folder), "dtype": "float64"},
            **sections,
        }
        raw["executor"] = {"name": "torch", "num_kv_pages": 128, **raw.get("executor", {})}
        raw["engine"] = {"max_model_len": 96, "checks": "full", **raw.get("engine", {})}
        run = compose(validate(raw, registry), registry)
        runs.append(run)
        return run, keep

    yield make
    for run in runs:
        run.executor.close()


def serve(made: tuple[Run, Keep]) -> Keep:
    run, keep = made
    run.task.run(run)
    return keep


SCHEDULES: dict[str, Mapping[str, Any]] = {
    "contiguous": {"kvcache": {"name": "contiguous", "page_tokens": 4}},
    "ranges of any length": {
        "kvcache": {"name": "contiguous_oracle", "page_tokens": 1, "placement": "best_fit"},
        "executor": {"num_kv_pages": 150},
    },
    "buddies": {
        "kvcache": {"name": "contiguous_pow2", "page_tokens": 2, "placement": "buddy"},
        "executor": {"num_kv_pages": 100},
    },
    "all at once": {},
    "chunks of 7": {"scheduler": {"name": "vllm_v1", "max_num_batched_tokens": 7, "max_num_seqs": 7}},
    "one by one": {"scheduler": {"name": "vllm_v1", "max_num_seqs": 1}},
    "pages of 1": {"kvcache": {"name": "paged", "page_tokens": 1}, "executor": {"num_kv_pages": 200}},
    "pages of 16": {"kvcache": {"name": "paged", "page_tokens": 16}, "executor": {"num_kv_pages": 30}},
    "few pages": {"executor": {"num_kv_pages": 26}},
    "wall clock": {"clock": {"name": "wall"}},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_greedy_tokens_are_those_of_transformers_under_every_schedule(
    composed: Compose, greedy: list[tuple[int, ...]], name: str
) -> None:
    keep = serve(composed(**SCHEDULES[name]))
    assert keep.outputs() == greedy
    if name == "few pages":
        assert keep.count(RequestPreempted) > 0
    ends = {r.request: (r.outcome, r.reason) for r in keep.records if isinstance(r, RequestFinished)}
    assert set(ends.values()) == {("completed", "stop")} and len(ends) == len(PROMPTS)


class Restless(RandomPlans):
    """Asks to be called again, so that a plan of nothing is no stall."""

    def plan(self, view: Any) -> StepPlan:
        plan = super().plan(view)
        plan.wake_at = plan.wake_at or view.now_ns + 1000
        return plan


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 30), pages=st.integers(26, 60))
def test_greedy_tokens_do_not_depend_on_random_plans(
    composed: Compose, greedy: list[tuple[int, ...]], seed: int, pages: int
) -> None:
    """Random chunks, preemptions, pauses and holds."""
    plans = Restless(Random(seed), {"recompute", "pause", "resume", "hold", "wake", "barrier"})
    keep = serve(composed(policy=plans, executor={"num_kv_pages": pages}))
    assert keep.outputs() == greedy


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 30), pages=st.integers(26, 40), host=st.integers(4, 60))
def test_greedy_tokens_survive_swaps(
    composed: Compose, greedy: list[tuple[int, ...]], seed: int, pages: int, host: int
) -> None:
    """What was moved to the host and back is what was there before."""
    plans = Restless(Random(seed), {"swap", "swap_in", "recompute", "hold", "wake"})
    keep = serve(composed(policy=plans, executor={"num_kv_pages": pages, "num_host_pages": host}))
    assert keep.outputs() == greedy


def test_swaps_take_real_time_on_the_wall_clock(composed: Compose, greedy: list[tuple[int, ...]]) -> None:
    plans = Restless(Random(3), {"swap", "swap_in", "wake"})
    executor = {"num_kv_pages": 40, "num_host_pages": 40}
    keep = serve(composed(policy=plans, executor=executor, clock={"name": "wall"}))
    assert keep.outputs() == greedy
    started, ended = keep.count(TransferStarted), keep.count(TransferEnded)
    assert started == ended > 0


def test_host_pages_count_as_memory(composed: Compose) -> None:
    with pytest.raises(ConfigError, match=r"KV pages need .* GiB") as error:
        composed(executor={"num_host_pages": 40_000_000})
    assert "executor.num_host_pages" in str(error.value)


def test_draws_do_not_depend_on_the_schedule(composed: Compose, prompts: list[tuple[int, ...]]) -> None:
    params = SamplingParams(temperature=1.3, top_p=0.9, presence_penalty=0.5, repetition_penalty=1.1)
    runs = [
        serve(composed(Given(prompts, params), **changes)).outputs()
        for changes in ({}, SCHEDULES["few pages"], SCHEDULES["chunks of 7"], {"seed": 6})
    ]
    assert runs[0] == runs[1] == runs[2]
    assert runs[0] != runs[3]


def test_same_seed_same_plans_and_tokens_on_the_virtual_clock(
    composed: Compose, prompts: list[tuple[int, ...]]
) -> None:
    params = SamplingParams(temperature=1.0)
    first, second = (serve(composed(Given(prompts, params), executor={"num_kv_pages": 30})) for _ in "ab")
    assert first.plans() == second.plans()
    assert first.records[1:-1] == second.records[1:-1]
    assert first.outputs() == second.outputs()


def test_the_scripted_executor_gets_the_same_plans(composed: Compose) -> None:
    """Lengths are enforced, so the same policy under the same prices decides the same."""
    real = serve(composed(executor={"num_kv_pages": 30}))
    scripted = serve(
        composed(
            executor={"name": "scripted", "num_kv_pages": 30, "foresight": False},
            model=SHAPE,
        )
    )
    assert real.plans() == scripted.plans()
    assert real.count(RequestPreempted) > 0


def test_without_true_lengths_the_text_ends_by_itself(
    composed: Compose, prompts: list[tuple[int, ...]], greedy: list[tuple[int, ...]]
) -> None:
    traffic = Given(prompts, SamplingParams(temperature=0, stop_token_ids=(greedy[2][4],)))
    traffic.truths = None
    keep = serve(composed(traffic))
    stop = greedy[2].index(greedy[2][4])
    assert tuple(keep.tokens["r2"]) == greedy[2][: stop + 1]
    reasons = {r.request: r.reason for r in keep.records if isinstance(r, RequestFinished)}
    assert reasons["r2"] == "stop"
    for i, output in enumerate(greedy):
        text = keep.tokens[f"r{i}"]
        assert tuple(text[: len(output)]) == output[: len(text)]
        assert len(text) == 40 if reasons[f"r{i}"] == "length" else text[-1] in (96, greedy[2][4])


def test_logprobs_are_of_the_models_own_distribution(
    composed: Compose, prompts: list[tuple[int, ...]], greedy: list[tuple[int, ...]], folder: Path
) -> None:
    from transformers import AutoModelForCausalLM

    keep = serve(composed(Given(prompts, SamplingParams(temperature=0, logprobs=3))))
    got = [p for r in keep.records if isinstance(r, TokensEmitted) and r.request == "r2" for p in r.logprobs]
    model = widen(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    with torch.inference_mode():
        logits = model(torch.tensor([prompts[2] + greedy[2][:-1]])).logits[0, len(prompts[2]) - 1 :]
    for one, row, token in zip(got, logits.log_softmax(-1), greedy[2], strict=True):
        top = row.topk(3)
        assert next(iter(one)) == token
        assert list(one) == top.indices.tolist()
        assert list(one.values()) == pytest.approx(top.values.tolist(), abs=1e-5)


# ------------------------------------------------------------------ refusals


class Odd:
    """Plans one thing it should not."""

    def __init__(self, item: Callable[[Any], Any]) -> None:
        self.item = item

    def plan(self, view: Any) -> StepPlan:
        plan = StepPlan()
        first = next(iter(view.waiting))
        plan.work += self.item(first)
        return plan


@pytest.mark.parametrize(
    "item",
    [
        lambda r: [Tokens(r, 5, layers=(0, 2))],
        lambda r: [Tokens(r, 5, draft=2)],
        lambda r: [Tokens(r, 5), Background("training", 100)],
    ],
)
def test_what_it_cannot_run_is_refused_by_name(composed: Compose, item: Callable[[Any], Any]) -> None:
    with pytest.raises(ServeLabError, match="executor 'torch' cannot run"):
        serve(composed(policy=Odd(item), engine={"checks": "basic"}))


def test_requests_need_token_ids(composed: Compose) -> None:
    with pytest.raises(WorkloadError, match="r0 has no token ids"):
        serve(composed(Given([None] * len(PROMPTS), None)))


def test_unknown_ways_of_sampling_are_refused(composed: Compose, prompts: list[tuple[int, ...]]) -> None:
    with pytest.raises(WorkloadError, match="r0 asks for sampling by"):
        serve(composed(Given(prompts, {"temperature": 1})))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sections", "error", "text"),
    [
        ({"engine": {"max_in_flight": 2}}, ServeLabError, "max_in_flight"),
        ({"kernel": None}, ConfigError, "no attention kernel"),
        ({"executor": {"num_kv_pages": 1 << 40}}, ConfigError, "of memory"),
        ({"executor": {"num_kv_pages": 3}}, ServeLabError, "need 24 pages"),
    ],
)
def test_settings_it_cannot_honour(
    composed: Compose, sections: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        composed(**sections)


def test_kv_memory_decides_the_pages(composed: Compose) -> None:
    run, _ = composed(executor={"num_kv_pages": None, "kv_memory_mib": 1})
    page = 4 * 3 * 2 * 2 * 8 * 8  # tokens, layers, k and v, heads, width, bytes
    assert run.engine.capacity.device_pages == ((1 << 20) // page,)
    assert run.info["weights"]["dtype"] == "float64"
    assert run.info["weights"]["source"] == "path"


def test_pages_are_copied_before_a_launch(composed: Compose) -> None:
    run, _ = composed()
    executor: Any = run.executor
    for layer, buffers in executor._buffers.items():
        for i, buffer in enumerate(buffers.values()):
            buffer[7] = 10 * layer + i + 1
    batch: Any = type("Batch", (), {})()
    batch.extras, batch.background, batch.copies = {}, (), ((0, 7, 9),)
    batch.requests, batch.leases, batch.starts, batch.tokens, batch.samples = [], [], [], [], []
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        executor.launch(batch, 1)  # nothing to run is not a launch; the copies come first
    for buffers in executor._buffers.values():
        for buffer in buffers.values():
            assert torch.equal(buffer[7], buffer[9]) and buffer[9].any()


def test_a_lying_layout_is_refused(composed: Compose) -> None:
    run, _ = composed()
    executor: Any = run.executor
    from dataclasses import replace

    pool = run.engine.layout.pools[0]
    lying = replace(run.engine.layout, pools=(replace(pool, bytes_per_page=pool.bytes_per_page + 8),))
    with pytest.raises(PluginError, match="bytes per page"):
        executor.capacity(lying)


def test_whole_prompts_need_no_mask(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go by the kernel's own causal flag; chunks after a prefix and decodes do not."""
    from servelab.plugins.kernels.sdpa import impl

    calls: list[bool] = []
    attend = impl._attend

    def spy(*args: Any, causal: bool = False) -> Any:
        calls.append(causal)
        return attend(*args, causal=causal)

    monkeypatch.setattr(impl, "_attend", spy)
    serve(composed())
    assert sum(calls) == 3 * (len(PROMPTS) - 1)  # layers, prompts; that of one token goes with the decodes
    calls.clear()
    serve(composed(**SCHEDULES["chunks of 7"]))
    assert 0 < sum(calls) < len(calls)


def test_ids_outside_the_vocabulary_are_named(composed: Compose, prompts: list[tuple[int, ...]]) -> None:
    wrong = [*prompts[:3], (*prompts[3][:-1], 97), *prompts[4:]]
    with pytest.raises(WorkloadError, match="request r3 has token id 97 in its prompt"):
        serve(composed(Given(wrong, None)))


def test_close_frees_weights_and_pages_at_once(composed: Compose) -> None:
    import gc
    import weakref

    run, _ = composed()
    executor: Any = run.executor
    seen = weakref.ref(executor.decoder), weakref.ref(executor._buffers[0]["k"])
    gc.disable()
    try:
        executor.close()
        executor.close()
        assert [one() for one in seen] == [None, None]
    finally:
        gc.enable()


def test_threads_are_set_and_reported(composed: Compose) -> None:
    before = torch.get_num_threads()
    try:
        run, _ = composed(executor={"threads": 1})
        assert torch.get_num_threads() == run.info["weights"]["threads"] == 1
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------ sliding windows


class Everything(Paged):
    """As paged, with windows so long that nothing falls out of them."""

    def layout(self, model: ModelFacts) -> KVLayout:
        made = super().layout(model)
        pools = [p if p.window_tokens is None else replace(p, window_tokens=4096) for p in made.pools]
        return replace(made, pools=tuple(pools))


@pytest.fixture
def windowed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """``windowed(6, None, 11)``: the tiny Llama with windows, which its files do not state."""
    monkeypatch.setattr(find, "_agrees", lambda *_: None)
    model = {"name": "t", "source": "path", "path": str(folder), "dtype": "float64"}
    return lambda *windows: {**model, "windows": windows}


SMALL = {
    "engine": {"max_batch_tokens": 16},
    "scheduler": {"name": "vllm_v1", "max_num_batched_tokens": 16, "max_num_seqs": 8},
    "executor": {"num_kv_pages": {"kv": 32, "window_6": 14, "window_11": 16}},
}


@pytest.fixture
def keeping(composed: Compose, windowed: Callable[..., dict[str, Any]]) -> list[tuple[int, ...]]:
    """Greedy tokens of a model of mixed windows, one at a time, with every page kept."""
    registry_spec = PluginSpec(name="everything", factory="t:e", provides=frozenset({"kvcache.block_table"}))
    keep = serve(
        composed(
            model=windowed(6, None, 11),
            extra={"kvcache": (registry_spec, Everything, PagedConfig)},
            kvcache={"name": "everything", "page_tokens": 4},
            scheduler={"name": "vllm_v1", "max_num_seqs": 1},
        )
    )
    return keep.outputs()


def test_tokens_do_not_depend_on_pages_given_back(
    composed: Compose,
    windowed: Callable[..., dict[str, Any]],
    keeping: list[tuple[int, ...]],
    greedy: list[tuple[int, ...]],
) -> None:
    assert keeping != greedy  # the windows do hide something
    model = windowed(6, None, 11)
    for name in ("all at once", "chunks of 7", "one by one", "pages of 1", "pages of 16"):
        assert serve(composed(model=model, **SCHEDULES[name])).outputs() == keeping, name
    few = serve(composed(model=model, **SMALL))
    assert few.outputs() == keeping
    assert few.count(RequestPreempted) > 0


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 30), pages=st.integers(26, 60))
def test_random_plans_of_a_model_with_windows(
    composed: Compose,
    windowed: Callable[..., dict[str, Any]],
    keeping: list[tuple[int, ...]],
    seed: int,
    pages: int,
) -> None:
    plans = Restless(Random(seed), {"recompute", "pause", "resume", "hold", "wake", "barrier"})
    keep = serve(composed(policy=plans, model=windowed(6, None, 11), executor={"num_kv_pages": pages}))
    assert keep.outputs() == keeping


def test_tokens_of_one_window_are_those_of_transformers(
    composed: Compose, windowed: Callable[..., dict[str, Any]], folder: Path, prompts: list[tuple[int, ...]]
) -> None:
    from transformers import AutoModelForCausalLM

    keep = serve(composed(model=windowed(7, 7, 7), executor={"num_kv_pages": 30}))
    model = widen(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    for i, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(OUTPUTS[i]):
            at = torch.arange(len(ids))
            shown = (at <= at[:, None]) & (at > at[:, None] - 7)
            mask = torch.zeros(shown.shape, dtype=torch.float64).masked_fill(~shown, -torch.inf)
            with torch.inference_mode():
                logits = model(torch.tensor([ids]), attention_mask=mask[None, None], use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
        assert keep.outputs()[i] == tuple(ids[len(prompt) :])


def test_the_scripted_executor_gets_the_same_plans_with_windows(
    composed: Compose, windowed: Callable[..., dict[str, Any]]
) -> None:
    real = serve(composed(model=windowed(6, None, 11), **SMALL))
    shape = {
        "layers": 3,
        "hidden": 48,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 8,
        "ffn": 80,
        "vocab": 97,
        "max_position": 256,
    }
    model = {"name": "t", "dtype": "float64", "windows": (6, None, 11), **shape}
    executor = {"name": "scripted", "foresight": False, **SMALL["executor"]}
    scripted = serve(composed(model=model, **{**SMALL, "executor": executor}))
    assert real.plans() == scripted.plans()
    free = [
        [record.free_pages for record in keep.records if isinstance(record, StepDone)]
        for keep in (real, scripted)
    ]
    assert free[0] == free[1] and len(free[0][0]) == 3


def test_memory_is_divided_among_pools(composed: Compose, windowed: Callable[..., dict[str, Any]]) -> None:
    run, _ = composed(
        model=windowed(6, None, 11),
        engine={"max_batch_tokens": 16},
        scheduler={"name": "vllm_v1", "max_num_batched_tokens": 16, "max_num_seqs": 8},
        executor={"num_kv_pages": None, "kv_memory_mib": 1},
    )
    # a request of 96 tokens: 24 pages of the full layer, 6 and 8 of those with windows; a page is 1 KiB
    assert run.engine.capacity.device_pages == tuple(1024 * n // 38 for n in (24, 6, 8))
    executor: Any = run.executor
    assert [len(executor._buffers[layer]["k"]) for layer in (1, 0, 2)] == [*run.engine.capacity.device_pages]
    with pytest.raises(ConfigError, match="states pages for kv"):
        composed(model=windowed(6, None, 11), executor={"num_kv_pages": {"kv": 40}})
