"""Text to image: both branches against HAP's, text without and with BERT (a tiny random one),
training that learns, ranks, resume after a kill, search, and errors in one line."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, kill_after, run_script
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.utils import _to_kwargs  # how DistributedDataParallel moves its arguments
from torch.nn.utils import rnn

import finetune_t2i
from common import Ranks, load_checkpoint
from formats.captions import read_captions
from plumbing.errors import UserError
from tasks.text import pad_tokens, picture_of, ranking_loss, retrieval_metrics

TINY = ["size=tiny", "patch=8", "height=32", "width=16", "pad=1", "project=16"]
MACHINE = ["precision=fp32", "workers=0", "device=cpu"]
ALONE = Ranks(0, 1, torch.device("cpu"))
COLOURS = {
    "red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (235, 235, 235),
}  # fmt: skip
SENTENCES = (
    "A person in a {0} shirt and {1} trousers.",
    "Trousers that are {1}, and above them a {0} top!",
)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """RSTPReid layout: 8 people of two colours each in train, 5 new ones of the same colours in
    test (9 pictures).
    """
    folder, rng = tmp_path_factory.mktemp("t2i"), np.random.default_rng(0)
    (folder / "imgs").mkdir()
    looks = [(a, b) for a in COLOURS for b in COLOURS][1:14]
    entries = []
    for person, (top, down) in enumerate(looks):
        split, n = ("train", 3) if person % 3 else ("test", 2)
        for k in range(1 if person == 12 else n):
            pixels = np.concatenate([np.tile(COLOURS[c], (16, 16, 1)) for c in (top, down)])
            pixels = pixels + rng.normal(0, 9, (32, 16, 3))
            name = f"{person:04d}_{k}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "imgs" / name)
            texts = [s.format(top, down) for s in SENTENCES]
            entries.append({"id": person, "img_path": name, "captions": texts, "split": split})
    (folder / "data_captions.json").write_text(json.dumps(entries))
    return folder


def args(people, out, *more):
    return [f"captions={people / 'data_captions.json'}", f"out={out}", *TINY, *MACHINE, *more]


def run(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["finetune_t2i.py", *map(str, arguments)])
    finetune_t2i.main()


def config(**more):
    defaults = {name: key.default for name, key in finetune_t2i.KEYS.items()}
    small = dict(size="tiny", patch=8, height=32, width=16, pad=1, project=16)
    return type("Config", (), defaults | small | more)()


# --------------------------------------------------------------------------------------------- text


def test_readers_of_the_three_files(tmp_path, people):
    splits = read_captions(people / "data_captions.json")
    assert (
        len(splits["train"].files) == 24
        and len(splits["test"].files) == 9
        and splits["val"] is None
    )
    assert splits["train"].ids.tolist()[:6] == [0, 0, 0, 1, 1, 1] and splits["train"].persons == 8
    assert (
        splits["train"].picture.tolist()[:4] == [0, 0, 1, 1]
        and "red shirt" in splits["train"].texts[0]
    )
    # CUHK-PEDES and ICFG-PEDES: another picture key, pictures in folders, other fields beside
    (tmp_path / "imgs" / "cam_a").mkdir(parents=True)
    Image.new("RGB", (4, 8)).save(tmp_path / "imgs" / "cam_a" / "x.png")
    entry = {"split": "val", "captions": ["one", "two"], "file_path": "cam_a/x.png", "id": 12003}
    (tmp_path / "reid_raw.json").write_text(json.dumps([entry | {"processed_tokens": [["one"]]}]))
    val = read_captions(tmp_path / "reid_raw.json")["val"]
    assert (
        val.texts == ["one", "two"]
        and val.ids.tolist() == [0]
        and val.files[0].endswith("imgs/cam_a/x.png")
    )


def test_a_sentence_does_not_depend_on_its_batch(people, tiny_bert):
    """Padding changes nothing, neither in the LSTM, nor in the maximum, nor in BERT."""
    split = read_captions(people / "data_captions.json")["train"]
    for more in ({"text": "words"}, {"text": "bert", "bert": str(tiny_bert)}):
        torch.manual_seed(0)
        cfg = config(**more)
        model, text, _, _ = finetune_t2i.build_model(cfg, split, "cpu")
        sentences = [
            "red",
            "a person in a blue shirt and white trousers above them",
            "green top",
            "zebra",
        ]
        together = finetune_t2i.embed_texts(cfg, model, text, sentences, ALONE)
        alone = [finetune_t2i.embed_texts(cfg, model, text, [s], ALONE)[0] for s in sentences]
        np.testing.assert_allclose(together, alone, atol=1e-5)
        assert np.abs(together[0] - together[2]).max() > 1e-3
        # The backward half starts at the last word: with another one the first word changes too.
        longer = finetune_t2i.embed_texts(cfg, model, text, ["red top"], ALONE)[0]
        assert np.abs(longer - together[0]).max() > 1e-3
    assert sum(p.requires_grad for p in text.model.parameters()) == 0 and not text.model.training


def test_text_branch_is_the_packed_bidirectional_lstm_of_hap(people):
    """torch's own packed LSTM, without bias, its directions averaged; ours needs no packing."""
    split = read_captions(people / "data_captions.json")["train"]
    torch.manual_seed(0)
    model, text, _, _ = finetune_t2i.build_model(config(min_count=1), split, "cpu")
    sentences = ["red", "a person in a blue shirt and white trousers above them", "zebra trousers"]
    tokens, lengths = pad_tokens([text.tokens(s, 100) for s in sentences])
    D = model.encoder.width
    lstm = torch.nn.LSTM(300, D, batch_first=True, bidirectional=True, bias=False)
    for suffix, ours in (("", model.lstm_ahead), ("_reverse", model.lstm_back)):
        for name in ("weight_ih_l0", "weight_hh_l0"):
            getattr(lstm, name + suffix).data.copy_(getattr(ours, name))
    x = model.embedding(tokens)
    packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    states, _ = rnn.pad_packed_sequence(lstm(packed)[0], batch_first=True)
    best = torch.stack([((s[:n, :D] + s[:n, D:]) / 2).amax(0) for s, n in zip(states, lengths)])
    expected = best @ model.projection.weight.T
    torch.testing.assert_close(model.text_features(tokens, lengths), expected)


def test_the_pictures_branch_and_its_start_are_haps(people):
    split = read_captions(people / "data_captions.json")["train"]
    torch.manual_seed(0)
    model, _, _, _ = finetune_t2i.build_model(config(project=384), split, "cpu")
    images = torch.randn(2, 3, 32, 16)
    # max over the last block's tokens, before the final norm
    tokens = model.encoder.embed(images)
    for block in model.encoder.blocks:
        tokens = block(tokens)
    expected = tokens[:, model.encoder.n_special :].amax(1) @ model.projection.weight.T
    torch.testing.assert_close(model.image_features(images), expected)
    assert model.projection.bias is None and model.encoder.drop_rates.max() == pytest.approx(0.1)
    kaiming = (2 / 384) ** 0.5  # fan out
    assert model.projection.weight.std().item() == pytest.approx(kaiming, rel=0.02)
    assert model.classifier.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert not model.classifier.bias.any()
    # drop path acts on the picture: noise of 0 drops all branches but the first block's
    dropped = model.image_features(images, torch.zeros(2 * model.encoder.depth, 2))
    assert (dropped - model.image_features(images)).abs().max() > 0.1


def test_arguments_may_be_moved_as_ddp_moves_them(people):
    """DistributedDataParallel moves every tensor of the arguments to the GPU, the lengths too.

    Fake tensors know their shape and device but hold no numbers, so no GPU is needed.
    """
    split = read_captions(people / "data_captions.json")["train"]
    with FakeTensorMode(), torch.backends.cudnn.flags(enabled=False):
        with torch.device("cuda"):
            model, _, _, _ = finetune_t2i.build_model(config(), split, "cuda")
        tokens, lengths = torch.ones(4, 9, dtype=torch.long), torch.ones(4, dtype=torch.long)
        arguments = torch.rand(4, 3, 32, 16), tokens, lengths
        moved, _ = _to_kwargs(arguments, {}, torch.device("cuda", 0), False)
        outputs = model(*moved[0])
    assert {x.device.type for x in outputs} == {"cuda"}
    assert [tuple(x.shape) for x in outputs] == [(4, 16)] * 2 + [(4, 8)] * 2


# ----------------------------------------------------------------------------------------- training

FAST = ("batch=8", "lr=2.0e-3", "lr_encoder=5.0e-4", "milestones=20", "flip=0", "min_count=1")


def test_one_batch_is_overfitted(people):
    split = read_captions(people / "data_captions.json")["train"]
    torch.manual_seed(0)
    cfg = config()
    model, text, _, _ = finetune_t2i.build_model(cfg, split, "cpu")
    rows = [split.ids.tolist().index(i) for i in range(8)]
    images = torch.stack([picture_of(split.files[r], (32, 16)) for r in rows]).float() / 128 - 1
    tokens, lengths = pad_tokens([text.tokens(split.texts[2 * r], 100) for r in rows])
    person, optimizer = torch.arange(8), torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(200):  # the classifier starts near 0
        v, t, a, b = model(images, tokens, lengths)
        noise = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(step))
        rank_loss, _ = ranking_loss(v, t, person, noise)
        loss = F.cross_entropy(a, person) + F.cross_entropy(b, person) + rank_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
    v, t = (F.normalize(x, dim=1).detach().numpy() for x in (v, t))
    assert retrieval_metrics(v, t, person.numpy(), person.numpy())["t2i_R1"] == 1.0


def test_training_finds_new_people_by_sentence(people, tmp_path, monkeypatch, capfd):
    run(monkeypatch, args(people, tmp_path / "a", *FAST, "epochs=12"))
    got = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert (got["pictures"], got["captions"], got["persons"]) == (9, 18, 5)
    assert got["t2i_mAP"] > 0.7 and got["i2t_mAP"] > 0.7  # by chance about 0.35
    for name in ("ranking.png", "curves.png", "encoder.safetensors", "done"):
        assert (tmp_path / "a" / name).exists(), name
    weights = f"weights={tmp_path / 'a' / 'model.safetensors'}"
    captions = f"captions={people / 'data_captions.json'}"
    run(monkeypatch, [captions, f"out={tmp_path / 'b'}", weights, "eval_only=true", *MACHINE])
    again = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert again == got
    assert "model.safetensors, which sets size=tiny (not base), patch=" in capfd.readouterr().err
    # killed between its last line and its mark: the evaluation is repeated, its line is not
    (tmp_path / "a" / "done").unlink()
    run(monkeypatch, args(people, tmp_path / "a", *FAST, "epochs=12"))
    log = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    figures = [row for row in log if "t2i_mAP" in row]
    assert [row["step"] for row in figures] == [72] and (tmp_path / "a" / "done").exists()
    assert json.loads((tmp_path / "a" / "metrics.json").read_text()) == got

    search = ["sentence=a person with green trousers and a red top", f"predict={people / 'imgs'}"]
    run(monkeypatch, [weights, *search, f"out={tmp_path / 'c'}", *MACHINE])
    found = json.loads((tmp_path / "c" / "ranking.json").read_text())["ranking"]
    assert len(found) == 33 and found[0]["cosine"] >= found[1]["cosine"] >= found[-1]["cosine"]
    assert {row["image"][:4] for row in found[:2]} == {"0000"}  # red over green
    assert (tmp_path / "c" / "ranking.png").exists()
    one = f"predict={people / 'imgs' / found[3]['image']}"
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, [weights, search[0], one, *MACHINE])  # without out=
    alone = json.loads(Path("runs/t2i_predict/ranking.json").read_text())["ranking"]
    assert [row["image"] for row in alone] == [Path(found[3]["image"]).name]
    assert alone[0]["cosine"] == pytest.approx(found[3]["cosine"], abs=1e-4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "cut.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="cut.png is damaged or truncated .*mend or remove it"):
        run(
            monkeypatch,
            [weights, search[0], f"predict={tmp_path / 'mine'}", f"out={tmp_path / 'x'}", *MACHINE],
        )
    assert not (tmp_path / "x").exists()


def test_bert_through_the_whole_stage(people, tiny_bert, tmp_path, monkeypatch):
    more = ("text=bert", f"bert={tiny_bert}", "epochs=1", "token=both")
    run(monkeypatch, args(people, tmp_path / "a", *FAST, *more))
    state = load_checkpoint(tmp_path / "a" / "model.safetensors")
    assert not any("bert" in name for name in state) and "embedding.weight" not in state
    weights = f"weights={tmp_path / 'a' / 'model.safetensors'}"
    run(monkeypatch, args(people, tmp_path / "b", weights, "eval_only=true", f"bert={tiny_bert}"))
    run(monkeypatch, args(people, tmp_path / "c", weights, "eval_only=true"))  # as the file says
    one, *more = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in "abc")
    assert more == [one, one]
    with pytest.raises(UserError, match="cannot read .*none as BERT .*text=words"):
        run(
            monkeypatch,
            args(people, tmp_path / "x", *FAST, "text=bert", f"bert={tmp_path / 'none'}"),
        )
    assert not (tmp_path / "x").exists()


def rewritten(people, folder, change):
    """The captions with change(entry) → entry or None, and the same pictures."""
    entries = json.loads((people / "data_captions.json").read_text())
    entries = [changed for entry in entries if (changed := change(entry))]
    (folder / "c.json").write_text(json.dumps(entries))
    return f"captions={folder / 'c.json'}", f"images={people / 'imgs'}"


@pytest.mark.parametrize("sentences", [["somebody"], ["somebody", "a red top"]])
def test_a_split_of_few_distinct_captions_is_evaluated(people, tmp_path, monkeypatch, sentences):
    def few(entry):
        return entry | {"captions": sentences} if entry["split"] == "test" else entry

    data = rewritten(people, tmp_path, few)
    run(monkeypatch, args(people, tmp_path / "x", *FAST, "epochs=1", *data))
    got = json.loads((tmp_path / "x" / "metrics.json").read_text())
    assert got["captions"] == 9 * len(sentences) and 0 < got["t2i_mAP"] < 1
    # pictures of the same features would be equal answers to one sentence: 2 of 9 are of a person
    assert (tmp_path / "x" / "ranking.png").exists() and (tmp_path / "x" / "done").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_of_one_person_is_refused_before_training(people, tmp_path, monkeypatch, split):
    """No sentence could find another person: every figure would be 1, every loss 0."""
    first = {"train": 1, "test": 0}[split]

    def one(entry):
        return None if entry["split"] == split and entry["id"] != first else entry

    data = rewritten(people, tmp_path, one)
    with pytest.raises(UserError, match=f"the {split} split of .*c.json shows one person"):
        run(monkeypatch, args(people, tmp_path / "x", "batch=2", "min_count=1", *data))
    assert not (tmp_path / "x").exists()


def test_settings_that_do_not_fit_are_refused(people, tmp_path, monkeypatch):
    for more, message in (
        (["batch=99"], "larger than the 48 training samples"),
        (["evaluate_on=val"], "has no val split"),
        (["evaluate_on=val", "trainval=true"], "not trained on"),
        (["leave_out=1,999"], "leave_out=999"),
        (["eval_only=true"], "need each other"),
        (["weights=x"], "need each other"),
        (["text=bert", "max_tokens=2"], "max_tokens= must be 3 or more"),
        ([f"predict={people}", "weights=x"], "sentence="),
        (["eval_only=true", f"weights={people / 'data_captions.json'}"], "no model.safetensors"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, args(people, tmp_path / "x", *more))
    assert not (tmp_path / "x").exists()


def test_resume_after_a_kill_is_bitwise(people, tmp_path, monkeypatch):
    more = (*FAST, "epochs=4", "save_every=1")
    run(monkeypatch, args(people, tmp_path / "whole", *more))
    command = args(people, tmp_path / "cut", *more)
    assert kill_after("finetune_t2i.py", *command, lines=4, log=tmp_path / "cut" / "log.jsonl")
    assert load_checkpoint(tmp_path / "cut" / "last.pt")["step"] < 24
    run(monkeypatch, command)
    whole, cut = (
        load_checkpoint(tmp_path / name / "model.safetensors") for name in ("whole", "cut")
    )
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert (tmp_path / "whole" / "metrics.json").read_bytes() == (
        tmp_path / "cut" / "metrics.json"
    ).read_bytes()


RANKS = """
import sys, torch
import torch.nn.functional as F
sys.path.insert(0, {root!r})
import finetune_t2i
from common import start_ranks
from plumbing.seeds import rank_rows
from torch.nn.parallel import DistributedDataParallel

ranks = start_ranks("cpu")
model, images, tokens, lengths, person, noise = torch.load({start!r}, weights_only=False)
own = [rank_rows(x, ranks) for x in (images, tokens, lengths, person, noise.transpose(0, 1))]
runner = DistributedDataParallel(model)  # kept alive: it goes, and its hooks go with it
v, t, a, b = runner(*own[:3])
loss = F.cross_entropy(a, own[3]) + F.cross_entropy(b, own[3])
(loss + finetune_t2i.ranking_loss(v, t, own[3], own[4].transpose(0, 1), 0.5)[0]).backward()
torch.optim.SGD(model.parameters(), 0.1).step()
if ranks.rank == 0:
    torch.save(model.state_dict(), {end!r})
finetune_t2i.main()
"""


def test_two_ranks_equal_one_process_and_count_each_picture_once(people, tmp_path, monkeypatch):
    split = read_captions(people / "data_captions.json")["train"]
    torch.manual_seed(1)
    model, text, _, _ = finetune_t2i.build_model(config(), split, "cpu")
    images, person = torch.randn(6, 3, 32, 16), torch.tensor([0, 1, 2, 1, 3, 0])
    tokens, lengths = pad_tokens([text.tokens(s, 100) for s in split.texts[::6][:6]])
    noise = torch.rand(2, 6, 6)
    torch.save((model, images, tokens, lengths, person, noise), tmp_path / "start.pt")
    script = tmp_path / "ranks.py"
    script.write_text(
        RANKS.format(root=str(ROOT), start=str(tmp_path / "start.pt"), end=str(tmp_path / "end.pt"))
    )
    more = (*FAST, "epochs=1", "lr=1.0e-4", "lr_encoder=1.0e-5")
    done = run_script(script, *args(people, tmp_path / "two", *more), ranks=2)
    assert done.returncode == 0, done.stderr

    v, t, a, b = model(images, tokens, lengths)
    rank_loss, found = ranking_loss(v, t, person, noise, 0.5)
    assert found > 0.2
    (F.cross_entropy(a, person) + F.cross_entropy(b, person) + rank_loss).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    moved = torch.load(tmp_path / "end.pt")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(moved[name], value, rtol=1e-4, atol=2e-6, msg=name)

    run(monkeypatch, args(people, tmp_path / "one", *more))
    one, two = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")
    )
    assert (two["pictures"], two["captions"]) == (9, 18) and one["t2i_mAP"] == pytest.approx(
        two["t2i_mAP"], abs=1e-3
    )
    a, b = (load_checkpoint(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all((a[name] - b[name]).abs().max() < 2e-4 for name in a)
