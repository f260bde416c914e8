"""Maps tensor names as found in checkpoints to those of the table in names.py.

Training wrappers prefix names; a model saved without its head has no `model.`; a tied matrix is
stored under either of its names; old exporters store constants.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from lte_jax.hf.family import Family

_WRAPPERS = (  # pattern, replacement; applied if the names of all layers match
    (r"(^|\.)_orig_mod\.", r"\1"),  # torch.compile
    (r"(^|\.)_fsdp_wrapped_module\.", r"\1"),  # FullyShardedDataParallel
    (r"(^|\.)_checkpoint_wrapped_module\.", r"\1"),  # activation checkpointing
    (r"^module\.", ""),  # DistributedDataParallel
    (r"^base_model\.model\.", ""),  # PEFT
    (r"^(model\.)?language_model\.", ""),  # models of images and text
)
_LAYER = re.compile(r"(^|\.)[a-z]\w*\.\d+\.")
# What old exporters store besides the parameters: the first follows from config.json.
_CONSTANT = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_UNUSED = re.compile(r"(^|\.)masked_bias$|^score\.weight$")


def to_expected(
    stored: Collection[str], expected: Collection[str], family: Family
) -> tuple[dict[str, str], str]:
    """Stored name -> name in the table, and what was done, for the log ("" if nothing was).

    Harmless names that belong to no parameter are left out; other unknown names stay, for the
    caller to reject. Nothing is renamed if two names would become one.
    """
    done = []
    constant = re.compile(f"{_CONSTANT.pattern}|{family.constants}")
    names = {name: name for name in stored if not constant.search(name)}
    for old, new in family.renamed.items():
        names = {stored: re.sub(old, new, name) for stored, name in names.items()}
    for pattern, instead in _WRAPPERS:
        layers = [name for name in names.values() if _LAYER.search(name)]
        if layers and all(re.search(pattern, name) for name in layers):
            names = {old: re.sub(pattern, instead, name) for old, name in names.items()}
            done = _said(names)
    whole = {old: family.prefix + name for old, name in names.items()}
    bare = {old: name for old, name in whole.items() if name in expected}
    if bare and not any(name.startswith(family.prefix) for name in names.values()):
        names |= bare  # saved without the head
        done = _said(bare)
    embedding, head = (family.tensors[path][0] for path in ("embed/embedding", "lm_head/kernel"))
    if embedding in expected and head not in expected and embedding not in names.values():
        for old, name in names.items():
            if name == head:
                names[old] = embedding
                done.append(f"{old} is read as {embedding}, to which it is tied")
    unused = [old for old, name in names.items() if _UNUSED.search(name)]
    if unused and set(expected) == set(names.values()) - {names[old] for old in unused}:
        names = {old: name for old, name in names.items() if old not in unused}
        done.append(f"{', '.join(unused[:2])} is left out" + " and so on" * (len(unused) > 2))
    if len(set(names.values())) < len(names):
        return {name: name for name in stored}, ""
    return names, "; ".join(done)


def _said(names: dict[str, str]) -> list[str]:
    first = next((old for old in names if _LAYER.search(old)), next(iter(names)))
    return [f"{first} and the others are read as {names[first]} and so on"]
