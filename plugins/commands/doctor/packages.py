"""Packages of plugins: whether they load, and whether what they declare is there."""

from __future__ import annotations

from collections.abc import Iterator

from servelab.core.errors import PluginError, ServeLabError
from servelab.core.families import KINDS
from servelab.core.findings import Diagnose, Finding
from servelab.core.registry import BLOCK_ENV, Registry, import_target
from servelab.core.spec import HOOK_API
from servelab.plugins.commands.doctor.configs import default_model

OURS = "servelab"
"""The distribution of in-tree plugins."""


def plugin_findings(registry: Registry, *, online: bool) -> Iterator[Finding]:
    """What plugins themselves find out about this machine (``PluginSpec.diagnose``)."""
    model = default_model()
    for (kind, name), spec in registry.specs.items():
        if spec.diagnose is None:
            continue
        try:
            # not through resolve: what disables a plugin here is what we want to hear about
            diagnose: Diagnose = import_target(spec.diagnose)
            yield from diagnose(model, online)
        except (Exception, SystemExit) as exc:
            yield Finding(
                f"{kind} {name}",
                "fail",
                f"its own examination failed: {type(exc).__name__}: {exc}",
                f"tell the authors of {registry.provider(kind, name)}",
            )


def package_findings(registry: Registry) -> Iterator[Finding]:
    """In-tree plugins in one line, every other package in its own, and everything that is wrong."""
    disabled = []
    by_package: dict[str, list[tuple[str, str]]] = {}
    for kind in KINDS:
        for name in registry.names(kind):
            provider = registry.provider(kind, name)
            if provider.distribution == OURS:
                reason = registry.unavailable(registry.spec(kind, name))
                disabled += [(kind, name, reason)] if reason else []
            else:
                by_package.setdefault(provider.package, []).append((kind, name))
    ours = sum(provider.distribution == OURS for provider in registry.providers.values())
    api = ".".join(map(str, HOOK_API))
    yield Finding("plugins", "ok", f"{ours} of our own, hook API {api}; {len(disabled)} disabled here")
    for kind, name, reason in disabled:
        yield Finding(
            f"{kind} {name}", "warn", f"disabled: {reason}", f"nothing, unless you want this {kind}"
        )
    for package, plugins in by_package.items():
        yield from _package(registry, package, plugins)
    for broken in registry.broken:
        which = f"{broken.kind} {broken.name}, " if broken.name else ""
        who = f" ({broken.provider})" if broken.provider else ""
        yield Finding(
            f"package {broken.package}",
            "fail",
            f"{which}{'' if which else 'not loaded: '}{broken.reason}{who}",
            broken.do or f"mend or uninstall it; until then -p no:{broken.package} leaves it out",
        )
    for provider in registry.blocked:
        yield Finding(
            f"package {provider.package}", "warn", f"left out on request ({provider})", f"see {BLOCK_ENV}"
        )


def _package(registry: Registry, package: str, plugins: list[tuple[str, str]]) -> Iterator[Finding]:
    """One stranger's package, with a finding more for each plugin of it that cannot be used."""
    specs = [registry.spec(kind, name) for kind, name in plugins]
    named = ", ".join(
        f"{kind} {name} (API {spec.api})" for (kind, name), spec in zip(plugins, specs, strict=True)
    )
    yield Finding(f"package {package}", "ok", f"{registry.provider(*plugins[0])}: {named}")
    for (kind, name), spec in zip(plugins, specs, strict=True):
        check = f"{kind} {name}"
        if reason := registry.unavailable(spec):
            ill = reason.startswith("its probe ")  # failed, or gave no answer
            yield Finding(
                check,
                "fail" if ill else "warn",
                f"disabled: {reason}",
                f"mend the probe {spec.probe}" if ill else f"nothing, unless you want this {kind}",
            )
            continue
        for what in ("factory", "config"):
            try:
                registry.resolve(kind, name, what)
            except PluginError as exc:
                yield Finding(check, "fail", f"{exc.what}: {exc.why}", exc.do)
            except ServeLabError as exc:  # raised by its own code while it was imported
                yield Finding(check, "fail", str(exc.what), exc.do or "mend the plugin")
