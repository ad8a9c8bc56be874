"""Pictures; all of them only read the data."""

from stpredict.pl._expression import expression
from stpredict.pl._history import history
from stpredict.pl._scatter import scatter
from stpredict.pl._scores import scores
from stpredict.pl._stains import stains

__all__ = ["expression", "history", "scatter", "scores", "stains"]
