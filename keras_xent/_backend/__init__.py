"""Everything that differs between TensorFlow and JAX: one module for each, with the same names in the same order.

Nothing else in the package asks which backend Keras runs on.
"""

import keras

from keras_xent._backend._attributes import get_attribute as get_attribute
from keras_xent._backend._attributes import replace_own as replace_own
from keras_xent._backend._attributes import restore_own as restore_own
from keras_xent._backend._attributes import set_attribute as set_attribute
from keras_xent._backend._buckets import rows_of as rows_of
from keras_xent._backend._segments import weights_of_runs as weights_of_runs
from keras_xent._backend._xla import set_uses_xla as set_uses_xla
from keras_xent._backend._xla import uses_xla as uses_xla
from keras_xent._backend._xla import without_xla as without_xla

if keras.backend.backend() == "tensorflow":
    from keras_xent._backend import tensorflow as _module
elif keras.backend.backend() == "jax":
    from keras_xent._backend import jax as _module  # type: ignore[no-redef]
else:
    raise ImportError(
        "keras_xent works on the Keras backends 'tensorflow' and 'jax', and Keras runs on "
        f"'{keras.backend.backend()}': set the environment variable KERAS_BACKEND to one of the two before importing "
        "keras."
    )

# Facts.
NAME = _module.NAME
METRICS_SEE_PREDICTIONS_OF_LOSS = _module.METRICS_SEE_PREDICTIONS_OF_LOSS
XLA_CPU_FUSES_SLICED_SUMS = _module.XLA_CPU_FUSES_SLICED_SUMS
# Compiling and differentiating.
no_autograph = _module.no_autograph
jit = _module.jit
custom_gradient = _module.custom_gradient
fused_gradient = _module.fused_gradient
with_gradient_of_sum = _module.with_gradient_of_sum
with_slope = _module.with_slope
one_program = _module.one_program
starts_programs = _module.starts_programs
reads_variables_once = _module.reads_variables_once
is_concrete = _module.is_concrete
pad_to_bucket = _module.pad_to_bucket
take_rows = _module.take_rows
with_rounded_rows = _module.with_rounded_rows
clear_programs = _module.clear_programs
accumulating_step = _module.accumulating_step
judged_step = _module.judged_step
# Tensors.
is_eager = _module.is_eager
is_traced = _module.is_traced
snapshot = _module.snapshot
widest_int = _module.widest_int
asserts_in_graph = _module.asserts_in_graph
assert_in_graph = _module.assert_in_graph
in_xla = _module.in_xla
sums_pairwise = _module.sums_pairwise
# Operations.
matmul = _module.matmul
tanh = _module.tanh
opaque = _module.opaque
fori_loop = _module.fori_loop
gradient_of_sum = _module.gradient_of_sum
update_rows = _module.update_rows
add_at_columns = _module.add_at_columns
set_at_columns = _module.set_at_columns
take_at_columns = _module.take_at_columns
scale_or_zero = _module.scale_or_zero
bitcast = _module.bitcast
round_to_bfloat16 = _module.round_to_bfloat16
# Devices.
on_accelerator = _module.on_accelerator
on_tpu = _module.on_tpu
on_any_mesh = _module.on_any_mesh
batch_mesh = _module.batch_mesh
is_partitioned = _module.is_partitioned
shard_map_rows = _module.shard_map_rows
psum = _module.psum
pmax = _module.pmax
num_replicas = _module.num_replicas
all_reduce_sum = _module.all_reduce_sum
with_value_of_all_replicas = _module.with_value_of_all_replicas
# Where tensors came from.
operation_of = _module.operation_of
constant_of = _module.constant_of
program_of = _module.program_of
traced_ending = _module.traced_ending
let_tracers_keep = _module.let_tracers_keep
note_beside = _module.note_beside
to_numpy = _module.to_numpy


def uses_xla_cpu() -> bool:
    """Returns whether kernels are compiled by XLA:CPU, whose weaknesses `kernels/_xla_cpu.py` works around."""
    return uses_xla() and not on_accelerator()
