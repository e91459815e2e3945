"""Retraining a fresh mixture: first its router, then its experts.

DIVE (arXiv 2506.09351), section 3.4, with what it leaves out: a loss that knows the dense model, a
router that learns with one active expert too, balance, and temperatures that training and use share.
"""

from pomona.reconstruction.retraining.settings import (
    ExpertStage,
    Objective,
    Retraining,
    RouterStage,
)
from pomona.reconstruction.retraining.stages import StageState, retrain

__all__ = ["ExpertStage", "Objective", "Retraining", "RouterStage", "StageState", "retrain"]
