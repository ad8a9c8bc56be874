"""Fit models to SpatialData, predict with them, and score what they predict."""

from stpredict.tl.evaluation.runs._cross_validate import cross_validate
from stpredict.tl.evaluation.runs._noise_ceiling import noise_ceiling
from stpredict.tl.evaluation.runs._score import score
from stpredict.tl.evaluation.runs._summarize import summarize
from stpredict.tl.fitting._fit_m2ost import fit_m2ost
from stpredict.tl.fitting._fit_nsl import fit_nsl
from stpredict.tl.fitting._fit_ridge import fit_ridge
from stpredict.tl.fitting._predict import predict

__all__ = ["cross_validate", "fit_m2ost", "fit_nsl", "fit_ridge", "noise_ceiling", "predict", "score", "summarize"]
