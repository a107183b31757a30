"""Decoded answers in a line of text."""

from typing import Any

SHARES = ("confidence", "probability", "probabilities", "shares")  # printed in percent
LONGEST = 60  # characters of a text, such as a word; a picture in base64 has more
MOST_NUMBERS = 4  # of a list


def in_a_line(value: Any) -> str:
    """Format an answer: its first text, then each part by name; what is too long is only named.

    Example:
        >>> in_a_line({"text": "ab", "confidence": 0.5, "characters": [{"char": "a"}]})
        'ab  confidence 50.0%  (--json: characters)'
        >>> in_a_line({"place": None, "score": 12.25, "best": {}})
        'none  score 12.25'
        >>> in_a_line({"shares": {"sky": 0.25, "floor": 0.75}, "obstacles": {"left": None}})
        'shares: sky 25.0%, floor 75.0%  obstacles: left none'
    """
    if not isinstance(value, dict):
        return str(value)
    shown, long = list[str](), list[str]()
    for name, part in value.items():
        inner = part if isinstance(part, dict) else {"": part}
        texts = {key: _text(each, name in SHARES) for key, each in inner.items()}
        short = [f"{key} {text}".lstrip() for key, text in texts.items() if text is not None]
        left = [f"{name} {key}".rstrip() for key, text in texts.items() if text is None]
        long += left if short else [name] * bool(left)
        if short:
            bare = not shown and isinstance(part, str | list | None)
            colon = ":" * isinstance(part, dict)
            shown.append(", ".join(short) if bare else f"{name}{colon} {', '.join(short)}")
    if long:
        shown.append(f"(--json: {', '.join(long)})")
    return "  ".join(shown)


def _text(part: Any, share: bool) -> str | None:
    """Format a part of an answer; None if it is too long for a line."""
    if part is None:
        return "none"
    if isinstance(part, float):
        return f"{part:.1%}" if share else f"{part:.4g}"
    if isinstance(part, list):
        plain = len(part) <= MOST_NUMBERS and all(isinstance(each, int | float) for each in part)
        return " ".join(f"{each:.4g}" for each in part) if plain else None
    text = str(part)
    return text if len(text) <= LONGEST else None
