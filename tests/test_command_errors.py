"Bad input on the command line: one sentence that names it, exit code 2, nothing half-written."
import pytest
from toys import write_documents

from lcm_nb.cli import run_command


@pytest.fixture(scope="module")
def data(tmp_path_factory): return write_documents(tmp_path_factory.mktemp("errors") / "data")


def fails(capsys, *args):
    "The one sentence that a command ends with"
    try: code = run_command([str(a) for a in args])
    except SystemExit as e: code = e.code
    said = capsys.readouterr().err
    assert code == 2, said
    assert "Traceback" not in said
    return said


def test_unknown_command(capsys): assert 'Did you mean "prepare"?' in fails(capsys, "prepar")


def test_unknown_recipe(capsys): assert 'Did you mean "pretrain_base' in fails(capsys, "train", "pretrain_bas_mini")


def test_unknown_option(capsys): assert "training.max-stepz" in fails(capsys, "train", "pretrain_base_mini", "--training.max-stepz", "3")


def test_ill_typed_option(capsys): assert "many" in fails(capsys, "train", "pretrain_base_mini", "--training.max-steps", "many")


def test_unknown_preset(capsys, data, tmp_path):
    said = fails(capsys, "train", "pretrain_base_mini", "--train", f"{data}=train", "--preset", "base_lcm_minni", "--run-dir", tmp_path / "run",
                 "--validation", "--batch.source-suffix-text", "")
    assert 'Did you mean "base_lcm_mini"' in said


def test_unknown_preset_field(capsys, data, tmp_path):
    said = fails(capsys, "train", "pretrain_base_mini", "--train", f"{data}=train", "--overrides", "decoder.layer", "3", "--run-dir", tmp_path / "run",
                 "--validation", "--batch.source-suffix-text", "")
    assert 'Did you mean "layers"' in said


def test_unknown_card(capsys, tmp_path): assert "no_such_card" in fails(capsys, "train", "pretrain_base_mini", "--train", "no_such_card=train", "--validation", "--run-dir", tmp_path / "run")


def test_unknown_split(capsys, data, tmp_path):
    assert 'Did you mean "train"?' in fails(capsys, "train", "pretrain_base_mini", "--train", f"{data}=tran", "--run-dir", tmp_path / "run",
                                               "--validation", "--batch.source-suffix-text", "")


def test_no_data(capsys, tmp_path): assert "names no training data" in fails(capsys, "train", "pretrain_base_mini", "--train", "--run-dir", tmp_path / "run")


def test_another_run_is_there(capsys, data, tmp_path):
    common = ["train", "pretrain_base_mini", "--train", f"{data}=train", "--validation", "--run-dir", tmp_path / "run", "--batch.source-suffix-text", "",
              "--batch.batch-size", "4", "--training.max-steps", "1", "--overrides", "dim", "32", "decoder.heads", "2"]
    assert run_command([str(a) for a in common]) == 0
    assert "another training.lr" in fails(capsys, *common, "--training.lr", "0.5")


def test_recipe_file(capsys, tmp_path):
    (tmp_path / "r.yaml").write_text("preset: base_lcm_mini\ntraining:\n  max_step: 3\n")
    assert 'Did you mean "max_steps"?' in fails(capsys, "train", tmp_path / "r.yaml")
    assert "There is no file" in fails(capsys, "train", tmp_path / "missing.yaml")


def test_missing_input(capsys, tmp_path):
    assert "missing.txt" in fails(capsys, "prepare", tmp_path / "missing.txt", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_normalizer_without_data(capsys, tmp_path):
    assert "no_such_card" in fails(capsys, "fit-normalizer", "--ds", "no_such_card:4", "--save_path", tmp_path / "n.safetensors")
    assert not (tmp_path / "n.safetensors").exists()


def test_no_such_model(capsys): assert 'Did you mean "two-tower-mini"' in fails(capsys, "generate", "two-tower-minni", "--prompt", "Good night.")


def test_another_space(capsys, data, tmp_path):
    said = fails(capsys, "evaluate", "two-tower-mini", "--card", f"{data}=validation", "--dump-dir", tmp_path / "eval", "--space", "mini")
    assert 'was prepared with the space "toy@0"' in said
    assert not (tmp_path / "eval" / "results").exists()


def test_quickstart_input(capsys, tmp_path):
    assert "There is no file" in fails(capsys, "quickstart", "--input", tmp_path / "missing.txt", "--out", tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_convert_nothing(capsys, tmp_path):
    said = fails(capsys, "spaces", "convert", tmp_path / "nowhere", tmp_path / "out")
    assert "nowhere" in said and not (tmp_path / "out").exists()


def test_unknown_space(capsys): assert 'Did you mean "mini"?' in fails(capsys, "spaces", "check", "minni")
