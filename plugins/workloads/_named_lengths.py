"""Laws of lengths that have a name, each figure with its source.

[code]: read in a published artifact. [data]: computed by us from a published file. [ours]: our choice. No
data is shipped: these are laws that resemble it, and results are results on something like the named set.
"""

from __future__ import annotations

from typing import Any

from servelab.core.errors import nearest

PERCENT = (0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 100)
"""Levels of the percentiles marked [data]."""


def _uniform(low: int, high: int) -> dict[str, Any]:
    return {"law": "uniform", "min": low, "max": high}


def _lognormal(median: float, sigma: float, high: int) -> dict[str, Any]:
    return {"law": "lognormal", "median": median, "sigma": sigma, "max": high}


def _zipf(mean: int, alpha: float) -> dict[str, Any]:
    law = {"law": "zipf", "mean": mean, "alpha": alpha, "max": 6144}
    return {"prompt_length": law, "output_length": law, "max_new_tokens": 6144}


def _measured(*values: int) -> dict[str, Any]:
    return {"law": "quantiles", "levels": PERCENT, "values": values}


def _part(weight: float, **laws: Any) -> dict[str, Any]:
    """Part of the one class of all requests, so that no policy sees which part a request is from."""
    return {"name": "online", "weight": weight, **laws}


NAMED: dict[str, dict[str, Any]] = {
    # Past-Future (Gong et al., ASPLOS 2025) [code: WuSiYu/lightllm-ae]. Caps: the longest output of each
    # [ours].
    "pastfuture_d1": {
        "prompt_length": _uniform(32, 4096),
        "output_length": _uniform(2048, 4096),
        "max_new_tokens": 4096,
    },
    "pastfuture_d2": {
        "prompt_length": _uniform(3000, 5000),
        "output_length": _uniform(3000, 5000),
        "max_new_tokens": 5000,
    },
    "pastfuture_d3": {
        "prompt_length": _uniform(2048, 4096),
        "output_length": _uniform(32, 4096),
        "max_new_tokens": 4096,
    },
    # The same study's ShareGPT-o1, 1,981 requests, means 380.6 and 2,160.1 [data: WuSiYu/lightllm-ae]. Its
    # longest prompts are few: hence 99.5 %. Cap: the longest output [ours].
    "sharegpt_o1_like": {
        "prompt_length": {
            "law": "quantiles",
            "levels": (*PERCENT[:-1], 99.5, 100),
            "values": (9, 10, 14, 17, 25, 40, 90, 209, 331, 446, 628, 839, 1217, 1951, 2594, 3015, 10798),
        },
        "output_length": _measured(
            149, 284, 463, 663, 1021, 1345, 1638, 1954, 2234, 2618, 3082, 3872, 4569, 5786, 6428, 10935
        ),
        "max_new_tokens": 10935,
    },
    # ShareGPT as of LLMServingSim, 300 requests in Llama-3.1 tokens, prompts of mean 857.5 [data:
    # casys-kaist/LLMServingSim]. Outputs were generated anew there: mean 652.5, CV 0.15, so not for studies
    # of tails. Means of sets called ShareGPT differ 5 times between papers.
    "sharegpt_like": {
        "prompt_length": _measured(
            262, 264, 308, 363, 435, 521, 621, 732, 834, 1018, 1214, 1460, 1749, 2357, 2765, 3998
        ),
        "output_length": _measured(
            512, 516, 524, 531, 550, 574, 592, 632, 699, 752, 768, 770, 773, 777, 784, 1021
        ),
        "max_new_tokens": 2048,
    },
    # ShareGPT as of Sarathi-Serve (Agrawal et al., OSDI 2024), its openchat_sharegpt4: median and p90 of
    # prompts 1,730 and 5,696, of outputs 415 and 834, cut at 8,192 [from memory, not verified]; log-normal
    # through both [ours].
    "sharegpt_sarathi_like": {
        "prompt_length": _lognormal(1730, 0.9299, 7168),
        "output_length": _lognormal(415, 0.5446, 1024),
        "max_new_tokens": 1024,
    },
    # LMSYS chat as of APEX, 1,024 requests, means 61.7 and 162.1 [data: microsoft/apex_plus].
    "lmsys_like": {
        "prompt_length": _measured(2, 2, 3, 5, 8, 10, 13, 17, 24, 36, 66, 177, 308, 484, 586, 1037),
        "output_length": _measured(1, 2, 8, 12, 28, 50, 79, 117, 165, 227, 300, 389, 436, 481, 533, 761),
        "max_new_tokens": 1024,
    },
    # arXiv summarisation as of Vidur in Llama-2 tokens, 28,257 requests, means 2,588 and 291, no request
    # longer than 4,096 [data: microsoft/vidur]. In 4.4 % of them the output has 1,000 tokens and more and
    # the prompt is short: a part of its own, the two being independent within each [ours].
    "arxiv_like": {
        "max_new_tokens": 4096,
        "classes": [
            _part(
                27016,
                prompt_length=_measured(
                    1, 620, 1125, 1487, 1925, 2244, 2531, 2788, 3043, 3281, 3508, 3712, 3818, 3895, 3936, 4054
                ),
                output_length=_measured(
                    5, 35, 59, 77, 102, 122, 141, 162, 185, 212, 249, 316, 388, 508, 645, 999
                ),
            ),
            _part(
                1241,
                prompt_length=_measured(
                    1, 1, 1, 30, 68, 123, 213, 322, 447, 604, 816, 1240, 1817, 2342, 2648, 3022
                ),
                output_length=_measured(
                    1004,
                    1028,
                    1159,
                    1415,
                    1813,
                    2156,
                    2430,
                    2677,
                    2873,
                    3083,
                    3341,
                    3625,
                    3759,
                    3863,
                    3955,
                    4056,
                ),
            ),
        ],
    },
    # arXiv summarisation as of Sarathi-Serve: median and p90 of prompts 7,059 and 12,985, of outputs 208
    # and 371, cut at 16,384 [from memory, not verified]; log-normal through both [ours].
    "arxiv_sarathi_like": {
        "prompt_length": _lognormal(7059, 0.4756, 15360),
        "output_length": _lognormal(208, 0.4515, 1024),
        "max_new_tokens": 1024,
    },
    # Reasoning: outputs by difficulty, easy, medium and hard .5, .35 and .15, medians 600, 1,800 and 5,000,
    # sigma 0.6 [ours], cut at the largest budget of the study of reasoning models (lqinfdim/RLMServing),
    # 20,480 [code]. Prompts: mean 1,596 [data: ServeGen's deepseek-r1, alibaba/ServeGen]; log-normal, sigma
    # 1.0 [ours].
    "reasoning_like": {
        "prompt_length": _lognormal(974.3, 1.0, 16384),
        "max_new_tokens": 20480,
        "classes": [
            _part(0.50, output_length=_lognormal(600, 0.6, 20480)),
            _part(0.35, output_length=_lognormal(1800, 0.6, 20480)),
            _part(0.15, output_length=_lognormal(5000, 0.6, 20480)),
        ],
    },
    # Llumnix (Sun et al., OSDI 2024), its four generated laws, for prompts and outputs alike [code].
    "zipf_128": _zipf(128, 2.0),
    "zipf_256": _zipf(256, 1.5),
    "zipf_512": _zipf(512, 1.15),
    "zipf_1024": _zipf(1024, 1.0005),
}
"""Settings by name."""


def named(name: str) -> dict[str, Any]:
    """The settings of a name: ``prompt_length``, ``output_length``, ``max_new_tokens``, maybe ``classes``.

    Raises:
        ValueError: no laws have this name.
    """
    if name not in NAMED:
        raise ValueError(f"no lengths are called {name!r}; {nearest(name, NAMED)}")
    return NAMED[name]
