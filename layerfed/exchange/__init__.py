"""What travels between server and clients, and how each side keeps its copy of the model."""

from layerfed.exchange.arrays import RefusedReply, encode, record_of
from layerfed.exchange.bounds import check_reply
from layerfed.exchange.codecs import CODECS, Codec, compress
from layerfed.exchange.global_model import GlobalModel
from layerfed.exchange.ledger import Holdings, Ledger, Traffic
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
    read_mask,
    read_missing,
    read_statistics,
    read_train_reply,
    train_reply,
)
from layerfed.exchange.partial import (
    layer_steps,
    read_schedule,
    read_upload,
    read_uploaded,
    scheduled,
    upload_of,
)
from layerfed.exchange.resident import MissingLayers, ResidentModel, keeping_layers
from layerfed.exchange.store import FolderStore, LayerStore, MemoryStore, open_store
from layerfed.exchange.transport import exchange

__all__ = [
    "CODECS",
    "WRONG_SETTINGS",
    "Codec",
    "Description",
    "FolderStore",
    "GlobalModel",
    "Holdings",
    "LayerStore",
    "Ledger",
    "Manifest",
    "MemoryStore",
    "MissingLayers",
    "RefusedReply",
    "ResidentModel",
    "Traffic",
    "TrainReply",
    "check_reply",
    "compress",
    "describe_reply",
    "encode",
    "evaluate_reply",
    "exchange",
    "instruction",
    "keeping_layers",
    "layer_steps",
    "open_store",
    "probe_reply",
    "read_config",
    "read_description",
    "read_evaluation",
    "read_held",
    "read_manifest",
    "read_mask",
    "read_missing",
    "read_schedule",
    "read_statistics",
    "read_train_reply",
    "read_upload",
    "read_uploaded",
    "record_of",
    "scheduled",
    "train_reply",
    "upload_of",
]
