"""``LLM``: the engine behind a Python object, for notebooks and scripts.

from servelab import LLM, SamplingParams

llm = LLM()                                     # SmolLM2-135M-Instruct on this machine's CPU
[out] = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8))
print(out.text, out.finish_reason, out.timings.ttft_s)
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Self, cast

from servelab.core.client import Client, Event, NoTraffic
from servelab.core.errors import ConfigError, ServeLabError, nearest
from servelab.core.families import KINDS
from servelab.core.records import RequestAdmitted, RequestArrived, RequestFinished, TokensEmitted
from servelab.core.registry import Registry
from servelab.core.request import RequestSpec
from servelab.core.sampling import SamplingParams
from servelab.core.spec import PluginSpec
from servelab.core.stops import visible_text
from servelab.core.text import Tokenizer

Prompt = str | Sequence[int]
Plugin = Any
"""A name, a mapping with ``name`` and settings, or an object, class or factory of the family."""
Message = Mapping[str, str]

_ENDINGS = {"cancelled": "abort", "aborted": "abort", "rejected": "rejected"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Seconds on the wall clock."""

    queue_s: float | None
    """Arrival to first scheduled; None: never was."""
    ttft_s: float | None
    """Arrival to first token; None: no token came."""
    e2e_s: float
    """Arrival to end."""
    token_times_s: tuple[float, ...]
    """Arrival to each output token."""

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None with fewer than two."""
        times = self.token_times_s
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What became of one prompt."""

    request_id: str
    prompt: str | None
    """None if it was given as token ids."""
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Output ids, a final stop token included."""
    text: str
    """Without stop token, stop text and special tokens."""
    finish_reason: str
    """``stop``, ``length``, ``abort`` (given up, or ended by a policy) or ``rejected``."""
    stop_reason: str | int | None
    """The stop text or token that ended it."""
    reason: str
    """What the engine said about the end."""
    logprobs: tuple[dict[int, float], ...] | None
    """Per output token, if asked for: token id -> log-probability, the drawn token first."""
    preemptions: int
    timings: Timings


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A piece of a streamed output."""

    text: str
    """New text; may be empty while a character or a possible stop text is incomplete."""
    token_ids: tuple[int, ...]
    """New output ids."""
    completion: Completion | None = None
    """With the last chunk: the whole."""


class LLM:
    """A model behind ServeLab's engine.

    Args:
        model: a name in ``configs/model``, a folder in Hugging Face format, a GGUF file, or OWNER/NAME of a
            repository on the Hugging Face hub.
        scheduler, quant, **families: plugins by kind (``kvcache=``, ``kernel=``, ...), each as a name, a
            mapping ``{"name": ..., setting: value}``, or a Python object: an instance, or a class or factory
            called as ``factory(config, context)``.
        dtype: ``bfloat16``, ``float32``, ``float64`` or ``float16``; None: the configured one, bfloat16.
        seed: every generator derives from it.
        max_model_len: prompt plus output tokens of one request; None: what KV memory and model allow.
        observers: watchers, as names or mappings; they see one run from here to ``close``.
        run_dir: where observers may write.
        overrides: further settings as on the command line, ``"engine.max_batch_tokens=512"``.

    Use it as a context manager, or ``close`` it, to free the memory at once.

    Raises:
        ServeLabError: whatever does not fit together, before anything is loaded where that can be known.
    """

    def __init__(
        self,
        model: str = "smollm2_135m",
        *,
        scheduler: Plugin = None,
        quant: Plugin = None,
        dtype: str | None = None,
        seed: int = 0,
        max_model_len: int | None = None,
        observers: Sequence[Any] = (),
        run_dir: str | Path | None = None,
        overrides: Sequence[str] = (),
        **families: Plugin,
    ) -> None:
        from servelab.core.compose import compose
        from servelab.core.config import validate

        registry = Registry.load()
        chosen = {"scheduler": scheduler, "quant": quant, **families}
        lines = [*_model(model), "clock=wall", f"seed={seed}"]
        if dtype is not None:
            lines.append(f"model.dtype={dtype}")
        if max_model_len is not None:
            lines.append(f"engine.max_model_len={max_model_len}")
        raw = _settings([*lines, *overrides])
        for kind, plugin in chosen.items():
            if plugin is not None:
                raw[_family(kind)] = _plugin(kind, plugin, registry)
        registry.add("workload", _NO_TRAFFIC, factory=NoTraffic)
        raw["workload"] = _NO_TRAFFIC.name
        raw["observers"] = list(observers)
        folder = None if run_dir is None else Path(run_dir)
        run = compose(validate(raw, registry), registry, run_dir=folder)
        tokenizer = getattr(run.executor, "tokenizer", None)
        if tokenizer is None:
            run.executor.close()
            raise ConfigError(
                f"executor {run.config.executor.name!r} has no tokenizer",
                where="LLM",
                do="leave executor out, or take one that runs a model (torch)",
            )
        self.info = run.info
        """What identifies the run: settings, plugins, versions, weights, KV layout."""
        self.tokenizer: Tokenizer = tokenizer
        self.max_model_len = run.engine.limits.max_model_len
        self._client = Client(run)
        self._ids = count()
        self._finalizer = weakref.finalize(self, self._client.close)

    # -------------------------------------------------------------- generate

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[Completion]:
        """Complete prompts, batched by the engine; in their order.

        Args:
            prompts: one or many, each a text or token ids.
            params: for all, or one for each; None: the defaults of ``SamplingParams``.
            progress: show a bar on stderr; None: on a terminal, with more than one prompt.

        Raises:
            ConfigError: a prompt that is empty, too long or outside the vocabulary; nothing has run then.
        """
        specs = self._specs(_many(prompts), params)
        boxes = {spec.id: self._client.send(spec) for _, spec in specs}
        show = len(specs) > 1 and sys.stderr.isatty() if progress is None else progress
        try:
            with _bar(len(specs), show) as tick:
                done = []
                for text, spec in specs:
                    events = self._events(boxes[spec.id])
                    done.append(self._completion(text, spec, list(events)))
                    tick()
        finally:
            for _, spec in specs:  # also on Ctrl-C: what still runs is given up
                self._client.forget(spec.id)
        return done

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[Completion]:
        """Answer conversations through the model's chat template; one, or a list of them."""
        talks = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [self.tokenizer.chat(cast("Sequence[Message]", talk)) for talk in talks]
        return self.generate(prompts, params, progress=progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Chunk]:
        """Complete one prompt, piece by piece. Closing the iterator early gives the request up.

        The request starts with the first ``next``.
        """
        [(text, spec)] = self._specs([prompt], params)
        return self._stream(text, spec)

    def _stream(self, text: str | None, spec: RequestSpec) -> Iterator[Chunk]:
        box = self._client.send(spec)
        try:
            events: list[Event] = []
            ids: list[int] = []
            shown = ""
            for event in self._events(box):
                events.append(event)
                if isinstance(event, TokensEmitted):
                    ids += event.tokens
                    now = self._settled(ids, spec.sampling)
                    new, shown = now[len(shown) :], max(shown, now, key=len)
                    yield Chunk(text=new, token_ids=tuple(event.tokens))
            whole = self._completion(text, spec, events)
            yield Chunk(text=whole.text[len(shown) :], token_ids=(), completion=whole)
        finally:
            self._client.forget(spec.id)

    def _events(self, box: Any) -> Iterator[Event]:
        while True:
            event = self._client.receive(box)
            yield event
            if isinstance(event, RequestFinished):
                return

    def _settled(self, ids: Sequence[int], params: SamplingParams) -> str:
        """Text that no later token can take back: no half character, no beginning of a stop text."""
        text, _ = visible_text(self.tokenizer.decode, ids, params, self.tokenizer.stop_ids)
        text = text.rstrip("\ufffd")
        held = max(
            (n for stop in params.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
        )
        return text[: len(text) - held]

    # -------------------------------------------------------------- requests

    def _specs(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[tuple[str | None, RequestSpec]]:
        """Checked requests with the text of their prompts; all problems in one error."""
        if params is None or isinstance(params, SamplingParams):
            each: Sequence[SamplingParams] = [params or SamplingParams()] * len(prompts)
        else:
            each = list(params)
        if len(each) != len(prompts):
            raise ConfigError(
                f"{len(prompts)} prompts have {len(each)} sampling parameters", do="give one each"
            )
        found, problems = [], []
        for i, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
            ids = tuple(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
            problem = self._problem(ids, one)
            if problem:
                problems.append(f"prompt {i}: {problem}")
                continue
            room = self.max_model_len - len(ids)
            spec = RequestSpec(
                id=f"r{next(self._ids)}",
                prompt_tokens=len(ids),
                max_new_tokens=room if one.max_tokens is None else min(one.max_tokens, room),
                prompt_ids=ids,
                sampling=one,
            )
            found.append((prompt if isinstance(prompt, str) else None, spec))
        if problems:
            raise ConfigError("\n".join(["prompts cannot be served:", *(f"  - {p}" for p in problems)]))
        return found

    def _problem(self, ids: Sequence[Any], params: SamplingParams) -> str | None:
        if not isinstance(params, SamplingParams):
            return f"params must be SamplingParams, got {params!r:.60}"
        if not ids:
            return "it is empty; a model needs at least one token"
        wrong = next((i for i in ids if type(i) is not int or not 0 <= i < self.tokenizer.vocab_size), None)
        if wrong is not None:
            return f"{wrong!r} is no token id; they are 0 to {self.tokenizer.vocab_size - 1}"
        if len(ids) >= self.max_model_len:
            return (
                f"its {len(ids)} tokens leave no room for output; the limit for both is {self.max_model_len} "
                "(max_model_len): shorten it, or raise the limit if model and KV memory allow"
            )
        return None

    def _completion(self, text: str | None, spec: RequestSpec, events: Sequence[Event]) -> Completion:
        """The whole from the records of a request."""
        arrived = next(e.t_ns for e in events if isinstance(e, RequestArrived))
        admitted = next((e.t_ns for e in events if isinstance(e, RequestAdmitted)), None)
        emitted = [e for e in events if isinstance(e, TokensEmitted)]
        end = cast("RequestFinished", events[-1])
        if end.outcome in ("failed", "unfinished"):
            raise ServeLabError(f"request {spec.id} could not be served", why=end.reason)
        ids = [token for e in emitted for token in e.tokens]
        times = tuple((e.t_ns - arrived) / 1e9 for e in emitted for _ in e.tokens)
        visible, stopped = "", None
        if ids:
            visible, stopped = visible_text(
                self.tokenizer.decode, ids, spec.sampling, self.tokenizer.stop_ids
            )
        asked = spec.sampling.logprobs is not None
        return Completion(
            request_id=spec.id,
            prompt=text,
            prompt_token_ids=tuple(spec.prompt_ids or ()),
            token_ids=tuple(ids),
            text=visible,
            finish_reason=_ENDINGS.get(end.outcome) or end.reason,
            stop_reason=stopped,
            reason=end.reason,
            logprobs=tuple(p for e in emitted for p in e.logprobs or ()) if asked else None,
            preemptions=end.preemptions,
            timings=Timings(
                queue_s=None if admitted is None else (admitted - arrived) / 1e9,
                ttft_s=times[0] if times else None,
                e2e_s=(end.t_ns - arrived) / 1e9,
                token_times_s=times,
            ),
        )

    # ------------------------------------------------------------------ end

    def close(self) -> None:
        """Finish what runs and free the model."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_NO_TRAFFIC = PluginSpec(
    name="python",
    factory="servelab.core.client:NoTraffic",
    summary="requests come from Python",
    provides=frozenset({"workload.prompt_ids"}),
)


def _many(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """A list of prompts, also of one: a text, or a sequence of numbers."""
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) and isinstance(prompts[0], int):
        return [cast("Sequence[int]", prompts)]
    return cast("Sequence[Prompt]", prompts)


def _model(model: str) -> list[str]:
    """Overrides that select a model: a configured name, a place on this machine, or one on the hub."""
    from importlib.resources import files

    known = sorted(
        entry.name.removesuffix(".yaml")
        for entry in files("servelab.configs").joinpath("model").iterdir()
        if entry.name.endswith(".yaml")
    )
    if model in known:
        return [f"model={model}"]
    path = Path(model).expanduser()
    if path.exists() or model.endswith(".gguf") or model.startswith((".", "/", "~")):
        return ["model=local", f"model.path={_quoted(str(path))}", f"model.name={_quoted(path.name)}"]
    if model.count("/") == 1:
        return ["model=hub", f"model.repo={_quoted(model)}", f"model.name={_quoted(model)}"]
    raise ConfigError(
        f"unknown model {model!r}",
        where="LLM(model=...)",
        why="it is no configured name, no folder or GGUF file here, and not OWNER/NAME of the hub",
        do=nearest(model, known),
    )


def _quoted(value: str) -> str:
    """A text as Hydra's override grammar takes it literally."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _settings(lines: Sequence[str]) -> dict[str, Any]:
    """The default configuration with overrides, as the command line composes it."""
    from hydra import compose, initialize_config_module
    from hydra.core.singleton import Singleton
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from servelab.core.overrides import check_choices, normalize
    from servelab.core.searchpath import install

    install()
    state = Singleton.get_state()  # an application may be using Hydra itself
    try:
        from hydra.core.global_hydra import GlobalHydra

        GlobalHydra.instance().clear()
        with initialize_config_module("servelab.configs", version_base="1.3"):
            composed = compose("config", overrides=check_choices(normalize(lines)))
        raw = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as exc:
        raise ConfigError(str(exc), where="LLM(...)") from exc
    finally:
        Singleton.set_state(state)
    return cast("dict[str, Any]", raw)


def _family(kind: str) -> str:
    if kind not in KINDS or kind in ("observer", "workload", "task"):
        kinds = sorted(set(KINDS) - {"observer", "workload", "task"})
        raise ConfigError(f"LLM takes no argument {kind!r}", do=nearest(kind, kinds))
    return kind


def _plugin(kind: str, plugin: Plugin, registry: Registry) -> Any:
    """A section of the configuration; Python objects are registered first."""
    if isinstance(plugin, str | Mapping):
        return dict(plugin) if isinstance(plugin, Mapping) else plugin
    cls = plugin if isinstance(plugin, type) else type(plugin)
    spec = getattr(plugin, "spec", None)
    if not isinstance(spec, PluginSpec):
        name = getattr(plugin, "__name__", cls.__name__).lower().strip("_<>")
        spec = PluginSpec(name=name, factory=f"{cls.__module__}:{cls.__name__}", summary="given in Python")
    if (kind, spec.name) in registry.specs:
        spec = replace(spec, name=f"{spec.name}.python")
    callable_factory = isinstance(plugin, type) or not _is_instance(kind, plugin)
    factory = plugin if callable_factory else lambda config, context: plugin
    registry.add(kind, spec, factory=cast("Callable[..., Any]", factory))
    return spec.name


def _is_instance(kind: str, plugin: object) -> bool:
    """Whether it has what the family's protocol asks for; otherwise it is taken for a factory."""
    from servelab.core.compose import members

    return not callable(plugin) or all(hasattr(plugin, name) for name in members(KINDS[kind].protocol))


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[], object]]:
    if not show:
        yield lambda: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="req", desc="generate") as bar:
        yield bar.update
