"""What rows of a scores frame are called."""

from __future__ import annotations

# Sections that are none: aggregates over all of them.
MEAN, POOLED = "mean of sections", "pooled"
# Baselines that say how much a score is worth. The first two are constants: they know nothing of the image.
TRAINING_MEAN = "mean of training spots"
SECTION_MEAN = "mean of held-out section (oracle)"
POSITION = "position"
