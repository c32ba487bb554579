"""Attributes: metrics against plain loops and scikit-learn, the loss against a loop."""

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, jaccard_score, precision_score, recall_score

from common import UserError
from finetune_par import attribute_metrics, weighted_bce


def slow_metrics(p, y):
    """The reference definitions as loops in float64."""
    n, a = p.shape
    ma, acc, prec, rec = [], [], [], []
    for j in range(a):
        tp = sum(p[i, j] > 0.5 and y[i, j] == 1 for i in range(n))
        tn = sum(p[i, j] <= 0.5 and y[i, j] == 0 for i in range(n))
        pos, neg = sum(y[i, j] == 1 for i in range(n)), sum(y[i, j] == 0 for i in range(n))
        ma.append(((tp / pos if pos else 0) + (tn / neg if neg else 0)) / 2)
    for i in range(n):
        yes, true = {j for j in range(a) if p[i, j] > 0.5}, {j for j in range(a) if y[i, j] == 1}
        acc.append(len(yes & true) / len(yes | true) if yes | true else 0)
        prec.append(len(yes & true) / len(yes) if yes else 0)
        rec.append(len(yes & true) / len(true) if true else 0)
    P, R = np.mean(prec), np.mean(rec)
    f1 = 2 * P * R / (P + R) if P + R else 0
    return dict(mA=np.mean(ma), accuracy=np.mean(acc), precision=P, recall=R, f1=f1)


@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_loops_with_lonely_attributes_and_empty_pictures(seed):
    rng = np.random.default_rng(seed)
    p, y = rng.random((23, 6)), (rng.random((23, 6)) < 0.3).astype(int)
    y[:, 0], y[5], p[5], p[6, 2] = 0, 0, 0.1, 0.5
    y[:, 1] = 1
    y[5, 1] = 2  # unknown: picture 5 says nothing and nothing is true of it
    got = attribute_metrics(p, y)
    for name, value in slow_metrics(p, y).items():
        assert got[name] == pytest.approx(value, abs=1e-12), name
    assert not got["both"][:2].any()
    assert got["mA_both"] == pytest.approx(got["attribute_mA"][got["both"]].mean())
    assert all(np.isfinite(v).all() for v in got.values())
    as_tensors = attribute_metrics(torch.from_numpy(p), torch.from_numpy(y))
    assert as_tensors["mA"] == got["mA"] and as_tensors["f1"] == got["f1"]


def test_attributes_of_one_class_alone_leave_no_mean():
    got = attribute_metrics(np.array([[0.9, 0.2]]), np.array([[1, 0]]))
    assert got["mA"] == 0.5 and got["mA_both"] is None and not got["both"].any()


def test_metrics_equal_scikit_learn():
    rng = np.random.default_rng(9)
    p, y = rng.random((60, 5)), (rng.random((60, 5)) < 0.5).astype(int)
    yes, got = (p > 0.5).astype(int), attribute_metrics(p, y)
    each = [balanced_accuracy_score(y[:, j], yes[:, j]) for j in range(5)]
    assert got["mA"] == pytest.approx(np.mean(each))
    scores = dict(accuracy=jaccard_score, precision=precision_score, recall=recall_score)
    for name, score in scores.items():
        assert got[name] == pytest.approx(score(y, yes, average="samples", zero_division=0)), name


def test_metrics_by_hand():
    p = np.array([[0.9, 0.2], [0.6, 0.7]])
    y = np.array([[1, 0], [0, 1]])
    # attribute 0: TPR 1, TNR 0; attribute 1: both 1. Pictures: {0} vs {0}; {0, 1} vs {1}.
    got = attribute_metrics(p, y)
    assert (got["mA"], got["accuracy"], got["precision"], got["recall"]) == (0.75, 0.75, 0.75, 1.0)
    assert got["f1"] == pytest.approx(6 / 7)
    with pytest.raises(UserError, match="two equal tables"):
        attribute_metrics(p, y[:1])
    with pytest.raises(UserError, match="not a number"):
        attribute_metrics(p * np.nan, y)
    p[0, 1] = 0.5 + 1e-12  # yes in float64, no in float32
    tensors = torch.from_numpy(p), torch.from_numpy(y)
    assert attribute_metrics(*tensors)["accuracy"] == attribute_metrics(p, y)["accuracy"]
    assert attribute_metrics(tensors[0].bfloat16(), tensors[1])["accuracy"] == 0.75


def test_loss_equals_a_loop_and_its_gradient():
    rng = np.random.default_rng(1)
    logits = torch.tensor(rng.normal(size=(5, 4)), dtype=torch.float32, requires_grad=True)
    labels, ratio = torch.tensor(rng.integers(0, 2, (5, 4))), torch.tensor([0.0, 1.0, 0.3, 0.8])
    total, slope = 0.0, np.zeros((5, 4))
    for i in range(5):
        for j in range(4):
            z, y, r = logits[i, j].item(), labels[i, j].item(), ratio[j].item()
            w, s = np.exp(y * (1 - r) + (1 - y) * r), 1 / (1 + np.exp(-z))
            total -= w * (np.log(s) if y else np.log(1 - s)) / 5
            slope[i, j] = w * (s - y) / 5
    loss = weighted_bce(logits, labels, ratio)
    loss.backward()
    assert loss.item() == pytest.approx(total, rel=1e-5)
    np.testing.assert_allclose(logits.grad.numpy(), slope, atol=1e-6)
