"""Maps tensor names as found in checkpoints to those of the table in names.py.

Training wrappers prefix names; a model saved without its head has no `model.`; a tied matrix is
stored under either of its names; old exporters store constants.
"""

from __future__ import annotations

import re
from collections.abc import Collection

EMBEDDING = "model.embed_tokens.weight"
TIED_HEAD = "lm_head.weight"

_WRAPPERS = (  # pattern, replacement; applied if the names of all layers match
    (re.compile(r"(^|\.)_orig_mod\."), r"\1"),  # torch.compile
    (re.compile(r"(^|\.)_fsdp_wrapped_module\."), r"\1"),  # FullyShardedDataParallel
    (re.compile(r"(^|\.)_checkpoint_wrapped_module\."), r"\1"),  # activation checkpointing
    (re.compile(r"^module\."), ""),  # DistributedDataParallel
    (re.compile(r"^base_model\.model\."), ""),  # PEFT
    (re.compile(r"^(model\.)?language_model\."), ""),  # models of images and text
    (re.compile(r"^(?=(layers|embed_tokens|norm)\.)"), "model."),  # saved without the head
)
_LAYER = re.compile(r"(^|\.)layers\.\d+\.")
# What old exporters store besides the parameters: the first follows from config.json.
_CONSTANT = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_UNUSED = re.compile(r"(^|\.)masked_bias$|^score\.weight$")


def to_expected(stored: Collection[str], expected: Collection[str]) -> tuple[dict[str, str], str]:
    """Stored name -> name in the table, and what was done, for the log ("" if nothing was).

    Harmless names that belong to no parameter are left out; other unknown names stay, for the
    caller to reject. Nothing is renamed if two names would become one.
    """
    done = []
    names = {name: name for name in stored if not _CONSTANT.search(name)}
    for pattern, instead in _WRAPPERS:
        layers = [name for name in names.values() if _LAYER.search(name)]
        if layers and all(map(pattern.search, layers)):
            names = {old: pattern.sub(instead, name) for old, name in names.items()}
            first = next(old for old in names if _LAYER.search(old))
            done = [f"{first} and the others are read as {names[first]} and so on"]
    if EMBEDDING in expected and TIED_HEAD not in expected and EMBEDDING not in names.values():
        for old, name in names.items():
            if name == TIED_HEAD:
                names[old] = EMBEDDING
                done.append(f"{old} is read as {EMBEDDING}, to which it is tied")
    unused = [old for old, name in names.items() if _UNUSED.search(name)]
    if unused and set(expected) == set(names.values()) - {names[old] for old in unused}:
        names = {old: name for old, name in names.items() if old not in unused}
        done.append(f"{', '.join(unused[:2])} is left out" + " and so on" * (len(unused) > 2))
    if len(set(names.values())) < len(names):
        return {name: name for name in stored}, ""
    return names, "; ".join(done)
