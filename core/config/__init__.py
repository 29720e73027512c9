"""The configuration of a run, checked at once: ``validate`` makes a ``RunConfig``."""

from servelab.core.config.choice import Choice, Part, PartOf, choice_of, refusal
from servelab.core.config.hardware import HardwareConfig
from servelab.core.config.model import DTYPE_BYTES, MODEL_KINDS, SHAPE, ModelConfig
from servelab.core.config.run import PLUGIN_SECTIONS, RunConfig, across, validate
from servelab.core.config.section import Section
from servelab.core.config.serving import (
    ClockConfig,
    ClusterConfig,
    EngineConfig,
    QualityConfig,
    SLOConfig,
)

__all__ = [
    "DTYPE_BYTES",
    "MODEL_KINDS",
    "PLUGIN_SECTIONS",
    "SHAPE",
    "Choice",
    "ClockConfig",
    "ClusterConfig",
    "EngineConfig",
    "HardwareConfig",
    "ModelConfig",
    "Part",
    "PartOf",
    "QualityConfig",
    "RunConfig",
    "SLOConfig",
    "Section",
    "across",
    "choice_of",
    "refusal",
    "validate",
]
