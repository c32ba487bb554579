"""A run's folder: whose it is, what run.json says of each start in it, and what a finished run
hands on to a longer one. common.py calls these in that order.

run.json is a record for people. A run goes on without it.
"""

import contextlib
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from plumbing.config import read_yaml
from plumbing.errors import UserError, in_a_line, reading
from plumbing.files import is_part, load_checkpoint, read_json, write_json

LIBRARIES = ("torchvision", "numpy", "scipy", "pillow", "safetensors")
CODE = ("script", "commit", "changes")  # what run.json says of it
SCHEDULE = ("epochs", "warmup_epochs", "blr")  # what a longer run may change
records = {}  # run folder of this process → (all entries of its run.json, a clock at the start)


def look_into(cfg, keys):
    """→ "new", "resume" or "finished", as cfg.out is now; UserError where it is not this run's."""
    if not cfg.out:
        raise UserError("out= is empty; name a run folder")
    out = Path(cfg.out)
    if (out / "config.yaml").exists():
        # It is this folder, however out= spells it, and wherever it was moved.
        differs = differences(read_yaml(out / "config.yaml"), cfg, keys, free=("out",))
        if differs:
            what = "; ".join(differs)
            raise UserError(f"{out} holds a run with another config ({what}); choose another out=")
        return "finished" if (out / "done").exists() else "resume"
    if out.exists() and (not out.is_dir() or not all(map(is_part, out.iterdir()))):
        raise UserError(f"{out} exists and is not a run of this project; choose another out=")
    return "new"


def differences(old, cfg, keys, free=()):
    """Texts "key old -> new" of what changes a result; `free` and may_change keys do not count."""
    return [
        f"{name} {old.get(name)!r} -> {getattr(cfg, name)!r}"
        for name, key in keys.items()
        if not key.may_change and name not in free and old.get(name) != getattr(cfg, name)
    ]


def same_data(out, dataset, steps_per_epoch, first):
    """Keep in data.json what a run's steps are counted on; UserError for a run that goes on after
    step `first` on other data: its batches would be others. Looked at: the number of samples, and
    all arrays and lists (names, boxes, labels, sentences, …) of the dataset's `people` or `split`.
    """
    digest, lists = hashlib.sha256(), getattr(dataset, "people", None) or dataset.split
    for one in lists if type(lists) is list else [lists]:
        for value in one:
            if isinstance(value, np.ndarray):
                digest.update(np.ascontiguousarray(value))
            elif isinstance(value, (list, tuple)):
                digest.update(json.dumps(value).encode())
    if digest.digest() == hashlib.sha256().digest():
        raise TypeError("people or split of a dataset must be tuples of arrays and lists")
    now = dict(samples=len(dataset), steps_per_epoch=steps_per_epoch, sha256=digest.hexdigest())
    path = Path(out) / "data.json"
    if not first or not path.exists():
        write_json(path, now)
        return
    began = read_json(path)
    if began != now:
        with reading(path, "what this run began on"):
            was = f"{began['samples']} samples, {began['steps_per_epoch']} steps an epoch"
        what = f"{out} began on other data ({was}; now {now['samples']} and {steps_per_epoch})"
        raise UserError(f"{what}; give it back, or choose another out=")


# ----------------------------------------------------------------------------------- a longer run


def earlier_run(cfg, keys, steps_per_epoch):
    """→ path of the last.pt that resume_from= names; None without one, and where this run has saved
    something of its own already.

    Only the SCHEDULE may differ between the two, and what changes no result.
    Raises UserError for a run that is not finished, another config, other data, too few epochs.
    """
    if not cfg.resume_from or (Path(cfg.out) / "last.pt").exists():
        return None
    path = Path(cfg.resume_from)
    path = path / "last.pt" if path.is_dir() else path
    if not (path.parent / "done").exists():
        what = "is no folder of a finished run, and no last.pt in one"
        raise UserError(f"resume_from={cfg.resume_from} {what}; start an unfinished one again")
    old = read_yaml(path.parent / "config.yaml")
    differs = differences(old, cfg, keys, free=("out", "resume_from", *SCHEDULE))
    if differs:
        what = f"{'; '.join(differs)}): only {', '.join(SCHEDULE)} may differ"
        raise UserError(f"resume_from={cfg.resume_from} is a run with another config ({what}")
    with reading(path, "a finished run's checkpoint"):
        step, epochs = int(load_checkpoint(path)["step"]), int(old["epochs"])
    if step != epochs * steps_per_epoch:
        now = f"the data has {steps_per_epoch} steps an epoch now"
        raise UserError(f"{path} is of {step} steps in {epochs} epochs, but {now}; give it back")
    if cfg.epochs <= epochs:
        longer = f"resume_from={cfg.resume_from} has {epochs} already"
        raise UserError(f"epochs={cfg.epochs} prolongs nothing: {longer}; it counts from the start")
    return path


# --------------------------------------------------------------------------------------- run.json


def record_start(out, ranks):
    """Append to out/run.json what this start runs on."""
    entries = []
    with spared(out):
        if (Path(out) / "run.json").exists():
            entries = read_json(Path(out) / "run.json")
            if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
                raise ValueError("it holds no list of starts")
        entry = {"command": shlex.join(sys.argv), "started": this_moment(), **code()}
        if entries and any(entries[-1].get(k) != entry.get(k) for k in CODE):
            print(f"{out} goes on with other code than at its last start", file=sys.stderr)
        entry |= {"python": platform.python_version(), "torch": str(torch.__version__)}
        for name in LIBRARIES:
            with contextlib.suppress(metadata.PackageNotFoundError):
                entry[name] = metadata.version(name)
        entry |= {"system": platform.platform(), "device": device_name(ranks.device)}
        entry |= {"ranks": ranks.world, "threads": torch.get_num_threads()}
        entries.append({name: value for name, value in entry.items() if value is not None})
        records[str(Path(out))] = entries, time.monotonic()
        write_json(Path(out) / "run.json", entries)


def record_end(out, how):
    """How this start ended: "finished" or "stopped". One that was killed says nothing."""
    if str(Path(out)) in records:
        entries, begin = records.pop(str(Path(out)))
        seconds = round(time.monotonic() - begin, 1)
        entries[-1] |= {"ended": this_moment(), "seconds": seconds, "how": how}
        with spared(out):
            write_json(Path(out) / "run.json", entries)


def finish_run(out):
    """The last thing a run does: its end in run.json, and the mark that there is nothing to do."""
    record_end(out, "finished")
    (Path(out) / "done").touch()


@contextlib.contextmanager
def spared(out):
    """A record that cannot be kept costs a line, never the run."""
    try:
        yield
    except (OSError, ValueError, UserError) as error:
        print(f"{out}/run.json stays as it is: {in_a_line(error)}", file=sys.stderr)


def this_moment():
    return datetime.now().astimezone().isoformat(timespec="seconds")


def code():
    """CODE: the script's name, the commit and, where tracked files differ, a hash of how."""
    found = {"script": Path(sys.argv[0]).name, "commit": commit()}
    if str(found["commit"]).endswith("-dirty"):
        change = git("diff", "HEAD") or ""
        found["changes"] = hashlib.sha256(change.encode()).hexdigest()[:12]
    return found


def commit():
    """This code's commit, with "-dirty" behind it where tracked files differ; None without git."""
    found = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return found and found.strip()


def git(*words):
    """What git says of the folder of this code; None without git."""
    where = dict(cwd=Path(__file__).parents[1], env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"})
    how = dict(capture_output=True, text=True, errors="replace", timeout=10)
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git, or it does not answer
        done = subprocess.run(["git", *words], **where, **how)
        return done.stdout if done.returncode == 0 else None
    return None


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):  # Linux alone has it
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
