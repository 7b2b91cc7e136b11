"""Evaluation of trained models: perplexity, and the paper's tasks through lm-evaluation-harness."""

from retnet.evals.corpus import Corpus
from retnet.evals.models import Candidate, open_model
from retnet.evals.perplexity import Measured, Result, measure

__all__ = ["Candidate", "Corpus", "Measured", "Result", "measure", "open_model"]
