from ._predictions import predictions

__all__ = ["predictions"]
