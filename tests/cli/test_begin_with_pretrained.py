"""`qattn fit --pretrained`: a run that begins with weights and tokenizer that transformers has written."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_modules import cli
from lightning_modules.checkpoints import read_checkpoint
from lightning_modules.interchange import fast_tokenizer
from lightning_modules.tokenizers import BPETokenizer
from lightning_modules.training_cli import TrainingCLI

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

TEXT = "the quick brown fox jumps over the lazy dog. " * 12
LAST = "runs/a/checkpoints/last.ckpt"


@pytest.fixture
def theirs(tmp_path):
    """A small model of random weights with its tokenizer, in the folder `theirs`."""
    torch.manual_seed(0)
    tokenizer = BPETokenizer.train(TEXT, 270)
    sizes = {"n_positions": 7, "n_embd": 10, "n_layer": 3, "n_head": 5, "vocab_size": tokenizer.vocab_size}
    config = transformers.OpenAIGPTConfig(**sizes, attn_pdrop=0.13, resid_pdrop=0.11, initializer_range=0.3)
    model = transformers.OpenAIGPTLMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "theirs")
    fast_tokenizer(tokenizer).save_pretrained(tmp_path / "theirs")
    return model


@pytest.fixture
def begin(text_file):
    """Options of a run that begins with `theirs`."""
    return [
        *("--pretrained", "theirs", "--data.corpus", str(text_file), "--data.batch_size", "4"),
        *("--data.eval_windows", "7", "--trainer.max_steps", "3", "--trainer.val_check_interval", "1"),
        *("--trainer.accelerator", "cpu", "--run", "a", "--report", "false"),
    ]


def test_it_begins_as_theirs(theirs, begin):
    setup = TrainingCLI("fit", begin)
    text = TEXT[5:60]
    ours = setup.model.tokenizer.encode(text)
    assert ours == transformers.AutoTokenizer.from_pretrained("theirs")(text).input_ids
    tokens = torch.tensor([ours[:7], ours[3:10]])
    with torch.no_grad():
        torch.testing.assert_close(setup.model.eval()(tokens), theirs(tokens).logits)
    assert setup.model.attention.dropout == 0.13 and setup.model.gpt.config.dropout == 0.11
    assert setup.datamodule.block_size == 7


def test_it_trains_and_can_be_made_again(theirs, begin, capsys):
    assert cli.main(["fit", *begin]) == 0
    state = read_checkpoint(LAST)["state_dict"]
    moved = state["gpt.token_embedding.weight"] - theirs.transformer.tokens_embed.weight
    assert 0 < moved.abs().max() < 0.01  # three steps of a warm-up from there
    config = yaml.safe_load(Path("runs/a/config.yaml").read_text())
    assert config["pretrained"] == "theirs" and config["model"]["preset"]["num_layers"] == 3
    assert cli.main(["fit", "--config", "runs/a/config.yaml", "--run", "b"]) == 0
    again = read_checkpoint("runs/b/checkpoints/last.ckpt")["state_dict"]
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert cli.main(["fit", *begin, "--trainer.max_steps", "5", "--ckpt_path", "last"]) == 0
    assert read_checkpoint(LAST)["global_step"] == 5
    capsys.readouterr()
    assert cli.main(["generate", "--checkpoint", "runs/a", "--prompt", "the", "--max_new_tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("the")


def test_dropout_is_the_runs_own_choice(theirs, begin):
    setup = TrainingCLI("fit", [*begin, "--model.dropout", "0", "--model.attention.dropout", "0"])
    assert setup.model.gpt.config.dropout == 0 and setup.model.attention.dropout == 0 and setup.model.attention.bias


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (["--model.num_layers", "2"], "num_layers 3, and the options say 2"),
        (["--model.preset", "qisa-16"], "block_size 7, and the options say 16"),
        (["--model.attention", "qisa"], "name 'classical', and the options say 'qisa'"),
        (["--model.attention.bias", "false"], "bias True, and the options say False"),
        (["--data.tokenizer", "char"], "vocab_size 270, and the options say 28"),
    ],
)
def test_another_model_is_refused(theirs, begin, refused, options, difference):
    remedy = "leave sizes, attention and tokenizer out, as they come from the folder"
    assert refused("fit", *begin, *options) == f"the model in 'theirs' has {difference}; {remedy}"
    assert not Path("runs").exists()


def test_a_folder_without_a_model_is_refused(begin, refused):
    assert refused("fit", *begin) == "'theirs' holds no model; name a folder with a config.json"


def test_what_is_pickled_is_not_run(theirs, begin, refused, tmp_path):
    (tmp_path / "theirs" / "model.safetensors").unlink()

    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    torch.save({"x": Harm()}, tmp_path / "theirs" / "pytorch_model.bin")
    assert "cannot read the model in 'theirs'" in refused("fit", *begin)
    assert not (tmp_path / "harm").exists()


def test_without_transformers_the_extra_is_named(theirs, begin, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pennylane-qattn[hf]" in refused("fit", *begin, status=1)
