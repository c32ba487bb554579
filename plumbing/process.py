"""One folder, one process: a run's folder is locked, whatever it started ends with it, and what
cannot fit into memory is refused at its start."""

import fcntl
import multiprocessing
import os
import signal
import sys
import threading
import time

import torch

from plumbing.errors import UserError

locked = {}  # run folder → its descriptor, held until this process ends


def lock(folder):
    """Hold an existing folder for this process; UserError if another one does. A killed process
    holds nothing."""
    name = os.path.realpath(folder)
    if name in locked:
        return
    locked[name] = os.open(name, os.O_RDONLY)
    for _ in range(10):  # what a kill left behind needs a moment to end
        try:
            fcntl.flock(locked[name], fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.5)
        except OSError:  # some network file systems have no locks
            why = "its file system has no locks; never start two runs in it"
            print(f"{folder}: {why}", file=sys.stderr)
            return
    os.close(locked.pop(name))
    raise UserError(f"{folder} is in use by another run; wait for its end or choose another out=")


def end_with_parent():
    """A rank ends when its torchrun was killed: it must not go on beside the next start's ranks."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def check_restarts():
    """UserError where torchrun would start dead ranks again but hand the new ones its old store.

    They read the addresses that the dead ranks left there, and hang or are refused in most starts
    (pytorch issue 135712; seen in torch 2.15). An agent that shares no store makes a new one.
    """
    environment = os.environ
    shared = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and int(environment.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise UserError(
            "torchrun --max-restarts: ranks that are started again would wait for the dead ones; "
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, and give it --standalone or "
            "--rdzv_backend=c10d"
        )


def end_with_main(worker):
    """worker_init_fn: a DataLoader's process ends with its main process, even if that was killed.

    Holds under fork, forkserver and spawn: the main process keeps the end of a pipe open. torch
    itself looks at the parent's id, which under forkserver is the fork server's, and would wait for
    ever. Ctrl-C is the main process's to answer, and so is a SIGTERM to all of its group, which is
    what torchrun sends: a loader that ends at once would keep its rank from saving.
    """
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main = multiprocessing.parent_process()
    threading.Thread(target=lambda: (main.join(), os._exit(1)), daemon=True).start()


def check_memory(model, pictures, device):
    """UserError if a training cannot fit: weights, and of those that learn gradients and AdamW's
    two moments; the pictures.

    model may stand on the device "meta", which claims nothing. pictures: on this rank, in a step.
    A lower bound: activations come on top.
    """
    weights = sum(p.nbytes for p in model.parameters())
    learned = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    H, W = getattr(model, "encoder", model).image_size
    need = weights + 3 * learned + pictures * 3 * H * W * 5  # bytes as loaded, and float32
    have = memory_of(device)
    if need > have:
        has = f"the {device.type} has {have / 1e9:.1f} GB"
        lower = "lower the batch, the picture's size or the model's"
        raise UserError(f"this needs more than {need / 1e9:.1f} GB, {has}; {lower}")


def memory_of(device):
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
