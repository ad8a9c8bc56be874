"""Fit models to SpatialData, predict with them, and score what they predict."""

from stpredict.tl._cross_validate import cross_validate
from stpredict.tl._fit_m2ost import fit_m2ost
from stpredict.tl._fit_nsl import fit_nsl
from stpredict.tl._fit_ridge import fit_ridge
from stpredict.tl._noise_ceiling import noise_ceiling
from stpredict.tl._predict import predict
from stpredict.tl._score import score
from stpredict.tl._summarize import summarize

__all__ = ["cross_validate", "fit_m2ost", "fit_nsl", "fit_ridge", "noise_ceiling", "predict", "score", "summarize"]
