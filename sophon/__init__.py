"""Make pre-trained models non-fine-tunable in a restricted domain, and audit how well that holds."""

from sophon._torchvision import ensure_torchvision_imports

ensure_torchvision_imports()

__version__ = "0.1.0"
