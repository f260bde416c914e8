"""A message to the user is one line that a terminal can print, whatever it quotes."""

import pickle

import pytest

from lte_jax.errors import MAX_LENGTH, UserError


@pytest.mark.parametrize(
    ("quoted", "shown"),
    [
        ("tab\there", "tab\\there"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("lone \udc80", "lone \\udc80"),
        ("line\nfeed", "line feed"),
        ("Grüße, 日本", "Grüße, 日本"),
        ("two  blanks", "two  blanks"),
    ],
)
def test_what_is_quoted_is_printable(quoted, shown):
    error = UserError(f"{quoted}: mend it")
    assert str(error) == f"{shown}: mend it"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_long_messages_keep_culprit_and_mend():
    line = str(UserError(f"config.json: key={'x' * 10_000}: remove the key"))
    assert len(line) <= MAX_LENGTH
    assert line.startswith("config.json: key=xx") and line.endswith("xx: remove the key")
    assert " ... " in line
    exact = "y" * MAX_LENGTH
    assert str(UserError(exact)) == exact
