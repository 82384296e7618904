"Training cut off at random moments and started again with the same command ends where an uninterrupted run ends."
import random
import signal
import time

import pytest
from toys import finish, lcm_nb, write_documents

from lcm_nb.core.files import read_jsonl


def arguments(data, run_dir):
    return ["train", "pretrain_two_tower_mini", "--train", f"{data}=train", "--validation", f"{data}=validation", "--run-dir", run_dir,
            "--overrides", "dim", "64", "encoder.heads", "2", "denoiser.heads", "2", "--batch.batch-size", "8",
            "--batch.source-suffix-text", "", "--training.max-steps", "60", "--training.checkpoint-every", "7",
            "--training.validate-every", "20", "--training.log-every", "5"]


def result(run_dir):
    lines = [{k: v for k, v in line.items() if "second" not in k} for line in read_jsonl(run_dir / "metrics.jsonl")]
    return lines, (run_dir / "checkpoints" / "step_60" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Data, an uninterrupted run's result, and how long it took"
    folder = tmp_path_factory.mktemp("train")
    data = write_documents(folder / "data")
    start = time.time()
    code, out = finish(lcm_nb(*arguments(data, folder / "run")))
    assert code == 0, out
    return data, result(folder / "run"), time.time() - start


def cut_and_finish(whole, run_dir, how, seed):
    data, expected, seconds = whole
    process = lcm_nb(*arguments(data, run_dir))
    time.sleep(random.Random(f"{how} {seed}").uniform(0.3, 1.0) * seconds)
    process.send_signal(how)
    code, out = finish(process)
    assert code in (0, 130, -how), out
    code, out = finish(lcm_nb(*arguments(data, run_dir)))
    assert code == 0, out
    assert result(run_dir) == expected


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_cut(whole, tmp_path, how, seed): cut_and_finish(whole, tmp_path / "run", how, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 20))
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_cut_often(whole, tmp_path, how, seed): cut_and_finish(whole, tmp_path / "run", how, seed)
