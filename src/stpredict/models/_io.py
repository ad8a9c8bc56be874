"""Reading saved models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stpredict.models._fields import DamagedError, get, short
from stpredict.models._files import opened
from stpredict.models._registry import MODELS, model_class

if TYPE_CHECKING:
    from os import PathLike


def load(path: str | PathLike[str]) -> Any:
    """Read a fitted model that was saved with its ``save`` method.

    Only JSON and safetensors are read; nothing is unpickled, so a file from a stranger cannot run code. Checksums are
    compared, and every value is checked before it is used.

    Parameters
    ----------
    path
        The folder; ``~`` is the home folder.

    Returns
    -------
    The fitted model, of the class that was saved.

    Raises
    ------
    FileNotFoundError
        There is no saved model at ``path``.
    ValueError
        The folder is damaged (file and field are named), or was not written by this package, or by a later version of it.

    Examples
    --------
    >>> import stpredict as stp
    >>> sdata = stp.datasets.synthetic(n_spots=50)
    >>> model = stp.tl.fit_nsl(sdata)
    >>> folder = model.save("nsl-synthetic")
    >>> stp.models.load("nsl-synthetic").genes == model.genes
    True
    """
    with opened(path) as (header, arrays):
        kind = get(header, "kind")
        if not isinstance(kind, str) or kind not in MODELS:
            raise DamagedError("kind", f"is {short(kind)}; known are {list(MODELS)}")
        try:
            return model_class(kind).from_state(header, arrays)
        except DamagedError:
            raise
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise DamagedError("kind", f"is {kind!r}, of which this is no model: {error!r}") from error
