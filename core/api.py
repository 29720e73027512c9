"""Everything a plugin author imports. Standard library and pluggy only."""

from servelab.core.context import Context, Oracle
from servelab.core.errors import (
    CapabilityError,
    ConfigError,
    LedgerError,
    PlanError,
    PluginError,
    ServeLabError,
    ViewError,
    WorkloadError,
)
from servelab.core.facts import HardwareFacts, Limits, ModelFacts
from servelab.core.families.cost import CostModel
from servelab.core.families.executor import Executor
from servelab.core.families.kvcache import KVCache
from servelab.core.families.observer import Observer
from servelab.core.families.scheduler import CostView, KVBudget, KVView, Queue, Scheduler, StepView
from servelab.core.families.task import Task
from servelab.core.families.workload import Workload
from servelab.core.findings import Finding
from servelab.core.hookspecs import hookimpl
from servelab.core.layout import Capacity, KVLayout, Pool
from servelab.core.plan import (
    Background,
    Hold,
    KeepHost,
    Outcome,
    Pin,
    Preemption,
    Release,
    StepPlan,
    Tokens,
    TurnEnd,
    Unpin,
    Verdict,
)
from servelab.core.records import (
    ContextEnded,
    ContextKept,
    PagesEvicted,
    Planned,
    QualityBegan,
    QualityMeasured,
    Record,
    RequestAdmitted,
    RequestArrived,
    RequestFinished,
    RequestForked,
    RequestPreempted,
    RunFinished,
    RunStarted,
    StepDone,
    TokensEmitted,
    TransferEnded,
    TransferStarted,
)
from servelab.core.request import SLO, Arrival, Cancel, Phase, RequestSpec, RequestView, Truth, sample_id
from servelab.core.sampling import SamplingParams
from servelab.core.spec import HOOK_API, Paper, PluginSpec
from servelab.core.text import Tokenizer

__all__ = [
    "HOOK_API",
    "SLO",
    "Arrival",
    "Background",
    "Cancel",
    "CapabilityError",
    "Capacity",
    "ConfigError",
    "Context",
    "ContextEnded",
    "ContextKept",
    "CostModel",
    "CostView",
    "Executor",
    "Finding",
    "HardwareFacts",
    "Hold",
    "KVBudget",
    "KVCache",
    "KVLayout",
    "KVView",
    "KeepHost",
    "LedgerError",
    "Limits",
    "ModelFacts",
    "Observer",
    "Oracle",
    "Outcome",
    "PagesEvicted",
    "Paper",
    "Phase",
    "Pin",
    "PlanError",
    "Planned",
    "PluginError",
    "PluginSpec",
    "Pool",
    "Preemption",
    "QualityBegan",
    "QualityMeasured",
    "Queue",
    "Record",
    "Release",
    "RequestAdmitted",
    "RequestArrived",
    "RequestFinished",
    "RequestForked",
    "RequestPreempted",
    "RequestSpec",
    "RequestView",
    "RunFinished",
    "RunStarted",
    "SamplingParams",
    "Scheduler",
    "ServeLabError",
    "StepDone",
    "StepPlan",
    "StepView",
    "Task",
    "Tokenizer",
    "Tokens",
    "TokensEmitted",
    "TransferEnded",
    "TransferStarted",
    "Truth",
    "TurnEnd",
    "Unpin",
    "Verdict",
    "ViewError",
    "Workload",
    "WorkloadError",
    "hookimpl",
    "sample_id",
]
