from ._expression import expression
from ._history import history
from ._scatter import scatter
from ._scores import scores
from ._stains import stains

__all__ = ["expression", "history", "scatter", "scores", "stains"]
