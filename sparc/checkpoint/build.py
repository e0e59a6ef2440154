"""Plain transformers models from a config and decoded weights; no code from the checkpoint is run."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparc import codes
from sparc.checkpoint.base import Checkpoint, StoredWeight
from sparc.diag import CaptureError, SparcError

_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_experts",
           "num_local_experts", "n_routed_experts")  # fmt: skip
_SHOWN = 3


def transformers_package() -> Any:
    """The package.

    Raises:
        CaptureError: SPARC110 when it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise CaptureError(
            codes.LOAD_FAILED, "transformers is not installed", hint='pip install "sparc-compiler[models]"'
        ) from None
    return transformers


def build(owner: Any, config: Any, weights: Mapping[str, StoredWeight], source: str) -> Checkpoint:
    """A model of a class and a config that holds these weights.

    Args:
        owner: a class of transformers with a config of its own.
        config: without a `quantization_config`.
        weights: by the names of the model's parameters and persistent buffers; tied ones under any of their names.
        source: for `Checkpoint.source`, and messages.

    Raises:
        CaptureError: SPARC119 when the weights are not those of such a model.
    """
    check_depth(config, len(weights), source)
    with quiet(), explained(source):
        with torch.device("meta"):
            expected = owner(config)
        present = _checked(expected, weights, source)
        state = {name: present[name].dense for name in present}
        model = owner.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    for name, weight in present.items():
        if not _holds(model, name, weight.dense):
            raise mismatch(source, [f"{name!r} is not kept as it is"])
    turn_off_caches(model)
    model.eval()
    _gather_inputs(model, present)
    parameters = dict(model.named_parameters())
    grids = {name: each.grid for name, each in present.items() if each.grid is not None and name in parameters}
    return Checkpoint(model, grids, source)


def check_depth(config: Any, tensors: int, source: str) -> None:
    """Refuse, before anything is built, a config of more layers or experts than there are tensors."""
    for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        for name in _LAYERS:
            count = getattr(part, name, None)
            if isinstance(count, int) and count > tensors:
                raise mismatch(source, [f"{name} is {count}, but there are {tensors} tensors"])


def mismatch(source: str, reasons: list[str]) -> CaptureError:
    """SPARC119, to raise."""
    shown = "; ".join(reasons[:_SHOWN]) + (f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else "")
    return CaptureError(codes.CHECKPOINT_MISMATCH, f"the weights of {source} do not fit its config", why=shown)


def _checked(expected: nn.Module, weights: Mapping[str, StoredWeight], source: str) -> dict[str, StoredWeight]:
    """The weights that the model holds, under one name each, after comparing names and shapes.

    A bias of zeros that the model does not have is left out: some tools add one to every layer.
    """
    state = expected.state_dict(keep_vars=True)
    reasons, present, filled = [], {}, dict[int, StoredWeight]()
    for name, weight in weights.items():
        if name not in state:
            if not (name.endswith(".bias") and not weight.dense.any()):
                reasons.append(f"{name!r} is left over")
        elif state[name].shape != weight.dense.shape:
            reasons.append(f"{name!r} has the shape {list(weight.dense.shape)}, not {list(state[name].shape)}")
        elif (other := filled.get(id(state[name]))) is None:
            present[name] = filled[id(state[name])] = weight
        elif not torch.equal(other.dense, weight.dense):
            reasons.append(f"{name!r} is tied to another weight and differs from it")
    reasons += [f"{name!r} is missing" for name, tensor in state.items() if id(tensor) not in filled]
    if reasons:
        raise mismatch(source, reasons)
    return present


def _holds(model: nn.Module, name: str, dense: Tensor) -> bool:
    held = model.state_dict(keep_vars=True).get(name)
    return held is not None and held.data_ptr() == dense.data_ptr()


# columns stored sorted by group ---------------------------------------------------------------------------------------
class GatheredLinear(nn.Module):
    """A linear layer whose columns lie in another order than the features that they multiply.

    Args:
        linear: holds the weight `[out, in]` and the bias.
        order: for each column, the feature of x that it multiplies, int64 `[in]`.
    """

    def __init__(self, linear: nn.Linear, order: Tensor) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        return nn.functional.linear(x.index_select(-1, self.get_buffer("order")), self.weight, self.bias)


def _gather_inputs(model: nn.Module, weights: Mapping[str, StoredWeight]) -> None:
    for name, weight in weights.items():
        if weight.order is not None:
            path, _, _ = name.rpartition(".")
            layer = model.get_submodule(path)
            if not isinstance(layer, nn.Linear):
                raise mismatch(path, ["columns in another order belong to a linear layer"])
            model.set_submodule(path, GatheredLinear(layer, weight.order))


# transformers' manners ------------------------------------------------------------------------------------------------
def model_class(transformers: Any, described: Mapping[str, Any]) -> Any:
    """The class that config.json names, if transformers has it; else the base model of its type."""
    names = described.get("architectures")
    for name in names if isinstance(names, list) else ():
        found = getattr(transformers, str(name), None) if str(name).isidentifier() else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModel


def turn_off_caches(model: nn.Module) -> None:
    """A key/value cache among the outputs is of no use without one among the inputs."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "use_cache"):
            config.use_cache = False


@contextmanager
def explained(name: str, folder: Path | None = None) -> Iterator[None]:
    """Turn what transformers raises, of assorted types, into SPARC110, without the path of the folder."""
    try:
        yield
    except SparcError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        if folder is not None:
            why = why.replace(str(folder.resolve()), folder.name)
        raise CaptureError(codes.LOAD_FAILED, f"the model in {name} cannot be loaded", why=why) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own progress bars and warnings off the terminal."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()
