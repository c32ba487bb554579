"""freeze=true in every fine-tuning stage: the encoder stays bit for bit, the head learns, and no
graph of the encoder is kept; under several ranks too.
"""

import importlib
import sys

import pytest
import torch
from conftest import ROOT, run_script

import common
import generate
from common import load_checkpoint, save_weights
from formats.weights import build_encoder, meta_of
from model import SIZES, ViT
from plumbing import process
from plumbing.config import read_config

MACHINE = "device=cpu precision=fp32 workers=0 freeze=true epochs=2".split()
STAGES = {
    "finetune_pose": "train_annotations={data}/poses/annotations.json batch=4 warmup_steps=1 "
    "val_annotations={data}/poses/annotations.json drop_path=0.5 flip_test=false tokens=add",
    "finetune_reid": "data={data}/people people=2 pictures_per_person=2 drop_path=0.5 bnneck=true "
    "warmup_epochs=0",
    "finetune_par": "train={data}/people/attributes_train.csv batch=6 pad=2 lr=1e-3 "
    "test={data}/people/attributes_test.csv",
    "finetune_t2i": "captions={data}/people/data_captions.json images={data}/people batch=8 pad=2 "
    "project=16 drop_path=0.5 min_count=1",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A puppet's poses and people, and an encoder with random weights and every token."""
    folder = tmp_path_factory.mktemp("data")
    size = "height=64 width=32 workers=0".split()
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, words in (
            ("poses", "poses=4 pictures_per_pose=2"),
            ("people", "task=people persons_train=4 persons_val=2 persons_test=3 cameras=2"),
        ):
            words = ["generate.py", *words.split(), *size, f"out={folder / name}"]
            monkeypatch.setattr(sys, "argv", words)
            generate.main()
    s = SIZES["tiny"]
    torch.manual_seed(0)
    vit = ViT(s["width"], s["depth"], s["heads"], (64, 32), 16)
    save_weights(folder / "encoder.safetensors", vit, **meta_of(vit))
    return folder


def words_of(stage, data, out, *more):
    words = STAGES[stage].format(data=data).split()
    own = [f"encoder={data}/encoder.safetensors", "height=64", "width=32", f"out={out}"]
    return [f"{stage}.py", *words, *own, *MACHINE, *more]


def run(monkeypatch, words):
    """The stage in this process. → (its model, the weights it started with)"""
    started, resume = [], common.resume

    def look(path, model, *more):
        started.extend([model, {k: v.clone() for k, v in model.state_dict().items()}])
        return resume(path, model, *more)

    with monkeypatch.context() as patch:
        patch.setattr(common, "resume", look)
        patch.setattr(sys, "argv", words)
        importlib.import_module(words[0].removesuffix(".py")).main()
    return started


@pytest.mark.parametrize("stage", STAGES)
def test_the_encoder_stays_and_the_head_learns(data, tmp_path, monkeypatch, capfd, stage):
    out = tmp_path / "run"
    model, before = run(monkeypatch, words_of(stage, data, out))
    given = load_checkpoint(data / "encoder.safetensors")
    for file, prefix in (("encoder.safetensors", ""), ("model.safetensors", "encoder.")):
        left = load_checkpoint(out / file)
        for name, weight in given.items():
            assert torch.equal(left[prefix + name], weight), (file, name)
    after = model.state_dict()
    heads = [name for name in after if not name.startswith("encoder.")]
    moved = {name: (after[name] - before[name]).abs().max().item() for name in heads}
    assert max(moved.values()) > 1e-4, moved
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    # Adam holds moments of the head alone.
    state = load_checkpoint(out / "last.pt")["optimizer"]["state"]
    learned = sum(parameter.requires_grad for parameter in model.parameters())
    assert len(state) == learned and 0 < learned <= len(heads)
    assert "[CLS] and [POSE], frozen)" in capfd.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_the_frozen_encoder_computes_in_training_what_it_does_in_evaluation(data, stage):
    """Drop path's noise drops nothing, and no graph is kept. Without freeze both are otherwise."""
    keys = importlib.import_module(stage).KEYS
    images, seen = torch.randn(3, 3, 64, 32), {}
    noise = torch.zeros(2 * SIZES["tiny"]["depth"], 3)  # drops every branch that may be dropped
    for freeze in ("true", "false"):
        cfg = read_config(keys, "", [*words_of(stage, data, "x")[1:], f"freeze={freeze}"])
        drop_path = 0.5
        vit, _ = build_encoder(cfg, True, drop_path)
        vit.train()
        tokens = vit(images, drop_noise=noise)
        same = torch.equal(tokens, vit.eval()(images))
        seen[freeze] = (same, tokens.requires_grad, len(common.parameter_groups(vit, 0.1, 0.5, 6)))
    assert seen["true"] == (True, False, 0)
    assert seen["false"][:2] == (False, True) and seen["false"][2] > 6


def test_less_memory_is_asked_for(monkeypatch):
    """Weights alone of the encoder; of the head also gradients and two moments."""
    encoder = torch.nn.Linear(1000, 1000, bias=False)
    encoder.image_size = (64, 32)
    pictures = 2 * 3 * 64 * 32 * 5
    for frozen, need in ((False, 4 * 4e6 + pictures), (True, 4e6 + pictures)):
        encoder.requires_grad_(not frozen)
        monkeypatch.setattr(process, "memory_of", lambda device, n=need: n)
        process.check_memory(encoder, 2, torch.device("cpu"))
        monkeypatch.setattr(process, "memory_of", lambda device, n=need: n - 1)
        with pytest.raises(process.UserError, match="needs more than"):
            process.check_memory(encoder, 2, torch.device("cpu"))


def test_two_ranks_have_no_idle_weights(data, tmp_path):
    """All four stages, one after the other, in one pair of processes: DistributedDataParallel ends
    with an error at the second step where a weight takes no part.
    """
    lists = [words_of(stage, data, tmp_path / stage) for stage in STAGES]
    script = tmp_path / "ranks.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import common, finetune_pose, finetune_reid, finetune_par, finetune_t2i\n"
        "def main():\n"
        f"    for words in {lists!r}:\n"
        "        sys.argv = words\n"
        "        getattr(sys.modules[words[0][:-3]], 'main')()\n"
        "common.run_stage(main)\n"
    )
    done = run_script(script, ranks=2)
    assert done.returncode == 0, done.stderr
    given = load_checkpoint(data / "encoder.safetensors")
    for words in lists:
        stage = words[0].removesuffix(".py")
        left = load_checkpoint(tmp_path / stage / "encoder.safetensors")
        assert all(torch.equal(left[name], weight) for name, weight in given.items()), stage
        log = (tmp_path / stage / "log.jsonl").read_text().splitlines()
        assert sum('"loss"' in line for line in log) >= 4, stage
