"""Faults with model folders as people have them: lines 21 and 22 of the list."""

from mutant import Mutant

_RENAMING, _HARMLESS = "lte_jax/hf/renaming.py", "lte_jax/hf/harmless.py"
_FOREIGN, _HUB = "lte_jax/hf/foreign.py", "lte_jax/hf/hub.py"
_NAMES = "tests/test_hf_renaming.py::test_names_of_other_writers"
_KEYS = "tests/test_hf_config_json.py::test_harmless_keys"
_KINDS = "tests/test_hf_foreign.py::test_bad_input_folder_of_another_kind"
_SPELLINGS = "tests/test_hf_hub.py::test_spellings_of_a_hub_model"

MUTANTS: list[Mutant] = [
    Mutant(
        "21 a tied model whose file has the head alone",
        _RENAMING,
        "            if name == head:",
        "            if False:",
        _NAMES,
    ),
    *(
        Mutant(f"21 names {what}", _RENAMING, pattern, 'r"^never\\."', _NAMES)
        for what, pattern in {
            "with _orig_mod.": 'r"(^|\\.)_orig_mod\\."',
            "with module.": 'r"^module\\."',
            "with base_model.model.": 'r"^base_model\\.model\\."',
            "with language_model.": 'r"^(model\\.)?language_model\\."',
        }.items()
    ),
    Mutant(
        "21 names without model.",
        _RENAMING,
        "    bare = {old: name for old, name in whole.items() if name in expected}",
        "    bare = {}",
        _NAMES,
    ),
    Mutant(
        "21 score.weight beside a whole model",
        _RENAMING,
        "masked_bias$|^score\\.weight$",
        "masked_bias$",
        _NAMES,
    ),
    Mutant(
        "21 masked_bias beside a whole model",
        _RENAMING,
        'r"(^|\\.)masked_bias$|^score',
        'r"^score',
        _NAMES,
    ),
    Mutant(
        "21 a renaming is not said",
        "lte_jax/hf/weights.py",
        "    if done and expected == set(renamed.values()):",
        "    if False:",
        _NAMES,
    ),
    Mutant(
        "21 a renaming is said at every load",
        "lte_jax/hf/stored.py",
        "@functools.cache\ndef say_once",
        "@functools.lru_cache(maxsize=0)\ndef say_once",
        _NAMES,
    ),
    Mutant(
        "21 shards without an index",
        "lte_jax/hf/stored.py",
        "if index is not None else _files(folder):",
        "if index is not None else [ONE_FILE]:",
        "tests/test_hf_stored.py::test_shards_without_an_index",
    ),
    Mutant(
        "21 a set of shards that is not whole",
        "lte_jax/hf/stored.py",
        "        if absent := next((name for name in whole if name not in held), None):",
        "        if absent := None:",
        "tests/test_hf_stored.py::test_bad_input_shard_of_a_set_absent",
    ),
    *(
        Mutant(f"21 the key {key}", _HARMLESS, words, words.replace(key, ""), f"{_KEYS}[{case}]")
        for key, words, case in (
            ("layer_norm_eps", "layer_norm_eps layer_norm_epsilon", "layer_norm_eps"),
            ("num_logits_to_keep", "num_logits_to_keep", "num_logits_to_keep"),
            ("classifier_activation", "classifier_activation", "classifier"),
            ('"sliding_window_pattern": 1', '"sliding_window_pattern": 1', "pattern"),
        )
    ),
    Mutant(
        "21 layer_types of a Mistral",
        "lte_jax/hf/windows.py",
        "        if named is not None and set(named) != {window is not None}:",
        "        if named is not None and set(named) != {False}:",
        _KEYS,
    ),
    Mutant(
        "21 bos_token_id and pad_token_id as lists of one",
        "lte_jax/hf/fields.py",
        "if isinstance(value, list) and len(value) == 1:",
        "if False:",
        _KEYS,
    ),
    Mutant(
        "21 max_window_layers of null",
        "lte_jax/hf/windows.py",
        "int if window and not named else (int, NULL), 28)",
        "int, 28)",
        f"{_KEYS}[max_window_layers]",
    ),
    Mutant(
        "21 dtype auto",
        "lte_jax/hf/config_json.py",
        'if name not in (None, "auto")]',
        "if name is not None]",
        f"{_KEYS}[dtype]",
    ),
    Mutant(
        "22 a classifier is told to tie its embeddings",
        _FOREIGN,
        '    if head and "lm_head.weight" in missing:',
        "    if False:",
        "tests/test_hf_foreign.py::test_bad_input_classifier",
    ),
    Mutant(
        "22 a quantised model is told to drop a key",
        "lte_jax/hf/config_json.py",
        "    if fields.get(scaled.KEY, dict, None) and scaled.format_of(raw) is None:",
        "    if False:",
        "tests/test_hf_foreign.py::test_bad_input_quantised",
    ),
    *(
        Mutant(
            f"22 tensors of {method} are extra ones",
            _FOREIGN,
            pattern,
            'r"^never$"',
            "tests/test_hf_foreign.py::test_bad_input_quantised_tensors_alone",
        )
        for method, pattern in {
            "GPTQ": 'r"\\.(qweight|qzeros|g_idx)$"',
            "fp8": 'r"\\.weight_scale(_inv)?$"',
            "bitsandbytes": 'r"\\.(absmax|quant_map|nested_absmax|SCB)$|\\.quant_state\\b"',
        }.items()
    ),
    Mutant(
        "22 float64 is said to be quantised",
        _FOREIGN,
        '    if stored == "F64":',
        "    if False:",
        "tests/test_hf_foreign.py::test_bad_input_float64",
    ),
    *(
        Mutant(
            f"22 {what} has no config.json", _FOREIGN, f"    if {name}:", "    if False:", _KINDS
        )
        for what, name in {
            "a PEFT adapter": "adapter",
            "a GGUF file": "gguf",
            "a model of Meta's": "pth",
            "a Trainer's folder": "checkpoints",
        }.items()
    ),
    Mutant(
        "22 a half-filled hub cache is an odd folder",
        _FOREIGN,
        "return repository if repository and broken else None",
        "return None",
        "tests/test_hf_foreign.py::test_bad_input_unfinished_download",
    ),
    Mutant(
        "22 Mixtral is of an unknown family",
        _FOREIGN,
        '"mixtral qwen2_moe',
        '"qwen2_moe',
        "tests/test_hf_foreign.py::test_bad_input_known_families",
    ),
    Mutant(
        "22 a tied head stored in another type is another head",
        "lte_jax/hf/weights.py",
        "    if a.shape != b.shape or not",
        "    if a.shape != b.shape or a.dtype != b.dtype or not",
        "tests/test_hf_weights.py::test_tied_head_of_another_type",
    ),
    Mutant(
        "22 an LTE folder without its routers is to be downloaded again",
        _FOREIGN,
        "    if missing and not routers and all(_ROUTER in name for name in missing):",
        "    if False:",
        "tests/test_hf_foreign.py::test_bad_input_lte_folder_without_its_routers",
    ),
    Mutant(
        "22 id@revision is no hub id",
        _HUB,
        "(?:@(?P<revision>",
        "(?:@@(?P<revision>",
        _SPELLINGS,
    ),
    Mutant(
        "22 the revision of an id is forgotten",
        _HUB,
        'revision=named["revision"] and unquote(named["revision"]),',
        "revision=None,",
        _SPELLINGS,
    ),
    Mutant(
        "22 the address of a model is no hub id",
        _HUB,
        "named = _HUB_URL.fullmatch(spelled) or _HUB_ID.fullmatch(spelled)",
        "named = _HUB_ID.fullmatch(spelled)",
        _SPELLINGS,
    ),
    Mutant(
        "22 ~ is a folder of that name",
        "lte_jax/files.py",
        "return Path(path).expanduser()",
        "return Path(path)",
        "tests/test_hf_hub.py::test_home_folder_and_trailing_slash",
    ),
    Mutant(
        "22 --workdir=~/x makes a folder named ~",
        "lte_jax/pipeline.py",
        '    paths = Paths(files.expand(workdir, "workdir"))\n    with _alone(paths):\n        on',
        "    paths = Paths(Path(workdir))\n    with _alone(paths):\n        on",
        "tests/test_workdir.py::test_train_takes_the_lock_of_the_directory_that_a_shell_would_mean",
    ),
]
