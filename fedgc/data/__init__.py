"""Faces, aligned and split by person."""

from fedgc.data.align import ALIGNMENTS, Align
from fedgc.data.faces import FaceSet, Skipped, load_faces, synthetic_spec
from fedgc.data.inspection import inspect
from fedgc.data.preparation import prepare
from fedgc.data.splits import Splits, partition, split_identities

__all__ = [
    "ALIGNMENTS",
    "Align",
    "FaceSet",
    "Skipped",
    "Splits",
    "inspect",
    "load_faces",
    "partition",
    "prepare",
    "split_identities",
    "synthetic_spec",
]
