"""Import root of servelab.

The code lives in the repository's core/, plugins/ and configs/ folders. The links beside this file name
them for build tools, type checkers and IDEs; at run time, in a checkout, the folders themselves are used, so
that tracebacks, breakpoints and coverage show core/... and a checkout that lost its links still runs.

``LLM``, ``SamplingParams`` and what they give are here too, imported on first use.
"""

from pathlib import Path as _Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from servelab.core.sampling import SamplingParams as SamplingParams
    from servelab.plugins.llm.llm import LLM as LLM
    from servelab.plugins.llm.llm import Chunk as Chunk
    from servelab.plugins.llm.llm import Completion as Completion
    from servelab.plugins.llm.llm import Timings as Timings

_here = _Path(__file__).resolve().parent
_root = _here.parent.parent
if _here.parent.name == "src" and (_root / "core" / "__init__.py").is_file():
    __path__.insert(0, str(_root))


_HOMES = {
    "LLM": "plugins.llm.llm",
    "Chunk": "plugins.llm.llm",
    "Completion": "plugins.llm.llm",
    "Timings": "plugins.llm.llm",
    "SamplingParams": "core.sampling",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'servelab' has no attribute {name!r}")
    return getattr(import_module(f"servelab.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
