"""The index of hooks: registration (one per kind, called once), subcommands, and events (observers only).

Decisions are never hooks: they are methods of the selected objects (``core/families``), called directly.
All hooks fire in the main process, whatever the executor or clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import pluggy

from servelab.core.spec import PluginSpec

if TYPE_CHECKING:
    from servelab.core.records import (
        ActionDropped,
        ContextEnded,
        ContextKept,
        InstanceChanged,
        PagesEvicted,
        Planned,
        QualityBegan,
        QualityMeasured,
        Record,
        RequestAdmitted,
        RequestArrived,
        RequestFinished,
        RequestForked,
        RequestHeld,
        RequestMigrated,
        RequestPreempted,
        RequestRouted,
        RunFinished,
        RunStarted,
        StepDone,
        TokensEmitted,
        TransferEnded,
        TransferStarted,
    )

PROJECT = "servelab"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Registration:
    """Declare plugins. Each is called once when plugins are loaded and must be cheap: import nothing heavy.

    Return the specs as any iterable. An implementation that raises disables its package, with the reason in
    ``servelab plugins``; nothing else stops. Names are unique per kind; the first to register keeps one.
    """

    @hookspec
    def servelab_schedulers(self) -> Iterable[PluginSpec]:
        """Schedulers: what each request does next (``families/scheduler.py``)."""
        raise NotImplementedError

    @hookspec
    def servelab_kvcaches(self) -> Iterable[PluginSpec]:
        """KV caches: page choice and addressing (``families/kvcache.py``)."""
        raise NotImplementedError

    @hookspec
    def servelab_prefix_stores(self) -> Iterable[PluginSpec]:
        """Prefix stores: reuse of computed KV (``families/prefix.py``)."""
        raise NotImplementedError

    @hookspec
    def servelab_semantic_caches(self) -> Iterable[PluginSpec]:
        """Semantic caches: answers before the engine (``families/semantic.py``)."""
        raise NotImplementedError

    @hookspec
    def servelab_quantizers(self) -> Iterable[PluginSpec]:
        """Quantizers of weights and activations (``families/quant.py``)."""
        raise NotImplementedError

    @hookspec
    def servelab_kv_codecs(self) -> Iterable[PluginSpec]:
        """KV codecs (``families/kvquant.py``)."""
        raise NotImplementedError

    @hookspec
    def servelab_attention_backends(self) -> Iterable[PluginSpec]:
        """Attention and linear kernels (``families/kernel.py``)."""
        raise NotImplementedError

    @hookspec
    def servelab_speculators(self) -> Iterable[PluginSpec]:
        """Speculators: drafts and their length (``families/spec.py``)."""
        raise NotImplementedError

    @hookspec
    def servelab_grammars(self) -> Iterable[PluginSpec]:
        """Grammars: token masks (``families/grammar.py``)."""
        raise NotImplementedError

    @hookspec
    def servelab_routers(self) -> Iterable[PluginSpec]:
        """Routers: dispatch, migration, roles, scaling (``families/router.py``)."""
        raise NotImplementedError

    @hookspec
    def servelab_apps(self) -> Iterable[PluginSpec]:
        """Applications: graphs of calls and tools (``families/app.py``)."""
        raise NotImplementedError

    @hookspec
    def servelab_cost_models(self) -> Iterable[PluginSpec]:
        """Cost models: the price of a batch (``families/cost.py``)."""
        raise NotImplementedError

    @hookspec
    def servelab_observers(self) -> Iterable[PluginSpec]:
        """Observers: logs, traces, reports (``families/observer.py``)."""
        raise NotImplementedError

    @hookspec
    def servelab_workloads(self) -> Iterable[PluginSpec]:
        """Workloads: the traffic (``families/workload.py``)."""
        raise NotImplementedError

    @hookspec
    def servelab_executors(self) -> Iterable[PluginSpec]:
        """Executors: where batches run (``families/executor.py``)."""
        raise NotImplementedError

    @hookspec
    def servelab_tasks(self) -> Iterable[PluginSpec]:
        """Tasks: what is done with a run (``families/task.py``)."""
        raise NotImplementedError


class Commands:
    """Declare subcommands of the command line. As cheap as ``Registration``, and as isolated."""

    @hookspec
    def servelab_commands(self) -> Mapping[str, tuple[str, str]]:
        """Name -> ("module:function", "one-line summary") of each; the function takes the arguments."""
        raise NotImplementedError


class Events:
    """What selected observers may watch. Results are ignored; an exception ends the run.

    Records are shared: read them, keep them, never change them. For each record ``servelab_on_record`` fires
    first, then the hook of its type. Observers are called in the order they are configured.
    """

    @hookspec
    def servelab_on_record(self, record: Record) -> None:
        """Every record, in order."""

    @hookspec
    def servelab_on_run_started(self, record: RunStarted) -> None:
        """Once, before the first arrival."""

    @hookspec
    def servelab_on_request_arrived(self, record: RequestArrived) -> None:
        """A request entered an engine; its true length is not in the record."""

    @hookspec
    def servelab_on_request_held(self, record: RequestHeld) -> None:
        """The router keeps a request that has just arrived."""

    @hookspec
    def servelab_on_request_routed(self, record: RequestRouted) -> None:
        """A request that was held at the router goes to an engine."""

    @hookspec
    def servelab_on_request_migrated(self, record: RequestMigrated) -> None:
        """A request goes on in another engine."""

    @hookspec
    def servelab_on_action_dropped(self, record: ActionDropped) -> None:
        """An action of the router was not carried out."""

    @hookspec
    def servelab_on_instance_changed(self, record: InstanceChanged) -> None:
        """An instance starts, becomes active, is drained, has stopped, or has another role."""

    @hookspec
    def servelab_on_request_admitted(self, record: RequestAdmitted) -> None:
        """A waiting request was scheduled, first or again."""

    @hookspec
    def servelab_on_request_forked(self, record: RequestForked) -> None:
        """A further sample of a prompt starts: its first token was drawn with the prompt's."""

    @hookspec
    def servelab_after_plan(self, record: Planned) -> None:
        """A plan was accepted; it starts now. Empty plans that change nothing are not reported."""

    @hookspec
    def servelab_after_step(self, record: StepDone) -> None:
        """A launch of one or more equal steps ended and its tokens are committed."""

    @hookspec
    def servelab_on_tokens_emitted(self, record: TokensEmitted) -> None:
        """A request got output tokens, right after the step that brought them; its end comes later."""

    @hookspec
    def servelab_on_request_preempted(self, record: RequestPreempted) -> None:
        """A running request was taken off the device."""

    @hookspec
    def servelab_on_transfer_started(self, record: TransferStarted) -> None:
        """Pages begin to move between tiers."""

    @hookspec
    def servelab_on_transfer_ended(self, record: TransferEnded) -> None:
        """Pages have moved."""

    @hookspec
    def servelab_on_context_kept(self, record: ContextKept) -> None:
        """The KV of a finished turn stays for the next turn of its program."""

    @hookspec
    def servelab_on_context_ended(self, record: ContextEnded) -> None:
        """Kept KV was adopted by the next turn, or dropped."""

    @hookspec
    def servelab_on_pages_evicted(self, record: PagesEvicted) -> None:
        """The prefix store gave up stored KV, because its pages were needed."""

    @hookspec
    def servelab_on_request_finished(self, record: RequestFinished) -> None:
        """The one terminal record of a request, whatever its end."""

    @hookspec
    def servelab_on_quality_began(self, record: QualityBegan) -> None:
        """The serving, if any, is over, and quality will be measured."""

    @hookspec
    def servelab_on_quality_measured(self, record: QualityMeasured) -> None:
        """A quantized model was compared with the unquantized one on a window more, after the serving."""

    @hookspec
    def servelab_on_run_finished(self, record: RunFinished) -> None:
        """Once, last, also when the run failed or was interrupted: flush and close here."""


EVENT_OF_RECORD: dict[str, str] = {
    "run_started": "servelab_on_run_started",
    "arrived": "servelab_on_request_arrived",
    "held": "servelab_on_request_held",
    "routed": "servelab_on_request_routed",
    "migrated": "servelab_on_request_migrated",
    "action_dropped": "servelab_on_action_dropped",
    "instance": "servelab_on_instance_changed",
    "admitted": "servelab_on_request_admitted",
    "forked": "servelab_on_request_forked",
    "planned": "servelab_after_plan",
    "step": "servelab_after_step",
    "tokens": "servelab_on_tokens_emitted",
    "preempted": "servelab_on_request_preempted",
    "transfer_started": "servelab_on_transfer_started",
    "transfer_ended": "servelab_on_transfer_ended",
    "context_kept": "servelab_on_context_kept",
    "context_ended": "servelab_on_context_ended",
    "evicted": "servelab_on_pages_evicted",
    "finished": "servelab_on_request_finished",
    "quality_began": "servelab_on_quality_began",
    "quality": "servelab_on_quality_measured",
    "run_finished": "servelab_on_run_finished",
}
"""Record type (``ev``) -> the event hook that fires for it."""
