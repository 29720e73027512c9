"""``results.json`` and its published schema agree, and the schema is strict enough to notice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tests.metrics.logs import MS, ended, started, three_requests
from tests.metrics.schema import SCHEMA, VALIDATOR, problems, result_of

from servelab.core.compose import Run
from servelab.core.environment import environment
from servelab.core.metrics import RESULT_SCHEMA, SummaryOptions, Timeline, summarize
from servelab.core.records import QualityBegan, QualityMeasured, Record

GLOSSARY = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"
CLASSES = {
    "num_requests": 24,
    "request_rate": 50,
    "classes": [{"name": "online"}, {"name": "offline"}, {"name": "own", "e2el_ms": 900, "tbt_ms": 7}],
}
SLO = {"ttft_ms": 50, "tpot_ms": 8, "e2el_ms": 400, "tbt_ms": 20, "classes": {"online": {"ttft_ms": 9}}}


def interrupt(run: Run) -> None:
    """Ctrl-C at the twentieth launch."""
    launches, launch = count(), run.executor.launch

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(launches) == 20:
            raise KeyboardInterrupt
        return launch(*args, **kwargs)

    run.executor.launch = interrupted  # type: ignore[method-assign]


GIVEN_UP = {"cancel_fraction": 1, "patience_ms": {"law": "constant", "value": 1}}
SHARED = {"num_requests": 24, "request_rate": 50, "prefix_tokens": 64}
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "slo": {"slo": SLO, "workload": {"name": "synthetic", **CLASSES}},
    "partial": {"spoil": interrupt},
    "nothing completed": {
        "workload": {"name": "synthetic", "num_requests": 24, "request_rate": 50, **GIVEN_UP},
        "slo": SLO,
    },
    "percentiles": {
        "observers": [
            {"name": "report", "percentiles": [0, 7.5, 99.9, 100], "tbt_ms": 6, "itl_mode": "spread"}
        ]
    },
    "prefix": {"prefix": {"name": "hash"}, "workload": {"name": "synthetic", **SHARED}},
    "all at once": {"workload": {"name": "synthetic", "num_requests": 5, "request_rate": float("inf")}},
}


@cache
def real(name: str) -> Any:
    with TemporaryDirectory() as folder:
        return result_of(Path(folder), **RUNS[name])


def quality_log() -> list[Record]:
    """As ``task=quality`` leaves it: nothing served, one quantizer compared."""
    figures = dict(kl_mean=0.1, kl_p99=0.5, kl_max=1.0, top1_agreement=0.9, perplexity=9.0)
    info = {
        **real("plain")["servelab"]["info"],
        **{key: real("plain")["servelab"][key] for key in ("plugins", "stamps", "seed", "clock")},
        "weights": {"bytes": 7},
        "quality": {"measured": True, "corpus": {"part": "evaluation"}, "quantizers": {"w8a16": {}}},
    }
    more = dict(reference_perplexity=8.0, linear_bytes=5, reference_linear_bytes=9, tokens=10, total=12)
    return [
        started(**info),
        QualityBegan(t_ns=0, labels=["w8a16"], total=12),
        QualityMeasured(t_ns=0, label="w8a16", windows=1, **figures, **more),  # type: ignore[arg-type]
        ended(0, "interrupted", "ctrl-c"),
    ]


def quality() -> Any:
    return summarize(Timeline().feed_all(quality_log()))


def test_the_schema_is_one_and_of_this_version() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    version = SCHEMA["properties"]["servelab"]["properties"]["schema_version"]["const"]
    assert version == RESULT_SCHEMA
    assert SCHEMA["$id"].endswith(f":{version}")


@pytest.mark.parametrize("name", RUNS)
def test_results_of_runs_are_valid(name: str) -> None:
    assert problems(real(name)) == []


def test_results_of_the_quality_task_are_valid() -> None:
    assert problems(quality()) == []
    assert (quality()["num_prompts"], real("plain")["num_prompts"]) == (0, 24)  # of the same workload


def test_the_runs_are_what_they_are_called() -> None:
    assert real("partial")["servelab"]["run"]["partial"]
    assert 0 < real("partial")["completed"] < 24
    nothing = real("nothing completed")
    assert (nothing["completed"], nothing["failed"], nothing["mean_ttft_ms"]) == (0, 24, None)
    assert "p99.9_itl_ms" in real("percentiles") and "p7.5_queueing_ms" in real("percentiles")["servelab"]
    assert real("prefix")["servelab"]["prefix_hit_tokens"] > 0
    assert set(real("slo")["servelab"]["slo_by_class"]) == {"offline", "online", "own"}
    assert real("all at once")["request_rate"] == "inf"
    assert real("plain")["servelab"]["notes"] == []  # no bounds at all: nothing to tell


# ------------------------------------------------------------------ strictness


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    return SCHEMA["$defs"][schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema


def closed(schema: dict[str, Any]) -> bool:
    return schema.get("additionalProperties") is False


def walk(value: Any, schema: dict[str, Any], path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths into a result, with the schema of each: ``(*path, schema)``."""
    schema = resolved(schema)
    yield (*path, schema)
    if isinstance(value, dict):
        for key, item in value.items():
            inner = schema.get("properties", {}).get(key)
            for pattern, one in schema.get("patternProperties", {}).items():
                inner = one if re.search(pattern, key) else inner
            if inner is None and isinstance(schema.get("additionalProperties"), dict):
                inner = schema["additionalProperties"]
            if inner is not None:
                yield from walk(item, inner, (*path, key))
    elif isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            yield from walk(item, schema["items"], (*path, index))


MISSING = object()


@contextmanager
def spoiled(result: Any, path: tuple[Any, ...], value: Any = MISSING) -> Iterator[None]:
    """Another value at a place of the result for a while, or none."""
    for key in path[:-1]:
        result = result[key]
    before = result.get(path[-1], MISSING) if isinstance(result, dict) else result[path[-1]]
    try:
        if value is MISSING:
            del result[path[-1]]
        else:
            result[path[-1]] = value
        yield
    finally:
        if before is MISSING:
            del result[path[-1]]
        else:
            result[path[-1]] = before


def test_every_key_that_goes_missing_is_noticed() -> None:
    for result in (real("slo"), quality()):
        for *path, schema in walk(result, SCHEMA):
            for key in schema.get("required", ()):
                with spoiled(result, (*path, key)):
                    assert not VALIDATOR.is_valid(result), (path, key)


def test_every_unknown_key_is_noticed() -> None:
    result = quality()
    for *path, schema in walk(result, SCHEMA):
        if closed(schema):
            with spoiled(result, (*path, "surprise"), 1):
                assert not VALIDATOR.is_valid(result), path


def test_every_wrong_type_is_noticed() -> None:
    result = real("slo")
    for *path, schema in walk(result, SCHEMA):
        if not path:
            continue
        types = schema.get("type", ())
        with spoiled(result, tuple(path), 7.5 if "string" in types or "array" in types else ["x"]):
            assert not VALIDATOR.is_valid(result), path


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("duration",), -1),
        (("servelab", "schema_version"), RESULT_SCHEMA - 1),
        (("servelab", "clock"), "sundial"),
        (("servelab", "slo_attainment"), 1.5),
        (("servelab", "run", "status"), "fine"),
        (("date",), "yesterday"),
        (("request_rate",), "infinite"),
        (("p200_ttft_ms",), 1.0),
    ],
)
def test_impossible_values_are_noticed(path: tuple[str, ...], value: Any) -> None:
    result = real("slo")
    with spoiled(result, path, value):
        assert not VALIDATOR.is_valid(result)
    assert VALIDATOR.is_valid(result)


# ------------------------------------------------------------------ documents


def properties(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every property of the schema, as the glossary writes keys."""
    schema = resolved(schema)
    named = {**schema.get("properties", {})}
    for pattern, one in schema.get("patternProperties", {}).items():
        named["p{P}_" + pattern.rsplit("_", 2)[1] + "_ms"] = one
    if isinstance(schema.get("additionalProperties"), dict):
        free = {"plugins": "{kind}", "slo_by_class": "{class}", "quality": "{quantizer}"}
        named[free.get(path.rsplit(".", 1)[-1], "*")] = schema["additionalProperties"]
    for key, inner in named.items():
        inner = resolved(inner)
        where = f"{path}.{key}" if path else key
        yield where, inner
        if inner.get("type") == "array":
            yield from properties(inner["items"], f"{where}[]")
        else:
            yield from properties(inner, where)


def test_every_property_is_described_and_every_number_has_a_unit() -> None:
    for path, schema in properties(SCHEMA):
        if path.endswith(".*"):
            continue
        assert schema.get("description", "").endswith("."), path
        types = [one.get("type", ()) for one in (schema, *schema.get("anyOf", ()))]
        flat = {kind for one in types for kind in ([one] if isinstance(one, str) else one)}
        if flat & {"number", "integer"} and path not in UNITLESS:
            assert schema.get("unit"), path
        if schema.get("unit") == "share":
            assert (schema["minimum"], schema["maximum"]) == (0, 1), path


UNITLESS = {"burstiness", "servelab.schema_version", "servelab.seed", "servelab.info.schema"}


def test_glossary_and_schema_have_the_same_keys_and_units() -> None:
    known: dict[str, str] = {}
    for path, schema in properties(SCHEMA):
        leaf = "properties" not in schema and schema.get("type") != "array"
        if path.startswith(("servelab.info.", "servelab.plugins.")) and path.count(".") > 2:
            continue  # told in a row of their parent
        if path.startswith(("servelab.quality.", "servelab.plugins.observer")):
            continue  # a table of their own; as any other kind
        if leaf or path.startswith(("servelab.info.", "servelab.plugins.")) or _list_of_text(schema):
            path = re.sub(r"_(ttft|tpot|itl|e2el)_ms$", "_{M}_ms", path)
            known[path] = schema.get("unit", "")
    known["servelab.quality"] = ""
    section = GLOSSARY.read_text().split("## Keys of the result")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \|([^|]*)\|", section, flags=re.MULTILINE)
    assert len(rows) == len(dict(rows))
    assert {key: unit.strip() for key, unit in rows} == known


def _list_of_text(schema: dict[str, Any]) -> bool:
    return schema.get("type") == "array" and schema["items"].get("type") == "string"


def test_quality_has_a_table_of_its_own() -> None:
    section = GLOSSARY.read_text().split("\n## Quality\n")[1].split("\n## ")[0]
    for name in SCHEMA["properties"]["servelab"]["properties"]["quality"]["additionalProperties"]["required"]:
        assert f"`{name}`" in section


def test_nothing_in_the_schema_is_only_there() -> None:
    """Every property occurs in some result: names that the code no longer writes would stay unnoticed."""
    seen: set[str] = set()
    for result in (*map(real, RUNS), quality()):
        seen |= set(_keys(result))
    for path, _ in properties(SCHEMA):
        pattern = re.escape(path).replace(r"\{P\}", r"[\d.]+").replace(r"\.\*", r"\..*")
        pattern = re.sub(r"\\\{\w+\\\}", r"[^.]+", pattern)
        if path == "servelab.info.quality.why":
            continue  # see tests/torch/test_quality.py
        assert any(re.fullmatch(pattern, key) for key in seen), path


def _keys(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            where = f"{path}.{key}" if path else key
            yield where
            yield from _keys(item, where)
    elif isinstance(value, list):
        for item in value:
            yield from _keys(item, f"{path}[]")


# ------------------------------------------------------------------ the layout


def test_flat_keys_are_those_of_vllm_in_its_order() -> None:
    flat = [key for key in real("plain") if not key.startswith(("mean", "median", "std", "p5", "p9"))]
    assert flat == [
        "date",
        "endpoint_type",
        "backend",
        "label",
        "model_id",
        "tokenizer_id",
        "num_prompts",
        "request_rate",
        "burstiness",
        "max_concurrency",
        "duration",
        "completed",
        "failed",
        "total_input_tokens",
        "total_output_tokens",
        "request_throughput",
        "request_goodput",
        "output_throughput",
        "total_token_throughput",
        "max_output_tokens_per_s",
        "max_concurrent_requests",
        "servelab",
    ]
    assert (real("plain")["num_prompts"], real("plain")["request_rate"], real("plain")["burstiness"]) == (
        24,
        50,
        1,
    )
    assert real("partial")["num_prompts"] == 24  # what was asked for, not what came


def test_what_stands_beside_the_figures_is_not_in_info_again() -> None:
    extra = real("slo")["servelab"]
    assert not {"plugins", "stamps", "seed", "clock"} & extra["info"].keys()
    assert extra["plugins"]["scheduler"].keys() >= {"name", "version", "paper", "non_default"}
    assert "settings" not in extra["plugins"]["scheduler"]
    assert extra["info"]["settings"]["scheduler"]["max_num_seqs"] == 256
    assert [one["name"] for one in extra["plugins"]["observer"]] == ["report"]
    assert extra["info"].items() >= environment().items()
    assert (extra["seed"], extra["clock"]) == (3, "virtual")


def test_real_costs_are_of_the_real_world() -> None:
    result = real("plain")
    extra = result["servelab"]
    assert 0 < extra["wall_s"] < 60  # the run itself is on the virtual clock
    assert 2**20 < extra["peak_rss_bytes"] < 2**45  # bytes: more than 1 MiB
    assert re.fullmatch(r"20\d{6}-\d{6}", result["date"])


def test_a_log_without_an_end_has_no_cost() -> None:
    result = summarize(Timeline().feed_all(three_requests()[:-1]), SummaryOptions(tbt_bound_ns=MS))
    assert (result["date"], result["servelab"]["wall_s"], result["servelab"]["peak_rss_bytes"]) == (None,) * 3
    assert result["num_prompts"] == 3  # what arrived, where the run does not say
