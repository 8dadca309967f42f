"""Tables of measurements, ratios first: as text, as Markdown and as numbers."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

MIB = 2**20
OURS, THEIRS = "ours", "diffusers"
RATIO = "{ratio:.2f} ({ratio_low:.2f}–{ratio_high:.2f})"


@dataclass(frozen=True)
class Table:
    """Measurements of one kind.

    Args:
        name: of the table in JSON.
        columns: heading => the text of a cell, a format string over the row.
        rows: names and numbers; more than the columns show.
    """

    name: str
    columns: dict[str, str]
    rows: list[dict[str, Any]]

    def cells(self) -> list[list[str]]:
        """The headings, then the text of every row."""
        return [[*self.columns], *([text.format(**row) for text in self.columns.values()] for row in self.rows)]

    def plain(self) -> str:
        """Aligned columns."""
        cells = self.cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        rows = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
        return "\n".join("  ".join(row).rstrip() for row in rows)

    def markdown(self) -> str:
        """A table of GitHub's dialect."""
        headings, *rows = self.cells()
        return "\n".join(f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows))


def per_run(seconds: Sequence[float], calls: int) -> list[float]:
    """Sums of as many consecutive calls as a run makes."""
    return [sum(seconds[start : start + calls]) for start in range(0, len(seconds), calls)]


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """The ratio of two medians, and the least and greatest ratio of measurements made one after the other."""
    pairs = [a / b for a, b in zip(numerators, denominators, strict=True)]
    median = statistics.median(numerators) / statistics.median(denominators)
    return {"ratio": median, "ratio_low": min(pairs), "ratio_high": max(pairs)}


def comparison(
    titles: dict[str, str], seconds: dict[tuple[str, str], list[float]], differences: dict[str, float]
) -> Table:
    """What `alternate` measured; without the other side, our times alone.

    Args:
        titles: stage => what it is called.
    """
    rows = []
    for stage, title in titles.items():
        ours, theirs = seconds[OURS, stage], seconds.get((THEIRS, stage))
        row = {"what": title, "ours_s": statistics.median(ours)}
        if theirs:
            row |= ratios(ours, theirs) | {
                "diffusers_s": statistics.median(theirs),
                "relative_difference": differences[stage],
            }
        rows.append(row)
    columns = {
        "what": "{what}",
        "ours ÷ diffusers": RATIO,
        "ours, s": "{ours_s:.3f}",
        "diffusers, s": "{diffusers_s:.3f}",
        "relative difference": "{relative_difference:.0e}",
    }
    return Table("comparison", _with_values(columns, rows), rows)


def memory(what: str, replies: dict[str, dict[str, Any]]) -> Table:
    """The greatest resident memory of each process, weights and libraries included.

    Args:
        what: was done meanwhile.
        replies: of each side.
    """
    peaks = {f"{name}_mib": reply["resident_peak"] / MIB for name, reply in replies.items()}
    row = {"what": what} | peaks
    if THEIRS in replies:
        row["ratio"] = peaks[f"{OURS}_mib"] / peaks[f"{THEIRS}_mib"]
    columns = {
        "resident memory during": "{what}",
        "ours ÷ diffusers": "{ratio:.2f}",
        "ours, MiB": "{ours_mib:.0f}",
        "diffusers, MiB": "{diffusers_mib:.0f}",
    }
    return Table("memory", _with_values(columns, [row]), [row])


def overhead(parts: str, generate: list[float], apart: list[float], watched: list[dict[str, Any]]) -> Table:
    """What `generate` takes beside the calls it consists of.

    Args:
        parts: the calls, in words.
        generate: seconds.
        apart: seconds of the parts called one by one, in the same runs.
        watched: answers of a stage of `mlx_side.watched`.
    """
    whole, inside = ([reply[key] for reply in watched] for key in ("seconds", "inside"))
    rows = [
        {
            "how": how,
            **ratios(total, of_parts),
            "generate_s": statistics.median(total),
            "parts_s": statistics.median(of_parts),
        }
        for how, total, of_parts in (("called apart", generate, apart), ("timed inside generate", whole, inside))
    ]
    columns = {
        f"parts: {parts}": "{how}",
        "generate ÷ parts": "{ratio:.3f} ({ratio_low:.3f}–{ratio_high:.3f})",
        "generate, s": "{generate_s:.3f}",
        "parts, s": "{parts_s:.3f}",
    }
    return Table("overhead", columns, rows)


def _with_values(columns: dict[str, str], rows: list[dict[str, Any]]) -> dict[str, str]:
    """The columns whose fields all rows have."""
    fields = {heading: {name for _, name, _, _ in Formatter().parse(text) if name} for heading, text in columns.items()}
    return {heading: columns[heading] for heading, names in fields.items() if all(names <= row.keys() for row in rows)}
