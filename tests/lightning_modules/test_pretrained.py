"""Folders of Hugging Face from trained models, read by transformers, against the model itself."""

import re

import pytest
import torch
import yaml

from lightning_modules import cli
from lightning_modules.checkpoints import PlainCheckpointIO
from lightning_modules.generation import generate
from lightning_modules.gpt import preset
from lightning_modules.language_model import LanguageModel
from lightning_modules.tokenizers import BPETokenizer, CharTokenizer
from pennylane_qattn import ATTENTION

transformers = pytest.importorskip("transformers")
from lightning_modules.pretrained import QAttnGPTConfig, QAttnGPTForCausalLM, model_card, to_transformers  # noqa: E402

TEXT = "to be, or not to be: that is the question. " * 4


def model_of(name="qisa", tokenizer=None, **options):
    torch.manual_seed(0)
    tokenizer = tokenizer or CharTokenizer.train(TEXT)
    config = preset("qisa-16", num_layers=2, embed_dim=8, vocab_size=tokenizer.vocab_size, **options)
    return LanguageModel(tokenizer, config, ATTENTION.build(name)).eval()


def written(model, folder):
    """A checkpoint of the model, as a run leaves it."""
    content = {"state_dict": model.state_dict()}
    content["hyper_parameters"] = model.to_plain()
    if model.causality is not None:
        content["causality"] = model.causality
    PlainCheckpointIO().save_checkpoint(content, folder / "checkpoints" / "best.ckpt")
    return folder


@pytest.mark.parametrize("name", list(ATTENTION))
def test_the_same_model(name, tmp_path, rng):
    model = model_of(name)
    exported = to_transformers(model)
    exported.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is QAttnGPTForCausalLM and not again.training
    tokens = torch.randint(model.gpt.config.vocab_size, (3, 7), generator=rng)
    expected = model.gpt(tokens)
    assert torch.equal(exported(tokens).logits, expected)
    assert torch.equal(again(tokens).logits, expected)


@pytest.mark.parametrize("options", [{}, {"tied_head": True, "head_bias": False}])
def test_writes_what_ours_writes(options, tmp_path, rng):
    model = model_of(**options)
    to_transformers(model).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(model.gpt.config.vocab_size, (2, 5), generator=rng)
    text = again.generate(tokens, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(tokens))
    assert text.tolist() == generate(model.gpt, tokens.tolist(), 6, temperature=0)
    with pytest.raises(ValueError, match="this model writes without a cache; set use_cache=False"):
        again.generate(tokens, max_new_tokens=2, use_cache=True)


def test_padding_and_loss(rng):
    model = model_of()
    exported = to_transformers(model)
    tokens = torch.randint(model.gpt.config.vocab_size, (2, 6), generator=rng)
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    padded = exported(tokens, attention_mask=mask).logits
    torch.testing.assert_close(padded[1:, 2:], exported(tokens[1:, 2:]).logits)
    labels = tokens.masked_fill(mask == 0, -100)
    loss = exported(tokens, attention_mask=mask, labels=labels).loss
    logits = padded[:, :-1].log_softmax(-1)
    picked = logits.gather(-1, tokens[:, 1:, None])[..., 0]
    counted = mask[:, 1:].bool()
    torch.testing.assert_close(loss, -(picked[counted]).mean())


@pytest.mark.parametrize("tokenizer", [CharTokenizer.train(TEXT), BPETokenizer.train(TEXT, 270)])
def test_the_command(tokenizer, tmp_path, capsys):
    model = model_of(tokenizer=tokenizer)
    model.causality = {"verdict": "causal"}
    run = written(model, tmp_path / "run")
    (run / "metrics.csv").write_text("step,val_loss,train_loss\n1,3.5,\n2,,9\n3,2.25,\n")
    (run / "config.yaml").write_text(
        "# qattn 0, torch 0\nseed_everything: 7\ndata: {corpus: pydoc, batch_size: 3}\n"
        "model: {learning_rate: 0.5}\ntrainer: {max_steps: 11}\n"
    )
    assert cli.main(["export-hf", "--checkpoint", str(run), "--output", str(tmp_path / "hf")]) == 0
    assert "a licence is yours to add" in capsys.readouterr().out
    card = (tmp_path / "hf" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "text-generation" and "qisa" in front["tags"]
    for line in (
        "| certificate of causality | causal |",
        "| text | pydoc |",
        "| seed | 7 |",
        "| cross_entropy | 2.25 |",
        "| paper | [arXiv:2603.03318](https://arxiv.org/abs/2603.03318) |",
        "pip install 'pennylane-qattn[hf]'",
        f"with torch {torch.__version__} and transformers {transformers.__version__}.",
    ):
        assert line in card
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert reader(TEXT[:20]).input_ids == tokenizer.encode(TEXT[:20])
    assert reader.decode(tokenizer.encode(TEXT[:20])) == TEXT[:20]
    assert cli.main(["export-hf", "--checkpoint", str(run), "--output", str(tmp_path / "hf")]) == 2
    assert "exists already; name a new folder or an empty one" in capsys.readouterr().err


def test_the_program_on_the_card_runs(tmp_path, capsys, monkeypatch):
    run = written(model_of(), tmp_path / "run")
    assert cli.main(["export-hf", "--checkpoint", str(run), "--output", str(tmp_path / "hf")]) == 0
    program = (tmp_path / "hf" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert str(tmp_path) not in program
    monkeypatch.chdir(tmp_path)  # where the folder is known by its name
    exec(program.replace("The ", "to "), {})
    assert capsys.readouterr().out.splitlines()[-1].startswith("to ")


def test_a_leak_is_told(tmp_path):
    model = model_of("qisa-published")
    model.causality = {"verdict": "LEAKS"}
    card = model_card(model, written(model, tmp_path) / "checkpoints" / "best.ckpt", "leaking")
    assert "LEAKS" in card.split("\n## ")[0] and "## Training" not in card


@pytest.mark.parametrize(
    "name, paper",
    [("classical", "1706.03762"), ("qsann", "2205.05625"), ("qisa-published", "2603.03318"), ("grover", "2307.08045")],
)
def test_the_card_names_the_paper(name, paper, tmp_path):
    model = model_of(name)
    card = model_card(model, written(model, tmp_path) / "checkpoints" / "best.ckpt", name)
    assert re.findall(r"arXiv:([\d.]+)", card) == [paper]


def test_the_card_of_what_is_in_no_paper_names_none(tmp_path):
    model = model_of("gaussian")
    assert "arXiv" not in model_card(model, written(model, tmp_path) / "checkpoints" / "best.ckpt", "gaussian")


def test_a_configuration_of_nothing_is_refused():
    with pytest.raises(ValueError, match="the configuration describes no model"):
        QAttnGPTForCausalLM(QAttnGPTConfig())
