"""Run every lesson and solution and save what it shows; measure seconds and peak memory, and write
the table of notebooks/README.md. Leave the machine alone meanwhile: some lessons measure, too.
"""

import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path

import nbformat
import psutil
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

from blip2_edu.app.hardware import hardware_table

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
MAP = NOTEBOOKS / "README.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def run(path: Path) -> tuple[float, float]:
    """Execute a notebook in place, in a kernel of its own: seconds and peak memory in GB."""
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--inplace"]
    command += ["--execute", "--ExecutePreprocessor.timeout=300"]
    command += ["--ExecutePreprocessor.store_widget_state=False"]
    command += ["--ExecutePreprocessor.record_timing=False", str(path)]
    start, peak, done = time.perf_counter(), 0.0, threading.Event()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.1):
            peak = max(peak, memory(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{path.name} does not run:\n{errors[-2000:]}")
    return seconds, peak


def tidy_outputs(path: Path) -> None:
    """Keep a printed progress bar as it ended, and none that is a widget: it would stand at 0%."""

    def is_bar(output: nbformat.NotebookNode) -> bool:
        return "%|" in output.get("data", {}).get("text/plain", "")

    notebook = nbformat.read(path, as_version=4)
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not is_bar(output)]
    nbformat.write(notebook, path)


def memory(pid: int) -> float:
    """Gigabytes that a process and its children hold now."""
    try:
        parent = psutil.Process(pid)
        tree = [parent, *parent.children(recursive=True)]
        return sum(process.memory_info().rss for process in tree) / 2**30
    except psutil.NoSuchProcess:
        return 0.0


def table(measured: list[tuple[str, float, float]]) -> str:
    """The measurements as Markdown, with the machine and the date."""
    machine = dict(hardware_table())
    where = ", ".join(machine[name] for name in ("Processor", "Memory"))
    rows = [f"| {name} | {seconds:.0f} | {peak:.1f} |" for name, seconds, peak in measured]
    total = sum(seconds for _, seconds, _ in measured)
    rows.append(f"| all | {total:.0f} | |")
    head = ["| notebook | seconds | peak memory, GB |", "|---|---|---|"]
    note = f"{date.today()}, {where}, GPU: {machine['GPU']}; starting the kernel included."
    return "\n".join([BEGIN, note, "", *head, *rows, END])


def main() -> None:
    before, rest = MAP.read_text().split(BEGIN)
    after = rest.split(END)[1]
    measured = []
    for path in sorted(NOTEBOOKS.glob("*.ipynb")) + sorted(NOTEBOOKS.glob("solutions/*.ipynb")):
        seconds, peak = run(path)
        tidy_outputs(path)
        name = path.relative_to(NOTEBOOKS).as_posix()
        print(f"{name:<44}{seconds:>6.0f} s{peak:>6.1f} GB", flush=True)
        measured.append((name, seconds, peak))
    MAP.write_text(before + table(measured) + after)


if __name__ == "__main__":
    main()
