"""Any module of the toolkit can be imported first: there are no circular imports."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import accelerate  # noqa: F401  (imported here once, instead of in each child process)
import pytest
import timm  # noqa: F401

PACKAGE = Path(__file__).parent.parent / "toolkit"
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name not in ("__main__.py", "__init__.py")
)


@pytest.mark.slow
def test_each_module_can_be_imported_first() -> None:
    assert len(MODULES) > 100
    failed = []
    for name in MODULES:
        child = os.fork()
        if child == 0:
            for loaded in [module for module in sys.modules if module.partition(".")[0] == "toolkit"]:
                del sys.modules[loaded]
            try:
                importlib.import_module(name)
            except BaseException as error:
                print(f"{name}: {error!r}", flush=True)
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            failed.append(name)
    assert not failed
