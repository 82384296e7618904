"README.md from nbs/index.ipynb: `python nbs/readme.py`; with --check, fail when it is stale."
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"


def outputs(cell):
    "What a code cell printed or showed, as text"
    for out in cell.get("outputs", []):
        text = out.get("text") or out.get("data", {}).get("text/plain", "")
        yield "".join(text)


def markdown(cell):
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown": return source
    if source.startswith("#| hide"): return None
    code = "\n".join(line for line in source.splitlines() if not line.startswith("#|"))
    shown = "".join(outputs(cell)).strip("\n")
    return f"```python\n{code.strip()}\n```" + (f"\n\n```text\n{shown}\n```" if shown else "")


def render(nb): return "\n\n".join(m for m in map(markdown, nb["cells"]) if m) + "\n"


if __name__ == "__main__":
    text = render(json.loads((HERE / "index.ipynb").read_text(encoding="utf-8")))
    if "--check" in sys.argv:
        if not README.exists() or README.read_text(encoding="utf-8") != text: sys.exit("README.md is not what nbs/index.ipynb says: run `make readme`.")
    else: README.write_text(text, encoding="utf-8")
