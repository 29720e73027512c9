"""Threads, Ctrl-C, errors and ends: whoever waits is told, and nothing is left behind."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from servelab import LLM, SamplingParams
from servelab.core.api import Context, StepPlan, StepView, hookimpl
from servelab.core.errors import PluginCallError, ServeLabError
from servelab.core.records import Record, RunFinished
from servelab.plugins.schedulers.vllm_v1 import VllmV1, VllmV1Config

Make = Callable[..., LLM]
LONG = SamplingParams(max_tokens=None, ignore_eos=True, temperature=0)
SHORT = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0)


class Plain(VllmV1):
    """vLLM's rule, asked at every step."""

    def __init__(self, config: None = None, context: Context | None = None) -> None:
        self.config = VllmV1Config(hold_steps=1)


class Breaks(Plain):
    """Raises in the tenth plan."""

    plans = 0

    def plan(self, view: StepView) -> StepPlan:
        self.plans += 1
        if self.plans == 10:
            raise RuntimeError("boom")
        return super().plan(view)


def test_threads_share_the_engine(llm: LLM, recorder: Any) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0)
    prompts = [f"{i} foxes" for i in range(8)]
    alone = [llm.generate(prompt, params)[0].token_ids for prompt in prompts]
    before, all_here = len(recorder.of("step")), threading.Barrier(8)

    def generate(prompt: str) -> Any:
        all_here.wait()
        return llm.generate(prompt, params)

    with ThreadPoolExecutor(8) as pool:
        together = [done[0].token_ids for done in pool.map(generate, prompts)]
    assert together == alone
    assert max(len(step.requests) for step in recorder.of("step")[before:]) > 1


def test_ctrl_c_gives_up_this_call_only(make: Make, recorder_class: Any) -> None:
    seen, main = recorder_class(), threading.get_ident()

    def interrupt() -> None:
        while len({tokens.request for tokens in seen.of("tokens")}) < 4:
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)

    with make(observers=[seen]) as llm, ThreadPoolExecutor(2) as pool:
        other = pool.submit(llm.generate, "the dog", SamplingParams(max_tokens=300, ignore_eos=True))
        pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["the fox"] * 3, LONG)
        assert other.result()[0].finish_reason == "length"
        assert llm.generate("z", SHORT)[0].finish_reason == "length"
    assert sorted(seen.outcomes()) == ["cancelled"] * 3 + ["completed"] * 2


def test_an_error_reaches_everybody_who_waits(make: Make) -> None:
    with make(scheduler=Breaks()) as llm:
        stream = llm.stream("z", LONG)
        next(stream)
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(llm.generate, "the fox", LONG) for _ in range(3)]
            errors = [call.exception() for call in waiting]
        with pytest.raises(ServeLabError, match="the engine has stopped"):
            list(stream)
        with pytest.raises(ServeLabError, match="the engine has stopped") as later:
            llm.generate("z", SHORT)
    for error in [*errors, later.value]:
        assert isinstance(error, ServeLabError)
        assert "scheduler 'breaks' raised RuntimeError: boom" in error.why
        assert "mend the plugin; then make a new LLM" in error.do
        assert isinstance(error.__cause__, PluginCallError)
        assert isinstance(error.__cause__.__cause__, RuntimeError)


def test_closing(make: Make) -> None:
    made: list[weakref.ref[object]] = []

    def remembered(config: None, context: Context) -> Plain:
        scheduler = Plain()
        made.append(weakref.ref(scheduler))
        return scheduler

    llm = make(scheduler=remembered)
    stream = llm.stream("the fox", LONG)
    first = next(stream)
    assert made[0]() is not None
    llm.close()
    llm.close()
    last = list(stream)[-1].completion
    assert last is not None and last.token_ids[:1] == first.token_ids
    assert (last.finish_reason, last.reason) == ("abort", "the LLM was closed")
    for use in (lambda: llm.generate("z"), lambda: next(llm.stream("z")), lambda: llm.generate([[1], [2]])):
        with pytest.raises(ServeLabError, match=r"(?s)the engine is closed.*make a new LLM"):
            use()
    assert llm.generate([]) == []
    gc.collect()
    assert made[0]() is None, "a closed LLM keeps neither engine nor model"


def test_leaving_the_block_on_an_error(make: Make) -> None:
    with pytest.raises(KeyError), make() as llm:
        next(llm.stream("the fox", LONG))
        raise KeyError
    with pytest.raises(ServeLabError, match="closed"):
        llm.generate("z")


def test_nobody_keeps_a_forgotten_llm(make: Make) -> None:
    llm = make()
    llm.generate("z", SHORT)
    thread, gone = llm._client._thread, weakref.ref(llm)
    del llm
    gc.collect()
    assert gone() is None
    thread.join()


def test_two_at_once(make: Make, llm: LLM) -> None:
    with make(seed=1) as other, ThreadPoolExecutor(2) as pool:
        both = [pool.submit(one.generate, "the fox", SHORT) for one in (llm, other)]
        a, b = (call.result()[0] for call in both)
    assert a.token_ids == b.token_ids
    assert llm.generate("the fox", SHORT)[0].token_ids == a.token_ids


def test_an_observer_that_fails_at_the_end_is_heard(make: Make) -> None:
    class Bad:
        @hookimpl
        def servelab_on_record(self, record: Record) -> None:
            if isinstance(record, RunFinished):
                raise OSError("disk full")

    llm = make(observers=[Bad()])
    assert llm.generate("z", SHORT)
    with pytest.raises(PluginCallError, match="disk full"):
        llm.close()
    llm.close()


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("stream = llm.stream('the fox', LONG); next(stream)", 0),
        ("Thread(target=llm.generate, args=('z', LONG), daemon=True).start(); wait()", 0),
        ("llm.generate('z', SamplingParams(max_tokens=2)); raise SystemExit(3)", 3),
    ],
)
def test_the_interpreter_goes_quietly(folder: Path, repository: Path, ending: str, code: int) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(repository / "src")!r})
from threading import Thread
from time import sleep
import atexit
from servelab import LLM, SamplingParams
from servelab.core.api import hookimpl
LONG = SamplingParams(max_tokens=None, ignore_eos=True)

class Counts:
    steps = 0

    @hookimpl
    def servelab_on_record(self, record):
        self.steps += record.ev == "step"

def wait():
    while not seen.steps:
        sleep(0.01)

seen = Counts()
atexit.register(lambda: print(seen.steps))  # runs after what is registered later
llm = LLM({str(folder)!r}, dtype="float64", observers=[seen])
{ending}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")
    assert 0 < int(done.stdout) < 3000, "it was waited for 4000 tokens"
