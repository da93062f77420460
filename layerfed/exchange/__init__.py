"""What travels between server and clients, and how each side keeps its copy of the model."""

from layerfed.exchange.global_model import GlobalModel
from layerfed.exchange.messages import (
    Description,
    Manifest,
    RefusedReply,
    TrainReply,
    describe_reply,
    evaluate_reply,
    instruction,
    probe_reply,
    read_config,
    read_description,
    read_evaluation,
    read_manifest,
    read_mask,
    read_statistics,
    read_train_reply,
    train_reply,
)
from layerfed.exchange.resident import ResidentModel
from layerfed.exchange.transport import exchange

__all__ = [
    "Description",
    "GlobalModel",
    "Manifest",
    "RefusedReply",
    "ResidentModel",
    "TrainReply",
    "describe_reply",
    "evaluate_reply",
    "exchange",
    "instruction",
    "probe_reply",
    "read_config",
    "read_description",
    "read_evaluation",
    "read_manifest",
    "read_mask",
    "read_statistics",
    "read_train_reply",
    "train_reply",
]
