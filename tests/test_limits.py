"""No silent ceiling: every limit follows the objects that are asked for, and a line says which one binds."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from typer.testing import CliRunner

import a2fpn
from a2fpn.cli.app import app
from a2fpn.detectors import DETECTORS
from a2fpn.heads.postprocess import PostprocessConfig
from a2fpn.heads.proposals import LIKELY
from a2fpn.heads.roi_heads import in_parts
from a2fpn.inference import Predictor
from tests.coco_data import write_coco
from tests.helpers import randomize, tiny_model

IMAGE = np.random.default_rng(0).integers(0, 256, (128, 192, 3), dtype=np.uint8)


def predictor(name: str, **options: object) -> Predictor:
    torch.manual_seed(0)
    model = tiny_model(f"{name}_fpn", **options)
    randomize(model)
    return Predictor(model, score_threshold=0.0, nms_threshold=1.0)


@pytest.mark.parametrize("name", list(DETECTORS))
def test_as_many_objects_as_are_asked_for(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The models look at 30 proposals, or 20 boxes of a level, and keep 10 objects."""
    find = predictor(name)
    assert len(find(IMAGE)) == 10
    assert "the limit of 10 objects is reached" in caplog.text
    for most in (9, 40, 150):
        caplog.clear()
        result = find(IMAGE, max_objects=most)
        assert len(result) == most
        assert (np.diff(result.scores) <= 0).all()
        assert f"the limit of {most} objects is reached; raise max_objects" in caplog.text
    assert len(find(IMAGE)) == 10


def test_a_limit_of_proposals_that_binds_is_told(caplog: pytest.LogCaptureFixture) -> None:
    find = predictor("maskrcnn", detections_per_image=1000)
    found = len(find(IMAGE))
    assert 8 <= found < 1000
    assert f"{found} objects were found among the model's 30 candidates" in caplog.text
    caplog.clear()
    few = find(IMAGE, score_threshold=0.9999)
    assert len(few) < 7
    assert caplog.text == ""
    more = find(IMAGE, max_objects=1000)
    assert len(more) > 3 * found


def test_tiles_at_their_limit_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    predictor("maskrcnn")(IMAGE, tile=96)
    assert "an image in memory: in 6 of 6 tiles the limit of 10 objects is reached" in caplog.text


def test_evaluation_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    predictor("maskrcnn").predict([torch.from_numpy(IMAGE).permute(2, 0, 1)])
    assert caplog.records == []


def test_more_proposals_are_likely_ones_behind_the_models_own() -> None:
    torch.manual_seed(0)
    model = tiny_model("maskrcnn_fpn").eval()
    randomize(model)
    torch.nn.init.constant_(model.rpn.head.cls_logits.bias, math.log(LIKELY))  # about half are less likely
    batch = model.preprocess([torch.rand(3, 96, 128), torch.rand(3, 96, 128)])
    with torch.inference_mode():
        features = model.features(batch)
        images = ImageList(batch.tensor, batch.sizes)
        own, more = model.rpn.rois(images, features), model.rpn.rois(images, features, candidates=5000)
        few = model.rpn.rois(images, features, candidates=40)
        probabilities = torch.cat([x.flatten() for x in model.rpn.head(list(features.values()))[0]]).sigmoid()
    assert 0 < (probabilities < LIKELY).sum() < len(probabilities)
    for image in range(2):
        first, all_of_it = own[own[:, 0] == image], more[more[:, 0] == image]
        assert 0 < len(first) < len(all_of_it)
        assert all((all_of_it == row).all(1).any() for row in first)
    assert len(more) <= 60 + (probabilities >= LIKELY).sum()
    assert len(few) <= 80


@pytest.mark.parametrize("count", [0, 1, 3, 4, 7])
def test_rois_in_parts_give_what_they_give_together(count: int) -> None:
    rois, labels = torch.rand(count, 5), torch.arange(count)
    sizes: list[int] = []

    def compute(part: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(part))
        return part * 2, own[:, None]

    doubled, column = in_parts(compute, rois, labels, most=3)
    torch.testing.assert_close(doubled, rois * 2)
    assert column[:, 0].tolist() == list(range(count))
    assert max(sizes) <= 3
    assert sum(sizes) == count
    assert all(a >= b for a, b in itertools.pairwise(sizes))


def test_candidates_out_of_range() -> None:
    with pytest.raises(ValueError, match="candidates must be at least 1 or None, got 0"):
        PostprocessConfig(candidates=0)


def test_a_command_tells_of_limits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = a2fpn.save_pretrained(tiny_model("fasterrcnn_fpn"), tmp_path / "model")
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    arguments = ["predict", tmp_path / "a.png", "--model", checkpoint, "--output", tmp_path / "out", "--format", "csv"]
    done = CliRunner().invoke(app, [*map(str, arguments), "--score-threshold", "0"])
    assert done.exit_code == 0, done.output
    assert "a.png: the limit of 10 objects is reached" in caplog.text


def test_evaluation_on_the_command_line_tells_of_limits(tmp_path: Path) -> None:
    folder, annotations = write_coco(tmp_path / "data", images=3)
    categories = tuple(a2fpn.Category(number, f"shape {number}") for number in (7, 23, 90))
    model = tiny_model("fasterrcnn_fpn", num_classes=3, categories=categories)
    checkpoint = a2fpn.save_pretrained(model, tmp_path / "model")
    command = ["evaluate", "--model", checkpoint, "--images", folder, "--annotations", annotations, "--quiet"]

    def said(*options: object) -> str:
        done = CliRunner().invoke(app, [str(x) for x in [*command, *options]], env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        return done.output

    assert "3 of 3 images reach the limit of 10 objects; raise --max-objects" in said()
    assert said("--max-objects", 5000) == ""
    few = said("--max-objects", 5000, "--max-detections", 1)
    assert re.search(r"has up to (\d+) objects of a class per image, .* the best 1 .* set --max-detections \1 ", few)
