"""Text and retrieval: the ranking loss against loops, retrieval metrics against a plain ranking,
readers of captions, the vocabulary, training pictures."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import average_precision_score

from formats.captions import Captioned, read_captions
from plumbing.errors import UserError
from tasks.text import Pairs, Words, not_learned, picture_of, ranking_loss, retrieval_metrics

# ------------------------------------------------------------------------------------------- losses


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
    person, noise = (
        torch.tensor([0, 0, 1, 2, 3, 3, 3, 4, 5]),
        torch.rand(2, 9, 9, generator=generator),
    )
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
        sides = (
            grad[1:, 1:].abs() > 1e-8
        ).diagonal()  # texts pulled by picture 0 move along their own axis
        counts[1:] += sides
    assert counts[0] == 0 and (counts[1:] > 60).all()


# ------------------------------------------------------------------------------------------ metrics


def test_retrieval_equals_scikit_learn_both_ways():
    rng = np.random.default_rng(3)
    v, t = (rng.normal(size=(n, 6)).astype(np.float32) for n in (20, 31))
    v, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (v, t))
    image_ids = np.concatenate(
        [np.arange(-1, 6), rng.integers(-1, 6, 13)]
    )  # ids 0 and −1 are people like others here
    text_ids = np.concatenate([np.arange(-1, 6), rng.integers(-1, 6, 24)])
    got = retrieval_metrics(v, t, image_ids, text_ids)
    for name, q, g, qi, gi in (
        ("t2i", t, v, text_ids, image_ids),
        ("i2t", v, t, image_ids, text_ids),
    ):
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
    # caption of 8 finds picture 2 first; picture 1 stands third behind picture 0 (equal scores:
    # earlier first)
    assert got["t2i_R1"] == 1.0 and got["t2i_mAP"] == pytest.approx((1 + (1 + 2 / 3) / 2) / 2)
    assert got["i2t_R1"] == pytest.approx(2 / 3)


# ----------------------------------------------------------------------------------------- captions


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
        ({"split": "training"}, "split is 'training', not train, val or test in entry 1$"),
        ({"split": ["train"]}, "cannot read .*c.json as captions .* in entry 1$"),
        ({"captions": ["a man", " "]}, "empty caption .* in entry 1$"),
        ({"captions": ["a man", 7]}, "in entry 1$"),
        ({"captions": []}, "empty caption .* in entry 1$"),
        ({"captions": "a man"}, "list of texts.* in entry 1$"),
        ({"id": "1"}, "id a whole number in entry 1$"),
        ({"id": True}, "id a whole number in entry 1$"),
        ({"img_path": None}, "in entry 1$"),
        ({"img_path": "y.png"}, "y.png is missing; .*set images="),
        ({"img_path": "cut.png", "split": "test"}, "cut.png is damaged .*mend or remove it"),
    ):
        path.write_text(json.dumps([good, good | change]))
        with pytest.raises(UserError, match=message) as refused:
            read_captions(path, tmp_path)
        assert "\n" not in str(refused.value)
    for text, message in (
        ("[", "cannot read .* as JSON"),
        ("7", "cannot read"),
        ('{"train": []}', "in entry 0$"),
        ('[{"id": 1}]', "'img_path' is missing in entry 0$"),
    ):
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


def test_a_sentence_in_another_language_is_refused():
    """To the model all of its words are the one word that it does not know."""
    text = Words(["a", "woman", "coat"])
    assert not_learned(text, "eine Frau im coat, eine") == ["eine", "frau", "im"]
    with pytest.raises(UserError, match='no word of "eine Frau".* a, woman, coat'):
        not_learned(text, "eine Frau")


def test_training_pictures_are_shifted_by_the_border_and_mirrored(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    split = Captioned([str(tmp_path / "x.png")], np.zeros(1, int), ["red"], np.zeros(1, int))
    plain = picture_of(split.files[0], (32, 16))
    assert np.array_equal(plain, pixels.transpose(2, 0, 1))
    bordered = F.pad(plain, (2, 2, 2, 2))
    shifts = [bordered[:, y : y + 32, x : x + 16] for y in range(5) for x in range(5)]
    known = {x.numpy().tobytes(): n for n, x in enumerate(shifts + [x.flip(2) for x in shifts])}
    pairs = Pairs(split, [[2, 3]], (32, 16), pad=2, flip=0.5, seed=0)
    seen = {known[pairs[(epoch, 0)][0].numpy().tobytes()] for epoch in range(60)}
    assert len(seen) > 20 and min(seen) < 25 <= max(seen)
    assert torch.equal(pairs[(7, 0)][0], pairs[(7, 0)][0])
