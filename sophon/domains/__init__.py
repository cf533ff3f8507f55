"""Where images come from: data sets, class subsets, splits with hashes, and batches on the device.

Images stay ``uint8`` until a task normalises them. A set lives on the device whole, or is decoded as it is read.
"""

from sophon.domains.batches import AUGMENTATIONS, batch_indices, batches, evaluation_batches
from sophon.domains.python_data import Domain
from sophon.domains.sources import SOURCES, load_source
from sophon.domains.splits import classes_of_all, defenders_images, few_shot, load_original, load_restricted
from sophon.domains.streamed import StreamedImages, joined
from sophon.domains.types import Batch, ImageSet, LoadedDomain, MemoryImages

__all__ = [
    "AUGMENTATIONS",
    "SOURCES",
    "Batch",
    "Domain",
    "ImageSet",
    "LoadedDomain",
    "MemoryImages",
    "StreamedImages",
    "batch_indices",
    "batches",
    "classes_of_all",
    "defenders_images",
    "evaluation_batches",
    "few_shot",
    "joined",
    "load_original",
    "load_restricted",
    "load_source",
]
