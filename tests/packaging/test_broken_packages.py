"""One bad package never stops the program: it is set aside with its name, version, reason and advice."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from servelab.core.errors import ApiVersionError, ConfigError, PluginError, PluginLoadError
from servelab.core.registry import Broken, Registry, check_blocks
from servelab.core.spec import PluginSpec

Package = Callable[..., None]

GOOD = """
from servelab.core.api import PluginSpec, hookimpl

@hookimpl
def servelab_schedulers():
    return [PluginSpec(name="{name}", factory="{module}:Factory")]

class Factory: ...
"""
HEAD = "from servelab.core.api import PluginSpec, hookimpl\n"


def strangers(registry: Registry) -> list[str]:
    """Schedulers that are not our own."""
    names = registry.names("scheduler")
    return [name for name in names if registry.provider("scheduler", name).distribution != "servelab"]


def broken(registry: Registry, package: str) -> Broken:
    (found,) = (b for b in registry.broken if b.package == package)
    return found


SCHEDULERS = HEAD + "@hookimpl\ndef servelab_schedulers():\n    "
CASES = {
    "missing import": (
        "import no_such_module_at_all",
        "ModuleNotFoundError: No module named 'no_such_module",
    ),
    "syntax error": ("def (:\n", "SyntaxError"),
    "sys.exit on import": ("import sys; sys.exit(3)", "it called sys.exit(3)"),
    "raises on import": ("raise RuntimeError('boom')", "RuntimeError: boom"),
    "misspelt hook": (
        HEAD + "@hookimpl\ndef servelab_scheduler():\n    return []",
        "no hook 'servelab_scheduler'",
    ),
    "unknown argument": (
        HEAD + "@hookimpl\ndef servelab_schedulers(wish):\n    return []",
        "PluginValidationError",
    ),
    "raising hook": (SCHEDULERS + "raise OSError('disk')", "servelab_schedulers: OSError: disk"),
    "sys.exit in a hook": (SCHEDULERS + "import sys; sys.exit()", "it called sys.exit(None)"),
    "returns a spec": (SCHEDULERS + "return PluginSpec(name='x', factory='a:b')", "returned PluginSpec, not"),
    "returns nothing": (SCHEDULERS + "pass", "returned NoneType, not an iterable"),
    "returns text": (SCHEDULERS + "return 'demo'", "returned str, not an iterable"),
    "raises while yielding": (SCHEDULERS + "yield 1 / 0", "ZeroDivisionError"),
    "no hook at all": ("x = 1", "it declares no plugin"),
    "event hook": (
        HEAD + "@hookimpl\ndef servelab_after_step(record):\n    pass",
        "event hook 'servelab_after_step', but installing activates nothing",
    ),
    "wrapper": (
        HEAD + "@hookimpl(wrapper=True)\ndef servelab_schedulers():\n    return (yield)",
        "is a wrapper",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_package_is_set_aside(package: Package, case: str) -> None:
    code, reason = CASES[case]
    package("bad", code)
    package("good", GOOD.format(name="good", module="fake_good"))
    registry = Registry.load()
    found = broken(registry, "bad")
    assert reason in found.reason
    assert "fake-bad 0.9" in str(found)
    assert strangers(registry) == ["good"]
    with pytest.raises(PluginLoadError, match="package not loaded: bad"):  # asked for by name, it is an error
        registry.spec("scheduler", "bad")


SPECS = {
    "not a spec": ("{'name': 'x'}", "not a PluginSpec"),
    "name of another type": ("PluginSpec(name=3, factory='a:b')", "field 'name' is 3"),
    "name with capitals": ("PluginSpec(name='X Y', factory='a:b')", "lower-case"),
    "reserved name": ("PluginSpec(name='none', factory='a:b')", "'none' means no plugin"),
    "factory without a colon": ("PluginSpec(name='x', factory='a.b')", "field 'factory'"),
    "config that is a class": ("PluginSpec(name='x', factory='a:b', config=int)", "field 'config'"),
    "text for a set": ("PluginSpec(name='x', factory='a:b', provides='kvcache.swap')", "frozenset"),
    "unknown capability": ("PluginSpec(name='x', factory='a:b', requires={'kvcache.swop'})", "kvcache.swap"),
    "text for a tuple": ("PluginSpec(name='x', factory='a:b', imports='torch')", "a tuple of strings"),
    "unknown place": ("PluginSpec(name='x', factory='a:b', runs=('gpu',))", "one or more of torch, sim"),
    "no place": ("PluginSpec(name='x', factory='a:b', runs=())", "one or more of torch, sim"),
    "unknown tier": ("PluginSpec(name='x', factory='a:b', tier='beta')", "field 'tier'"),
    "paper as text": ("PluginSpec(name='x', factory='a:b', paper='Kwon 2023')", "a Paper"),
    "oracle as text": ("PluginSpec(name='x', factory='a:b', oracle='yes')", "True or False"),
    "api as a number": ("PluginSpec(name='x', factory='a:b', api=1)", "field 'api'"),
}


@pytest.mark.parametrize("case", SPECS)
def test_one_bad_spec_leaves_the_others_of_its_package(package: Package, case: str) -> None:
    code, reason = SPECS[case]
    package("bad", SCHEDULERS + f"return [{code}, PluginSpec(name='fine', factory='a:b')]")
    registry = Registry.load()
    assert reason in broken(registry, "bad").reason
    assert strangers(registry) == ["fine"]


@pytest.mark.parametrize(
    ("api", "advice"),
    [("2", "upgrade servelab"), ("0.9", "upgrade its package"), ("next", "upgrade its package")],
)
def test_another_api_is_refused_with_advice(package: Package, api: str, advice: str) -> None:
    package("old", SCHEDULERS + f"return [PluginSpec(name='old', factory='a:b', api={api!r})]")
    registry = Registry.load()
    with pytest.raises(ApiVersionError, match=f"hook API {api}.*") as error:
        registry.spec("scheduler", "old")
    assert advice in error.value.do
    assert "fake-old 0.9" in error.value.where


def test_a_minor_version_of_our_api_is_accepted(package: Package) -> None:
    package("new", SCHEDULERS + "return [PluginSpec(name='new', factory='a:b', api='1.7')]")
    assert "new" in Registry.load().names("scheduler")


def test_the_first_to_take_a_plugin_name_keeps_it(package: Package) -> None:
    package("aaa", SCHEDULERS + "return [PluginSpec(name='vllm_v1', factory='evil:Mine')]")
    registry = Registry.load()
    assert "already provided by servelab" in broken(registry, "aaa").reason
    assert registry.spec("scheduler", "vllm_v1").factory.startswith("servelab.plugins.")


def test_order_marks_do_not_change_who_keeps_a_name(package: Package) -> None:
    code = HEAD + "@hookimpl(trylast=True)\ndef servelab_schedulers():\n"
    package("aaa", code + "    return [PluginSpec(name='vllm_v1', factory='evil:Mine')]")
    assert Registry.load().provider("scheduler", "vllm_v1").distribution == "servelab"


def test_two_packages_of_one_name(package: Package) -> None:
    package("first", GOOD.format(name="one", module="fake_first"), entry="same")
    package("second", GOOD.format(name="two", module="fake_second"), entry="same")
    registry = Registry.load()
    assert "already registered as 'same'" in broken(registry, "same").reason
    assert strangers(registry) == ["one"]


def test_factory_that_does_not_exist_matters_only_when_selected(package: Package) -> None:
    package("late", SCHEDULERS + "return [PluginSpec(name='late', factory='fake_late:Nothing')]")
    registry = Registry.load()
    assert registry.broken == []
    with pytest.raises(PluginLoadError, match="fake_late:Nothing: AttributeError") as error:
        registry.resolve("scheduler", "late", "factory")
    assert isinstance(error.value.__cause__, AttributeError)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise RuntimeError('no driver')", "its probe failed: RuntimeError: no driver"),
        ("import sys; sys.exit(1)", "its probe failed: it called sys.exit(1)"),
        ("return 5", "its probe returned 5"),
        ("return 'needs a GPU'", "needs a GPU"),
    ],
)
def test_probe_disables_with_its_reason(package: Package, body: str, reason: str) -> None:
    package(
        "probed",
        SCHEDULERS
        + "return [PluginSpec(name='p', factory='a:b', probe='fake_probed:probe')]\n"
        + f"def probe():\n    {body}\n",
    )
    registry = Registry.load()
    assert reason in (registry.unavailable(registry.spec("scheduler", "p")) or "")
    with pytest.raises(PluginLoadError, match="disabled"):
        registry.resolve("scheduler", "p", "config")


def test_missing_imports_disable_without_importing(package: Package) -> None:
    package(
        "heavy", SCHEDULERS + "return [PluginSpec(name='h', factory='a:b', imports=('no_such_lib', 'json'))]"
    )
    registry = Registry.load()
    assert registry.unavailable(registry.spec("scheduler", "h")) == "needs no_such_lib, not installed"


@pytest.mark.parametrize(
    ("target", "code", "reason"),
    [
        ("no_such_package.conf", None, "No module named 'no_such_package'"),
        ("fake_conf_a.conf", "raise RuntimeError('boom')", "RuntimeError: boom"),
        ("fake_conf_b", "x = 1", "is a module, not a folder"),
        ("no_such_package", None, "does not exist"),
    ],
)
def test_config_package_that_cannot_be_read(
    package: Package, tmp_path: Path, target: str, code: str | None, reason: str
) -> None:
    if code is not None:
        (tmp_path / f"{target.partition('.')[0]}.py").write_text(code, encoding="utf-8")
    package("conf", configs=target)
    registry = Registry.load()
    assert reason in broken(registry, "conf").reason
    assert strangers(registry) == []


def test_blocking_a_package(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    package("bad", "raise RuntimeError('never imported')")
    package("good", GOOD.format(name="good", module="fake_good"))
    foreign = os.environ["SERVELAB_BLOCK"]
    monkeypatch.setenv("SERVELAB_BLOCK", f"bad,good,{foreign}")
    registry = Registry.load()
    assert (registry.broken, strangers(registry)) == ([], [])
    with pytest.raises(PluginError, match=r"package left out by -p no:good \(fake-good 0.9\)"):
        registry.spec("scheduler", "good")
    check_blocks(["bad", "servelab.schedulers"])
    with pytest.raises(ConfigError, match="did you mean 'bad'"):
        check_blocks(["bda"])
    monkeypatch.setenv("SERVELAB_BLOCK", f"bda,good,{foreign}")
    assert [b.package for b in Registry.load().broken] == ["bad"]


def test_unknown_names_come_with_the_nearest() -> None:
    registry = Registry.load()
    with pytest.raises(PluginError, match="did you mean 'vllm_v1'"):
        registry.spec("scheduler", "vllm1")
    with pytest.raises(PluginError, match="did you mean 'scheduler'"):
        registry.spec("schedulers", "vllm_v1")


def test_registering_from_python() -> None:
    registry = Registry.load()
    spec = PluginSpec(name="mine", factory="nowhere:Mine")
    registry.add("scheduler", spec, provider="a notebook", factory=dict, config=None)
    assert registry.resolve("scheduler", "mine", "factory") is dict
    assert str(registry.provider("scheduler", "mine")) == "a notebook"
    with pytest.raises(PluginLoadError, match="already provided by a notebook"):
        registry.add("scheduler", spec)
    with pytest.raises(PluginError, match="unknown kind of plugin 'sched'"):
        registry.add("sched", spec)
    with pytest.raises(ApiVersionError):
        registry.add("scheduler", PluginSpec(name="newer", factory="a:b", api="2"))
