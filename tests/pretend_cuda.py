"""A CUDA device for machines without one: its tensors have shape, dtype and device, but no content.

Inside `with PretendCuda()` tensors on the CPU stay real; one on the wrong device is an error, as on
a GPU. What the device sends to the host arrives as ones. Kernels are not run.

From a training batch to the next, `waits` collects what makes the host wait for the GPU: a value
that is read, a shape that depends on values, a copy that is blocking or from memory not pinned.
"""

import traceback
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.utils import _to_kwargs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader

from plumbing.loading import StepSampler

DEVICE = torch.device("cuda", 0)
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class EndOfSteps(Exception):
    """The training loop has had its batches."""


class PretendCuda(TorchDispatchMode):
    """steps: batches a training loop gets, then EndOfSteps; None: all."""

    def __init__(self, steps=None):
        super().__init__()
        self.fake, self.patch = FakeTensorMode(allow_non_fake_inputs=True), pytest.MonkeyPatch()
        self.watching, self.steps, self.step, self.waits, self.pinned = False, steps, 0, [], {}

    def __enter__(self):
        change, iterate, save = self.patch.setattr, DataLoader.__iter__, torch.save

        def save_ones(value, path):
            save(tree_map_only(torch.Tensor, torch.Tensor.cpu, value), path)

        change(DataLoader, "__iter__", lambda loader: self.batches(loader, iterate(loader)))
        change(torch, "save", save_ones)
        change(torch.Tensor, "backward", backward)
        change(torch.cuda, "Event", lambda: Event(self))
        change(torch.cuda, "synchronize", lambda *_: self.waited("torch.cuda.synchronize"))
        change(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        change(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        change(torch.backends.cudnn, "enabled", False)  # cuDNN's LSTM asks a driver
        # Only a driver makes a CUDA generator, and without content no number is drawn.
        change("plumbing.seeds.generator_of", lambda key, device: torch.Generator())
        change("plumbing.process.memory_of", lambda device: 80e9)
        # Tensors loaded from a file have no values either.
        change("plumbing.files.is_finite", lambda tensor: True)
        change("formats.weights.is_finite", lambda tensor: True)
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.fake.__exit__(*error)
        self.patch.undo()

    def batches(self, loader, source):
        """A loader's batches. What follows one of training is watched; evaluation may wait."""
        training = isinstance(loader.batch_sampler, StepSampler)
        for self.step, batch in enumerate(source):
            if training and self.step == self.steps:
                raise EndOfSteps
            self.watching = training
            if loader.pin_memory:
                self.pinned |= {id(tensor): tensor for tensor in tensors_of(batch)}
            yield batch
        self.watching = False

    def waited(self, why):
        if self.watching:
            own = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT]
            self.waits.append(f"{own[-1].filename}:{own[-1].lineno}: {why}" if own else why)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name
        to = torch.device(kwargs.get("device") or "cpu").type
        if name == "aten::_pin_memory":
            self.pinned[id(args[0])] = args[0]
            return args[0]
        if to == "cpu" and not any(t.is_cuda for t in tensors_of(args, kwargs)):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        why = why_it_waits(function, name, args, kwargs, self.pinned)
        if why:
            self.waited(f"{name} {why}")
        with unset_fake_temporarily():
            if name == "aten::_local_scalar_dense":
                return torch.ones((), dtype=args[0].dtype).item()
            if name == "aten::_to_copy" and kwargs.get("device") and to == "cpu":
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if name == "aten::_pack_padded_sequence":  # its lengths are read on the host
                rows, sizes = function(torch.empty(*args[0].shape[:2], 1), *args[1:])
        if name == "aten::_pack_padded_sequence":
            return args[0].new_empty(len(rows), args[0].shape[2]), sizes
        return function(*args, **kwargs)


def why_it_waits(function, name, args, kwargs, pinned):
    """One reason in words, or None."""
    if name in INDEXING:
        if any(not t.is_cuda or t.dtype in (torch.bool, torch.uint8) for t in tensors_of(args[1])):
            return "has a mask for an index, or an index on the CPU"
    elif READS & set(function.tags):
        return "needs values that are on the device"
    if name == "aten::copy_":
        source, target, waits = args[1], args[0].device, not (len(args) > 2 and args[2])
    elif name == "aten::_to_copy":
        source, waits = args[0], not kwargs.get("non_blocking")
        target = torch.device(kwargs.get("device") or source.device)
    else:
        return None
    if source.device.type == target.type:
        return None
    if waits:
        return f"of {tuple(source.shape)} to {target.type} is blocking"
    if target.type == "cuda" and id(source) not in pinned:
        return "from memory that is not pinned"
    return None


def tensors_of(*trees):
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


class Event:
    """torch.cuda.Event. A step may wait for an event of the step before it, not for its own."""

    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.step = self.cuda.step

    def synchronize(self):
        if self.step == self.cuda.step:
            self.cuda.waited("the step waits for its own event")


def backward(loss):
    """Tensor.backward, node by node: torch's engine would ask a CUDA driver for its streams."""
    order, seen = [], set()

    def visit(node):
        if node is not None and node not in seen:
            seen.add(node)
            for below, _ in node.next_functions:
                visit(below)
            order.append(node)

    visit(loss.grad_fn)
    sums = {(loss.grad_fn, 0): torch.ones_like(loss)}  # what has arrived at each input of each node
    with torch.no_grad():
        for node in reversed(order):
            gradients = [sums.pop((node, i), None) for i in range(len(node._input_metadata))]
            if hasattr(node, "variable"):
                leaf = node.variable
                leaf.grad = gradients[0] if leaf.grad is None else leaf.grad + gradients[0]
                continue
            results = getattr(node, "apply", node)(*gradients)  # apply: a torch.autograd.Function
            results = results if isinstance(results, tuple) else (results,)
            for key, value in zip(node.next_functions, results):
                if key[0] is not None and value is not None:
                    like = key[0]._input_metadata[key[1]]
                    value = value.sum_to_size(like.shape).to(like.dtype)
                    sums[key] = value if key not in sums else sums[key] + value


class MovesArguments:
    """As DistributedDataParallel: a call first moves tensors among its arguments to the device."""

    def __init__(self, model, device):
        self.model, self.device = model, device

    def __call__(self, *args):
        (args,), _ = _to_kwargs(args, {}, self.device, False)
        return self.model(*args)
