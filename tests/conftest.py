"""What every test stands on: JAX on the CPU, a compilation cache of its own, and Hypothesis without deadlines.

pytest imports this file before any test module, hence before JAX reads its environment.
"""

import os
import tempfile

import pytest
from hypothesis import HealthCheck, settings

ON_GPU = os.environ.get("REALM_TEST_GPU") == "1"  # set it to run tests/gpu on the machine's accelerator
if not ON_GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"

# No test reads or warms the user's own compilation cache; commands that tests start as processes share this one.
_cache = tempfile.TemporaryDirectory(prefix="realm-test-cache-", ignore_cleanup_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ["XDG_CACHE_HOME"] = _cache.name
os.environ["MPLBACKEND"] = "agg"
os.environ["MPLCONFIGDIR"] = _cache.name

# The first call of a jitted function compiles: its time says nothing.
settings.register_profile("realm", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("realm")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests/gpu unless REALM_TEST_GPU=1 says that an accelerator is there and meant."""
    if ON_GPU:
        return
    skip = pytest.mark.skip(reason="needs a GPU: run with REALM_TEST_GPU=1")
    for item in items:
        if "gpu" in item.path.parts[len(config.rootpath.parts) :]:
            item.add_marker(skip)
