"""Where images come from: data sets, class subsets, splits with hashes, and batches on the device.

Images stay ``uint8`` until a task normalises them, so a small set lives on the device whole.
"""

from sophon.domains.batches import AUGMENTATIONS, batch_indices, batches, evaluation_batches
from sophon.domains.clusters import with_clusters
from sophon.domains.sources import SOURCES, load_source
from sophon.domains.splits import few_shot, load_original, load_restricted
from sophon.domains.types import Batch, Domain, ImageSet

__all__ = [
    "AUGMENTATIONS",
    "SOURCES",
    "Batch",
    "Domain",
    "ImageSet",
    "batch_indices",
    "batches",
    "evaluation_batches",
    "few_shot",
    "load_original",
    "load_restricted",
    "load_source",
    "with_clusters",
]
