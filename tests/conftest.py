"Options and paths that the tests share."
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests and the notebook cells marked slow too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes rather than seconds; runs with --slow (make test-all)")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"): return
    for item in items:
        if "slow" in item.keywords: item.add_marker(pytest.mark.skip(reason="slow: run it with --slow (make test-all)"))


@pytest.fixture(scope="session")
def golden():
    "The folder of recorded numbers of the reference implementation; LCM_GOLDEN names another recording."
    return Path(os.environ.get("LCM_GOLDEN", ROOT / "tests" / "fixtures" / "golden"))


@pytest.fixture
def slow_run(request): return request.config.getoption("--slow")
