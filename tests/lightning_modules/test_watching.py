"""What the watchers log against other ways to compute it; and that a run with them is the run without them."""

import csv
import math
import os
from pathlib import Path

import lightning as L
import numpy as np
import pennylane as qml
import pytest
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules import cli
from lightning_modules.callbacks import Interrupted, RandomState, RunCheckpoint
from lightning_modules.checkpoints import PlainCheckpointIO, read_checkpoint
from lightning_modules.data import TextDataModule
from lightning_modules.inspection import attention_maps
from lightning_modules.language_model import LanguageModel
from lightning_modules.loggers import RunCSVLogger
from lightning_modules.tokenizers import CharTokenizer
from lightning_modules.watching import (
    WATCHERS,
    AttentionEntropy,
    AttentionMaps,
    Entanglement,
    GradientVariance,
    RunningVariance,
    attention_entropy,
    attention_layers,
    circuit_maps,
    kept,
    watchers,
    wires_of_weights,
)
from pennylane_qattn import QISA, BasicEntangler, FunctionAnsatz, QISAAnsatz, StateFeatureMap, StronglyEntangling
from pennylane_qattn.entanglement import meyer_wallach
from pennylane_qattn.execution import set_execution

pytestmark = [
    # Lightning 2.6 uses what torch 2.13 calls deprecated.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
]

TEXT = "the quick brown fox jumps over the lazy dog. " * 12
DEFAULTS = dict(
    max_steps=11, val_check_interval=4, check_val_every_n_epoch=None, log_every_n_steps=1, gradient_clip_val=0.1
)


@pytest.fixture
def run(tmp_path):
    """Trains a tiny model with dropout in a folder of its own, or continues it; epochs of six batches."""
    (tmp_path / "text.txt").write_text(TEXT)

    def run(name, *callbacks, resume=False, loggers=(), attention="qisa", **options):
        folder = tmp_path / name
        L.seed_everything(0, verbose=False)
        split = dict(batch_size=4, eval_windows=7, shuffle="windows", samples_per_epoch=24)
        data = TextDataModule(str(tmp_path / "text.txt"), block_size=5, **split)
        sizes = dict(num_layers=2, num_heads=2, embed_dim=6, block_size=5, dropout=0.3, warmup_steps=2)
        file = folder / "checkpoints" / "last.ckpt"
        trainer = L.Trainer(
            **{**DEFAULTS, **options},
            accelerator="cpu",
            plugins=[PlainCheckpointIO()],
            logger=[RunCSVLogger(folder, read_checkpoint(file)["global_step"] if resume else None), *loggers],
            callbacks=[RandomState(), RunCheckpoint(folder / "checkpoints", 3), *callbacks],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = LanguageModel(data.tokenizer, attention=attention, **sizes)
        trainer.fit(module, datamodule=data, ckpt_path=file if resume else None)
        return module

    return run


@pytest.fixture
def logged(tmp_path):
    """The values of a run by name: dicts from step to number."""

    def logged(name, prefix=""):
        values = {}
        for row in rows(tmp_path / name):
            for key, value in row.items():
                if value and key.startswith(prefix):
                    values.setdefault(key, {})[int(row["step"])] = float(value)
        return values

    return logged


def rows(folder):
    with open(folder / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if k != "train_characters_per_second"} for row in csv.DictReader(file)]


def every_watcher():
    return [GradientVariance(horizon=5), Entanglement(), AttentionEntropy(), AttentionMaps(every_n_validations=2)]


class Gradients(L.Callback):
    """Keeps the gradient of each circuit's angles at every step."""

    def __init__(self):
        self.seen = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for name, feature_map in circuit_maps(pl_module).items():
            self.seen.setdefault(name, []).append(feature_map.weights.grad.double().numpy().copy())


# --- which angles are on which wire -----------------------------------------------------------------------------


def wires_by_place(ansatz, num_wires):
    return wires_of_weights(ansatz.program(num_wires)).unflatten(1, ansatz.shape(num_wires))


def along(axis, shape):
    """`True` where the index along an axis is the number of the wire."""
    index = torch.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)
    return torch.stack([index == wire for wire in range(shape[axis])])


@pytest.mark.parametrize(
    ("ansatz", "shape", "axis"),
    [
        (QISAAnsatz(layers=2), (2, 3, 5), 2),
        (StronglyEntangling(layers=2), (2, 5, 3), 1),
        (BasicEntangler(layers=3), (3, 5), 1),
    ],
)
def test_the_axis_of_the_wires_is_asked_of_the_ansatz(ansatz, shape, axis):
    assert torch.equal(wires_by_place(ansatz, 5), along(axis, shape))


def selecting(weights, wires):
    qml.RX(weights[3], wires=wires[0])
    qml.IsingXX(weights[1], wires=[wires[2], wires[0]])
    qml.CRY(weights[0], wires=[wires[1], wires[2]])
    qml.RZ(weights[3], wires=wires[1])


def computing(weights, wires):
    qml.RX(2 * weights[0] + weights[1], wires=wires[2])
    qml.RY(weights[3] * weights[1], wires=wires[0])
    qml.RZ(weights[3] * 0.5, wires=wires[2])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (selecting, [[0, 1, 0, 1], [1, 0, 0, 1], [1, 1, 0, 0]]),
        (computing, [[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1]]),
    ],
)
def test_wires_of_a_users_ansatz(function, expected):
    program = FunctionAnsatz(function, (4,)).program(3)
    assert (program.entries is None) == (function is computing)
    assert wires_of_weights(program).int().tolist() == expected


# --- gradient variance ------------------------------------------------------------------------------------------


def weighted_variance(values, decay):
    weights = decay ** np.arange(len(values) - 1, -1, -1)
    mean = np.average(values, axis=0, weights=weights)
    squares = np.tensordot(weights, (np.asarray(values) - mean) ** 2, axes=1)
    return squares / (weights.sum() - (weights**2).sum() / weights.sum())


@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_running_variance(decay, rng):
    stream = 1e6 + torch.randn(13, 3, generator=rng, dtype=torch.float64)
    running = RunningVariance(decay)
    assert running.variance is None
    for count, x in enumerate(stream, start=1):
        running.add(x)
        if count == 1:
            assert running.variance is None
        else:
            np.testing.assert_allclose(running.variance, weighted_variance(stream[:count].numpy(), decay), rtol=1e-8)
        if count == 5:  # saved and read
            state, running = running.state_dict(), RunningVariance(decay)
            running.load_state_dict(state)
    if decay == 1:
        np.testing.assert_allclose(running.variance, stream.numpy().var(0, ddof=1), rtol=1e-8)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "max_steps": 5}])
def test_gradient_variance_by_hand(run, logged, options):
    gradients = Gradients()
    run("a", GradientVariance(horizon=4), gradients, attention="qsann", **options)
    steps = options.get("max_steps", 11)
    names = {f"layer{layer}/{role}" for layer in range(2) for role in ("query", "key", "value")}
    assert gradients.seen.keys() == names
    expected = {}
    for name, seen in gradients.seen.items():
        assert len(seen) == steps and seen[0].shape == (2, 1, 3, 3)  # heads, layers, 3, wires
        for step in range(steps):
            square, variance = seen[step] ** 2, weighted_variance(seen[: step + 1], 0.75) if step else None
            for quantity, values in (("gradient_square", square), ("gradient_variance", variance)):
                if values is not None:
                    expected.setdefault(f"{quantity}/{name}", {})[step] = values.mean()
                    for wire in range(3):
                        column = expected.setdefault(f"{quantity}/{name}/wire{wire}", {})
                        column[step] = values[..., wire].mean()
    found = logged("a", "gradient_")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-5)


def test_gradients_of_a_users_ansatz(run, logged):
    gradients = Gradients()
    run("a", GradientVariance(), gradients, attention=QISA(ansatz=FunctionAnsatz(selecting, (4,))))
    square = gradients.seen["layer1/value"][7] ** 2
    found = {name: values[7] for name, values in logged("a", "gradient_square/layer1/").items()}
    names = ["gradient_square/layer1/value" + wire for wire in ("", "/wire0", "/wire1", "/wire2")]
    places = [[0, 1, 3], [1, 3], [0, 3], [0, 1]]  # the third angle turns nothing
    assert found == pytest.approx(
        {name: square[:, of].mean() for name, of in zip(names, places, strict=True)}, rel=1e-5
    )


# --- entanglement and entropy -----------------------------------------------------------------------------------


class FirstInputs(L.Callback):
    """Keeps what the circuits and the attentions read in the first batch of the latest validation."""

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.seen, self.handles = {}, []
        if batch_idx == 0:
            self.first = {}
            for name, module in {**circuit_maps(pl_module), **attention_layers(pl_module)}.items():

                def keep(module, args, name=name):
                    self.first[name] = args[0].clone()

                self.handles.append(module.register_forward_pre_hook(keep))

    def on_validation_batch_end(self, *_):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize(("split", "encoding"), [(False, "amplitude"), (True, "angle")])
def test_entanglement_of_the_validation_batch(run, logged, split, encoding):
    inputs = FirstInputs()
    attention = QISA(split=split, encoding=encoding)
    model = run("a", Entanglement(windows=3), inputs, attention=attention, max_steps=8)
    found = logged("a", "meyer_wallach")
    assert len(found) == 2 * 2 * 2
    for layer in range(2):
        name = f"layer{layer}/value"
        feature_map, x = circuit_maps(model)[name], inputs.first[name][:3]
        final = StateFeatureMap(6, 2, encoding=encoding, split=split)
        final.weights = feature_map.weights
        with torch.no_grad():
            expected = meyer_wallach(final(x)).mean((0, 2))
        for head in range(2):
            assert found[f"meyer_wallach/{name}/head{head}"][7] == pytest.approx(expected[head].item(), abs=1e-6)
            encoded = found[f"meyer_wallach_encoded/{name}/head{head}"][7]
            if encoding == "angle":
                assert encoded == pytest.approx(0, abs=1e-6)
            else:
                states = torch.nn.functional.pad(x / x.norm(dim=-1, keepdim=True), (0, 2 + 8))
                assert encoded == pytest.approx(meyer_wallach(states).mean().item(), abs=1e-6)


def test_entropy_of_known_weights():
    assert attention_entropy(torch.full((3, 7), 1 / 7)).tolist() == pytest.approx([math.log(7)] * 3)
    assert attention_entropy(torch.eye(5)).tolist() == [0.0] * 5
    weights = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.bfloat16)
    assert attention_entropy(weights).item() == pytest.approx(1.5 * math.log(2))


@pytest.mark.parametrize("attention", ["classical", "qisa", "overlap"])
def test_entropy_of_the_validation_batch(run, logged, attention):
    inputs = FirstInputs()
    model = run("a", AttentionEntropy(windows=3), inputs, attention=attention, max_steps=8).eval()
    found = logged("a", "attention_entropy")
    assert found["attention_entropy/uniform"] == pytest.approx(dict.fromkeys((3, 7), math.log(120) / 5))
    assert len(found) == 1 + 2 * 4
    for layer, module in attention_layers(model).items():
        with torch.no_grad():
            weights = module.weights(inputs.first[layer][:3]).double().numpy()
        logarithms = np.log(np.where(weights > 0, weights, 1))
        entropy = -(weights * logarithms).sum(-1)
        relative = (entropy[..., 1:] / np.log(np.arange(2, 6))).mean((0, 2))
        for head in range(2):
            assert found[f"attention_entropy/{layer}/head{head}"][7] == pytest.approx(entropy[:, head].mean(), rel=1e-5)
            assert found[f"attention_entropy_relative/{layer}/head{head}"][7] == pytest.approx(relative[head], rel=1e-5)


def test_uniform_attention_is_seen_to_be_uniform(run, logged):
    class Silence(L.Callback):
        """Queries of 0 give uniform weights."""

        def on_train_start(self, trainer, pl_module):
            for layer in attention_layers(pl_module).values():
                layer.query_map.requires_grad_(False).linear.weight.zero_()

    run("a", Silence(), AttentionEntropy(), attention="classical", max_steps=4)
    found = logged("a", "attention_entropy")
    for layer in range(2):
        for head in range(2):
            assert found[f"attention_entropy_relative/layer{layer}/head{head}"][3] == pytest.approx(1, abs=1e-6)
            assert found[f"attention_entropy/layer{layer}/head{head}"] == pytest.approx(
                found["attention_entropy/uniform"]
            )


def test_a_window_of_one_token():
    model, watcher = LanguageModel(CharTokenizer("abc"), attention="qisa", num_layers=1), AttentionEntropy()
    with torch.no_grad(), kept(watcher.prepare(model), rows=2) as seen:
        model(torch.tensor([[1], [2], [0]]))
    # nothing is relative to nothing
    assert watcher.values(seen) == {"attention_entropy/uniform": 0, "attention_entropy/layer0/head0": 0}


@pytest.mark.parametrize("kind", [Entanglement, AttentionEntropy])
def test_circuits_on_a_device_are_not_run_again(kind, monkeypatch):
    torch.manual_seed(7)
    sizes = dict(num_layers=1, embed_dim=3, block_size=5)
    model, watcher = LanguageModel(CharTokenizer("abc"), attention="qsann", **sizes).double().eval(), kind()
    found = {}
    for executor in ("folded", "qnode"):
        set_execution(model, executor)
        with torch.no_grad(), kept(watcher.prepare(model), rows=2) as seen:
            model(torch.tensor([[1, 2, 0, 0, 1]]))
        for feature_map in circuit_maps(model).values():
            for method in ("expectations", "states"):
                monkeypatch.setattr(feature_map.executor, method, None)
        with torch.no_grad():
            found[executor] = {name: value.item() for name, value in watcher.values(seen).items()}
    assert found["qnode"] == pytest.approx(found["folded"], abs=1e-12)


# --- pictures ---------------------------------------------------------------------------------------------------


def pictures(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "attention_maps").glob("*"))}


def test_maps_go_to_the_folder_and_to_tensorboard(run, tmp_path):
    board = TensorBoardLogger(tmp_path, name="board", version="")
    run("a", AttentionMaps("the quick"), loggers=[board])
    found = pictures(tmp_path / "a")
    assert list(found) == ["step-000004.png", "step-000008.png"] and len(set(found.values())) == 2
    assert all(png.startswith(b"\x89PNG") for png in found.values())
    events = EventAccumulator(board.log_dir).Reload()
    assert events.Tags()["images"] == ["attention_maps"]
    assert [image.step for image in events.Images("attention_maps")] == [4, 8]


def test_what_is_drawn(run, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("lightning_modules.report._png", lambda figure: b"picture")
    monkeypatch.setattr("lightning_modules.report.attention_figure", drawn.append)
    model = run("a", AttentionMaps("the quick"), max_steps=4).eval()
    (result,) = drawn
    expected, labels = attention_maps(model, "the quick")
    assert result.attention_labels == labels == list("the q")
    for i, layer in enumerate(expected.values()):
        torch.testing.assert_close(result.attention_maps[f"layer {i}"], torch.tensor(layer))


def test_maps_of_the_first_window(run, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("lightning_modules.report._png", lambda figure: b"picture")
    monkeypatch.setattr("lightning_modules.report.attention_figure", drawn.append)
    model = run("a", AttentionMaps(every_n_validations=2))
    data = model.trainer.datamodule
    assert list(pictures(tmp_path / "a")) == ["step-000008.png"]
    first = next(iter(data.val_dataloader()))[0][0]
    assert "".join(drawn[0].attention_labels) == data.tokenizer.decode(first.tolist())


# --- nothing is disturbed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_weights_are_those_without_watchers(run, logged, precision):
    options = dict(attention="qsann", precision=precision, gradient_clip_val=None)
    plain, watched = run("a", **options), run("b", *every_watcher(), **options)
    for key, tensor in plain.state_dict().items():
        assert torch.equal(tensor, watched.state_dict()[key]), key
    first, second = logged("a"), logged("b")
    first.pop("train_characters_per_second", None)
    assert {name: second[name] for name in first} == first
    assert len(second) > len(first) + 50
    assert all(math.isfinite(v) for values in second.values() for v in values.values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in watched.modules())


def test_nothing_is_logged_before_training(run, logged, tmp_path):
    run("a", *every_watcher(), max_steps=3, num_sanity_val_steps=2)
    found = logged("a")
    assert any(name.startswith("gradient_square") for name in found)
    assert not any(name.startswith(("meyer_wallach", "attention_entropy")) for name in found)
    assert not (tmp_path / "a" / "attention_maps").exists()


class At(L.Callback):
    """Raises, or interrupts, at the n-th call of a hook."""

    def __init__(self, hook, count, action):
        def call(*_, **__):
            self.calls += 1
            if self.calls == count:
                action()

        self.calls = 0
        setattr(self, hook, call)


class Killed(Exception):
    pass


def kill():
    raise Killed


def interrupt():
    os.kill(os.getpid(), 2)


@pytest.mark.parametrize(
    ("hook", "count", "action"),
    [
        ("on_train_batch_end", 6, kill),
        ("on_train_batch_end", 8, interrupt),
        ("on_before_optimizer_step", 5, kill),
        ("on_validation_batch_end", 3, interrupt),
        ("on_validation_batch_end", 4, kill),
        ("on_validation_end", 2, interrupt),
    ],
)
def test_a_continued_run_logs_what_the_unbroken_one_does(run, tmp_path, hook, count, action):
    unbroken = run("unbroken", *every_watcher(), num_sanity_val_steps=0)
    with pytest.raises((Killed, Interrupted)):
        run("broken", *every_watcher(), At(hook, count, action), num_sanity_val_steps=0)
    assert 0 < read_checkpoint(tmp_path / "broken" / "checkpoints" / "last.ckpt")["global_step"] < 11
    continued = run("broken", *every_watcher(), resume=True, num_sanity_val_steps=0)
    for key, tensor in unbroken.state_dict().items():
        assert torch.equal(tensor, continued.state_dict()[key]), key
    assert rows(tmp_path / "unbroken") == rows(tmp_path / "broken")
    assert list(pictures(tmp_path / "unbroken")) == ["step-000008.png"]
    assert pictures(tmp_path / "unbroken") == pictures(tmp_path / "broken")


def test_hooks_do_not_outlive_an_error(run):
    model, watcher = [], AttentionEntropy()

    class Fails(L.Callback):
        def on_validation_batch_start(self, trainer, pl_module, *_):
            model.append(pl_module)
            if len(model) == 3:
                raise Killed

    with pytest.raises(Killed):
        run("a", watcher, Fails(), num_sanity_val_steps=0)
    assert not any(m._forward_hooks for m in model[0].modules())


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["classical", "qisa-absorbed"])
@pytest.mark.parametrize("watcher", [GradientVariance, Entanglement])
def test_no_circuits_to_watch(run, attention, watcher):
    with pytest.raises(ValueError, match=f"^{watcher.__name__} has nothing to watch: there is no circuit .*qisa$"):
        run("a", watcher(), attention=attention)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GradientVariance(horizon=1), "horizon must be at least 2 steps; got 1"),
        (lambda: Entanglement(windows=0), "windows must be at least 1; got 0"),
        (lambda: AttentionEntropy(windows=-1), "windows must be at least 1; got -1"),
        (lambda: AttentionMaps(every_n_validations=0), "every_n_validations must be at least 1; got 0"),
        (lambda: watchers("gradients,weather"), "cannot watch 'weather'; choose from gradients, entanglement"),
    ],
)
def test_bad_options(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(("text", "message"), [("", "at least one token; got ''"), ("thé", "character 'é'")])
def test_a_text_that_cannot_be_drawn(run, text, message):
    with pytest.raises(ValueError, match=message):
        run("a", AttentionMaps(text))


def test_names():
    assert [type(w) for w in watchers(" maps, gradients ,maps")] == [AttentionMaps, GradientVariance]
    assert [type(w) for w in watchers("maps,gradients", besides=[AttentionMaps("a")])] == [GradientVariance]
    assert [type(w) for w in watchers(list(WATCHERS))] == list(WATCHERS.values())
    assert watchers(None) == watchers([]) == []


# --- the command line -------------------------------------------------------------------------------------------


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """`qattn fit` on a tiny model, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    before, deterministic = dict(os.environ), torch.are_deterministic_algorithms_enabled()
    Path("text.txt").write_text(TEXT)
    tiny = [
        *("--data.corpus", "text.txt", "--data.batch_size", "4", "--data.eval_windows", "7", "--run", "a"),
        *("--model.num_layers", "1", "--model.num_heads", "2", "--model.embed_dim", "6", "--model.block_size", "5"),
        *("--trainer.max_steps", "5", "--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "1"),
        *("--trainer.accelerator", "cpu"),
    ]
    yield lambda *options: cli.main(["fit", *tiny, *options])
    torch.use_deterministic_algorithms(deterministic)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


COLUMNS = {
    "gradient_square/layer0/value",
    "gradient_variance/layer0/value/wire2",
    "meyer_wallach/layer0/value/head1",
    "meyer_wallach_encoded/layer0/value/head0",
    "attention_entropy/layer0/head1",
    "attention_entropy/uniform",
    "attention_entropy_relative/layer0/head0",
}


def test_watch(fit, logged, tmp_path, capsys):
    assert fit("--watch", "gradients,entanglement,entropy,maps") == 0
    assert COLUMNS <= logged("runs/a").keys()
    assert list(pictures(tmp_path / "runs" / "a")) == ["step-000002.png", "step-000004.png"]
    assert fit("--overwrite") == 0
    assert not COLUMNS & logged("runs/a").keys() and not pictures(tmp_path / "runs" / "a")
    capsys.readouterr()
    assert cli.main(["validate", "--ckpt_path", "runs/a", "--watch", "entropy,entanglement"]) == 0
    out = capsys.readouterr().out
    assert "attention_entropy_relative/layer0/head1" in out and "meyer_wallach/layer0/value/head0" in out


def test_watchers_in_a_config(fit, logged, tmp_path):
    config = {
        "watch": ["entropy", "maps"],  # maps are those described below
        "trainer": {
            "callbacks": [
                {"class_path": "lightning_modules.watching.GradientVariance", "init_args": {"horizon": 7}},
                {
                    "class_path": "lightning_modules.watching.AttentionMaps",
                    "init_args": {"text": "the lazy dog", "every_n_validations": 2},
                },
            ]
        },
    }
    Path("watch.yaml").write_text(yaml.safe_dump(config))
    assert fit("--config", "watch.yaml", "--trainer.callbacks+", "lightning_modules.watching.Entanglement") == 0
    assert COLUMNS <= logged("runs/a").keys()
    assert list(pictures(tmp_path / "runs" / "a")) == ["step-000004.png"]
    before = rows(tmp_path / "runs" / "a")
    assert cli.main(["fit", "--config", "runs/a/config.yaml", "--overwrite"]) == 0  # the config of the run has it all
    assert rows(tmp_path / "runs" / "a") == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--watch", "weather"], "cannot watch 'weather'; choose from gradients, entanglement, entropy, maps"),
        (["--watch", "gradients", "--model.attention", "classical"], "GradientVariance has nothing to watch"),
        (["--trainer.callbacks+", "lightning_modules.watching.Entanglement", "--trainer.callbacks.windows", "0"], "0"),
    ],
)
def test_refused_in_one_line_before_anything_is_written(fit, capsys, options, message):
    assert fit(*options) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("qattn: error: ") and message in error[0]
    assert not Path("runs").exists()
