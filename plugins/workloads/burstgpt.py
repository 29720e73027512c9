"""BurstGPT: requests to a campus's ChatGPT and GPT-4 service, replayed from its csv or drawn like it.

Source: Wang et al., BurstGPT (2024, arXiv 2401.17644; HPMLL/BurstGPT, data CC-BY-4.0).

Mechanism: with ``path`` the rows of the csv are replayed: times, request and response tokens, sessions where
the file has them. Without, "BurstGPT-like" requests are drawn from laws that follow the published statistics
(``_burstgpt_like.py`` lists each constant with its origin): log type 54/46, model 84/16; conversation
requests Weibull, responses growing with the request; API requests log-normal, responses a short spike; Gamma
gaps whose shape changes every 60 s. Caps are drawn independently of true lengths, which are hidden.

Symbols: R -> request_rate; g -> shape (CV of gaps = 1/sqrt(g)); p -> share that thinning keeps.

Deviations:
1. A failed row (0 response tokens) cannot be served as such: an engine that reads a prompt answers at least
   one token. By default it is replayed with 1 output token, and 1 prompt token where the file says 0; with
   ``failures: drop`` it is left out. Generated traffic has no failures.
2. Generated traffic has one mean rate: no days, no nights. Model and log type are drawn independently, and a
   log type's shape of gaps is that of all.
3. Turns of a session come at their recorded times, whenever the turn before them ends; how much of a prompt
   repeats the turn before is not recorded, so ``context_tokens`` is 0.

Faithful when: both column sets load; failures are dropped only on request; Total = Request + Response on
every row; scaling times keeps the CV of gaps; generated percentiles are within 15 % of the published ones.

Tier: stable.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from servelab.core.api import Context
from servelab.plugins.workloads import _burstgpt_file as file
from servelab.plugins.workloads import _burstgpt_like as like
from servelab.plugins.workloads._trace import Columns, Replay, Row, TraceConfig, sliced, taken
from servelab.plugins.workloads._trace_path import trace_path

DEFAULT_REQUESTS = 1_000
"""Generated requests unless stated. Ours."""
DEFAULT_RATE = 4.0
"""Their rate unless stated, requests/s. Ours: a 7B model on one A100 keeps up with it."""


class BurstGPTConfig(TraceConfig):
    """Settings of the ``burstgpt`` workload."""

    path: str | None = Field(
        default=None,
        min_length=1,
        description="csv of BurstGPT, with or without Session ID and Elapsed time: a file, cache:FILE, or "
        "the name of a fetched data set (burstgpt_1). None: BurstGPT-like requests are drawn, 1000 of them "
        "at 4 a second unless num_requests and request_rate are stated.",
    )
    log_type: Literal["all", "conversation", "api"] = Field(
        default="all",
        description="Only requests of the web interface (conversation) or of programs (api). Generated "
        "conversations have 262 output tokens in the mean, all requests 127.",
    )
    model: str = Field(
        default="all", min_length=1, description="Only requests to this model: ChatGPT or GPT-4; all: both."
    )
    failures: Literal["one_token", "drop"] = Field(
        default="one_token",
        description="Rows of 0 response tokens, which failed: replayed with 1 output token (and 1 prompt "
        "token where there is none), or left out. Files only.",
    )
    sessions: bool = Field(
        default=True, description="Make rows of one Session ID the turns of one program. Files only."
    )

    conversation_share: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of conversations among generated requests; None: 27737/59999, as published.",
    )
    gpt4_share: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of GPT-4 among generated requests; None: 9505/59999, as published.",
    )
    shape: tuple[float, float] = Field(
        default=like.SHAPE,
        description="Generated gaps are Gamma with a shape drawn log-uniformly from this range; [1, 1] is "
        "Poisson. Ours.",
    )
    shape_window_s: float = Field(
        default=like.SHAPE_WINDOW_S,
        gt=0,
        allow_inf_nan=False,
        description="Seconds between two draws of the shape; the official example's.",
    )

    @model_validator(mode="after")
    def _of_one_source(self) -> Self:
        of_files = ("start_s", "duration_s", "rescale", "failures", "sessions")
        of_laws = ("conversation_share", "gpt4_share", "shape", "shape_window_s")
        fields = type(self).model_fields
        wrong = [n for n in (of_laws if self.path else of_files) if getattr(self, n) != fields[n].default]
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)}: of no effect "
                + ("on a file (path is set): remove path or these" if self.path else "without path=FILE")
            )
        low, high = self.shape
        if not 1e-3 <= low <= high < math.inf:
            raise ValueError(f"shape {list(self.shape)} must be two numbers, 0.001 <= low <= high")
        if self.path is None and self.model not in ("all", "ChatGPT", "GPT-4"):
            raise ValueError(f"generated requests go to ChatGPT or GPT-4, not to model {self.model!r}")
        return self


class BurstGPT(Replay):
    """Open loop. Columns are drawn or read at construction, 28 bytes a request; requests are made when asked
    for.

    Raises:
        WorkloadError: the file, the slice, or a request's length.
    """

    def __init__(self, config: BurstGPTConfig, ctx: Context) -> None:
        self.root = ctx.rng.getrandbits(64)
        columns, done = self._replayed(config) if config.path else self._generated(config)
        super().__init__(config, ctx, columns, done)
        log_types = {number: name.partition(" ")[0].lower() for name, number in file.LOG_TYPES.items()}
        models = {number: name for name, number in self._names.models.items()}
        self._features = [
            {
                "log_type": log_types[file.log_type_of(tag)],
                "service_model": models.get(file.model_of(tag), ""),
            }
            for tag in range(file.KINDS)
        ]
        """Of requests by their tag without its session; all of one kind share theirs."""
        self._sessions = bool(self._names.sessions)
        self._names.sessions.clear()  # only their numbers are used from here on
        self._turns, self._last_turns = _turns(self._columns.tags) if self._sessions else (array("i"), b"")
        self._done |= self._counts()

    def about(self, place: int) -> Mapping[str, Any]:
        tag = self._columns.tags[place]
        features = self._features[tag & file.KINDS - 1]
        session = file.session_of(tag)
        if not session:
            return {"features": features}
        return {
            "features": features,
            "program": f"s{session}",
            "turn": self._turns[place],
            "is_last_turn": bool(self._last_turns[place]),
        }

    def _counts(self) -> dict[str, Any]:
        """Requests by what the tags say; sessions."""
        kinds = Counter(tag & file.KINDS - 1 for tag in self._columns.tags)
        log_types, models = Counter[str](), Counter[str]()
        for tag, n in kinds.items():
            log_types[self._features[tag]["log_type"]] += n
            models[self._features[tag]["service_model"]] += n
        counts: dict[str, Any] = {"log_types": dict(log_types), "service_models": dict(models)}
        if self._sessions:
            in_session = sum(file.session_of(tag) > 0 for tag in self._columns.tags)
            programs = sum(self._last_turns)
            counts |= {"programs": programs, "turns": in_session / programs if programs else 1}
        return counts

    def _generated(self, config: BurstGPTConfig) -> tuple[Columns, dict[str, Any]]:
        share = config.conversation_share
        conversations = {"conversation": 1.0, "api": 0.0}.get(config.log_type, share)
        gpt4 = {"GPT-4": 1.0, "ChatGPT": 0.0}.get(config.model, config.gpt4_share)
        columns = like.draw(
            config.num_requests or DEFAULT_REQUESTS,
            self._stream,
            rate=config.request_rate or DEFAULT_RATE,
            shapes=config.shape,
            window_s=config.shape_window_s,
            conversation_share=like.CONVERSATION_SHARE if conversations is None else conversations,
            gpt4_share=like.GPT4_SHARE if gpt4 is None else gpt4,
        )
        self._names = file.Names(models={"ChatGPT": 0, "GPT-4": 1})
        return columns, {"traffic": "BurstGPT-like", "constants": like.ORIGINS}

    def _replayed(self, config: BurstGPTConfig) -> tuple[Columns, dict[str, Any]]:
        path = trace_path(config.path or "", file.REMEDY)
        self._names = names = file.Names()
        counts: Counter[str] = Counter()
        rows = sliced(file.rows(path, names, sessions=config.sessions), config)
        wanted = self._wanted(rows, config, counts)
        columns, done = taken(wanted, config, self._stream("thin"))
        return columns, {
            "traffic": f"BurstGPT, {path.name}",
            **done,
            "failed_rows": {"rule": config.failures, "rows": counts["failed"]},
        }

    def _wanted(self, rows: Iterable[Row], config: BurstGPTConfig, counts: Counter[str]) -> Iterator[Row]:
        """Rows that pass the filters, failures as the settings say."""
        names = self._names
        log_type = {"all": None, "api": 0, "conversation": 1}[config.log_type]
        everybody, found = config.model == "all", False
        for row in rows:
            time_ns, request, response, tag = row
            if not everybody and names.models.get(config.model) != file.model_of(tag):
                continue
            found = True
            if log_type is not None and file.log_type_of(tag) != log_type:
                continue
            if response:
                yield row
                continue
            counts["failed"] += 1
            if config.failures == "one_token":
                yield time_ns, request or 1, 1, tag
        if not found and not everybody:
            raise file.unknown_model(config.model, names)


def _turns(tags: array[int]) -> tuple[array[int], bytes]:
    """Of each request, its turn in its session and 1 if it is the last; 0 and 0 without a session."""
    done = Counter[int]()
    turns = array("i")
    for tag in tags:
        session = file.session_of(tag)
        turns.append(done[session])
        done[session] += 1
    last = bytearray(len(tags))
    for place, tag in enumerate(tags):
        session = file.session_of(tag)
        last[place] = session > 0 and turns[place] + 1 == done[session]
    return turns, bytes(last)
