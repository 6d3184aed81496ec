"""Copies the end of a demonstration into README.md: its table, its time, the machine it ran on.

    make demo readme
    python docs/demo_output.py runs/demo

The lines between the two marks are replaced. Run it on the machine of the run.
"""

import argparse
import os
import re
import textwrap
from io import StringIO
from pathlib import Path

from rich.console import Console

from spin_ray.report.history import read_evaluations
from spin_ray.report.status import iterates_table
from spin_ray.run_dir.events import exact_duration
from spin_ray.run_dir.run_dir import RunDir, open_run

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- make readme: begin -->\n", "<!-- make readme: end -->\n"
WIDTH = 80
"""Columns of the terminal that the table is printed for."""
_BF16 = ("amx_bf16", "avx512_bf16", "avx2")
"""Instructions of a processor that decide how fast it computes bf16, the fastest first."""


def machine() -> str:
    """Returns this machine's cores, processor and instructions, e.g. ``2 cores of AMD EPYC (avx512_bf16)``."""
    told = Path("/proc/cpuinfo").read_text()
    name, flags = (re.search(rf"^{key}\s*: (.*)$", told, re.MULTILINE) for key in ("model name", "flags"))
    assert name and flags, "/proc/cpuinfo names no processor"
    instructions = next((each for each in _BF16 if each in flags[1].split()), "neither AVX2 nor better")
    return f"{os.cpu_count()} cores of {name[1].strip()} ({instructions})"


def written(run: RunDir, where: str) -> str:
    """Returns the lines of README.md about a finished run.

    Raises:
        SystemExit: the run was interrupted, so that its time is no time of a run.
    """
    events = run.events()
    times = [event["time"] for event in events]
    starts = [event["stage"] for event in events if event["event"] == "start"]
    if len(starts) != len(set(starts)):
        raise SystemExit(f"{run.storage.root}: a stage started twice; make the run again without a break")
    shown = Console(file=StringIO(), width=WIDTH)
    shown.print(iterates_table(read_evaluations(run, run.config())))
    table = "\n".join(line.rstrip() for line in shown.file.getvalue().splitlines())  # type: ignore[attr-defined]
    took = exact_duration(times[-1] - times[0])
    said = f"On {where} `make demo` took {took} from its first stage to its last (1 run), and ended with:"
    return "\n".join(textwrap.wrap(said, 140)) + "\n\n" + textwrap.indent(table, "    ") + "\n"


def copy(text: str, lines: str) -> str:
    """Returns the README with ``lines`` between its marks.

    Raises:
        SystemExit: a mark is missing, or stands twice.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{README}: needs the lines {BEGIN.strip()} and {END.strip()}, once each")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + lines + END + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of the finished demonstration")
    README.write_text(copy(README.read_text("utf-8"), written(open_run(parser.parse_args().run), machine())), "utf-8")


if __name__ == "__main__":
    main()
