"Learning rates, step by step, against those recorded from the reference implementation."
import json

import pytest

from lcm_nb.training.schedules import ScheduleOptions, learning_rate


@pytest.fixture(scope="module")
def recording(golden):
    path = golden / "lr_schedules.json"
    if not path.exists(): pytest.skip(f"{golden} has no lr_schedules.json")
    return json.loads(path.read_text())


def options(config, kind, stages):
    return ScheduleOptions({"noop": "constant"}.get(kind, kind), warmup=config["warmup_steps"], start_lr=config["start_lr"],
                           final_lr=config["final_lr"], stages=stages, restarts=True)


@pytest.mark.parametrize("kind", ["noop", "myle", "cosine", "wsd", "polynomial"])
def test_every_step(recording, kind):
    c = recording["config"]["default"]
    o = options(c, kind, recording["config"]["wsd_stage_ratio"])
    got = [learning_rate(n, c["lr"], c["max_steps"], o) for n in range(len(recording["scalars"][f"lr/{kind}"]))]
    assert got == pytest.approx(recording["scalars"][f"lr/{kind}"], rel=1e-9)


def test_recipe_points(recording):
    c = recording["config"]["pretrain_recipe_cosine"]
    o = options(c, c["schedule"], [])
    for step, lr in recording["scalars"]["lr_points/pretrain_recipe_cosine"].items():
        assert learning_rate(int(step), c["lr"], c["max_steps"], o) == pytest.approx(lr, rel=1e-9)
