"""The hook behind ``import torch``, each case in a fresh interpreter with the real torch and Torch-Pruning."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

import pytest

from sigmab_plugin.hosts import autoload

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]

IMPORT_ORDERS = {
    "torch first": "import torch, torch_pruning as tp",
    "host first": "import torch_pruning as tp",
    "submodule first": "import torch_pruning.pruner.algorithms, torch_pruning as tp",
    "from import": "from torch_pruning import pruner; import torch_pruning as tp",
    "find_spec before": """
        import importlib.util, torch
        assert importlib.util.find_spec("torch_pruning") is not None
        import torch_pruning as tp
    """,
    "lazy loader": """
        import importlib.util, sys, torch
        spec = importlib.util.find_spec("torch_pruning")
        spec.loader = importlib.util.LazyLoader(spec.loader)
        tp = sys.modules["torch_pruning"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tp)
        tp.DependencyGraph
    """,
    "reloaded": """
        import importlib, torch_pruning as tp
        importlib.reload(tp.pruner)
        importlib.reload(tp)
    """,
    "threads": """
        import threading, torch
        threads = [threading.Thread(target=__import__, args=("torch_pruning",)) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        import torch_pruning as tp
    """,
    "host without torch's hook": """
        import os
        os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
        import torch_pruning as tp
        assert not hasattr(tp.pruner, "SigmaBPruner")
        import sigmab_plugin.hosts.autoload
        sigmab_plugin.hosts.autoload.install()
        sigmab_plugin.hosts.autoload.install()
    """,
}


def package(folder: Path, name: str, module: str, groups: dict[str, dict[str, str]]) -> Path:
    """Write an importable module with its own dist-info, as an installer would leave it; returns the path entry."""
    site = folder / name
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{name}.py").write_text(dedent(module))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return site


@pytest.mark.parametrize("order", IMPORT_ORDERS)
def test_pruner_appears_with_no_import_of_ours(order: str, run_python: RunPython) -> None:
    code = dedent(IMPORT_ORDERS[order]) + dedent("""
        import sys
        from importlib.machinery import SourceFileLoader
        assert not any(name.startswith("sigmab_plugin.tree") for name in sys.modules)
        assert "SigmaBPruner" in dir(tp.pruner)
        assert "BNScalePruner" in dir(tp.pruner)
        from sigmab_plugin.hosts.torch_pruning import SigmaBPruner
        assert tp.pruner.SigmaBPruner is SigmaBPruner
        from torch_pruning.pruner import SigmaBPruner as imported
        assert imported is SigmaBPruner
        assert not hasattr(tp.pruner, "no_such_pruner")
        for module in (tp, tp.pruner):  # no trace of the hook is left on the modules
            assert type(module.__loader__) is SourceFileLoader, module.__loader__
            assert type(module.__spec__.loader) is SourceFileLoader
            assert type(module.__spec__).__name__ == "ModuleSpec"
    """)
    run_python(code)


@pytest.mark.parametrize(("value", "armed"), [("1", True), ("0", False), (" False ", False), ("off", False)])
def test_switch_values(value: str, armed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setenv(autoload.SWITCH, value)
    monkeypatch.setattr(autoload, "install", lambda: calls.append("install"))
    autoload.on_torch_import()
    assert bool(calls) is armed


def test_switched_off_by_environment(run_python: RunPython) -> None:
    run_python(
        """
import sys, torch, torch_pruning as tp
assert not hasattr(tp.pruner, "SigmaBPruner")
assert "SigmaBPruner" not in dir(tp.pruner)
assert not any("sigmab" in type(finder).__module__ for finder in sys.meta_path)
""",
        env={"SIGMAB_AUTOLOAD": "0"},
    )


def test_import_torch_loads_nothing_heavy(run_python: RunPython) -> None:
    modules = "import torch, sys, json; print(json.dumps(sorted(sys.modules)))"
    without = set(json.loads(run_python(modules, env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}).stdout))
    added = set(json.loads(run_python(modules).stdout)) - without
    ours = {name for name in added if name.startswith("sigmab_plugin")}
    assert ours == {"sigmab_plugin", "sigmab_plugin.hosts", "sigmab_plugin.hosts.autoload"}
    # the rest is the standard library reading entry points, which torch does for any backend
    foreign = {name.partition(".")[0] for name in added - ours}
    assert foreign <= set(sys.stdlib_module_names), foreign


def test_third_party_pruner_is_offered(tmp_path: Path, run_python: RunPython) -> None:
    site = package(
        tmp_path,
        "third_party",
        "class TheirPruner:\n    pass\n",
        {"torch_pruning.pruners": {"TheirPruner": "third_party:TheirPruner"}},
    )
    run_python(
        """
import sys, torch_pruning as tp
assert {"TheirPruner", "SigmaBPruner"} <= set(dir(tp.pruner))
assert "third_party" not in sys.modules
assert tp.pruner.TheirPruner.__module__ == "third_party"
""",
        path=[site],
    )


def test_broken_third_party_breaks_nothing(tmp_path: Path, run_python: RunPython) -> None:
    site = package(
        tmp_path,
        "broken",
        "raise RuntimeError('broken on purpose')\n",
        {"torch_pruning.pruners": {"BrokenPruner": "broken:BrokenPruner", "GonePruner": "nowhere.at_all:X"}},
    )
    done = run_python(
        """
import inspect, torch, torch_pruning as tp
assert not hasattr(tp.pruner, "BrokenPruner")
for name, words in {"BrokenPruner": "broken on purpose", "GonePruner": "No module named 'nowhere'"}.items():
    try:
        getattr(tp.pruner, name)
    except AttributeError as error:
        assert words in str(error) and "broken" in str(error), error
    else:
        raise SystemExit(f"{name} loaded")
assert tp.pruner.SigmaBPruner
assert dict(inspect.getmembers(tp.pruner))["SigmaBPruner"]
""",
        path=[site],
        flags=("-W", "error::UserWarning"),
    )
    assert done.stderr == ""


def test_name_declared_twice_keeps_the_first(tmp_path: Path, run_python: RunPython) -> None:
    sites = [
        package(tmp_path, name, "class P:\n    pass\n", {"torch_pruning.pruners": {"P": f"{name}:P"}})
        for name in ("first", "second")
    ]
    done = run_python("import torch_pruning as tp; print(tp.pruner.P.__module__)", path=sites)
    assert done.stdout.strip() == "first"
    assert "'second:P' of second offers the pruner 'P'" in done.stderr


def test_a_stock_name_is_not_replaced(tmp_path: Path, run_python: RunPython) -> None:
    site = package(
        tmp_path,
        "greedy",
        "BNScalePruner = 1\n",
        {"torch_pruning.pruners": {"BNScalePruner": "greedy:BNScalePruner"}},
    )
    run_python(
        "import torch_pruning as tp; assert tp.pruner.BNScalePruner.__module__.startswith('torch_pruning')",
        path=[site],
    )


@pytest.mark.parametrize("host_first", [True, False])
def test_error_while_registering_is_logged_once(host_first: bool, run_python: RunPython) -> None:
    """A hook that fails must leave both imports working, also where warnings are errors."""
    sabotage = """
import sigmab_plugin.hosts.autoload as autoload
def fail(host):
    raise RuntimeError("on purpose")
autoload._register_torch_pruning = fail
"""
    imports = "import torch_pruning as tp, torch" if host_first else "import torch, torch_pruning as tp"
    done = run_python(
        sabotage + imports + "\nimport importlib; importlib.reload(tp); tp.DependencyGraph; torch.zeros(1)",
        flags=("-W", "error::UserWarning"),
    )
    assert done.stderr.count("on purpose") == 1
    assert "SIGMAB_AUTOLOAD=0" in done.stderr


def test_error_while_arming_never_reaches_torch(run_python: RunPython) -> None:
    done = run_python("""
import sigmab_plugin.hosts.autoload as autoload
def fail():
    raise RuntimeError("on purpose")
autoload.install = fail
import torch
torch.zeros(1)
""")
    assert "on purpose" in done.stderr
    assert "SIGMAB_AUTOLOAD=0" in done.stderr


def test_failed_host_import_stays_the_hosts_error(tmp_path: Path, run_python: RunPython) -> None:
    """A host that cannot be imported fails as it would without us, and can be imported once repaired."""
    broken = tmp_path / "site" / "torch_pruning"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("import torch\nimport missing_dependency\n")
    run_python(
        f"""
import sys
for _ in range(2):
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        assert error.name == "missing_dependency"
    else:
        raise SystemExit("imported")
    assert "torch_pruning" not in sys.modules
sys.path.remove({str(broken.parent)!r})
import torch_pruning as tp
assert "SigmaBPruner" in dir(tp.pruner)
""",
        path=[broken.parent],
    )


def test_folder_named_like_a_host_is_left_alone(tmp_path: Path, run_python: RunPython) -> None:
    """A namespace folder is not the host: no loader to wrap, nothing to register, no complaint."""
    (tmp_path / "nncf").mkdir()
    done = run_python(
        """
import sys, torch
sys.path[:] = [path for path in sys.path if "-packages" not in path]
import nncf
assert not hasattr(nncf, "__version__")
print(*nncf.__path__)
"""
    )
    assert (done.stdout.strip(), done.stderr) == (str(tmp_path / "nncf"), "")


def test_host_with_lazy_names_of_its_own_keeps_them(run_python: RunPython) -> None:
    """Should Torch-Pruning grow a module-level ``__getattr__``, it is asked after the declared names."""
    run_python("""
import torch_pruning.pruner as pruner
import types
from sigmab_plugin.hosts import autoload
module = types.ModuleType("future_pruner")
module.__getattr__ = lambda name: {"theirs": 7}[name] if name == "theirs" else pruner.no_such
module.__dir__ = lambda: ["theirs"]
autoload._offer(module)
autoload._offer(module)
assert module.theirs == 7 and {"theirs", "SigmaBPruner"} <= set(dir(module))
assert module.SigmaBPruner is pruner.SigmaBPruner
assert not hasattr(module, "no_such")
""")


def test_after_import_serves_other_modules(tmp_path: Path, run_python: RunPython) -> None:
    """Zip files share one loader among their modules; only the awaited module triggers the callback."""
    import zipfile

    with zipfile.ZipFile(tmp_path / "lib.zip", "w") as archive:
        archive.writestr("zipped/__init__.py", "VALUE = 1\n")
        archive.writestr("zipped/other.py", "from . import VALUE\n")
    run_python(
        """
from sigmab_plugin.hosts.autoload import after_import
seen = []
after_import("zipped", lambda module: seen.append((module.__name__, module.VALUE)))
import zipped.other, zipped
assert seen == [("zipped", 1)], seen
after_import("zipped.other", lambda module: seen.append(module.__name__))
assert seen[1:] == ["zipped.other"]
import importlib, importlib.util
importlib.reload(zipped)
assert seen[2:] == [("zipped", 1)], seen
assert type(zipped.__loader__).__name__ == "zipimporter"
assert importlib.util.find_spec("zipped").loader.get_source("zipped") == "VALUE = 1\\n"
""",
        path=[tmp_path / "lib.zip"],
    )


def test_works_without_installed_metadata(run_python: RunPython) -> None:
    """Vendored or on PYTHONPATH only: ``install()`` offers our own pruners although no entry point declares them."""
    run_python("""
import importlib.metadata as metadata
metadata.entry_points = lambda **kwargs: ()
import os
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
from sigmab_plugin.hosts.autoload import install
install()
import torch_pruning as tp
assert "SigmaBPruner" in dir(tp.pruner)
assert tp.pruner.SigmaBPruner.__module__ == "sigmab_plugin.hosts.torch_pruning"
""")


@pytest.mark.skipif(find_spec("nncf") is None, reason="NNCF is not installed")
@pytest.mark.parametrize(
    "order", ["import nncf", "import torch, nncf", "from nncf.parameters import ModelType"]
)
def test_nncf_2_learns_the_names_and_nncf_3_is_left_alone(order: str, run_python: RunPython) -> None:
    done = run_python(f"""
{order}
import nncf, sys
if nncf.__version__.startswith("2."):
    assert "sigmab" in nncf.NNCFConfig.schema()["$defs"]
else:
    assert not any(name.startswith("sigmab_plugin.techniques") for name in sys.modules)
assert type(nncf.__spec__).__name__ == "ModuleSpec"
""")
    assert "sigmab-plugin failed" not in done.stderr


def test_own_pruners_equal_the_declared_entry_points() -> None:
    declared = {
        entry.name: entry.value
        for entry in entry_points(group=autoload.PRUNER_GROUP)
        if entry.dist is not None and entry.dist.name == "sigmab-plugin"
    }
    expected = {name: f"sigmab_plugin.hosts.{module}:{name}" for name, module in autoload.OWN_PRUNERS.items()}
    assert declared == expected
