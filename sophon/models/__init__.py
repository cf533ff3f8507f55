"""Models and what must travel with their weights."""

from sophon.models.classifiers import build, head_prefix, load_weights, spec_from_config, with_fresh_head
from sophon.models.spec import ModelSpec

__all__ = ["ModelSpec", "build", "head_prefix", "load_weights", "spec_from_config", "with_fresh_head"]
