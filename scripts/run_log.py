"""The runs that scripts/plot.py draws: log.jsonl and memory.json of a trainer's --out directory. Standard library only."""
import json
import sys
from pathlib import Path

COLUMNS = 64  # of expert load at least, where there are so many steps; at most twice as many
SCALARS = ("loss", "lr", "tokens_per_s", "grad_norm", "load_max_over_mean")


def fail(message):
    sys.exit(f"plot: {message}")


def finite(value):
    """A number as it is, null (NaN has no JSON) and everything else as None."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


class Load:
    """Selections by layer and expert, summed over stretches of `width` records. The width doubles as the log grows, so that
    a long log takes no more memory than a short one."""

    def __init__(self):
        self.width, self.stretches = 1, []  # of [first step, last step, records, selections by layer and expert]

    def add(self, step, counts):
        if self.stretches and self.stretches[-1][2] < self.width:
            last = self.stretches[-1]
            last[1], last[2] = step, last[2] + 1
            last[3] = [[a + b for a, b in zip(*layers)] for layers in zip(last[3], counts)]
        else:
            self.stretches.append([step, step, 1, counts])
        if len(self.stretches) > 2 * COLUMNS:
            pairs = zip(self.stretches[::2], self.stretches[1::2])
            odd = self.stretches[-1:] if len(self.stretches) % 2 else []
            self.stretches = [[a[0], b[1], a[2] + b[2], [[x + y for x, y in zip(*layers)] for layers in zip(a[3], b[3])]]
                              for a, b in pairs] + odd
            self.width *= 2


class Run:
    """steps: of the training records; scalars: name -> a value a step, None where it was not finite; val: (step, loss)."""

    def __init__(self, folder):
        self.folder, self.name = Path(folder), Path(folder).name
        self.steps, self.scalars, self.val, self.load = [], {name: [] for name in SCALARS}, [], Load()
        self.note = None
        self.read_log(self.folder / "log.jsonl")
        self.memory = self.read_memory(self.folder / "memory.json")

    def read_log(self, path):
        if not path.is_file():
            fail(f"{self.folder}: no log.jsonl there; give the --out directory of a run")
        torn = None
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                for number, line in enumerate(file, 1):
                    if torn:
                        fail(f"{path}:{torn}: not a JSON object, and not the last line; the log is damaged there")
                    try:
                        record = json.loads(line) if line.endswith("\n") else None  # a line has its end, or is torn
                    except ValueError:
                        record = None
                    if isinstance(record, dict):
                        self.add(record, f"{path}:{number}")
                    else:
                        torn = number
        except OSError as error:
            fail(f"cannot read {path}: {error.strerror}")
        if torn:
            self.note = f"{path}:{torn}: the last line is torn, and left out"
        if not self.steps:
            fail(f"{path}: {'holds no training step' if path.stat().st_size else 'is empty'}; has the run begun?")

    def add(self, record, where):
        if "loss" not in record and "val_loss" not in record:
            return
        step = record.get("step")
        if not isinstance(step, int):
            fail(f"{where}: no step")
        if "val_loss" in record and finite(record["val_loss"]) is not None:
            self.val.append((step, record["val_loss"]))
        if "loss" in record:
            self.steps.append(step)
            for name, values in self.scalars.items():
                values.append(finite(record.get(name)))
            load = record.get("expert_load")
            if isinstance(load, list) and any(load):
                self.load.add(step, load)

    def read_memory(self, path):
        """The plan as the trainer wrote it, or None: a run of before it did."""
        if not path.is_file():
            return None
        try:
            memory = json.loads(path.read_text())
            dispatch = memory["dispatch"]
            if not all(isinstance(n, int) for plan in memory["bytes"].values() for n in plan.values()) or dispatch not in memory["bytes"]:
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            fail(f"{path}: not the memory plan of a run; remove the file to plot without it")
        return memory


def read_runs(folders):
    """All runs, named by as much of their paths as tells them apart."""
    runs = [Run(folder) for folder in folders]
    parts = [run.folder.resolve().parts for run in runs]
    if len(set(parts)) < len(parts):
        fail(f"{next(run.folder for run, p in zip(runs, parts) if parts.count(p) > 1)} is named twice")
    for run, mine in zip(runs, parts):
        depth = 1
        while sum(p[-depth:] == mine[-depth:] for p in parts) > 1:
            depth += 1
        run.name = "/".join(mine[-depth:])
    return runs
