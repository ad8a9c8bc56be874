from .evaluation.runs._cross_validate import cross_validate
from .evaluation.runs._noise_ceiling import noise_ceiling
from .evaluation.runs._score import score
from .evaluation.runs._summarize import summarize
from .fitting._fit_m2ost import fit_m2ost
from .fitting._fit_nsl import fit_nsl
from .fitting._fit_ridge import fit_ridge
from .fitting._predict import predict

__all__ = ["cross_validate", "fit_m2ost", "fit_nsl", "fit_ridge", "noise_ceiling", "predict", "score", "summarize"]
