"""`qattn export-hf`: a checkpoint as a folder of Hugging Face."""

from pathlib import Path

from lightning_modules import progress
from lightning_modules.checkpoints import resolve
from lightning_modules.circuit_commands import command_parser
from lightning_modules.files import new_folder
from lightning_modules.guard import say_if_leaking
from lightning_modules.interchange import fast_tokenizer
from lightning_modules.labels import with_label
from lightning_modules.language_model import LanguageModel


def export_hf(argv: list[str]) -> None:
    """`qattn export-hf`."""
    parser = command_parser(
        "export-hf",
        "Writes a checkpoint as a folder of Hugging Face: weights as safetensors, configuration, tokenizer, and a "
        "model card from what the run has left.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="F", help="the .ckpt file, or the folder of a run (its best one)")
    add("--output", required=True, metavar="DIR", help="the folder; a new one, or empty")
    options = parser.parse_args(argv)
    # here, since it needs the extra `hf`, and help does not
    from lightning_modules import pretrained

    path = resolve(options.checkpoint)
    model = LanguageModel.load_from_checkpoint(path)
    say_if_leaking(model, options.checkpoint)
    following = progress.following(f"writing {options.output}")
    with following, new_folder(options.output) as folder, pretrained.without_progress():
        pretrained.to_transformers(model).save_pretrained(folder)
        fast_tokenizer(model.tokenizer).save_pretrained(folder)
        card = pretrained.model_card(model, path, Path(options.output).resolve().name)
        (folder / "README.md").write_text(card, encoding="utf-8")
    line = f"written: {options.output}; its README.md is the model card, to which a licence is yours to add"
    print(with_label(line, model.label))
