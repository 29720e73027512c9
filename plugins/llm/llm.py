"""``LLM``: the engine behind a Python object, for notebooks and scripts.

from servelab import LLM, SamplingParams

llm = LLM()                                     # SmolLM2-135M-Instruct on this machine's CPU
[out] = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8))
print(out.text, out.finish_reason, out.timings.ttft_s)
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from operator import index
from pathlib import Path
from typing import Any, Self, SupportsIndex, cast

from servelab.core.client import Box, Client, Event
from servelab.core.errors import ConfigError, ServeLabError
from servelab.core.records import RequestAdmitted, RequestArrived, RequestFinished, TokensEmitted
from servelab.core.request import RequestSpec, sample_id
from servelab.core.sampling import SamplingParams
from servelab.core.stops import visible_text
from servelab.core.text import Tokenizer
from servelab.plugins.llm.stream_text import StreamText

Prompt = str | Iterable[SupportsIndex]
"""A text, or token ids: whole numbers of any kind, also in an array or tensor."""
Plugin = Any
"""A name, a mapping of settings (with ``name``, if another than the configured one), or an object, class or
factory of the family."""
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
    siblings: tuple[Completion, ...] = ()
    """The other outputs of its prompt, if ``SamplingParams.n`` asked for several."""

    @property
    def samples(self) -> tuple[Completion, ...]:
        """All outputs of its prompt, itself first."""
        return (self, *self.siblings)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A piece of a streamed output."""

    text: str
    """New text; may be empty while a character or a possible stop text is incomplete."""
    token_ids: tuple[int, ...]
    """New output ids."""
    completion: Completion | None = None
    """With the last chunk: the whole."""
    sample: int = 0
    """Which of the prompt's outputs it belongs to, if ``SamplingParams.n`` asked for several."""


class LLM:
    """A model behind ServeLab's engine.

    Args:
        model: a name in ``configs/model``, a folder in Hugging Face format, a GGUF file, or OWNER/NAME of a
            repository on the Hugging Face hub.
        scheduler, quant, **families: plugins by kind (``kvcache=``, ``kernel=``, ``executor=``, ...), each as
            a name, a mapping ``{"name": ..., setting: value}``, or a Python object: an instance, or a class
            or factory called as ``factory(config, context)``. Its attribute ``spec``, a ``PluginSpec``, says
            what it can do and needs; without one it promises nothing.
        dtype: ``bfloat16``, ``float32``, ``float64`` or ``float16``; None: the configured one, bfloat16.
        seed: every generator derives from it. Requests without a seed of their own draw from it and from
            their number in this LLM (who came first, if threads share it): nothing that runs beside them
            changes their tokens.
        max_model_len: prompt plus output tokens of one request. None: the longest context of the model, or
            what KV memory holds (``executor.kv_memory_mib``) if that is less; the attribute of the same name
            says which it became.
        observers: watchers, likewise as names, mappings or objects; they see one run from here to ``close``.
        run_dir: where observers may write.
        overrides: further settings as on the command line, ``"scheduler.max_num_batched_tokens=512"``.

    Methods may be called from several threads; their requests are batched together. Use it as a context
    manager, or ``close`` it, to free the memory at once.

    Raises:
        ServeLabError: whatever does not fit together, before anything is loaded where that can be known.
    """

    def __init__(
        self,
        model: str | Path = "smollm2_135m",
        *,
        scheduler: Plugin = None,
        quant: Plugin = None,
        dtype: str | None = None,
        seed: int = 0,
        max_model_len: int | None = None,
        observers: Sequence[Any] = (),
        run_dir: str | Path | None = None,
        overrides: str | Sequence[str] = (),
        **families: Plugin,
    ) -> None:
        from servelab.core.compose import compose
        from servelab.plugins.llm.setup import configure, model_lines

        lines = [*model_lines(model), f"seed={seed}"]
        if dtype is not None:
            lines.append(f"model.dtype={str(dtype).removeprefix('torch.')}")
        if max_model_len is not None:
            lines.append(f"engine.max_model_len={max_model_len}")
        plugins = {"scheduler": scheduler, "quant": quant, **families}
        more = [overrides] if isinstance(overrides, str) else list(overrides)
        config, registry = configure(lines, plugins, observers, more)
        folder = None if run_dir is None else Path(run_dir)
        run = compose(config, registry, run_dir=folder, fit_length=True)
        tokenizer = getattr(run.executor, "tokenizer", None)
        try:
            if tokenizer is None:
                raise ConfigError(
                    f"executor {run.config.executor.name!r} has no tokenizer",
                    where="LLM",
                    why="prompts are texts",
                    do="leave executor out, or take one that runs a model (torch)",
                )
            self._client = Client(run)
        except BaseException:
            run.close()
            raise
        self.info = run.info
        """What identifies the run: settings, plugins, versions, weights, KV layout."""
        self.tokenizer: Tokenizer = tokenizer
        self.max_model_len = run.engine.limits.max_model_len
        """Prompt plus output tokens of one request."""
        self._vocab = run.engine.model.vocab
        self._ids = count()
        weakref.finalize(self, self._client.let_go).atexit = False  # the client sees to the exit

    # -------------------------------------------------------------- generate

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[Completion]:
        """Complete prompts, batched by the engine; one completion for each, in their order.

        With ``SamplingParams(n=...)`` it is the prompt's first output; the others are its ``siblings``.

        Args:
            prompts: one or many, each a text or token ids. None: an empty list comes back.
            params: for all, or one for each; None: the defaults of ``SamplingParams``.
            progress: show a bar on stderr; None: on a terminal, with more than one prompt.

        Raises:
            ConfigError: a prompt that is empty, too long or outside the vocabulary; nothing has run then.
            ServeLabError: the engine has stopped, and why.
            KeyboardInterrupt: Ctrl-C; the requests of this call are given up, the LLM stays usable.
        """
        specs = self._specs(_many(prompts), params)
        show = len(specs) > 1 and sys.stderr.isatty() if progress is None else progress
        done = []
        try:
            boxes = [self._client.send(spec) for _, spec in specs]
            with _bar(len(specs), show) as tick:
                for (text, spec), box in zip(specs, boxes, strict=True):
                    done.append(self._samples(text, spec, list(self._events(box, spec.n))))
                    tick()
        finally:
            for _, spec in specs[len(done) :]:  # Ctrl-C, an error: what still runs is given up
                self._client.forget(spec)
        return done

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[Completion]:
        """Answer conversations through the model's chat template; one, or a list of them."""
        if isinstance(messages, str | Mapping):
            raise ConfigError(
                f"messages are {messages!r:.60}",
                where="LLM.chat",
                do='give a list of messages, [{"role": "user", "content": "..."}], or a list of such lists',
            )
        talks = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [self.tokenizer.chat(cast("Sequence[Message]", talk)) for talk in talks]
        return self.generate(prompts, params, progress=progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[Chunk]:
        """Complete one prompt, piece by piece: texts and ids of the chunks add up to those of the whole.

        With ``SamplingParams(n=...)`` the chunks of all outputs come as they are made, see ``Chunk.sample``.

        The request starts with the first ``next``. Closing the iterator early gives it up. For a
        conversation: ``stream(llm.tokenizer.chat(messages))``.
        """
        [(text, spec)] = self._specs([prompt], params)
        return self._stream(text, spec)

    def _stream(self, text: str | None, spec: RequestSpec) -> Generator[Chunk]:
        numbers = {sample_id(spec.id, k): k for k in range(spec.n)}
        shown, events = [""] * spec.n, [list[Event]() for _ in numbers]
        growing = [StreamText(self.tokenizer.decode, spec.sampling, self.tokenizer.stop_ids) for _ in numbers]
        try:
            for event in self._events(self._client.send(spec, live=True), spec.n):
                k = numbers[event.request]
                events[k].append(event)
                if isinstance(event, TokensEmitted):
                    new = growing[k].add(event.tokens)
                    shown[k] += new
                    yield Chunk(text=new, token_ids=tuple(event.tokens), sample=k)
                elif isinstance(event, RequestFinished):
                    whole = self._completion(text, spec, event.request, events[k])
                    yield Chunk(text=whole.text[len(shown[k]) :], token_ids=(), completion=whole, sample=k)
        finally:
            self._client.forget(spec)

    def _events(self, box: Box, samples: int) -> Iterator[Event]:
        while samples:
            event = self._client.receive(box)
            yield event
            samples -= isinstance(event, RequestFinished)

    # -------------------------------------------------------------- requests

    def _specs(
        self, prompts: Iterable[Prompt], params: SamplingParams | Iterable[SamplingParams] | None
    ) -> list[tuple[str | None, RequestSpec]]:
        """Checked requests with the text of their prompts; all problems in one error."""
        prompts = list(prompts)
        if isinstance(params, Mapping):
            raise ConfigError("params must be SamplingParams", where=f"params={params!r:.60}")
        if params is None or isinstance(params, SamplingParams):
            each = [params or SamplingParams()] * len(prompts)
        else:
            each = list(params)
        if len(each) != len(prompts):
            raise ConfigError(
                f"{len(prompts)} prompts have {len(each)} sampling parameters",
                where="params",
                do="give one for all, or one for each",
            )
        found, problems = [], []
        for i, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
            try:
                found.append((prompt if isinstance(prompt, str) else None, self._spec(prompt, one)))
            except ValueError as exc:
                problems.append(f"prompt {i}: {exc}")
        if problems:
            raise ConfigError("\n".join(["prompts cannot be served:", *(f"  - {p}" for p in problems)]))
        return [(text, replace(spec, id=f"r{next(self._ids)}")) for text, spec in found]

    def _spec(self, prompt: Prompt, params: SamplingParams) -> RequestSpec:
        """The request of one prompt, without its id; ValueError with what is wrong."""
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, got {params!r:.60}")
        if isinstance(prompt, str) and not prompt.isascii():
            try:
                prompt.encode()
            except UnicodeEncodeError as exc:
                raise ValueError(f"it is not a whole text: {exc.reason} at character {exc.start}") from exc
        ids = tuple(self.tokenizer.encode(prompt)) if isinstance(prompt, str) else _ids(prompt)
        if not ids:
            raise ValueError("it is empty; a model needs at least one token")
        vocabulary = range(min(self.tokenizer.vocab_size, self._vocab))
        wrong = next((i for i in ids if i not in vocabulary), None)
        if wrong is not None:
            raise ValueError(f"{wrong} is no token id; they are 0 to {vocabulary[-1]}")
        ends = {*params.stop_token_ids, *self.tokenizer.stop_ids}
        if params.min_tokens and ends.issuperset(vocabulary):
            raise ValueError(f"min_tokens={params.min_tokens} leaves no token: every one ends the output")
        room = self.max_model_len - len(ids)
        if room < 1:
            raise ValueError(
                f"its {len(ids)} tokens leave no room for output; the limit for both is {self.max_model_len} "
                "(max_model_len): shorten it, or raise the limit as far as the model's context and KV memory "
                "(executor.kv_memory_mib) allow"
            )
        most = room if params.max_tokens is None else min(params.max_tokens, room)
        return RequestSpec(
            id="",
            prompt_tokens=len(ids),
            max_new_tokens=most,
            prompt_ids=ids,
            sampling=params,
            n=params.n,
        )

    def _samples(self, text: str | None, spec: RequestSpec, events: Sequence[Event]) -> Completion:
        """The outputs of a prompt from its records."""
        first, *others = (
            self._completion(text, spec, id, [e for e in events if e.request == id])
            for id in (sample_id(spec.id, k) for k in range(spec.n))
        )
        return replace(first, siblings=tuple(others)) if others else first

    def _completion(
        self, text: str | None, spec: RequestSpec, request: str, events: Sequence[Event]
    ) -> Completion:
        """One output from its records."""
        arrived = next(e.t_ns for e in events if isinstance(e, RequestArrived))
        admitted = next((e.t_ns for e in events if isinstance(e, RequestAdmitted)), None)
        emitted = [e for e in events if isinstance(e, TokensEmitted)]
        end = cast("RequestFinished", events[-1])
        if end.outcome == "failed":
            raise ServeLabError(f"request {request} could not be served", where="the engine", why=end.reason)
        ids = [token for e in emitted for token in e.tokens]
        times = tuple((e.t_ns - arrived) / 1e9 for e in emitted for _ in e.tokens)
        visible, stopped = "", None
        if ids:
            visible, stopped = visible_text(
                self.tokenizer.decode, ids, spec.sampling, self.tokenizer.stop_ids
            )
        asked = spec.sampling.logprobs is not None
        return Completion(
            request_id=request,
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
        """Give up what still runs (its callers get what there is, ``abort``) and free the model.

        Harmless when repeated.
        """
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _many(prompts: Prompt | Iterable[Prompt]) -> Iterable[Prompt]:
    """A list of prompts, also of one: a text, or a sequence of numbers."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes | Mapping) or not hasattr(prompts, "__iter__"):
        raise ConfigError(
            f"prompts are {prompts!r:.60}", where="LLM", do="give a text, token ids, or a list of these"
        )
    several = list(prompts)
    return cast("list[Prompt]", [several] if several and _is_number(several[0]) else several)


def _is_number(value: object) -> bool:
    """Whether it is one whole number; rows of arrays and tensors offer ``__index__`` too."""
    number = hasattr(value, "__index__") and not isinstance(value, bool)
    return number and getattr(value, "ndim", 0) == 0


def _ids(prompt: Iterable[SupportsIndex]) -> tuple[int, ...]:
    if isinstance(prompt, bytes | Mapping) or not hasattr(prompt, "__iter__"):
        raise ValueError(f"it must be a text or token ids, got {prompt!r:.60}")
    ids = []
    for value in prompt:
        try:
            ids.append(index(value if _is_number(value) else None))  # type: ignore[arg-type]
        except TypeError:
            raise ValueError(f"{value!r:.60} is no token id") from None
    return tuple(ids)


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[], object]]:
    if not show:
        yield lambda: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="req", desc="generate") as bar:
        yield bar.update
