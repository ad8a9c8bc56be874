"""Fit models to SpatialData, and predict with them."""

from stpredict.tl._fit_m2ost import fit_m2ost
from stpredict.tl._fit_nsl import fit_nsl
from stpredict.tl._predict import predict

__all__ = ["fit_m2ost", "fit_nsl", "predict"]
