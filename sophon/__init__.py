"""Make pre-trained models non-fine-tunable in a restricted domain, and audit how well that holds."""

from sophon._torchvision import mend_on_import

mend_on_import()

__version__ = "0.1.0"
