"""How soon the shell answers: `setpoint --help` and `setpoint list` beside `python -c "import typer, rich"`.

The commands take turns in one run, so that whatever else the machine does falls on all of them alike. The baseline
runs twice a round; how far its two medians lie apart says how much a difference can be trusted. The aim: at most
200 ms more than the baseline. Beside it the time to read a catalogue of 119 methods, made by copying the present files.

    python benchmarks/startup.py [ROUNDS]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

from setpoint.catalog import methods
from setpoint.catalog.reader import read_folder

AIM = 0.200
FULL_CATALOGUE = 119
PYTHON = sys.executable
BASELINE = [PYTHON, "-c", "import typer, rich"]
COMMANDS = {
    "import typer, rich": BASELINE,
    "setpoint --help": [PYTHON, "-m", "setpoint.cli", "--help"],
    "setpoint list": [PYTHON, "-m", "setpoint.cli", "list"],
    "import typer, rich (again)": BASELINE,
}


def seconds(command: list[str]) -> float:
    start = perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return perf_counter() - start


def reading(copies: int) -> float:
    """Best of ten readings of a catalogue with this many files, in seconds."""
    with tempfile.TemporaryDirectory() as name:
        room = Path(name) / "probe"
        room.mkdir()
        folder = Path(__file__).parents[1] / "src" / "setpoint" / "catalog"
        texts = [(folder / m.room / f"{m.key}.toml").read_text(encoding="utf-8") for m in methods.values()]
        ids = [m.items[0].id for m in methods.values()]
        for copy in range(copies):
            at = copy % len(texts)
            text = texts[at].replace(f'id = "{ids[at]}"', f'id = "copy-{copy}"')
            (room / f"copy-{copy}.toml").write_text(text, encoding="utf-8")
        times = []
        for _ in range(10):
            start = perf_counter()
            assert len(read_folder(Path(name))) == copies
            times.append(perf_counter() - start)
        return min(times)


def main() -> None:
    """Print medians, differences to the baseline, and whether the aim is met."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    for command in COMMANDS.values():
        seconds(command)
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    base = median(times["import typer, rich"])
    print(f"medians of {rounds} rounds, commands in turn")
    for name, taken in times.items():
        m = median(taken)
        print(f"{name:28s} {m * 1e3:7.0f} ms   {(m - base) * 1e3:+5.0f} ms   x {m / base:.2f}")
    worst = max(median(times[name]) - base for name in ("setpoint --help", "setpoint list"))
    print(f"aim: at most {AIM * 1e3:.0f} ms more than the baseline: {'met' if worst <= AIM else 'missed'}")
    print(f"reading a catalogue of {FULL_CATALOGUE} files: {reading(FULL_CATALOGUE) * 1e3:.1f} ms (best of 10)")


if __name__ == "__main__":
    main()
