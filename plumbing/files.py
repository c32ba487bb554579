"""Files: a user's are opened here, where only regular ones are; ours are written here, whole or not
at all."""

import argparse
import csv
import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from plumbing.errors import DISK_FULL, UserError, reading

# ------------------------------------------------------------------------------------------ reading


def regular(path):
    """`path`, if it is a regular file: a FIFO would wait for ever, /dev/zero would never end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"cannot read {path}: it is not a regular file")
    return path


def read_text(path):
    with reading(path, "text"):
        return Path(regular(path)).read_text(encoding="utf-8-sig")


def read_json(path):
    with reading(path, "JSON"):
        return json.loads(Path(regular(path)).read_bytes())


def read_mat(path):
    """A MATLAB file → dict of plain values and arrays (cells → arrays, structs → dicts).

    scipy's reader can crash on a damaged file and take Python with it, so a process of its own
    reads.
    """
    code = "import pickle, sys, scipy.io\n"
    code += "found = scipy.io.loadmat(sys.argv[1], simplify_cells=True)\n"
    code += "sys.stdout.buffer.write(pickle.dumps(found))"
    command = [sys.executable, "-c", code, os.path.abspath(regular(path))]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        why = lines[-1][:200] if lines and done.returncode > 0 else "the reader crashed over it"
        raise UserError(f"cannot read {path} as a .mat file: {why}")
    return pickle.loads(done.stdout)  # our own process wrote it


# ------------------------------------------------------------------------------------------ writing


def is_part(path):
    """Is it a half-written file of `write_atomic`'s, .NAME.PROCESS.part?"""
    return re.fullmatch(r"\..+\.\d+\.part", Path(path).name) is not None


def write_atomic(path, write, durable=True):
    """`write(temporary path)`, flush, rename: after a kill or a full disk the old file is whole.

    The temporary name is this process's own, so that two writers never publish each other's halves.
    durable: false flushes nothing, and a power cut may leave the new file empty.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch raises an error of its own while it handles the write's; without one the disk is
        # asked, still filled by the part.
        first = error if isinstance(error, OSError) else error.__context__
        full = getattr(first, "errno", None) in DISK_FULL
        if not isinstance(first, OSError):
            full = shutil.disk_usage(path.parent).free < 1 << 20
        temporary.unlink(missing_ok=True)
        if full:
            what = f"disk full while writing {path}; the previous one is untouched"
            raise UserError(f"{what}; free space") from None
        raise


def write_json(path, value, indent=1):
    write_atomic(path, lambda part: part.write_text(json.dumps(value, indent=indent) + "\n"))


def write_csv(path, header, rows, end="\n"):
    def write(part):
        with open(part, "w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file, lineterminator=end)
            lines.writerow(header)
            lines.writerows(rows)

    write_atomic(path, write)


def write_npz(path, arrays, durable=True):
    """NumPy's .npz of {name: array}."""

    def write(part):
        with open(part, "wb") as file:  # given a name, NumPy would add .npz to it
            np.savez(file, **arrays)

    write_atomic(path, write, durable)


def new_files(out, names, source):
    """Paths of the files that are to be written to the folder `out`.

    Raises UserError where one is there already, and where `out` lies in `source`, a user's folder.
    """
    out, files = Path(out), [Path(out) / name for name in names]
    if out.resolve().is_relative_to(Path(source).resolve()):
        raise UserError(f"out={out} lies in {source}, which stays as it is; choose another out=")
    for file in files:
        if file.exists():
            raise UserError(f"{file} is there already; choose another out=")
    return files


# -------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(path, **state):
    """Tensors and plain values: it loads with weights_only=True. Equal states, equal bytes."""

    def write(part):
        # Given a name, torch would write it into the file, and the temporary one has a number.
        with open(part, "wb") as file:
            torch.save(canonical(state), file)

    write_atomic(path, write)


def canonical(value):
    """The value in new containers, text interned: pickle tells shared objects from equal ones."""
    if isinstance(value, dict):
        return {canonical(k): canonical(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(canonical(v) for v in value)
    return sys.intern(value) if isinstance(value, str) else value


def load_checkpoint(path, kind="a checkpoint of plain tensors"):
    """A .pt/.pth (weights_only: a stranger's pickle never runs code) or .safetensors file → what it
    holds, on the CPU."""
    path = Path(path)
    if not os.path.exists(path):
        raise UserError(f"no checkpoint at {path}")
    with reading(path, kind), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters is an error
        if path.suffix == ".safetensors":
            return load_file(regular(path))
        # MAE and HAP store their arguments beside.
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                return torch.load(regular(path), map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:  # torch advises to load a stranger's file anyway
                raise ValueError("it holds no state_dict, or is damaged") from None


def load_weights(module, state, path):
    """Strict load_state_dict with one clear line instead of torch's page."""
    own = module.state_dict()
    for name in sorted(set(own) | set(state)):
        if name not in state:
            raise UserError(f"{path}: weight {name} is missing")
        if name not in own:
            raise UserError(f"{path}: weight {name} is not of this model")
        found, need = type(state[name]).__name__, tuple(own[name].shape)
        if isinstance(state[name], torch.Tensor) and not state[name].is_sparse:
            found = tuple(state[name].shape)
        if found != need:
            raise UserError(f"{path}: {name} is {found}, this model needs {need}")
        real = state[name].is_floating_point() == own[name].is_floating_point()
        if not real or not is_finite(state[name]):
            raise UserError(f"{path}: {name} holds values that are not finite real numbers")
    module.load_state_dict(state)


def is_finite(tensor):
    return bool(tensor.isfinite().all())


def save_weights(path, module, **meta):
    """Weights only, plain names, as safetensors; `meta`: what a fork needs to build the module.

    The metadata is one JSON text: safetensors writes several entries in an order of its own, never
    the same bytes.
    """
    state = module.state_dict()
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    text = json.dumps({name: str(value) for name, value in meta.items()})
    # Written by us, not by save_file: its files are for their owner alone.
    content = to_safetensors(tensors, metadata={"encoder": text})
    write_atomic(path, lambda part: part.write_bytes(content))
