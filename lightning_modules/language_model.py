"""The language model that Lightning trains: a GPT, its tokenizer and how it is optimised, in one checkpoint."""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, Literal, Self, get_args

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_modules import checkpoints
from lightning_modules.compiling import compile_in_place
from lightning_modules.data import Batch
from lightning_modules.generation import generate, stream
from lightning_modules.gpt import GPT, GPTConfig, preset
from lightning_modules.labels import LEAKS, leaks
from lightning_modules.metrics import TextMetrics, below_optimum
from lightning_modules.processes import is_sharded, of_all_processes
from lightning_modules.sources import Source
from lightning_modules.tokenizers import Tokenizer, tokenizer_from_plain
from pennylane_qattn import ATTENTION, QISA, Certificate, Execution, Mechanism, set_execution

Schedule = Literal["constant", "cosine"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune"]
COMPILE_MODES = get_args(CompileMode)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How a language model is optimised; the arguments are those of `LanguageModel`."""

    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    warmup_steps: int
    schedule: Schedule
    final_learning_rate: float
    schedule_steps: int | None
    decay_all: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite; got {self.learning_rate}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must not be negative; got {self.weight_decay}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1); got {self.betas}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative; got {self.warmup_steps}")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"unknown schedule {self.schedule!r}; choose from constant, cosine")
        if not 0 <= self.final_learning_rate <= 1:
            raise ValueError(f"final_learning_rate is a fraction in [0, 1]; got {self.final_learning_rate}")
        if self.schedule_steps is not None and self.schedule_steps < 1:
            raise ValueError(f"schedule_steps must be at least 1; got {self.schedule_steps}")

    def learning_rate_at(self, step: int, total_steps: float) -> float:
        """The learning rate of optimizer step `step`, the first one being 0.

        It rises linearly over `warmup_steps` steps, then stays or falls as half a cosine to its final fraction, which
        it has from step `total_steps` on.
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        done = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        final = self.final_learning_rate
        return self.learning_rate * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)


class LanguageModel(L.LightningModule):
    """A GPT that predicts the next token of a text.

    Its checkpoints hold all there is to it (`load_from_checkpoint`). Logged are `train_loss`, `learning_rate`,
    `grad_norm` (before clipping) and `train_characters_per_second`, each of all processes together where there are
    several, and of validation and test what `TextMetrics` computes, with the cross-entropy, in nats per token, under
    the names `val_loss` and `test_loss`. Where the language of the text is known (`TextDataModule.source`), these are
    also `val_optimum`, `val_excess` and `val_excess_error`.

    Args:
        tokenizer: turns text into token ids; on the command line it comes from the data.
        preset: size and kind of the GPT: gpt1, gpt1-tiny, qisa-16, qisa-128, or a whole GPTConfig.
        attention: the mechanism, a class of pennylane_qattn or its name in the registry, for example qisa.
        num_layers: number of blocks; by default the preset's.
        num_heads: attention heads of each block; by default the preset's.
        embed_dim: width of the embedding; by default the preset's.
        block_size: longest sequence, in tokens; by default the preset's.
        dropout: after attention and feed-forward, and on the embedding where the preset has it there; by default the
            preset's.
        learning_rate: of AdamW, after the warm-up.
        weight_decay: of AdamW (decoupled, arXiv 1711.05101), for the matrices of linear maps only; biases, norms,
            embeddings, circuit angles and learned scalars do not decay.
        betas: of AdamW.
        warmup_steps: optimizer steps in which the learning rate rises linearly.
        schedule: what the learning rate does then: constant, or cosine, falling to final_learning_rate.
        final_learning_rate: where cosine ends, as a fraction of learning_rate.
        schedule_steps: optimizer steps until then, warm-up included; by default all steps of the run as it began.
            A run that is continued keeps its schedule, even if it is made longer.
        decay_all: all parameters decay, as with torch's AdamW left to itself.
        execution: how the circuits are run: folded, or on which device, with which gradients. No checkpoint keeps it.
        compile: train with `torch.compile`, or in one of its modes, as `reduce-overhead`, which records the kernels of
            a GPU and starts them all at once; folded circuits only.
        gradient_checkpointing: blocks keep their input alone in training and run again for the gradient: less memory,
            more time.

    Raises:
        ValueError: one line naming the wrong value and the remedy.

    >>> from lightning_modules import CharTokenizer
    >>> model = LanguageModel(CharTokenizer("abc"), attention="classical", num_layers=1)
    >>> len(model.generate(["ab"], 5)[0])
    7
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        preset: str | GPTConfig = "qisa-16",
        attention: Mechanism | str = QISA(),  # noqa: B008 a frozen value
        num_layers: int | None = None,
        num_heads: int | None = None,
        embed_dim: int | None = None,
        block_size: int | None = None,
        dropout: float | None = None,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_steps: int = 100,
        schedule: Schedule = "cosine",
        final_learning_rate: float = 0.1,
        schedule_steps: int | None = None,
        decay_all: bool = False,
        execution: Execution = Execution(),  # noqa: B008 a frozen value
        compile: bool | CompileMode = False,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self.optimisation = Optimisation(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            betas=betas,
            warmup_steps=warmup_steps,
            schedule=schedule,
            final_learning_rate=final_learning_rate,
            schedule_steps=schedule_steps,
            decay_all=decay_all,
        )
        sizes = dict(num_layers=num_layers, num_heads=num_heads, embed_dim=embed_dim, block_size=block_size)
        config = model_config(preset, vocab_size=tokenizer.vocab_size, dropout=dropout, **sizes)
        self.attention: Mechanism = ATTENTION.build(attention)
        self.gpt = GPT(config, self.attention)
        self.gpt.gradient_checkpointing = gradient_checkpointing
        if not isinstance(compile, bool) and compile not in COMPILE_MODES:
            raise ValueError(f"compile must be true, false or one of {', '.join(COMPILE_MODES)}; got {compile!r}")
        self.compile_training = compile
        self.set_execution(execution)
        self.metrics = nn.ModuleDict({"val": TextMetrics(tokenizer, text_windows=1024), "test": TextMetrics(tokenizer)})
        #: Cross-entropy (T,) at each position of the window, of the latest validation and test.
        self.cross_entropy_per_position: dict[str, Tensor] = {}
        #: The lowest that can be had on average in the same windows, where the language of the text is known.
        self.optimum_per_position: dict[str, Tensor] = {}
        #: Its latest certificate of causality, or that it was better than a causal model can be, as plain data;
        #: checkpoints keep it.
        self.causality: dict[str, Any] | None = None
        self._clock, self._tokens = _Stopwatch(), 0
        #: The step at which the schedule of the learning rate ends; known when training starts.
        self.total_steps: float | None = None
        self._continued_steps: float | None = None  # that of the run that is continued
        self._matrices: set[str] | None = None  # names of the parameters that decay

    def configure_model(self) -> None:
        self._matrices = self._find_matrices()  # before a strategy cuts them up, which takes their shape away

    def set_execution(self, execution: Execution) -> None:
        """Runs the circuits that way from now on; the weights stay as they are."""
        #: For every circuit feature map what runs it, and why.
        self.plans = set_execution(self.gpt, execution)
        if self.compile_training and (device := next((p.device for p in self.plans if p.executor != "folded"), None)):
            raise ValueError(f"torch.compile takes folded circuits only; leave compile out, or the device {device}")
        self.execution = execution

    @property
    def label(self) -> str:
        """`"LEAKS"` if the model is known to see later tokens, by its certificate or by construction; else `""`."""
        return LEAKS if leaks(self.causality) or getattr(self.attention, "is_published", False) else ""

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `(batch, seq, vocab)` of the token that follows each of `tokens` `(batch, seq)`."""
        return self.gpt(tokens)

    # --- training -----------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self.train()  # a model from a checkpoint comes in evaluation mode, and Lightning leaves the mode alone
        if self.compile_training:
            mode = "default" if self.compile_training is True else self.compile_training
            compile_in_place(self.gpt, mode)
        self.total_steps = self.optimisation.schedule_steps or self._steps_of_the_run()

    def on_train_start(self) -> None:
        self.total_steps, self._continued_steps = self._continued_steps or self.total_steps, None

    def _steps_of_the_run(self) -> float:
        if self.optimisation.schedule == "constant":
            return math.inf
        trainer = self.trainer
        # Not `estimated_stepping_batches`: asking for it keeps Lightning from restoring a loader's state.
        steps = planned_steps(trainer, (trainer.datamodule or self).train_dataloader)
        if steps == math.inf:
            raise ValueError("schedule 'cosine' needs an end; give max_steps, max_epochs or schedule_steps")
        return steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss, whole = self._over_processes(cross_entropy(self.gpt(inputs), targets), len(inputs))
        if not torch.isfinite(whole):  # on all processes or none, so none waits for another
            raise self._diverged(f"the loss is {whole.item()}", batch_idx)
        self._tokens += targets.numel()
        if self._is_logging():
            self.log("train_loss", whole, prog_bar=True, batch_size=len(inputs))
        return loss

    def _over_processes(self, loss: Tensor, windows: int) -> tuple[Tensor, Tensor]:
        """What this process is to differentiate, and the mean loss of the windows of all processes.

        Strategies average the gradients of processes, whatever number of windows each had: in the last batch of an
        epoch one may have more than another.
        """
        processes = self.trainer.world_size
        if processes == 1:
            return loss, loss.detach()
        sums = torch.stack([loss.detach() * windows, loss.new_tensor(windows)])
        total, count = self.trainer.strategy.reduce(sums, reduce_op="sum")
        return loss * (windows * processes / count), total / count

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        rate = self.optimisation.learning_rate_at(self.global_step, self.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if is_sharded(self.trainer):  # its root knows all parts
            norm = self.trainer.strategy.model.clip_grad_norm_(math.inf)
        else:
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # A gradient scaler meets infinities on its way to the right scale and skips such steps by itself.
        if not torch.isfinite(norm) and getattr(self.trainer.precision_plugin, "scaler", None) is None:
            raise self._diverged(f"the norm of the gradient is {norm.item()}")
        if self._is_logging():
            self.log_dict({"learning_rate": rate, "grad_norm": norm})

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val and is_sharded(self.trainer) and gradient_clip_algorithm in (None, "norm"):
            self.trainer.strategy.model.clip_grad_norm_(gradient_clip_val)  # Lightning would refuse
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _diverged(self, what: str, batch_idx: int | None = None) -> FloatingPointError:
        batch = self.trainer.fit_loop.batch_idx if batch_idx is None else batch_idx
        where = f"step {self.global_step} (epoch {self.current_epoch}, batch {batch})"
        return of_all_processes(
            FloatingPointError(
                f"{what} at {where}; stopped before it changed a weight; try a smaller learning_rate or more "
                "warmup_steps"
            )
        )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._clock.start()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self._is_logging():
            _, targets = batch
            characters = sum(len(self.tokenizer.decode(window)) for window in targets.tolist())
            rate = self._tokens * characters / targets.numel() / self._clock.read()
            self.log("train_characters_per_second", rate, sync_dist=True, reduce_fx="sum")
            self._tokens = 0
            self._clock.start()

    def _is_logging(self) -> bool:
        """Whether Lightning passes this step's values on; handing them over costs as much as a small layer."""
        return self.trainer._logger_connector.should_update_logs

    def configure_optimizers(self) -> torch.optim.Optimizer:
        options = self.optimisation
        mixed = self._trainer is not None and isinstance(self.trainer.precision_plugin, MixedPrecision)
        return torch.optim.AdamW(
            self.parameter_groups(),
            lr=options.learning_rate,
            betas=options.betas,
            weight_decay=options.weight_decay,
            fused=not mixed,  # a fifth of a small model's step; Lightning does not clip it in mixed precision
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The parameters that decay, and those that do not."""
        if self.optimisation.decay_all:
            return [{"params": list(self.parameters())}]
        names = self._find_matrices() if self._matrices is None else self._matrices
        parameters = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in self.named_parameters()}
        matrices = [p for name, p in parameters.items() if name in names]
        others = [p for name, p in parameters.items() if name not in names]
        return [{"params": matrices}, {"params": others, "weight_decay": 0.0}]

    def _find_matrices(self) -> set[str]:
        embeddings = {id(module.weight) for module in self.modules() if isinstance(module, nn.Embedding)}

        def decays(name: str, parameter: nn.Parameter) -> bool:
            # Linear maps call their matrix `weight`; circuit angles are `weights`, and vectors are norms' or biases.
            return name.endswith("weight") and parameter.ndim >= 2 and id(parameter) not in embeddings

        return {name for name, parameter in self.named_parameters() if decays(name, parameter)}

    # --- evaluation ---------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._clock.stop()
        self.metrics["val"].reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_start(self) -> None:
        self.metrics["test"].reset()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def _evaluate(self, stage: str, batch: Batch) -> None:
        inputs, targets = batch
        source = getattr(self.trainer.datamodule, "source", None)
        optimal = source.cross_entropy(inputs, targets) if isinstance(source, Source) else None
        self.metrics[stage].update(self.gpt(inputs), targets, optimal)

    def _log_metrics(self, stage: str) -> None:
        values = self.metrics[stage].compute()
        self.optimum_per_position.pop(stage, None)
        if "excess" in values:
            self.optimum_per_position[stage] = values.pop("optimum_per_position").reshape(-1).cpu()
        per_position = values.pop("cross_entropy_per_position").reshape(-1).cpu()  # torchmetrics drops a single axis
        self.cross_entropy_per_position[stage] = per_position
        # The values are those of all processes already; without `sync_dist` Lightning would warn that they are not.
        self.log(f"{stage}_loss", values.pop("cross_entropy"), prog_bar=True, sync_dist=True)
        self.log_dict({f"{stage}_{name}": value for name, value in values.items()}, sync_dist=True)
        if self.trainer.sanity_checking:
            return
        if "excess" in values:
            self._compare_with_optimum(stage, float(values["excess"]), float(values["excess_error"]))
        row = {f"position_{i:04}": value for i, value in enumerate(per_position.tolist())}
        for logger in self.trainer.loggers:
            if hasattr(logger, "log_row"):
                step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
                logger.log_row(f"{stage}_cross_entropy_per_position", row, step)

    def _compare_with_optimum(self, stage: str, excess: float, error: float) -> None:
        """Notes a leak as a certificate would, if the model is better than a causal one can be."""
        from lightning_modules.executions import say  # which imports this module

        windows = torch.tensor(self.metrics[stage].excess.windows, device=self.device)
        if below_optimum(excess, error, windows=int(self.trainer.strategy.reduce(windows, reduce_op="sum"))):
            below = f"{-excess:.4f} nats (standard error {error:.4f}) below the least that a causal model can have"
            say(f"{stage}_loss is {below}, so the model {LEAKS}")
            if not leaks(self.causality):
                found = Certificate(f"{self.attention.name} GPT", LEAKS, reason=f"{stage}_loss is {below}")
                self.causality = found.to_plain()

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """For each window a dict of `input` and `target` text, the most likely next tokens as text (`argmax`), and
        the `log_likelihood` of the target in nats."""
        inputs, targets = batch
        logits = self.gpt(inputs)
        losses = cross_entropy(logits, targets, reduction="none").double().sum(-1)
        decode = self.tokenizer.decode
        return [
            {"input": decode(given), "target": decode(true), "argmax": decode(best), "log_likelihood": -nats}
            for given, true, best, nats in zip(
                inputs.tolist(), targets.tolist(), logits.argmax(-1).tolist(), losses.tolist(), strict=True
            )
        ]

    # --- generation ---------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 200, **options: Any) -> list[str]:
        """Continues each prompt; returns prompt and continuation as text.

        Args:
            prompts: texts of at least one token.
            max_new_tokens: tokens to add to each.
            **options: temperature, top_k, top_p, seed, ... of `lightning_modules.generation.generate`.
        """
        ids = [self.tokenizer.encode(prompt) for prompt in prompts]
        return [self.tokenizer.decode(text) for text in generate(self.gpt, ids, max_new_tokens, **options)]

    def stream(self, prompt: str, max_new_tokens: int = 200, **options: Any) -> Iterator[str]:
        """The continuation of one prompt in pieces, as they come; arguments as in `generate`."""
        decode, ids = self.tokenizer.decode, self.tokenizer.encode(prompt)
        # Decoded are the tokens since the piece before last, as blanks depend on what is before, and not all of them.
        begin, said = 0, len(ids)
        for (token,) in stream(self.gpt, [ids], max_new_tokens, **options):
            ids.append(token)
            text = decode(ids[begin:])
            if not text.endswith("\ufffd"):  # half of a character that takes several tokens
                yield text[len(decode(ids[begin:said])) :]
                begin, said = said, len(ids)
        if said < len(ids):
            yield decode(ids[begin:])[len(decode(ids[begin:said])) :]

    # --- checkpoints --------------------------------------------------------------------------------------------

    def to_plain(self) -> dict[str, Any]:
        """What the model is, weights apart, as plain data."""
        return {
            "format": checkpoints.FORMAT,
            "version": checkpoints.VERSION,
            "attention": self.attention.to_plain(),
            "gpt": self.gpt.config.to_plain(),
            "tokenizer": self.tokenizer.to_plain(),
            "optimisation": dataclasses.asdict(self.optimisation),
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        """A model, with weights drawn anew, from what `to_plain` gave."""
        return cls(
            tokenizer_from_plain(plain["tokenizer"]),
            GPTConfig.from_plain(plain["gpt"]),
            Mechanism.from_plain(plain["attention"]),
            **plain["optimisation"],
        )

    @classmethod
    def load_from_checkpoint(cls, path: str | os.PathLike[str], map_location: str | torch.device | None = None) -> Self:
        """The model of a checkpoint, in evaluation mode, with everything that belongs to it.

        Args:
            path: a file that `qattn fit`, or a Trainer, wrote.
            map_location: the device for it; by default the CPU.

        Raises:
            ValueError: one line, if the file is missing, damaged, from another program, or holds more than data.
        """
        device = torch.device("cpu" if map_location is None else map_location)
        content = checkpoints.read_checkpoint(path, device)
        try:
            with torch.random.fork_rng(devices=[]):
                model = cls.from_plain(content["hyper_parameters"])
            checkpoints.load_weights(model, content["state_dict"])
            model._take_certificate(content)
        except (KeyError, TypeError) as error:
            reason = f"its description of the model is not complete ({type(error).__name__}: {error})"
            raise ValueError(f"cannot rebuild the model of {str(path)!r}: {reason}") from error
        except ValueError as error:
            raise ValueError(f"cannot rebuild the model of {str(path)!r}: {error}") from error
        return model.to(device).eval()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["hyper_parameters"] = self.to_plain()
        checkpoint["schedule_steps"] = self.total_steps
        if self.causality is not None:
            checkpoint["causality"] = self.causality

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to continue a run with another model: ValueError naming the first difference."""
        if found := checkpoints.first_difference(checkpoint.get("hyper_parameters", {}), self.to_plain()):
            raise ValueError(
                f"the checkpoint holds another model: {found}; continue with the options that it began with"
            )
        is_here_in_parts = self._trainer is not None and is_sharded(self.trainer)  # and torch puts it together by name
        if not is_here_in_parts and checkpoint.get("optimizer_states"):
            wrong = self._wrong_in(checkpoint["optimizer_states"], checkpoint["global_step"], checkpoint["state_dict"])
            if wrong := wrong and f"{wrong} of the optimizer does not fit the model" or self._wrong_weight(checkpoint):
                raise ValueError(f"the checkpoint is damaged: {wrong}; use another copy, or an earlier checkpoint")
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._continued_steps = checkpoint.get("schedule_steps")
            # Lightning loads the weights before it converts the model, which would round double to single precision.
            checkpoints.take_precision(self, checkpoint.get("state_dict", {}))  # FSDP has loaded them already
        self._take_certificate(checkpoint)

    def _wrong_weight(self, checkpoint: dict[str, Any]) -> str:
        """What is wrong with a parameter in a checkpoint; what is missing or of another shape is torch's to tell."""
        precision = None
        for name, parameter in self.named_parameters():
            value = checkpoint["state_dict"].get(name)
            if value is None:
                continue
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return f"{name} is no tensor of {parameter.dtype}"
            if value.dtype != (precision := precision or value.dtype):
                return f"{name} is in {value.dtype} and others are in {precision}"
            if not _is_finite(value):
                return f"{name} has values that are not finite"
        return ""

    def _wrong_in(self, saved: Any, global_step: int, weights: dict[str, Tensor]) -> str:
        """What in the optimizer's state is not of this model; torch's fused steps would read beyond shorter tensors."""
        optimizer = self.configure_optimizers()
        own, parameters = optimizer.state_dict(), [p for group in optimizer.param_groups for p in group["params"]]
        if (
            not isinstance(saved, list)
            or len(saved) != 1
            or not isinstance(saved[0], dict)
            or saved[0].keys() != own.keys()
        ):
            return "the state"
        groups = saved[0]["param_groups"]
        if _settings(groups) != _settings(own["param_groups"]):
            return "a group of parameters"
        # FSDP numbers parameters in the order of the model, everybody else in that of the groups
        numbered = dict(zip((number for group in groups for number in group["params"]), parameters, strict=True))
        if len(numbered) < len(parameters):
            return "a group of parameters"
        states = saved[0]["state"]
        if not isinstance(states, dict):
            return "the state"
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        for number, state in states.items():
            if number not in numbered:
                return f"the state of parameter {number}"
            name = names[id(numbered[number])]
            if wrong := _wrong_in_state(state, numbered[number].shape, global_step, weights.get(name)):
                return f"{wrong} of {name}"
        # Without a gradient there is no state, and before the first step there is none at all.
        if global_step and (absent := [p for number, p in numbered.items() if number not in states]):
            reached = (parameter for parameter in absent if self._is_reached(parameter))
            if (lost := next(reached, None)) is not None:
                return f"the missing state of {names[id(lost)]}"
        return ""

    def _is_reached(self, parameter: nn.Parameter) -> bool:
        """Whether the loss has a gradient with respect to a parameter."""
        tokens = torch.zeros(1, self.gpt.config.block_size, dtype=torch.int64, device=parameter.device)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            return torch.autograd.grad(self.gpt(tokens).sum(), parameter, allow_unused=True)[0] is not None

    def _take_certificate(self, checkpoint: dict[str, Any]) -> None:
        certificate = checkpoint.get("causality")
        self.causality = certificate if isinstance(certificate, dict) else None


def _settings(groups: Any) -> Any:
    """Groups of parameters with their options and how many parameters they have.

    Of the options that are set anew in every step, or may be others on another machine, only the kind.
    """
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return None

    def setting(name: str, value: Any) -> Any:
        if name == "params" and isinstance(value, list) and all(type(number) is int for number in value):
            return len(value)
        return type(value) if name in ("params", "lr", "fused", "foreach") else (type(value), value)

    return [{name: setting(name, value) for name, value in group.items()} for group in groups]


def _wrong_in_state(state: Any, shape: torch.Size, global_step: int, weight: Tensor | None) -> str:
    """Which part of AdamW's state of a parameter cannot be after so many steps; empty if none."""
    moments = ("exp_avg", "exp_avg_sq")
    if not isinstance(state, dict) or state.keys() != {"step", *moments}:
        return "the state"
    for name, value in state.items():
        expected = torch.Size() if name == "step" else shape
        if not isinstance(value, Tensor) or value.shape != expected or not value.is_floating_point():
            return name
        if name in moments and isinstance(weight, Tensor) and value.dtype != weight.dtype:
            return name
        if not _is_finite(value):
            return f"{name}, which is not finite,"
    if any(value.is_meta for value in state.values()):
        return ""
    if not 1 <= (step := state["step"].item()) <= global_step or step % 1:
        return f"step {step:g} after {global_step} steps"
    return "a negative exp_avg_sq" if (state["exp_avg_sq"] < 0).any() else ""


def _is_finite(value: Tensor) -> bool:
    """Whether all numbers are; a tensor on the meta device has none."""
    return value.is_meta or bool(value.isfinite().all())


def planned_steps(trainer: L.Trainer, train_dataloader: Callable[[], Sized]) -> float:
    """The optimizer steps after which a trainer's max_steps or max_epochs ends a run; infinite without either."""
    steps = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        batches = batches_per_epoch(trainer, train_dataloader)
        steps = min(steps, trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches))
    return steps


def batches_per_epoch(trainer: L.Trainer, train_dataloader: Callable[[], Sized]) -> int:
    """The batches of an epoch that a trainer trains on."""
    batches, limit = len(train_dataloader()), trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def model_config(name: str | GPTConfig, **overrides: Any) -> GPTConfig:
    """The preset, or the given config, with those fields replaced that are not `None`.

    `dropout` is replaced on the embedding too, where there is any, and a feed-forward of four times the embedding stays
    that.
    """
    config = preset(name) if isinstance(name, str) else name
    overrides = {field: value for field, value in overrides.items() if value is not None}
    if "embed_dim" in overrides and config.feedforward_dim == 4 * config.embed_dim:
        overrides["feedforward_dim"] = None
    if "dropout" in overrides and config.embed_dropout:
        overrides["embed_dropout"] = overrides["dropout"]
    return dataclasses.replace(config, **overrides)


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats, in float32 at least, of `(B, T, V)` against `(B, T)`; of that shape without reduction."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(precise.flatten(0, 1), targets.flatten(), reduction=reduction)
    return losses.view_as(targets) if reduction == "none" else losses


class _Stopwatch:
    """Seconds of running since the last reading."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = None

    def start(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def read(self) -> float:
        self.stop()
        seconds, self._seconds = self._seconds, 0.0
        return seconds
