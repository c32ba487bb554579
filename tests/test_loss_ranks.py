"""The three losses and the batch norm on 2 and 3 gloo ranks, against one process."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
from small_batch import GRID, D, M, P, assert_same, batch, linear, value_and_gradient

import losses
from losses import GlobalBatchNorm
from model import Decoder, GenPoCCL, Projector, ViT


class OwnSliceOnly(torch.autograd.Function):
    """Mutant: the gather of Spijkervet's SimCLR; what other ranks say about own columns is
    dropped.
    """

    @staticmethod
    def forward(ctx, x):
        return losses.gather_rows_of(x)

    @staticmethod
    def backward(ctx, gradient):
        n = len(gradient) // losses.world_size()
        return gradient[dist.get_rank() * n :][:n]


MUTANTS = {"no_gradient": losses.gather_rows_of, "own_slice": OwnSliceOnly.apply}


def case_mp(rows, name="mixed"):
    layer = linear(D, D)
    return losses.multi_positive_loss(layer(rows["x"]), rows[name], 0.1), layer


def case_align(rows):
    layer = linear(D, D)
    return losses.alignment_loss(layer(rows["x"]), layer(rows["x2"]), 0.2), layer


def case_rec(rows):
    layer = linear(P * P * 3, P * P * 3)
    return losses.reconstruction_loss(
        layer(rows["patches"]), rows["images"], rows["mask"], P
    ), layer


def case_norm(rows, kind="x"):
    layer = nn.Sequential(linear(D, D), GlobalBatchNorm(D).double())
    x = rows[kind]
    y = layer[0](x) if x.ndim == 2 else layer[0](x.transpose(1, 3)).transpose(1, 3)
    return layer[1](y).pow(3).flatten(1).mean(1).mean(), layer


CASES = {
    "mp": case_mp,
    "mp_none": lambda rows: case_mp(rows, "none"),
    "mp_lone_rank": lambda rows: case_mp(rows, "lone_rank"),
    "align": case_align,
    "rec": case_rec,
    "norm_rows": case_norm,
    "norm_maps": lambda rows: case_norm(rows, "maps"),
}


def tiny_model():
    torch.manual_seed(2)
    encoder = ViT(16, 1, 2, (GRID[0] * P, GRID[1] * P), P)
    return GenPoCCL(encoder, Decoder(encoder, 8, 1, 2), Projector(16, "mlp", 16, 8)).double()


def model_steps(model, rows, steps=2):
    """Two steps of SGD (Adam would hide a wrong scale); → the three terms of the last step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    g = torch.Generator().manual_seed(3)
    masks = [torch.rand(M, GRID[0] * GRID[1], generator=g).argsort(1) < 3 for _ in range(2)]
    for _ in range(steps):
        out = model(rows["images"], [m[rows["own"]] for m in masks], rows["mixed"])
        optimizer.zero_grad()
        out["total"].backward()
        optimizer.step()
    return torch.stack([out[name].detach() for name in ("total", "rec", "align", "mp")])


def outcome(case, rows, world):
    loss, layer = case(rows)
    loss.backward()
    tensors = [loss.detach(), *(p.grad for p in layer.parameters())]
    if world > 1:  # what DistributedDataParallel does
        for t in tensors:
            dist.all_reduce(t)
            t /= world
    return [*tensors, *layer.buffers()]


def one_rank(rank, world, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    own = slice(rank * M // world, (rank + 1) * M // world)
    rows = {**{k: v[own] for k, v in batch().items()}, "own": own}
    found = {name: outcome(case, rows, world) for name, case in CASES.items()}
    right = losses.gather_with_gradient
    for mutant, gather in MUTANTS.items():
        losses.gather_with_gradient = gather
        for name in ("mp", "align"):
            found[f"{name}_{mutant}"] = outcome(CASES[name], rows, world)
    losses.gather_with_gradient = right
    found["health"] = list(losses.contrastive_health(rows["x"], rows["mixed"]).values())
    model = tiny_model()
    terms = model_steps(nn.parallel.DistributedDataParallel(model), rows)
    dist.all_reduce(terms)
    found["model"] = [terms / world, *model.state_dict().values()]
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    """What each of 2 or 3 real gloo processes found."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        mp.spawn(one_rank, (request.param, str(folder)), request.param)
    finally:
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(
            OMP_NUM_THREADS=before
        )
    return [torch.load(folder / f"rank{r}.pt") for r in range(request.param)]


@pytest.fixture(scope="module")
def alone():
    rows = {**batch(), "own": slice(None)}
    found = {name: outcome(case, rows, 1) for name, case in CASES.items()}
    found["health"] = list(losses.contrastive_health(rows["x"], rows["mixed"]).values())
    model = tiny_model()
    found["model"] = [model_steps(model, rows), *model.state_dict().values()]
    return found


@pytest.mark.parametrize("name", [*CASES, "health", "model"])
def test_ranks_equal_one_process(ranks, alone, name):
    """Loss, gradient of shared weights, running statistics; for the model: weights after two SGD
    steps.
    """
    for rank in ranks:
        assert_same(rank[name], alone[name], 1e-9)


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("name", ["mp", "align"])
def test_a_wrong_gather_is_seen(ranks, alone, name, mutant):
    wrong, right = ranks[0][f"{name}_{mutant}"], alone[name]
    torch.testing.assert_close(wrong[0], right[0])  # the value hides it ...
    assert (wrong[1] - right[1]).norm() > 0.1 * right[1].norm()  # ... the gradient does not


@pytest.mark.parametrize("kind", ["x", "maps"])
def test_global_batch_norm_equals_torch(alone, kind):
    """Value, gradient and running statistics of nn.BatchNorm on the whole batch; then evaluation
    mode.
    """
    x = batch()[kind]
    ours, theirs = (
        GlobalBatchNorm(D).double(),
        (nn.BatchNorm1d if kind == "x" else nn.BatchNorm2d)(D).double(),
    )
    assert_same(
        value_and_gradient(lambda x: ours(x).pow(3).sum(), x),
        value_and_gradient(lambda x: theirs(x).pow(3).sum(), x),
    )
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    # the several-rank path is tied to this one by the cases norm_rows and norm_maps
    case = alone["norm_rows" if kind == "x" else "norm_maps"]
    layer = nn.Sequential(linear(D, D), theirs)
    theirs.train().reset_running_stats()
    y = layer[0](x) if x.ndim == 2 else layer[0](x.transpose(1, 3)).transpose(1, 3)
    loss = theirs(y).pow(3).mean()
    loss.backward()
    assert_same(case[:5], [loss.detach(), *(p.grad for p in layer.parameters())])
    assert_same(case[5:], [theirs.running_mean, theirs.running_var])
