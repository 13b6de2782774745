"""Post steps: they change or judge a proposal after the model and before it is merged and written.

A step is a function `step(proposal) -> proposal`. To add one, write it in its own file and add it to `post_steps`.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from refinetool.post.guard import judge
from refinetool.post.parts import undo_doubtful_parts
from refinetool.post.snap import snap_to_edges
from refinetool.post.specks import remove_specks
from refinetool.records import Proposal
from refinetool.settings import GuardThresholds, RefineSettings

Step: TypeAlias = Callable[[Proposal], Proposal]


def post_steps(settings: RefineSettings) -> tuple[Step, ...]:
    """Return the steps of settings, in order. The guard is last, because it judges what would be written.

    Settings that were not resolved get the thresholds of a model that was not measured.
    """
    thresholds = settings.guard.thresholds(GuardThresholds())
    steps: list[Step] = []
    if settings.snap.mode == "guided":
        steps.append(partial(snap_to_edges, settings=settings.snap))
    if max(thresholds.min_part_confidence, thresholds.min_part_depth) > 0:
        steps.append(partial(undo_doubtful_parts, thresholds=thresholds))
    steps.append(partial(remove_specks, settings=settings.specks))
    steps.append(partial(judge, thresholds=thresholds))
    return tuple(steps)


__all__ = ["Step", "post_steps"]
