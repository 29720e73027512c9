"""Rows of a BurstGPT csv, checked; both column sets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from servelab.core.api import WorkloadError
from servelab.core.errors import nearest
from servelab.plugins.workloads._trace import Row
from servelab.plugins.workloads._trace_text import Source, believable

REMEDY = "fetch the publisher's: servelab data fetch burstgpt_1"

TIME, REQUEST, RESPONSE, TOTAL = "Timestamp", "Request tokens", "Response tokens", "Total tokens"
MODEL, LOG_TYPE = "Model", "Log Type"
SESSION = "Session ID"
"""Files since v1.2 have it, and Elapsed time: how long the service took, which is not read."""

LOG_TYPES = {"API log": 0, "Conversation log": 1}
MODELS_IN_A_FILE = 64

_TYPE_BITS, _MODEL_BITS = 1, 7
KINDS = 1 << _MODEL_BITS
"""Different tags without their session."""


@dataclass(slots=True)
class Names:
    """What the numbers in the tags of rows stand for, filled while reading."""

    models: dict[str, int] = field(default_factory=dict)
    sessions: dict[str, int] = field(default_factory=dict)
    """From 1 on, in order of appearance; 0 is none."""


def tag(log_type: int, model: int, session: int = 0) -> int:
    """All three in one number."""
    return session << _MODEL_BITS | model << _TYPE_BITS | log_type


def log_type_of(tag: int) -> int:
    """Value of ``LOG_TYPES``."""
    return tag & 1


def model_of(tag: int) -> int:
    """Value of ``Names.models``."""
    return tag >> _TYPE_BITS & MODELS_IN_A_FILE - 1


def session_of(tag: int) -> int:
    """Value of ``Names.sessions``; 0: none."""
    return tag >> _MODEL_BITS


def rows(path: Path, names: Names, *, sessions: bool) -> Iterator[Row]:
    """Time in ns, request tokens, response tokens (0: failed) and tag of each row.

    Args:
        path: the csv.
        names: filled.
        sessions: read the session of each row, where the file has them.

    Raises:
        WorkloadError: something is wrong in the file; it says where.
    """
    source = Source(path, REMEDY)
    checked = _rows(source, names, sessions)
    return believable(source, checked, ((REQUEST, 1), (RESPONSE, 2)))


def _rows(source: Source, names: Names, sessions: bool) -> Iterator[Row]:
    last_ns = 0
    required = (TIME, MODEL, REQUEST, RESPONSE, TOTAL, LOG_TYPE)
    for when, model, req, resp, total, kind, session in source.table(required, (SESSION,)):
        time_ns = source.seconds(when, TIME)
        source.in_order(time_ns, last_ns, TIME, when)
        last_ns = time_ns
        request, response = source.whole(req, REQUEST), source.whole(resp, RESPONSE)
        if source.whole(total, TOTAL) != request + response:
            raise source.fault(
                f"the total is {total}, request and response are {request + response} tokens",
                TOTAL,
                f"{request} + {response} = {request + response}, and the total of every row of the real file "
                "is the sum",
                REMEDY,
            )
        if not request and response:
            raise source.fault(
                f"{response} tokens answer a request of 0 tokens",
                REQUEST,
                "only failed rows, which have 0 response tokens, have no request tokens",
                "correct the cell or delete the row",
            )
        if kind not in LOG_TYPES:
            raise source.fault(
                f"unknown log type {kind!r}", LOG_TYPE, "the column says who asked", nearest(kind, LOG_TYPES)
            )
        number = 0
        if sessions and session.strip():
            number = names.sessions.setdefault(session.strip(), len(names.sessions) + 1)
        yield time_ns, request, response, tag(LOG_TYPES[kind], _model(source, names, model), number)


def _model(source: Source, names: Names, model: str) -> int:
    known = names.models.get(model)
    if known is not None:
        return known
    if not model.strip() or len(names.models) == MODELS_IN_A_FILE:
        raise source.fault(
            "a row without a model" if not model.strip() else f"{model!r} is the 65th name of a model",
            MODEL,
            "the column names the model that was asked, one of a few",
            REMEDY,
        )
    names.models[model] = len(names.models)
    return names.models[model]


def unknown_model(wanted: str, names: Names) -> WorkloadError:
    """The error about a filter that no row passes."""
    return WorkloadError(
        f"no row of the slice asks model {wanted!r}",
        where="workload.model",
        why=f"rows were read of {', '.join(names.models)}",
        do=nearest(wanted, names.models),
    )
