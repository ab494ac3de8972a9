"""Communication and memory of devices in a step of the fused head: the tables of docs/scaling.md.

    python tools/scaling.py

Four virtual devices of the CPU. Everything is read from the compiled programs, and nothing is run: so it holds for any
devices, but for what their own compilers change.
"""

import json
import os
import re
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["KERAS_BACKEND"] = "jax"

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from keras import distribution

import keras_xent as kx

TOKENS, FEATURES, CLASSES = 8192, 64, 65_536
# Batch x model.
MESHES = ((1, 1), (1, 2), (1, 4), (2, 2), (4, 1))
COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1}
# A language model of the size of Gemma 2 (2.6 billion weights) and a step of half a million tokens.
PAPER = {"tokens": 2**19, "features": 2304, "classes": 256_000}
PAPER_MESHES = ((8, 1), (4, 2), (1, 8), (32, 1), (8, 4), (64, 4), (256, 1), (32, 8))


def compiled_step(batch, model, *, tied=False):
    """Forward and backward of the head on a mesh, compiled."""
    devices = distribution.list_devices("cpu")[: batch * model]
    mesh = distribution.DeviceMesh((batch, model), ("batch", "model"), devices)
    layout = distribution.LayoutMap(mesh)
    layout.update(kx.layers.vocabulary_layout("head"))
    axes = {"kernel": layout["head/embeddings" if tied else "head/kernel"].axes, "bias": layout["head/bias"].axes}

    def given(dtype, axes, *shape):
        sharding = NamedSharding(mesh.backend_mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def loss(hidden, kernel, bias, labels):
        options = {"ignore_class": 0, "transpose_kernel": tied, "reduction": "token_mean"}
        return kx.kernels.linear_cross_entropy(hidden, kernel, labels, bias, **options)

    with distribution.ModelParallel(layout_map=layout, batch_dim_name="batch").scope():
        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        return step.lower(
            given("float32", ("batch", None), TOKENS, FEATURES),
            given("float32", axes["kernel"], *((CLASSES, FEATURES) if tied else (FEATURES, CLASSES))),
            given("float32", axes["bias"], CLASSES),
            given("int32", ("batch",), TOKENS),
        ).compile()


def groups(line, count):
    """The devices that talk to each other, `[groups, size]`, from a line of a program."""
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return np.array([[int(i) for i in one.split(",")] for one in re.findall(r"\{([\d,]+)\}", listed[1])])
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims, order = ([int(i) for i in (part or "").split(",") if i] for part in counted.groups())
        ids = np.arange(count).reshape(dims)
        return (ids.transpose(order) if order else ids).reshape(shape)
    return np.arange(count)[None]


def collectives(program, batch, model):
    """Returns each communication: its kind, its axis, whether it is in the loop over the chunks, and its shapes."""
    found = []
    for line in program.as_text().splitlines():
        match = re.search(rf"= (.*?) ({COLLECTIVES})(-start)?\(", line)
        if not match:
            continue
        members = groups(line, batch * model)
        if members.shape[1] == 1:
            continue
        axis = "model" if members.shape[1] == model and members[0, 1] - members[0, 0] == 1 else "batch"
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
        sizes = [[int(d) for d in dims.split(",") if d] for _, dims in shapes]
        number = sum(BYTES[kind] * int(np.prod(dims)) for (kind, _), dims in zip(shapes, sizes, strict=True))
        where = "each chunk" if "/while/body/" in line else "once"
        found.append({"kind": match[2], "axis": axis, "where": where, "shapes": sizes, "bytes": number})
    return found


def measure(tied=False):
    """For each mesh: what a device holds and what it sends."""
    results = []
    for batch, model in MESHES:
        program = compiled_step(batch, model, tied=tied)
        memory = program.memory_analysis()
        held = {
            "weights": memory.argument_size_in_bytes,
            "step": memory.temp_size_in_bytes + memory.output_size_in_bytes,
        }
        results.append({"mesh": [batch, model], "bytes": held, "sent": collectives(program, batch, model)})
    return results


def on_paper(batch, model, *, tokens, features, classes):
    """Megabytes that each device sends in a step of the head, by axis, where rings add up: `2 (n - 1) / n` times.

    Along the model axis, for each of its tokens: the largest logit, the sum of exponentials, the label's logit and
    part in the gradient (16 bytes in float32), and the hidden state's gradient in float32. Along the batch axis the
    gradient of its part of the kernel, in float32.
    """
    along_model = tokens / batch * (16 + 4 * features) * 2 * (model - 1) / model
    along_batch = 4 * features * classes / model * 2 * (batch - 1) / batch
    return along_model / 1e6, along_batch / 1e6


def main():
    """Prints the tables, or with --json what they are made from."""
    results = measure()
    if "--json" in sys.argv:
        print(json.dumps({"head": results, "tied": measure(tied=True)}))
        return
    print(f"{TOKENS} tokens, {FEATURES} features, {CLASSES} classes, float32, jax {jax.__version__}\n")
    print("| batch x model | a device holds, MB | of it weights and inputs | in each chunk | once |")
    print("|---|--:|--:|---|---|")
    for one in results:
        weights, step = (number / 1e6 for number in one["bytes"].values())
        cells = [
            "; ".join(
                f"{c['kind']} over {c['axis']} {c['bytes'] / 1e3:.4g} kB" for c in one["sent"] if c["where"] == where
            )
            for where in ("each chunk", "once")
        ]
        batch, model = one["mesh"]
        print(f"| {batch} x {model} | {weights + step:.0f} | {weights:.0f} | {cells[0] or '-'} | {cells[1] or '-'} |")
    print("\n| devices | batch x model | over model, MB | over batch, MB | kernel and gradient a device, MB |")
    print("|--:|---|--:|--:|--:|")
    for batch, model in PAPER_MESHES:
        along_model, along_batch = on_paper(batch, model, **PAPER)
        held = 2 * 4 * PAPER["features"] * PAPER["classes"] / model / 1e6
        print(f"| {batch * model} | {batch} x {model} | {along_model:.0f} | {along_batch:.0f} | {held:.0f} |")


if __name__ == "__main__":
    main()
