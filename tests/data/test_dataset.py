"""A folder of captioned videos: which frames, which caption, in which order, and what is refused."""

import json
import os
import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastvdiff.data import (
    BatchSchedule,
    VideoError,
    VideoFolder,
    collate,
    epoch_order,
    swap_left_right,
    write_shapes,
    write_video,
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    write_shapes(root, clips=8, num_frames=12, size=32)
    return root


def numbered(count: int, height: int = 16, width: int = 16) -> np.ndarray:
    """Frames whose grey level is 20 + 4 * their number."""
    levels = (20 + 4 * np.arange(count, dtype=np.uint8))[:, None, None, None]
    return np.broadcast_to(levels, (count, height, width, 3))


def which(video: torch.Tensor) -> list[int]:
    return (((video.mean((0, 2, 3)) + 1) * 127.5 - 20) / 4).round().int().tolist()


def folder(root, captions: list[dict], frames: np.ndarray | None = None, fps: float = 8):
    for fields in captions:
        write_video(root / fields["file"], numbered(12) if frames is None else frames, fps)
    (root / "captions.jsonl").write_text("".join(json.dumps(fields) + "\n" for fields in captions))
    return root


def test_a_sample(shapes):
    videos = VideoFolder(shapes, num_frames=12, size=32)
    assert len(videos) == 8
    sample = videos[2]
    assert sample["video"].shape == (3, 12, 32, 32)
    assert sample["video"].dtype == torch.float32
    assert -1 <= sample["video"].min() < sample["video"].max() <= 1
    line = json.loads((shapes / "captions.jsonl").read_text().splitlines()[2])
    assert (sample["caption"], sample["index"]) == (line["caption"], 2)
    assert videos[-6]["index"] == 2
    with pytest.raises(IndexError, match="index 8 out of range for 8 clips"):
        videos[8]


def test_some_of_a_folders_clips(shapes):
    videos, some = (VideoFolder(shapes, num_frames=12, size=16, numbers=numbers) for numbers in (None, [5, 1]))
    assert len(some) == 2
    for index, number in enumerate((5, 1)):
        assert torch.equal(some[index]["video"], videos[number]["video"])
        assert (some[index]["caption"], some[index]["index"]) == (videos[number]["caption"], index)


def test_collate(shapes):
    videos = VideoFolder(shapes, num_frames=4, size=(16, 24))
    batch = collate([videos[1], videos[5]])
    assert batch["video"].shape == (2, 3, 4, 16, 24)
    assert batch["caption"] == [videos[1]["caption"], videos[5]["caption"]]
    assert batch["index"].tolist() == [1, 5]


def test_sampling_rate_and_temporal_start(tmp_path):
    folder(tmp_path, [{"file": "a.mp4", "caption": "grey"}], numbered(24))
    assert which(VideoFolder(tmp_path, num_frames=12, size=16, fps=4)[0]["video"]) == list(range(0, 24, 2))
    assert which(VideoFolder(tmp_path, num_frames=24, size=16)[0]["video"]) == list(range(24))
    videos = VideoFolder(tmp_path, num_frames=4, size=16)
    firsts = set()
    for epoch in range(80):
        videos.set_epoch(epoch)
        picked = which(videos[0]["video"])
        assert picked == list(range(picked[0], picked[0] + 4))
        firsts.add(picked[0])
    assert {0, 20} <= firsts <= set(range(21))
    assert len(firsts) > 15


def test_choices_depend_on_seed_epoch_and_index_only(shapes):
    def epoch_of(videos, epoch, order):
        videos.set_epoch(epoch)
        return {index: (videos[index]["caption"], videos[index]["video"]) for index in order}

    options = {"num_frames": 4, "size": 32, "random_flip": True}
    one = epoch_of(VideoFolder(shapes, **options), 3, range(8))
    other_folder = VideoFolder(shapes, **options, cache=False)
    epoch_of(other_folder, 0, [5, 1])
    other = epoch_of(other_folder, 3, reversed(range(8)))
    for index in range(8):
        assert one[index][0] == other[index][0]
        assert torch.equal(one[index][1], other[index][1])
    by_key = VideoFolder(shapes, **options)
    assert torch.equal(by_key[3, 6]["video"], one[6][1])
    another_seed = epoch_of(VideoFolder(shapes, **options, seed=1), 3, range(8))
    assert any(not torch.equal(one[index][1], another_seed[index][1]) for index in range(8))


def test_flipping_swaps_the_words(shapes):
    plain = VideoFolder(shapes, num_frames=12, size=32)
    videos = VideoFolder(shapes, num_frames=12, size=32, random_flip=True)
    flips = 0
    for epoch in range(6):
        for index in range(8):
            sample, original = videos[epoch, index], plain[index]
            if torch.equal(sample["video"], original["video"]):
                assert sample["caption"] == original["caption"]
            else:
                assert torch.equal(sample["video"], original["video"].flip(-1))
                assert sample["caption"] == swap_left_right(original["caption"])
                flips += 1
    assert 12 < flips < 36


@pytest.mark.parametrize(
    ("caption", "mirrored"),
    [
        ("a red circle moving right", "a red circle moving left"),
        ("from left to right", "from right to left"),
        ("Left, then RIGHT", "Right, then LEFT"),
        ("moving leftwards and rightward", "moving rightwards and leftward"),
        ("a bright cleft moving up", "a bright cleft moving up"),
    ],
)
def test_swap_left_right(caption, mirrored):
    assert swap_left_right(caption) == mirrored
    assert swap_left_right(mirrored) == caption


def test_resize_and_centre_crop(tmp_path):
    frames = np.zeros((4, 40, 80, 3), np.uint8)
    frames[:, :, 20:60] = 200  # the centre square
    folder(tmp_path, [{"file": "a.mp4", "caption": "x"}], frames)
    video = VideoFolder(tmp_path, num_frames=4, size=20)[0]["video"]
    assert video.shape == (3, 4, 20, 20)
    assert ((video[..., 1:-1] + 1) * 127.5 - 200).abs().max() < 4
    tall = VideoFolder(tmp_path, num_frames=4, size=(40, 10))[0]["video"]
    assert tall.shape == (3, 4, 40, 10)
    assert ((tall + 1) * 127.5 - 200).abs().max() < 4


def test_the_cache_keeps_to_its_budget(shapes):
    clip_bytes = 3 * 12 * 32 * 32
    videos = VideoFolder(shapes, num_frames=12, size=32, cache_bytes=3 * clip_bytes + 1)
    first = [videos[index]["video"] for index in range(8)]
    assert sorted(videos._cached) == [0, 1, 2]
    assert all(torch.equal(videos[index]["video"], first[index]) for index in range(8))
    first[0].zero_()
    assert videos[0]["video"].abs().sum() > 0
    assert VideoFolder(shapes, num_frames=12, size=32, cache=False)._budget == 0


def test_csv_and_text_captions(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.mp4", "sub/a.mp4"):
        write_video(tmp_path / name, numbered(4), 8)
        (tmp_path / name).with_suffix(".txt").write_text(f"text of {name}\n", encoding="utf-8")
    videos = VideoFolder(tmp_path, num_frames=4, size=16)
    assert [clip.caption for clip in videos.clips] == ["text of b.mp4", "text of sub/a.mp4"]
    (tmp_path / "captions.csv").write_text('\ufeffpath,caption\nsub/a.mp4,"one, two"\n', encoding="utf-8")
    videos = VideoFolder(tmp_path, num_frames=4, size=16)
    assert [(clip.path.name, clip.caption) for clip in videos.clips] == [("a.mp4", "one, two")]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('{"file": "a.mp4", "caption": " "}', ValueError, "captions.jsonl line 1: the caption of a.mp4 is empty"),
        ('\n{"file": "a.mp4"}', ValueError, "captions.jsonl line 2: the caption of a.mp4 is empty"),
        ('{"caption": "x"}', ValueError, "line 1: expected the name of a video, got None"),
        ("{nope", ValueError, "line 1: not JSON"),
        ("[1]", ValueError, "line 1: expected an object, got list"),
        ('{"file": "b.mp4", "caption": "x"}', FileNotFoundError, "line 1: no such file: .*b.mp4"),
        ('{"file": "../a.mp4", "caption": "x"}', ValueError, r"line 1: \.\./a.mp4 leaves the folder"),
        ('{"file": "/etc/passwd", "caption": "x"}', ValueError, "line 1: /etc/passwd leaves the folder"),
        ('{"file": "link.mp4", "caption": "x"}', ValueError, "line 1: link.mp4 leaves the folder"),
        ("", ValueError, "captions.jsonl: holds no clips; expected captions.jsonl, captions.csv, or videos"),
        ("\xff", ValueError, "captions.jsonl: captions must be UTF-8 text"),
    ],
)
def test_bad_captions_files(tmp_path, text, error, message):
    root = tmp_path / "root"
    root.mkdir()
    for path in (tmp_path / "a.mp4", root / "a.mp4"):
        write_video(path, numbered(4), 8)
    os.symlink(tmp_path / "a.mp4", root / "link.mp4")
    (root / "captions.jsonl").write_text(text, encoding="latin-1")
    with pytest.raises(error, match=message):
        VideoFolder(root, num_frames=4, size=16)


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        VideoFolder(tmp_path / "nowhere", num_frames=4, size=16)
    with pytest.raises(ValueError, match="holds no clips"):
        VideoFolder(tmp_path, num_frames=4, size=16)
    write_video(tmp_path / "a.mp4", numbered(4), 8)
    with pytest.raises(FileNotFoundError, match=r"a.mp4: no caption; expected it in a.txt beside it"):
        VideoFolder(tmp_path, num_frames=4, size=16)
    (tmp_path / "captions.csv").write_text("file,caption\na.mp4,x\n")
    with pytest.raises(ValueError, match=r"captions.csv: the header has no column path"):
        VideoFolder(tmp_path, num_frames=4, size=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames: expected at least 1, got 0"),
        ({"size": (16, 0)}, "size: expected at least 1, got 0"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"fps": 0}, "fps: expected a positive number, got 0"),
        ({"numbers": []}, "numbers: expected some of 0 to 7, got none"),
        ({"numbers": [3, 8]}, "numbers: expected some of 0 to 7, got 8"),
    ],
)
def test_bad_options(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        VideoFolder(shapes, **{"num_frames": 4, "size": 16} | options)


def test_broken_videos(tmp_path):
    folder(tmp_path, [{"file": f"{k}.mp4", "caption": f"clip {k}"} for k in range(4)])
    videos = VideoFolder(tmp_path, num_frames=12, size=16)
    (tmp_path / "1.mp4").write_bytes((tmp_path / "1.mp4").read_bytes()[:900])
    with pytest.raises(VideoError, match=r"1\.mp4: "):
        videos[1]
    (tmp_path / "2.mp4").unlink()
    with pytest.raises(VideoError, match=r"2\.mp4: no such file"):
        videos[2]


def test_a_video_with_too_few_frames(tmp_path):
    folder(tmp_path, [{"file": "0.mp4", "caption": "x"}])
    with pytest.raises(VideoError, match=r"0\.mp4: too short: 12 frames as stored, num_frames=13"):
        VideoFolder(tmp_path, num_frames=13, size=16)[0]
    with pytest.raises(VideoError, match=r"0\.mp4: too short: 6 frames at 4 fps, num_frames=12"):
        VideoFolder(tmp_path, num_frames=12, size=16, fps=4)[0]


def test_a_broken_video_is_replaced_when_not_strict(tmp_path, caplog):
    folder(tmp_path, [{"file": f"{k}.mp4", "caption": f"clip {k}"} for k in range(4)])
    (tmp_path / "1.mp4").write_bytes(b"broken")
    picked = []
    for _ in range(2):
        videos = VideoFolder(tmp_path, num_frames=12, size=16, strict=False)
        picked.append([videos[epoch, 1]["index"] for epoch in range(10)])
    assert picked[0] == picked[1]
    assert set(picked[0]) == {0, 2, 3}
    assert len([r for r in caplog.records if re.search(r"replaced by another clip: .*1\.mp4", r.message)]) == 2
    (tmp_path / "2.mp4").write_bytes(b"")
    videos = VideoFolder(tmp_path, num_frames=12, size=16, strict=False)
    with pytest.raises(VideoError, match=r"2 of 4 clips are broken; the last: .*\.mp4"):
        [videos[0, index] for index in range(4)]


def test_epoch_order():
    order = epoch_order(0, 5, 100)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(100))
    assert torch.equal(order, epoch_order(0, 5, 100))
    assert not torch.equal(order, epoch_order(0, 6, 100))
    assert not torch.equal(order, epoch_order(1, 5, 100))
    with pytest.raises(ValueError, match="epoch: expected at least 0, got -1"):
        epoch_order(0, -1, 100)


def test_batch_schedule_is_a_function_of_the_step():
    straight = BatchSchedule(10, 3, seed=2)
    batches = [straight.batch(step) for step in range(9)]
    assert straight.batches_per_epoch == 3
    assert [straight.epoch(step) for step in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for epoch in range(3):
        seen = [index for batch in batches[3 * epoch : 3 * epoch + 3] for index in batch]
        assert len(seen) == len(set(seen)) == 9
        assert seen == epoch_order(2, epoch, 10)[:9].tolist()
    for step in (7, 0, 4, 8):
        assert BatchSchedule(10, 3, seed=2).batch(step) == batches[step] == straight.batch(step)
    assert list(straight.keys(4, 6)) == [[(1, index) for index in batches[step]] for step in (4, 5)]
    with pytest.raises(ValueError, match=r"1 <= batch_size <= n, got batch_size=11 and n=10"):
        BatchSchedule(10, 11)
    with pytest.raises(ValueError, match="step: expected at least 0, got -1"):
        straight.batch(-1)


def test_workers_give_the_same_batches(shapes):
    videos = VideoFolder(shapes, num_frames=4, size=16, random_flip=True)
    schedule = BatchSchedule(len(videos), 3)
    expected = [collate([videos[key] for key in keys]) for keys in schedule.keys(1, 5)]
    loader = DataLoader(videos, batch_sampler=schedule.keys(1, 5), collate_fn=collate, num_workers=2)
    for batch, wanted in zip(loader, expected, strict=True):
        assert batch["caption"] == wanted["caption"]
        assert torch.equal(batch["video"], wanted["video"])


def test_a_worker_reports_a_broken_video_as_such(tmp_path):
    folder(tmp_path, [{"file": "a.mp4", "caption": "x"}])
    videos = VideoFolder(tmp_path, num_frames=4, size=16)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(VideoError, match=r"a\.mp4: the file is empty"):
        next(iter(DataLoader(videos, num_workers=1, collate_fn=collate)))
