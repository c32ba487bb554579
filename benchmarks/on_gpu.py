"""The parts of on_gpu.sh: each runs commands and writes what they print as one JSON file."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import tempfile
import time
import xml.etree.ElementTree as xml
from functools import partial

import torch

from common import UserError, run_stage, write_json

ROOT = Path(__file__).resolve().parent.parent
DEVICE = os.environ.get("DEVICE", "cuda")
SMALL = os.environ.get("SMALL", "0") not in ("", "0")
GPUS = torch.cuda.device_count() if DEVICE == "cuda" else 0
WORKERS = min(len(os.sched_getaffinity(0)), 16)
TINY = "size=tiny height=32 width=16 patch=8 batch=4 rounds=1 seconds=0 batches=4 compile=false"


class Part:
    """A part under way. rows: what was measured; skipped, failed: name of a command → why."""

    def __init__(self, name, minutes):
        self.name, self.begin, self.end = name, time.time(), time.time() + 60 * minutes
        self.rows, self.commands, self.skipped, self.failed = [], {}, {}, {}

    def skip(self, name, why):
        self.skipped[name] = why
        print(f"{self.name}: {name} left out: {why}", flush=True)

    def run(self, name, *words, needs=()):
        """`python words…`, with what is left of the part's time. → its stdout; "" if left out.

        needs: modules without which it is left out.
        """
        missing = [module for module in needs if importlib.util.find_spec(module) is None]
        begin, words = time.time(), [str(word) for word in words]
        if missing or begin > self.end:
            self.skip(name, f"{', '.join(missing)} not installed" if missing else "no time left")
            return ""
        print(f"{self.name}: {name} …", flush=True)
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                [sys.executable, *words], stdout=out, stderr=errors, cwd=ROOT,
                env={**os.environ, "HF_HUB_OFFLINE": "1"}, start_new_session=True,
            )  # fmt: skip
            try:
                why = process.wait(self.end - begin)
            except subprocess.TimeoutExpired:
                why = "the part's time was over"
            finally:
                stop(process)
            out.seek(0), errors.seek(0)
            printed, complained = out.read(), errors.read()
        line, seconds = " ".join(words).replace(f"{ROOT}/", ""), round(time.time() - begin, 1)
        self.commands[name] = {"line": line, "seconds": seconds}
        if why:
            last = (complained or printed).strip().splitlines()[-8:]
            self.failed[name] = {"exit": why, "last lines": last}
            print(f"{self.name}: {name} failed ({why}): {' | '.join(last[-2:])}", flush=True)
        return printed

    def table(self, table, keys, needs=(), launch="", name=None):
        """A table of throughput.py; its rows."""
        keys, name = f"{keys} rounds=3 {TINY if SMALL else ''} device={DEVICE}", name or table
        words = [*launch.split(), ROOT / "benchmarks/throughput.py", table, *keys.split()]
        found = [x for x in self.run(name, *words, needs=needs).splitlines() if x.startswith("{")]
        self.rows += [{"command": name, **json.loads(line)} for line in found]

    def tests(self, chosen):
        """test_cuda.py. Rows: how each test ended, why it was left out, what it recorded."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.xml")
            words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
            words += [ROOT / "tests/test_cuda.py", f"--junitxml={report}"]
            self.run("pytest", *words, needs=["pytest"])
            for case in xml.parse(report).iter("testcase") if report.exists() else ():
                row = {"test": case.get("name"), "outcome": "passed", "seconds": case.get("time")}
                for child in case:
                    if child.tag in ("skipped", "failure", "error"):
                        row |= {"outcome": child.tag, "why": child.get("message", "")[:400]}
                row |= {p.get("name"): p.get("value") for p in case.iter("property")}
                self.rows.append(row)

    def write(self, folder):
        value = {"part": self.name, "small": SMALL, **machine(), "commands": self.commands}
        value |= {"seconds": round(time.time() - self.begin, 1), "skipped": self.skipped}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{self.name}.json", value | {"failed": self.failed, "rows": self.rows})


def stop(process):
    """A process and those it started; torchrun ends its ranks when it is asked to end."""
    for number, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, None)):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                continue


def machine():
    """What the figures were measured on."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(GPUS)]
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "device": DEVICE,
        "gpus": [f"{p.name}, {p.total_memory / 1e9:.0f} GB, {p.major}.{p.minor}" for p in gpus],
        "workers": WORKERS,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git.stdout.strip() or "unknown",
    }


# -------------------------------------------------------------------------------------------- parts


def tests(part):
    part.tests("float32_is or autocast_on" if SMALL else "test")


def speed(part):
    """The tables of throughput.py but `generate`, which is a part of its own."""
    large = GPUS and torch.cuda.get_device_properties(0).total_memory > 40e9
    base = f"size=base precision=auto batch={128 if large else 32}"
    part.table("step", base)
    part.table("parts", base)
    part.table("masks", "")
    part.table("memory", f"{base} batches=256")
    part.table("accumulate", f"{base} parts=1,4")
    part.table("versus", "size=small batch=128", needs=["transformers"])
    compiled = f"{base} precisions=bf16 compile=true"
    part.table("versus", compiled, needs=["transformers"], name="versus, ViT-B compiled")


def nccl(part):
    """A process for each GPU; rehearsed by two on the CPU, which talk by gloo."""
    part.tests("nccl")
    ranks = GPUS if DEVICE == "cuda" else 2
    if ranks < 2:
        return part.skip("several ranks", "one GPU; the tests try NCCL in a world of one")
    launch = f"-m torch.distributed.run --standalone --nproc_per_node={ranks}"
    keys = f"size=base precision=auto batch={64 * ranks}"
    part.table("parts", keys, launch=launch, name=f"parts, {ranks} ranks")


def generate(part):
    """Stable Diffusion 1.4's and the adapter's sizes on a GPU; on a CPU small ones."""
    part.table("generate", "batches=4,8,16", needs=["diffusers", "transformers"])


def pretrain(part, size):
    """400 steps on 8,000 drawn pictures of 1,600 poses. Rows: each eighth of the log, the speed."""
    poses, shape, more, n = 1600, "height=256 width=128", "batch=320 epochs=16", WORKERS
    if SMALL:
        poses, shape, more, size, n = 8, "height=64 width=32", "batch=10 epochs=3", "tiny", 0
    draw = f"poses={poses} pictures_per_pose=5 {shape} workers={n}".split()
    keys = f"{shape} {more} size={size} pictures_per_pose=5 warmup_epochs=2 save_every=200".split()
    keys += [f"workers={n}", f"device={DEVICE}"]
    with tempfile.TemporaryDirectory() as folder:
        part.run("generate.py", ROOT / "generate.py", *draw, f"out={folder}/set")
        keys += [f"annotations={folder}/set/annotations.json", f"out={folder}/run"]
        part.run("pretrain.py", ROOT / "pretrain.py", *keys)
        log = Path(folder, "run/log.jsonl")
        rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    part.rows += rows[7::8]
    if rows:
        rates = [row["pictures_per_s"] for row in rows[len(rows) // 2 :]]
        part.rows.append({"steps": len(rows), "median_pictures_per_s": statistics.median(rates)})


PARTS = {  # name → (minutes, 40 in all and at most 9 each; what it does)
    "tests": (8, tests),
    "speed": (9, speed),
    "nccl": (4, nccl),
    "generate": (6, generate),
    "vit_small": (5, partial(pretrain, size="small")),
    "vit_base": (8, partial(pretrain, size="base")),
}


def main():
    wanted, folder = sys.argv[1:] or list(PARTS), Path(os.environ.get("OUT") or "runs/on_gpu")
    for name in wanted:
        if name not in PARTS:
            raise UserError(f"no part {name}; the parts are {', '.join(PARTS)}")
    if DEVICE == "cuda" and not GPUS:
        raise UserError("no CUDA device is visible; DEVICE=cpu SMALL=1 rehearses the parts")
    failed = []
    for name in wanted:
        minutes, run = PARTS[name]
        part = Part(name, minutes)
        run(part)
        part.write(folder)
        failed += [f"{name}: {command}" for command in part.failed]
        seconds = time.time() - part.begin
        print(f"{name}: wrote {folder / name}.json after {seconds:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_stage(main)
