"""The peers that run on PyTorch: `cross_entropy` eager and compiled, and `linear_cross_entropy`."""

import contextlib
import functools
import gc
import importlib.metadata
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from tools.bench import data
from tools.bench.peers import pytorch_outputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def peer(name: str, case: dict, folder: str) -> Callable:
    """One of the peers, ready to be called."""
    return {"loss": _of_loss, "linear": _of_head}.get(case["question"], _of_output)(name, case, folder)


def arrays(results: dict) -> dict:
    """As NumPy arrays, in float32."""
    return {name: value.detach().float().cpu().numpy() for name, value in results.items()}


def versions() -> dict:
    """Of the packages."""
    found = {"torch": torch.__version__}
    for name in "liger-kernel", "cut-cross-entropy":
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def forget() -> None:
    """Frees inputs and programs."""
    _inputs.cache_clear()
    torch._dynamo.reset()


@functools.lru_cache(1)
def _inputs(folder, names):
    return tuple(_tensor(data.read(folder, name)) for name in names)


def _tensor(stored):
    if stored.dtype == "uint16":
        return torch.from_numpy(np.array(stored).view("int16")).view(torch.bfloat16).to(DEVICE)
    tensor = torch.from_numpy(np.array(stored)).to(DEVICE)
    return tensor.long() if tensor.dtype == torch.int32 else tensor


def _of_loss(name, case, folder):
    given, logits = _inputs(folder, ("labels" if case["loss"] == "sparse" else "targets", "logits"))
    smoothing = case["smoothing"]

    def loss(logits):
        if case["loss"] == "sigmoid":
            labels = given * (1.0 - smoothing) + smoothing / 2.0 if smoothing else given
            return F.binary_cross_entropy_with_logits(logits, labels)
        if name == "Liger":
            from liger_kernel.ops import LigerCrossEntropyFunction

            # It writes into its input, which a leaf does not allow: the same memory by another name.
            return LigerCrossEntropyFunction.apply(logits.view_as(logits), given, None)[0]
        return F.cross_entropy(logits, given, label_smoothing=smoothing)

    return _with_gradients(name, loss, gradient=logits)


def _with_gradients(name, loss, **inputs):
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    if name == "Liger" and "gradient" in inputs:
        # It writes the gradient over the logits, which others need.
        inputs["gradient"] = inputs["gradient"].detach().clone().requires_grad_()
    compiled = torch.compile(loss, dynamic=False) if name == "torch.compile" else loss

    def launch():
        for tensor in inputs.values():
            tensor.grad = None
        value = compiled(*inputs.values())
        value.backward()
        return {"loss": value.detach(), **{name: tensor.grad for name, tensor in inputs.items()}}

    return _synchronized(launch, inputs)


def _synchronized(launch, inputs):
    """A call that waits for its results; what it is made of is for those that do not."""

    def run():
        results = launch()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return results

    run.launch, run.inputs = launch, inputs
    return run


def device_megabytes(run: Callable) -> float:
    """What the calls need beside their inputs, of the device's memory."""
    run()  # which may compile, and tries several kernels
    for tensor in run.inputs.values():
        tensor.grad = None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def _of_head(name, case, folder):
    hidden, kernel, labels = _inputs(folder, ("hidden", "kernel", "labels"))
    # PyTorch's weights are [classes, features]; not both are kept.
    _inputs.cache_clear()
    kernel = kernel.T.contiguous()
    if name.startswith("PyTorch linear"):
        options = torch.nn.LinearCrossEntropyOptions() if name.endswith("chunked") else None

        def loss(hidden, kernel):
            return F.linear_cross_entropy(hidden, kernel, labels, ignore_index=data.IGNORED, options=options)
    elif name == "Liger":
        from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

        def loss(hidden, kernel):
            return LigerFusedLinearCrossEntropyFunction.apply(hidden, kernel, labels, None, None, data.IGNORED)[0]
    elif name == "cut cross-entropy":
        from cut_cross_entropy import linear_cross_entropy

        def loss(hidden, kernel):
            # Its default leaves out small terms of the gradients: up to 3 % of the largest element.
            return linear_cross_entropy(hidden, kernel, labels, ignore_index=data.IGNORED, filter_eps=None)
    else:

        def loss(hidden, kernel):
            return F.cross_entropy((hidden @ kernel.T).float(), labels, ignore_index=data.IGNORED)

    return _of_matrices(name, case, loss, hidden, kernel)


def _of_output(name, case, folder):
    """Other losses of a head."""
    names = data.names(folder)
    arrays = dict(zip(names, _inputs(folder, names), strict=True))
    _inputs.cache_clear()
    arrays |= {key: arrays[key].T.contiguous() for key in arrays if key.endswith("kernel")}
    hidden, kernel = arrays.pop("hidden"), arrays.pop("kernel")
    loss = functools.partial(pytorch_outputs.loss(name, case), **arrays)
    return _of_matrices(name, case, loss, hidden, kernel)


def _of_matrices(name, case, loss, hidden, kernel):
    """Loss and gradients of hidden states and a kernel `[classes, features]`, or the loss alone."""
    if not case.get("gradients", True):
        compiled = torch.compile(loss, dynamic=False) if name == "torch.compile" else loss

        def evaluate():
            with torch.no_grad():
                return {"loss": compiled(hidden, kernel)}

        return _synchronized(evaluate, {})
    run = _with_gradients(name, loss, hidden=hidden, kernel=kernel)

    @functools.wraps(run)
    def transposed():
        return {key: value.T if key == "kernel" else value for key, value in run().items()}

    return transposed
