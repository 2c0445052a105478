"""Low-rank adapters (LoRA): a student of which only small matrices beside its linear layers are trained.

A layer's weight W acts as W + (alpha / rank) B A, with A (rank, in) random and B (out, rank) zero, so that training starts
from the student as it was (Hu et al. 2021, arXiv:2106.09685). peft puts the adapters inside the model, which stays of its own
class: the loop, rollouts and measurements read it as any other, and gradients, optimizer state and checkpoints are of the
adapters alone. At the end every W takes its adapters in, and the student is a plain model that needs no peft.

Decided: embedding and head take none and stay as they are. The loss reads the head's matrix itself, and where it is tied an
adapter of one would change the other.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill_pipeline.errors import ConfigError, MissingExtraError
from distill_pipeline.learning import LoraSpec


@dataclass(frozen=True)
class Adapters:
    """The adapters inside a model. ``facts``: their settings, layers, parameters and share of the model's parameters."""

    tuner: Any
    facts: dict[str, Any]

    def merge(self, model: Any) -> Any:
        """``model``, which has these adapters inside, with them added to its weights: no module of peft is left in it."""
        self.tuner.model = model
        model = self.tuner.merge_and_unload()
        vars(model).pop("peft_config", None)  # which some versions of peft leave behind
        return model


def add_adapters(model: Any, lora: LoraSpec, seed: int) -> Adapters:
    """Put adapters beside the linear layers of ``model``, in place; after that only they are trained.

    Raises:
        ConfigError: a name in ``target_modules`` is no layer, or is the embedding or the head.
        MissingExtraError: peft is not installed.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as err:
        raise MissingExtraError.of("lora", "peft", "lora") from err
    names = _target_names(model, lora)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            tuner = LoraModel(model, config, "default")
        except ValueError as err:
            raise ConfigError(f"lora.target_modules: {err}") from err
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in model.parameters())
    facts = {"layers": len(names), "trained_parameters": trained, "trained_share": round(trained / whole, 6)}
    return Adapters(tuner, lora.document() | facts)


@torch.no_grad()
def merged_tensors(model: Any) -> dict[str, Tensor]:
    """A model's tensors by name as they would be with its adapters, if it has any, merged; the model stays as it is."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            tensors[f"{name}.base_layer.weight"] = module.get_base_layer().weight + module.get_delta_weight("default")
    return {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items()}


def _target_names(model: Any, lora: LoraSpec) -> list[str]:
    """Full names of the layers that take adapters."""
    apart = [model.get_input_embeddings(), model.get_output_embeddings()]
    modules = {name: module for name, module in model.named_modules() if name}
    if lora.target_modules is None:
        names = [
            name for name, module in modules.items()
            if isinstance(module, torch.nn.Linear) and not any(module is other for other in apart)
        ]  # fmt: skip
        if not names:
            raise ConfigError(f"lora: {type(model).__name__} has no linear layers beside its head; name its target_modules")
        return names
    found: list[str] = []
    for target in lora.target_modules:
        named = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not named:
            known = ", ".join(sorted({n.rsplit(".", 1)[-1] for n, m in modules.items() if isinstance(m, torch.nn.Linear)}))
            raise ConfigError(f"lora.target_modules: {type(model).__name__} has no layer {target}; its linear layers: {known}")
        if any(modules[name] is other for name in named for other in apart):
            raise ConfigError(f"lora.target_modules: {target} is the embedding or the head, which take none; leave it out")
        found += named
    return list(dict.fromkeys(found))
