"""A rank that dies under torchrun's --max-restarts: the run goes on by itself, bit for bit; and
what torchrun needs for that is asked for at the start.
"""

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


RESTARTING = ["--standalone", "--nproc_per_node=2", "--max-restarts=2", "--monitor-interval=0.2"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", *RESTARTING, str(ROOT / "pretrain.py")]


def test_a_killed_rank_is_started_again(sets, tmp_path):
    run_script("pretrain.py", *arguments(sets, tmp_path / "whole", *MORE), ranks=2)
    command = [*TORCHRUN, *arguments(sets, tmp_path / "broken", *MORE)]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(tmp_path / "errors", "w") as errors:
        run = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=errors, start_new_session=True
        )
    log, deadline = tmp_path / "broken/log.jsonl", time.monotonic() + 200
    try:
        while not (log.exists() and len(log.read_text().splitlines()) >= 3):
            assert run.poll() is None and time.monotonic() < deadline, "no step was made"
            time.sleep(0.01)
        os.kill(workers_of(run.pid)[1], signal.SIGKILL)
        assert run.wait(240) == 0, (tmp_path / "errors").read_text()
    finally:
        if run.poll() is None:
            run.terminate()  # torchrun ends its ranks
    assert "continues after step" in (tmp_path / "errors").read_text()
    for name in ("encoder.safetensors", "last.pt"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == sorted(set(steps))  # no step is told twice


def test_restarts_on_the_store_of_the_dead_are_refused(sets, tmp_path):
    """pytorch issue 135712: the new ranks would read where the dead ones were, and hang."""
    command = [*TORCHRUN, *arguments(sets, tmp_path / "out", *MORE)]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun" in done.stderr
    assert "Traceback" not in done.stderr.partition("torch/distributed/elastic")[0]
    assert not (tmp_path / "out").exists()
