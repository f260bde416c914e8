"""How our docstrings are shown on the site: an extension of griffe, which reads them."""

import re

import griffe


class Ours(griffe.Extension):
    """Comments beside fields are their documentation; tables and dimension keys keep their form."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        """Rewrites the docstring of a module, class or function."""
        if obj.docstring is None:
            return
        text = obj.docstring.value
        # Lines that are set in by two blanks, after an empty one, are a table: shown as they are.
        text = re.sub(
            r"(?<=\n\n)(?:  \S.*\n?)+", lambda table: re.sub("(?m)^", "  ", table[0]), text
        )
        # The second line of a dimension key is set in, which would make a note that folds.
        text = re.sub(r"(?m)^Dimension key: .*(?:\n +.*)*", _one_line, text)
        obj.docstring.value = text

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_) -> None:
        """Takes the comment beside a field, or on the lines above it."""
        if attr.docstring is None and attr.lineno and attr.parent and attr.parent.is_class:
            lines = attr.lines_collection[attr.filepath][: attr.lineno]
            found = [lines.pop().partition("  # ")[2]]
            while (line := lines.pop().strip()).startswith("# "):
                found.insert(0, line.removeprefix("# "))
            if any(found):
                attr.docstring = griffe.Docstring(" ".join(found).strip(), parent=attr)


def _one_line(key: re.Match) -> str:
    return " ".join(line.strip() for line in key[0].splitlines())
