"""Declares the package's plugins. Imported whenever servelab starts, so it imports nothing but the API."""

from collections.abc import Iterable

from servelab.core.api import PluginSpec, hookimpl


@hookimpl
def servelab_schedulers() -> Iterable[PluginSpec]:
    yield PluginSpec(
        name="demo",
        factory="servelab_demo_ext.sched:OneByOne",
        config="servelab_demo_ext.sched:OneByOneConfig",
        summary="one request at a time, in order of arrival",
    )
