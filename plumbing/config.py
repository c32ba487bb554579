"""Between a stage and its user: errors of one line, and the config from defaults, YAML file and command line.

Each stage has a table KEYS (name → Key) of what may be set. Nothing in this file knows a stage, but for
check_job, which the fine-tuning stages share.
"""

import argparse
import difflib
import errno
import math
import multiprocessing
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch.distributed as dist
import yaml
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------ errors for people


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Something the user can mend. The message is one line: what, where, what to do. Exit code 2."""


def run_stage(main):
    """Call `main()`; turn a UserError, a full disk or an unusable path into one line on stderr and exit code 2."""
    # Forked loaders share what this process has read. Under Python 3.14's default, forkserver, each
    # is sent a copy (.17 GB of 600,000 annotations), and a run starts seconds later.
    # A start method that is set already stays.
    if sys.platform == "linux" and multiprocessing.get_start_method(allow_none=True) is None:
        multiprocessing.set_start_method("fork")
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        # A DataLoader worker wraps the message in a traceback; the message itself is the last line.
        fail(str(error).strip().splitlines()[-1].removeprefix("plumbing.config.UserError: "))
    except OSError as error:
        if error.errno in DISK_FULL:
            fail(f"disk full while writing {error.filename or 'the run folder'}: free space, then run the same command")
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}; check this path and the rights to it")
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()


def fail(message):
    """Print one line and leave at once: other ranks may be inside a collective, so no tidy farewell to them."""
    rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    with tqdm.external_write_mode(file=sys.stderr):  # wipes progress bars off the line
        print(f"{rank}error: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)


# ----------------------------------------------------------------------------------------------------------- config


class Key(NamedTuple):
    """One config key. The default's type is the key's type; a default of None means "text, or nothing"."""

    default: object
    meaning: str
    origin: str = "ours"  # where the value comes from: README, "Origins"
    choices: tuple = ()
    low: float = -math.inf  # inclusive bounds for numbers (and for each number of a list)
    high: float = math.inf
    of: type = str  # element type of a list
    free: bool = False  # may differ between a run and its resumption (changes no result)


def read_config(keys, doc, argv=None):
    """`--cfg file.yaml key=value ...` → namespace with every key of `keys` (name → Key).

    Order: defaults, then the YAML file, then the command line; `given` holds the names it gave.
    `--help` prints `doc` and the table of keys.
    Raises UserError for unknown keys, wrong types and impossible values. Touches no file but the YAML.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=doc + "\n\nkeys (key=value on the command line, key: value in the YAML):\n" + describe(keys),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: fail(message + "; usage: STAGE.py --cfg configs/x.yaml key=value ...")
    parser.add_argument("--cfg", help="a flat YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)

    values = {name: key.default for name, key in keys.items()}
    for where, pairs in ((args.cfg, read_yaml(args.cfg)), ("the command line", split_overrides(args.overrides))):
        for name, value in pairs.items():
            if name not in keys:
                near = difflib.get_close_matches(str(name), keys, n=1, cutoff=0.0)[0]
                raise UserError(f'unknown key "{name}" in {where}; nearest valid key: {near}')
            values[name] = checked(name, value, keys[name], where)
    return SimpleNamespace(**values, given=set(split_overrides(args.overrides)))


def describe(keys):
    lines = []
    for name, key in keys.items():
        choices = f"; one of {', '.join(map(str, key.choices))}" if key.choices else ""
        lines.append(f"  {name}: {key.meaning}{choices} (default {key.default!r}; {key.origin})")
    return "\n".join(line.replace("%", "%%") for line in lines)


def check_job(cfg, keys):
    """A fine-tuning stage trains, or with a finished run's weights= does one of eval_only, predict.

    These two write to a folder of their own unless the command line names one: a config's `out` is
    its training's.
    """
    if cfg.eval_only and cfg.predict:
        raise UserError("eval_only and predict are two jobs; give one")
    if bool(cfg.eval_only or cfg.predict) != bool(cfg.weights):
        raise UserError(
            "weights= (a finished run's model.safetensors) and eval_only=true or predict=FOLDER need each other; "
            "to start a fine-tuning from an encoder use encoder="
        )
    if cfg.weights and "out" not in cfg.given:
        cfg.out = keys["out"].default + ("_eval" if cfg.eval_only else "_predict")


def read_yaml(path):
    if path is None:
        return {}
    try:
        text = Path(path).read_text(encoding="utf-8")
        values, node = yaml.safe_load(text), yaml.compose(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"config {path} is not YAML: {' '.join(str(error).split())}") from None
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
    """Coerce `value` (YAML object or command-line text) to the type of the key's default, or raise UserError."""

    def wrong(expected):
        return UserError(f"key {name} in {where} must be {expected}, not {value!r}")

    def scalar(item, kind):
        if kind is str:
            if item is None or isinstance(item, (dict, list)):
                raise wrong("text")
            return str(item)
        if isinstance(item, str):
            try:
                item = float(item) if kind is float else yaml.safe_load(item)
            except (ValueError, yaml.YAMLError):
                raise wrong("a number" if kind is not bool else "true or false") from None
        if kind is bool:
            if not isinstance(item, bool):
                raise wrong("true or false")
            return item
        number = isinstance(item, (int, float)) and not isinstance(item, bool) and math.isfinite(item)
        if not number or (kind is int and item != int(item)):
            raise wrong("a whole number" if kind is int else "a number")
        if not key.low <= item <= key.high:
            raise wrong(f"between {key.low} and {key.high}" if key.high < math.inf else f"at least {key.low}")
        return kind(item)

    if isinstance(key.default, list):
        if isinstance(value, str):  # key=a,b,c or key=[a, b, c]
            value = [part.strip() for part in value.strip("[] ").split(",") if part.strip()]
        return [scalar(item, key.of) for item in (value if isinstance(value, list) else [value])]
    if key.default is None:
        return None if value is None or value in ("", "null", "none") else scalar(value, str)
    value = scalar(value, type(key.default))
    if key.choices and value not in key.choices:
        raise wrong("one of " + ", ".join(map(str, key.choices)))
    return value
