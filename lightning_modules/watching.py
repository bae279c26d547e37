r"""Watching training: callbacks that log what the loss does not tell, and change nothing.

- `GradientVariance`: do the circuits' angles still get a gradient, or have they come to a barren plateau?
- `Entanglement`: are the states entangled, before and after the ansatz?
- `AttentionEntropy`: does attention choose, or is it almost uniform?
- `AttentionMaps`: pictures of the attention weights.

They draw no random numbers and add no backward pass, so a run has the same weights with them and without. Layers and
heads count from 0, wires as in the circuit.
"""

import contextlib
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jaxtyping import Bool, Float
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_modules.files import atomic_write
from lightning_modules.labels import label_of
from lightning_modules.language_model import LanguageModel
from lightning_modules.processes import is_sharded
from pennylane_qattn import Attention, CircuitFeatureMap
from pennylane_qattn.attention import Visibility, attention_weights
from pennylane_qattn.entanglement import CircuitStates, meyer_wallach
from pennylane_qattn.features import circuit_within
from pennylane_qattn.program import Program

#: Folder of the attention maps within that of the run.
MAPS = "attention_maps"
#: States that are held at a time.
_TOKENS = 1024


def attention_layers(model: nn.Module) -> dict[str, Attention]:
    """The attentions of a model: `layer0`, `layer1`, ..."""
    found = [module for module in model.modules() if isinstance(module, Attention)]
    return {f"layer{i}": attention for i, attention in enumerate(found)}


def circuit_maps(model: nn.Module) -> dict[str, CircuitFeatureMap]:
    """The circuit feature maps of a model's attentions by layer and role: `layer0/query`, `layer0/value`, ..."""
    found: dict[str, CircuitFeatureMap] = {}
    for layer, attention in attention_layers(model).items():
        for role in ("query", "key", "value"):
            feature_map = circuit_within(getattr(attention, f"{role}_map"))
            if feature_map is not None and not any(feature_map is m for m in found.values()):
                found[f"{layer}/{role}"] = feature_map
    return found


class Watcher(Callback, ABC):
    """A callback that looks at a model and leaves it alone."""

    #: Finds what is looked at, and what that is called.
    find: Callable[[nn.Module], dict[str, Any]]
    subject: str

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if is_sharded(trainer):
            raise ValueError(
                f"{type(self).__name__} looks at whole weights, and FSDP shares them out; leave it out, or use ddp"
            )

    def check(self, model: nn.Module) -> None:
        """Refuses a model in which there is nothing to see: ValueError, one line."""
        if not type(self).find(model):
            raise ValueError(
                f"{type(self).__name__} has nothing to watch: there is no {self.subject} in the model; leave it out, "
                "or choose another attention, such as qisa"
            )


# --- gradients ------------------------------------------------------------------------------------------------------


def wires_of_weights(program: Program) -> Bool[Tensor, "wires weights"]:
    """Which weights turn a gate on which wire. A weight may be on several wires, as in a gate on two of them.

    Where angles are computed from the weights, a weight belongs to those whose derivative by it is not 0 everywhere.
    """
    size = torch.Size(program.shape).numel()
    if program.entries is not None:
        turns = torch.zeros(program.num_angles, size, dtype=torch.bool)
        turns[range(program.num_angles), list(program.entries)] = True
    else:
        generator = torch.Generator().manual_seed(0)
        places = [torch.randn(program.shape, generator=generator, dtype=torch.float64) for _ in range(3)]
        jacobians = [torch.autograd.functional.jacobian(lambda w: program.angles(w[None])[0], w) for w in places]
        turns = (torch.stack(jacobians) != 0).any(0).reshape(program.num_angles, size)
    on_wires = torch.zeros(program.num_wires, size, dtype=torch.bool)
    for gate in program.gates:
        if gate.angle is not None:
            on_wires[list(gate.wires)] |= turns[gate.angle]
    return on_wires


class RunningVariance:
    """Mean and unbiased variance of a stream of vectors whose weights fall by the factor `decay` from one to the next.

    D. H. D. West, Communications of the ACM 22 (1979) 532, with weights that fall; no large squares are subtracted.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.weight = self.weight_of_squares = 0.0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None

    def add(self, x: Float[Tensor, " size"]) -> None:
        """Takes in the next vector."""
        if self.mean is None:
            self.mean, self.squares = torch.zeros_like(x), torch.zeros_like(x)
        mean, squares = self.mean.to(x.device), self.squares.to(x.device)
        self.weight = self.decay * self.weight + 1
        self.weight_of_squares = self.decay**2 * self.weight_of_squares + 1
        difference = x - mean
        self.mean = mean + difference / self.weight
        self.squares = self.decay * squares + difference * (x - self.mean)

    @property
    def variance(self) -> Float[Tensor, " size"] | None:
        """The variance; `None` of fewer than two vectors."""
        degrees = self.weight - self.weight_of_squares / self.weight if self.weight else 0.0
        return self.squares / degrees if degrees > 0 else None

    def state_dict(self) -> dict[str, Any]:
        """All that it holds, as plain data and tensors."""
        return {name: value for name, value in vars(self).items() if name != "decay"}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Reads what `state_dict` gave."""
        vars(self).update(state_dict)


class GradientVariance(Watcher):
    r"""Logs how the gradient of the loss by the circuits' angles varies, by layer and by wire.

    A barren plateau (McClean et al., arXiv 1803.11173) is where :math:`\mathrm{Var}_\theta[\partial_\theta E]` over
    random angles is exponentially small in the number of qubits. A run sees one set of angles at a time, so two
    quantities are logged, both averaged over the angles that turn a gate on the wire, in all heads:

    - `gradient_variance/layer0/value/wire2`: the variance of an angle's gradient over the latest optimizer steps, that
      is over batches of the text while the angles move little. It is what the optimizer has to see through.
    - `gradient_square/layer0/value/wire2`: the square of the gradient of this step. The loss is periodic in an angle,
      so its derivative has mean 0 over a turn: at the first step, when the angles are uniformly random, this estimates
      the barren-plateau variance itself.

    `.../value` alone is the average over all of a layer's angles. The gradient is that of the mean loss of a batch,
    before clipping; accumulated batches count as one. An angle of a gate on several wires counts on each of them.

    Args:
        horizon: optimizer steps that the variance remembers: older ones weigh less by the factor e each time.
    """

    find, subject = staticmethod(circuit_maps), "circuit"

    def __init__(self, horizon: int = 100):
        if horizon < 2:
            raise ValueError(f"horizon must be at least 2 steps; got {horizon}")
        self.running = RunningVariance(1 - 1 / horizon)
        self._maps: dict[str, CircuitFeatureMap] = {}
        self._wires: dict[str, Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.check(pl_module)
            self._maps = self.find(pl_module)
            self._wires = {n: wires_of_weights(m.ansatz.program(m.num_wires)) for n, m in self._maps.items()}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        weights = [m.weights for m in self._maps.values()]
        gradients = [w.new_zeros(w.numel()) if w.grad is None else w.grad.flatten() for w in weights]
        gradient = torch.cat(gradients).double()
        # A gradient scaler meets infinities on its way to the right scale and skips such steps.
        if getattr(trainer.precision_plugin, "scaler", None) is not None and not gradient.isfinite().all():
            return
        self.running.add(gradient)
        if not trainer._logger_connector.should_update_logs:
            return
        self._log(pl_module, "gradient_square", gradient.square())
        if (variance := self.running.variance) is not None:
            self._log(pl_module, "gradient_variance", variance)

    def _log(self, pl_module: L.LightningModule, quantity: str, of_angles: Tensor) -> None:
        values: dict[str, Tensor] = {}
        parts = of_angles.split([m.weights.numel() for m in self._maps.values()])
        for (name, wires), part in zip(self._wires.items(), parts, strict=True):
            wires, mean = wires.to(part.device), part.unflatten(0, (-1, wires.shape[1])).mean(0)
            values[f"{quantity}/{name}"] = mean[wires.any(0)].mean()
            for wire, angles in enumerate(wires):
                if angles.any():
                    values[f"{quantity}/{name}/wire{wire}"] = mean[angles].mean()
        pl_module.log_dict(values)

    def state_dict(self) -> dict[str, Any]:
        return self.running.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.running.load_state_dict(state_dict)


# --- the first validation batch -------------------------------------------------------------------------------------


@contextlib.contextmanager
def kept(modules: Mapping[str, nn.Module], rows: int) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Keeps first argument and result of modules, of the first rows of the batch, as `forward` passes them by."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, result: Tensor) -> None:
            seen[name] = (args[0][:rows].detach(), result[:rows].detach())

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _FirstValidationBatch(Watcher):
    """Logs, with the metrics of each validation, values of what modules read and gave on its first batch.

    Args:
        windows: how many windows of the batch are looked at, of each process.
    """

    def __init__(self, windows: int = 32):
        if windows < 1:
            raise ValueError(f"windows must be at least 1; got {windows}")
        self.windows = windows
        self._watching: contextlib.ExitStack | None = None
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}

    @abstractmethod
    def prepare(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules to look at, by name."""

    @abstractmethod
    def values(self, seen: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """What is logged, from the argument and the result of each module."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage in ("fit", "validate"):
            self.check(pl_module)
            self._modules = self.prepare(pl_module)

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == dataloader_idx == 0 and not trainer.sanity_checking:
            self._watching = contextlib.ExitStack()
            self._seen = self._watching.enter_context(kept(self._modules, self.windows))

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self._watching is not None:
            seen = self._end()
            # Another process may have a window more or less. Lightning would round a `batch_size` that says so.
            windows = torch.tensor(float(len(next(iter(seen.values()))[0])), device=pl_module.device)
            share = windows / trainer.strategy.reduce(windows.clone(), reduce_op="mean")
            values = {name: value * share for name, value in self.values(seen).items()}
            pl_module.log_dict(values, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end()

    def _end(self) -> dict[str, tuple[Tensor, Tensor]]:
        if self._watching is not None:
            self._watching.close()
        seen, self._watching, self._seen = self._seen, None, {}
        return seen


class Entanglement(_FirstValidationBatch):
    """Logs Meyer and Wallach's entanglement of the circuits' states, averaged over tokens of the validation text.

    `meyer_wallach/layer0/value/head1` is that of the states that are measured, `meyer_wallach_encoded/...` that of the
    encoded ones. 0: product states; 1: every qubit by itself is fully mixed; random states of n qubits have
    (2^n - 2) / (2^n + 1). It is computed by folding, with no execution on a device.

    Args:
        windows: windows of the first validation batch that are looked at.
    """

    find, subject = staticmethod(circuit_maps), "circuit"

    def prepare(self, model: nn.Module) -> dict[str, nn.Module]:
        maps = self.find(model)
        self._states = {name: CircuitStates(m) for name, m in maps.items()}
        return maps

    def values(self, seen: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, (x, _) in seen.items():
            states = self._states[name]
            parts = states.inputs(x).split(_TOKENS, dim=1)
            tokens, heads = x.shape[0] * x.shape[1], states.feature_map.num_heads
            for quantity, state in (("meyer_wallach_encoded", states.encoded), ("meyer_wallach", states.final)):
                mean = sum(meyer_wallach(state(part)).sum(1) for part in parts) / tokens
                for head, value in enumerate(mean.expand(heads)):
                    values[f"{quantity}/{name}/head{head}"] = value
        return values


def attention_entropy(weights: Float[Tensor, "*batch keys"]) -> Float[Tensor, "*batch"]:
    """Shannon entropy, in nats, of the weights that each query gives to the keys."""
    return torch.special.entr(weights.to(torch.promote_types(weights.dtype, torch.float32))).sum(-1)


class AttentionEntropy(_FirstValidationBatch):
    """Logs the entropy of the attention weights, averaged over rows of the validation text.

    - `attention_entropy/layer0/head1`, in nats, and beside it `attention_entropy/uniform`, what uniform weights on the
      same keys would have: the average of log(position + 1);
    - `attention_entropy_relative/layer0/head1`: the entropy of a row over that of uniform weights, averaged over all
      rows that see more than one key. 1: uniform; 0: each token looks at one other.

    No map is evaluated again for it, so it costs no execution on a device.

    Args:
        windows: windows of the first validation batch that are looked at.
    """

    find, subject = staticmethod(attention_layers), "attention of pennylane_qattn"

    def prepare(self, model: nn.Module) -> dict[str, nn.Module]:
        self._layers = self.find(model)
        return _query_and_key_maps(self._layers)

    def values(self, seen: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for layer, attention in self._layers.items():
            weights = _weights(layer, attention, seen)
            entropy = attention_entropy(weights)
            length = weights.shape[-1]
            keys = torch.arange(1, length + 1) if attention.is_causal else torch.full((length,), length)
            uniform = keys.to(entropy).log()
            values["attention_entropy/uniform"] = uniform.mean()
            for head, value in enumerate(entropy.mean((0, 2))):
                values[f"attention_entropy/{layer}/head{head}"] = value
            if (chooses := keys.to(entropy.device) > 1).any():
                relative = (entropy[..., chooses] / uniform[chooses]).mean((0, 2))
                for head, value in enumerate(relative):
                    values[f"attention_entropy_relative/{layer}/head{head}"] = value
        return values


def _query_and_key_maps(layers: Mapping[str, Attention]) -> dict[str, nn.Module]:
    maps: dict[str, nn.Module] = {}
    for layer, attention in layers.items():
        maps |= {f"{layer}/query": attention.query_map, f"{layer}/key": attention.key_map}
    return maps


def _weights(
    layer: str, attention: Attention, seen: Mapping[str, tuple[Tensor, Tensor]]
) -> Float[Tensor, "batch heads seq seq"]:
    """A layer's weights from queries and keys that went by; windows of a text have no padding."""
    (_, q), (_, k) = seen[f"{layer}/query"], seen[f"{layer}/key"]
    score, length = attention.score, q.shape[2]
    visibility = Visibility(length, length, attention.is_causal)
    return attention_weights(score, score.queries(q), score.keys(k), visibility)


# --- pictures -------------------------------------------------------------------------------------------------------


class AttentionMaps(Watcher):
    """Draws the attention weights of all layers and heads on a text, after validation while training.

    The pictures are `attention_maps/step-000250.png` in the folder of the run, and TensorBoard's, if it is a logger.
    Each costs one forward pass of the text.

    Args:
        text: its first tokens are looked at, at most a window of them; by default the first window of validation.
        every_n_validations: how many validations there are from one picture to the next.
    """

    find, subject = staticmethod(attention_layers), "attention of pennylane_qattn"

    def __init__(self, text: str | None = None, every_n_validations: int = 1):
        if every_n_validations < 1:
            raise ValueError(f"every_n_validations must be at least 1; got {every_n_validations}")
        self.text, self.every_n_validations = text, every_n_validations
        self._validations = 0
        self._tokens: Tensor | None = None

    def check(self, model: LanguageModel) -> None:
        super().check(model)
        if self.text is not None and not model.tokenizer.encode(self.text):  # which refuses what it does not know
            raise ValueError(f"the text of AttentionMaps must have at least one token; got {self.text!r}")

    def setup(self, trainer: L.Trainer, pl_module: LanguageModel, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.check(pl_module)
            self._layers = self.find(pl_module)
            if self.text is not None:
                ids = pl_module.tokenizer.encode(self.text)
                self._tokens = torch.tensor(ids[: pl_module.gpt.config.block_size])

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: LanguageModel, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.text is None and batch_idx == dataloader_idx == 0:
            self._tokens = batch[0][0]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: LanguageModel) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or trainer.fast_dev_run:
            return
        self._validations += 1
        folder = trainer.log_dir or trainer.default_root_dir  # asked for on all processes
        if self._validations % self.every_n_validations or not trainer.is_global_zero:
            return
        picture, step = self._draw(pl_module), trainer.global_step
        with atomic_write(Path(folder) / MAPS / f"step-{step:06}.png") as file:
            file.write(picture)
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if boards:
            from matplotlib.image import imread

            pixels = imread(io.BytesIO(picture))
            for board in boards:
                tag = f"{label}-{MAPS}" if (label := label_of(pl_module)) else MAPS
                board.experiment.add_image(tag, pixels, step, dataformats="HWC")

    def _draw(self, model: LanguageModel) -> bytes:
        from lightning_modules.report import RunResult, _png, attention_figure  # matplotlib takes its time to load

        tokens = self._tokens.to(model.device)
        with kept(_query_and_key_maps(self._layers), rows=1) as seen:
            model.gpt(tokens[None])
        visibility = Visibility(len(tokens), len(tokens), is_causal=True)
        maps = {  # what the values are multiplied by
            f"layer {i}": attention.applied(_weights(layer, attention, seen), visibility)[0]
            for i, (layer, attention) in enumerate(self._layers.items())
        }
        labels = [model.tokenizer.decode([i]) for i in tokens.tolist()]
        causal = False if label_of(model) else None
        return _png(attention_figure(RunResult(MAPS, attention_maps=maps, attention_labels=labels, causal=causal)))

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]


# --- by name --------------------------------------------------------------------------------------------------------

#: What `--watch` knows, with the defaults of each.
WATCHERS: dict[str, type[Watcher]] = {
    "gradients": GradientVariance,
    "entanglement": Entanglement,
    "entropy": AttentionEntropy,
    "maps": AttentionMaps,
}


def watchers(names: str | Sequence[str] | None, besides: Sequence[Callback] = ()) -> list[Watcher]:
    """The callbacks of those names, with their defaults.

    Args:
        names: a list of them, or one string with commas.
        besides: callbacks that are there already; one of the same kind is not added.

    Raises:
        ValueError: for an unknown name.
    """
    names = names.split(",") if isinstance(names, str) else names or ()
    stripped = dict.fromkeys(name.strip() for name in names)
    for name in stripped:
        if name not in WATCHERS:
            raise ValueError(f"cannot watch {name!r}; choose from {', '.join(WATCHERS)}")
    present = {type(callback) for callback in besides}
    return [WATCHERS[name]() for name in stripped if WATCHERS[name] not in present]
