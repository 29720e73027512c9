"""Puts the YAML of strangers' packages on Hydra's search path, after our own, which so wins a name clash."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from servelab.core.registry import config_packages


class ServelabSearchPath(SearchPathPlugin):
    """Reads entry points only. A package that cannot be read is left out; ``servelab plugins`` says why."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        have = {item.path for item in search_path.get_path()}
        for package in config_packages():
            path = f"pkg://{package.package}"
            if package.problem is None and path not in have:
                search_path.append(provider=f"servelab-{package.name}", path=path)


def install() -> None:
    """Tell Hydra; idempotent. Only programs that call it are affected, unlike a ``hydra_plugins`` package."""
    plugins = Plugins.instance()
    if ServelabSearchPath not in list(plugins.discover(SearchPathPlugin)):
        plugins.register(ServelabSearchPath)
