"""How long does a step take that meets a new shape?"""

from collections.abc import Iterator

from tools.bench import losses
from tools.bench.shapes import Shape
from tools.bench.timing import WARM_UP, in_turn

PEERS = ("ours, graph", "Keras, graph")
CLASSES = 1000


def measure(rounds: int) -> Iterator[dict]:
    """One record for each loss: the seconds of every step, by peer. No two steps have the same number of rows."""
    for row in losses.CLASSES:
        about = {"shape": {"rows": "new", "classes": CLASSES}, "dtype": "float32"}
        yield {"row": row, **about, "seconds": _seconds(row, rounds)}


def _seconds(row, rounds):
    peers = losses.peers(row)
    data = [losses.inputs(row, Shape("new", 64 + turn, CLASSES), "float32") for turn in range(WARM_UP + rounds)]
    batches = {name: iter(data) for name in PEERS}
    times = in_turn({name: lambda name=name: peers[name](*next(batches[name]))[1] for name in PEERS}, rounds)
    return {name: [round(milliseconds / 1e3, 4) for milliseconds in values] for name, values in times.items()}
