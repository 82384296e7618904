"Two processes train what one process trains, and a run may go on with another number of processes."
import shutil
import subprocess
import sys

import pytest
from toys import ENV, finish, lcm_nb, write_documents

from lcm_nb.core.files import read_jsonl


def arguments(data, run_dir, steps):
    return ["pretrain_base_mini", "--train", f"{data}=train", "--validation", f"{data}=validation", "--run-dir", str(run_dir), "--overrides",
            "dim", "32", "decoder.heads", "2", "decoder.dropout", "0.0", "--batch.batch-size", "5", "--batch.source-suffix-text", "",
            "--training.precision", "no", "--training.max-steps", str(steps), "--training.checkpoint-every", "10", "--training.log-every", "5",
            "--training.gradient-accumulation", "2"]


def launch(*args):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
               "--dynamo_backend", "no", "--main_process_port", "0", "-m", "lcm_nb.training.loop", *args]
    r = subprocess.run(command, env={**ENV, "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stdout + r.stderr
    return r.stdout


def losses(run_dir): return [(line["step"], line["split"], line["loss"]) for line in read_jsonl(run_dir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def data(tmp_path_factory): return write_documents(tmp_path_factory.mktemp("distributed") / "data")


def test_two_processes_are_one(data, tmp_path):
    code, out = finish(lcm_nb("train", *arguments(data, tmp_path / "one", 20)))
    assert code == 0, out
    assert "Training on 1 process " in out
    out = launch(*arguments(data, tmp_path / "two", 20))
    assert "Training on 2 processes" in out
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [line[:2] for line in one] == [line[:2] for line in two]
    assert [line[2] for line in two] == pytest.approx([line[2] for line in one], rel=1e-4)


def test_resume_with_another_number_of_processes(data, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, out = finish(lcm_nb("train", *arguments(data, whole, 20)))
    assert code == 0, out

    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step_20")
    launch(*arguments(data, cut, 20))
    assert [line[2] for line in losses(cut)] == pytest.approx([line[2] for line in losses(whole)], rel=1e-4)
