"""Dense references in NumPy alone: neither PennyLane nor torch nor the package is imported here."""

import numpy as np

PAULI = {
    "I": np.eye(2),
    "X": np.array([[0, 1], [1, 0]]),
    "Y": np.array([[0, -1j], [1j, 0]]),
    "Z": np.diag([1, -1]),
}


def rx(angle):
    c, s = np.cos(angle / 2), np.sin(angle / 2)
    return np.array([[c, -1j * s], [-1j * s, c]])


def ry(angle):
    c, s = np.cos(angle / 2), np.sin(angle / 2)
    return np.array([[c, -s], [s, c]])


def kron(matrices):
    out = np.eye(1)
    for matrix in matrices:
        out = np.kron(out, matrix)
    return out


def on_wire(matrix, wire, n):
    return kron([matrix if w == wire else np.eye(2) for w in range(n)])


def cnot(control, target, n):
    out = np.zeros((2**n, 2**n))
    for state in range(2**n):
        flip = (state >> (n - 1 - control)) & 1
        out[state ^ (flip << (n - 1 - target)), state] = 1
    return out


def qisa_unitary(angles):
    """QISA's circuit; angles (3, n)."""
    n = angles.shape[1]
    u = np.eye(2**n, dtype=complex)
    for j in range(n):
        u = on_wire(ry(angles[1, j]), j, n) @ on_wire(rx(angles[0, j]), j, n) @ u
    if n > 1:
        for j in range(n):
            u = cnot(j, (j + 1) % n, n) @ u
    for j in range(n):
        u = on_wire(ry(angles[2, j]), j, n) @ u
    return u


def word_matrix(word):
    return kron([PAULI[letter] for letter in word])


def amplitude_state(x, n):
    state = np.zeros(2**n)
    state[: len(x)] = x
    norm = np.linalg.norm(state)
    if norm == 0:
        state[0] = norm = 1.0
    return state / norm


def qisa_values(x, angles, words):
    """Expectation value of each word for one vector."""
    state = qisa_unitary(angles) @ amplitude_state(x, angles.shape[1])
    return np.array([(state.conj() @ word_matrix(w) @ state).real for w in words])


def softmax(a):
    e = np.exp(a - a.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def causal_attention(q, k, v, score):
    """One head, loops over tokens: q (T, f), k (T, f), v (T, h)."""
    out = np.zeros((len(q), v.shape[1]))
    for i in range(len(q)):
        weights = softmax(np.array([score(q[i], k[j]) for j in range(i + 1)]))
        out[i] = weights @ v[: i + 1]
    return out
