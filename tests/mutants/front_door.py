"""Faults of the command line and of what a program's first lines meet."""

from mutant import Mutant

_CONVERT, _TEXTS = "lte_jax/cli/convert.py", "lte_jax/generation/texts.py"

MUTANTS: list[Mutant] = [
    Mutant(
        "front: a chat begins with two tokens that begin a text",
        _TEXTS,
        "for p in prompts], tokenizer, start=False)",
        "for p in prompts], tokenizer, start=True)",
        "tests/test_generate.py::"
        "test_a_chat_puts_the_prompt_in_the_template_and_ends_with_the_tokenizers_end",
    ),
    Mutant(
        "front: a chat does not end where the tokenizer says",
        _TEXTS,
        "ends = {*model.config.eos_ids, tokenizer.eos_token_id} - {None}\n        settings",
        "ends = {*model.config.eos_ids}\n        settings",
        "tests/test_generate.py::"
        "test_a_chat_puts_the_prompt_in_the_template_and_ends_with_the_tokenizers_end",
    ),
    Mutant(
        "front: of several prompts one is continued",
        "lte_jax/cli/generate.py",
        "for i, prompt in enumerate(prompts):",
        "for i, prompt in enumerate(prompts[:1]):",
        "tests/test_cli.py::test_prompts_of_arguments_a_file_and_a_pipe_are_the_same",
    ),
    Mutant(
        "front: a dense model takes any routing",
        "lte_jax/checks.py",
        "if model.lte is None and routing is not None",
        "if False and routing is not None",
        "tests/test_mistakes.py::test_bad_input_mistakes",
    ),
    Mutant(
        "front: neurons stay in the order of experts",
        _CONVERT,
        "if order_NEM is None:  # unknown",
        "if True:  # unknown",
        "tests/test_cli.py::test_an_lte_model_as_the_dense_one_it_was_made_from",
    ),
    Mutant(
        "front: soft routing becomes dense",
        _CONVERT,
        'if model.lte.routing == "soft":',
        "if False:",
        "tests/test_cli.py::test_bad_input_convert",
    ),
    Mutant(
        "front: a converted model forgets its neurons' order",
        _CONVERT,
        "params, folder, order, dtype",
        "params, folder, None, dtype",
        "tests/test_cli.py::test_another_dtype_keeps_routers_order_and_tokenizer",
    ),
    Mutant(
        "front: configs are found in the checkout alone",
        "lte_jax/config/loading.py",
        'if name in own and str(file.parent) in (".", str(Path("configs", kind))):',
        "if False:",
        "tests/test_config.py::test_the_packages_configs_are_found_from_anywhere",
    ),
    Mutant(
        "front: transformers advises to install PyTorch",
        "lte_jax/hf/tokenizer.py",
        'return not record.getMessage().startswith("PyTorch was not found")',
        "return True",
        "tests/test_hf_tokenizer.py::test_no_advice_to_install_pytorch",
    ),
    Mutant(
        "front: a GGUF file has the halves of heads as they are",
        "lte_jax/export_gguf/file.py",
        "if family.interleaved else 0",
        "if False else 0",
        "tests/test_export_gguf.py::test_the_tensors_are_those_of_the_folder",
    ),
    Mutant(
        "front: a GGUF file is written of a model with routers",
        "lte_jax/export_gguf/file.py",
        "if model.lte is not None:",
        "if False:",
        "tests/test_export_gguf.py::test_bad_input_models_without_a_gguf",
    ),
    Mutant(
        "front: the last merge makes the best token",
        "lte_jax/export_gguf/vocabulary.py",
        "scores[left + right] = -float(rank)",
        "scores[left + right] = float(rank)",
        "tests/test_export_gguf.py::test_scores_rank_tokens_by_the_first_merge_that_makes_them",
    ),
    Mutant(
        "front: a model without a tokenizer is saved in silence",
        "lte_jax/__init__.py",
        "if not _hf.has_tokenizer(_expand(path)):",
        "if False:",
        "tests/test_mistakes.py::test_a_model_saved_without_a_tokenizer_says_so",
    ),
]
