"""Neighbouring tokens on one register: by hand, in any order of memory, token by token."""

import pytest
import torch
from dense_reference import word_matrix

from pennylane_qattn import build_attention
from pennylane_qattn.neighbours import join_neighbours


def test_by_hand():
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    joint, recent = join_neighbours(x, 2)
    assert joint.tolist() == [[[0, 1, 0, 2], [1, 3, 2, 4], [3, 5, 4, 6]]]
    assert recent.inputs.tolist() == [[[5, 6]]] and recent.times is None


def test_tokens_without_positions_have_those_of_memory():
    """As soon as others have positions or padding; what lies before the first is no token."""
    x = torch.arange(1.0, 5)[None, :, None]
    _, recent = join_neighbours(x[:, :1], 3)
    joint, recent = join_neighbours(x[:, 1:2], 3, torch.tensor([[False]]), recent=recent, past=1)
    assert joint.tolist() == [[[0, 1, 2]]] and recent.times.tolist() == [[0, 1]] and recent.in_order
    _, recent = join_neighbours(x[:, :1], 3)
    joint, recent = join_neighbours(x[:, 1:], 3, positions=torch.tensor([[3, 1, 2]]), recent=recent, past=1)
    assert joint.tolist() == [[[3, 4, 2], [0, 1, 3], [1, 3, 4]]] and recent.times.tolist() == [[2, 3]]
    _, recent = join_neighbours(x[:, :2], 2)
    with pytest.raises(ValueError, match="must come in the order of time; got position 0 after 1"):
        join_neighbours(x[:, 2:3], 2, positions=torch.tensor([[0]]), recent=recent, past=2)


def test_padding_joins_nobody():
    x = torch.tensor([[[1.0], [float("nan")], [3.0], [5.0]]])
    joint, recent = join_neighbours(x, 3, padding=torch.tensor([[False, True, False, False]]))
    assert joint[0, [0, 2, 3]].tolist() == [[0, 0, 1], [0, 1, 3], [1, 3, 5]]
    assert recent.inputs.tolist() == [[[3], [5]]]


@pytest.mark.parametrize("span", [2, 3, 5])
def test_order_of_memory_does_not_matter(span, rng):
    x = torch.randn(3, 7, 2, generator=rng)
    in_time, _ = join_neighbours(x, span)
    order = torch.stack([torch.randperm(7, generator=rng) for _ in range(3)])
    shuffled = x.gather(1, order[..., None].expand(-1, -1, 2))
    joint, _ = join_neighbours(shuffled, span, positions=order)
    assert torch.equal(joint, in_time.gather(1, order[..., None].expand(-1, -1, 2 * span)))


@pytest.mark.parametrize("span", [2, 3, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_piece_by_piece(span, padded, rng):
    x = torch.randn(2, 7, 3, generator=rng)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, :3] = padded
    whole, _ = join_neighbours(x, span, padding if padded else None)
    pieces, recent, past = [], None, 0
    for size in (1, 3, 1, 2):
        part = slice(past, past + size)
        # only the first pieces have padding
        given = padding[:, part] if padded and past < 4 else None
        joint, recent = join_neighbours(x[:, part], span, given, None, recent, past)
        pieces.append(joint)
        past += size
    real = ~padding
    assert torch.equal(torch.cat(pieces, dim=1)[real], whole[real])


def test_tokens_come_in_the_order_of_time(rng):
    """A token that came before would have been joined with one that comes after it in memory, and before it in time."""
    x = torch.randn(2, 3, 2, generator=rng)
    _, recent = join_neighbours(x[:, :2], 2, positions=torch.tensor([[0, 5], [0, 1]]))
    with pytest.raises(ValueError, match="must come in the order of time; got position 3 after 5"):
        join_neighbours(x[:, 2:], 2, positions=torch.tensor([[3], [3]]), recent=recent, past=2)
    with pytest.raises(ValueError, match="must come in the order of time; got position 2 after 5"):
        join_neighbours(x[:, 2:], 2, recent=recent, past=2)


@pytest.mark.parametrize("split", [False, True])
def test_values_are_words_of_the_joint_state(split, rng):
    """`u^T P u` of two tokens side by side, written out."""
    torch.manual_seed(3)
    attention = build_attention("scaled-dot", 6, 2, 5, span=2, split=split, values="quadratic").double()
    x = torch.randn(1, 2, 6, dtype=torch.float64, generator=rng)
    found = attention.value_map(join_neighbours(x, 2)[0])
    first, second = x[0]
    for head, words in enumerate(attention.value_map.words):
        own = slice(3 * head, 3 * head + 3) if split else slice(None)
        joint = torch.stack((first[own], second[own]), dim=1).flatten()
        u = torch.zeros(2 ** len(words[0]), dtype=torch.float64)
        u[: len(joint)] = attention.value_map.weight[head].detach() @ joint
        for number, word in enumerate(words):
            matrix = torch.as_tensor(word_matrix(word).real)
            torch.testing.assert_close(found[0, head, 1, number], u @ matrix @ u, rtol=1e-12, atol=1e-12)


def test_widths_must_fit():
    with pytest.raises(ValueError, match=r"values 2 tokens; got widths \[4, 4, 4\]"):
        part = build_attention("classical", 4, 1, 3)
        type(part)(part.query_map, part.key_map, part.value_map, part.score, block_size=3, span=2)
    with pytest.raises(ValueError, match="span must be at least 1, the token itself; got 0"):
        type(part)(part.query_map, part.key_map, part.value_map, part.score, block_size=3, span=0)
    with pytest.raises(ValueError, match="span must be an integer of at least 1, the token itself; got 0"):
        build_attention("gaussian", 4, 1, 3, span=0)
