"""SamplingParams names every value it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from servelab.core.errors import ConfigError
from servelab.core.sampling import SamplingParams

WRONG: dict[str, list[Any]] = {
    "temperature": [-0.1, float("nan"), float("inf"), 10**400, True, "1", None],
    "top_k": [-2, 1.5, True, None],
    "top_p": [0, 0.0, -0.5, 1.1, float("nan"), True, "0.5"],
    "min_p": [-0.1, 1.1, float("nan"), False],
    "repetition_penalty": [0, -1.0, float("inf"), True],
    "presence_penalty": [-2.1, 2.1, float("nan"), True],
    "frequency_penalty": [-2.1, 2.1, float("nan"), True],
    "n": [0, -1, 1.5, True],
    "seed": [-1, 2**64, 1.0, True],
    "max_tokens": [0, -1, 2.0, True],
    "min_tokens": [-1, 17, 1.0, True, None],
    "stop": ["", ("a", ""), (1,), b"ab", 5, None],
    "stop_token_ids": [(-1,), (1.0,), (True,), "12", 7, None],
    "ignore_eos": [0, 1, None, "no"],
    "logprobs": [-1, 1.0, True],
}


def test_every_field_has_cases() -> None:
    assert set(WRONG) == set(SamplingParams.__dataclass_fields__)


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in WRONG.items() for v in values])
def test_a_wrong_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"range: {name} must be [^;]+$"):
        SamplingParams(**{name: value})


def test_all_wrong_values_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        SamplingParams(**{name: values[0] for name, values in WRONG.items()})
    assert all(f"{name} must be" in str(error.value) for name in WRONG)


@pytest.mark.parametrize(
    "right",
    [
        {},
        {"temperature": 0, "top_k": -1, "top_p": 1, "min_p": 0},
        {"temperature": 1e-5, "top_p": 1e-9, "min_p": 1.0, "repetition_penalty": 1e-3},
        {"presence_penalty": -2, "frequency_penalty": 2.0, "seed": 2**64 - 1},
        {"max_tokens": None, "min_tokens": 10**6},
        {"max_tokens": 5, "min_tokens": 5, "logprobs": 0, "ignore_eos": True},
    ],
)
def test_bounds_are_allowed_and_kept(right: dict[str, Any]) -> None:
    params = SamplingParams(**right)
    assert {name: getattr(params, name) for name in right} == right


def test_one_stop_text_is_one_text() -> None:
    assert SamplingParams(stop="end").stop == ("end",)  # type: ignore[arg-type]


def test_lists_become_tuples_so_that_params_can_be_keys() -> None:
    params = SamplingParams(stop=["a", "b"], stop_token_ids=[3, 1])  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (3, 1))
    assert hash(params) == hash(SamplingParams(stop=("a", "b"), stop_token_ids=(3, 1)))
