"Run notebooks as the tests do and keep what they show: `python nbs/outputs.py [NOTEBOOK …]`; all of them without arguments."
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
HERE = Path(__file__).resolve().parent


def skipped(cell, flags=("slow", "notest")):
    "Cells that nbdev_test does not run either"
    if cell.cell_type != "code" or "nbdev_export" + "(" in cell.source: return True
    directives = getattr(cell, "directives_", None) or {}
    return directives.get("eval:", [""])[0].lower() == "false" or bool(set(flags) & directives.keys())


def shown(outputs):
    "Outputs worth keeping: no warnings and progress bars"
    return [o for o in outputs if o.get("name") != "stderr"]


def run(path):
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor
    nb, kept = NBProcessor(path, procs=FrontmatterProc, process=True).nb, read_nb(path)
    os.chdir(path.parent)
    CaptureShell(path).run_all(nb, exc_stop=True, preproc=skipped)
    ran = {c.id: c for c in nb.cells}
    for cell in kept.cells:
        if cell.cell_type == "code": cell.outputs = shown(getattr(ran.get(cell.id), "outputs", []))
    write_nb(kept, path)


if __name__ == "__main__":
    paths = [Path(p).resolve() for p in sys.argv[1:]]
    if len(paths) == 1: run(paths[0])
    for p in paths if len(paths) > 1 else [] if paths else sorted(HERE.rglob("*.ipynb")):
        print(p.relative_to(HERE), flush=True)
        subprocess.run([sys.executable, __file__, p], check=True)
