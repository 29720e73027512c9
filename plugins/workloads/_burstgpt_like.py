"""BurstGPT-like requests: drawn from laws that follow the trace's published statistics.

What is published of the trace (HPMLL/BurstGPT): shares of log types and models, percentiles of lengths over
the first 59,999 rows, the growth of responses with requests in conversations (a figure), and that gaps follow
a Gamma law whose parameters drift. The csv itself is not needed. Constants below say where they come from;
"fitted" means: to the percentiles below, by least squares of logarithms, everything else being held.

| first 59,999 rows, published | mean | p50 | p90 | p95 | p99 |
|---|---|---|---|---|---|
| request tokens | 374 | 74 | 1,291 | 1,697 | 3,023 |
| response tokens | 122 | 14 | 401 | 510 | 757 |
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from random import Random

from servelab.plugins.workloads._arrivals import NS
from servelab.plugins.workloads._trace import Columns

CONVERSATION_SHARE = 27_737 / 59_999
"""Conversation log of all rows, first 59,999 rows, published."""
GPT4_SHARE = 9_505 / 59_999
"""GPT-4 of all rows, same source. Drawn independently of the log type: no joint figure is published."""

LONGEST_REQUEST, LONGEST_RESPONSE = 6_142, 7_315
"""Maxima of the first 59,999 rows, published. Longer draws become this."""

CONVERSATION_REQUEST = (847.0, 1.13)
"""Scale in tokens and shape of a Weibull law, fitted. Two log-normals fit worse in the mean."""
CONVERSATION_RESPONSE = (72.0, 0.209)
"""Median response = 72 + 0.209 * request tokens. The published figure reads about 100 at 100-300 and 430 at
2,000, which is 63 + 0.183 * request; both figures times 1.14, fitted."""
CONVERSATION_SPREAD = 0.4
"""Sigma of the log-normal factor on that median. Ours: the percentiles allow 0.2 to 0.5."""

API_REQUEST = (24.3, 0.95)
"""Median in tokens and sigma of a log-normal law, fitted."""
API_RESPONSE = (12.0, 0.15)
"""The same of the short spike of responses: it makes 14 the median of all responses, as published. The width
is ours."""

SHAPE = (0.1, 2.0)
"""Shape of the Gamma gaps: log-uniform between these. Ours: the official example switches between values
around 0.25 to 2 and falls back on 0.5."""
SHAPE_WINDOW_S = 60
"""Seconds after which another shape is drawn, as in the official example."""

ORIGINS = {
    "log type": "27,737 conversations of 59,999 rows: published statistics of the first rows",
    "model": "9,505 GPT-4 of 59,999 rows: same; independent of the log type, which is ours",
    "longest": "request 6,142, response 7,315: same",
    "conversation requests": "Weibull(scale 847, shape 1.13): fitted to the same percentiles",
    "conversation responses": "median 72 + 0.209 * request: the published figure's line times 1.14, fitted; "
    "log-normal factor, sigma 0.4: ours",
    "api requests": "log-normal(median 24.3, sigma 0.95): fitted to the same percentiles",
    "api responses": "log-normal(median 12, sigma 0.15): the published median 14 of all responses; "
    "width ours",
    "gaps": "Gamma, another shape every 60 s: the official example; log-uniform in 0.1 to 2: ours",
}
"""What ``describe()`` says of the constants above."""

API, CONVERSATION = 0, 1
CHATGPT, GPT4 = 0, 2
"""Added up they are the tag of a request."""


def times_ns(n: int, rate: float, shapes: tuple[float, float], window_s: float, draws: Random) -> array[int]:
    """Arrivals with Gamma gaps of mean ``1 / rate`` whose shape is drawn anew for each window of time; they
    are rescaled so that the last one is at exactly ``n / rate``. The first one waits its gap too.
    """
    low, width = math.log(shapes[0]), math.log(shapes[1] / shapes[0])
    gamma, uniform = draws.gammavariate, draws.random
    window, at, next_window = rate * window_s, 0.0, 0.0  # in mean gaps
    shape = scale = 1.0
    times = array("d")
    for _ in range(n):
        if at >= next_window:
            shape = math.exp(low + width * uniform())
            scale = 1.0 / shape
            next_window = (at // window + 1) * window
        at += gamma(shape, scale)
        times.append(at)
    end_ns = round(n * NS / rate) if at else 0
    return array("q", (round(time / (at or 1.0) * end_ns) for time in times))


def draw(
    n: int,
    stream: Callable[[str], Random],
    *,
    rate: float,
    shapes: tuple[float, float],
    window_s: float,
    conversation_share: float,
    gpt4_share: float,
) -> Columns:
    """``n`` requests. Times, log types, models, requests and responses each have a stream of their own, and
    each request takes one number of it whatever it is.
    """
    columns = Columns()
    columns.times.extend(times_ns(n, rate, shapes, window_s, stream("arrival")))
    is_conversation, is_gpt4 = stream("log_type").random, stream("model").random
    requests, responses = stream("request"), stream("response")
    long, normal, normal2 = requests.random, requests.gauss, responses.gauss
    scale, inverse = CONVERSATION_REQUEST[0], 1 / CONVERSATION_REQUEST[1]
    base, slope = CONVERSATION_RESPONSE
    api_request, api_response = math.log(API_REQUEST[0]), math.log(API_RESPONSE[0])
    exp, log = math.exp, math.log
    for _ in range(n):
        tag = GPT4 if is_gpt4() < gpt4_share else CHATGPT
        u, z, y = long(), normal(0, 1), normal2(0, 1)
        if is_conversation() < conversation_share:
            tag += CONVERSATION
            request = scale * (-log(1 - u)) ** inverse
            response = (base + slope * min(request, LONGEST_REQUEST)) * exp(CONVERSATION_SPREAD * y)
        else:
            request = exp(api_request + API_REQUEST[1] * z)
            response = exp(api_response + API_RESPONSE[1] * y)
        columns.prompts.append(min(max(round(request), 1), LONGEST_REQUEST))
        columns.outputs.append(min(max(round(response), 1), LONGEST_RESPONSE))
        columns.tags.append(tag)
    return columns
