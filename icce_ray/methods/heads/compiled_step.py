"""The passes of step.py as ``torch.compile`` makes them, for long runs on a GPU.

A step on a GPU waits for memory more than for products. Compiled, its many elementwise operations become a few kernels,
and the products with the prototypes are in half precision: cosines in float16, their gradients in bfloat16. Every sum
is float32.
"""

import logging

import torch

from icce_ray.config import HeadsConfig
from icce_ray.methods.heads.inputs import HeadInputs
from icce_ray.methods.heads.model import PrototypeDtypes
from icce_ray.methods.heads.state import HeadState
from icce_ray.methods.heads.step import Passes, student_pass, teacher_pass

MIN_COMPILED_WORK = 1e12
"""Steps x heads x rows x clusters from which compiling, which takes about half a minute, pays off soon."""

PLAIN = Passes(teacher_pass, student_pass, PrototypeDtypes())
HALF = PrototypeDtypes(torch.float16, torch.bfloat16)

logger = logging.getLogger(__name__)


def choose_passes(
    settings: HeadsConfig, states: list[HeadState], inputs: HeadInputs, slices: list[slice], num_steps: int
) -> Passes:
    """Compiled passes where they pay off: on a GPU, in bfloat16, for a long run. Otherwise, or if torch cannot compile
    here, the plain ones.

    Args:
        states: of the blocks of heads; not changed.
        inputs: with the shape, dtype and device of a batch.
        slices: of the blocks.
    """
    num_rows, num_clusters = len(inputs.batch_nD), states[0].prior_HK.shape[1]
    work = num_steps * settings.num_heads * num_rows * num_clusters
    if inputs.batch_nD.device.type != "cuda" or inputs.batch_nD.dtype != torch.bfloat16 or work < MIN_COMPILED_WORK:
        return PLAIN
    passes = compiled_passes(HALF)
    try:
        for state, heads in zip(states, slices, strict=True):
            _try_out(passes, settings, state, inputs, heads)
    except Exception as error:  # a missing compiler, a torch that does not fit it: of many types
        logger.warning("heads: torch cannot compile the training step, which will take twice as long: %s", error)
        return PLAIN
    return passes


def compiled_passes(dtypes: PrototypeDtypes, backend: str = "inductor") -> Passes:
    """Compiled for static shapes, so that a batch of another size does not change the kernels of the first."""
    torch.compiler.reset()  # what an earlier run of this process compiled counts towards a limit
    teacher = torch.compile(teacher_pass, fullgraph=True, dynamic=False, backend=backend)
    student = torch.compile(student_pass, fullgraph=True, dynamic=False, backend=backend)
    return Passes(teacher, student, dtypes)


def _try_out(passes: Passes, settings: HeadsConfig, state: HeadState, inputs: HeadInputs, heads: slice) -> None:
    """Compute both passes, which compiles them."""
    num_views = 1 + settings.num_positives
    num_pairs = len(inputs.batch_nD) // num_views
    one = torch.ones((), device=state.prior_HK.device)
    targets, weight_B = None, None
    if settings.loss == "temi":
        targets, agreement_HB, _, _ = passes.teacher(
            state.teacher, inputs.of(heads), num_views, state.prior_HK, state.balance_H, settings, passes.dtypes
        )
        weight_B = agreement_HB[0]
    passes.student(
        state.student, inputs.of(heads, 2 * num_pairs), targets, state.prior_HK, weight_B, one, one, settings,
        passes.dtypes,
    )  # fmt: skip
