"Every notebook runs from top to bottom, each in a process of its own, with nbdev's directives honoured."
import os
import subprocess
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT

NBS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(ROOT).parts))
NBDEV_TEST = Path(sysconfig.get_path("scripts")) / "nbdev_test"
assert NBS, "no notebooks found"


@pytest.mark.parametrize("nb", NBS, ids=[p.relative_to(ROOT / "nbs").as_posix() for p in NBS])
def test_notebook(nb, slow_run):
    command = [str(NBDEV_TEST), "--path", str(nb), "--n_workers", "0"] + (["--flags", "slow"] if slow_run else [])
    env = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", **os.environ}
    r = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert r.returncode == 0 and "No files were eligible" not in r.stdout, r.stdout + r.stderr
