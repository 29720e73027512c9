"""Arguments of ``LLM``: models, plugins by name, mapping and object, settings, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from servelab import LLM, SamplingParams
from servelab.core.api import Context, PluginSpec, StepPlan, StepView
from servelab.core.errors import CapabilityError, ConfigError, PluginError, ServeLabError
from servelab.plugins.kvcache.paged import Paged, PagedConfig
from servelab.plugins.schedulers.vllm_v1 import VllmV1, VllmV1Config

Make = Callable[..., LLM]
SHORT = SamplingParams(max_tokens=3, ignore_eos=True, temperature=0)


class Mine:
    """Called like any factory; counts its plans."""

    plans = 0

    def __init__(self, config: None = None, context: Context | None = None) -> None:
        self._rule = VllmV1.__new__(VllmV1)
        self._rule.config = VllmV1Config(hold_steps=1)

    def plan(self, view: StepView) -> StepPlan:
        Mine.plans += 1
        return self._rule.plan(view)


class Declared(Mine):
    spec = PluginSpec(
        name="vllm_v1",
        factory="here:Declared",
        summary="one of my own",
        provides=frozenset({"scheduler.chunks", "scheduler.ahead"}),
    )


def factory(config: None, context: Context) -> Mine:
    return Mine(config, context)


@pytest.mark.parametrize(
    ("scheduler", "name"),
    [
        (Mine, "mine"),
        (Mine(), "mine"),
        (factory, "factory"),
        (lambda config, context: Mine(), "lambda"),
        (Declared(), "vllm_v1.python"),
        (Declared, "vllm_v1.python"),
        (type("VLLM_V1", (Mine,), {}), "vllm_v1.python"),
        (type("Größe", (Mine,), {}), "gre"),
    ],
)
def test_schedulers_as_objects(make: Make, llm: LLM, scheduler: Any, name: str) -> None:
    before = Mine.plans
    with make(scheduler=scheduler) as own:
        [one] = own.generate("the fox", SHORT)
        assert own.info["plugins"]["scheduler"]["name"] == name
        assert own.info["settings"]["scheduler"] == {"name": name}
    assert one.token_ids == llm.generate("the fox", SHORT)[0].token_ids
    assert Mine.plans > before


def test_what_an_object_declares_counts(make: Make) -> None:
    """Planning ahead needs a capability: the object without a spec lacks it, the other is let through to
    the executor, which refuses."""
    ahead = ["engine.max_in_flight=2"]
    with pytest.raises(CapabilityError, match=r"'mine' does not provide 'scheduler\.ahead'"):
        make(scheduler=Mine(), overrides=ahead)
    with pytest.raises(ConfigError, match="'torch' cannot run with"):
        make(scheduler=Declared(), overrides=ahead)


def test_other_families(make: Make, llm: LLM) -> None:
    cache = Paged(PagedConfig(page_tokens=8), None)  # type: ignore[arg-type]
    cache_spec = PluginSpec(name="eights", factory="here:Eights", provides=frozenset({"kvcache.block_table"}))
    cache.spec = cache_spec  # type: ignore[attr-defined]
    with make(kvcache=cache, executor={"name": "torch", "num_kv_pages": 40}, kernel="sdpa") as own:
        assert own.generate("the fox", SHORT)[0].token_ids == llm.generate("the fox", SHORT)[0].token_ids
        [pool] = own.info["kv"]["pools"]
        assert (pool["page_tokens"], pool["pages"]) == (8, 40)
        assert own.info["plugins"]["kvcache"]["name"] == "eights"
        assert own.max_model_len == 320


def test_names_mappings_and_overrides_go_together(make: Make) -> None:
    with make(scheduler="vllm_v1", overrides=["scheduler.max_num_seqs=3"]) as llm:
        assert llm.info["settings"]["scheduler"]["max_num_seqs"] == 3
    with make(scheduler={"max_num_seqs": 4}, overrides="scheduler.hold_steps=1") as llm:
        settings = llm.info["settings"]["scheduler"]
        assert (settings["name"], settings["max_num_seqs"], settings["hold_steps"]) == ("vllm_v1", 4, 1)


def test_a_run_folder_for_observers(make: Make, tmp_path: Path, recorder_class: Any) -> None:
    one, two = recorder_class(), recorder_class()
    with make(observers=["jsonl", one, two], run_dir=tmp_path / "run") as llm:
        llm.generate("z", SHORT)
    log = (tmp_path / "run" / "events.jsonl").read_text().replace(" ", "")
    assert '"ev":"finished"' in log and '"peak_rss_bytes":' in log.splitlines()[-1]
    assert one.outcomes() == two.outcomes() == ["completed"]


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "smollm_135m"}, ["unknown model 'smollm_135m'", "did you mean 'smollm2_135m'"]),
        ({"model": Path("nowhere")}, ["nowhere"]),
        ({"model": "./nowhere"}, ["nowhere"]),
        ({"scheduler": "vlm_v1"}, ["unknown scheduler 'vlm_v1'", "did you mean 'vllm_v1'"]),
        ({"scheduler": {"max_seqs": 4}}, ["scheduler.max_seqs", "did you mean"]),
        ({"schedular": "vllm_v1"}, ["LLM takes no argument 'schedular'", "did you mean 'scheduler'"]),
        ({"workload": "chat"}, ["LLM takes no argument 'workload'"]),
        ({"quant": {"bits": 4}}, ["quant.name: missing"]),
        ({"quant": "gptqq"}, ["unknown quant 'gptqq'"]),
        ({"dtype": "float65"}, ["model.dtype", "float64"]),
        ({"observers": ["jsonll"]}, ["unknown observer 'jsonll'", "did you mean 'jsonl'"]),
        ({"overrides": ["workload.request_rate=3"]}, ["an LLM has its own workload"]),
        ({"overrides": ["observers=[report]"]}, ["an LLM has its own observers"]),
        ({"overrides": ["clock=virtual"]}, ["an LLM has its own clock"]),
        ({"scheduler": "vllm_v1", "overrides": ["+scheduler=other"]}, ["scheduler is stated twice"]),
        (
            {"kvcache": {"name": "paged", "page_tokens": 4}, "overrides": ["kvcache.page_tokens=8"]},
            ["kvcache.page_tokens is stated twice", "page_tokens': 4"],
        ),
        ({"overrides": ["enginee.checks=full"]}, ["unknown section 'enginee'", "did you mean 'engine'"]),
        ({"scheduler": object()}, ["has no plan"]),
        ({"max_model_len": 5000}, ["must be at most model.max_position, 4096"]),
        ({"executor": "scripted"}, ["executor"]),
    ],
)
def test_refused_with_the_way_out(make: Make, settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ServeLabError) as caught:
        make(**settings)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_executor_without_text_is_refused(make: Make) -> None:
    from servelab.plugins.executors.torch.executor import TorchExecutor, TorchExecutorConfig

    closed = []

    class Mute(TorchExecutor):
        spec = PluginSpec(
            name="mute",
            factory="here:Mute",
            describe_model="servelab.plugins.executors.checkpoint.find:describe",
            runs=("torch",),
            provides=frozenset({"executor.torch"}),
        )

        def __init__(self, config: None, context: Context) -> None:
            super().__init__(TorchExecutorConfig(), context)
            del self.tokenizer

        def close(self) -> None:
            closed.append(True)

    with pytest.raises(ConfigError, match="executor 'mute' has no tokenizer"):
        make(executor=Mute)
    assert closed == [True]


def test_nothing_stays_open_after_a_refusal(make: Make) -> None:
    from servelab.plugins.executors.torch.executor import TorchExecutor

    with pytest.MonkeyPatch.context() as patch:
        closed: list[object] = []
        patch.setattr(TorchExecutor, "close", lambda self: closed.append(self))
        with pytest.raises(PluginError, match="no event hook"):
            make(observers=[object()])
        assert len(closed) == 1


# ---------------------------------------------------------------------- memory


def test_the_longest_request_fits_memory(make: Make) -> None:
    # 2 layers, keys and values, 2 heads of 8 numbers of 8 bytes: 512 bytes a token
    with make() as roomy, make(executor={"kv_memory_mib": 1}) as tight:
        assert (roomy.max_model_len, tight.max_model_len) == (4096, 2048)
        assert tight.info["settings"]["engine"]["max_model_len"] == 2048
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=None)
        [one] = tight.generate([[5] * 2046], params)
        assert len(one.token_ids) == 2
        with pytest.raises(ConfigError, match="its 2048 tokens leave no room"):
            tight.generate([[5] * 2048])
    with pytest.raises(CapabilityError, match=r"lower engine\.max_model_len to at most 2048"):
        make(executor={"kv_memory_mib": 1}, max_model_len=2049)
    with make(overrides=["executor.num_kv_pages=4"]) as tiny:
        assert tiny.max_model_len == 64


# ----------------------------------------------------------------------- Hydra


def test_inside_a_hydra_application(make: Make, tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir, version
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    (tmp_path / "app.yaml").write_text("answer: ${twice:21}\n")
    OmegaConf.register_new_resolver("twice", lambda n: 2 * n)
    try:
        with initialize_config_dir(str(tmp_path), version_base="1.2"):
            assert compose("app").answer == 42
            with make() as llm:
                assert llm.generate("z", SHORT)
            with pytest.raises(ServeLabError):
                make(overrides=["engine.max_batch_tokens=["])
            assert compose("app").answer == 42
            assert version.getbase() == version.Version("1.2")
        assert not GlobalHydra.instance().is_initialized()
    finally:
        OmegaConf.clear_resolver("twice")


def test_a_model_given_as_text(folder: Path) -> None:
    with LLM(str(folder), dtype="float32") as llm:
        assert llm.info["model"] == "tiny" and llm.info["settings"]["model"]["dtype"] == "float32"
    with pytest.raises(PluginError) as caught, LLM(folder, scheduler=lambda: None):
        pass
    assert "could not be built" in str(caught.value)
