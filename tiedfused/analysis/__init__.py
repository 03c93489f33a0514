"""Looking at tied models: is the transpose an inverse, what does each half learn, what does a step cost, which shapes.

None of it is needed to train; everything prints as a table.
"""

from tiedfused.analysis.counting import Summary, summary
from tiedfused.analysis.decoders import (
    DecoderComparison,
    compare_decoders,
    condition_number,
    decoder_matrix,
    noise_gain,
    orthogonality,
    pca_error,
    subspace_angle,
)
from tiedfused.analysis.gradients import GradientReport, gradient_report
from tiedfused.analysis.shapes import Trace, trace

__all__ = [
    "DecoderComparison",
    "GradientReport",
    "Summary",
    "Trace",
    "compare_decoders",
    "condition_number",
    "decoder_matrix",
    "gradient_report",
    "noise_gain",
    "orthogonality",
    "pca_error",
    "subspace_angle",
    "summary",
    "trace",
]
