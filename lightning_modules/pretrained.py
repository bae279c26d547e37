"""Trained models as folders of Hugging Face, for `qattn export-hf`.

A folder has the weights as safetensors, the configuration as plain data, the tokenizer, and a model card from what the
run has left: what `push_to_hub` wants. Once this module has been imported, `AutoModelForCausalLM` and `AutoTokenizer`
read it, and nothing that a folder names is imported. Needs `transformers`, the extra `hf`.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lightning_modules.cli import version
from lightning_modules.gpt import GPT, GPTConfig
from lightning_modules.hugging_face import PreparedWhenRead
from lightning_modules.labels import is_partial
from lightning_modules.language_model import LanguageModel
from lightning_modules.run_report import find
from lightning_modules.variants import as_config
from pennylane_qattn import Mechanism
from pennylane_qattn.extras import install

try:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
    from transformers import __version__ as transformers_version
    from transformers.modeling_outputs import CausalLMOutput
    from transformers.utils import logging
except ImportError:
    raise ImportError(f"Hugging Face models need transformers; install it with: {install('hf')}") from None


class QAttnGPTConfig(PreTrainedConfig):
    """Configuration of a GPT of this package.

    Args:
        gpt: its shape as plain data (`GPTConfig.to_plain`).
        qattn: its mechanism as plain data (`Mechanism.to_plain`).
        **options: those of `PreTrainedConfig`.
    """

    model_type = "qattn-gpt"
    gpt: dict[str, Any] | None = None
    qattn: dict[str, Any] | None = None
    use_cache: bool = False

    @property
    def vocab_size(self) -> int:
        """Number of tokens known."""
        return self.gpt["vocab_size"]

    @property
    def hidden_size(self) -> int:
        """Width of the embedding."""
        return self.gpt["embed_dim"]

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks."""
        return self.gpt["num_layers"]

    @property
    def max_position_embeddings(self) -> int:
        """Longest sequence, in tokens."""
        return self.gpt["block_size"]


class QAttnGPTForCausalLM(PreparedWhenRead, PreTrainedModel, GenerationMixin):
    """A GPT of this package as a model of transformers.

    It writes without a cache; `qattn generate` has one.

    Args:
        config: its configuration.

    Raises:
        ValueError: for a configuration that describes no model.
    """

    config_class = QAttnGPTConfig
    base_model_prefix = "gpt"
    #: Where the configuration's `tie_word_embeddings` is set.
    _tied_weights_keys = {"gpt.head.weight": "gpt.token_embedding.weight"}

    def __init__(self, config: QAttnGPTConfig):
        super().__init__(config)
        if not config.gpt or not config.qattn:
            raise ValueError(
                "the configuration describes no model; it needs gpt and qattn, as qattn export-hf writes them"
            )
        with torch.device("cpu"):  # transformers builds a model without memory before it reads the weights
            self.gpt = GPT(GPTConfig.from_plain(config.gpt), Mechanism.from_plain(config.qattn))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **_,
    ) -> CausalLMOutput:
        """Logits of the token that follows each token, and with labels the loss.

        Args:
            input_ids: `(batch, seq)`.
            attention_mask: `(batch, seq)`, 0 at padding.
            labels: `(batch, seq)`, the tokens themselves; -100 is left out.
            past_key_values, use_cache: refused, there is no cache.
        """
        if past_key_values is not None or use_cache:
            raise ValueError("this model writes without a cache; set use_cache=False, or use qattn generate")
        padding = None if attention_mask is None else ~attention_mask.bool()
        logits = self.gpt(input_ids, key_padding_mask=padding)
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: the GPT has drawn its own."""

    def get_input_embeddings(self) -> torch.nn.Module:
        """The token embedding."""
        return self.gpt.token_embedding

    def get_output_embeddings(self) -> torch.nn.Module:
        """The output layer."""
        return self.gpt.head


AutoConfig.register(QAttnGPTConfig.model_type, QAttnGPTConfig)
AutoModelForCausalLM.register(QAttnGPTConfig, QAttnGPTForCausalLM)


def to_transformers(model: LanguageModel) -> QAttnGPTForCausalLM:
    """A model of transformers with a copy of the weights, in evaluation mode."""
    shape = model.gpt.config
    tied = {"tie_word_embeddings": shape.tied_head}
    config = QAttnGPTConfig(gpt=shape.to_plain(), qattn=model.attention.to_plain(), **tied)
    exported = QAttnGPTForCausalLM(config)
    exported.gpt.load_state_dict(model.gpt.state_dict())
    return exported.to(model.gpt.head.weight).eval()


@contextlib.contextmanager
def without_progress() -> Iterator[None]:
    """transformers draws no progress bars meanwhile."""
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def model_card(model: LanguageModel, checkpoint: Path, name: str) -> str:
    """The card of a model, in Markdown.

    Args:
        model: the model.
        checkpoint: where it was read from; of a run, its configuration and metrics are told too.
        name: of the folder, for the example.
    """
    shape, mechanism = model.gpt.config, model.attention
    parameters = sum(p.numel() for p in model.gpt.parameters() if p.requires_grad)
    tags = ["pennylane", "quantum-machine-learning", "pennylane-qattn", mechanism.name]
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    title = f"{mechanism.name} GPT, {parameters:,} parameters" + (f", {model.label}" if model.label else "")
    causality = model.causality or {}
    verdict = causality.get("verdict", "not examined")
    chosen = as_config(mechanism).get("init_args", {})
    facts = {
        "attention": f"`{mechanism.name}`" + (f" with {json.dumps(chosen)}" if chosen else ""),
        "layers, heads": f"{shape.num_layers}, {shape.num_heads}",
        "width, longest text": f"{shape.embed_dim}, {shape.block_size} tokens",
        "vocabulary": f"{shape.vocab_size:,} tokens, {type(model.tokenizer).__name__}",
        "trainable parameters": f"{parameters:,}",
        "certificate of causality": f"{verdict} in part" if is_partial(causality) else verdict,
    }
    if papers := _papers_of(mechanism):
        facts["paper"] = ", ".join(f"[arXiv:{paper}](https://arxiv.org/abs/{paper})" for paper in papers)
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n", f"# {title}\n"]
    parts.append("A language model with the attention of pennylane-qattn.\n\n" + _table("", "", facts))
    parts.append(_of_run(checkpoint))
    parts.append(
        "## Use\n\n```bash\npip install 'pennylane-qattn[hf]'  # or, in a copy of its repository: pip install '.[hf]'\n"
        f"```\n\n```python\nname = {json.dumps(name)}  # the folder, or the name of its repository on the Hub\n\n"
        "import lightning_modules.pretrained  # of pennylane-qattn\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "model = AutoModelForCausalLM.from_pretrained(name)\n"
        "tokenizer = AutoTokenizer.from_pretrained(name)\n"
        'tokens = tokenizer("The ", return_tensors="pt").input_ids\n'
        "print(tokenizer.decode(model.generate(tokens, max_new_tokens=8)[0]))\n```\n"
    )
    versions = f"torch {torch.__version__} and transformers {transformers_version}"
    parts.append(f"Exported by pennylane-qattn {version()} with {versions}.\n")
    return "\n".join(filter(None, parts))


def _papers_of(mechanism: Mechanism) -> list[str]:
    """The papers that a mechanism follows: those that its class names, or the nearest class above it that names any."""
    for cls in type(mechanism).__mro__:
        if cls is not Mechanism and (papers := re.findall(r"arXiv (\d{4}\.\d{4,5})", cls.__doc__ or "")):
            return papers
    return []


def _of_run(checkpoint: Path) -> str:
    """What the run of a checkpoint has left: how it was trained, and the metrics of the step that it holds."""
    run, text = find(checkpoint), ""
    data, model, trainer = (run.config.get(kind) or {} for kind in ("data", "model", "trainer"))
    chosen = {
        "text": data.get("corpus"),
        "seed": run.config.get("seed_everything"),
        "steps": trainer.get("max_steps"),
        "batch": data.get("batch_size"),
        "learning rate": model.get("learning_rate"),
    }
    if facts := {name: value for name, value in chosen.items() if value is not None}:
        text += "## Training\n\n" + _table("", "", facts) + "\n"
    source, metrics, _ = run.measured
    if metrics:
        numbers = {name: f"{value:.6g}" for name, value in metrics.items() if value is not None}
        text += f"## Metrics: {source}\n\n" + _table("metric", "value", numbers)
    return text


def _table(left: str, right: str, rows: dict[str, Any]) -> str:
    lines = [f"| {left} | {right} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines) + "\n"
