"""Tables on the terminal: aligned columns and short numbers. Imports no torch and no numpy."""

from collections.abc import Sequence


def short(number: float | None) -> str:
    """12345678 -> '12.3M'; '-' for None."""
    if number is None:
        return "-"
    for unit in ("", "k", "M"):
        # 999.5 would be rounded to 1000, which belongs to the next unit
        if number < 999.5:
            digits = ".3g" if unit else ".0f"
            return f"{number:{digits}}{unit}"
        number /= 1000
    if number < 999.5:
        return f"{number:.3g}B"
    return f"{number:,.0f}B"


def fixed(number: float | None, digits: int = 4) -> str:
    """1.23456 -> '1.2346'; '-' for None."""
    return "-" if number is None else f"{number:.{digits}f}"


def aligned(rows: Sequence[Sequence[str | None]], left: int = 1) -> str:
    """Rows of cells as lines of aligned columns; a cell that is None is shown as '-'.

    The first `left` columns are aligned to the left, the others to the right."""
    filled = [["-" if cell is None else cell for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in filled) for i in range(len(filled[0]))]
    # no blanks at the ends of lines: they wrap in narrow terminals
    sides = ["<"] * left + [">"] * (len(widths) - left)
    lines = []
    for row in filled:
        cells = [
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
