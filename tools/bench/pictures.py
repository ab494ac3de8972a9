"""Two pictures: time against the number of classes with the floor drawn in, and memory against the vocabulary."""

from pathlib import Path
from statistics import median

from tools.bench.results import find
from tools.bench.tables import named

TIME, MEMORY = "bench-time.png", "bench-memory.png"
# Of fewer logits a time is that of the call.
_FEWEST_LOGITS = 100_000
# Who is drawn, and how; in the order of the legend.
_STYLES = {
    "ours": {"color": "tab:blue", "linewidth": 2.5},
    "ours, JAX": {"color": "tab:blue", "linestyle": "--"},
    "Keras, graph": {"color": "tab:red"},
    "Keras, XLA": {"color": "tab:red", "linestyle": "--"},
    "tf.nn": {"color": "tab:pink"},
    "PyTorch": {"color": "tab:orange"},
    "torch.compile": {"color": "tab:orange", "linestyle": "--"},
    "PyTorch linear, chunked": {"color": "tab:brown"},
    "optax": {"color": "tab:green"},
    "tokamax": {"color": "tab:green", "linestyle": "--"},
    "floor": {"color": "black", "linestyle": ":"},
}


def draw(results: dict, folder: Path) -> list[Path]:
    """The pictures, as files in the folder."""
    import matplotlib

    matplotlib.use("agg")
    time = [
        record
        for record in find(results, "sparse", dtype="float32", smoothing=0.0)
        if record["case"]["rows"] * record["case"]["classes"] >= _FEWEST_LOGITS
    ]
    memory = find(results, "vocabulary")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / TIME, folder / MEMORY]
    per_logit = [
        {n: median(v) * 1e6 / (r["case"]["rows"] * r["case"]["classes"]) for n, v in r["values"].items()} for r in time
    ]
    _lines(
        paths[0], time, per_logit, "nanoseconds for each logit", "Sparse cross-entropy, forward and backward, float32"
    )
    megabytes = [{name: max(values[0], 1) for name, values in record["values"].items()} for record in memory]
    tokens = f", {memory[0]['case']['rows']} tokens" if memory else ""
    _lines(paths[1], memory, megabytes, "peak memory over the inputs, MB", f"A head and its loss{tokens}, float32")
    return paths


def _lines(path, records, values, label, title):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, style in _STYLES.items():
        points = [(r["case"]["classes"], v[name]) for r, v in zip(records, values, strict=True) if name in v]
        if points:
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=named(name), **style)
    classes = sorted({record["case"]["classes"] for record in records})
    axes.set(xscale="log", yscale="log", xlabel="classes", ylabel=label, title=title)
    axes.set_xticks(classes, [f"{n:,}" for n in classes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if records:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
