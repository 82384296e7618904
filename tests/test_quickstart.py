"The whole chain on a tiny scale, as the command runs it."
from toys import finish, lcm_nb

from lcm_nb.core.files import read_json

MODELS = {"two_tower", "base", "copy_last", "context_mean", "random", "nearest", "oracle"}
METRICS = {"l2", "l2_roundtrip", "ca", "par", "consistency"}
TINY = ["--stories", "150", "--base-steps", "20", "--two-tower-steps", "20", "--documents", "8"]


def test_stories(tmp_path):
    out = tmp_path / "q"
    code, said = finish(lcm_nb("quickstart", "--out", out, "--prompt", "One day Leo went to the river.", *TINY))
    assert code == 0, said
    scores = read_json(out / "scores.json")
    assert MODELS <= set(scores) and all(METRICS <= set(scores[m]) for m in MODELS)
    assert (out / "evaluation" / "report.html").exists()
    told = read_json(out / "continuations.json")
    assert told["prompt"] == "One day Leo went to the river." and set(told["two_tower"]) == {"eng_Latn", "fra_Latn"}
    code, said = finish(lcm_nb("quickstart", "--out", out, *TINY))  # finished work is left alone
    assert code == 0 and read_json(out / "scores.json") == scores, said


def test_text_of_ones_own(tmp_path):
    from lcm_nb.concepts.space import load_space
    from lcm_nb.core.errors import UserError
    try: load_space("use")
    except UserError as e:
        import pytest
        pytest.skip(str(e))
    from pydoc_data.topics import topics
    (tmp_path / "text.txt").write_text("\n\n".join(list(topics.values())[:40]))
    out = tmp_path / "q"
    code, said = finish(lcm_nb("quickstart", "--out", out, "--input", tmp_path / "text.txt", "--space", "use", *TINY))
    assert code == 0, said
    assert MODELS - {"oracle"} <= set(read_json(out / "scores.json"))
