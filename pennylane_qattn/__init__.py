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
from pennylane_qattn.causality import Certificate, certify
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
from pennylane_qattn.grover.score import AmplificationScore
from pennylane_qattn.layer import CircuitLayer
from pennylane_qattn.mechanisms import (
    ATTENTION,
    QISA,
    QSANN,
    VALUES,
    Classical,
    Gaussian,
    Grover,
    GroverSparse,
    Mechanism,
    NGram,
    Overlap,
    QISAAbsorbed,
    QSANNMulti,
    ScaledDot,
    build_attention,
)
from pennylane_qattn.multihead import MultiheadAttention
from pennylane_qattn.noise import Noise
from pennylane_qattn.openqasm import measurement_settings, to_openqasm
from pennylane_qattn.planning import Execution, Plan
from pennylane_qattn.published import QISAAbsorbedPublished, QISAPublished, QSANNMultiPublished, QSANNPublished
from pennylane_qattn.resources import circuit_resources, training_executions
from pennylane_qattn.reuploading import ReuploadedFeatureMap
from pennylane_qattn.scores import (
    GaussianScore,
    OverlapScore,
    PublishedGaussianScore,
    ScaledDotScore,
    Score,
    TemperedDotScore,
)
from pennylane_qattn.value_maps import (
    LearnedCircuitFeatureMap,
    LearnedQuadraticFeatureMap,
    MixedFeatureMap,
    RandomAbsorbedFeatureMap,
    RandomQuadraticFeatureMap,
    RectifiedFeatureMap,
)

__all__ = [
    "ANSATZE",
    "ATTENTION",
    "ENCODINGS",
    "QISA",
    "QSANN",
    "VALUES",
    "AmplificationScore",
    "AmplitudeEncoding",
    "AngleEncoding",
    "Ansatz",
    "Attention",
    "BasicEntangler",
    "Certificate",
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
    "Grover",
    "GroverSparse",
    "KeyValueCache",
    "LearnedCircuitFeatureMap",
    "LearnedQuadraticFeatureMap",
    "LinearFeatureMap",
    "Mechanism",
    "MixedFeatureMap",
    "MultiheadAttention",
    "NGram",
    "Noise",
    "Overlap",
    "OverlapScore",
    "Plan",
    "PublishedGaussianScore",
    "QISAAbsorbed",
    "QISAAbsorbedPublished",
    "QISAAnsatz",
    "QISAPublished",
    "QSANNMulti",
    "QSANNMultiPublished",
    "QSANNPublished",
    "QuadraticFeatureMap",
    "RandomAbsorbedFeatureMap",
    "RandomQuadraticFeatureMap",
    "RectifiedFeatureMap",
    "ReuploadedFeatureMap",
    "ScaledDot",
    "ScaledDotScore",
    "Score",
    "StateFeatureMap",
    "StronglyEntangling",
    "TemperedDotScore",
    "build_attention",
    "certify",
    "circuit_resources",
    "make_executor",
    "measurement_settings",
    "set_execution",
    "to_openqasm",
    "training_executions",
]
