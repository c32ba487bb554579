"""One folder, one process: locks, signals, orphans, what a power cut leaves. Real processes."""

import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from coco_sets import write_set
from conftest import ROOT, run_script
from pretrain_runs import arguments, rows, without_speed

import plumbing.process as locks
from plumbing import errors

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return [write_set(tmp_path_factory.mktemp("sets") / "a", n_poses=8)]


@pytest.fixture(scope="module")
def plain(sets, tmp_path_factory):
    """A run of 8 steps that nothing disturbs."""
    out = tmp_path_factory.mktemp("plain") / "run"
    done = run_script("pretrain.py", *arguments(sets, out, "epochs=4", "save_every=1"))
    assert done.returncode == 0, done.stderr
    return out


def started(command, ranks=1):
    """A stage in a process group of its own. → Popen"""
    words = [sys.executable]
    if ranks > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    words += [str(ROOT / "pretrain.py"), *map(str, command)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, start_new_session=True, **pipes)


def wait_for_lines(out, n, process, seconds=120):
    end = time.time() + seconds
    log = out / "log.jsonl"
    while time.time() < end and process.poll() is None:
        if log.exists() and len(log.read_bytes().splitlines()) >= n:
            return
        time.sleep(0.02)
    raise AssertionError("the run ended or hung before its lines were there")


def has_command(pid):
    """Does a process live? A zombie has no command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except OSError:
        return False


def alive(folder):
    """Processes that were started with a run folder below `folder` on their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text()  # a zombie has none
        except OSError:
            continue
        if f"out={folder}" in words:
            found.append(int(process.name))
    return found


def gone(folder, seconds=15):
    end = time.time() + seconds
    while alive(folder) and time.time() < end:
        time.sleep(0.1)
    return not alive(folder)


def children_of(pid):
    """All processes below one, the fork server's too."""
    own = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        own += [int(child) for child in task.read_text().split()]
    return own + [below for child in own for below in children_of(child)]


# --------------------------------------------------------------------------------------- one folder


def test_the_second_of_two_runs_gets_one_line(sets, plain, tmp_path):
    command = arguments(sets, tmp_path / "run", "epochs=4", "save_every=1")
    first = started(command)
    wait_for_lines(tmp_path / "run", 1, first)
    second = started(command)
    _, said = second.communicate(timeout=120)
    out, errors = first.communicate(timeout=120)
    assert first.returncode == 0, errors
    if second.returncode == 0:  # the first one was done before the second had loaded its libraries
        assert not said.replace("is finished already; another out= begins anew", "").strip()
    else:
        assert second.returncode == 2 and len(said.splitlines()) == 1
        assert "is in use by another run; wait for its end" in said
    for name in ("last.pt", "encoder.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (plain / name).read_bytes(), name


@pytest.mark.parametrize("trial", range(int(os.environ.get("GENPOCCL_DOUBLE_STARTS", "1"))))
def test_two_starts_at_once_and_kills_leave_a_run_that_goes_on(sets, plain, tmp_path, trial):
    """Both are killed at once, wherever they are; the next start ends with the same bytes."""
    out = tmp_path / "run"
    command = arguments(sets, out, "epochs=4", "save_every=1", f"workers={1 - trial % 2}")
    pair = [started(command), started(command)]
    end = time.time() + 60
    while not (out / "log.jsonl").exists() and time.time() < end:
        time.sleep(0.02)
    time.sleep(0.37 * trial % 2.0)
    for process in pair:
        os.killpg(process.pid, signal.SIGKILL)
    for process in pair:
        process.communicate()
    done = run_script("pretrain.py", *command)
    assert done.returncode == 0, done.stderr
    for name in ("last.pt", "encoder.safetensors", "neighbours.png"):
        assert (out / name).read_bytes() == (plain / name).read_bytes(), name
    assert without_speed(out) == without_speed(plain)
    assert not list(out.glob(".*"))


def test_a_file_system_without_locks_is_said_and_no_error(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    locks.lock(tmp_path)
    os.close(locks.locked.pop(os.path.realpath(tmp_path)))
    assert "its file system has no locks; never start two runs in it" in capsys.readouterr().err


def test_a_killed_torchrun_takes_its_ranks_along(sets, tmp_path):
    command = arguments(sets, tmp_path / "run", "epochs=400", "workers=1")
    process = started(command, ranks=2)
    wait_for_lines(tmp_path / "run", 1, process)
    assert len(alive(tmp_path)) >= 5  # torchrun, two ranks, a loader for each
    os.kill(process.pid, signal.SIGKILL)
    assert gone(tmp_path), alive(tmp_path)
    process.communicate()


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_killed_run_takes_its_loaders_along(sets, tmp_path, method):
    program = "import multiprocessing\nimport common, pretrain\nif __name__ == '__main__':\n"
    program += f"    multiprocessing.set_start_method({method!r})\n"
    program += "    common.run_stage(pretrain.main)\n"
    (tmp_path / "start.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{program}")
    command = arguments(sets, tmp_path / "run", "epochs=400", "workers=2")
    words = [sys.executable, str(tmp_path / "start.py"), *command]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, start_new_session=True, **pipes)
    wait_for_lines(tmp_path / "run", 1, process)
    loaders = children_of(process.pid)
    assert len(loaders) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    end = time.time() + 15
    while any(map(has_command, loaders)) and time.time() < end:
        time.sleep(0.1)
    assert not [pid for pid in loaders if has_command(pid)]


# ------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_at_which_step(sets, plain, tmp_path, number, code):
    command = arguments(sets, tmp_path / "run", "epochs=4", "save_every=100", "workers=1")
    process = started(command)
    wait_for_lines(tmp_path / "run", 2, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the run was done before the signal came")
    assert process.returncode == code, said
    step = torch.load(tmp_path / "run/last.pt", weights_only=True)["step"]
    assert f"stopped after step {step} of 8, which is saved; the same command" in said
    assert "Traceback" not in said
    done = run_script("pretrain.py", *command)
    assert done.returncode == 0 and f"continues after step {step} of 8" in done.stderr
    assert (tmp_path / "run/encoder.safetensors").read_bytes() == (
        plain / "encoder.safetensors"
    ).read_bytes()


def test_sigterm_to_torchrun_saves_too(sets, tmp_path):
    """It goes to each rank's whole process group; loaders in it must not end before their rank."""
    command = arguments(sets, tmp_path / "run", "epochs=100", "save_every=1000", "workers=1")
    process = started(command, ranks=2)
    wait_for_lines(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    step = torch.load(tmp_path / "run/last.pt", weights_only=True)["step"]
    assert 2 <= step < 200 and f"stopped after step {step} of 200, which is saved" in said
    assert alive(tmp_path) == []


@pytest.mark.parametrize("moment", ["libyaml|numpy", "libtorch_cpu", "later"])
def test_ctrl_c_at_any_moment_is_no_traceback(sets, tmp_path, moment):
    """While libraries load (one of them is in its memory), and while it works."""
    process = started(arguments(sets, tmp_path / "run", "epochs=400", "workers=2"))
    if moment == "later":
        wait_for_lines(tmp_path / "run", 1, process)
    else:
        end = time.time() + 60
        while time.time() < end:
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            if any(name in maps for name in moment.split("|")):
                break
            time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said, said


def test_a_closed_pipe_is_no_error_and_ascii_terminals_show_the_help():
    words = f"{sys.executable} pretrain.py --help"
    done = subprocess.run(
        f"{words} | head -1", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout and not done.stderr
    ascii_only = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = subprocess.run(words.split(), cwd=ROOT, env=ascii_only, capture_output=True, text=True)
    assert done.returncode == 0 and "tau_mp" in done.stdout and not done.stderr


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_closed_outputs_are_no_error(sets, tmp_path, closed):
    command = arguments(sets, tmp_path / "run", "epochs=1")
    words = shlex.join([sys.executable, "pretrain.py", *command])
    done = subprocess.run(
        f"{words} {closed}", shell=True, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/done").exists() and not list(tmp_path.glob("run/error*"))


# ------------------------------------------------------------------ what kills and power cuts leave


@pytest.fixture
def cut(sets, tmp_path):
    """A run that was killed after its fourth step. → (its folder, the command that goes on)"""
    out = tmp_path / "run"
    command = arguments(sets, out, "epochs=4", "save_every=2")
    process = started(command)
    wait_for_lines(out, 4, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return out, command


def test_broken_lines_of_a_log_are_dropped(plain, cut):
    out, command = cut
    lines = (out / "log.jsonl").read_bytes().splitlines()
    odd = [b"\0" * 64, lines[0][:20], b"[1, 2]", b'{"step": "x"}', b"[" * 100_000, b"\xff\xfe"]
    (out / "log.jsonl").write_bytes(b"\n".join([lines[0], *odd, *lines[1:], b"\0" * 512]))
    done = run_script("pretrain.py", *command)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(out)] == list(range(1, 9))


def test_what_cannot_go_on_is_one_line(cut):
    out, command = cut
    if not (out / "last.pt").exists():
        pytest.skip("killed before its first checkpoint")
    state = torch.load(out / "last.pt", weights_only=True)
    spoilt = [{**state, "model": {}}, {**state, "optimizer": {"state": 3}}, {"step": 3}, [1]]
    spoilt += [{**state, "step": "x"}, {**state, "optimizer": {}}]
    for value in spoilt:
        torch.save(value, out / "last.pt")
        done = run_script("pretrain.py", *command)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1 and "last.pt" in done.stderr


# ------------------------------------------------------------------------------ one line comes last


def test_a_killed_loader_is_one_line(sets, tmp_path):
    process = started(arguments(sets, tmp_path / "run", "epochs=400", "workers=1"))
    wait_for_lines(tmp_path / "run", 1, process)
    os.kill(children_of(process.pid)[-1], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2, said
    last = said.splitlines()[-1]
    assert last.startswith("error: a loader process was killed (out of memory?)")
    assert "Traceback" not in said


@pytest.mark.parametrize("kind", [ConnectionResetError, EOFError])
def test_a_loader_that_dies_while_it_hands_over_a_batch_is_one_line(kind, monkeypatch):
    """torch takes a batch's memory from the loader, who may be gone by then."""

    def gone(timeout=None):
        raise kind("reset by peer")

    batches = iter(torch.utils.data.DataLoader([0, 1], num_workers=1))
    monkeypatch.setattr(batches._data_queue, "get", gone)
    with pytest.raises(kind) as raised:
        next(batches)
    code, line = errors.verdict(raised.value)
    assert code == 2 and line.startswith("error: a loader process was killed (out of memory?)")
    with pytest.raises(kind) as raised:  # elsewhere it is another matter
        gone()
    assert errors.verdict(raised.value)[0] == 1


def test_a_picture_that_one_rank_stumbles_over_is_named_last(sets, tmp_path):
    path = write_set(tmp_path / "set", n_poses=8)
    (tmp_path / "set/images/020.jpg").write_bytes(b"no picture")
    keys = ["check_pictures=false", "workers=1", "epochs=20"]
    done = run_script("pretrain.py", *arguments([path], tmp_path / "run", *keys), ranks=2)
    assert done.returncode == 1
    ours, _, torchrun = done.stderr.partition("torch/distributed/elastic")
    torchrun = torchrun.rpartition("Root Cause")[2]  # its report ends with the rank that knows
    for text in (ours, torchrun):
        lines = [line for line in text.splitlines() if "error: " in line]
        assert len(lines) == 1 and "020.jpg" in lines[0], done.stderr
    assert "Traceback" not in ours and done.stderr.count("error: cannot read") <= 3
    assert "a loader process" not in done.stderr


def test_a_defect_is_one_line_with_the_name_of_a_file(sets, tmp_path):
    program = "import common, pretrain\ndef broken(*_):\n    raise ZeroDivisionError('so it is')\n"
    program += "pretrain.draw_masks = broken\ncommon.run_stage(pretrain.main)\n"
    words = [sys.executable, "-c", program, *arguments(sets, tmp_path / "run", "epochs=1")]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: a defect of this program, please report") and "so it is" in last
    (file,) = (tmp_path / "run").glob("error_*.txt")
    assert str(file) in last and "Traceback" in file.read_text()


def test_another_program_that_imports_from_here_keeps_its_ctrl_c(tmp_path):
    """A notebook, a test runner, a script elsewhere; a script of this repository does not."""
    code = "import signal, sys\nsys.path.insert(0, sys.argv[1])\n"
    code += "before = signal.getsignal(signal.SIGINT)\nimport plumbing.quiet\n"
    code += "print(signal.getsignal(signal.SIGINT) is before)\n"
    (tmp_path / "theirs.py").write_text(code)
    (tmp_path / "copy").mkdir()
    shutil.copytree(ROOT / "plumbing", tmp_path / "copy/plumbing")
    (tmp_path / "copy/stage.py").write_text(code)
    said = []
    for words in (["-c", code], [tmp_path / "theirs.py"], [tmp_path / "copy/stage.py"]):
        command = [sys.executable, *words, tmp_path / "copy"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        said.append(done.stdout.strip())
    assert said == ["True", "True", "False"]


SPIN = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"


@pytest.mark.parametrize(
    ("given", "want"), [({}, "10000"), ({SPIN[0]: "7"}, "7"), ({SPIN[1]: "active"}, "None")]
)
def test_waiting_threads_leave_their_core_unless_the_user_says_otherwise(given, want):
    environment = {name: value for name, value in os.environ.items() if name not in SPIN} | given
    code = "import os, plumbing.quiet; print(os.environ.get('GOMP_SPINCOUNT'))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == want
