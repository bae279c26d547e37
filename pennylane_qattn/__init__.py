"""Quantum and quantum-inspired self-attention as ordinary PyTorch modules, on any PennyLane device."""

from pennylane_qattn.ansatz import (
    ANSATZE,
    Ansatz,
    BasicEntangler,
    FunctionAnsatz,
    QISAAnsatz,
    StronglyEntangling,
)
from pennylane_qattn.attention import Attention, KeyValueCache
from pennylane_qattn.circuit import Circuit
from pennylane_qattn.encoding import ENCODINGS, AmplitudeEncoding, AngleEncoding, Encoding
from pennylane_qattn.execution import make_executor, set_execution
from pennylane_qattn.features import (
    CircuitFeatureMap,
    FeatureMap,
    LinearFeatureMap,
    QuadraticFeatureMap,
    StateFeatureMap,
)
from pennylane_qattn.layer import CircuitLayer
from pennylane_qattn.mechanisms import (
    ATTENTION,
    QISA,
    QSANN,
    Classical,
    Gaussian,
    Mechanism,
    Overlap,
    QISAAbsorbed,
    QSANNMulti,
    build_attention,
)
from pennylane_qattn.noise import Noise
from pennylane_qattn.openqasm import measurement_settings, to_openqasm
from pennylane_qattn.planning import Execution, Plan
from pennylane_qattn.resources import circuit_resources, training_executions
from pennylane_qattn.scores import GaussianScore, OverlapScore, PublishedGaussianScore, ScaledDotScore, Score

__all__ = [
    "ANSATZE",
    "ATTENTION",
    "ENCODINGS",
    "QISA",
    "QSANN",
    "AmplitudeEncoding",
    "AngleEncoding",
    "Ansatz",
    "Attention",
    "BasicEntangler",
    "Circuit",
    "CircuitFeatureMap",
    "CircuitLayer",
    "Classical",
    "Encoding",
    "Execution",
    "FeatureMap",
    "FunctionAnsatz",
    "Gaussian",
    "GaussianScore",
    "KeyValueCache",
    "LinearFeatureMap",
    "Mechanism",
    "Noise",
    "Overlap",
    "OverlapScore",
    "Plan",
    "PublishedGaussianScore",
    "QISAAbsorbed",
    "QISAAnsatz",
    "QSANN",
    "QSANNMulti",
    "QuadraticFeatureMap",
    "ScaledDotScore",
    "Score",
    "StateFeatureMap",
    "StronglyEntangling",
    "build_attention",
    "circuit_resources",
    "make_executor",
    "measurement_settings",
    "set_execution",
    "to_openqasm",
    "training_executions",
]
