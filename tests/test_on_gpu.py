"""benchmarks/on_gpu.sh, rehearsed on the CPU at tiny sizes; what it does with trouble."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import on_gpu  # noqa: E402


def rehearse(out, *parts, **environment):
    small = {"DEVICE": "cpu", "SMALL": "1", "OUT": str(out), "VIRTUAL_ENV": sys.prefix}
    command, environment = [ROOT / "benchmarks/on_gpu.sh", *parts], os.environ | small | environment
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, env=environment, **pipes)
    try:
        said, errors = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it ends what it has started
        raise
    return subprocess.CompletedProcess(command, process.returncode, said, errors)


def rows_of(out, part):
    written = json.loads((out / f"{part}.json").read_text())
    assert not written["failed"] and not written["skipped"] and written["torch"]
    return written["rows"]


def test_speed_and_generate_run_every_table(tmp_path):
    done = rehearse(tmp_path, "speed", "generate")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path, "speed") + rows_of(tmp_path, "generate")
    counts = dict(step=2, parts=6, masks=2, memory=2, accumulate=4, versus=7 + 3, generate=3)
    assert Counter(row["table"] for row in rows) == counts
    assert [row["same_masks"] for row in rows if "same_masks" in row] == [1.0]


def test_tests_ranks_and_pretraining(tmp_path):
    done = rehearse(tmp_path, "tests", "nccl", "vit_small")
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = {row["test"]: row for row in rows_of(tmp_path, "tests")}
    assert outcome["test_float32_is_float32_on_a_gpu"]["outcome"] == "passed"
    left_out = outcome["test_autocast_on_cuda"]
    assert left_out["outcome"] == "passed" or left_out["why"] == "needs a CUDA device"
    assert rows_of(tmp_path, "nccl")[-1]["what"] == "gradient exchange, not hidden"
    first, last = rows_of(tmp_path, "vit_small")
    assert first["step"] == 8 and first["loss"] > 0 and last["steps"] == 12


def test_no_gpu_and_unknown_parts_are_one_line(tmp_path):
    done = rehearse(tmp_path / "out", "tests", DEVICE="cuda", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stderr.startswith("error: no CUDA device is visible; ")
    done = rehearse(tmp_path / "out", "test")
    assert done.returncode == 2 and done.stderr.startswith("error: no part test; the parts are ")
    assert not (tmp_path / "out").exists()


def test_trouble_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    part = on_gpu.Part("x", 1)
    on_gpu.generate(part)
    assert part.skipped == {"generate": "diffusers not installed"} and not part.rows
    assert part.run("breaks", "-c", "print(1); import nowhere") == "1\n"
    part.end = time.time() + 1
    part.run("sleeps", "-c", "import time; time.sleep(60)")
    part.run("too late", "-c", "")
    part.write(tmp_path)
    written = json.loads((tmp_path / "x.json").read_text())
    breaks = written["failed"]["breaks"]
    assert breaks["exit"] == 1 and "No module named 'nowhere'" in breaks["last lines"][-1]
    assert written["failed"]["sleeps"]["exit"] == "the part's time was over"
    assert written["skipped"]["too late"] == "no time left" and written["seconds"] < 30


def test_all_parts_take_at_most_40_minutes():
    minutes = [minutes for minutes, _ in on_gpu.PARTS.values()]
    assert sum(minutes) <= 40 and max(minutes) <= 9
    assert list(on_gpu.PARTS) == "tests speed nccl generate vit_small vit_base".split()
