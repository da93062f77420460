"""LoRA adapters in the blocks of a model, by the PEFT library.

A block's adapters are then what is probed, selected, trained, sent and averaged in its place. To a
frozen weight W an adapter adds (α/r)·B·A [Hu et al., LoRA, 2022, section 4.1]. A has the shape
(r, inputs) and is drawn from the run's seed; B has the shape (outputs, r) and begins at 0. If every
client trains all of them and the server averages A and B, this is FedIT [Zhang et al., arXiv
2305.05644].

With `model.personal-rank` each of these modules has a second adapter, which each client keeps to
itself: W x + (α/r)·B·A·x + (α/r')·B'·A'·x. This is the idea of SDFLoRA [Shen et al., arXiv 2601.11219]:
a client's adapter is split into a global module, which is aggregated, and a local one, which stays, and
noise for privacy is added to the global one alone. Only the abstract could be read. It does not say how
the two are combined and trained, nor what is "selectively aligned" of the global one. Here they are
added up and trained in the same steps, a block's second adapter whenever the block is selected. Ranks
that differ between clients are a matter of `server.aggregation` and of the strategy `ranks`, as without
a second adapter.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

from safetensors.torch import save_file
from torch import nn

from layerfed.config import ConfigError, ModelConfig
from layerfed.config.errors import naming_extras
from layerfed.config.section import words
from layerfed.config.seeding import Stream
from layerfed.models.factors import OWN, SHARED, adapted_weight, factor_pairs
from layerfed.models.layers import LayerMap
from layerfed.models.placement import traced
from layerfed.models.source import new_weights
from layerfed.models.trace import Forward
from layerfed.models.weights import files_of, note_files

__all__ = ["adapted_layers", "insert_adapters", "merge_adapters", "save_adapters"]

# Their fused operations read the weights of the modules inside, and would leave out adapters.
FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)

_LAYERS: WeakKeyDictionary[nn.Module, LayerMap] = WeakKeyDictionary()


def adapted_layers(model: nn.Module) -> LayerMap | None:
    """Return the layers of a model that has adapters; None if it has none."""
    return _LAYERS.get(model)


def insert_adapters(
    model: nn.Module,
    layers: LayerMap,
    section: ModelConfig,
    seed: int,
    forward: Forward | None = None,
    *,
    folded: bool = False,
) -> None:
    """Put an adapter beside each target module in the blocks of a model.

    Parameters
    ----------
    model : nn.Module
        Changed in place: the weights of a target `m` are called `m.base_layer.*` afterwards.
    layers : LayerMap
        The model's split, without adapters.
    section : ModelConfig
    seed : int
        The run's seed, which draws the matrices A.
    forward : Callable[[nn.Module], object], optional
        Runs the model on an example. Modules that are not called then get no adapter, since it would
        have no effect.

    folded : bool
        Whether the server adds adapters to the weights beside them, which clients then get.

    Raises
    ------
    ConfigError
        If a block has no module to adapt, or `model.lora-targets` names none. The message names the
        modules that the model has.
    """
    with naming_extras("model.tuning = 'lora'"):
        peft = import_module("peft")
    targets = _targets(model, layers, section, forward)
    ranks = {SHARED: section.lora_rank, OWN: section.personal_rank}
    for name in (SHARED, OWN) if section.personal_rank else (SHARED,):
        config = peft.LoraConfig(
            r=ranks[name],
            lora_alpha=section.lora_alpha,
            lora_dropout=section.lora_dropout,
            # Names would also match modules whose names end with them.
            target_modules="|".join(map(re.escape, targets)),
        )
        stream = Stream.ADAPTERS if name == SHARED else Stream.OWN_ADAPTERS
        with new_weights(seed, stream), warnings.catch_warnings():
            # PEFT warns of several adapters, which are meant here.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            peft.inject_adapter_in_model(config, model, name)
    if section.personal_rank:
        for module in (cast(Any, model.get_submodule(target)) for target in targets):
            for factor in (module.lora_A[OWN], module.lora_B[OWN]):
                factor.to(
                    module.weight.device
                )  # PEFT leaves it on the CPU if the model is on `meta`
            module.set_adapter([SHARED, OWN])
    adapters = {
        f"{target}.{name}": block
        for target, block in targets.items()
        for name, _ in model.get_submodule(target).named_parameters()
        if not name.startswith("base_layer.")
    }
    if (files := files_of(model)) is not None:
        note_files(model, replace(files, drawn=files.drawn.union(adapters)))
    weights = {adapted_weight(name): adapters[name] for name, _ in factor_pairs([*adapters])}
    for target in targets if folded else ():
        if _transposed(model.get_submodule(f"{target}.base_layer")):
            raise ConfigError(
                f"server.aggregation = 'stack' adds B·A to weights as nn.Linear has them, and {target} "
                "has them transposed; choose server.aggregation=svd"
            )
    own = {name for name in adapters if f".{OWN}." in name}
    _LAYERS[model] = layers.with_adapters(model, adapters, weights if folded else {}, own)


def merge_adapters(model: nn.Module) -> None:
    """Add each shared adapter to the weight that it adapts, and take all out, if there are any."""
    if _LAYERS.pop(model, None) is None:
        return
    layer = import_module("peft.tuners.tuners_utils").BaseTunerLayer
    for name, module in list(model.named_modules()):
        if isinstance(module, layer):
            module.merge(adapter_names=[SHARED])
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, module.get_base_layer())
    del model.peft_config


def save_adapters(
    model: nn.Module, folder: Path, base: str, kind: str, whole: nn.Module | None = None
) -> None:
    """Write adapters and head in PEFT's own form, which `PeftModel.from_pretrained` loads.

    Parameters
    ----------
    model : nn.Module
        A model of transformers with adapters.
    folder : Path
    base : str
        Where the pretrained model is; PEFT calls it `base_model_name_or_path`.
    kind : {"SEQ_CLS", "CAUSAL_LM"}
        PEFT's name of what the model does.
    whole : nn.Module, optional
        The model with the base's own head, if the run's is a part of it.

    Raises
    ------
    ConfigError
        If a tensor of the head is in no module of its own, which PEFT saves as wholes.
    """
    peft = import_module("peft")
    head = _LAYERS[model].head
    modules = [m for m in head.modules if any(t.startswith(f"{m}.") for t in head.tensors)]
    loose = [t for t in head.tensors if not any(t.startswith(f"{m}.") for m in modules)]
    if loose:
        raise ConfigError(
            f"--format peft cannot hold '{loose[0]}' of the head, which is in no module of its own; use "
            "--format native, which merges adapters into the weights"
        )
    config = replace(
        cast(Any, model).peft_config[SHARED],
        task_type=kind,
        modules_to_save=modules,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    state = (whole or model).state_dict()
    tensors = peft.get_peft_model_state_dict(model, adapter_name=SHARED)
    tensors |= {name: state[name] for name in head.tensors}
    made = {f"base_model.model.{name}": t.detach().contiguous() for name, t in tensors.items()}
    save_file(made, folder / "adapter_model.safetensors", {"format": "pt"})
    config.save_pretrained(str(folder))


def _targets(
    model: nn.Module, layers: LayerMap, section: ModelConfig, forward: Forward | None
) -> Mapping[str, str]:
    """Return the modules to adapt, each with its block."""
    called = None if forward is None else traced(model, forward).calls
    fused = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, FUSED))
    found = {
        name: layers.layer_of(f"{name}.weight").name
        for name, module in model.named_modules()
        if _adaptable(module)
        and not name.startswith(fused)
        and (called is None or name in called)
        and layers.layer_of(f"{name}.weight").kind == "block"
    }
    has = ", ".join(dict.fromkeys(map(_short, found))) or "none"
    advice = (
        f"the modules of this model's blocks that can be adapted are: {has} (model.lora-targets)"
    )
    wanted = words(section.lora_targets)
    for part in wanted:
        if not any(_ends_with(name, part) for name in found):
            raise ConfigError(f"model.lora-targets = '{part}' names nothing to adapt; {advice}")
    if wanted:
        found = {n: block for n, block in found.items() if any(_ends_with(n, p) for p in wanted)}
    without = [block.name for block in layers.blocks if block.name not in found.values()]
    if without:
        raise ConfigError(
            f"model.tuning = 'lora' finds nothing to adapt in {without[0]}, so nobody could select it; "
            f"{advice}; name some in every block, or other blocks (model.blocks), or choose "
            "model.tuning=layers"
        )
    return found


def _adaptable(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1  # whose factors would have to be split by groups too
    return isinstance(module, nn.Linear) or _transposed(module)


def _transposed(module: nn.Module) -> bool:
    """Return whether a module is GPT-2's own kind of linear layer."""
    return type(module).__name__ == "Conv1D"


def _ends_with(name: str, part: str) -> bool:
    return f".{name}".endswith(f".{part}")


def _short(name: str) -> str:
    """Return the end of a module's name that says what it is: `query`, or `mlp.0`."""
    *_, before, last = ["", *name.split(".")]
    return f"{before}.{last}" if last.isdigit() and before else last
