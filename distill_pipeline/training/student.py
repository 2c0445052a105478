"""A student before training: the teacher with layers removed, the teacher's architecture from scratch, or a given model.

Block influence of a layer is 1 - cosine between what enters and what leaves it, averaged over calibration tokens: a layer
that hardly turns its input is hardly missed (Men et al. 2024, arXiv:2403.03853). Dropping the least influential third of a
30-layer model leaves a cross-entropy of 2.65 on its own text, where evenly spaced layers leave 13.8.

Decided: all layers are ranked once, none is kept by rule; a first or last layer stays because its influence is large.
Given up: iterative ranking, and pruning of width.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import ModuleList
from transformers import AutoConfig, AutoModelForCausalLM

from distill_pipeline.errors import ConfigError, TrainingError
from distill_pipeline.models.load import load_model
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.training.spec import InitSpec

CALIBRATION_TOKENS = 8192
"""Tokens after which calibration stops: the ranking of layers does not move any more."""


@dataclass(frozen=True)
class InitialStudent:
    """An untrained student in float32, and how it was made: ``kept_layers``, ``block_influence``, ``parameters``..."""

    model: Any
    facts: dict[str, Any]


def initial_student(
    init: InitSpec,
    teacher: ModelFolder | None,
    init_model: ModelFolder | None,
    calibration: Sequence[Sequence[int]],
    seed: int,
    device: str,
    kept_layers: list[int] | None = None,
) -> InitialStudent:
    """Make the student that training starts from; the same arguments give the same weights.

    Args:
        teacher: None for one that is only an API; then ``init`` names a model.
        init_model: the folder that ``init.model`` names, else None.
        calibration: token ids of texts on which block influence is measured; needed only by ``prune`` without ``kept_layers``.
        kept_layers: from an earlier call's facts, to make the same student without calibration.
    Raises:
        ConfigError: more layers are asked for than the teacher has, or ``init_model`` is missing.
        TrainingError: the architecture has no list of layers, or there is no calibration text.
    """
    facts: dict[str, Any] = {"init": init.model_dump(mode="json", exclude_none=True)}
    if init.model is not None:
        if init_model is None:
            raise ConfigError(f"the student starts from {init.model}, but its folder was not given")
        model = load_model(init_model.path, device=device)
        facts["init_model"] = {"reference": init_model.reference, "identity": init_model.identity}
        teacher_parameters = _stored_parameters(teacher) if teacher is not None else None
    elif init.scratch is not None:
        assert teacher is not None, "the experiment file checks that its layers are here"
        model = _from_scratch(teacher, init.scratch.layers, seed).to(device)
        teacher_parameters = _stored_parameters(teacher)
    else:
        assert init.prune is not None
        assert teacher is not None, "the experiment file checks that its layers are here"
        model = load_model(teacher.path, device=device)
        teacher_parameters = num_parameters(model)
        _check_layers(init.prune.layers, len(decoder_layers(model)), teacher)
        if kept_layers is None:
            influence = block_influence(model, calibration)
            ranked = sorted(range(len(influence)), key=lambda layer: (-influence[layer], layer))
            kept_layers = sorted(ranked[: init.prune.layers])
            facts["block_influence"] = [round(value, 6) for value in influence]
        keep_layers(model, kept_layers)
        facts["kept_layers"] = kept_layers
    parameters = num_parameters(model)
    share = round(parameters / teacher_parameters, 4) if teacher_parameters else None
    facts |= {"parameters": parameters, "teacher_parameters": teacher_parameters, "share": share}
    return InitialStudent(model.eval(), facts)


def decoder_layers(model: Any) -> ModuleList:
    """The list of a model's layers.

    Raises:
        TrainingError: there is not exactly one list with as many modules as the configuration has layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    found = [module for module in model.base_model.modules() if isinstance(module, ModuleList) and len(module) == count]
    if count > 1 and len(found) > 1:  # lists inside a layer (experts) may happen to be as long; the outermost comes first
        inside = {id(inner) for outer in found for layer in outer for inner in layer.modules()}
        found = [module for module in found if id(module) not in inside]
    if len(found) < 1 or (count > 1 and len(found) != 1):
        raise TrainingError(
            f"cannot tell the {count} layers of {type(model).__name__} apart; use init: model or scratch instead"
        )
    return found[0]


def block_influence(model: Any, calibration: Sequence[Sequence[int]]) -> list[float]:
    """1 - cosine of each layer's input and output, averaged over the calibration tokens.

    Raises:
        TrainingError: there is no calibration text.
    """
    layers = decoder_layers(model)
    sums = torch.zeros(len(layers), dtype=torch.float64)
    tokens = 0

    def measure(index: int) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            sums[index] += (1.0 - torch.cosine_similarity(before.float(), after.float(), dim=-1)).double().sum().cpu()

        return hook

    handles = [layer.register_forward_hook(measure(index), with_kwargs=True) for index, layer in enumerate(layers)]
    try:
        with torch.inference_mode():
            for ids in calibration:
                model.base_model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
                tokens += len(ids)
                if tokens >= CALIBRATION_TOKENS:
                    break
    finally:
        for handle in handles:
            handle.remove()
    if not tokens:
        raise TrainingError("block influence needs calibration text, and there is none. Give training rows.")
    return [float(value) / tokens for value in sums]


def keep_layers(model: Any, kept: Sequence[int]) -> None:
    """Remove all other layers from ``model``, and make its configuration and layer numbers say so."""
    layers = decoder_layers(model)
    count = len(layers)
    stale = [layer for index, layer in enumerate(layers) if index not in set(kept)]
    remaining = [layers[index] for index in kept]
    del layers[:]
    layers.extend(remaining)
    del stale
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                setattr(module, "layer_idx", index)  # noqa: B010
    cut_config(model.config, count, kept)


def cut_config(config: Any, count: int, kept: Sequence[int]) -> None:
    """Make a configuration of ``count`` layers one of the ``kept``: their number, and every list with one entry a layer."""
    text = config.get_text_config()
    for key, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == count and key not in {"architectures"}:
            setattr(text, key, [value[index] for index in kept])
    text.num_hidden_layers = len(kept)


def num_parameters(model: Any) -> int:
    """Parameters of a model, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _from_scratch(teacher: ModelFolder, layers: int, seed: int) -> Any:
    config = copy.deepcopy(AutoConfig.from_pretrained(str(teacher.path), local_files_only=True))
    count = config.get_text_config().num_hidden_layers
    _check_layers(layers, count, teacher)
    cut_config(config, count, range(layers))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _stored_parameters(teacher: ModelFolder) -> int:
    """Parameters of a model folder, without loading its weights."""
    config = AutoConfig.from_pretrained(str(teacher.path), local_files_only=True)
    with torch.device("meta"):
        return num_parameters(AutoModelForCausalLM.from_config(config))


def _check_layers(layers: int, available: int, teacher: ModelFolder) -> None:
    if layers > available:
        raise ConfigError(
            f"the student wants {layers} layers and {teacher.reference} has {available}; ask for at most that many"
        )
