"""Text to image: the ranking loss against loops, retrieval figures against a plain ranking, readers, text without and
with BERT (a tiny random one), training that learns, ranks, resume after a kill, search, and errors in one line."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, kill_after, run_script
from PIL import Image
from sklearn.metrics import average_precision_score
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.utils import _to_kwargs  # how DistributedDataParallel moves its arguments
from torch.nn.utils import rnn

import finetune_t2i
from common import load_checkpoint
from finetune_t2i import ranking_loss, retrieval_metrics
from plumbing.config import UserError
from tasks import captions
from tasks.captions import Words, pad_tokens, read_captions

TINY = ["size=tiny", "patch=8", "height=32", "width=16", "pad=1", "project=16", "log_every=1"]
MACHINE = ["precision=fp32", "workers=0", "device=cpu"]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (235, 235, 235)}
SENTENCES = ("A person in a {0} shirt and {1} trousers.", "Trousers that are {1}, and above them a {0} top!")


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """RSTPReid layout: 9 people of two colours each in train, 4 new ones of the same colours in test (7 pictures)."""
    folder, rng = tmp_path_factory.mktemp("t2i"), np.random.default_rng(0)
    (folder / "imgs").mkdir()
    looks = [(a, b) for a in COLOURS for b in COLOURS][1:14]
    entries = []
    for person, (top, down) in enumerate(looks):
        split, n = ("train", 3) if person % 3 else ("test", 2)
        for k in range(1 if person == 12 else n):
            pixels = np.concatenate([np.tile(COLOURS[c], (16, 16, 1)) for c in (top, down)]) + rng.normal(
                0, 9, (32, 16, 3)
            )
            name = f"{person:04d}_{k}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "imgs" / name)
            texts = [s.format(top, down) for s in SENTENCES]
            entries.append({"id": person, "img_path": name, "captions": texts, "split": split})
    (folder / "data_captions.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """A random BERT two layers deep, saved as a real one is."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] . , ! a person in shirt and trousers that are above them top red green blue"
    (folder / "vocab.txt").write_text("\n".join(words.split()) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertModel(BertConfig(vocab_size=len(words.split()), max_position_embeddings=40, **shape)).save_pretrained(folder)
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


# ---------------------------------------------------------------------------------------------------------- losses


def slow_ranking_loss(v, t, person, noise, margin):
    """HAP's loss/RankingLoss.py by its rule, one anchor at a time; noise stands for its choice.

    → value: summed over the anchors of both directions, and the share of anchors with a negative.
    """
    similarity = F.normalize(v, dim=1) @ F.normalize(t, dim=1).T
    total, found = 0.0, 0
    for k, s in enumerate((similarity, similarity.T)):
        for i in range(len(s)):
            negative = [j for j in range(len(s)) if person[j] != person[i]]
            semi_hard = [j for j in negative if 0 < s[i, j] - s[i, i] + margin < margin]
            if semi_hard:
                j = max(semi_hard, key=lambda j: noise[k, i, j])
                total = total + F.relu(margin - s[i, i] + s[i, j])
                found += 1
    return total, found / (2 * len(v))


@pytest.mark.parametrize("seed", range(3))
def test_ranking_loss_equals_a_loop_in_value_and_gradient(seed):
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(9, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    t = (v.detach() + torch.randn(9, 5, dtype=torch.float64, generator=generator)).requires_grad_()
    person, noise = torch.tensor([0, 0, 1, 2, 3, 3, 3, 4, 5]), torch.rand(2, 9, 9, generator=generator)
    slow, slow_found = slow_ranking_loss(v, t, person, noise, 0.4)
    expected = torch.autograd.grad(slow, (v, t))
    loss, found = ranking_loss(v, t, person, noise, 0.4)
    assert loss.item() == pytest.approx(slow.item(), abs=1e-12) and 0 < found.item() < 1
    assert found.item() == pytest.approx(slow_found)
    for got, want in zip(torch.autograd.grad(loss, (v, t)), expected):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_ranking_loss_without_any_negative_is_zero_and_finite():
    v = torch.randn(4, 3, requires_grad=True)
    loss, found = ranking_loss(v, v * 1.0, torch.zeros(4, dtype=torch.long), torch.rand(2, 4, 4))
    loss.backward()
    assert loss.item() == 0 == found.item() and v.grad.abs().max() == 0


def test_negatives_are_drawn_evenly():
    """Three equal semi-hard candidates: each is taken about a third of the time."""
    v = torch.eye(4)[:1].repeat(4, 1)
    t = torch.tensor([[1.0, 0, 0, 0]] + [[0.9, 0.3, 0, 0], [0.9, 0, 0.3, 0], [0.9, 0, 0, 0.3]])
    person, counts = torch.arange(4), torch.zeros(4)
    for seed in range(300):
        t_ = t.clone().requires_grad_()
        noise = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(seed))
        loss, _ = ranking_loss(v[:1], t_[:1], person[:1], noise[:, :1, :1], 0.2)
        loss, _ = ranking_loss(v, t_, person, noise, 0.2)
        (grad,) = torch.autograd.grad(loss, t_)
        sides = (grad[1:, 1:].abs() > 1e-8).diagonal()  # texts pulled by picture 0 move along their own axis
        counts[1:] += sides
    assert counts[0] == 0 and (counts[1:] > 60).all()


# --------------------------------------------------------------------------------------------------------- metrics


def test_retrieval_equals_scikit_learn_both_ways():
    rng = np.random.default_rng(3)
    v, t = (rng.normal(size=(n, 6)).astype(np.float32) for n in (20, 31))
    v, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (v, t))
    image_ids = np.concatenate([np.arange(-1, 6), rng.integers(-1, 6, 13)])  # ids 0 and −1 are people like others here
    text_ids = np.concatenate([np.arange(-1, 6), rng.integers(-1, 6, 24)])
    got = retrieval_metrics(v, t, image_ids, text_ids)
    for name, q, g, qi, gi in (("t2i", t, v, text_ids, image_ids), ("i2t", v, t, image_ids, text_ids)):
        score = q @ g.T
        ap = [average_precision_score(gi == i, s) for i, s in zip(qi, score)]
        assert got[f"{name}_mAP"] == pytest.approx(np.mean(ap), abs=1e-9)
        for k in (1, 5, 10):
            hit = [(gi[np.argsort(-s)[:k]] == i).any() for i, s in zip(qi, score)]
            assert got[f"{name}_R{k}"] == pytest.approx(np.mean(hit))
    np.testing.assert_allclose(
        got["ap"], [average_precision_score(image_ids == i, s) for i, s in zip(text_ids, t @ v.T)]
    )


def trapezoidal_ap(score, right):
    """HAP's and LGUR's calculate_ap: the area under the precision-recall curve by trapezia."""
    places = np.flatnonzero(right[np.argsort(score)[::-1]])
    before = [i / place if place else 1.0 for i, place in enumerate(places)]
    at = [(i + 1) / (place + 1) for i, place in enumerate(places)]
    return np.mean([before, at])


def test_ap_is_by_rank_and_not_below_the_trapezoidal_one():
    rng = np.random.default_rng(4)
    v, t = (rng.normal(size=(n, 6)).astype(np.float32) for n in (20, 31))
    v, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (v, t))
    image_ids, text_ids = np.arange(20) % 6, np.arange(31) % 6
    by_rank = retrieval_metrics(v, t, image_ids, text_ids)["ap"]
    trapezia = [trapezoidal_ap(v @ row, image_ids == i) for row, i in zip(t, text_ids)]
    assert (by_rank >= trapezia).all() and by_rank.mean() - np.mean(trapezia) > 0.02


def test_retrieval_by_hand():
    v = np.eye(3, dtype=np.float32)
    t = np.eye(3, dtype=np.float32)[[0, 2]]
    got = retrieval_metrics(v, t, np.array([7, 8, 8]), np.array([7, 8]))
    # caption of 8 finds picture 2 first; picture 1 stands third behind picture 0 (equal scores: earlier first)
    assert got["t2i_R1"] == 1.0 and got["t2i_mAP"] == pytest.approx((1 + (1 + 2 / 3) / 2) / 2)
    assert got["i2t_R1"] == pytest.approx(2 / 3)


# ------------------------------------------------------------------------------------------------------------ text


def test_readers_of_the_three_files(tmp_path, people):
    splits = read_captions(people / "data_captions.json")
    assert len(splits["train"].files) == 24 and len(splits["test"].files) == 9 and splits["val"] is None
    assert splits["train"].ids.tolist()[:6] == [0, 0, 0, 1, 1, 1] and splits["train"].persons == 8
    assert splits["train"].picture.tolist()[:4] == [0, 0, 1, 1] and "red shirt" in splits["train"].texts[0]
    # CUHK-PEDES and ICFG-PEDES: another picture key, pictures in folders, other fields beside
    (tmp_path / "imgs" / "cam_a").mkdir(parents=True)
    Image.new("RGB", (4, 8)).save(tmp_path / "imgs" / "cam_a" / "x.png")
    entry = {"split": "val", "captions": ["one", "two"], "file_path": "cam_a/x.png", "id": 12003}
    (tmp_path / "reid_raw.json").write_text(json.dumps([entry | {"processed_tokens": [["one"]]}]))
    val = read_captions(tmp_path / "reid_raw.json")["val"]
    assert val.texts == ["one", "two"] and val.ids.tolist() == [0] and val.files[0].endswith("imgs/cam_a/x.png")


def test_training_people_are_left_out_by_id_and_joined_by_those_of_val(tmp_path):
    Image.new("RGB", (4, 8)).save(tmp_path / "x.png")
    people = [(1369, "train"), (7, "train"), (1369, "test"), (8, "val"), (7, "train")]
    entry = {"img_path": "x.png"}
    entries = [entry | {"split": s, "captions": [f"person {i}"], "id": i} for i, s in people]
    (tmp_path / "c.json").write_text(json.dumps(entries))
    splits = read_captions(tmp_path / "c.json", tmp_path, leave_out=[1369], trainval=True)
    train, test = splits["train"], splits["test"]
    assert train.texts == ["person 7", "person 7", "person 8"] and train.ids.tolist() == [0, 0, 1]
    assert train.picture.tolist() == [0, 1, 2] and test.texts == ["person 1369"]
    with pytest.raises(UserError, match="leave_out=8: .*c.json has no such person to train on"):
        read_captions(tmp_path / "c.json", tmp_path, leave_out=[8])


def test_bad_captions_are_one_clear_line(tmp_path):
    good = {"split": "train", "captions": ["a man"], "img_path": "x.png", "id": 1}
    Image.new("RGB", (4, 8)).save(tmp_path / "x.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "x.png").read_bytes()[:40])
    path = tmp_path / "c.json"
    for change, message in (
        ({"split": "training"}, 'entry 1 .*unknown split "training"'),
        ({"captions": ["a man", " "]}, "entry 1 .*empty caption"),
        ({"captions": []}, "entry 1 .*empty caption"),
        ({"captions": "a man"}, "list of captions"),
        ({"id": "one"}, "whole-number id"),
        ({"img_path": None}, "needs a picture"),
        ({"img_path": "y.png"}, "y.png, which is missing; set images="),
        ({"img_path": "cut.png", "split": "test"}, "cut.png is damaged or truncated .*mend or remove it"),
    ):
        path.write_text(json.dumps([good, good | change]))
        with pytest.raises(UserError, match=message):
            read_captions(path, tmp_path)
    for text, message in (("[", "cannot read"), ("{}", "must hold a list"), ('[{"id": 1}]', "entry 0 lacks")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_captions(path, tmp_path)


def test_vocabulary_counts_words_and_knows_what_it_does_not_know():
    words = Words.of(["A man, a MAN's hat", "a hat"], 2)
    assert words.words == ["a", "hat"] and len(words) == 4
    assert words.tokens("The hat: a hat!", 100) == [1, 3, 2, 3] and words.tokens("...", 100) == [1]
    assert words.tokens("a a a", 2) == [2, 2]
    with pytest.raises(UserError, match="min_count"):
        Words.of(["one two"], 2)


def test_a_sentence_does_not_depend_on_its_batch(people, tiny_bert):
    """Padding changes nothing, neither in the LSTM, nor in the maximum, nor in BERT."""
    split = read_captions(people / "data_captions.json")["train"]
    for more in ({"text": "words"}, {"text": "bert", "bert": str(tiny_bert)}):
        torch.manual_seed(0)
        cfg = config(**more)
        model, text, _, _ = finetune_t2i.build_model(cfg, split, "cpu")
        sentences = ["red", "a person in a blue shirt and white trousers above them", "green top", "zebra"]
        together = finetune_t2i.embed_texts(cfg, model, text, sentences, 0, 1, "cpu")
        alone = [finetune_t2i.embed_texts(cfg, model, text, [s], 0, 1, "cpu")[0] for s in sentences]
        np.testing.assert_allclose(together, alone, atol=1e-5)
        assert np.abs(together[0] - together[2]).max() > 1e-3
        # the backward half starts at the last word: a longer sentence is another one from the first word on
        longer = finetune_t2i.embed_texts(cfg, model, text, ["red top"], 0, 1, "cpu")[0]
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


def test_training_pictures_are_shifted_by_the_border_and_mirrored(people):
    split = read_captions(people / "data_captions.json")["train"]
    plain = captions.picture_of(split.files[0], (32, 16))
    bordered = F.pad(plain, (2, 2, 2, 2))
    shifts = [bordered[:, y : y + 32, x : x + 16] for y in range(5) for x in range(5)]
    known = {x.numpy().tobytes(): n for n, x in enumerate(shifts + [x.flip(2) for x in shifts])}
    pairs = captions.Pairs(split, Words.of(split.texts, 1), config(pad=2, flip=0.5, seed=0))
    seen = {known[pairs[(epoch, 0)][0].numpy().tobytes()] for epoch in range(60)}
    assert len(seen) > 20 and min(seen) < 25 <= max(seen)
    assert torch.equal(pairs[(7, 0)][0], pairs[(7, 0)][0])


# -------------------------------------------------------------------------------------------------------- training

FAST = ("batch=8", "lr=2.0e-3", "lr_encoder=5.0e-4", "milestones=20", "flip=0", "min_count=1")


def test_one_batch_is_overfitted(people):
    split = read_captions(people / "data_captions.json")["train"]
    torch.manual_seed(0)
    cfg = config()
    model, text, _, _ = finetune_t2i.build_model(cfg, split, "cpu")
    rows = [split.ids.tolist().index(i) for i in range(8)]
    images = torch.stack([captions.picture_of(split.files[r], (32, 16)) for r in rows]).float() / 128 - 1
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
    for name in ("ranking.png", "encoder.safetensors", "done"):
        assert (tmp_path / "a" / name).exists(), name
    weights = f"weights={tmp_path / 'a' / 'model.safetensors'}"
    run(monkeypatch, [f"captions={people / 'data_captions.json'}", f"out={tmp_path / 'b'}", weights, "eval_only=true",
                      *MACHINE])  # fmt: skip
    again = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert again == got
    assert "model.safetensors, which sets size=tiny (not base), patch=" in capfd.readouterr().err

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
        run(monkeypatch, [weights, search[0], f"predict={tmp_path / 'mine'}", f"out={tmp_path / 'x'}", *MACHINE])
    assert not (tmp_path / "x").exists()


def test_bert_through_the_whole_stage(people, tiny_bert, tmp_path, monkeypatch):
    more = ("text=bert", f"bert={tiny_bert}", "epochs=1", "token=both")
    run(monkeypatch, args(people, tmp_path / "a", *FAST, *more))
    state = load_checkpoint(tmp_path / "a" / "model.safetensors")
    assert not any("bert" in name for name in state) and "embedding.weight" not in state
    weights = f"weights={tmp_path / 'a' / 'model.safetensors'}"
    run(monkeypatch, args(people, tmp_path / "b", weights, "eval_only=true", f"bert={tiny_bert}"))
    one, two = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in "ab")
    assert one == two
    with pytest.raises(UserError, match="cannot load bert=.*text=words"):
        run(monkeypatch, args(people, tmp_path / "x", *FAST, "text=bert", f"bert={tmp_path / 'none'}"))
    assert not (tmp_path / "x").exists()


def test_settings_that_do_not_fit_are_refused(people, tmp_path, monkeypatch):
    for more, message in (
        (["batch=99"], "larger than the 48 training samples"),
        (["evaluate_on=val"], "has no val split"),
        (["evaluate_on=val", "trainval=true"], "not trained on"),
        (["leave_out=1,999"], "leave_out=999"),
        (["eval_only=true"], "need each other"),
        (["weights=x"], "need each other"),
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
    whole, cut = (load_checkpoint(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert (tmp_path / "whole" / "metrics.json").read_bytes() == (tmp_path / "cut" / "metrics.json").read_bytes()


RANKS = """
import sys, torch
import torch.nn.functional as F
sys.path.insert(0, {root!r})
import finetune_t2i
from common import start_ranks, rank_rows
from torch.nn.parallel import DistributedDataParallel

rank, world, device = start_ranks("cpu")
model, images, tokens, lengths, person, noise = torch.load({start!r}, weights_only=False)
own = [rank_rows(x, rank, world) for x in (images, tokens, lengths, person, noise.transpose(0, 1))]
runner = DistributedDataParallel(model)  # kept alive: it goes, and its hooks go with it
v, t, a, b = runner(*own[:3])
loss = F.cross_entropy(a, own[3]) + F.cross_entropy(b, own[3])
(loss + finetune_t2i.ranking_loss(v, t, own[3], own[4].transpose(0, 1), 0.5)[0]).backward()
torch.optim.SGD(model.parameters(), 0.1).step()
if rank == 0:
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
    script.write_text(RANKS.format(root=str(ROOT), start=str(tmp_path / "start.pt"), end=str(tmp_path / "end.pt")))
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
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert (two["pictures"], two["captions"]) == (9, 18) and one["t2i_mAP"] == pytest.approx(two["t2i_mAP"], abs=1e-3)
    a, b = (load_checkpoint(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all((a[name] - b[name]).abs().max() < 2e-4 for name in a)
