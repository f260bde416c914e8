"""What a run is about to do and needs, counted before it begins: the opening table, and refusals.

Bytes of parameters, gradients and moments are those of the shapes that training holds: a
`TrainState` of float32 parameters and AdamW's moments, one of which is a checkpoint. Those that
come and go in a step are counted from its trace, see step.py. Not counted are metrics and figures,
on the disk.
"""

from lte_jax.plan import report as report
from lte_jax.plan.devices import MACHINES as MACHINES
from lte_jax.plan.devices import Devices as Devices
from lte_jax.plan.needs import StageNeeds as StageNeeds
from lte_jax.plan.needs import folder_bytes as folder_bytes
from lte_jax.plan.run import Plan as Plan
from lte_jax.plan.run import foreseen as foreseen
from lte_jax.plan.run import show as show
