"""Explains folders that hold no model that this library reads: what was found, and what to do.

Every function returns the rest of a sentence that begins with the name of the file or folder; None
if nothing known was found. A new kind is a line of a table.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lte_jax.hf.folder import CONFIG, cached_repository

_FAMILIES = {
    "is a mixture of experts already, which is not supported": (
        "mixtral qwen2_moe qwen3_moe qwen3_next deepseek_v2 deepseek_v3 olmoe phimoe jamba dbrx "
        "granitemoe llama4 llama4_text gpt_oss minimax ernie4_5_moe glm4_moe dots1 jetmoe "
        "nllb_moe switch_transformers hunyuan_v1_moe"
    ),
    "is an encoder of another kind, which is not supported": (
        "albert deberta deberta-v2 electra modernbert camembert mpnet nomic_bert"
    ),
    "has an encoder and a decoder, which is not supported": (
        "t5 mt5 umt5 bart mbart pegasus m2m_100 marian led longt5 prophetnet t5gemma whisper"
    ),
    "reads more than text, which is not supported": (
        "llava llava_next qwen2_vl qwen2_5_vl qwen3_vl qwen2_audio mllama paligemma idefics2 "
        "idefics3 smolvlm gemma3 mistral3 pixtral internvl blip-2"
    ),
    "is no Transformer of attention and feed-forward blocks, which is not supported": (
        "mamba mamba2 falcon_mamba rwkv recurrent_gemma zamba zamba2 bamba falcon_h1"
    ),
    "has blocks of its own, which are not supported": (
        "gptj gpt_neo bloom falcon mpt phi gpt_bigcode codegen olmo "
        "cohere cohere2 nemotron glm glm4 exaone4 persimmon xglm ernie4_5 ministral3 bitnet"
    ),
    "caps its attention scores by a tanh, which is not supported": "gemma2",
}
_QUANTISED_NAMES = {
    r"\.(qweight|qzeros|g_idx)$": "GPTQ or AWQ",
    r"\.weight_scale(_inv)?$": "fp8",
    r"\.weight_(packed|shape)$": "compressed-tensors",
    r"\.(absmax|quant_map|nested_absmax|SCB)$|\.quant_state\b": "bitsandbytes",
}
_ROUTER = ".mlp.router."
_CLASSIFIER = re.compile(r"(^|\.)(score|classifier|qa_outputs)\.")
_ADAPTER = re.compile(r"\.lora_|\.modules_to_save\.")
_CONVERT = (
    "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{}', "
    "dtype='float32').save_pretrained('NEW_FOLDER')\", which needs torch"
)


def family(model_type: str) -> str:
    """Explains a model_type that has no importer."""
    known = (what for what, names in _FAMILIES.items() if model_type in names.split())
    return next(known, "is not supported")


def quantised(settings: Mapping[str, Any]) -> str:
    """Explains the quantization_config of a config.json."""
    method, bits = settings.get("quant_method"), settings.get("bits")
    told = [method] if isinstance(method, str) else []
    told += [f"{bits} bits"] if isinstance(bits, int) else []
    return f"quantization_config: the weights are {_quantised(', '.join(told) or 'quantised')}"


def in_folder(folder: Path) -> str | None:
    """Explains a folder without config.json, or with one but no safetensors."""
    checkpoints = sorted(folder.glob(f"checkpoint-*/{CONFIG}"), key=_step)
    adapter, gguf, pth = (_first(folder, g) for g in ("adapter_config.json", "*.gguf", "*.pth"))
    if repository := unfinished(folder):
        return f"is an unfinished download: hf download {repository}"
    if snapshots := sorted(folder.glob("snapshots/*"), key=os.path.getmtime):
        return f"is a folder of the hub's cache: name its newest model, {snapshots[-1]}"
    if (folder / "lte" / CONFIG).exists():
        return f"is the work directory of a run: name a model in it, such as {folder / 'lte'}"
    if checkpoints:
        return (
            f"holds {len(checkpoints)} checkpoints of a Trainer, not a model: name one of them, "
            f"such as the newest, {checkpoints[-1].parent}"
        )
    if adapter:
        return (
            'holds a PEFT adapter, not a model: merge it into its model: python -c "from '
            f"peft import AutoPeftModelForCausalLM as M; M.from_pretrained('{folder}')"
            ".merge_and_unload().save_pretrained('NEW_FOLDER')\""
        )
    if gguf:
        return (
            f"holds {gguf}, a GGUF file of llama.cpp, and only safetensors are read: name the "
            "model that it was converted from"
        )
    if pth:
        return (
            f"holds {pth}, weights in Meta's own format, and only safetensors are read: name the "
            "model's folder in Hugging Face format, such as meta-llama/Llama-2-7b-hf on the hub"
        )
    return None


def unfinished(folder: Path) -> str | None:
    """The hub id whose download left this folder of the hub's cache incomplete, or None."""
    repository = cached_repository(folder)
    blobs = Path(os.path.realpath(folder)).parent.parent / "blobs"
    broken = any(blobs.glob("*.incomplete")) or not all(file.exists() for file in folder.iterdir())
    return repository if repository and broken else None


def misfit(
    raw: Mapping[str, Any],
    dtypes: Mapping[str, str],
    missing: Sequence[str],
    extra: Sequence[str],
) -> str | None:
    """Explains tensors other than config.json asks for; `dtypes` as safetensors spells them."""
    for pattern, method in _QUANTISED_NAMES.items():
        if named := next((name for name in extra if re.search(pattern, name)), None):
            return f"holds {named}: the weights are {_quantised(method)}"
    if any(map(_ADAPTER.search, extra)):
        return (
            "holds the weights of a PEFT adapter (lora_A, lora_B) beside those of the model: load "
            "it with peft, then merge_and_unload() and save_pretrained() give a folder to read"
        )
    routers = any(_ROUTER in name for name in dtypes)
    if missing and not routers and all(_ROUTER in name for name in missing):
        return (
            f'lacks its routers, such as {missing[0]}: config.json has the section "lte", but '
            "another program, such as save_pretrained of transformers, left them out: use the "
            'folder as lte_jax wrote it, or remove "lte" from config.json for the dense model'
        )
    head = next((name for name in dtypes if _CLASSIFIER.search(name)), None)
    if head and "lm_head.weight" in missing:
        return (
            f"holds a classifier: {head} stands where a language model has lm_head.weight: name "
            "the language model that it was made from"
        )
    architecture = str((raw.get("architectures") or [""])[0])
    if list(missing) == ["lm_head.weight"] and architecture.endswith("Model"):
        return (
            f"was saved as {architecture}, without its head lm_head.weight: save it as "
            f"{architecture.removesuffix('Model')}ForCausalLM"
        )
    return None


def dtype(folder: Path, stored: str) -> str:
    """What to do about tensors of an unsupported type."""
    if stored == "F64":
        return f"convert the model to float32: {_CONVERT.format(folder)}"
    return "store them unquantised, or name the model that they were quantised from"


def only_other_formats(folder: Path) -> str:
    """Explains a folder with config.json and without safetensors."""
    if found := in_folder(folder):
        return found
    held = _first(folder, "*.bin")
    return (
        f"has no model.safetensors, and only safetensors are read: convert "
        f"{held or 'another format'} with {_CONVERT.format(folder if held else 'MODEL')}"
    )


def _quantised(method: str) -> str:
    return (
        f"quantised ({method}), and only float32, bfloat16 and float16 are read: name the model "
        "that it was quantised from, or save the result of transformers' dequantize()"
    )


def _first(folder: Path, pattern: str) -> str | None:
    return next((file.name for file in sorted(folder.glob(pattern))), None)


def _step(config: Path) -> int:
    number = config.parent.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() and len(number) < 20 else -1
