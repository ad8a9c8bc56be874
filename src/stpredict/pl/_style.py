"""Colours, marks and numbers, the same in all pictures of scores."""

from __future__ import annotations

from matplotlib.patheffects import withStroke

# Okabe and Ito's palette, without black, which marks genes, and a yellow that is too light for lines.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BASELINE = "0.6"
CEILING, CEILING_MEDIAN = "#F6EBCB", "#B8860B"
# Genes of interest, in turn.
MARKERS = "osD^vP*X"
# From few to many.
DENSITY = ("#BBD6EB", "#08306B")
# Lets text be read across points and lines.
HALO = withStroke(linewidth=2.5, foreground="white")


def number(value: float) -> str:
    """Two decimals, a true minus, and no negative zero."""
    return f"{value:z.2f}".replace("-", "−")


def plain(text: str) -> str:
    """Names as they are: a dollar sign begins no formula."""
    return text.replace("$", r"\$")
