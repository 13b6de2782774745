"""IoU adaption (SAMRefiner++), without labels. Start with `adapt`."""

from refinetool.train.iou.adapt import adapt_iou

__all__ = ["adapt_iou"]
