"""Corpora: texts kept exactly, and Tiny Shakespeare from a folder, the cache or a server on this machine."""

import hashlib
import http.server
import os
import socket
import sys
import threading
from pathlib import Path

import pytest
import torch

from lightning_modules import corpora
from lightning_modules.corpora import CORPORA, cache_dir, load_corpus
from lightning_modules.sources import SOURCES, hidden_markov, markov

PLAY = ("ROMEO:\nBut soft, what light through yonder window breaks?\n" * 50).encode()
NAME = "tinyshakespeare.txt"


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    """A cache of its own, no QATTN_DATA, and no way to the network."""
    monkeypatch.setenv("QATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("QATTN_DATA", raising=False)
    monkeypatch.setattr(corpora, "SHAKESPEARE_URL", "http://127.0.0.1:9/no-server-here")


@pytest.fixture
def play(monkeypatch):
    """A short play in the place of Tiny Shakespeare."""
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", hashlib.sha256(PLAY).hexdigest())
    monkeypatch.setattr(corpora, "SHAKESPEARE_BYTES", len(PLAY))


@pytest.fixture
def server(monkeypatch):
    """Answers with ``server.body``, ``server.status`` and a Content-Length of ``server.promised`` bytes."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests += 1
            self.send_response(server.status)
            self.send_header("Content-Length", str(len(server.body) if server.promised is None else server.promised))
            self.end_headers()
            try:
                self.wfile.write(server.body)
            except ConnectionError:
                server.hung_up.set()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.body, server.status, server.promised, server.requests = PLAY, 200, None, 0
    server.hung_up = threading.Event()
    monkeypatch.setattr(corpora, "SHAKESPEARE_URL", f"http://127.0.0.1:{server.server_port}/input.txt")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def error_of(*args, **options):
    with pytest.raises(ValueError) as error:
        load_corpus(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# pydoc


def test_pydoc_is_the_reference_text_in_order_without_rules():
    topics = pytest.importorskip("pydoc_data.topics").topics
    corpus = load_corpus("pydoc")
    assert corpus == load_corpus("pydoc")
    assert corpus.source == f"pydoc_data.topics of CPython {sys.version.split()[0]}"
    paragraph = "Lambda expressions (sometimes called lambda forms) are used to create\nanonymous functions."
    assert paragraph in corpus.text and paragraph in topics["lambda"]
    positions = [corpus.text.index(topics[key].strip().splitlines()[0]) for key in ("assert", "break", "yield")]
    assert positions == sorted(positions)
    # Nothing but rules and blanks is gone: what is left are the same words in the same order.
    words = [w for key in sorted(topics) for w in topics[key].split()]
    rules = set("*=~^+|-")
    assert [w for w in corpus.text.split() if not set(w) <= rules] == [w for w in words if not set(w) <= rules]
    assert not any(line and set(line.strip()) <= rules and len(line) > 3 for line in corpus.text.splitlines())
    assert "\n\n\n" not in corpus.text and " \n" not in corpus.text
    assert len(corpus.text) > 0.9 * sum(map(len, topics.values()))


def test_pydoc_does_not_depend_on_the_order_of_the_topics(monkeypatch):
    module = pytest.importorskip("pydoc_data.topics")
    text = load_corpus("pydoc").text
    monkeypatch.setattr(module, "topics", dict(reversed(module.topics.items())))
    assert load_corpus("pydoc").text == text


def test_pydoc_missing_from_the_python_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "this Python lacks" in error_of("pydoc")


# Files


def test_a_file_is_kept_exactly(tmp_path):
    data = "\ufeffä\r\nb\rc\n\u2028 \U0001f600\x00".encode()
    (tmp_path / "a text").write_bytes(data)
    corpus = load_corpus(tmp_path / "a text")
    assert corpus.text.encode() == data
    assert (corpus.name, corpus.source) == ("a text", str(tmp_path / "a text"))
    assert "ä" not in repr(corpus)  # a long text stays out of error messages and logs


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text").write_text("here")
    assert load_corpus("~/text").text == "here"


def test_bad_files_are_named_in_one_line(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
    assert error_of(tmp_path / "empty").endswith("empty' is empty; give a file with text")
    assert "latin' is not UTF-8: byte 3 is 0xe9" in error_of(tmp_path / "latin")
    assert f"cannot read {str(tmp_path)!r}: it is a folder" in error_of(tmp_path)
    for unknown in "shakespear", str(tmp_path / "missing"), "x" * 5000:
        message = error_of(unknown)
        assert message.startswith(f"unknown corpus {unknown!r}: there is no such file")
        assert (
            all(name in message for name in CORPORA)
            and "markov:order=2" in message
            and "path of a UTF-8 text file" in message
        )


# Random languages


def test_the_text_of_a_source_with_its_options():
    corpus = load_corpus("markov:order=2, symbols=3,seed=7,length=1009,concentration=0.5")
    source = markov(order=2, symbols=3, seed=7, concentration=0.5)
    assert corpus.name == "markov" and corpus.text == source.sample_text(1009)
    assert torch.equal(corpus.source_model.emission, source.emission)
    described = (
        f"markov:order=2,symbols=3,concentration=0.5,seed=7,length=1009 (entropy rate {source.entropy_rate:.4f} nats)"
    )
    assert corpus.source == described
    again = load_corpus(described.split(" ")[0])
    assert again == corpus and "abc" not in repr(corpus)
    hidden = load_corpus("hidden-markov:states=3,symbols=2,length=101")
    assert hidden.text == hidden_markov(states=3, symbols=2).sample_text(101)
    assert hidden.source.startswith("hidden-markov:states=3,symbols=2,concentration=0.3,seed=0,length=101 ")


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_without_options_is_a_million_symbols(name):
    corpus = load_corpus(name)
    assert corpus == CORPORA[name](None, False) == load_corpus(f"{name}:") and len(corpus.text) == 1_000_000
    assert len(set(corpus.text)) == len(corpus.source_model.symbols)


def test_other_texts_have_no_source(tmp_path):
    (tmp_path / "text").write_text("here")
    assert load_corpus(tmp_path / "text").source_model is None is load_corpus("pydoc").source_model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "orders=2",
            "'orders=2' is no option of the corpus markov; it takes order, symbols, concentration, seed, length,",
        ),
        ("order", "'order' is no option of the corpus markov"),
        ("order=2,", "'' is no option of the corpus markov"),
        ("order=2,order=3", "the corpus markov has two values for its option order"),
        ("order=two", "order of the corpus markov must be an integer; got 'two'"),
        ("order=2.0", "order of the corpus markov must be an integer; got '2.0'"),
        ("concentration=low", "concentration of the corpus markov must be a number; got 'low'"),
        ("length=0", "length of the corpus markov must lie between 1 and 100000000; got 0"),
        ("length=1000000000", "length of the corpus markov must lie between 1 and 100000000"),
        ("symbols=1", "the corpus markov: symbols must be between 2 and 62; got 1"),
        ("order=99", "the corpus markov: order must be between 1 and 64; got 99"),
        ("concentration=nan", "the corpus markov: concentration must lie between 0.01 and 1000; got nan"),
    ],
)
def test_wrong_options_of_a_source(options, message):
    assert message in error_of(f"markov:{options}")


# Tiny Shakespeare


def test_shakespeare_is_looked_for_in_option_variable_and_cache(play, tmp_path, monkeypatch):
    named, data, cache = (tmp_path / name for name in ("option", "variable", "cache"))
    for folder in named, data, cache:
        folder.mkdir()
        (folder / NAME).write_bytes(PLAY)
    monkeypatch.setenv("QATTN_DATA", str(data))
    assert load_corpus("shakespeare", data_dir=named).source == str(named / NAME)
    assert load_corpus("shakespeare").source == str(data / NAME)
    (data / NAME).unlink()
    corpus = load_corpus("shakespeare")
    assert (corpus.name, corpus.text.encode(), corpus.source) == ("shakespeare", PLAY, str(cache / NAME))
    (named / NAME).unlink()
    assert "holds no tinyshakespeare.txt" in error_of("shakespeare", data_dir=named)


@pytest.mark.parametrize("place", ["option", "variable", "cache"])
def test_a_wrong_file_is_an_error_wherever_it_lies(play, tmp_path, monkeypatch, place):
    folder = tmp_path / place
    folder.mkdir()
    if place == "variable":
        monkeypatch.setenv("QATTN_DATA", str(folder))
    options = {"data_dir": folder} if place == "option" else {}
    wrong = PLAY.replace(b"soft", b"loud")
    (folder / NAME).write_bytes(wrong)
    message = error_of("shakespeare", **options)
    assert str(folder) in message and f"sha256 {hashlib.sha256(wrong).hexdigest()} instead of" in message
    (folder / NAME).write_bytes(PLAY[:-1])
    assert f"is not Tiny Shakespeare: {len(PLAY) - 1} bytes instead of {len(PLAY)}" in error_of(
        "shakespeare", **options
    )
    assert (folder / NAME).read_bytes() == PLAY[:-1]


def test_without_download_it_must_be_there(tmp_path):
    message = error_of("shakespeare", download=False)
    assert str(tmp_path / "cache") in message and "QATTN_DATA" in message


def test_the_download_goes_to_the_cache_once(play, server, tmp_path, capfd):
    corpus = load_corpus("shakespeare")
    assert (corpus.text.encode(), corpus.source) == (PLAY, corpora.SHAKESPEARE_URL)
    assert os.listdir(tmp_path / "cache") == [NAME] and (tmp_path / "cache" / NAME).read_bytes() == PLAY
    assert load_corpus("shakespeare").source == str(tmp_path / "cache" / NAME)
    assert server.requests == 1
    printed = capfd.readouterr()
    assert "Tiny Shakespeare" in printed.err and not printed.out


def test_any_url_will_do(play, tmp_path, monkeypatch):
    (tmp_path / "there").write_bytes(PLAY)
    monkeypatch.setattr(corpora, "SHAKESPEARE_URL", (tmp_path / "there").as_uri())
    assert load_corpus("shakespeare").text.encode() == PLAY


def test_two_downloads_at_once(play, server, tmp_path):
    results = []
    threads = [threading.Thread(target=lambda: results.append(load_corpus("shakespeare"))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [corpus.text.encode() for corpus in results] == [PLAY] * 5
    assert os.listdir(tmp_path / "cache") == [NAME]


@pytest.mark.parametrize(
    ("body", "promised", "message"),
    [
        (PLAY.replace(b"soft", b"loud"), None, "is not Tiny Shakespeare: sha256 "),
        (b"<html>Sign in</html>", None, f"is not Tiny Shakespeare: 20 bytes instead of {len(PLAY)}"),
        (PLAY[:1000], len(PLAY), f"1000 bytes instead of {len(PLAY)}"),
        (PLAY * 100, None, f"more than {len(PLAY)} bytes"),
        (b"", None, "0 bytes instead of"),
    ],
)
def test_a_wrong_download_leaves_nothing_behind(play, server, tmp_path, body, promised, message):
    server.body, server.promised = body, promised
    error = error_of("shakespeare")
    assert message in error and corpora.SHAKESPEARE_URL in error and "QATTN_DATA" in error
    assert not (tmp_path / "cache").exists()


def test_a_download_without_end_is_cut_off(play, server):
    server.body = PLAY * 5000
    assert f"more than {len(PLAY)} bytes" in error_of("shakespeare")
    assert server.hung_up.wait(10)


def test_a_failed_download_names_url_reason_and_remedy(play, server, tmp_path, monkeypatch):
    server.status = 404
    assert f"download of {corpora.SHAKESPEARE_URL} failed: HTTP 404 Not Found; put" in error_of("shakespeare")
    monkeypatch.setattr(corpora, "SHAKESPEARE_URL", (tmp_path / "nothing").as_uri())
    assert "failed: " in error_of("shakespeare")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        monkeypatch.setattr(corpora, "TIMEOUT_SECONDS", 0.2)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(corpora, "SHAKESPEARE_URL", url)
        assert f"download of {url} failed: timed out; put {NAME}" in error_of("shakespeare")
    assert "Connection refused; put" in error_of("shakespeare")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_an_error(play, server, tmp_path):
    (tmp_path / "cache").write_bytes(b"in the way")
    assert "cannot write" in error_of("shakespeare")


def test_the_cache_is_where_the_platform_keeps_caches(monkeypatch):
    assert cache_dir() == Path(os.environ["QATTN_CACHE"])
    monkeypatch.delenv("QATTN_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/pennylane-qattn")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/romeo")
    assert cache_dir() == Path("/home/romeo/.cache/pennylane-qattn")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_dir() == Path("/home/romeo/Library/Caches/pennylane-qattn")


def test_the_constants_are_those_of_the_published_file():
    assert corpora.SHAKESPEARE_SHA256 == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert corpora.SHAKESPEARE_BYTES == 1_115_394


REAL = os.environ.get("QATTN_DATA")


@pytest.mark.skipif(not REAL or not Path(REAL, NAME).is_file(), reason="QATTN_DATA names no folder with the file")
def test_tiny_shakespeare_itself(monkeypatch):
    monkeypatch.setenv("QATTN_DATA", REAL)
    text = load_corpus("shakespeare").text
    assert text.startswith("First Citizen:\n") and len(text) == 1_115_394 and len(set(text)) == 65
