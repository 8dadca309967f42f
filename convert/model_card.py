"""Model cards: the one thing that is read from them is which model a model was made from."""

import re

FENCE = "---"
FIELD = re.compile(r"base_model:(?:\s+(?P<value>.*))?$")
ITEM = re.compile(r"\s*-\s+(?P<value>.*)$")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def base_model_of_card(text: str) -> str | None:
    """The first `base_model` in the front matter of a README.

    Written as a value, a list in brackets or a list of lines, which is how the Hub's own tools write it.

    Args:
        text: the whole README.

    Returns:
        A Hub id; None where the card names none.
    """
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != FENCE:
        return None
    fences = [number for number, line in enumerate(lines[1:], start=1) if line.rstrip() == FENCE]
    header = lines[1 : fences[0]] if fences else []
    for number, line in enumerate(header):
        if field := FIELD.match(line):
            item = next((ITEM.match(later) for later in header[number + 1 :] if not _is_blank(later)), None)
            return _hub_id(field["value"] or "") or _hub_id(item["value"] if item else "")
    return None


def _is_blank(line: str) -> bool:
    return not line.strip() or line.lstrip().startswith("#")


def _hub_id(value: str) -> str | None:
    """The first id in a value, a quoted value or a list in brackets."""
    plain = re.sub(r"\s+#.*$", "", value).strip().removeprefix("[").removesuffix("]")
    first = plain.partition(",")[0].strip().strip("'\"")
    return first if HUB_ID.fullmatch(first) else None
