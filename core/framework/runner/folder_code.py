"""Python files of an agent's folder, imported so that they find each other and never meet another folder's.

A folder becomes a package of its own, ``surefoot_agent_<folder name>``, and its files are modules of it. Inside,
``from .helpers import x`` works always; ``import helpers`` works while the folder is being loaded, so at the top of a
file, and gives the same module. Neither leaves a bare ``helpers`` behind for another agent to find.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, ModuleType

from framework._secrets import mask
from framework.errors import AgentFileError

_loading = threading.RLock()
_PREFIX = "surefoot_agent_"


def load_modules(folder: Path, names: Sequence[str]) -> dict[str, ModuleType]:
    """Import those of the files ``<name>.py`` that the folder has, in this order; each load runs them anew.

    Raises ``AgentFileError`` naming the file and the line of whatever a file raises.
    """
    folder = folder.resolve()
    present = [name for name in names if (folder / f"{name}.py").is_file()]
    if not present:
        return {}
    with _loading:
        package = _new_package(folder)
        with _bare_imports(folder, package):
            return {name: _import(package, folder, name) for name in present}


def _new_package(folder: Path) -> str:
    slug = re.sub(r"\W", "_", folder.name, flags=re.ASCII) or "agent"
    name = f"{_PREFIX}{slug}"
    known = sys.modules.get(name)
    if known is not None and list(known.__path__) != [str(folder)]:
        # Stores name registered types by their module, so the path is in the name only where it must be.
        name += "_" + hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    for loaded in [each for each in sys.modules if each == name or each.startswith(f"{name}.")]:
        del sys.modules[loaded]
    package = ModuleType(name, f"The Python files of {folder}.")
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    _late.names[name] = frozenset(_local_names(folder))
    if _late not in sys.meta_path:
        sys.meta_path.insert(0, _late)
    return name


def _import(package: str, folder: Path, name: str) -> ModuleType:
    try:
        return importlib.import_module(f"{package}.{name}")
    except (Exception, SystemExit) as error:  # a file of the user's may raise anything
        raise AgentFileError(*origin(error, folder, folder / f"{name}.py")) from error


def origin(error: BaseException, folder: Path, file: Path) -> tuple[str, str]:
    """Where in the code of ``folder`` it was raised (``file:line``, by default ``file``), and what, masked."""
    folder = folder.resolve()
    said = str(error.msg if isinstance(error, SyntaxError) else error)
    problem = mask(f"{type(error).__name__}: {said}" if said else type(error).__name__)
    if isinstance(error, ModuleNotFoundError):
        problem += "; install what it needs into this environment"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno or 1}", problem
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(folder)]
    return (f"{own[-1].filename}:{own[-1].lineno}" if own else str(file)), problem


@contextmanager
def _bare_imports(folder: Path, package: str) -> Iterator[None]:
    """Let ``import helpers`` mean the folder's ``helpers`` meanwhile, whatever else has that name."""
    local = frozenset(_local_names(folder))
    hidden = _take_out(local)
    finder = _Alias(package, local)
    sys.meta_path.insert(0, finder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _take_out(local)
        sys.modules.update(hidden)


def _local_names(folder: Path) -> Iterator[str]:
    for entry in folder.iterdir():
        name = entry.stem if entry.suffix == ".py" else entry.name
        is_module = entry.suffix == ".py" or (entry / "__init__.py").is_file()
        # What Python and this library are made of keeps its meaning.
        if is_module and name.isidentifier() and name not in sys.stdlib_module_names and name != "framework":
            yield name


def _take_out(local: frozenset[str]) -> dict[str, ModuleType]:
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in local}


class _Alias(MetaPathFinder, Loader):
    """Finds a bare name of the folder as the module of its package."""

    def __init__(self, package: str, local: frozenset[str]) -> None:
        self._package = package
        self._local = local
        self._thread = threading.get_ident()
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self._local or threading.get_ident() != self._thread:
            return None
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"{self._package}.{spec.name}")
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has put the bare name's spec on the module, which has one of its own.
        bare = module.__spec__
        if bare is not None:
            module.__spec__ = self._specs.pop(bare.name)


class _Late(MetaPathFinder):
    """Says what to do where ``import helpers`` comes too late: in a function, when the folder has been loaded.

    It stays in place for the life of the process, and finds nothing itself. Without it such an import would fail with
    a bare "No module named 'helpers'", or find somebody else's ``helpers``.
    """

    def __init__(self) -> None:
        self.names: dict[str, frozenset[str]] = {}

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Raise ``ModuleNotFoundError`` for a bare name of the folder whose code imports it; else nothing."""
        if not any(fullname in names for names in self.names.values()):
            return
        if fullname in self.names.get(_importing_package(), ()):
            raise ModuleNotFoundError(
                f"{fullname!r} is a file of the agent's folder and is found by this name only while the folder is "
                f"loaded; import it at the top of the file, or write `from . import {fullname}`",
                name=fullname,
            )


def _importing_package() -> str:
    """The package of the agent whose code is importing something; empty for everybody else."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module != "importlib" and not module.startswith("importlib."):
            return module.partition(".")[0] if module.startswith(_PREFIX) else ""
        frame = frame.f_back
    return ""


_late = _Late()
