"""Shows the comments behind a class's fields on the API pages, as mkdocs.yml asks for.

The code says what a field is behind it, ``logits: Tensor  # (batch, num_classes)``, where Python
has no docstring. This makes them the "Attributes" of the class's docstring, for the pages only.
"""

from typing import Any

from griffe import Attribute, Class, Docstring, Extension


class FieldComments(Extension):
    """An extension of griffe, which reads the code for mkdocstrings."""

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        """Append the section, once a class has been read."""
        comments = {
            name: comment_of(member)
            for name, member in cls.members.items()
            if isinstance(member, Attribute) and not name.startswith("_") and not member.docstring
        }
        lines = [f"    {name}: {comment}" for name, comment in comments.items() if comment]
        if lines and isinstance(cls.docstring, Docstring):
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(lines)


def comment_of(field: Attribute) -> str:
    """What stands behind a field, with a capital letter and a full stop; empty if nothing does."""
    _, _, comment = (field.lines[-1] if field.lines else "").partition("  # ")
    comment = comment.split("  # ")[0].strip()
    if not comment or comment.startswith(("noqa", "type: ")):
        return ""
    return comment[0].upper() + comment[1:].removesuffix(".") + "."
