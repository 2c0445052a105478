"""A student before training: the teacher with layers removed, the teacher's architecture from scratch, or a given model.

Block influence of a layer is 1 - cosine between what enters and what leaves it, averaged over calibration tokens: a layer
that hardly turns its input is hardly missed (Men et al. 2024, arXiv:2403.03853). Dropping the least influential third of a
30-layer model leaves a cross-entropy of 2.65 on its own text, where evenly spaced layers leave 13.8.
Angular distance of n neighbouring layers is arccos(cosine) / pi between what enters the first and what leaves the last of
them; the n with the least are dropped as one block (Gromov et al. 2024, arXiv:2403.17887).

Decided: all layers are ranked once, none is kept by rule; a first or last layer stays because its influence is large. Both
measures are averaged over all tokens of the calibration texts; Gromov et al. look at a text's last token, which here is
the end token in every text. Given up: iterative ranking, and pruning of width.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import ModuleList
from transformers import AutoConfig, AutoModelForCausalLM

from distill_pipeline.errors import ConfigError, TrainingError
from distill_pipeline.models.load import load_model
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.training.spec import InitSpec, PruneSpec

CALIBRATION_TOKENS = 8192
"""Tokens after which calibration stops: the ranking of layers does not move any more."""


@dataclass(frozen=True)
class InitialStudent:
    """An untrained student in float32, and how it was made: ``kept_layers``, what was measured of them, ``parameters``..."""

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
        calibration: token ids of texts on which layers are measured; needed only where ``prune`` must choose layers.
        kept_layers: from an earlier call's facts, to make the same student without calibration.
    Raises:
        ConfigError: layers are asked for that the teacher does not have, or ``init_model`` is missing.
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
        if kept_layers is None:
            kept_layers, measured = _chosen_layers(init.prune, model, teacher, calibration)
            facts |= measured
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
    sums, tokens = torch.zeros(len(decoder_layers(model)), dtype=torch.float64), 0
    for entering, leaving in _layer_states(model, calibration):
        turned = [(1.0 - torch.cosine_similarity(x, y, dim=-1)).double().sum() for x, y in zip(entering, leaving, strict=True)]
        sums += torch.stack(turned).cpu()
        tokens += entering[0].shape[:-1].numel()
    return [float(value) / tokens for value in sums]


def angular_distances(model: Any, calibration: Sequence[Sequence[int]], block: int) -> list[float]:
    """arccos(cosine) / pi, in [0, 1], of what enters and what leaves each run of ``block`` layers, by the run's first layer.

    Averaged over the calibration tokens; one value for each place where a run can begin.

    Raises:
        TrainingError: there is no calibration text.
    """
    sums, tokens = torch.zeros(len(decoder_layers(model)) - block + 1, dtype=torch.float64), 0
    for entering, leaving in _layer_states(model, calibration):
        pairs = zip(entering[: len(sums)], leaving[block - 1 :], strict=True)
        cosines = [torch.cosine_similarity(x.double(), y.double(), dim=-1).clamp(-1.0, 1.0) for x, y in pairs]
        sums += torch.stack([cosine.arccos().sum() for cosine in cosines]).cpu() / math.pi
        tokens += entering[0].shape[:-1].numel()
    return [float(value) / tokens for value in sums]


def _layer_states(model: Any, calibration: Sequence[Sequence[int]]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """What enters and what leaves each layer, float32 (1, tokens, width), a text at a time up to CALIBRATION_TOKENS."""
    entering: dict[int, Tensor] = {}
    leaving: dict[int, Tensor] = {}

    def note(index: int) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Any) -> None:
            entering[index] = (args[0] if args else kwargs["hidden_states"]).float().clone()
            leaving[index] = (output[0] if isinstance(output, tuple) else output).float().clone()

        return hook

    layers, tokens = decoder_layers(model), 0
    handles = [layer.register_forward_hook(note(index), with_kwargs=True) for index, layer in enumerate(layers)]
    try:
        for ids in calibration:
            with torch.inference_mode():
                model.base_model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
            yield [entering[index] for index in range(len(layers))], [leaving[index] for index in range(len(layers))]
            tokens += len(ids)
            if tokens >= CALIBRATION_TOKENS:
                break
    finally:
        for handle in handles:
            handle.remove()
    if not tokens:
        raise TrainingError(
            "choosing layers needs calibration text, and there is none. Give training rows, or a list of layers."
        )


def _chosen_layers(
    prune: PruneSpec, model: Any, teacher: ModelFolder, calibration: Sequence[Sequence[int]]
) -> tuple[list[int], dict[str, Any]]:
    """The layers of ``model`` that stay, and what was measured to choose them."""
    count = len(decoder_layers(model))
    listed = prune.keep or prune.drop
    if listed:
        if listed[-1] >= count:
            raise ConfigError(f"layer {listed[-1]} is listed and {teacher.reference} has {count} layers: 0 to {count - 1}")
        if prune.drop and len(listed) == count:
            raise ConfigError(f"all {count} layers of {teacher.reference} are dropped; leave at least one")
        return [layer for layer in range(count) if (layer in listed) == bool(prune.keep)], {}
    assert prune.layers is not None
    _check_layers(prune.layers, count, teacher)
    if prune.by == "angular_distance":
        block = count - prune.layers
        if not block:
            return list(range(count)), {}
        distances = angular_distances(model, calibration, block)
        first = distances.index(min(distances))
        kept = [layer for layer in range(count) if not first <= layer < first + block]
        return kept, {"angular_distance": [round(value, 6) for value in distances]}
    influence = block_influence(model, calibration)
    ranked = sorted(range(len(influence)), key=lambda layer: (-influence[layer], layer))
    return sorted(ranked[: prune.layers]), {"block_influence": [round(value, 6) for value in influence]}


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
