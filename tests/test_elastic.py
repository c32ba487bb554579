"""A rank that dies under torchrun's --max-restarts: the run goes on by itself, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT, run_script
from pretrain_runs import arguments


def rank_of(pid):
    """RANK of a process, or None where it is none of torchrun's workers."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        script = b"pretrain.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return None
    ranks = [entry[5:] for entry in environment if entry.startswith(b"RANK=")]
    return int(ranks[0]) if ranks and script else None


def workers_of(torchrun):
    """{rank: pid} of a torchrun's own workers."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    ranks = {rank_of(pid): int(pid) for pid in children}
    return {rank: pid for rank, pid in ranks.items() if rank is not None}


MORE = ["epochs=8", "save_every=2"]


def test_a_killed_rank_is_started_again(sets, tmp_path):
    run_script("pretrain.py", *arguments(sets, tmp_path / "whole", *MORE), ranks=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["--max-restarts=2", "--monitor-interval=0.2", str(ROOT / "pretrain.py")]
    command += arguments(sets, tmp_path / "broken", *MORE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "errors", "w") as errors:
        run = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=errors)
    log, deadline = tmp_path / "broken/log.jsonl", time.monotonic() + 200
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "errors").read_text()
        time.sleep(0.01)
    os.kill(workers_of(run.pid)[1], signal.SIGKILL)
    assert run.wait(240) == 0, (tmp_path / "errors").read_text()
    assert "continues after step" in (tmp_path / "errors").read_text()
    for name in ("encoder.safetensors", "last.pt"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == sorted(set(steps))  # no step is told twice
