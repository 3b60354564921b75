"""The colours that the whole report shares."""

from __future__ import annotations

# told apart with every common colour blindness, and in greyscale
ALONE, CHAIN, STUDENT = "#9aa1ab", "#1f4e8c", "#e0a100"
STRAND_COLOURS = ("#1f4e8c", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#6b4c9a")
STRAND_MARKERS = "osD^vP"


def shade(fraction: float) -> str:
    """Colour of a heat map's cell, for 0 (lowest) to 1 (highest)."""
    from matplotlib import colormaps  # half a second of processor time, which only a report takes
    from matplotlib.colors import to_hex

    return to_hex(colormaps["cividis"](min(max(fraction, 0.0), 1.0)))


def ink_on(background: str) -> str:
    """Black or white, whichever contrasts more with a colour ``#rrggbb`` (relative luminance, WCAG 2.1)."""
    parts = (part / 255 for part in bytes.fromhex(background.removeprefix("#")))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return "#fff" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.179 else "#111"
