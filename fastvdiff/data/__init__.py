"""Video files and captions in, batches out."""

from fastvdiff.data.cache import FrameCache
from fastvdiff.data.captions import Clip, read_captions, swap_left_right
from fastvdiff.data.dataset import Batch, Sample, VideoFolder, collate
from fastvdiff.data.schedule import BatchSchedule, epoch_order
from fastvdiff.data.shapes import ShapeSpec, caption, render_clip, sample_spec, write_shapes
from fastvdiff.data.video import Video, VideoError, frame_sheet, iter_frames, read_video, write_video

__all__ = [
    "Batch",
    "BatchSchedule",
    "Clip",
    "FrameCache",
    "Sample",
    "ShapeSpec",
    "Video",
    "VideoError",
    "VideoFolder",
    "caption",
    "collate",
    "epoch_order",
    "frame_sheet",
    "iter_frames",
    "read_captions",
    "read_video",
    "render_clip",
    "sample_spec",
    "swap_left_right",
    "write_shapes",
    "write_video",
]
