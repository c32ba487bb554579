"""A folder of BERT: read as transformers reads a whole one, refused where it is not whole."""

import json
import os
import shutil

import pytest
import torch
from conftest import run_script
from PIL import Image
from safetensors.torch import save_file

from formats.captions import read_bert
from plumbing.errors import UserError
from plumbing.files import load_checkpoint


def bert_with(tiny_bert, folder, change=None, weights="model.safetensors"):
    """A copy of the folder with weights of change(state); None: without any file of weights."""
    shutil.copytree(tiny_bert, folder)
    state = load_checkpoint(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if change and weights.endswith(".bin"):
        torch.save(change(state), folder / weights)
    elif change:
        save_file(change(state), folder / weights)
    return folder


QUERY = "encoder.layer.1.attention.self.query.weight"
WITHOUT_ONE = dict(change=lambda state: {n: x for n, x in state.items() if n != QUERY})
COMPLEX = dict(change=lambda state: state | {QUERY: state[QUERY].to(torch.complex64)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "holds no weights, neither model.safetensors nor pytorch_model.bin"),
        (WITHOUT_ONE, f"weight {QUERY} is missing"),
        (COMPLEX, f"{QUERY} holds values that are not finite real numbers"),
    ],
)
def test_a_bert_that_is_not_whole_ends_in_one_line(tiny_bert, tmp_path, change, message):
    folder = bert_with(tiny_bert, tmp_path / "bert", **change)
    Image.new("RGB", (16, 32)).save(tmp_path / "x.png")
    entries = [
        {"split": split, "img_path": "x.png", "captions": ["a person"] * 2, "id": person}
        for split in ("train", "test")
        for person in (1, 2)
    ]
    (tmp_path / "c.json").write_text(json.dumps(entries))
    arguments = f"captions={tmp_path}/c.json images={tmp_path} out={tmp_path}/x bert={folder}"
    shape = "text=bert size=tiny patch=8 height=32 width=16 batch=4 epochs=1 device=cpu"
    done = run_script("finetune_t2i.py", *arguments.split(), *shape.split())
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and str(folder) in line and message in line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {}, "embeddings.LayerNorm.bias is missing"),
        (lambda state: state | {QUERY: state[QUERY] * torch.nan}, "not finite real numbers"),
        (lambda state: state | {QUERY: state[QUERY].to(torch.int8)}, "not finite real numbers"),
        (lambda state: state | {QUERY: state[QUERY][:5].contiguous()}, "this model needs"),
        (
            lambda state: state | {QUERY.replace("1", "2"): state[QUERY].clone()},
            "not of this model",
        ),
    ],
)
def test_weights_of_another_bert_are_refused(tiny_bert, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        read_bert(bert_with(tiny_bert, tmp_path / "bert", change))


def test_a_bert_without_its_words_or_with_another_ones_is_refused(tiny_bert, tmp_path):
    """transformers makes a tokenizer of nothing, for which every word is unknown."""
    folder = bert_with(tiny_bert, tmp_path / "bert", dict)
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / file).unlink(missing_ok=True)
    with pytest.raises(UserError, match="tokenizer has 0 words for a BERT of 22"):
        read_bert(folder)
    words = (tiny_bert / "vocab.txt").read_text() + "more\nwords\n"
    (folder / "vocab.txt").write_text(words)
    with pytest.raises(UserError, match="tokenizer has 19 words for a BERT of 22"):
        read_bert(folder)
    (folder / "vocab.txt").unlink()
    os.mkfifo(folder / "vocab.txt")
    with pytest.raises(UserError, match="vocab.txt: it is not a regular file"):
        read_bert(folder)


def test_bert_is_that_of_transformers_under_all_its_names(tiny_bert, tmp_path):
    """Google's files have other names for LayerNorm, a prefix, and heads beside the encoder."""
    from transformers import AutoModel, AutoTokenizer

    def as_google(state):
        state = {n: x for n, x in state.items() if "pooler" not in n}
        for ours, theirs in (("weight", "gamma"), ("bias", "beta")):
            state = {
                n.replace(f"LayerNorm.{ours}", f"LayerNorm.{theirs}"): x for n, x in state.items()
            }
        state = {f"bert.{name}": value for name, value in state.items()}
        return state | {"cls.predictions.bias": torch.zeros(22)}

    ids = torch.tensor([AutoTokenizer.from_pretrained(tiny_bert)("a red top, zebra")["input_ids"]])
    expected = AutoModel.from_pretrained(tiny_bert).eval()(ids).last_hidden_state
    bert_with(tiny_bert, tmp_path / "google", as_google)
    bert_with(tiny_bert, tmp_path / "old", dict, "pytorch_model.bin")
    for folder in (tiny_bert, tmp_path / "google", tmp_path / "old"):
        torch.manual_seed(3)
        tokenizer, model = read_bert(folder)
        drawn = torch.rand(4)
        assert tokenizer("a red top, zebra")["input_ids"] == ids[0].tolist()
        assert not model.training and torch.equal(model(ids).last_hidden_state, expected)
        torch.manual_seed(3)
        assert torch.equal(drawn, torch.rand(4))  # the run's own start does not depend on BERT's
