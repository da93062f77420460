"""The data that cross the wire: instructions, replies, arrays, codecs, and the layer store of a node."""

from layerfed.exchange.arrays import RefusedReply, encode, record_of
from layerfed.exchange.bounds import check_reply
from layerfed.exchange.codecs import CODECS, Codec, compress
from layerfed.exchange.instruction import Probe, TrainInstruction, Upload
from layerfed.exchange.messages import (
    WRONG_SETTINGS,
    Description,
    Manifest,
    TrainReply,
    describe_reply,
    evaluate_reply,
    instruction,
    probe_reply,
    read_config,
    read_description,
    read_evaluation,
    read_held,
    read_manifest,
    read_missing,
    read_statistics,
    read_train_reply,
    statistics_of,
    train_reply,
)
from layerfed.exchange.metrics import METRICS, Metric, Numbers, Work
from layerfed.exchange.store import FolderStore, LayerStore, MemoryStore, open_store

__all__ = [
    "CODECS",
    "METRICS",
    "WRONG_SETTINGS",
    "Codec",
    "Description",
    "FolderStore",
    "LayerStore",
    "Manifest",
    "MemoryStore",
    "Metric",
    "Numbers",
    "Probe",
    "RefusedReply",
    "TrainInstruction",
    "TrainReply",
    "Upload",
    "Work",
    "check_reply",
    "compress",
    "describe_reply",
    "encode",
    "evaluate_reply",
    "instruction",
    "open_store",
    "probe_reply",
    "read_config",
    "read_description",
    "read_evaluation",
    "read_held",
    "read_manifest",
    "read_missing",
    "read_statistics",
    "read_train_reply",
    "record_of",
    "statistics_of",
    "train_reply",
]
