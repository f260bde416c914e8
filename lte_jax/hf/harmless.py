"""Which keys of a config.json may be ignored: those that no forward pass reads."""

from __future__ import annotations

import re

from lte_jax.errors import UserError
from lte_jax.hf.fields import Fields

# Keys seen in real folders that no forward pass of these families reads.
_WITHOUT_EFFECT = frozenset(
    "_attn_implementation _attn_implementation_autoset _flash_attn_2_enabled activation_dropout "
    "add_cross_attention architectures attention_dropout attention_probs_dropout_prob "
    "attn_implementation attn_pdrop auto_map chunk_size_feed_forward classifier_activation "
    "classifier_dropout cross_attention_hidden_size embd_pdrop embedding_dropout finetuning_task "
    "hidden_dropout hidden_dropout_prob initializer_range is_decoder is_encoder_decoder "
    "is_llama_config layer_norm_eps layer_norm_epsilon model_max_length num_logits_to_keep "
    "output_attentions output_hidden_states pretraining_tp problem_type resid_pdrop "
    "residual_dropout tie_encoder_decoder tie_last_hidden_states transformers.js_config "
    "transformers_version use_cache".split()
)
_WITHOUT_EFFECT_IF = {"is_causal": True, "partial_rotary_factor": 1.0, "sliding_window_pattern": 1}
# Any other key with such a word in it could change what is computed.
_TELLING = re.compile(
    "act|alibi|attention|attn|bias|cap|causal|clip|embed|expert|head|hidden|layer|logit|mlp|moe|"
    "mup|multiplier|norm|position|quant|residual|rope|rotary|scal|slid|soft|window"
)


def reject_unknown(fields: Fields) -> None:
    """Raises on keys that were not read and could change the forward pass."""
    for key in sorted(fields.raw.keys() - fields.asked - _WITHOUT_EFFECT):
        value = fields.raw[key]
        if key in _WITHOUT_EFFECT_IF:
            harmless = value is None or value == _WITHOUT_EFFECT_IF[key]
        else:
            harmless = not value or not _TELLING.search(key)
        if not harmless:
            raise UserError(
                f"{key}={value!r} could change what a {fields.raw['model_type']} model computes "
                "and is not supported: remove the key if the model does not depend on it"
            )
