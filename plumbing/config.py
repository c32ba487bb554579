"""The config of a stage: from its table of keys, a flat YAML file and the command line.

Each stage has a table KEYS (name → Key) of what may be set. Keys that several stages have stand
here once.
"""

import argparse
import difflib
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import yaml

from plumbing.errors import UserError, leave, reading
from plumbing.files import read_text


class Key(NamedTuple):
    """One config key, of its default's type; a default of None means "text, or nothing"."""

    default: object
    meaning: str
    origin: str = "ours"  # where the value comes from: docs/choices.md, "Origins"
    choices: tuple = ()
    low: float = -math.inf  # inclusive bounds for numbers (and for each number of a list)
    high: float = math.inf
    of: type = str  # element type of a list
    may_change: bool = False  # may differ between a run and its resumption (changes no result)


# What means the same in every stage; a stage's table ends with these.
MACHINE = dict(
    seed=Key(0, "seed of everything", low=0),
    precision=Key(
        "auto", "fp32 (no TF32); bf16: autocast; auto: bf16 where it is in hardware",
        choices=("auto", "fp32", "bf16"),
    ),
    device=Key("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"), may_change=True),
    workers=Key(2, "loader processes per rank", low=0, may_change=True),
    save_every=Key(500, "steps between checkpoints", low=1, may_change=True),
    log_every=Key(1, "steps between log lines", low=1, may_change=True),
)  # fmt: skip
JOB = dict(  # what a fine-tuning stage does instead of training
    eval_only=Key(False, "only evaluate weights= on the data to evaluate on"),
    predict=Key(None, "only predict: a folder of pictures, or one"),
    weights=Key(None, "model.safetensors of a finished run, for eval_only and predict"),
)


def read_config(keys, doc, argv=None):
    """`--cfg file.yaml key=value ...` → namespace with every key of `keys` (name → Key).

    Order: defaults, then the YAML file, then the command line; `given` holds the names it gave.
    `--help` prints `doc` and the table of keys.
    Raises UserError for unknown keys, wrong types and impossible values. Touches no file but the
    YAML.
    """
    argv = sys.argv[1:] if argv is None else argv
    doc += "\n\nkeys (key=value on the command line, key: value in the YAML):\n" + describe(keys)
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=plain)
    usage = "usage: STAGE.py --cfg configs/x.yaml key=value ..."
    parser.error = lambda why: leave(2, f"error: {why}; {usage}")
    parser.add_argument("--cfg", help="a flat YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)

    values = {name: key.default for name, key in keys.items()}
    given = split_overrides(args.overrides)
    for where, pairs in ((args.cfg, read_yaml(args.cfg)), ("the command line", given)):
        for name, value in pairs.items():
            if name not in keys:
                near = difflib.get_close_matches(str(name), keys, n=1, cutoff=0.0)[0]
                raise UserError(f'unknown key "{name!s:.80}" in {where}; nearest valid key: {near}')
            values[name] = checked(name, value, keys[name], where)
    return SimpleNamespace(**values, given=set(given))


def describe(keys):
    lines = []
    for name, key in keys.items():
        choices = f"; one of {', '.join(map(str, key.choices))}" if key.choices else ""
        lines.append(f"  {name}: {key.meaning}{choices} (default {key.default!r}; {key.origin})")
    return "\n".join(line.replace("%", "%%") for line in lines)


def check_job(cfg, keys):
    """A fine-tuning stage trains, or does eval_only or predict with a finished run's weights=."""
    if cfg.eval_only and cfg.predict:
        raise UserError("eval_only and predict are two jobs; give one")
    if bool(cfg.eval_only or cfg.predict) != bool(cfg.weights):
        raise UserError(
            "weights= (a finished run's model.safetensors) and eval_only=true or predict=FOLDER "
            "need each other; to start a fine-tuning from an encoder use encoder="
        )
    if cfg.weights:
        separate_out(cfg, keys, "eval" if cfg.eval_only else "predict")


def separate_out(cfg, keys, job):
    """A job that is no training writes to a folder of its own unless the command line names one: a
    config's `out` is its training's. It lies outside of what is read."""
    if "out" not in cfg.given:
        cfg.out = f"{keys['out'].default}_{job}"
    read = Path(cfg.predict or "").resolve()
    if cfg.predict and read.is_dir() and Path(cfg.out).resolve().is_relative_to(read):
        raise UserError(f"out={cfg.out} lies in predict={cfg.predict}, whose pictures are read")


def read_yaml(path):
    if path is None:
        return {}
    with reading(path, "YAML"):
        text = read_text(path)
        values, node = yaml.safe_load(text), yaml.compose(text)
        if values is None:
            return {}
        if not isinstance(values, dict):
            raise UserError(f"config {path} must hold `key: value` lines")
        names = [name.value for name, _ in node.value]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f'config {path} gives key "{name}" twice; keep one')
    return values


def split_overrides(overrides):
    pairs = {}
    for item in overrides:
        name, equals, text = item.partition("=")
        if not equals:
            raise UserError(f'"{item}" on the command line is not key=value')
        pairs[name] = text
    return pairs


def checked(name, value, key, where):
    """`value` (YAML object or command-line text) in the type of the key's default, or UserError."""

    def wrong(expected):
        return UserError(f"key {name} in {where} must be {expected}, not {value!r:.100}")

    def scalar(item, kind):
        if kind is str:
            if not isinstance(item, (str, int, float)):  # bool is an int
                raise wrong("text")
            return os.path.expanduser(item) if str(item).startswith("~/") else str(item)
        if isinstance(item, str):
            try:
                digits = item.strip().lstrip("+-").isdigit()  # 010 is 10, not 8 as in YAML
                number = int if digits and kind is int else float
                item = yaml.safe_load(item) if kind is bool else number(item)
            except (ValueError, RecursionError, yaml.YAMLError):
                expected = {bool: "true or false", int: "a whole number", float: "a number"}
                raise wrong(expected[kind]) from None
        if kind is bool:
            if not isinstance(item, bool):
                raise wrong("true or false")
            return item
        number = isinstance(item, (int, float)) and not isinstance(item, bool) and abs(item) < 1e300
        if not number or (kind is int and item != int(item)):
            raise wrong("a whole number" if kind is int else "a number")
        if not key.low <= item <= key.high:
            bounded = f"between {key.low} and {key.high}"
            raise wrong(bounded if key.high < math.inf else f"at least {key.low}")
        return kind(item)

    if isinstance(key.default, list):
        if isinstance(value, str):  # key=a,b,c or key=[a, b, c]
            inner = value.strip().removeprefix("[").removesuffix("]")
            value = [part.strip() for part in inner.split(",") if part.strip()]
        return [scalar(item, key.of) for item in (value if isinstance(value, list) else [value])]
    if key.default is None:
        return None if value is None or value in ("", "null", "none") else scalar(value, str)
    value = scalar(value, type(key.default))
    if key.choices and value not in key.choices:
        raise wrong("one of " + ", ".join(map(str, key.choices)))
    return value
