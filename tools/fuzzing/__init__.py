"""Random calls of the kernels, compared with the float64 oracle of the tests: see `tools/fuzz`.

A *case* is one row of one call of a kernel (an example, a token, or an element where a kernel works by elements' rows),
with the call's options, dtype and mode, whose value and gradients were compared. A call that has to raise an error, and
one of a reduction, which has one value, is one case each.

| file | what |
|---|---|
| `calls.py` | what a call is, and how it is written to a file |
| `draws.py` | rows of random and of edge values |
| `arrays.py` | the arrays of a call |
| `kernels.py` | the kernels: which options, which arrays may be left out, which oracle |
| `expected.py` | values and gradients by the oracle, and how far off a result may be |
| `running.py` | running a call in a mode of the backend |
| `checking.py` | comparing; making what fails small |
"""
