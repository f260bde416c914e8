"""Names and shapes of checkpoints, written down anew: the importer's tables are under test.

Dimension key: D model width  F FFN neurons  V vocabulary  C head width  Q, K width of all heads
               S positions
"""

Shapes = dict[str, tuple[int, ...]]


def tensor_shapes(raw: dict) -> Shapes:
    """Those of the model that a config.json describes."""
    return _KINDS.get(raw["model_type"], _llama)(raw)


def _llama(raw: dict) -> Shapes:
    D, F, V = raw["hidden_size"], raw["intermediate_size"], raw["vocab_size"]
    C = raw.get("head_dim") or D // raw["num_attention_heads"]
    Q, K = raw["num_attention_heads"] * C, raw["num_key_value_heads"] * C
    kind = raw["model_type"]
    attention_bias = raw.get("attention_bias", False)
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not raw["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    for i in range(raw["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": (D,),
            "post_attention_layernorm.weight": (D,),
            "self_attn.q_proj.weight": (Q, D),
            "self_attn.k_proj.weight": (K, D),
            "self_attn.v_proj.weight": (K, D),
            "self_attn.o_proj.weight": (D, Q),
            "mlp.gate_proj.weight": (F, D),
            "mlp.up_proj.weight": (F, D),
            "mlp.down_proj.weight": (D, F),
        }
        if kind == "phi3":
            for name in ("q_proj", "k_proj", "v_proj"):
                del layer[f"self_attn.{name}.weight"]
            layer["self_attn.qkv_proj.weight"] = (Q + 2 * K, D)
            del layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]
            layer["mlp.gate_up_proj.weight"] = (2 * F, D)
        if attention_bias or kind in ("qwen2", "seed_oss"):
            layer |= {
                f"self_attn.{n}_proj.bias": (s,) for n, s in zip("qkv", (Q, K, K), strict=True)
            }
        if raw.get("attention_out_bias") or (attention_bias and kind != "qwen2"):
            layer["self_attn.o_proj.bias"] = (D,)
        if kind in ("qwen3", "gemma3_text"):
            layer |= {"self_attn.q_norm.weight": (C,), "self_attn.k_norm.weight": (C,)}
        if kind in ("olmo2", "olmo3"):
            layer |= {"self_attn.q_norm.weight": (Q,), "self_attn.k_norm.weight": (K,)}
            del layer["input_layernorm.weight"]
            layer["post_feedforward_layernorm.weight"] = (D,)
        if kind == "gemma3_text":
            layer |= {f"{n}_feedforward_layernorm.weight": (D,) for n in ("pre", "post")}
        if kind == "starcoder2":
            del layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]
            del layer["mlp.down_proj.weight"]
            layer |= {"mlp.c_fc.weight": (F, D), "mlp.c_proj.weight": (D, F)}
            if raw.get("use_bias", True):
                layer |= {f"self_attn.{n}_proj.bias": (K if n in "kv" else Q,) for n in "qkvo"}
                layer |= {"self_attn.o_proj.bias": (D,)}
                layer |= {"mlp.c_fc.bias": (F,), "mlp.c_proj.bias": (D,)}
        if kind in ("starcoder2", "stablelm"):
            names = ("input_layernorm", "post_attention_layernorm")
            layer |= {f"{n}.bias": (D,) for n in names}
            shapes["model.norm.bias"] = (D,)
        if raw.get("use_qkv_bias"):
            layer |= {f"self_attn.{n}_proj.bias": (K if n in "kv" else Q,) for n in "qkv"}
        if raw.get("mlp_bias"):
            layer |= {"mlp.gate_proj.bias": (F,), "mlp.up_proj.bias": (F,)}
            layer["mlp.down_proj.bias"] = (D,)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def _dense(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _conv1d(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}


def _norm(name: str, D: int) -> Shapes:
    return {f"{name}.weight": (D,), f"{name}.bias": (D,)}


def _gpt2(raw: dict) -> Shapes:
    D, V, S = raw["n_embd"], raw["vocab_size"], raw["n_positions"]
    F = raw.get("n_inner") or 4 * D
    shapes = {"transformer.wte.weight": (V, D), "transformer.wpe.weight": (S, D)}
    shapes |= _norm("transformer.ln_f", D)
    if not raw["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    for i in range(raw["n_layer"]):
        layer = f"transformer.h.{i}"
        shapes |= _norm(f"{layer}.ln_1", D) | _norm(f"{layer}.ln_2", D)
        shapes |= _conv1d(f"{layer}.attn.c_attn", D, 3 * D) | _conv1d(f"{layer}.attn.c_proj", D, D)
        shapes |= _conv1d(f"{layer}.mlp.c_fc", D, F) | _conv1d(f"{layer}.mlp.c_proj", F, D)
    return shapes


def _opt(raw: dict) -> Shapes:
    D, F, V = raw["hidden_size"], raw["ffn_dim"], raw["vocab_size"]
    shapes = {
        "model.decoder.embed_tokens.weight": (V, D),
        "model.decoder.embed_positions.weight": (raw["max_position_embeddings"] + 2, D),
    }
    shapes |= _norm("model.decoder.final_layer_norm", D)
    if not raw["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    for i in range(raw["num_hidden_layers"]):
        layer = f"model.decoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _dense(f"{layer}.self_attn.{name}", D, D)
        shapes |= _norm(f"{layer}.self_attn_layer_norm", D) | _norm(f"{layer}.final_layer_norm", D)
        shapes |= _dense(f"{layer}.fc1", F, D) | _dense(f"{layer}.fc2", D, F)
    return shapes


def _gpt_neox(raw: dict) -> Shapes:
    D, F, V = raw["hidden_size"], raw["intermediate_size"], raw["vocab_size"]
    shapes = {"gpt_neox.embed_in.weight": (V, D), "embed_out.weight": (V, D)}
    shapes |= _norm("gpt_neox.final_layer_norm", D)
    for i in range(raw["num_hidden_layers"]):
        layer = f"gpt_neox.layers.{i}"
        shapes |= _norm(f"{layer}.input_layernorm", D)
        shapes |= _norm(f"{layer}.post_attention_layernorm", D)
        attention = _dense(f"{layer}.attention.query_key_value", 3 * D, D)
        attention |= _dense(f"{layer}.attention.dense", D, D)
        if not raw.get("attention_bias", True):
            attention = {name: s for name, s in attention.items() if not name.endswith("bias")}
        shapes |= attention
        shapes |= _dense(f"{layer}.mlp.dense_h_to_4h", F, D)
        shapes |= _dense(f"{layer}.mlp.dense_4h_to_h", D, F)
    return shapes


def _bert(raw: dict) -> Shapes:
    """BERT, and RoBERTa, whose heads have other names."""
    D, F, V = raw["hidden_size"], raw["intermediate_size"], raw["vocab_size"]
    S, U = raw["max_position_embeddings"], raw.get("type_vocab_size", 2)
    kind, [head] = raw["model_type"], raw["architectures"]
    masked, classes = head.endswith("MaskedLM"), len(raw.get("id2label", "01"))
    base = f"{kind.removeprefix('xlm-')}." if "For" in head else ""
    shapes = {
        f"{base}embeddings.word_embeddings.weight": (V, D),
        f"{base}embeddings.position_embeddings.weight": (S, D),
        f"{base}embeddings.token_type_embeddings.weight": (U, D),
    }
    shapes |= _norm(f"{base}embeddings.LayerNorm", D)
    for i in range(raw["num_hidden_layers"]):
        layer = f"{base}encoder.layer.{i}"
        for name in ("query", "key", "value"):
            shapes |= _dense(f"{layer}.attention.self.{name}", D, D)
        shapes |= _dense(f"{layer}.attention.output.dense", D, D)
        shapes |= _norm(f"{layer}.attention.output.LayerNorm", D)
        shapes |= _dense(f"{layer}.intermediate.dense", F, D)
        shapes |= _dense(f"{layer}.output.dense", D, F) | _norm(f"{layer}.output.LayerNorm", D)
    if kind == "bert":
        if not masked:
            shapes |= _dense("bert.pooler.dense" if base else "pooler.dense", D, D)
        if masked:
            shapes |= _dense("cls.predictions.transform.dense", D, D)
            shapes |= _norm("cls.predictions.transform.LayerNorm", D)
            shapes |= {"cls.predictions.bias": (V,)}
        elif base:
            shapes |= _dense("classifier", classes, D)
        return shapes
    if masked:
        shapes |= _dense("lm_head.dense", D, D) | _norm("lm_head.layer_norm", D)
        shapes |= {"lm_head.bias": (V,)}
    elif base:
        shapes |= _dense("classifier.dense", D, D) | _dense("classifier.out_proj", classes, D)
    else:
        shapes |= _dense("pooler.dense", D, D)
    return shapes


def _distilbert(raw: dict) -> Shapes:
    D, F, V = raw["dim"], raw["hidden_dim"], raw["vocab_size"]
    [head] = raw["architectures"]
    base = "distilbert." if "For" in head else ""
    shapes = {
        f"{base}embeddings.word_embeddings.weight": (V, D),
        f"{base}embeddings.position_embeddings.weight": (raw["max_position_embeddings"], D),
    }
    shapes |= _norm(f"{base}embeddings.LayerNorm", D)
    for i in range(raw["n_layers"]):
        layer = f"{base}transformer.layer.{i}"
        for name in ("q_lin", "k_lin", "v_lin", "out_lin"):
            shapes |= _dense(f"{layer}.attention.{name}", D, D)
        shapes |= _norm(f"{layer}.sa_layer_norm", D) | _norm(f"{layer}.output_layer_norm", D)
        shapes |= _dense(f"{layer}.ffn.lin1", F, D) | _dense(f"{layer}.ffn.lin2", D, F)
    if head.endswith("MaskedLM"):
        shapes |= _dense("vocab_transform", D, D) | _norm("vocab_layer_norm", D)
        shapes |= {"vocab_projector.bias": (V,)}
    elif base:
        shapes |= _dense("pre_classifier", D, D) | _dense("classifier", 2, D)
    return shapes


_KINDS = {
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
    "bert": _bert,
    "distilbert": _distilbert,
    "roberta": _bert,
    "xlm-roberta": _bert,
}
