"""Which elements of a SpatialData, and which columns of its table, a call is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Elements:
    """The element arguments of a public function, parsed once.

    Attributes
    ----------
    image_key
        Key in ``sdata.images``, or one for each spots element, ``{shapes_key: image_key}``. `None` takes the finest image
        under each spots element.
    shapes_key
        Key or keys in ``sdata.shapes``. `None` takes all spots that the table annotates.
    table_key
        Key in ``sdata.tables``. `None` takes the only one that annotates spots.
    coordinate_system
        Where spots and images meet. `None` takes any that they share.
    section_key
        Column of ``obs`` that names sections. `None` means the table's region column.
    patient_key
        Column of ``obs`` that names patients. `None` means that patients are not known.
    """

    image_key: str | Mapping[str, str] | None = None
    shapes_key: str | Sequence[str] | None = None
    table_key: str | None = None
    coordinate_system: str | None = None
    section_key: str | None = None
    patient_key: str | None = None

    def __post_init__(self) -> None:
        for name in ("table_key", "coordinate_system", "section_key", "patient_key"):
            if not isinstance(value := getattr(self, name), str | None):
                raise TypeError(f"`{name}` is {value!r}; expected a string or None.")
        if not isinstance(self.image_key, str | Mapping | None):
            raise TypeError(f"`image_key` is {self.image_key!r}; expected a string, {{shapes_key: image_key}} or None.")
        if isinstance(self.shapes_key, Sequence) and not isinstance(self.shapes_key, str):
            object.__setattr__(self, "shapes_key", tuple(self.shapes_key))
        elif not isinstance(self.shapes_key, str | None):
            raise TypeError(f"`shapes_key` is {self.shapes_key!r}; expected a string, a list of strings or None.")

    @property
    def chosen_spots(self) -> tuple[str, ...] | None:
        """The spots elements that are asked for; `None` asks for all."""
        return (self.shapes_key,) if isinstance(self.shapes_key, str) else self.shapes_key  # type: ignore[return-value]

    def image_of(self, spots: str) -> str | None:
        """The image that is asked for under a spots element; `None` asks for the finest."""
        return self.image_key.get(spots) if isinstance(self.image_key, Mapping) else self.image_key
