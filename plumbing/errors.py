"""One way to refuse. What a user can mend is one line and exit code 2; anything unforeseen is one
line and a file.

What would be silently wrong has a check of its own where it is read. Everything else goes through
`reading`: whatever a library raises over a user's file becomes one line that names the file.
"""

import contextlib
import errno
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist
from tqdm import tqdm

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
run_folder = None  # where an unforeseen error leaves its traceback; set by common.open_run
asked = 0  # the signal that asked this process to stop after its step; set by common.StepLog


class UserError(Exception):
    """Something the user can mend: one line that says what, where, what to do. Exit code 2."""


class Stopped(Exception):
    """SIGINT (Ctrl-C) or SIGTERM, after what is worth keeping was saved. Exit code 128 + signal."""

    def __init__(self, number, message):
        super().__init__(message)
        self.number = number


@contextlib.contextmanager
def reading(path, kind):
    """Whatever goes wrong inside becomes one line: the file, read as what, the error, the place.

    with reading(path, "COCO keypoints") as place: … place.at = "annotation 17" …
    """
    place = SimpleNamespace(at=None)  # a text such as "annotation 17"
    try:
        yield place
    except UserError:
        raise
    except Exception as error:  # libraries raise whatever they like over a user's file
        where = f" in {place.at}" if place.at else ""
        raise UserError(f"cannot read {path} as {kind}: {in_a_line(error)}{where}") from None


def in_a_line(error, longest=200):
    """FileNotFoundError(…) → "No such file or directory"; KeyError("x") → "'x' is missing"."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"{error} is missing"[:longest]
    # Only its first line: torch goes on with advice on how to load a stranger's file anyway.
    text = " ".join(str(error).strip().partition("\n")[0].split())
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return text if isinstance(error, UserError) else f"{type(error).__name__} {text}".strip()


def and_more(things, named=1):
    """For a message that names the first things of a list alone: " (and 3 more)", or nothing."""
    return f" (and {len(things) - named} more)" if len(things) > named else ""


# ------------------------------------------------------------------------------------- the last net


def run_stage(main):
    """Call `main()`. Exit code 0; 2: a UserError; 130 and 143: stopped; 1: a defect of ours."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # plumbing.quiet had taken it
    # Forked loaders share what this process has read: .012 GB of their own at 600,000 annotations.
    # Under Python 3.14's default, forkserver, each would hold .58 GB and start seconds later.
    # A start method that is set already stays.
    if sys.platform == "linux" and multiprocessing.get_start_method(allow_none=True) is None:
        multiprocessing.set_start_method("fork")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has gone; that is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        leave(130, "stopped; the same command goes on where it was")
    except Stopped as stopped:
        leave(128 + stopped.number, str(stopped))
    except Exception as error:  # UserError, a full disk, a lost rank, a defect
        if hasattr(signal, "SIGCHLD"):  # torch would raise at a dead loader, in the midst of this
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if asked:  # the signal reached the loaders too, or other ranks have stopped already
            leave(128 + asked, "stopped; the same command goes on from its last checkpoint")
        leave(*verdict(error))


def verdict(error):
    """→ (exit code, the line that a user reads)."""
    text = str(error).strip()
    if isinstance(error, UserError):
        # A loader's process wraps the message in a traceback; the message itself is the last line.
        return 2, "error: " + text.splitlines()[-1].removeprefix("plumbing.errors.UserError: ")
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        file = error.filename or "the run folder"
        return 2, f"error: disk full while writing {file}: free space, then run the same command"
    memory = re.search("can't allocate memory|not enough memory|out of memory|too large", text)
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and memory:
        return 2, f"error: out of memory ({in_a_line(error)}); lower the batch or the model's size"
    if isinstance(error, OSError) and error.filename is not None:
        return 2, f"error: {error.filename}: {error.strerror}; check this path and the rights to it"
    if re.search(r"DataLoader worker \(pid.* (is killed by signal|exited unexpectedly)", text) or (
        isinstance(error, ConnectionError | EOFError) and in_a_loader(error)
    ):
        return 2, "error: a loader process was killed (out of memory?); lower workers= or the batch"
    lost = isinstance(error, RuntimeError | dist.DistError) and dist.is_initialized()
    if lost and re.search("peer|gloo|NCCL|nccl|store|Socket", text):
        time.sleep(5)  # torchrun ends this rank meanwhile, if another one has said what is wrong
        return 1, f"error: lost the other ranks ({in_a_line(error)})"
    folder = Path(tempfile.gettempdir())
    if run_folder and Path(run_folder).is_dir():
        folder = Path(run_folder)
    file = folder / f"error_{os.getpid()}.txt"
    with contextlib.suppress(OSError):
        file.write_text("".join(traceback.format_exception(error)))
    return 1, f"error: a defect of this program, please report {file} ({in_a_line(error)})"


def in_a_loader(error):
    """Was it raised while a loader's process handed a batch over? It may have died in doing so."""
    frames = traceback.extract_tb(error.__traceback__)
    places = {(Path(frame.filename).name, frame.name) for frame in frames}
    return ("dataloader.py", "_try_get_data") in places


def leave(code, line):
    """Print one line and leave at once: other ranks may wait inside a collective for this one."""
    several = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    line = f"[rank {os.environ['RANK']}] {line}" if several else line
    with contextlib.suppress(OSError):
        for bar in list(getattr(tqdm, "_instances", [])):
            bar.close()  # the error stands on a line of its own
        print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
    if several and "TORCHELASTIC_ERROR_FILE" in os.environ:
        # torchrun repeats it at the end of its report.
        report = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": report}))
    os._exit(code)
