"""Shared by all tests: the repository on the path, one thread, fixtures of more than one file.

Functions of more than one file: *_runs.py (a stage and its small sets), coco_sets.py, small_*.py,
mutations.py, pretend_cuda.py.
"""

import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# What programs leave in the temporary folder goes at the end. A short path: a socket's has room for
# 108 characters.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # but for pytest's own
TEMPORARY = tempfile.mkdtemp(prefix="t")
os.environ["TMPDIR"] = tempfile.tempdir = TEMPORARY
atexit.register(shutil.rmtree, TEMPORARY, ignore_errors=True)

import pytest  # noqa: E402
import torch  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def data_root():
    """Real pictures (GENPOCCL_DATA); tests that need them are skipped where it is not set."""
    root = os.environ.get("GENPOCCL_DATA")
    if not root:
        pytest.skip("GENPOCCL_DATA is not set: no real pictures")
    return Path(root).resolve()


def check_fields(path):
    """Our COCO file is one for pycocotools, and docs/annotations.md describes its fields."""
    coco = COCO(str(path))
    coco.info()
    assert coco.dataset["info"]["description"] and coco.getAnnIds()
    text = (ROOT / "docs/annotations.md").read_text(encoding="utf-8")
    described = set(re.findall(r"`(\w+)`", text))
    for kind in ("images", "annotations", "categories"):
        assert {name for entry in coco.dataset[kind] for name in entry} <= described


def run_script(script, *arguments, ranks=1, timeout=300, start_only=False):
    """Run a stage as a user does, under torchrun for several ranks. → CompletedProcess, or Popen if
    start_only.
    """
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [str(ROOT / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if start_only:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


def kill_after(script, *arguments, lines, log, timeout=120):
    """Start a stage, SIGKILL it once its log has that many lines, and say whether it was killed
    before its end.
    """
    process, reached = run_script(script, *arguments, start_only=True), False
    end = time.time() + timeout
    while process.poll() is None and time.time() < end and not reached:
        reached = Path(log).exists() and len(Path(log).read_text().splitlines()) >= lines
        time.sleep(0.01)
    process.kill()
    _, errors = process.communicate()
    assert reached or process.returncode == 0, f"not {lines} lines in {timeout} s: {errors}"
    return process.returncode == -signal.SIGKILL


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A random BERT two layers deep, saved as a real one is."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] . , ! a person in shirt and trousers that are above"
    words += " them top red green blue"
    (folder / "vocab.txt").write_text("\n".join(words.split()) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config = BertConfig(vocab_size=len(words.split()), max_position_embeddings=40, **shape)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """A generated set (8 poses × 3) and a real one (12 pictures without pose group)."""
    from coco_sets import write_set

    root = tmp_path_factory.mktemp("sets")
    return [
        write_set(root / "a", n_poses=8),
        write_set(root / "b", n_poses=12, per_pose=1, pose_ids=False, seed=1),
    ]


@pytest.fixture(scope="session")
def dots(tmp_path_factory):
    """Two sets of people who are dots: 12 to train on, 7 to validate on."""
    from pose_runs import people_file

    folder = tmp_path_factory.mktemp("dots")
    return people_file(folder, 12, 0, "train.json"), people_file(folder, 7, 1, "val.json")


@pytest.fixture
def small_pose(monkeypatch):
    """size=tiny is smaller still, in one thread."""
    import pose_runs

    import model

    monkeypatch.setitem(model.SIZES, "tiny", pose_runs.SMALL)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """People in Market's layout."""
    from reid_runs import market

    return market(tmp_path_factory.mktemp("market"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Poses, captions and the models of generate.py, all tiny."""
    from generate_runs import write_models, write_poses

    root = tmp_path_factory.mktemp("tiny")
    write_poses(root)
    write_models(root)
    return root
