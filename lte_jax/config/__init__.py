"""Configurations of models, sparsity and experiments, and how they are read.

schema.py defines the keys, fields.py their types and ranges, reference.py shows both; experts.py
has what follows from those of LTE, and presets; loading.py reads files and flags; grid.py has
sweeps: many experiments as one table.
A file in configs/ starts from `to_config_dict(Experiment(...))` and sets what it needs:

    from lte_jax import config

    def get_config(arg=""):
        c = config.to_config_dict(config.Experiment())
        c.lte.target_sparsity = 0.75
        return c
"""

from lte_jax.config.experts import PRESETS as PRESETS
from lte_jax.config.experts import num_experts as num_experts
from lte_jax.config.experts import own_threshold as own_threshold
from lte_jax.config.experts import threshold_at as threshold_at
from lte_jax.config.fields import Count as Count
from lte_jax.config.fields import Inside as Inside
from lte_jax.config.fields import Length as Length
from lte_jax.config.fields import NotNegative as NotNegative
from lte_jax.config.fields import Share as Share
from lte_jax.config.fields import TopShare as TopShare
from lte_jax.config.fields import Whole as Whole
from lte_jax.config.fields import describe as describe
from lte_jax.config.fields import from_mapping as from_mapping
from lte_jax.config.fields import moved as moved
from lte_jax.config.fields import to_config_dict as to_config_dict
from lte_jax.config.grid import QUALITY_ONLY as QUALITY_ONLY
from lte_jax.config.grid import Row as Row
from lte_jax.config.grid import Sweep as Sweep
from lte_jax.config.grid import load_sweep as load_sweep
from lte_jax.config.grid import preset as preset
from lte_jax.config.loading import flag as flag
from lte_jax.config.loading import load_config as load_config
from lte_jax.config.loading import packaged as packaged
from lte_jax.config.loading import parse_flags as parse_flags
from lte_jax.config.loading import variants as variants
from lte_jax.config.lora import LoraConfig as LoraConfig
from lte_jax.config.names import Activation as Activation
from lte_jax.config.names import Remat as Remat
from lte_jax.config.names import RoutingName as RoutingName
from lte_jax.config.reference import keys as keys
from lte_jax.config.rope import RopeScaling as RopeScaling
from lte_jax.config.schema import CheckpointConfig as CheckpointConfig
from lte_jax.config.schema import ComputeConfig as ComputeConfig
from lte_jax.config.schema import DataConfig as DataConfig
from lte_jax.config.schema import Experiment as Experiment
from lte_jax.config.schema import LTEConfig as LTEConfig
from lte_jax.config.schema import MeshConfig as MeshConfig
from lte_jax.config.schema import ModelConfig as ModelConfig
from lte_jax.config.schema import OptimConfig as OptimConfig
from lte_jax.config.schema import SourceConfig as SourceConfig
from lte_jax.config.schema import StageConfig as StageConfig
from lte_jax.config.schema import StagesConfig as StagesConfig
from lte_jax.config.settings import LTESettings as LTESettings
from lte_jax.errors import UserError as UserError
