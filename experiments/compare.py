"""Does it work? Methods × seeds × tasks with the ordinary scripts, and what the seeds say together.

  python experiments/compare.py --cfg configs/compare_quick.yaml

Inputs   rows of the config, each a command line of a script of this repository:
           sets     name | command                   picture sets, once, in this order
           methods  name | command                   pre-training; no command: from scratch
           select   name | command | metric          a validation task: chooses each method's {lr}
           tasks    table | name | command | metrics what is reported
           contrasts  name | A - B + …               sums of methods, reported with their interval
         Words in braces are filled in: {lspet} {market} {coco} {out} {lr} {encoder} {seed}. Every
         command also gets out=, and but for sets seed=.
Outputs  in `out`: table.md, table.json, table.png; below it a run folder for every cell, with what
         the cell printed beside it (FOLDER.log); times.jsonl.

A cell that is done is not repeated, one that was killed goes on where it was: the same command goes
on. Seeds come one after the other, and the tables are written after each. A cell that fails is
named and not counted; so are the cells that need it. {lr} runs over `rates` with the first seed; a
method's rate is the best by the mean of the `select` metrics, and never by what is reported. A
method whose command has no {lr} has nothing to choose. Several machines share the work by seeds:
seeds=0 on the first, then on each of the others its seeds and earlier= the first one's table.json.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import ctypes
import json
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import tables

import common
from common import UserError
from plumbing.config import Key, read_config

ROOT = Path(__file__).resolve().parent.parent
KEYS = dict(
    out=Key("runs/compare", "folder of all cells and of the tables"),
    lspet=Key("data/lspet", "folder for {lspet}", may_change=True),
    market=Key("data/market1501", "folder for {market}", may_change=True),
    coco=Key("data/coco", "folder for {coco}", may_change=True),
    sets=Key([], "rows: name | command", may_change=True),
    methods=Key([], "rows: name | command, or name alone: from scratch", may_change=True),
    select=Key([], "rows: name | command | metric", may_change=True),
    tasks=Key([], "rows: table | name | command | metrics", may_change=True),
    rates=Key([], "values of {lr}", of=float, low=0, may_change=True),
    seeds=Key([0, 1, 2], "seeds of pre-training and of fine-tuning", of=int, low=0,
              may_change=True),
    contrasts=Key([], "rows: name | methods with + or - between them", may_change=True),
    reference=Key("GenPoCCL", "the method that others are compared with", may_change=True),
    earlier=Key([], "table.json files of the same rows with other seeds: their rates are kept, "
                "their seeds join the tables", may_change=True),
    jobs=Key(2, "cells at a time; each has its share of the cores", low=1, may_change=True),
)  # fmt: skip


class Cell(NamedTuple):
    """One run of one script."""

    folder: Path
    command: str  # as in its row, braces filled in


class Method(NamedTuple):
    name: str
    command: str  # "" = from scratch


class Row(NamedTuple):
    """Of `select` (table: "") or of `tasks`."""

    table: str
    name: str
    command: str
    metrics: list


def main():
    cfg = read_config(KEYS, __doc__)
    cfg.out = os.path.abspath(cfg.out)
    methods, select, tasks = check(cfg)
    earlier = tables.read_earlier(cfg.earlier, cfg.seeds, raw_rows(cfg))
    common.open_run(cfg, KEYS, common.start_ranks("cpu"))
    work = Work(cfg)
    with work:
        for name, command in rows_of(cfg.sets, 2):  # one may read what another wrote
            work.run([Cell(work.out / "sets" / name, filled(cfg, command))])
        if earlier:
            rates = tables.rates_of(earlier[0])
        else:
            tried = {m.name: cfg.rates if "{lr}" in m.command else [None] for m in methods}
            work.run(work.training(m, lr, cfg.seeds[0]) for m in methods for lr in tried[m.name])
            trials = [(m, lr) for m in methods for lr in tried[m.name] if len(tried[m.name]) > 1]
            work.run(work.selecting(row, m, lr) for m, lr in trials for row in select)
            rates = {m.name: choose(work, m, tried[m.name], select) for m in methods}
        for seed in cfg.seeds:
            if earlier or seed != cfg.seeds[0]:
                work.run(work.training(m, rates[m.name]["rate"], seed) for m in methods)
            cells = [(row, m, rates[m.name]["rate"]) for m in methods for row in tasks]
            work.run(work.reporting(*cell, seed) for cell in cells)
            report(cfg, work, methods, tasks, rates, earlier)


# ----------------------------------------------------------------------------------------- the rows


def rows_of(lines, least, most=None):
    """Lines `a | b | …` → lists of their parts; UserError for another number of them."""
    found, most = [], most or least
    for line in lines:
        parts = [part.strip() for part in line.split("|")]
        if not least <= len(parts) <= most or not all(parts[: least - 1]):
            raise UserError(f'row "{line:.80}" needs {least} parts between |, see --help')
        found.append(parts)
    return found


def check(cfg):
    """The rows of the config → (methods, select, tasks); UserError for what cannot be run."""
    sets = rows_of(cfg.sets, 2)
    methods = [Method(*[*parts, ""][:2]) for parts in rows_of(cfg.methods, 1, 2)]
    select = [Row("", n, c, [m]) for n, c, m in rows_of(cfg.select, 3)]
    tasks = [Row(t, n, c, m.split()) for t, n, c, m in rows_of(cfg.tasks, 4)]
    if not methods or not tasks or not cfg.seeds or not all(row.metrics for row in tasks):
        raise UserError("methods=, tasks=, metrics, seeds= must name something; see --help")
    names = [m.name for m in methods], [r.name for r in tasks], [r.name for r in select]
    read_contrasts(cfg, methods)
    for group in (*names, [name for name, _ in sets]):
        for name in group:
            if not re.fullmatch(r"[\w.-]+", name) or group.count(name) > 1:
                raise UserError(f'"{name}" names a folder: letters, digits, . _ - and once only')
    if cfg.reference not in names[0]:
        raise UserError(f"reference={cfg.reference} is none of the methods {', '.join(names[0])}")
    chosen = [m.name for m in methods if "{lr}" in m.command]
    if chosen and not cfg.rates:
        raise UserError(f"{chosen[0]} has {{lr}}, but rates= is empty")
    if chosen and len(cfg.rates) > 1 and not select:
        raise UserError("several rates= need a select row, a validation task that chooses")
    commands = [c for _, c in sets] + [r.command for r in (*methods, *select, *tasks)]
    for command in filter(None, commands):
        with common.errors.reading(f"row {command!r:.60}", "a command line"):
            script = shlex.split(filled(cfg, command, lr=0.0, encoder="none", seed=0))[0]
        if not (ROOT / script).is_file():
            raise UserError(f'row "{command:.60}": no script {script} in this repository')
    return methods, select, tasks


def raw_rows(cfg):
    """The rows as the config has them, which two tables must share to be joined."""
    return {name: getattr(cfg, name) for name in ("sets", "methods", "select", "tasks")}


def read_contrasts(cfg, methods):
    """Rows `name | A - B + C` → {name: [(1, A), (-1, B), (1, C)]}; UserError for an unknown one."""
    known, found = [m.name for m in methods], {}
    for name, text in rows_of(cfg.contrasts, 2):
        words = ["+", *text.split()]
        signs, terms = words[::2], words[1::2]
        if len(signs) != len(terms) or set(signs) - {"+", "-"} or set(terms) - set(known):
            what = f'contrast "{text}" is no sum of methods with + or - between'
            raise UserError(f"{what}; they are {', '.join(known)}")
        found[name] = [(1 if sign == "+" else -1, term) for sign, term in zip(signs, terms)]
    return found


def filled(cfg, command, **more):
    """The command with its braces filled in."""
    places = {name: os.path.abspath(getattr(cfg, name)) for name in ("lspet", "market", "coco")}
    places |= {"out": cfg.out} | {k: f"{v:g}" if k == "lr" else v for k, v in more.items()}

    def put(found):
        if found[1] not in places:
            known = ", ".join(places)
            raise UserError(f"{found[0]} in row {command!r:.60} is unknown here; known: {known}")
        return shlex.quote(str(places[found[1]]))  # a path may hold spaces

    return re.sub(r"\{(\w+)\}", put, command)


# ------------------------------------------------------------------------------------ running cells


class Work:
    """Runs cells, `jobs` at a time. failed: {cell's folder below out: why}."""

    def __init__(self, cfg):
        self.cfg, self.out, self.failed = cfg, Path(cfg.out), {}
        self.running, self.guard, self.stopping = set(), threading.Lock(), False
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        self.threads = str(max(1, cores // cfg.jobs))

    def __enter__(self):
        self.pool = ThreadPoolExecutor(self.cfg.jobs)
        self.handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self

    def __exit__(self, kind, error, trace):
        """At Ctrl-C and SIGTERM every cell is asked to save and stop, and is waited for."""
        with self.guard:
            self.stopping = True
            for process in self.running:
                process.terminate()
        self.pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, self.handler)

    def training(self, method, lr, seed):
        """The pre-training of a method; None from scratch and where no rate could be chosen."""
        if not method.command or "{lr}" in method.command and lr is None:
            return None
        command = filled(self.cfg, method.command, lr=lr or 0.0, seed=seed)
        return Cell(self.trained(method, lr, seed), f"{command} seed={seed}")

    def trained(self, method, lr, seed):
        return self.out / "methods" / method.name / rate_name(lr) / f"seed_{seed}"

    def selecting(self, row, method, lr):
        folder = self.out / "select" / row.name / method.name / rate_name(lr)
        return self.using(row, method, lr, self.cfg.seeds[0], folder)

    def reporting(self, row, method, lr, seed):
        return self.using(row, method, lr, seed, self.reported(row, method, lr, seed))

    def reported(self, row, method, lr, seed):
        return self.out / "tasks" / row.name / method.name / rate_name(lr) / f"seed_{seed}"

    def using(self, row, method, lr, seed, folder):
        """A task from a method's encoder, or from scratch; None where there is no encoder."""
        encoder = "none"
        if method.command:
            encoder = self.trained(method, lr, seed) / "encoder.safetensors"
            if not (encoder.parent / "done").exists():
                why = f"its encoder is missing: {encoder.parent.relative_to(self.out)}"
                self.failed[str(folder.relative_to(self.out))] = why
                return None
        command = filled(self.cfg, row.command, encoder=encoder, seed=seed)
        return Cell(folder, f"{command} seed={seed}")

    def run(self, cells):
        """All cells, those first that come first; back when all have ended."""
        cells = [cell for cell in cells if cell]
        for cell in cells:
            check_command(cell)
        todo = [cell for cell in cells if not (cell.folder / "done").exists()]
        for future in [self.pool.submit(self.run_cell, cell) for cell in todo]:
            future.result()

    def run_cell(self, cell):
        name = str(cell.folder.relative_to(self.out))
        script, *words = shlex.split(cell.command)
        command = [sys.executable, str(ROOT / script), *words, f"out={cell.folder}"]
        started = time.time()
        with open(f"{cell.folder}.log", "ab") as log:
            with self.guard:
                if self.stopping:
                    return
                # Its own session: Ctrl-C is ours to pass on, once.
                process = subprocess.Popen(
                    command, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                    env={**os.environ, "OMP_NUM_THREADS": self.threads, "PYTHONUNBUFFERED": "1"},
                    start_new_session=True, preexec_fn=end_with_us,
                )  # fmt: skip
                self.running.add(process)
                self.note(name)
            code = process.wait()
        with self.guard:
            self.running.discard(process)
            if self.stopping:
                return
            self.note(name, seconds=round(time.time() - started, 1))
        if code or not (cell.folder / "done").exists():
            self.failed[name] = last_words(f"{cell.folder}.log", code)
        state = f"FAILED: {self.failed[name]}" if name in self.failed else "done"
        print(f"{name}: {state}, {time.time() - started:.0f} s", flush=True)

    def note(self, name, **more):
        """A line of times.jsonl when a cell starts, and one with its seconds when it ends."""
        with open(self.out / "times.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"folder": name} | more) + "\n")


def rate_name(lr):
    return "one_rate" if lr is None else f"lr_{lr:g}"


def check_command(cell):
    """A cell's command stays that of its first start: a changed row must not keep old figures."""
    file = Path(f"{cell.folder}.command")
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        common.write_atomic(file, lambda part: part.write_text(cell.command + "\n"))
    elif file.read_text() != cell.command + "\n":
        raise UserError(
            f"{cell.folder} was started by another command, see {file}; delete both, give the row "
            "another name, or choose another out="
        )


def end_with_us():
    """In a cell's process: it ends when this program was killed, so that a new start finds its
    folder free. Linux alone has this; elsewhere the cell ends first and keeps its folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def last_words(log, code):
    """What a failed cell said: its line with "error:", else the last one."""
    lines = Path(log).read_text(errors="replace").replace("\r", "\n").splitlines()
    lines = [line.strip() for line in lines if line.strip()] or ["it printed nothing"]
    errors = [line for line in lines if line.startswith("error:")]
    return f"exit code {code}, {(errors or lines)[-1][:200]}"


# ----------------------------------------------------------------------------- rates and the report


def metric_of(folder, metric):
    """A cell's figure, or None where it is not done or has no such figure."""
    if not (folder / "done").exists():
        return None
    return tables.figures_of(folder).get(metric)


def choose(work, method, rates, select):
    """→ {"rate": the best by the mean of select's metrics, "scores": {rate: mean}}."""
    if len(rates) == 1:
        return {"rate": rates[0], "scores": {}}
    scores = {}
    for lr in rates:
        place = Path(method.name) / rate_name(lr)
        folders = [work.out / "select" / row.name / place for row in select]
        values = [metric_of(folder, row.metrics[0]) for folder, row in zip(folders, select)]
        if None not in values:
            scores[lr] = sum(values) / len(values)
    best = max(scores, key=scores.get, default=None)
    if best is None:
        work.failed[f"methods/{method.name}"] = "no rate could be chosen: see its select cells"
    return {"rate": best, "scores": scores}


def report(cfg, work, methods, tasks, rates, earlier):
    """table.json, table.md, table.png, and the text on the screen."""
    columns = []
    for row in tasks:
        for metric in row.metrics:
            values, done = {}, []
            for method in methods:
                values[method.name] = tables.earlier_values(earlier, row.name, metric, method.name)
                rate = rates[method.name]["rate"]
                folders = {seed: work.reported(row, method, rate, seed) for seed in cfg.seeds}
                done += [folder for folder in folders.values() if (folder / "done").exists()]
                found = {seed: metric_of(folder, metric) for seed, folder in folders.items()}
                values[method.name] |= {s: v for s, v in found.items() if v is not None}
            if done and not any(values.values()):
                has = ", ".join(tables.figures_of(done[0]))
                work.failed[f"tasks/{row.name}"] = f"no cell has a figure {metric}; there are {has}"
            column = dict(table=row.table, task=row.name, metric=metric)
            column["rows"] = tables.summary(values, cfg.reference)
            column["contrasts"] = tables.contrasts(values, read_contrasts(cfg, methods))
            columns.append(column)
    seconds, costs = tables.seconds_of(work.out / "times.jsonl"), {}
    for method in methods:
        row = tables.cost_before(earlier, method.name)
        rate = rates[method.name]["rate"]
        folders = [work.trained(method, rate, seed) for seed in cfg.seeds]
        folders = [folder for folder in folders if (folder / "done").exists()]
        own = [seconds.get(str(folder.relative_to(work.out))) for folder in folders]
        own = [one for one in own if one]  # a run that was started by hand has none
        row |= tables.cost_of(folders[0]) if folders else {}
        if own:
            row["seconds"] = sum(s for s, _ in own) / len(own)
            row["cut"] = any(cut for _, cut in own)
        costs[method.name] = row | rates[method.name]
    seeds = sorted(set(cfg.seeds).union(*map(tables.seeds_in, earlier)))
    failed = {name: why for table in earlier for name, why in table["failed"].items()}
    result = dict(reference=cfg.reference, seeds=seeds, jobs=cfg.jobs, methods=costs)
    result |= dict(columns=columns, failed=failed | work.failed)
    result["config"] = raw_rows(cfg) | {"contrasts": cfg.contrasts}
    common.write_json(work.out / "table.json", result)
    text = tables.markdown(result)
    common.write_atomic(work.out / "table.md", lambda part: part.write_text(text))
    tables.draw(result, work.out / "table.png")
    print(text)
    print(f"wrote {work.out}/table.md, table.json, table.png")
    tables.say_failed(work.failed, columns)


if __name__ == "__main__":
    common.run_stage(main)
