"""The C library keeps the memory that training frees, unless the user has configured the allocator."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from toolkit.distributed.malloc import is_configured_by_user

pytestmark = pytest.mark.long

PAGES = """
import resource, torch
from toolkit.distributed.malloc import tune_malloc
if {kept}:
    print(tune_malloc())
torch.set_num_threads(1)
for _ in range({rounds}):
    torch.ones(10_500_000)  # 42 MB, touched and freed; glibc's own limits adapt to at most 32 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(10_500_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(*, kept: bool) -> int:
    """Return the number of page faults when a tensor is filled ten times."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    # glibc takes some rounds to come back to the same place.
    code = [sys.executable, "-c", PAGES.format(kept=kept, rounds=20 if kept else 1)]
    lines = subprocess.run(code, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert lines[:-1] == ["True"] * kept
    return int(lines[-1])


@pytest.mark.extended
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc: nothing is configured")
def test_freed_memory_is_reused_without_page_faults() -> None:
    assert page_faults(kept=False) > 10 * 10_000
    assert page_faults(kept=True) < 1000


@pytest.mark.parametrize(
    ("environment", "configures"),
    [
        ({}, False),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, True),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, True),
        ({"GLIBC_TUNABLES": "glibc.pthread.rseq=0"}, False),
        ({"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}, True),
        ({"LD_PRELOAD": "/usr/lib/libother.so"}, False),
    ],
)
def test_the_user_s_allocator_settings_are_not_changed(environment: dict[str, str], configures: bool) -> None:
    assert is_configured_by_user(environment) is configures
