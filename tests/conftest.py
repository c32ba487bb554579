"""Shared by all tests: the repository on the path, one thread, small pictures of people made on the
spot.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

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
    process = run_script(script, *arguments, start_only=True)
    end = time.time() + timeout
    while process.poll() is None and time.time() < end:
        if Path(log).exists() and len(Path(log).read_text().splitlines()) >= lines:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    process.wait()
    process.stderr.close()
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
