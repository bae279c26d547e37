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


# Noisy circuits. All below is analytic in inputs and angles, complex ones included, so that derivatives can be taken
# to machine precision on a circle in the complex plane: the bra is evolved from the conjugate inputs and angles.


def rz(angle):
    return np.diag([np.exp(-0.5j * angle), np.exp(0.5j * angle)])


def rot(first, second, third):
    return rz(third) @ ry(second) @ rz(first)


def phase_shift(angle):
    return np.diag([1, np.exp(1j * angle)])


def controlled(matrix):
    out = np.eye(4, dtype=complex)
    out[2:, 2:] = matrix
    return out


def pauli_rotation(word, angle):
    return np.cos(angle / 2) * np.eye(2 ** len(word)) - 1j * np.sin(angle / 2) * word_matrix(word)


def middle(block):
    """A gate on two wires that acts on |01>, |10> alone."""
    out = np.eye(4, dtype=complex)
    out[1:3, 1:3] = block
    return out


def ising_xy(angle):
    c, s = np.cos(angle / 2), 1j * np.sin(angle / 2)
    return middle([[c, s], [s, c]])


def pswap(angle):
    phase = np.exp(1j * angle)
    return middle([[0, phase], [phase, 0]])


def single_excitation(angle):
    c, s = np.cos(angle / 2), np.sin(angle / 2)
    return middle([[c, -s], [s, c]])


CNOT = controlled(PAULI["X"])
ISWAP = middle([[0, 1j], [1j, 0]])
HADAMARD = np.array([[1, 1], [1, -1]]) / np.sqrt(2)


def qisa_gates(angles, n):
    """QISA's circuit as (matrix, wires); angles (layers, 3, n)."""
    gates = []
    for first, second, third in np.reshape(angles, (-1, 3, n)):
        for j in range(n):
            gates += [(rx(first[j]), [j]), (ry(second[j]), [j])]
        gates += [(CNOT, [j, (j + 1) % n]) for j in range(n) if n > 1]
        gates += [(ry(third[j]), [j]) for j in range(n)]
    return gates


def strongly_entangling_gates(angles, n):
    """arXiv 1804.00633, CNOTs of range 1, 2, ..., n - 1, 1, ...; angles (layers, n, 3)."""
    gates = []
    for layer, row in enumerate(np.reshape(angles, (-1, n, 3))):
        gates += [(turn(angle), [j]) for j in range(n) for turn, angle in zip((rz, ry, rz), row[j], strict=True)]
        gates += [(CNOT, [j, (j + layer % (n - 1) + 1) % n]) for j in range(n) if n > 1]
    return gates


def basic_entangler_gates(angles, n):
    """Rotations about X, then a ring of CNOTs (one on two wires); angles (layers, n)."""
    gates = []
    for row in np.reshape(angles, (-1, n)):
        gates += [(rx(row[j]), [j]) for j in range(n)]
        gates += [(CNOT, [j, (j + 1) % n]) for j in range(n if n > 2 else n - 1)]
    return gates


def amplitude_encoding(x, n):
    """State and gates; the preparation stands as one gate that does nothing, after which there may be noise."""
    state = np.zeros(2**n, dtype=complex)
    state[: len(x)] = x / np.sqrt((x * x).sum())
    return state, [(np.eye(2**n), list(range(n)))]


def angle_encoding(rotation):
    turn = {"X": rx, "Y": ry}[rotation]

    def encode(x, n):
        return np.eye(2**n, dtype=complex)[0], [(turn(angle), [j]) for j, angle in enumerate(x)]

    return encode


def spread(matrix, wires, n):
    """A matrix on some wires as one on all `n`."""
    order = [*wires, *(w for w in range(n) if w not in wires)]
    full = np.kron(matrix, np.eye(2 ** (n - len(wires)))).reshape((2,) * (2 * n))
    back = np.argsort(order)
    return full.transpose([*back, *(n + back)]).reshape(2**n, 2**n)


def depolarizing(p):
    return [np.sqrt(1 - p) * PAULI["I"], *(np.sqrt(p / 3) * PAULI[letter] for letter in "XYZ")]


def amplitude_damping(probability):
    stays, falls = np.diag([1, np.sqrt(1 - probability)]), np.array([[0, np.sqrt(probability)], [0, 0]])
    return [stays, falls]


def bit_flip(probability):
    return [np.sqrt(1 - probability) * PAULI["I"], np.sqrt(probability) * PAULI["X"]]


def through(channel, density, wire, n):
    kraus = [on_wire(matrix, wire, n) for matrix in channel]
    return sum(matrix @ density @ matrix.conj().T for matrix in kraus)


def noisy_values(circuit, x, angles, words, p=0.0, damping=0.0, readout=0.0):
    """Expectation values of words, by density matrices.

    Args:
        circuit: `f(x, angles)`, the first state and the gates as (matrix, wires).
        p: depolarizing probability after every gate, on each of its wires; after damping.
        damping: amplitude-damping probability there.
        readout: probability that a bit is read wrongly.
    """
    ket, gates = circuit(x, angles)
    bra, duals = circuit(np.conj(x), np.conj(angles))
    n = len(ket).bit_length() - 1
    density = np.outer(ket, bra.conj())
    for (matrix, wires), (dual, _) in zip(gates, duals, strict=True):
        density = spread(matrix, wires, n) @ density @ spread(dual, wires, n).conj().T
        for wire in wires:
            if damping:
                density = through(amplitude_damping(damping), density, wire, n)
            if p:
                density = through(depolarizing(p), density, wire, n)
    values = []
    for word in words:
        # turned so that a letter is read as Z: with H Z H = X, and V Z V+ = Y for V = S H
        turns = {"X": HADAMARD, "Y": (np.diag([1, 1j]) @ HADAMARD).conj().T}
        turn = kron([turns.get(letter, np.eye(2)) for letter in word])
        read = turn @ density @ turn.conj().T
        if readout:
            for wire in range(n):
                read = through(bit_flip(readout), read, wire, n)
        bits = kron([np.eye(2) if letter == "I" else PAULI["Z"] for letter in word])
        values.append(np.trace(bits @ read))
    values = np.array(values)
    return values if np.iscomplexobj(x) or np.iscomplexobj(angles) else values.real


def derivatives(function, point, radius=0.1):
    """Derivatives `(*point.shape, outputs)` of an analytic function that is real on real points.

    Cauchy's integral over a circle by 12 points, of which 6 tell the others; the error is of the order radius ** 12.
    """
    rays = np.exp(1j * np.pi * (np.arange(6) + 0.5) / 6)
    gradient = []
    for number in range(point.size):
        step = np.zeros(point.size)
        step[number] = radius
        step = step.reshape(point.shape)
        gradient.append(sum((function(point + ray * step) / ray).real for ray in rays) / (6 * radius))
    return np.array(gradient).reshape(*point.shape, -1)
