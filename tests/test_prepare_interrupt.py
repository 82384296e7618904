"prepare, stopped at random moments and run again with the same command, ends with the same bytes."
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

TESTS = Path(__file__).parent
DOCUMENTS = 240


def command(source, out):
    return [sys.executable, "-m", "lcm_nb", "prepare", str(source), "--out", str(out), "--name", "bus", "--space", "stand_in_space:space",
            "--shard", "16", "--validation", "0.2", "--test", "0.1"]


def environment():
    return {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "STAND_IN_SECONDS": "0.001"}


def checksums(folder):
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()}


def wait_for(path, process, since=0, seconds=60):
    "Wait until a file is written; False if the process ends before"
    end = time.time() + seconds
    while not (path.exists() and path.stat().st_mtime > since):
        if process.poll() is not None or time.time() > end: return False
        time.sleep(0.002)
    return True


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("bus") / "bus.jsonl"
    lines = [json.dumps({"id": f"day-{i}", "text": f"Day {i} began. " + " ".join(f"Bus {j} was {i * j} minutes late." for j in range(1, 5 + i % 4))})
             for i in range(DOCUMENTS)]
    lines[7], lines[50], lines[90] = '{"text": ', '{"text": null}', '{"id": "magic", "text": "They said xyzzy."}'
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def uninterrupted(source, tmp_path_factory):
    "Checksums of a run that nobody stopped, and how many seconds its work took"
    out = tmp_path_factory.mktemp("whole") / "bus"
    process = subprocess.Popen(command(source, out), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert wait_for(out / ".prepare" / "lock", process), process.communicate()[0]
    start = time.time()
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return checksums(out), time.time() - start


def stop_and_go_on(source, out, name, seed, seconds, stops):
    "Run, stop after a random part of the work, and again; the last run is left alone"
    moment = random.Random(f"{name} {seed}")
    for _ in range(stops):
        start = time.time()
        process = subprocess.Popen(command(source, out), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        at_work = wait_for(out / ".prepare" / "lock", process, start - 0.01)  # held while prepare writes
        time.sleep(moment.random() * seconds)
        process.send_signal(getattr(signal, name))
        said = process.communicate()[1]
        assert at_work, said
        if process.returncode == 130: assert "interrupted; run the same command again to continue" in said and "Traceback" not in said, said
        else: assert name == "SIGKILL" or (out / "card.yaml").exists(), said  # the signal may come when all is done
    last = subprocess.run(command(source, out), env=environment(), capture_output=True, text=True)
    assert last.returncode == 0, last.stderr


def check(source, out, uninterrupted, name, seed, stops):
    wanted, seconds = uninterrupted
    stop_and_go_on(source, out, name, seed, seconds, stops)
    assert checksums(out) == wanted
    ids = [i for f in sorted(out.rglob("*.parquet")) for i in pq.read_table(f, columns=["id"], partitioning=None)["id"].to_pylist()]
    assert sorted(ids) == sorted({f"day-{i}" for i in range(DOCUMENTS)} - {"day-7", "day-50", "day-90"})
    assert [r["place"] for r in map(json.loads, (out / "rejected.jsonl").open())] == ["bus.jsonl:8", "bus.jsonl:51", "bus.jsonl:91"]


def check_seeds(source, folder, uninterrupted, name, seeds, stops):
    "Three at a time, as most of a run is waiting"
    one = lambda seed: check(source, folder / f"{seed}", uninterrupted, name, seed, stops)
    with ThreadPoolExecutor(3) as pool: list(pool.map(one, seeds))


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_stopped_and_run_again(source, tmp_path, uninterrupted, name): check_seeds(source, tmp_path, uninterrupted, name, range(3), 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_stopped_and_run_again_more(source, tmp_path, uninterrupted, name): check_seeds(source, tmp_path, uninterrupted, name, range(3, 23), 2)


def test_nothing_looks_finished_before_the_end(source, tmp_path):
    from lcm_nb.core.errors import UserError
    from lcm_nb.data.cards import find_card
    out = tmp_path / "bus"
    process = subprocess.Popen(command(source, out), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert wait_for(out / "split=train" / "part-00000.parquet", process)
    process.kill()
    process.wait()
    assert not (out / "card.yaml").exists() and not (out / "summary.json").exists()
    with pytest.raises(UserError, match="run the same prepare command again"): find_card(str(out))
